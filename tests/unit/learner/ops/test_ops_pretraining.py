"""The negative log-likelihood that PPO-ptx adds and rejection-sampling fine-tuning learns."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from op_batches import close, t64

from learner.ops import pretraining

TEXTS = st.lists(st.lists(st.floats(-30, -0.01), min_size=1, max_size=6), min_size=1, max_size=5)


def run(texts: list[list[float]], *, coefficient: float = 1.0, of: int = 0) -> tuple[torch.Tensor, dict]:
    tokens = t64([value for text in texts for value in text])
    return pretraining.loss(tokens, weights=torch.full_like(tokens, 1 / (of or len(tokens))), coefficient=coefficient)


@given(texts=TEXTS, coefficient=st.floats(0.0, 50.0))
def test_the_loss_equals_a_slow_loop(texts: list[list[float]], coefficient: float):
    total = num = 0.0
    for text in texts:
        for logprob in text:
            total, num = total - logprob, num + 1
    loss, diagnostics = run(texts, coefficient=coefficient)
    close(loss, coefficient * total / num)
    close(diagnostics["nll"], total / num)


def test_gradcheck():
    tokens, weights = t64([-3.0, -0.2, -9.0]).requires_grad_(), t64([0.2, 0.5, 0.3])
    assert torch.autograd.gradcheck(lambda x: pretraining.loss(x, weights=weights, coefficient=27.8)[0], (tokens,))


@given(texts=TEXTS, data=st.data())
def test_i2_i3_neither_order_nor_splits_nor_padding_matter(texts: list[list[float]], data: st.DataObject):
    num = sum(map(len, texts))
    whole, figures = run(texts, coefficient=2.0)
    shuffled = data.draw(st.permutations(texts))
    cut = data.draw(st.integers(0, len(texts)))
    parts = [run(part, coefficient=2.0, of=num) for part in (shuffled[:cut], shuffled[cut:])]
    close(parts[0][0] + parts[1][0], whole)
    close(parts[0][1]["nll"] + parts[1][1]["nll"], figures["nll"])

    longest = max(map(len, texts)) + data.draw(st.integers(0, 3))
    padded = t64([text + [-7.0] * (longest - len(text)) for text in texts])
    weights = t64([[1 / num] * len(text) + [0.0] * (longest - len(text)) for text in texts])
    close(pretraining.loss(padded, weights=weights, coefficient=2.0)[0], whole)
