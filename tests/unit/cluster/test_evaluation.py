"""The win rate: ties count half, the interval covers, the prompts must match."""

import numpy as np
import pytest

from cluster.evaluation import Evaluation, compare, win_rate
from configs.load import load


def test_ties_count_half() -> None:
    rate, (low, high) = win_rate(
        {"a": 1.0, "b": 0.0, "c": 2.0, "d": 2.0}, {"a": 0.0, "b": 1.0, "c": 2.0, "d": 1.0}, resamples=500, seed=0
    )
    assert rate == (1 + 0 + 0.5 + 1) / 4
    assert low <= rate <= high


def test_the_interval_agrees_with_the_normal_approximation() -> None:
    rng = np.random.default_rng(0)
    after = {str(i): float(rng.random() < 0.7) for i in range(400)}
    before = dict.fromkeys(after, 0.5)
    rate, (low, high) = win_rate(after, before, resamples=4000, seed=1)
    half_width = 1.96 * (rate * (1 - rate) / 400) ** 0.5
    assert low == pytest.approx(rate - half_width, abs=0.006)
    assert high == pytest.approx(rate + half_width, abs=0.006)


def test_different_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        win_rate({"a": 1.0}, {"b": 1.0}, resamples=10, seed=0)


REST = {"components": {}, "response_tokens": {"a": 3, "b": 3}}


def test_the_comparison_holds_both_sides() -> None:
    summary = {"score_mean": 0.0, "kl_k1_per_sequence": 0.0, "response_tokens_mean": 3.0}
    before = Evaluation(
        policy_version=0,
        summary=summary,
        judged={"a": 0.0, "b": 0.0},
        judge="gold",
        **REST,
    )
    after = Evaluation(
        policy_version=4,
        summary=summary,
        judged={"a": 1.0, "b": 1.0},
        judge="gold",
        **REST,
    )
    result = compare(before, after, load("quickstart"))
    assert result["after"]["win_rate"] == 1.0
    assert result["after"]["win_rate_ci95"] == [1.0, 1.0]
    assert result["before"]["policy_version"] == 0
