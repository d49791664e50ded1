"""The squared-error loss of advantage-induced policy alignment."""

import difflib
import inspect
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from op_batches import Batch, batches, close, make_batch, t64

from configs.algorithm import APAConfig
from learner.ops import apa, ppo
from learner.ops.advantages import gae
from learner.ops.aggregate import token_weights, weighted_sum
from learner.ops.kl import exact, k2
from learner.ops.masked import whiten
from learner.ops.rewards import per_token_rewards

MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])


def of(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, advantages: torch.Tensor, weights: torch.Tensor, lam: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return apa.loss(
        logprobs,
        old_logprobs=logprobs.detach() - 0.1,
        ref_logprobs=ref_logprobs,
        advantages=advantages,
        weights=weights,
        settings=APAConfig(apa_lambda=lam),
    )


def generic_loss(
    logprobs: torch.Tensor, ref_logprobs: torch.Tensor, advantages: torch.Tensor, weights: torch.Tensor, lam: float
) -> torch.Tensor:
    """2 k2 - 2 A / lambda log(pi / ref) + (A / lambda)^2."""
    penalty = k2(logprobs, ref_logprobs)
    per_token = 2 * penalty - 2 / lam * advantages * (logprobs - ref_logprobs) + (advantages / lam).square()
    return weighted_sum(per_token, weights)


def token_mean(mask: torch.Tensor = MASK) -> torch.Tensor:
    return token_weights(mask, mode="token_mean", dtype=torch.float64)


@pytest.mark.parametrize(("name", "lam"), [("V8_apa_lambda_0.1", 0.1), ("V8_apa_lambda_1", 1.0)])
def test_v8_loss_gradient_and_diagnostics(vectors, name: str, lam: float):
    v = vectors[name]
    logprobs = t64(v["logp"]).requires_grad_()
    loss, diagnostics = of(logprobs, t64(v["logp_init"]), t64(v["adv"]), token_mean(), lam)
    loss.backward()
    close(loss, v["loss_token_mean"], atol=1e-6)
    close(logprobs.grad, v["dL_dlogp"], atol=1e-7)
    close(diagnostics["residual_mean"], sum(map(sum, v["residual"])) / 7, atol=1e-7)
    close(diagnostics["target_positive_fraction"], v["frac_target_above_zero"])
    close(diagnostics["approx_kl"], 0.5 * 0.1**2)
    close(diagnostics["ratio_mean"], math.exp(0.1))
    assert set(diagnostics) == {"approx_kl", "ratio_mean", "residual_mean", "target_positive_fraction"}
    for row, t in MASK.nonzero().tolist():
        only = t64([v["logp_init"][row][t]]), t64([v["adv"][row][t]]), t64([1.0])
        close(of(t64([v["logp"][row][t]]), *only, lam)[0], v["loss_tok"][row][t], atol=2e-6)
        # At its target a token costs nothing.
        close(of(t64([v["target_logp"][row][t]]), *only, lam)[0], 0.0, atol=1e-13)


@pytest.mark.parametrize("name", ["V8_apa_lambda_0.1", "V8_apa_lambda_1"])
def test_i11_v8_the_loss_is_a_policy_gradient_with_a_k2_penalty(vectors, name: str):
    v = vectors[name]
    found = generic_loss(t64(v["logp"]), t64(v["logp_init"]), t64(v["adv"]), token_mean(), v["lam"])
    close(found, v["expanded_identity"], atol=1e-6)
    close(v["expanded_identity"], v["loss_token_mean"])


def test_v8b_raw_advantages(vectors):
    v, batch = vectors["V8b_apa_raw_adv_lam1"], vectors["V8_apa_lambda_1"]
    loss, diagnostics = of(t64(batch["logp"]), t64(batch["logp_init"]), t64(v["adv"]), token_mean(), 1.0)
    close(loss, v["loss_token_mean"])
    close(diagnostics["residual_mean"], sum(map(sum, v["residual"])) / 7)


def test_i11_v8c_the_anchor_is_the_reference_and_not_the_old_policy(vectors):
    v, toy = vectors["V8_apa_lambda_1"], vectors["V2_reward"]
    assert v["logp_init"] == toy["ref_logp"]
    losses = [
        apa.loss(
            t64(v["logp"]),
            old_logprobs=t64(old),
            ref_logprobs=t64(ref),
            advantages=t64(v["adv"]),
            weights=token_mean(),
            settings=APAConfig(apa_lambda=1.0),
        )[0]
        for old, ref in [(toy["logp"], toy["ref_logp"]), (toy["ref_logp"], toy["ref_logp"]), (toy["logp"], toy["logp"])]
    ]
    close(losses[0], v["loss_token_mean"], atol=2e-8)
    close(losses[1], v["loss_token_mean"], atol=2e-8)
    close(losses[2], vectors["V8c_apa_with_old_instead_of_init_lam1"]["loss_token_mean"], atol=2e-8)


def test_v8d_the_loss_is_zero_at_a_normalised_target(vectors):
    v = vectors["V8d_apa_fixed_point"]
    pi_init, pi_star, advantages = t64(v["pi_init"]), t64(v["pi_star"]), t64(v["adv"])
    close((pi_init * (advantages / v["lam"]).exp()).sum(), v["Z"], atol=2e-8)
    close(of(pi_star.log(), pi_init.log(), advantages, pi_init, v["lam"])[0], v["loss_at_pi_star"])
    close(of(pi_init.log(), pi_init.log(), advantages, pi_init, v["lam"])[0], v["loss_at_init"])


@pytest.mark.parametrize("lam", ["2.0", "1.0", "0.5", "0.1"])
def test_v8e_the_least_squares_solution_where_targets_are_out_of_reach(vectors, lam: str):
    v = vectors["V8e_apa_unnormalised_Z"]
    pi_init, expected = t64(v["pi_init"]), v["by_lambda"][lam]
    argmin = t64(expected["apa_argmin_weights_pi_init"])
    logits = argmin.log().requires_grad_()
    loss, _ = of(logits.log_softmax(0), pi_init.log(), t64(v["adv"]), pi_init, float(lam))
    loss.backward()
    close(loss, expected["min_loss"], atol=1e-5)
    # The smallest probability has three digits in the vector, hence the tolerance.
    close(logits.grad, [0.0, 0.0, 0.0], atol=1e-3)
    close(exact(argmin.log(), pi_init.log()), expected["KL_argmin_init"], atol=1e-6)

    # The tilted reference lies elsewhere: its residuals are all -log Z, so that it costs (log Z)^2 and no less.
    z = expected["Z"]
    tilted = (pi_init.log() + t64(v["adv"]) / float(lam)).log_softmax(0)
    close(tilted.exp(), expected["pi_star_normalised"])
    close(exact(tilted, pi_init.log()), expected["KL_pistar_init"])
    star_loss, diagnostics = of(tilted, pi_init.log(), t64(v["adv"]), pi_init, float(lam))
    close(diagnostics["residual_mean"], -math.log(z))
    close(star_loss, math.log(z) ** 2)
    assert star_loss > expected["min_loss"]
    assert expected["KL_pistar_init"] > expected["KL_argmin_init"]


def test_v8f_on_policy_gradient_is_that_of_the_regularised_objective(vectors):
    v = vectors["V8f_apa_gradient_identity"]
    logits = t64(v["z"]).requires_grad_()
    logprobs = logits.log_softmax(0)
    close(logprobs.exp(), v["pi"])
    of(logprobs, t64(v["pi_init"]).log(), t64(v["adv"]), logprobs.exp().detach(), v["lam"])[0].backward()
    close(logits.grad, v["E_grad_apa"], atol=1e-7)

    again = t64(v["z"]).requires_grad_()
    pi = again.softmax(0)
    objective = -(pi * t64(v["adv"])).sum() + v["lam"] * (pi * (pi / t64(v["pi_init"])).log()).sum()
    objective.backward()
    close(2 / v["lam"] * again.grad, v["two_over_lam_times_grad_obj"], atol=1e-7)


def test_v8g_the_fixed_point_holds_for_any_normaliser_on_policy_only(vectors):
    v = vectors["V8g_apa_any_Z"]
    pi_star, pi_init, advantages = t64(v["pi_star"]), t64(v["pi_init"]), t64(v["adv"])
    for weights, expected in [(pi_star, v["E_grad_onpolicy"]), (pi_init, v["grad_with_fixed_weights_pi_init"])]:
        logits = pi_star.log().requires_grad_()
        loss, diagnostics = of(logits.log_softmax(0), pi_init.log(), advantages, weights, v["lam"])
        loss.backward()
        close(logits.grad, expected, atol=5e-8)
        close(diagnostics["residual_mean"], v["minus_logZ"], atol=5e-8)
    # Not only in the mean: each arm has the same residual.
    for arm, expected in enumerate(v["residual_at_pi_star"]):
        _, diagnostics = of(pi_star.log(), pi_init.log(), advantages, torch.eye(3, dtype=torch.float64)[arm], v["lam"])
        close(diagnostics["residual_mean"], expected, atol=2e-7)


@pytest.mark.parametrize(
    ("key", "lam"), [("raw_lam1", 1.0), ("raw_lam0.5", 0.5), ("whiten_lam1", 1.0), ("whiten_lam0.5", 0.5)]
)
def test_v8h_limit_of_a_bandit(vectors, key: str, lam: float):
    v = vectors["V8h_apa_bandit_limit"]
    pi_init, rewards = t64(v["pi_init"]), t64(v["r"])
    logits = pi_init.log().requires_grad_()
    for _ in range(1500):
        logprobs = logits.log_softmax(0)
        pi = logprobs.exp().detach()
        advantages = rewards - (pi * rewards).sum()
        if key.startswith("whiten"):
            advantages = advantages / ((pi * advantages.square()).sum() + 1e-8).sqrt()
        (gradient,) = torch.autograd.grad(of(logprobs, pi_init.log(), advantages, pi, lam)[0], logits)
        logits.data -= 0.2 * gradient
    found = logits.detach()
    close(found.softmax(0), v[key]["pi"], atol=1e-5)
    close(exact(found, pi_init.log()), v[key]["KL"], atol=1e-4)
    if key.startswith("whiten"):
        # Whitening divides by the spread under the policy: lambda counts for less, the surer the policy is.
        pi = found.softmax(0)
        spread = (pi * (rewards - (pi * rewards).sum()).square()).sum().sqrt()
        # Half of lambda has none left in the end, and is not there yet.
        close(lam * spread, v[key]["beta_eff"], atol=1e-5 if lam == 1 else 1e-3)


@given(batches())
def test_loss_and_diagnostics_equal_a_slow_loop(batch: Batch):
    sums = {"loss": 0.0, "approx_kl": 0.0, "ratio_mean": 0.0, "residual_mean": 0.0, "target_positive_fraction": 0.0}
    num_tokens = int(batch.mask.sum())
    for row, t in batch.mask.nonzero().tolist():
        now, old, ref, advantage = (
            x[row, t].item() for x in (batch.logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages)
        )
        target = ref + advantage / 0.7
        sums["loss"] += (now - target) ** 2 / num_tokens
        sums["approx_kl"] += (now - old) ** 2 / 2 / num_tokens
        sums["ratio_mean"] += math.exp(now - old) / num_tokens
        sums["residual_mean"] += (now - target) / num_tokens
        sums["target_positive_fraction"] += (target > 0) / num_tokens
    loss, diagnostics = apa.loss(
        batch.logprobs,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        advantages=batch.advantages,
        weights=token_mean(batch.mask),
        settings=APAConfig(apa_lambda=0.7),
    )
    for key, expected in sums.items():
        close({"loss": loss, **diagnostics}[key], expected)


def test_gradcheck():
    batch = make_batch([4, 2, 3], seed=3)
    options = (batch.ref_logprobs, batch.advantages, token_mean(batch.mask), 0.5)
    assert torch.autograd.gradcheck(lambda x: of(x, *options)[0], batch.logprobs.clone().requires_grad_())


@given(batches())
def test_i5_at_the_reference_the_residual_is_minus_the_scaled_advantage(batch: Batch):
    _, diagnostics = of(batch.ref_logprobs, batch.ref_logprobs, batch.advantages, token_mean(batch.mask), 0.4)
    close(diagnostics["residual_mean"], -batch.advantages[batch.mask].mean() / 0.4)


@given(batches())
def test_i11_the_loss_is_a_policy_gradient_with_a_k2_penalty(batch: Batch):
    lam, weights = 0.6, token_mean(batch.mask)
    paths = []
    for path in ("apa", "generic"):
        logprobs = batch.logprobs.clone().requires_grad_()
        if path == "apa":
            loss = of(logprobs, batch.ref_logprobs, batch.advantages, weights, lam)[0]
        else:
            kept = batch.mask
            now, ref, advantages = logprobs[kept], batch.ref_logprobs[kept], batch.advantages[kept]
            loss = generic_loss(now, ref, advantages, weights[kept], lam)
        loss.backward()
        paths.append((loss.detach(), logprobs.grad))
    close(paths[0][0], paths[1][0])
    close(paths[0][1], paths[1][1])


def test_i11_only_the_log_probs_get_a_gradient():
    others = {
        name: torch.full((3,), -1.0, requires_grad=True) for name in ("old_logprobs", "ref_logprobs", "advantages")
    }
    logprobs = torch.full((3,), -1.1, requires_grad=True)
    loss, diagnostics = apa.loss(logprobs, **others, weights=torch.full((3,), 1 / 3), settings=APAConfig())
    loss.backward()
    assert logprobs.grad is not None
    assert all(tensor.grad is None for tensor in others.values())
    assert not any(entry.requires_grad for entry in diagnostics.values())


def test_the_vectors_hold_from_rewards_to_loss(vectors):
    v2, v3, v8 = vectors["V2_reward"], vectors["V3_gae_terminal"], vectors["V8_apa_lambda_1"]
    rewards = per_token_rewards(
        t64(v2["logp"]), t64(v2["ref_logp"]), mask=MASK, scores=t64(v2["score"]), kl_beta=v2["beta"]
    )
    advantages, _ = gae(
        rewards, t64(v3["values"]), mask=MASK, bootstrap_values=t64([0.0, 0.0]), gamma=1.0, gae_lambda=0.95
    )
    loss, _ = of(t64(v8["logp"]), t64(v2["ref_logp"]), whiten(advantages, MASK), token_mean(), 1.0)
    close(loss, v8["loss_token_mean"], atol=2e-8)


def test_the_difference_to_ppo_shows_just_the_idea():
    sources = [Path(module.__file__).read_text().splitlines() for module in (ppo, apa)]
    changed = [line for line in difflib.ndiff(*sources) if line.startswith(("+ ", "- "))]
    assert len(changed) < 40
    parameters = [list(inspect.signature(module.loss).parameters) for module in (ppo, apa)]
    assert parameters[0] == parameters[1]


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "advantages", "weights"])
@pytest.mark.parametrize("wrong", [torch.zeros(4), torch.zeros(3, dtype=torch.float16)])
def test_unlike_tensors_are_refused(name: str, wrong: torch.Tensor):
    tensors = {key: torch.zeros(3) for key in ("old_logprobs", "ref_logprobs", "advantages", "weights")} | {name: wrong}
    with pytest.raises(ValueError, match=f"{name} must be"):
        apa.loss(torch.zeros(3), **tensors, settings=APAConfig())
