"""The learner's networks on an accelerator: bf16, packing, and an update against the same update on the CPU."""

import math

import numpy as np
import pytest
import torch

from configs.algorithm import PPOConfig
from configs.learner import LearnerConfig, OptimizerConfig
from learner.batch import Layout, TokenSequence, collate
from learner.experience import PassSettings
from learner.training import RankContext
from learner.update import Updater, UpdateSettings
from tests.learner_batches import VOCABULARY, scored_batch, tiny_critic, tiny_policy
from tests.plain_engine import PlainEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RATE = OptimizerConfig(learning_rate=1e-3)
CUDA = torch.device("cuda")


def sequences() -> list[TokenSequence]:
    return [TokenSequence(s.rollout.prompt.token_ids, s.rollout.response_ids) for s in scored_batch(16).rollouts]


def run(layout: Layout, *, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    policy = tiny_policy(hidden=128).to(device, dtype)
    m = collate(sequences(), pad_id=3, layout=layout).to(device)
    logprobs, _ = policy(m.input_ids, m.position_ids, m.predict_index, m.target_ids, temperature=0.8)
    logprobs.sum().backward()
    assert logprobs.dtype == torch.float32
    gradient = torch.cat([p.grad.flatten().float() for p in policy.parameters()])
    return logprobs.detach().cpu(), gradient.cpu()


@pytest.fixture(autouse=True)
def full_precision():
    """Keep fp32 products in fp32, so that they can be compared."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("layout", ["sorted", "packed"])
def test_fp32_equals_the_cpu(layout: Layout) -> None:
    expected = run("sorted", dtype=torch.float32, device=torch.device("cpu"))
    found = run(layout, dtype=torch.float32, device=CUDA)
    assert (found[0] - expected[0]).abs().max() < 1e-4
    assert (found[1] - expected[1]).norm() < 1e-4 * expected[1].norm()


def test_packed_equals_sorted_in_bf16() -> None:
    one, other = (run(layout, dtype=torch.bfloat16, device=CUDA) for layout in ("sorted", "packed"))
    assert (one[0] - other[0]).abs().max() < 0.1
    assert (one[1] - other[1]).norm() < 0.05 * one[1].norm()


def test_bf16_is_near_fp32() -> None:
    exact = run("sorted", dtype=torch.float32, device=CUDA)
    rounded = run("sorted", dtype=torch.bfloat16, device=CUDA)
    assert (exact[0] - rounded[0]).abs().mean() < 0.1
    assert torch.isfinite(rounded[1]).all()
    assert torch.nn.functional.cosine_similarity(exact[1], rounded[1], dim=0) > 0.99


def test_the_first_token_of_a_packed_sequence_sees_nothing_before_it() -> None:
    policy = tiny_policy(hidden=128).to(CUDA)
    own = sequences()
    changed = [*own]
    changed[0] = TokenSequence((own[0].prompt_ids + 1) % VOCABULARY, own[0].response_ids)
    found = []
    for batch in (own, changed):
        m = collate(batch, pad_id=0, layout="packed").to(CUDA)
        logprobs, _ = policy(m.input_ids, m.position_ids, m.predict_index, m.target_ids)
        found.append(logprobs.detach()[m.sequence != 0])
    assert (found[0] - found[1]).abs().max() < 1e-6


@pytest.mark.parametrize("layout", ["sorted", "packed"])
def test_an_update_equals_the_cpu(layout: Layout) -> None:
    def update(device: torch.device, layout: Layout) -> dict[str, float]:
        context = RankContext(rank=0, world_size=1, device=device)
        common = {"optimizer": RATE, "settings": LearnerConfig(), "context": context}
        updater = Updater(
            policy=PlainEngine(tiny_policy(), **common),
            critic=PlainEngine(tiny_critic(), **common),
            settings=UpdateSettings(
                algorithm=PPOConfig(minibatch_responses=4, num_epochs=2),
                passes=PassSettings(temperature=1.0, token_budget=256, layout=layout, pad_id=0),
                max_response_tokens=24,
                run_seed=0,
            ),
        )
        return dict(updater.update(scored_batch()).metrics)

    expected, found = update(torch.device("cpu"), "sorted"), update(CUDA, layout)
    assert set(found) == set(expected)
    for name, value in expected.items():
        edge = 0.02 if "fraction" in name else 1e-3
        assert found[name] == pytest.approx(value, rel=1e-2, abs=edge), name
        assert math.isfinite(found[name])
    assert np.isfinite(list(found.values())).all()
