"""The clipped surrogate loss."""

import math

import pytest
import torch
from hypothesis import given
from op_batches import Batch, batches, close, make_batch, t64

from configs.algorithm import PPOConfig
from learner.ops import ppo
from learner.ops.advantages import gae, normalize
from learner.ops.aggregate import token_weights
from learner.ops.kl import k3
from learner.ops.rewards import per_token_rewards

MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])
DUAL = PPOConfig(clip_low=0.1, clip_high=0.3, dual_clip=1.2)


def run(batch: Batch, settings: PPOConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    return ppo.loss(
        batch.logprobs,
        old_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        advantages=batch.advantages,
        weights=token_weights(batch.mask, mode="token_mean", dtype=torch.float64),
        settings=settings,
    )


def one_token(advantage: float, ratio: float, settings: PPOConfig) -> tuple[float, float]:
    logprob = t64([math.log(ratio) - 3.0]).requires_grad_()
    loss, _ = ppo.loss(
        logprob,
        old_logprobs=t64([-3.0]),
        ref_logprobs=t64([-3.0]),
        advantages=t64([advantage]),
        weights=t64([1.0]),
        settings=settings,
    )
    loss.backward()
    return loss.item(), logprob.grad.item()


def slow_loss(batch: Batch, settings: PPOConfig) -> dict[str, float]:
    sums = {"loss": 0.0, "approx_kl": 0.0, "ratio_mean": 0.0, "clip_fraction": 0.0}
    for row, t in batch.mask.nonzero().tolist():
        advantage = batch.advantages[row, t].item()
        log_ratio = batch.logprobs[row, t].item() - batch.old_logprobs[row, t].item()
        ratio = math.exp(log_ratio)
        plain = -advantage * ratio
        clipped = -advantage * min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
        loss = max(plain, clipped)
        if settings.dual_clip is not None and advantage < 0:
            loss = min(loss, -settings.dual_clip * advantage)
        sums["loss"] += loss
        sums["approx_kl"] += 0.5 * log_ratio**2
        sums["ratio_mean"] += ratio
        sums["clip_fraction"] += clipped > plain
    return {key: total / int(batch.mask.sum()) for key, total in sums.items()}


def v5(vectors, mode: str) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    v = vectors["V5_ppo"]
    logprobs = t64(v["new_logp"]).requires_grad_()
    loss, diagnostics = ppo.loss(
        logprobs,
        old_logprobs=t64(v["old_logp"]),
        ref_logprobs=t64(v["old_logp"]),
        advantages=t64(v["adv"]),
        weights=token_weights(MASK, mode=mode, constant=4, dtype=torch.float64),
        settings=PPOConfig(),
    )
    return loss, diagnostics, logprobs


@pytest.mark.parametrize(
    ("mode", "key"),
    [
        ("token_mean", "token_mean"),
        ("seq_mean_token_mean", "seq_mean_token_mean"),
        ("seq_mean_token_sum", "seq_mean_token_sum"),
        ("token_sum_norm", "seq_mean_token_sum_norm_T4"),
    ],
)
def test_v5_loss_in_every_aggregation(vectors, mode: str, key: str):
    close(v5(vectors, mode)[0], vectors["V5_ppo"][key], atol=2e-8)


def test_v5_diagnostics_and_gradient(vectors):
    v = vectors["V5_ppo"]
    loss, diagnostics, logprobs = v5(vectors, "token_mean")
    loss.backward()
    close(diagnostics["clip_fraction"], v["clipfrac"])
    close(diagnostics["approx_kl"], v["approx_kl_k2"])
    close(diagnostics["ratio_mean"], sum(map(sum, v["ratio"])) / 7)
    assert set(diagnostics) == {"approx_kl", "clip_fraction", "ratio_mean"}
    assert (logprobs.grad != 0).double().tolist() == v["grad_mask_active"]
    # The samples are of the old policy, which is therefore the one that k3 takes first.
    close(k3(t64(v["old_logp"]), t64(v["new_logp"]))[MASK].mean(), v["approx_kl_k3"])


def test_v5_loss_of_each_token_is_the_larger_one(vectors):
    """Without a clip in reach the loss is the plain one; the clipped one is that of the clipped ratio."""
    v = vectors["V5_ppo"]
    out_of_reach = PPOConfig(clip_low=0.9, clip_high=9.0)
    for row, t in MASK.nonzero().tolist():
        advantage, ratio = v["adv"][row][t], v["ratio"][row][t]
        plain = one_token(advantage, ratio, out_of_reach)[0]
        clipped = one_token(advantage, min(max(ratio, 0.8), 1.2), out_of_reach)[0]
        close(plain, v["loss_unclipped"][row][t], atol=2e-8)
        close(clipped, v["loss_clipped"][row][t], atol=2e-8)
        close(one_token(advantage, ratio, PPOConfig())[0], v["loss_tok"][row][t], atol=2e-8)


def test_i8_v5b_truth_table_with_its_gradients(vectors):
    for advantage, ratio, loss, gradient in vectors["V5b_truth_table_A_ratio_loss_dLdlogp"]["rows"]:
        found = one_token(advantage, ratio, PPOConfig())
        assert found == pytest.approx((loss, gradient), abs=1e-9)


def test_i8_v5c_dual_clip_bounds_negative_advantages_only(vectors):
    v = vectors["V5c_dual_clip"]
    assert one_token(v["A"], v["ratio"], PPOConfig())[0] == pytest.approx(v["ppo_loss"])
    assert one_token(v["A"], v["ratio"], PPOConfig(dual_clip=v["c"])) == pytest.approx((v["dual_loss"], 0.0))
    assert one_token(1.0, v["ratio"], PPOConfig(dual_clip=v["c"])) == one_token(1.0, v["ratio"], PPOConfig())


def test_the_lower_and_the_upper_clip_are_not_mixed_up():
    settings = PPOConfig(clip_low=0.1, clip_high=0.5)
    assert one_token(1.0, 1.4, settings) == pytest.approx((-1.4, -1.4))
    assert one_token(1.0, 1.6, settings) == pytest.approx((-1.5, 0.0))
    assert one_token(-1.0, 0.95, settings) == pytest.approx((0.95, 0.95))
    assert one_token(-1.0, 0.8, settings) == pytest.approx((0.9, 0.0))


@pytest.mark.parametrize("settings", [PPOConfig(), DUAL])
@given(batch=batches())
def test_loss_and_diagnostics_equal_a_slow_loop(batch: Batch, settings: PPOConfig):
    loss, diagnostics = run(batch, settings)
    for key, expected in slow_loss(batch, settings).items():
        close({"loss": loss, **diagnostics}[key], expected)


@pytest.mark.parametrize("settings", [PPOConfig(), DUAL])
def test_gradcheck(settings: PPOConfig):
    batch = make_batch([4, 2, 3], seed=11)

    def loss_of(logprobs: torch.Tensor) -> torch.Tensor:
        return ppo.loss(
            logprobs,
            old_logprobs=batch.old_logprobs,
            ref_logprobs=batch.ref_logprobs,
            advantages=batch.advantages,
            weights=token_weights(batch.mask, mode="seq_mean_token_mean", dtype=torch.float64),
            settings=settings,
        )[0]

    assert torch.autograd.gradcheck(loss_of, batch.logprobs.clone().requires_grad_())


def test_i4_the_first_minibatch_has_ratio_one_and_loss_zero():
    batch = make_batch([3, 5, 1, 4], seed=2, garbage=0.0)
    advantages = normalize(batch.advantages.float(), batch.mask, mode="whiten")
    logprobs = batch.old_logprobs.float()
    loss, diagnostics = ppo.loss(
        logprobs,
        old_logprobs=logprobs,
        ref_logprobs=batch.ref_logprobs.float(),
        advantages=advantages,
        weights=token_weights(batch.mask, mode="token_mean"),
        settings=PPOConfig(),
    )
    assert abs(loss.item()) < 1e-6
    assert diagnostics["ratio_mean"].item() == pytest.approx(1.0, abs=1e-6)
    assert diagnostics["clip_fraction"].item() == 0
    assert diagnostics["approx_kl"].item() == 0


def test_the_vectors_hold_from_rewards_to_loss(vectors):
    v2, v3 = vectors["V2_reward"], vectors["V3_gae_terminal"]
    rewards = per_token_rewards(
        t64(v2["logp"]), t64(v2["ref_logp"]), mask=MASK, scores=t64(v2["score"]), kl_beta=v2["beta"]
    )
    advantages, returns = gae(
        rewards, t64(v3["values"]), mask=MASK, bootstrap_values=t64([0.0, 0.0]), gamma=1.0, gae_lambda=0.95
    )
    close(returns, vectors["V6_value"]["returns"])
    loss, _ = ppo.loss(
        t64(vectors["V5_ppo"]["new_logp"]),
        old_logprobs=t64(v2["logp"]),
        ref_logprobs=t64(v2["ref_logp"]),
        advantages=normalize(advantages, MASK, mode="whiten"),
        weights=token_weights(MASK, mode="token_mean", dtype=torch.float64),
        settings=PPOConfig(),
    )
    close(loss, vectors["V5_ppo"]["token_mean"], atol=2e-8)


def test_an_absurd_ratio_stays_finite():
    loss, gradient = one_token(-1.0, math.exp(50), PPOConfig())
    assert loss == pytest.approx(math.exp(20))
    assert gradient == 0


def test_only_the_log_probs_get_a_gradient():
    others = {
        name: torch.full((3,), -1.0, requires_grad=True) for name in ("old_logprobs", "ref_logprobs", "advantages")
    }
    logprobs = torch.full((3,), -1.1, requires_grad=True)
    loss, diagnostics = ppo.loss(logprobs, **others, weights=torch.full((3,), 1 / 3), settings=PPOConfig())
    loss.backward()
    assert logprobs.grad is not None
    assert all(tensor.grad is None for tensor in others.values())
    assert not any(entry.requires_grad for entry in diagnostics.values())


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "advantages", "weights"])
@pytest.mark.parametrize("wrong", [torch.zeros(4), torch.zeros(3, dtype=torch.float16)])
def test_unlike_tensors_are_refused(name: str, wrong: torch.Tensor):
    tensors = {key: torch.zeros(3) for key in ("old_logprobs", "ref_logprobs", "advantages", "weights")} | {name: wrong}
    with pytest.raises(ValueError, match=f"{name} must be"):
        ppo.loss(torch.zeros(3), **tensors, settings=PPOConfig())
