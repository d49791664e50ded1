"""The Bradley-Terry numerics: the published vectors, slow loops, and when a maximum exists."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from reward_service import bradley_terry as bt
from reward_service.ladder import predicted_elo
from tests.reference_vectors import VECTORS

Table = Sequence[Sequence[float]]


def counts_of(table: Table) -> bt.WinCounts:
    """Everything on one prompt; `table[i][j]` wins of i over j."""
    pairs = [(i, j) for i in range(len(table)) for j in range(i) if table[i][j] + table[j][i]]
    totals = [table[i][j] + table[j][i] for i, j in pairs]
    return bt.count_wins(
        np.array(pairs),
        np.array([table[i][j] / total for (i, j), total in zip(pairs, totals, strict=True)]),
        weights=np.array(totals, float),
        prompts=np.zeros(len(pairs), int),
        num_versions=len(table),
    )


def fit(table: Table, anchor: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """Theta, standard errors and log-likelihood, the anchor in its place."""
    counts = counts_of(table)
    rows = bt.design(counts.directions, num_versions=len(table), anchor=anchor)
    wins = counts.totals + bt.pseudo_wins(counts.totals, counts.directions, num_versions=len(table))
    beta = bt.maximise(rows, wins[None])
    errors = np.sqrt(np.diag(np.linalg.inv(bt.information(rows, wins[None], beta)[0])))
    value = float(bt.log_likelihood(rows, counts.totals[None], beta)[0])
    return np.insert(beta[0], anchor, 0.0), np.insert(errors, anchor, 0.0), value


def slow_negative_log_likelihood(free: np.ndarray, table: Table, anchor: int) -> float:
    theta = np.insert(free, anchor, 0.0)
    total = 0.0
    for i in range(len(table)):
        for j in range(len(table)):
            total += table[i][j] * math.log(1 + math.exp(theta[j] - theta[i]))
    return total


def test_v16_the_unit_is_the_elo_scale() -> None:
    v = VECTORS["V16_elo"]
    assert v["C"] == pytest.approx(bt.ELO_PER_LOGIT, abs=1e-8)
    assert v["pm_1_to_elo"] == pytest.approx(predicted_elo([1.0]), abs=1e-8)
    [lead] = bt.sigmoid(np.array([100.0]) / bt.ELO_PER_LOGIT)
    assert lead == pytest.approx(v["p_at_100"], abs=1e-6)
    for rate, key in ((0.75, "delta_from_p_0p75"), (0.6, "delta_from_p_0p6")):
        assert predicted_elo([math.log(rate / (1 - rate))]) == pytest.approx(v[key], abs=1e-8)


def test_v16_ratings_game_by_game_depend_on_the_order_and_these_do_not() -> None:
    """Elo's own update, r <- r + k (win - expected), is computed here alone: the project has no such rule."""

    def update(ra: float, rb: float, win: float, k: float) -> tuple[float, float]:
        [expected] = bt.sigmoid(np.array([ra - rb]) / bt.ELO_PER_LOGIT)
        return ra + k * (win - expected), rb - k * (win - expected)

    v = VECTORS["V16_elo"]["online_update"]
    ra, rb, k, win = v["ra"], v["rb"], v["k"], v["win"]
    assert bt.sigmoid(np.array([ra - rb]) / bt.ELO_PER_LOGIT)[0] == pytest.approx(v["expected"], abs=1e-6)
    assert update(ra, rb, win, k) == pytest.approx(v["new"], abs=1e-5)
    won_first, lost_first = (update(*update(ra, rb, first, k), 1 - first, k) for first in (1, 0))
    assert abs(won_first[0] - lost_first[0]) > 0.01
    sides, weights, prompts = np.array([[0, 1], [0, 1]]), np.ones(2), np.zeros(2, int)
    for outcomes in ([1.0, 0.0], [0.0, 1.0]):
        counts = bt.count_wins(sides, np.array(outcomes), weights=weights, prompts=prompts, num_versions=2)
        rows = bt.design(counts.directions, num_versions=2, anchor=0)
        assert bt.maximise(rows, counts.totals[None])[0] == pytest.approx([0.0], abs=1e-9)


