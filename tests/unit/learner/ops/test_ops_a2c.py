"""The plain policy-gradient loss of advantage actor-critic."""

import difflib
import inspect
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from op_batches import Batch, batches, close, make_batch, t64

from configs.algorithm import A2CConfig, PPOConfig
from learner.ops import a2c, ppo
from learner.ops.aggregate import token_weights


def run(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return a2c.loss(
        batch.logprobs,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        advantages=batch.advantages,
        weights=token_weights(batch.mask, mode="token_mean", dtype=torch.float64),
        settings=A2CConfig(),
    )


@given(batches())
def test_loss_and_diagnostics_equal_a_slow_loop(batch: Batch):
    sums, num_tokens = {"loss": 0.0, "approx_kl": 0.0, "ratio_mean": 0.0}, int(batch.mask.sum())
    for row, t in batch.mask.nonzero().tolist():
        now, old, advantage = (x[row, t].item() for x in (batch.logprobs, batch.old_logprobs, batch.advantages))
        sums["loss"] += -advantage * now / num_tokens
        sums["approx_kl"] += (now - old) ** 2 / 2 / num_tokens
        sums["ratio_mean"] += math.exp(now - old) / num_tokens
    loss, diagnostics = run(batch)
    assert set(diagnostics) == {"approx_kl", "ratio_mean"}
    for key, expected in sums.items():
        close({"loss": loss, **diagnostics}[key], expected)


def test_gradcheck():
    batch = make_batch([4, 2, 3], seed=6)
    weights = token_weights(batch.mask, mode="seq_mean_token_sum", dtype=torch.float64)
    others = {"old_logprobs": batch.old_logprobs, "ref_logprobs": batch.ref_logprobs, "advantages": batch.advantages}
    assert torch.autograd.gradcheck(
        lambda x: a2c.loss(x, **others, weights=weights, settings=A2CConfig())[0],
        batch.logprobs.clone().requires_grad_(),
    )


@given(batches())
def test_on_policy_the_gradient_is_that_of_ppo(batch: Batch):
    gradients = []
    for loss, settings in ((a2c.loss, A2CConfig()), (ppo.loss, PPOConfig())):
        logprobs = batch.old_logprobs.clone().requires_grad_()
        loss(
            logprobs,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,
            advantages=batch.advantages,
            weights=token_weights(batch.mask, mode="token_mean", dtype=torch.float64),
            settings=settings,
        )[0].backward()
        assert logprobs.grad is not None
        gradients.append(logprobs.grad[batch.mask])
    close(*gradients)


def test_the_expected_gradient_is_that_of_the_expected_reward():
    logits, rewards = t64([0.3, -0.2, 0.1]).requires_grad_(), t64([0.0, 1.0, 2.0])
    logprobs = logits.log_softmax(0)
    pi = logprobs.exp().detach()
    others = {"old_logprobs": logprobs, "ref_logprobs": logprobs, "advantages": rewards, "weights": pi}
    a2c.loss(logprobs, **others, settings=A2CConfig())[0].backward()
    close(logits.grad, -pi * (rewards - (pi * rewards).sum()))


def test_only_the_log_probs_get_a_gradient():
    others = {
        name: torch.full((3,), -1.0, requires_grad=True) for name in ("old_logprobs", "ref_logprobs", "advantages")
    }
    logprobs = torch.full((3,), -1.1, requires_grad=True)
    loss, diagnostics = a2c.loss(logprobs, **others, weights=torch.full((3,), 1 / 3), settings=A2CConfig())
    loss.backward()
    assert logprobs.grad is not None
    assert all(tensor.grad is None for tensor in others.values())
    assert not any(entry.requires_grad for entry in diagnostics.values())


def test_the_difference_to_ppo_shows_just_the_idea():
    sources = [Path(module.__file__).read_text().splitlines() for module in (ppo, a2c)]
    changed = [line for line in difflib.ndiff(*sources) if line.startswith(("+ ", "- "))]
    assert len(changed) < 40
    parameters = [list(inspect.signature(module.loss).parameters) for module in (ppo, a2c)]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "advantages", "weights"])
def test_unlike_tensors_are_refused(name: str):
    tensors = {key: torch.zeros(3) for key in ("old_logprobs", "ref_logprobs", "advantages", "weights")}
    with pytest.raises(ValueError, match=f"{name} must be"):
        a2c.loss(torch.zeros(3), **tensors | {name: torch.zeros(4)}, settings=A2CConfig())
