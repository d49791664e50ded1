"""Masked sums, moments and whitening."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_batches import Batch, batches, close, t64

from learner.ops import masked

MASK = torch.tensor([[True, True, True, False], [True, True, True, True]])


def slow_moments(values: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    kept = [
        v for row, keep in zip(values.tolist(), mask.tolist(), strict=True) for v, k in zip(row, keep, strict=True) if k
    ]
    mean = math.fsum(kept) / len(kept)
    return mean, math.fsum((v - mean) ** 2 for v in kept) / len(kept)


def test_v4_moments_are_masked_and_biased(vectors):
    v = vectors["V4_whiten"]
    mean, var = masked.moments(t64(v["adv"]), MASK)
    close(mean, v["mean"])
    close(var, v["var_biased"])
    close(masked.masked_mean(t64(v["adv"]), MASK), v["mean"])
    close(masked.masked_var(t64(v["adv"]), MASK), v["var_biased"])
    # Neither the unbiased variance nor the moments of the padding's zero as well.
    close(t64(v["adv"])[MASK].var(correction=1), v["var_unbiased"])
    close(t64(v["adv"]).mean(), v["TRLX_unmasked_mean"])
    close(t64(v["adv"]).var(correction=1), v["TRLX_unmasked_var_unbiased"])
    assert abs(var.item() - v["var_unbiased"]) > 0.1
    assert abs(mean.item() - v["TRLX_unmasked_mean"]) > 0.01
    assert abs(var.item() - v["TRLX_unmasked_var_unbiased"]) > 0.005


def test_v4_whitening(vectors):
    v = vectors["V4_whiten"]
    close(masked.whiten(t64(v["adv"]), MASK), v["whitened_biased"], atol=2e-8)
    close(
        masked.whiten(t64(v["adv"]), MASK, mean=t64(v["mean"]), var=t64(v["var_biased"])),
        v["whitened_biased"],
        atol=3e-8,
    )


def test_v4_whitening_is_not_that_of_other_moments(vectors):
    v = vectors["V4_whiten"]
    values, found = t64(v["adv"]), masked.whiten(t64(v["adv"]), MASK)
    mean, var = t64(v["mean"]), t64(v["var_unbiased"])
    close(masked.whiten(values, MASK, mean=mean, var=var), v["whitened_unbiased"], atol=3e-8)
    unmasked = masked.whiten(values, torch.ones_like(MASK), mean=values.mean(), var=values.var(correction=1))
    close(unmasked, v["TRLX_unmasked_whitened"], atol=3e-8)
    for other in (v["whitened_unbiased"], v["TRLX_unmasked_whitened"]):
        assert ((found - t64(other))[MASK].abs() > 0.01).all()
    # Without a mask even the padding gets a value.
    assert unmasked[0, 3] != 0 == found[0, 3]


def test_v4b_rewards_keep_their_mean(vectors):
    v = vectors["V4b_whiten_rewards_no_shift"]
    mean, var = masked.moments(t64(v["rewards"]), MASK)
    close(mean, v["mean"])
    close(var, v["var"])
    close(masked.whiten(t64(v["rewards"]), MASK, shift_mean=False), v["whitened"], atol=3e-8)


@given(batches())
def test_moments_equal_a_slow_loop(batch: Batch):
    mean, var = masked.moments(batch.advantages, batch.mask)
    expected_mean, expected_var = slow_moments(batch.advantages, batch.mask)
    close(mean, expected_mean)
    close(var, expected_var)


@given(batches(), st.integers(0, 4), st.randoms(use_true_random=False))
def test_i2_padding_and_row_order_do_not_change_the_moments(batch: Batch, num_columns: int, random):
    order = random.sample(range(len(batch.mask)), len(batch.mask))
    other = batch.padded(num_columns, float("nan")).rows(order)
    for mine, theirs in zip(
        masked.moments(batch.advantages, batch.mask), masked.moments(other.advantages, other.mask), strict=True
    ):
        close(mine, theirs, atol=1e-12)


@given(batches(min_rows=2), st.data())
def test_i3_moments_over_ranks_are_those_of_the_whole_batch(batch: Batch, data: st.DataObject):
    cut = data.draw(st.integers(1, len(batch.mask) - 1))
    mine, theirs = batch.rows(list(range(cut))), batch.rows(list(range(cut, len(batch.mask))))
    expected_mean, expected_var = slow_moments(batch.advantages, batch.mask)
    others = iter(
        [
            masked.count_and_sum(theirs.advantages, theirs.mask),
            masked.squares_about(theirs.advantages, theirs.mask, mean=t64(expected_mean)),
        ]
    )
    mean, var = masked.moments(mine.advantages, mine.mask, all_reduce_sum=lambda partial: partial + next(others))
    close(mean, expected_mean)
    close(var, expected_var)


@given(batches(min_rows=2), st.floats(-5, 5), st.floats(0.1, 10))
def test_i7_whitened_values_are_standard_idempotent_and_affine_invariant(batch: Batch, shift: float, scale: float):
    values = torch.where(batch.mask, batch.advantages, 0)
    if slow_moments(values, batch.mask)[1] < 1e-2:
        return  # a single token has no spread to scale
    whitened = masked.whiten(values, batch.mask)
    mean, var = slow_moments(whitened, batch.mask)
    assert abs(mean) < 1e-9
    assert abs(var - 1) < 1e-5
    close(masked.whiten(whitened, batch.mask), whitened, atol=1e-5)
    close(masked.whiten(shift + scale * values, batch.mask), whitened, atol=2e-4)
    assert (whitened[~batch.mask] == 0).all()


def test_i7_holds_in_float32():
    values = torch.linspace(-3, 5, 12).reshape(3, 4)
    mask = torch.tensor([[True, True, False, False], [True, True, True, True], [True, True, True, False]])
    mean, var = slow_moments(masked.whiten(values, mask), mask)
    assert abs(mean) < 1e-6
    assert abs(var - 1) < 1e-6


def test_the_variance_survives_a_large_mean():
    # The difference of E[x^2] and E[x]^2 has no correct digit here in float32.
    values = 1e5 + torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert masked.moments(values, torch.ones(1, 4, dtype=torch.bool))[1].item() == pytest.approx(1.25, abs=1e-6)


def test_equal_values_whiten_to_zero():
    mask = torch.ones(2, 2, dtype=torch.bool)
    assert (masked.whiten(torch.full((2, 2), 0.1), mask).abs() < 1e-3).all()


def test_masked_sum_ignores_what_is_masked():
    values = t64([[1.0, float("nan")], [2.0, 4.0]])
    mask = torch.tensor([[True, False], [True, True]])
    assert masked.masked_sum(values, mask).item() == 7.0
    assert masked.masked_sum(values, mask, dim=1).tolist() == [1.0, 6.0]


def test_an_empty_mask_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        masked.moments(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool))


def test_one_moment_without_the_other_is_refused():
    with pytest.raises(ValueError, match="both mean and var"):
        masked.whiten(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), mean=torch.zeros(()))


@pytest.mark.parametrize("mask", [torch.ones(2, 2), torch.ones(2, 3, dtype=torch.bool)])
def test_a_mask_that_does_not_fit_is_refused(mask: torch.Tensor):
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        masked.whiten(torch.ones(2, 2), mask)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (torch.ones(3), "other must be like values"),
        (torch.ones(4, dtype=torch.float64), "other must be like values"),
        (torch.ones(4, dtype=torch.bfloat16), "float32 or float64"),
        (torch.ones(4, dtype=torch.long), "float32 or float64"),
        (torch.ones(1, 2, 2), "rank 1 or 2"),
    ],
)
def test_unlike_tensors_are_refused(other: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        masked.check_alike(values=torch.ones(4), other=other)
