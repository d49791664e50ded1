"""The weighted likelihood loss of advantage-weighted regression."""

import difflib
import inspect
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_batches import Batch, batches, close, make_batch, t64

from configs.algorithm import AWRConfig
from learner.ops import awr, ppo
from learner.ops.aggregate import token_weights

MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])
VECTORS = [("V9_awr_lambda_1", 1.0), ("V9_awr_lambda_2", 2.0), ("V9_awr_lambda_0.1", 0.1)]


def run(batch: Batch, settings: AWRConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return awr.loss(
        batch.logprobs,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        advantages=batch.advantages,
        weights=token_weights(batch.mask, mode="token_mean", dtype=torch.float64),
        settings=settings,
    )


def of_vector(v: dict, settings: AWRConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    logprobs = t64(v["logp"]).requires_grad_()
    loss, diagnostics = awr.loss(
        logprobs,
        old_logprobs=logprobs.detach() - 0.1,
        ref_logprobs=t64(v["logp"]),
        advantages=t64(v["adv"]),
        weights=token_weights(MASK, mode="token_mean", dtype=torch.float64),
        settings=settings,
    )
    return loss, diagnostics, logprobs


@pytest.mark.parametrize(("name", "lam"), VECTORS)
def test_v9_loss_weights_and_effective_sample_size(vectors, name: str, lam: float):
    v = vectors[name]
    loss, diagnostics, logprobs = of_vector(v, AWRConfig(awr_lambda=lam, max_weight=None))
    loss.backward()
    # The explosion at lambda 0.1 multiplies the eighth decimal of the advantages.
    assert loss.item() == pytest.approx(v["loss_token_mean"], rel=3e-7)
    torch.testing.assert_close(-7 * logprobs.grad, t64(v["weights"]), rtol=3e-7, atol=1e-8)
    ess = diagnostics["weight_mean"].square() / diagnostics["weight_square_mean"]
    close(ess, v["ess_frac"], atol=1e-6)
    assert diagnostics["weight_clip_fraction"].item() == 0
    close(diagnostics["approx_kl"], 0.5 * 0.1**2)
    close(diagnostics["ratio_mean"], math.exp(0.1))


@pytest.mark.parametrize(("name", "lam"), VECTORS)
def test_v9_with_the_weights_clipped(vectors, name: str, lam: float):
    v = vectors[name]
    loss, diagnostics, logprobs = of_vector(v, AWRConfig(awr_lambda=lam, max_weight=20.0))
    loss.backward()
    close(loss, v["loss_clip20"], atol=1e-7)
    close(-7 * logprobs.grad, v["weights_clip20"], atol=1e-7)
    close(diagnostics["weight_clip_fraction"], 3 / 7 if lam == 0.1 else 0.0)


@pytest.mark.parametrize("settings", [AWRConfig(), AWRConfig(awr_lambda=0.4, max_weight=1.5)])
@given(batch=batches())
def test_loss_and_diagnostics_equal_a_slow_loop(batch: Batch, settings: AWRConfig):
    names = ("loss", "approx_kl", "ratio_mean", "weight_mean", "weight_square_mean", "weight_clip_fraction")
    sums, num_tokens = dict.fromkeys(names, 0.0), int(batch.mask.sum())
    for row, t in batch.mask.nonzero().tolist():
        now, old, advantage = (x[row, t].item() for x in (batch.logprobs, batch.old_logprobs, batch.advantages))
        plain = math.exp(advantage / settings.awr_lambda)
        weight = min(plain, settings.max_weight)
        found = (-weight * now, (now - old) ** 2 / 2, math.exp(now - old), weight, weight**2, weight < plain)
        sums = {key: sums[key] + value / num_tokens for key, value in zip(names, found, strict=True)}
    loss, diagnostics = run(batch, settings)
    assert set(diagnostics) == set(names) - {"loss"}
    for key, expected in sums.items():
        close({"loss": loss, **diagnostics}[key], expected)


@pytest.mark.parametrize("settings", [AWRConfig(), AWRConfig(awr_lambda=0.4, max_weight=1.5)])
def test_gradcheck(settings: AWRConfig):
    batch = make_batch([4, 2, 3], seed=5)

    def loss_of(logprobs: torch.Tensor) -> torch.Tensor:
        return awr.loss(
            logprobs,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,
            advantages=batch.advantages,
            weights=token_weights(batch.mask, mode="seq_mean_token_mean", dtype=torch.float64),
            settings=settings,
        )[0]

    assert torch.autograd.gradcheck(loss_of, batch.logprobs.clone().requires_grad_())


@given(batches(), st.floats(-2, 2), st.sampled_from([0.3, 1.0, 2.0]))
def test_i12_shifting_the_advantages_scales_the_loss(batch: Batch, shift: float, lam: float):
    settings = AWRConfig(awr_lambda=lam, max_weight=None)
    shifted = Batch(
        **{name: getattr(batch, name) for name in Batch.__dataclass_fields__ if name != "advantages"},
        advantages=batch.advantages + shift,
    )
    close(run(shifted, settings)[0] / math.exp(shift / lam), run(batch, settings)[0])


@given(batches(), st.sampled_from([None, 1.5]))
def test_i12_every_weight_is_positive_so_every_sample_is_raised(batch: Batch, max_weight: float | None):
    batch = batch.requiring_grad()
    run(batch, AWRConfig(max_weight=max_weight))[0].backward()
    assert batch.logprobs.grad is not None
    assert (batch.logprobs.grad[batch.mask] < 0).all()


def test_i12_only_the_log_probs_get_a_gradient():
    others = {
        name: torch.full((3,), -1.0, requires_grad=True) for name in ("old_logprobs", "ref_logprobs", "advantages")
    }
    logprobs = torch.full((3,), -1.1, requires_grad=True)
    loss, diagnostics = awr.loss(logprobs, **others, weights=torch.full((3,), 1 / 3), settings=AWRConfig())
    loss.backward()
    assert logprobs.grad is not None
    assert all(tensor.grad is None for tensor in others.values())
    assert not any(entry.requires_grad for entry in diagnostics.values())


def test_without_an_anchor_the_policy_collapses():
    """In a bandit, each iterate is the one before, tilted: repeated, only the best arm is left."""
    pi_init, rewards = t64([0.5, 0.3, 0.2]), t64([0.0, 1.0, 2.0])
    pi = pi_init.clone()
    for _ in range(40):
        logits = pi.log().requires_grad_()
        for _ in range(60):  # the regression of one iteration, to its end
            logprobs = logits.log_softmax(0)
            loss, _ = awr.loss(
                logprobs,
                old_logprobs=pi.log(),
                ref_logprobs=pi_init.log(),
                advantages=rewards - (pi * rewards).sum(),
                weights=pi,
                settings=AWRConfig(awr_lambda=1.0, max_weight=None),
            )
            (gradient,) = torch.autograd.grad(loss, logits)
            logits.data -= 0.3 * gradient
        tilted = pi * (rewards / 1.0).exp()
        close(logits.softmax(0), tilted / tilted.sum(), atol=0.05)
        pi = logits.softmax(0).detach()
    assert pi[2] > 0.99


def test_the_difference_to_ppo_shows_just_the_idea():
    sources = [Path(module.__file__).read_text().splitlines() for module in (ppo, awr)]
    changed = [line for line in difflib.ndiff(*sources) if line.startswith(("+ ", "- "))]
    assert len(changed) < 40
    parameters = [list(inspect.signature(module.loss).parameters) for module in (ppo, awr)]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "advantages", "weights"])
@pytest.mark.parametrize("wrong", [torch.zeros(4), torch.zeros(3, dtype=torch.float16)])
def test_unlike_tensors_are_refused(name: str, wrong: torch.Tensor):
    tensors = {key: torch.zeros(3) for key in ("old_logprobs", "ref_logprobs", "advantages", "weights")} | {name: wrong}
    with pytest.raises(ValueError, match=f"{name} must be"):
        awr.loss(torch.zeros(3), **tensors, settings=AWRConfig())
