"""The rules that turn curves into verdicts."""

import math

import numpy as np
import pytest

from benchmarks.experiments.laboratory.verdicts import (
    at_kl,
    choose_learning_rate,
    falling,
    judge,
    last,
    paired,
    turns,
)

CURVE = {
    "iteration": np.array([0.0, 10, 20, 30]),
    "kl_exact_nats": np.array([0.0, 1.0, 5.0, 3.0]),
    "gold": np.array([0.0, 2.0, 1.0, 1.5]),
    "proxy": np.array([0.0, 2.0, 4.0, 3.0]),
}


def test_a_claim_is_reproduced_in_all_seeds_or_not_at_all() -> None:
    assert judge("E", "x", {1: True, 2: True}).verdict == "reproduced"
    assert judge("E", "x", {1: True, 2: False}).verdict == "not reproduced"
    assert judge("E", "x", {1: True, 2: True}, in_released={1: False, 2: False}).verdict == "reproduced"
    only = judge("E", "x", {1: True, 2: False}, in_released={1: True, 2: True})
    assert only.verdict == "only in the arm that copies the released code"
    assert only.sentence == "E: x: only in the arm that copies the released code (1 of 2 seeds)."
    assert judge("E", "x", {1: False}, in_released={1: False}).verdict == "not reproduced"
    with pytest.raises(ValueError, match="no seed"):
        judge("E", "x", {})


def test_values_at_a_distance_are_interpolated_at_the_first_crossing() -> None:
    curve = CURVE | {"kl_exact_nats": np.array([0.0, 0.5, 2.0, 1.8])}
    assert at_kl(curve, 1.25, column="gold") == pytest.approx(1.5)
    assert at_kl(curve, 1.25, column="proxy") == pytest.approx(3)
    assert at_kl(curve, 0.0, column="gold") == 0.0
    assert math.isnan(at_kl(curve, 2.1, column="gold"))


def test_nothing_is_read_between_evaluations_that_are_far_apart() -> None:
    jumping = {"kl_exact_nats": np.array([0.0, 2.9]), "gold": np.array([0.0, 1.1])}
    assert math.isnan(at_kl(jumping, 1.0, column="gold"))
    watched = {"kl_exact_nats": np.array([0.0, 0.4, 1.6, 2.9]), "gold": np.array([0.0, 0.5, 0.9, 1.1])}
    assert at_kl(watched, 1.0, column="gold") == pytest.approx(0.7)


def test_the_end_is_a_mean_of_three_evaluations() -> None:
    assert last(CURVE, "gold") == pytest.approx(1.5)


def test_paired_difference_with_its_t_interval() -> None:
    mean, low, high = paired([3.0, 5.0, 7.0], [1.0, 4.0, 4.0])
    assert mean == pytest.approx(2.0)
    # t(0.975, 2) = 4.302653, s = 1, n = 3
    assert (low, high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)), abs=1e-5)
    assert math.isnan(paired([1.0], [0.0])[1])


def test_a_turnover_is_a_drop_that_noise_does_not_make() -> None:
    up = {"gold": np.array([0.0, 1.0, 2.0, 2.4, 2.2, 2.3])}
    down = {"gold": np.array([0.0, 2.0, 2.0, 2.0, 1.4, 1.4, 1.4])}
    assert not turns(up)
    assert turns(down)
    assert not turns(down, drop=0.7)


def test_falling_is_strict() -> None:
    assert falling([3.0, 2.0, 1.0])
    assert not falling([3.0, 3.0, 1.0])


def test_a_learning_rate_is_chosen_by_proxy_at_a_fixed_distance_alone() -> None:
    worse_proxy = CURVE | {"kl_exact_nats": np.array([0.0, 1.0, 2.5, 4.5])}
    better_proxy = worse_proxy | {"proxy": np.array([0.0, 3.0, 4.5, 4.0]), "gold": np.array([0.0, -9.0, -9.0, -9.0])}
    never_there = CURVE | {"proxy": np.full(4, 99.0), "kl_exact_nats": np.array([0.0, 0.1, 0.2, 0.3])}
    assert choose_learning_rate({1e-3: worse_proxy, 2e-3: better_proxy, 4e-3: never_there}, nats=4.0) == 2e-3
    further = never_there | {"kl_exact_nats": np.array([0.0, 0.1, 0.2, 0.4])}
    assert choose_learning_rate({1e-3: never_there, 2e-3: further}, nats=4.0) == 2e-3
