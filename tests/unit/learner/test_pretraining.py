"""PPO-ptx: two gradients in one step, and how large the one is beside the other."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.algorithm import PPOConfig
from configs.learner import LearnerConfig, OptimizerConfig
from learner.batch import TokenSequence
from learner.experience import PassSettings
from learner.ops import pretraining
from learner.update import Updater, UpdateSettings
from protocol import metrics as names
from tests.learner_batches import VOCABULARY, scored_batch, tiny_critic, tiny_policy
from tests.plain_engine import PlainEngine, RecordingEngine

RATE = OptimizerConfig(learning_rate=1e-3)


def flat(tensors) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def texts(num: int = 5) -> list[TokenSequence]:
    rng = np.random.default_rng(3)
    rows = [rng.integers(2, VOCABULARY, size=rng.integers(2, 30)).astype(np.int32) for _ in range(num)]
    return [TokenSequence(row[:1], row[1:]) for row in rows]


def make(coefficient: float, *, size: int = 5, token_budget: int = 256) -> Updater:
    return Updater(
        policy=RecordingEngine(tiny_policy(), optimizer=RATE, settings=LearnerConfig(), name="policy"),
        critic=PlainEngine(tiny_critic(), optimizer=RATE, settings=LearnerConfig(), name="critic"),
        texts=texts() if coefficient else (),
        settings=UpdateSettings(
            algorithm=PPOConfig(minibatch_responses=6, ptx_coefficient=coefficient, ptx_texts=size),
            passes=PassSettings(temperature=0.7, token_budget=token_budget, layout="sorted", pad_id=0),
            max_response_tokens=24,
            run_seed=0,
        ),
    )


def nll() -> tuple[float, Tensor]:
    """Compute the mean over all tokens but the first ones, and its gradient, by a plain forward of each text."""
    policy, total, count = tiny_policy(), torch.zeros(()), 0
    for text in texts():
        ids = torch.from_numpy(np.concatenate(text)).long()
        every = torch.log_softmax(policy.network(input_ids=ids[None]).logits[0], dim=-1)
        total = total - sum(every[t, ids[t + 1]] for t in range(len(ids) - 1))
        count += len(ids) - 1
    (total / count).backward()
    return total.item() / count, flat(p.grad for p in policy.parameters())


def test_v15_the_losses_add(vectors) -> None:
    v = vectors["V15_ptx"]
    logprobs = torch.tensor([-v["ptx_nll"] - 1, -v["ptx_nll"] + 1], dtype=torch.float64, requires_grad=True)
    weights = torch.full_like(logprobs, 0.5)
    loss, diagnostics = pretraining.loss(logprobs, weights=weights, coefficient=v["gamma"])
    assert v["ppo_loss"] + loss.item() == pytest.approx(v["total"])
    assert diagnostics["nll"].item() == pytest.approx(v["ptx_nll"])
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-v["gamma"] / 2] * 2)


def test_i23_one_step_takes_the_sum_of_both_gradients() -> None:
    plain, both = make(0.0), make(0.5)
    plain.update(scored_batch())
    metrics = both.update(scored_batch()).metrics
    loss, gradient = nll()
    expected = plain.policy.gradients[0] + 0.5 * gradient
    assert (both.policy.gradients[0] - expected).norm() < 1e-4 * expected.norm()
    assert both.policy.num_steps == plain.policy.num_steps == 2
    ratio = 0.5 * gradient.norm() / plain.policy.gradients[0].norm()
    assert metrics[names.POLICY_PTX_RATIO] == pytest.approx(float(ratio), rel=1e-3)
    # The mean over both steps, of which the second comes after a small move.
    assert metrics[names.POLICY_PTX_NLL] == pytest.approx(loss, rel=0.05)


def test_micro_batches_do_not_change_the_gradient() -> None:
    wide, narrow = make(0.5), make(0.5, token_budget=40)
    for updater in (wide, narrow):
        updater.update(scored_batch())
    first = wide.policy.gradients[0]
    assert (narrow.policy.gradients[0] - first).norm() < 1e-4 * first.norm()


def test_steps_read_other_texts_and_the_same_run_the_same_ones() -> None:
    found = []
    for _ in range(2):
        updater = make(2.0, size=2)
        report = updater.update(scored_batch())
        found.append((report, updater.policy.gradients))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
    assert math.isfinite(found[0][0].metrics[names.POLICY_PTX_RATIO])


def test_without_a_coefficient_there_is_no_trace_of_it() -> None:
    assert not [name for name in make(0.0).update(scored_batch()).metrics if "ptx" in name]
