"""The validation of a reward model, against numbers by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.validation import best_temperature, expected_calibration_error, paired_gain, validation_report
from tests.reference_vectors import VECTORS


def test_report_by_hand() -> None:
    # Pairs: 3 over 1 (right), 0 over 2 (wrong), 2 over 2 (a tie).
    scores = np.array([3.0, 1.0, 0.0, 2.0, 2.0])
    found = validation_report(
        scores,
        better=np.array([0, 2, 3]),
        worse=np.array([1, 3, 4]),
        response_tokens=np.array([6, 2, 0, 4, 4]),
    )
    assert (found["num_pairs"], found["num_responses"]) == (3, 5)
    assert found["accuracy"] == pytest.approx(1 / 3)
    nll = (math.log1p(math.exp(-2)) + math.log1p(math.exp(2)) + math.log(2)) / 3
    assert found["nll_nats"] == pytest.approx(nll)
    assert found["length_correlation"] == pytest.approx(1.0)
    assert found["score_mean"] == pytest.approx(1.6)
    assert found["num_pairs_both_high"] == 0
    assert found["accuracy_both_high"] is None


def test_pairs_of_two_high_scores_are_told_apart() -> None:
    scores = np.array([5.0, 4.0, 6.0, 7.0, 0.0, 0.0, 0.0, 0.0])
    found = validation_report(
        scores,
        better=np.array([0, 2, 0]),
        worse=np.array([1, 3, 4]),
        response_tokens=np.ones(8, np.int64),
    )
    assert found["num_pairs_both_high"] == 2
    assert found["accuracy_both_high"] == 0.5
    assert found["length_correlation"] is None


def test_a_model_that_is_as_sure_as_it_is_right_is_calibrated() -> None:
    # Ten bins of 100: in each, the share of right pairs is the confidence, to 1/100.
    gaps = []
    for gap in np.linspace(0.1, 3, 10):
        right = round(100 / (1 + math.exp(-gap)))
        gaps += [gap] * right + [-gap] * (100 - right)
    ece, bins = expected_calibration_error(np.array(gaps))
    assert ece < 0.006
    assert [b["num_pairs"] for b in bins] == [100] * 10
    assert bins[0]["gap_mean"] == pytest.approx(0.1)
    sure_and_wrong, _ = expected_calibration_error(np.full(50, -4.0))
    assert sure_and_wrong == pytest.approx(1 / (1 + math.exp(-4)))


def test_a_gain_is_paired_and_its_interval_is_over_prompts() -> None:
    rng = np.random.default_rng(5)
    prompts = np.repeat(np.arange(200), 3)
    old = rng.normal(0.2, 1.0, size=600)
    better = old + 0.8
    found = paired_gain(better, old, prompts=prompts, metric="accuracy", confidence=0.95, resamples=500, seed=0)
    assert found["gain"] == pytest.approx(np.mean(better > 0) - np.mean(old > 0))
    assert found["ci_low"] < found["gain"] < found["ci_high"]
    assert found["passed"]
    assert (found["num_pairs"], found["num_prompts"]) == (600, 200)
    same = paired_gain(old, old, prompts=prompts, metric="nll", confidence=0.95, resamples=100, seed=0)
    assert (same["gain"], same["ci_low"], same["ci_high"], same["passed"]) == (0.0, 0.0, 0.0, False)


def test_a_model_is_not_better_for_being_less_sure() -> None:
    rng = np.random.default_rng(6)
    old = rng.normal(0.5, 1.0, size=400)
    found = paired_gain(old * 0.1, old, prompts=np.arange(400), metric="nll", confidence=0.95, resamples=200, seed=0)
    # Scaling alone changes nothing but what the grid of temperatures rounds off.
    assert abs(found["gain"]) < 1e-3
    assert found["new"]["accuracy"] == found["old"]["accuracy"]


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    # Ten prompts that disagree strongly: as 1,000 independent pairs the gain would look certain.
    new = np.repeat([2.0, -2.0, 2.0, -2.0, 2.0, 2.0, -2.0, 2.0, -2.0, 2.0], 100)
    found = paired_gain(
        new, -np.ones(1000), prompts=np.repeat(np.arange(10), 100), metric="accuracy", confidence=0.95,
        resamples=1000, seed=1,
    )  # fmt: skip
    assert found["gain"] == pytest.approx(0.6)
    assert found["ci_low"] < 0.4


def cross_entropy(gaps: list[float], labels: list[float], temperature: float) -> float:
    total = 0.0
    for gap, p in zip(gaps, labels, strict=True):
        x = gap / temperature
        total += p * math.log1p(math.exp(-x)) + (1 - p) * math.log1p(math.exp(x))
    return total / len(gaps)


def test_v12c_recalibration_on_soft_labels() -> None:
    v = VECTORS["V12c_recalibrate"]
    found = best_temperature(np.array(v["score_diff"]), np.array(v["soft_labels"]))
    assert found == pytest.approx(v["T"], abs=1e-4)
    assert cross_entropy(v["score_diff"], v["soft_labels"], found) == pytest.approx(v["ce"], abs=1e-7)
    assert cross_entropy(v["score_diff"], v["soft_labels"], 1.0) == pytest.approx(v["ce_T1"], abs=1e-7)


@settings(deadline=None, derandomize=True)
@given(
    pairs=st.lists(st.tuples(st.floats(-5, 5), st.floats(0.02, 0.98)), min_size=1, max_size=8),
    factor=st.floats(0.2, 5.0),
    data=st.data(),
)
def test_the_temperature_is_the_best_and_scales_with_the_scores(
    pairs: list, factor: float, data: st.DataObject
) -> None:
    gaps, labels = [gap for gap, _ in pairs], [p for _, p in pairs]
    found = best_temperature(np.array(gaps), np.array(labels))
    if found is None or not 1e-2 < found < 1e2:
        return
    for other in (0.5, 0.9, 1.1, 2.0):
        assert cross_entropy(gaps, labels, found) <= cross_entropy(gaps, labels, found * other) + 1e-12
    order = data.draw(st.permutations(range(len(pairs))))
    # Turning a pair round, together with its label, changes nothing.
    turned = best_temperature(-factor * np.array(gaps)[order], 1 - np.array(labels)[order])
    assert turned == pytest.approx(factor * found, rel=1e-6)


def test_labels_that_no_temperature_fits_have_none() -> None:
    assert best_temperature(np.array([1.0, 2.0]), np.ones(2)) is None  # nothing wrong: the colder the better
    assert best_temperature(np.array([1.0, -2.0]), np.ones(2)) is None  # more wrong than right: the hotter the better
    assert best_temperature(np.zeros(3), np.ones(3)) is None
    assert best_temperature(np.array([2.0, 2.0, -2.0]), np.ones(3)) == pytest.approx(2 / math.log(2))


def test_the_report_says_by_how_much_a_model_is_too_sure() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(0, 1.5, size=20_000)
    right = rng.random(20_000) < 1 / (1 + np.exp(-truth))
    scores = np.zeros(40_000)
    scores[::2] = 3 * truth
    first, second = np.arange(0, 40_000, 2), np.arange(1, 40_000, 2)
    found = validation_report(
        scores,
        better=np.where(right, first, second),
        worse=np.where(right, second, first),
        response_tokens=np.ones(40_000, np.int64),
    )
    assert found["temperature"] == pytest.approx(3, rel=0.05)