def test_v16b_two_versions() -> None:
    v = VECTORS["V16b_bt_two"]
    theta, errors, _ = fit(v["wins"])
    assert theta == pytest.approx(v["theta"], abs=1e-8)
    assert bt.ELO_PER_LOGIT * theta == pytest.approx(v["elo"], abs=1e-6)
    assert bt.ELO_PER_LOGIT * errors == pytest.approx(v["se_elo"], abs=1e-6)


def test_v16c_three_versions_in_full() -> None:
    v = VECTORS["V16c_bt_three"]
    theta, errors, value = fit(v["wins_i_over_j"])
    assert theta == pytest.approx(v["theta"], abs=1e-8)
    assert bt.ELO_PER_LOGIT * theta == pytest.approx(v["elo"], abs=1e-6)
    assert bt.ELO_PER_LOGIT * errors == pytest.approx(v["se_elo"], abs=1e-6)
    assert value == pytest.approx(v["loglik"], abs=1e-7)
    for (i, j), key in (((2, 0), "pred_2_over_0"), ((2, 1), "pred_2_over_1"), ((1, 0), "pred_1_over_0")):
        assert bt.sigmoid(theta[i : i + 1] - theta[j]) == pytest.approx([v[key]], abs=1e-8)


def test_v16d_a_tie_is_half_a_win_each_way() -> None:
    v = VECTORS["V16d_bt_ties_half"]
    rows = [
        (i, j, outcome, count)
        for i in range(3)
        for j in range(3)
        for outcome, count in ((1.0, v["wins"][i][j]), (0.5, v["ties_sym"][i][j] if i < j else 0.0))
        if count
    ]
    counts = bt.count_wins(
        np.array([(i, j) for i, j, _, _ in rows]),
        np.array([outcome for _, _, outcome, _ in rows]),
        weights=np.array([count for _, _, _, count in rows]),
        prompts=np.zeros(len(rows), int),
        num_versions=3,
    )
    for (i, j), wins in zip(counts.directions, counts.totals, strict=True):
        assert wins == v["eff"][i][j]
    theta, _, _ = fit(v["eff"])
    assert theta == pytest.approx(v["theta"], abs=1e-8)
    assert bt.ELO_PER_LOGIT * theta == pytest.approx(v["elo"], abs=1e-6)


def test_v16e_a_clean_sweep_gets_half_a_win_each_way() -> None:
    v = VECTORS["V16e_bt_separable_with_half_pseudocount"]
    counts = counts_of(v["wins"])
    wins = counts.totals + bt.pseudo_wins(counts.totals, counts.directions, num_versions=2)
    for (i, j), found in zip(counts.directions, wins, strict=True):
        assert found == v["eff"][i][j]
    theta, errors, _ = fit(v["wins"])
    assert bt.ELO_PER_LOGIT * theta == pytest.approx(v["elo"], abs=1e-6)
    assert bt.ELO_PER_LOGIT * errors == pytest.approx(v["se_elo"], abs=1e-6)


tables = st.integers(2, 6).flatmap(
    lambda size: st.lists(st.lists(st.integers(1, 40), min_size=size, max_size=size), min_size=size, max_size=size)
)


@given(tables, st.data())
@settings(max_examples=40, deadline=None)
def test_a_general_optimiser_finds_the_same(table: Table, data: st.DataObject) -> None:
    anchor = data.draw(st.integers(0, len(table) - 1))
    theta, _, value = fit(table, anchor)
    found = minimize(
        slow_negative_log_likelihood,
        np.zeros(len(table) - 1),
        args=(table, anchor),
        method="BFGS",
        options={"gtol": 1e-9},
    )
    assert np.delete(theta, anchor) == pytest.approx(found.x, abs=1e-6)
    # The diagonal is nobody's win over himself: log 2 each in the slow loop.
    diagonal = sum(table[i][i] for i in range(len(table))) * math.log(2)
    assert value == pytest.approx(diagonal - found.fun, rel=1e-9)


