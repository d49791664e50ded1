"""Corrections for samples of another policy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_batches import Batch, batches, close, t64
from pydantic import ValidationError
from torch import Tensor

from configs.algorithm import PPOConfig
from configs.correction import CorrectionConfig
from learner.ops import kl, off_policy, ppo
from learner.ops.aggregate import token_weights
from learner.ops.masked import masked_mean

MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])
KINDS = ("full", "tis", "clamp", "icepop", "sequence_mask", "sequence_tis")


def corrections(batch: Batch, kind: str, **bounds: float) -> Tensor:
    """Take the reference's log-probs of a random batch for the engine's."""
    return off_policy.importance_weights(
        batch.old_logprobs,
        batch.ref_logprobs,
        mask=batch.mask,
        settings=CorrectionConfig(weight=kind, **bounds),
    )


def ppo_loss(logprobs: Tensor, old: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    tensors = {"old_logprobs": old, "ref_logprobs": old, "advantages": advantages}
    return ppo.loss(logprobs, **tensors, weights=weights, settings=PPOConfig())[0]


def of_vector(v: dict, kind: str, **bounds: float) -> Tensor:
    return off_policy.importance_weights(
        t64(v["old_logp"]),
        t64(v["rollout_logp"]),
        mask=MASK,
        settings=CorrectionConfig(weight=kind, **bounds),
    )


@pytest.mark.parametrize(
    ("kind", "bounds", "key"),
    [
        ("full", {}, "rho"),
        ("tis", {"high": 2.0}, "w_tis_C2"),
        ("clamp", {"low": 0.5, "high": 5.0}, "w_clamp_0p5_5"),
        ("icepop", {"low": 0.5, "high": 2.0}, "w_icepop_0p5_2"),
    ],
)
def test_v17_weights_of_tokens(vectors, kind: str, bounds: dict, key: str):
    close(of_vector(vectors["V17_tis"], kind, **bounds), vectors["V17_tis"][key])


def test_v17_weights_of_sequences(vectors):
    v = vectors["V17_tis"]
    product = of_vector(v, "sequence_tis", high=100.0)
    close(product[:, 0], v["seq_prod"])
    assert product[1].tolist() == pytest.approx([v["seq_prod"][1]] * 4)
    close(of_vector(v, "sequence_tis", high=2.0)[0], [2.0, 2.0, 2.0, 0.0])
    # The first row's geometric mean lies between the bounds or above them; its weights are not cut either way.
    first, second = v["seq_geo"]
    kept = of_vector(v, "sequence_mask", low=0.9, high=first + 1e-6)
    close(kept, v["rho"])
    close(of_vector(v, "sequence_mask", low=0.9, high=first - 1e-6)[0], [0.0] * 4)
    close(of_vector(v, "sequence_mask", low=second + 1e-6, high=2.0)[1], [0.0] * 4)


def test_v17_losses_divide_by_all_tokens(vectors):
    v = vectors["V17_tis"]
    weights = token_weights(MASK, mode="token_mean", dtype=torch.float64)
    arguments = (t64(v["new_logp"]), t64(v["old_logp"]), t64(v["adv"]))
    close(ppo_loss(*arguments, weights), v["loss_plain"], atol=2e-8)
    close(ppo_loss(*arguments, weights * of_vector(v, "tis")), v["loss_tis"], atol=2e-8)
    close(ppo_loss(*arguments, weights * of_vector(v, "icepop")), v["loss_icepop"], atol=2e-8)


def test_v17_figures_of_the_mismatch(vectors):
    v = vectors["V17_tis"]
    old, behavior, corrected = t64(v["old_logp"]), t64(v["rollout_logp"]), of_vector(v, "tis")
    found = off_policy.mismatch(old, behavior, mask=MASK, weights=corrected)
    close(masked_mean(kl.k1(behavior, old), MASK), v["mismatch_k1"])
    close(found["k3_mean"], v["mismatch_k3"])
    close(found["ess"], v["ess"])
    close(found["gap_mean"], (0.1 + 0.8 + 0.1 + 0.1) / 7)
    close(found["ratio_max"], math.exp(0.8))
    close(found["changed_fraction"], 1 / 7)


def test_v17b_bypass_takes_the_ratio_against_the_engine(vectors):
    v = vectors["V17_tis"]
    close(
        torch.where(MASK, (t64(v["new_logp"]) - t64(v["rollout_logp"])).exp(), 0),
        vectors["V17b_bypass_two_policy"]["ratio"],
    )
    weights = token_weights(MASK, mode="token_mean", dtype=torch.float64)
    loss = ppo_loss(t64(v["new_logp"]), t64(v["rollout_logp"]), t64(v["adv"]), weights)
    close(loss, vectors["V17b_bypass_two_policy"]["loss"], atol=2e-8)


def test_v17c_weight_times_ratio_is_the_ratio_to_the_engine(vectors):
    v = vectors["V17_tis"]
    update = torch.where(MASK, (t64(v["new_logp"]) - t64(v["old_logp"])).exp(), 0)
    direct = torch.where(MASK, (t64(v["new_logp"]) - t64(v["rollout_logp"])).exp(), 0)
    assert (of_vector(v, "full") * update - direct).abs().max() <= vectors["V17c_decoupled_identity"]["max_abs"] + 1e-12


def test_v17d_old_logprobs_by_interpolation(vectors):
    v = vectors["V17d_loglinear_prox"]
    versions = (v["v_behave"], v["v_prox"], v["v_theta"])
    found = off_policy.interpolate_old_logprobs(t64(v["logp_behave"]), t64(v["logp_theta"]), versions=versions)
    close(found, v["logp_prox"])
    close((found - v["logp_behave"]) / (v["logp_theta"] - v["logp_behave"]), v["alpha"])
    with pytest.raises(ValueError, match="ascend"):
        off_policy.interpolate_old_logprobs(t64(0.0), t64(0.0), versions=(3, 3, 3))


@pytest.mark.parametrize("kind", KINDS)
@given(batch=batches(), num_columns=st.integers(0, 3))
def test_weights_equal_a_slow_loop_for_any_padding(kind: str, batch: Batch, num_columns: int):
    low, high = 0.8, 1.25
    wider = batch.padded(num_columns, float("nan"))
    found = corrections(wider, kind, low=low, high=high)
    assert (found[~wider.mask] == 0).all()
    for row, length in enumerate(batch.mask.sum(dim=1).tolist()):
        gaps = [(batch.old_logprobs[row, t] - batch.ref_logprobs[row, t]).item() for t in range(length)]
        keeps = low <= math.exp(sum(gaps) / length) <= high
        for t, w in enumerate(math.exp(gap) for gap in gaps):
            expected = {
                "full": w,
                "tis": min(w, high),
                "clamp": min(max(w, low), high),
                "icepop": w if low <= w <= high else 0.0,
                "sequence_mask": w if keeps else 0.0,
                "sequence_tis": min(math.exp(sum(gaps)), high),
            }[kind]
            close(found[row, t], expected)


@pytest.mark.parametrize("kind", ["none", *KINDS])
@given(batch=batches())
def test_i20_samples_of_this_very_policy_leave_plain_ppo(kind: str, batch: Batch):
    weights = token_weights(batch.mask, mode="token_mean", dtype=torch.float64)
    settings = CorrectionConfig(weight=kind)
    own = off_policy.importance_weights(batch.old_logprobs, batch.old_logprobs, mask=batch.mask, settings=settings)
    assert (own[batch.mask] == 1).all()
    plain = ppo_loss(batch.logprobs, batch.old_logprobs, batch.advantages, weights)
    assert torch.equal(ppo_loss(batch.logprobs, batch.old_logprobs, batch.advantages, weights * own), plain)


@given(batches())
def test_i20_a_bound_without_end_is_full_importance_sampling(batch: Batch):
    close(corrections(batch, "tis", high=1e9), corrections(batch, "full"))


@given(batches())
def test_i20_in_expectation_full_weights_undo_the_engine(batch: Batch):
    """The mean over mu of w f equals the mean over pi_old of f, for distributions made from the batch."""
    old = torch.where(batch.mask, batch.old_logprobs, -torch.inf).log_softmax(1)
    behavior = torch.where(batch.mask, batch.ref_logprobs, -torch.inf).log_softmax(1)
    settings = CorrectionConfig(weight="full")
    w = off_policy.importance_weights(old, behavior, mask=batch.mask, settings=settings)
    f = torch.where(batch.mask, batch.advantages, 0)
    close((behavior.exp() * w * f).sum(dim=1), (old.exp() * f).sum(dim=1))


def test_weights_have_no_gradient_and_absurd_ratios_stay_finite():
    old = torch.tensor([[90.0, -90.0]], requires_grad=True)
    found = off_policy.importance_weights(
        old,
        torch.zeros(1, 2),
        mask=torch.ones(1, 2, dtype=torch.bool),
        settings=CorrectionConfig(weight="full"),
    )
    assert not found.requires_grad
    assert found[0].tolist() == pytest.approx([math.exp(20), math.exp(-20)])


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30))
def test_i21_the_lags_sum_to_the_tokens(versions: list[int]):
    mask = torch.ones(len(versions) + 2, dtype=torch.bool)
    mask[-2:] = False
    tensor = torch.tensor([*versions, 99, 99])
    found = off_policy.lag_histogram(tensor, current=6, mask=mask)
    assert sum(found.values()) == len(versions)
    assert found == {lag: versions.count(6 - lag) for lag in sorted({6 - version for version in versions})}


@pytest.mark.parametrize("kind", KINDS)
def test_i20_the_same_ratio_is_not_counted_twice(kind: str):
    with pytest.raises(ValidationError, match="count the same ratio twice"):
        CorrectionConfig(weight=kind, old_policy="behavior")


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(ValidationError, match="must be less than"):
        CorrectionConfig(weight="clamp", low=2.0, high=0.5)


def test_unlike_tensors_and_unknown_kinds_are_refused():
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="behavior_logprobs must be like"):
        off_policy.importance_weights(torch.zeros(1, 2), torch.zeros(1, 3), mask=mask, settings=CorrectionConfig())
    unknown = CorrectionConfig().model_copy(update={"weight": "vtrace"})
    with pytest.raises(ValueError, match="unknown correction"):
        off_policy.importance_weights(torch.zeros(1, 2), torch.zeros(1, 2), mask=mask, settings=unknown)
