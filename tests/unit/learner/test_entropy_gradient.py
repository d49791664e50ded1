"""Entropies with a gradient, for the entropy bonus: in one chunk of logits or in several."""

import pytest
import torch

from protocol import logprobs
from protocol.logprobs import logprobs_and_entropy, logprobs_in_chunks


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_chunks_change_neither_numbers_nor_gradients(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_ROWS", rows)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 3, generator=generator, requires_grad=True)
    head = torch.nn.Linear(3, 5, bias=False)
    token_ids = torch.arange(10) % 5
    found, entropies = logprobs_and_entropy(hidden, head, token_ids, temperature=0.5)
    (found.sum() + 3.0 * entropies.sum()).backward()

    twin = hidden.detach().clone().requires_grad_()
    every = torch.log_softmax(twin @ head.weight.T / 0.5, dim=-1)
    expected = -(every.exp() * every).sum(-1)
    picked = every[torch.arange(10), token_ids]
    (picked.sum() + 3.0 * expected.sum()).backward()
    assert torch.allclose(found, picked, atol=1e-6)
    assert torch.allclose(entropies, expected, atol=1e-6)
    assert torch.allclose(hidden.grad, twin.grad, atol=1e-5)
    assert torch.equal(found, logprobs_in_chunks(hidden, head, token_ids, temperature=0.5))


def test_without_any_row_there_is_nothing() -> None:
    found, entropies = logprobs_and_entropy(
        torch.zeros(0, 3), torch.nn.Linear(3, 5), torch.zeros(0, dtype=torch.long), temperature=1.0
    )
    assert found.shape == entropies.shape == (0,)
