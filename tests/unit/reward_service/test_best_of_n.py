"""Best of n: the published numbers, and every subset counted out."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_service.best_of_n import expected_best, kl_bound
from tests.reference_vectors import VECTORS

POOL = st.lists(st.tuples(st.integers(0, 4), st.floats(-3, 3)), min_size=1, max_size=6)
EXAMPLES = settings(deadline=None, derandomize=True)


def by_counting(scores: list[float], values: list[float], n: int) -> float:
    """The mean over all subsets of n, and over the equals within each."""
    total, subsets = 0.0, list(itertools.combinations(range(len(scores)), n))
    for subset in subsets:
        top = max(scores[i] for i in subset)
        winners = [values[i] for i in subset if scores[i] == top]
        total += sum(winners) / len(winners)
    return total / len(subsets)


def test_v14_the_divergence() -> None:
    v = VECTORS["V14_bon_kl"]
    assert [kl_bound(n) for n in v["n"]] == pytest.approx(v["kl"], abs=1e-8)
    assert [math.sqrt(kl_bound(n)) for n in v["n"]] == pytest.approx(v["d"], abs=1e-8)
    with pytest.raises(ValueError, match="nobody"):
        kl_bound(0)


def test_the_divergence_is_that_of_the_best_of_many_equally_likely_responses() -> None:
    # P(best is the i-th of M) = (i/M)^n - ((i-1)/M)^n against 1/M; equal scores within a cell make the bound loose.
    num, n = 20_000, 8
    edges = (np.arange(num + 1) / num) ** n
    chosen = np.diff(edges)
    exact = float(np.sum(chosen * np.log(chosen * num)))
    assert exact == pytest.approx(kl_bound(n), abs=1e-3)
    assert exact <= kl_bound(n)


def test_v14b_the_estimator_for_every_n() -> None:
    v = VECTORS["V14b_bon_unbiased"]
    proxy, gold = np.array(v["proxy"]), np.array(v["gold"])
    for n, expected in v["n_to_goldmean_proxymean"].items():
        found = [expected_best(proxy, values, n=int(n)) for values in (gold, proxy)]
        assert found == pytest.approx(expected, abs=1e-8)
    # The weight of a sample is what it contributes when it alone is worth one.
    weights = [expected_best(proxy, np.eye(5)[place], n=2) for place in np.argsort(proxy)]
    assert weights == pytest.approx(v["weights_n2_sorted_by_proxy"], abs=1e-8)
    assert by_counting(v["proxy"], v["gold"], 2) == pytest.approx(VECTORS["V14c_bon_bruteforce_n2"]["gold"])


@EXAMPLES
@given(pool=POOL, data=st.data())
def test_i17_the_estimator_equals_counting_every_subset(pool: list, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(pool)))
    order = data.draw(st.permutations(pool))
    expected = by_counting([s for s, _ in pool], [v for _, v in pool], n)
    found = expected_best(np.array([s for s, _ in order], float), np.array([v for _, v in order]), n=n)
    # By counting, a lot is drawn within each subset; both are the same expectation.
    assert found == pytest.approx(expected, abs=1e-9)


@EXAMPLES
@given(pool=POOL)
def test_i17_the_best_of_one_is_the_mean_and_more_never_score_less(pool: list) -> None:
    scores = np.array([s for s, _ in pool], float)
    values = np.array([v for _, v in pool])
    assert expected_best(scores, values, n=1) == pytest.approx(values.mean(), abs=1e-9)
    proxy = [expected_best(scores, scores, n=n) for n in range(1, len(pool) + 1)]
    assert np.all(np.diff(proxy) >= -1e-12)
    assert proxy[-1] == pytest.approx(scores.max())


def test_a_pool_of_thousands_loses_no_digits() -> None:
    num, n = 2**14, 700
    scores = np.arange(num, dtype=float)
    # The expectation of the maximum of n different numbers out of 0..N-1.
    assert expected_best(scores, scores, n=n) == pytest.approx(n * (num + 1) / (n + 1) - 1, rel=1e-12)


def test_scores_that_choose_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="none of them NaN"):
        expected_best(np.array([0.0, math.nan]), np.zeros(2), n=1)
    with pytest.raises(ValueError, match="best of 3 cannot be estimated"):
        expected_best(np.zeros(2), np.zeros(2), n=3)
    with pytest.raises(ValueError, match="cannot be estimated"):
        expected_best(np.zeros(2), np.zeros(3), n=1)