@given(tables, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_i19_relabelling_moves_the_ratings_along(table: Table, random) -> None:
    order = random.sample(range(len(table)), len(table))
    theta, errors, _ = fit(table)
    turned, turned_errors, _ = fit([[table[i][j] for j in order] for i in order], anchor=order.index(0))
    assert turned == pytest.approx(theta[order], abs=1e-8)
    assert turned_errors == pytest.approx(errors[order], abs=1e-8)


@given(tables)
@settings(deadline=None)
def test_i19_another_anchor_adds_a_constant(table: Table) -> None:
    theta, _, _ = fit(table)
    other, _, _ = fit(table, anchor=1)
    assert other - other[0] == pytest.approx(theta, abs=1e-8)


@given(tables)
@settings(deadline=None)
def test_i19_doubling_the_counts_keeps_theta_and_shrinks_the_errors(table: Table) -> None:
    theta, errors, _ = fit(table)
    doubled, smaller, _ = fit([[2 * wins for wins in row] for row in table])
    assert doubled == pytest.approx(theta, abs=1e-8)
    assert smaller * math.sqrt(2) == pytest.approx(errors, abs=1e-8)


def has_maximum(table: Table) -> bool:
    """Look for a direction in which the likelihood never falls and somewhere rises (a linear program)."""
    size = len(table)
    wins = [(i, j) for i in range(size) for j in range(size) if i != j and table[i][j]]
    gains = np.zeros((len(wins), size))
    for row, (i, j) in enumerate(wins):
        gains[row, i], gains[row, j] = 1, -1
    best = linprog(-gains.sum(axis=0), A_ub=-gains, b_ub=np.zeros(len(wins)), bounds=[(-1, 1)] * size)
    return bool(-best.fun < 1e-9)


sparse_tables = st.integers(2, 5).flatmap(
    lambda size: st.lists(
        st.lists(st.sampled_from([0, 0, 0, 1, 5]), min_size=size, max_size=size), min_size=size, max_size=size
    )
)


@given(sparse_tables)
@settings(max_examples=200, deadline=None)
def test_pseudo_wins_come_exactly_where_there_is_no_maximum(table: list[list[float]]) -> None:
    for i in range(len(table)):
        table[i][i] = 0
    if not np.any(table):
        return
    counts = counts_of(table)
    if len(bt.connected_groups(counts.directions, len(table))) > 1:
        return
    added = bt.pseudo_wins(counts.totals, counts.directions, num_versions=len(table))
    assert bool(added.any()) == (not has_maximum(table))
    theta, _, _ = fit(table)
    assert np.isfinite(theta).all()


def test_pseudo_wins_leave_pairs_alone_that_do_not_need_them() -> None:
    # 0 and 1 beat each other; 2 won everything; 3 is connected through 2 alone and lost.
    table = [[0, 5, 0, 0], [5, 0, 0, 0], [3, 3, 0, 4], [0, 0, 0, 0]]
    counts = counts_of(table)
    added = bt.pseudo_wins(counts.totals, counts.directions, num_versions=4)
    given_to = {tuple(pair): extra for pair, extra in zip(counts.directions.tolist(), added.tolist(), strict=True)}
    assert given_to == {
        (0, 1): 0.0,
        (1, 0): 0.0,
        (0, 2): 0.5,
        (2, 0): 0.5,
        (1, 2): 0.5,
        (2, 1): 0.5,
        (2, 3): 0.5,
        (3, 2): 0.5,
    }


def test_a_cycle_of_clean_sweeps_has_a_maximum() -> None:
    table = [[0, 4, 0], [0, 0, 4], [4, 0, 0]]
    counts = counts_of(table)
    assert not bt.pseudo_wins(counts.totals, counts.directions, num_versions=3).any()
    assert fit(table)[0] == pytest.approx([0, 0, 0], abs=1e-9)


def test_lopsided_counts_converge() -> None:
    theta, _, _ = fit([[0, 1, 0], [1_000_000, 0, 1], [0, 1_000_000, 0]])
    assert theta == pytest.approx([0, math.log(1e6), 2 * math.log(1e6)], rel=1e-9)


def test_resamples_are_fitted_as_the_data_is() -> None:
    rows = bt.design(np.array([[0, 1], [1, 0]]), num_versions=2, anchor=0)
    found = bt.maximise(rows, np.array([[25.0, 75.0], [50.0, 50.0], [90.0, 10.0]]))
    assert found[:, 0] == pytest.approx([math.log(3), 0, -math.log(9)], abs=1e-9)


def test_the_sandwich_against_a_slow_loop() -> None:
    rng = np.random.default_rng(0)
    sides = np.array([rng.choice(4, 2, replace=False) for _ in range(120)])
    outcomes, prompts = rng.choice([0.0, 0.5, 1.0], 120), rng.integers(0, 30, 120)
    weights = rng.uniform(0.5, 2, 120)
    counts = bt.count_wins(sides, outcomes, weights=weights, prompts=prompts, num_versions=4)
    rows = bt.design(counts.directions, num_versions=4, anchor=2)
    beta = bt.maximise(rows, counts.totals[None])
    covariance = bt.sandwich(
        bt.information(rows, counts.totals[None], beta)[0],
        counts.wins @ bt.row_scores(rows, beta[0]),
        num_clusters=30,
    )
    theta = np.insert(beta[0], 2, 0.0)
    bread, meat = np.zeros((4, 4)), np.zeros((4, 4))
    for prompt in range(30):
        score = np.zeros(4)
        for (i, j), outcome, weight, at in zip(sides, outcomes, weights, prompts, strict=True):
            if at == prompt:
                p = 1 / (1 + math.exp(theta[j] - theta[i]))
                x = np.zeros(4)
                x[i], x[j] = 1, -1
                score += weight * (outcome - p) * x
                bread += weight * p * (1 - p) * np.outer(x, x)
        meat += np.outer(score, score)
    free = np.ix_([0, 1, 3], [0, 1, 3])
    inverse = np.linalg.inv(bread[free])
    assert covariance == pytest.approx(30 / 29 * inverse @ meat[free] @ inverse, rel=1e-8)


def test_reachability_follows_paths() -> None:
    edges = np.zeros((5, 5), bool)
    edges[0, 1] = edges[1, 2] = edges[2, 3] = True
    reached = bt.reachable(edges)
    assert reached[0].tolist() == [True, True, True, True, False]
    assert reached[3].tolist() == [False, False, False, True, False]


def test_a_share_of_independent_votes_has_wilsons_interval() -> None:
    won = np.array([1.0] * 60 + [0.0] * 40)
    share, (low, high) = bt.share_interval(won, np.ones(100), confidence=0.95)
    assert share == pytest.approx(0.6)
    # Wilson (1927) for 60 of 100 gives 0.502, 0.691; Student's t and n - 1 make it a little wider.
    assert (low, high) == pytest.approx((0.502, 0.691), abs=2e-3)


def test_repeated_votes_on_a_prompt_say_nothing_new() -> None:
    won = np.array([1.0] * 60 + [0.0] * 40)
    once = bt.share_interval(won, np.ones(100), confidence=0.95)
    thrice = bt.share_interval(3 * won, np.full(100, 3.0), confidence=0.95)
    assert thrice[1] == pytest.approx(once[1], abs=1e-12)


def test_a_clean_sweep_is_not_certain() -> None:
    share, (low, high) = bt.share_interval(np.ones(10), np.ones(10), confidence=0.95)
    assert share == high == 1.0
    # n / (n + t^2) with t = 2.2622 for 9 degrees of freedom.
    assert low == pytest.approx(10 / (10 + 2.262157**2), abs=1e-6)
