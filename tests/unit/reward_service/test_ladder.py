"""The ladder: what goes in comes out in order, with intervals that hold, and nothing is rated that has no scale."""

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from benchmarks.ladder import REALISTIC, Scenario, holds, simulate, study
from reward_service.ladder import (
    Comparison,
    DisconnectedError,
    Ladder,
    LadderError,
    drift,
    fit_ladder,
    lead,
    predicted_elo,
)


def battle(first: str, second: str, *, wins: int = 0, losses: int = 0, ties: int = 0) -> list[Comparison]:
    """Comparisons, each on a prompt of its own."""
    outcomes = [1.0] * wins + [0.0] * losses + [0.5] * ties
    return [
        Comparison(first=first, second=second, prompt_id=f"{first} {second} {place}", outcome=outcome)
        for place, outcome in enumerate(outcomes)
    ]


def fitted(comparisons: list[Comparison], anchor: str = "a", **arguments: Any) -> Ladder:
    return fit_ladder(comparisons, anchor=anchor, **{"bootstrap_resamples": 100, **arguments})


TWO = battle("b", "a", wins=75, losses=25)
THREE = [
    *battle("b", "a", wins=70, losses=30),
    *battle("c", "a", wins=80, losses=20),
    *battle("c", "b", wins=65, losses=35),
]
WITH_TIES = [
    *battle("b", "a", wins=68, losses=28, ties=4),
    *battle("c", "a", wins=78, losses=20, ties=2),
    *battle("c", "b", wins=63, losses=33, ties=4),
]
SWEEP = battle("b", "a", wins=10)
VOTES = simulate(replace(REALISTIC, prompts=40), np.random.default_rng(0))


def elo(ladder: Ladder) -> dict[str, float]:
    return {rating.version: rating.elo for rating in ladder.ratings}


def test_two_versions() -> None:
    ladder = fitted(TWO)
    assert elo(ladder) == pytest.approx({"b": 190.84850189, "a": 0.0})
    assert ladder.rating("b").se_elo == pytest.approx(40.11840577)
    assert ladder.rating("b").theta == pytest.approx(1.09861229)
    assert (ladder.num_comparisons, ladder.num_prompts, ladder.separable) == (100, 100, False)


def test_three_versions() -> None:
    ladder = fitted(THREE)
    assert [rating.version for rating in ladder.ratings] == ["c", "b", "a"]
    assert elo(ladder) == pytest.approx({"c": 246.51149638, "b": 142.92078562, "a": 0.0})
    assert [rating.se_elo for rating in ladder.ratings] == pytest.approx([33.62139478, 31.44780251, 0.0])
    assert ladder.log_likelihood == pytest.approx(-175.89210657)


def test_ties_are_half_wins() -> None:
    ladder = fitted(WITH_TIES)
    assert elo(ladder) == pytest.approx({"c": 240.05592355, "b": 139.57061228, "a": 0.0})
    top = ladder.ratings[0]
    assert (top.wins, top.ties, top.losses, top.num_comparisons) == (141, 6, 53, 200)
    pair = ladder.pairs[-1]
    assert (pair.version, pair.over, pair.wins, pair.ties, pair.losses) == ("b", "a", 68, 4, 28)
    assert pair.win_rate == pytest.approx(0.70)


def test_a_clean_sweep_gets_pseudo_wins_and_wide_intervals() -> None:
    ladder = fitted(SWEEP)
    top = ladder.rating("b")
    assert ladder.separable
    assert top.elo == pytest.approx(528.88771789)
    assert top.se_elo == pytest.approx(251.45541562)
    for low, high in (top.ci, top.ci_sandwich):
        assert low <= 528.88771789 - 1.95996 * 251.45541562 + 0.01
        assert high >= 528.88771789 + 1.95996 * 251.45541562 - 0.01


@pytest.mark.parametrize(("wins", "promoted"), [(1, False), (3, False), (5, False), (8, False), (12, True)])
def test_a_short_sweep_promotes_nobody(wins: int, promoted: bool) -> None:
    comparisons = battle("b", "a", wins=wins) if wins > 1 else [*SWEEP[:1], *battle("c", "a", wins=1, losses=1)]
    assert (lead(fitted(comparisons), "b", over="a").ci_low > 0) == promoted


def test_many_votes_on_few_prompts_promote_nobody() -> None:
    comparisons = [
        Comparison(first="b", second="a", prompt_id=str(prompt), outcome=1, labeler=str(labeler))
        for prompt in range(2)
        for labeler in range(20)
    ]
    assert lead(fitted(comparisons), "b", over="a").ci_low < 0


def test_versions_that_never_met_are_named() -> None:
    comparisons = [*battle("a", "b", wins=1, losses=1), *battle("d", "c", wins=2, losses=1), *battle("e", "d", wins=1)]
    with pytest.raises(DisconnectedError, match="a, b; c, d, e") as raised:
        fitted(comparisons)
    assert raised.value.components == (("a", "b"), ("c", "d", "e"))
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    ("comparisons", "anchor", "says"),
    [
        ([], "a", "no comparisons"),
        (TWO, "z", "the anchor z is in no comparison"),
        ([replace(c, prompt_id="one") for c in TWO], "a", "at least two"),
    ],
)
def test_no_ladder_without_enough_to_go_on(comparisons: list[Comparison], anchor: str, says: str) -> None:
    with pytest.raises(LadderError, match=says):
        fitted(comparisons, anchor=anchor)


@pytest.mark.parametrize("wrong", [{"confidence": 1.0}, {"bootstrap_resamples": 0}, {"pseudo_wins": 0.0}])
def test_senseless_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="confidence lies"):
        fitted(TWO, **wrong)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"second": "a"}, "compared with itself"),
        ({"outcome": 1.5}, "share from 0 to 1"),
        ({"outcome": math.nan}, "share from 0 to 1"),
        ({"weight": 0.0}, "positive"),
        ({"weight": math.inf}, "positive"),
        ({"length_difference": math.nan}, "finite"),
        ({"shown_first": "c"}, "not compared"),
    ],
)
def test_senseless_comparisons_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Comparison(**{"first": "a", "second": "b", "prompt_id": "p", "outcome": 1.0, **wrong})


def slow_loss(free: np.ndarray, comparisons: list[Comparison]) -> float:
    theta = {"v0": 0.0, **{f"v{place + 1}": value for place, value in enumerate(free)}}
    loss = 0.0
    for c in comparisons:
        gap = theta[c.first] - theta[c.second]
        loss += c.weight * (c.outcome * math.log1p(math.exp(-gap)) + (1 - c.outcome) * math.log1p(math.exp(gap)))
    return loss


def test_a_general_optimiser_on_the_raw_likelihood_finds_the_same() -> None:
    weighted = [replace(c, weight=1 + place % 3) for place, c in enumerate(VOTES)]
    ladder = fitted(weighted, anchor="v0")
    found = minimize(slow_loss, np.zeros(3), args=(weighted,), method="BFGS", options={"gtol": 1e-7})
    assert [ladder.rating(f"v{place}").theta for place in (1, 2, 3)] == pytest.approx(found.x, abs=1e-6)
    assert ladder.log_likelihood == pytest.approx(-found.fun, rel=1e-10)


@given(st.randoms(use_true_random=False))
@settings(max_examples=10, deadline=None)
def test_the_order_of_the_comparisons_does_not_matter(random) -> None:
    assert fitted(random.sample(VOTES, len(VOTES)), anchor="v0") == fitted(VOTES, anchor="v0")


def test_which_side_is_called_first_does_not_matter() -> None:
    plain = [replace(c, length_difference=float(place % 7)) for place, c in enumerate(VOTES)]
    turned = [
        replace(c, first=c.second, second=c.first, outcome=1 - c.outcome, length_difference=-(c.length_difference or 0))
        for c in plain
    ]
    one, other = fitted(plain, anchor="v0"), fitted(turned, anchor="v0")
    assert elo(one) == pytest.approx(elo(other), abs=1e-8)
    assert one.length_controlled is not None
    assert other.length_controlled is not None
    for left, right in zip(one.length_controlled.ratings, other.length_controlled.ratings, strict=True):
        assert left.elo == pytest.approx(right.elo, abs=1e-8)
        assert left.ci_sandwich == pytest.approx(right.ci_sandwich, abs=1e-8)


@given(st.permutations(["v0", "v1", "v2", "v3"]))
@settings(max_examples=10, deadline=None)
def test_i19_relabelling_renames_the_ladder(names: list[str]) -> None:
    renamed = [replace(c, first=names[int(c.first[1])], second=names[int(c.second[1])]) for c in VOTES]
    plain, other = fitted(VOTES, anchor="v0"), fitted(renamed, anchor=names[0])
    for place in range(4):
        before, after = plain.rating(f"v{place}"), other.rating(names[place])
        assert after.elo == pytest.approx(before.elo, abs=1e-7)
        assert after.ci == pytest.approx(before.ci, abs=1e-7)
        assert after.ci_sandwich == pytest.approx(before.ci_sandwich, abs=1e-7)


def test_i19_doubling_the_comparisons_keeps_the_ratings_and_shrinks_the_errors() -> None:
    one, two = fitted(THREE), fitted([*THREE, *(replace(c, prompt_id=c.prompt_id + "'") for c in THREE)])
    assert elo(two) == pytest.approx(elo(one))
    for rating in one.ratings:
        assert two.rating(rating.version).se_elo * math.sqrt(2) == pytest.approx(rating.se_elo)


def test_repeating_every_vote_on_its_prompt_tells_nothing_new() -> None:
    one, two = fitted(VOTES, anchor="v0"), fitted([*VOTES, *VOTES], anchor="v0")
    for rating in one.ratings:
        assert two.rating(rating.version).ci == pytest.approx(rating.ci, abs=1e-6)
        assert two.rating(rating.version).ci_sandwich == pytest.approx(rating.ci_sandwich, abs=1e-6)


def test_the_hash_is_of_the_votes_whatever_their_order() -> None:
    one = fitted(THREE).comparisons_sha256
    assert fitted(THREE[::-1]).comparisons_sha256 == one
    assert fitted([replace(THREE[0], labeler="another"), *THREE[1:]]).comparisons_sha256 != one


def test_the_lead_uses_the_covariance() -> None:
    ladder = fitted(VOTES, anchor="v0", bootstrap_resamples=500)
    other = fitted(VOTES, anchor="v1", bootstrap_resamples=500)
    # Seen from another anchor a lead over it is a rating: the interval must be the same.
    found, rating = lead(ladder, "v3", over="v1"), other.rating("v3")
    assert found.elo == pytest.approx(rating.elo, abs=1e-7)
    assert found.ci == pytest.approx(rating.ci, abs=1e-7)
    assert found.ci_sandwich == pytest.approx(rating.ci_sandwich, abs=1e-7)
    assert found.se_elo == pytest.approx(rating.se_elo, abs=1e-7)


def test_the_lead_seen_from_the_other_side() -> None:
    ladder = fitted(VOTES, anchor="v0")
    there, back = lead(ladder, "v3", over="v0"), lead(ladder, "v0", over="v3")
    assert (back.elo, back.ci_low, back.ci_high) == (-there.elo, -there.ci_high, -there.ci_low)
    assert there.ci == ladder.rating("v3").ci
    with pytest.raises(KeyError):
        lead(ladder, "v3", over="v9")


def test_versions_that_met_only_through_others_have_a_lead_and_no_win_rate() -> None:
    ladder = fitted([*battle("b", "a", wins=7, losses=3), *battle("c", "b", wins=6, losses=4)])
    pair = next(pair for pair in ladder.pairs if {pair.version, pair.over} == {"a", "c"})
    assert (pair.num_comparisons, pair.win_rate, pair.win_rate_ci) == (0, None, None)
    expected = 400 / math.log(10) * (math.log(7 / 3) + math.log(6 / 4))
    assert pair.lead.elo == pytest.approx(expected)


def test_position_bias_is_measured() -> None:
    rng = np.random.default_rng(1)
    comparisons = [
        Comparison(
            first="b",
            second="a",
            prompt_id=str(prompt),
            outcome=float(rng.random() < (0.7 if shown == "b" else 0.3)),
            shown_first=shown,
        )
        for prompt in range(600)
        for shown in [rng.choice(["a", "b"])]
    ]
    bias = fitted(comparisons).position_bias
    assert bias is not None
    assert bias.num_comparisons == 600
    assert bias.ci[0] < 0.7 < bias.ci[1]
    assert bias.ci[0] > 0.6
    assert fitted(TWO).position_bias is None


def length_lovers(*, effect: float, seed: int = 0) -> list[Comparison]:
    """b is no better than a, c is 0.8 better; b writes longer; the judge likes length."""
    rng = np.random.default_rng(seed)
    quality, length = {"a": 0.0, "b": 0.0, "c": 0.8}, {"a": 100.0, "b": 160.0, "c": 100.0}
    comparisons: list[Comparison] = []
    for prompt in range(1500):
        first, second = rng.choice(["a", "b", "c"], 2, replace=False)
        difference = length[first] - length[second] + rng.normal(0, 60)
        odds = quality[first] - quality[second] + effect * np.tanh(difference / 75)
        comparisons.append(
            Comparison(
                first=str(first),
                second=str(second),
                prompt_id=str(prompt),
                outcome=float(rng.random() < 1 / (1 + np.exp(-odds))),
                length_difference=float(difference),
            )
        )
    return comparisons


def test_length_control_sees_through_a_judge_that_likes_length() -> None:
    ladder = fitted(length_lovers(effect=1.5))
    assert ladder.rating("b").ci_sandwich[0] > 80, "the plain ladder is fooled"
    control = ladder.length_controlled
    assert control is not None
    rating = {rating.version: rating for rating in control.ratings}
    low, high = rating["b"].ci_sandwich
    assert low < 0 < high
    low, high = rating["c"].ci_sandwich
    assert low < 0.8 * 173.7178 < high
    assert control.length_elo_ci[0] > 0
    assert control.length_elo == pytest.approx(1.5 * math.tanh(1) * 173.7178, rel=0.2)
    assert rating["a"].ci_sandwich == (0.0, 0.0)


def test_length_control_changes_little_where_nobody_minds_length() -> None:
    ladder = fitted(length_lovers(effect=0.0))
    control = ladder.length_controlled
    assert control is not None
    assert control.length_elo_ci[0] < 0 < control.length_elo_ci[1]
    for rating in control.ratings:
        assert rating.elo == pytest.approx(ladder.rating(rating.version).elo, abs=25)


def test_length_control_against_a_slow_loop() -> None:
    comparisons = length_lovers(effect=1.0, seed=3)[:200]
    control = fitted(comparisons).length_controlled
    assert control is not None
    typical = math.sqrt(sum((c.length_difference or 0) ** 2 for c in comparisons) / len(comparisons))

    def loss(parameters: np.ndarray) -> float:
        b, c, phi = parameters
        theta, total = {"a": 0.0, "b": b, "c": c}, 0.0
        for comparison in comparisons:
            gap = theta[comparison.first] - theta[comparison.second]
            gap += phi * math.tanh((comparison.length_difference or 0) / typical)
            total += math.log1p(math.exp(-gap if comparison.outcome == 1 else gap))
        # The pseudo-comparison: half a win each way for a response of equal quality that is much longer.
        return total + 0.5 * math.log1p(math.exp(-phi)) + 0.5 * math.log1p(math.exp(phi))

    b, c, phi = minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-7}).x
    found = {rating.version: rating.elo / 173.71779276 for rating in control.ratings}
    assert [found["b"], found["c"]] == pytest.approx([b, c], abs=1e-6)
    assert control.length_elo / 173.71779276 == pytest.approx(phi * math.tanh(1), abs=1e-6)
    assert control.typical_difference == pytest.approx(typical)


def test_a_judge_whom_length_decides_alone_has_finite_ratings() -> None:
    comparisons = [replace(c, outcome=float((c.length_difference or 0) > 0)) for c in length_lovers(effect=0.0)[:200]]
    control = fitted(comparisons).length_controlled
    assert control is not None
    assert all(math.isfinite(rating.elo) for rating in control.ratings)
    assert control.length_elo > 200


@pytest.mark.parametrize("kind", ["missing", "zero", "of the version"])
def test_no_length_control_without_lengths_that_vary(kind: str) -> None:
    length = {"a": 10.0, "b": 30.0, "c": 90.0}
    comparisons = [
        replace(
            c,
            length_difference={
                "missing": None if place == 0 else float(place),
                "zero": 0.0,
                "of the version": length[c.first] - length[c.second],
            }[kind],
        )
        for place, c in enumerate(THREE)
    ]
    assert fitted(comparisons).length_controlled is None


def test_a_gap_of_one_is_174_elo() -> None:
    assert predicted_elo([1.0]) == predicted_elo([1.0, 1.0]) == pytest.approx(173.71779276)
    assert predicted_elo([40.0, 40.0]) == pytest.approx(40 * 173.71779276)


def test_gaps_that_differ_promise_the_elo_of_how_often_they_win() -> None:
    gaps = [3.0, -1.0, 0.0, 6.0]
    share = sum(1 / (1 + math.exp(-gap)) for gap in gaps) / 4
    assert predicted_elo(gaps) == pytest.approx(400 * math.log10(share / (1 - share)))
    assert predicted_elo(gaps) < 173.7 * sum(gaps) / 4
    assert predicted_elo([-gap for gap in gaps]) == pytest.approx(-predicted_elo(gaps))


def test_a_perfect_reward_model_raises_no_alarm_where_gaps_differ() -> None:
    rng = np.random.default_rng(0)
    gaps = rng.normal(1.5, 3.0, size=2000)
    wins = rng.random(2000) < 1 / (1 + np.exp(-gaps))
    measured = fitted(
        [Comparison(first="b", second="a", prompt_id=f"p{i}", outcome=float(w)) for i, w in enumerate(wins)]
    )
    scores = {"a": {f"p{i}": 0.0 for i in range(2000)}, "b": {f"p{i}": float(gap) for i, gap in enumerate(gaps)}}
    found = drift(measured, scores, version="b", over="a")
    assert not found.alarm
    assert abs(found.predicted_elo - found.measured_elo) < 25


def test_drift_raises_the_alarm_only_above_the_interval() -> None:
    ladder = fitted(TWO)
    modest = drift(ladder, {"a": {"p": 0.5}, "b": {"p": 0.5 + math.log(3)}}, version="b", over="a")
    assert modest.predicted_elo == pytest.approx(modest.measured_elo) == pytest.approx(190.84850189)
    assert not modest.alarm
    boastful = drift(ladder, {"a": {"p": 0.0}, "b": {"p": 3.0}}, version="b", over="a")
    assert boastful.predicted_elo > boastful.ci[1]
    assert boastful.alarm
    assert not drift(ladder, {"a": {"p": 0.0}, "b": {"p": -1.0}}, version="b", over="a").alarm


def test_judges_are_kept_apart_in_the_record() -> None:
    votes = [replace(c, judge="judge" if place < 10 else "person") for place, c in enumerate(TWO)]
    assert fitted(votes).judges == {"judge": 10, "person": 90}


@pytest.mark.parametrize("comparisons", [TWO, SWEEP, length_lovers(effect=1.0)[:100]])
def test_json_and_back(comparisons: list[Comparison]) -> None:
    ladder = fitted([replace(c, shown_first=c.first) for c in comparisons])
    written = json.dumps({"best": "b", **ladder.to_json()}, allow_nan=False)
    assert Ladder.from_json(json.loads(written)) == ladder


def test_intervals_cover_in_a_few_tournaments() -> None:
    result = study(REALISTIC, tournaments=100, resamples=300)
    # A hundred tournaments leave 0.02 of noise; the thousand are below, and in benchmarks.ladder.
    assert result["coverage"]["bootstrap"] > 0.90
    assert result["coverage"]["sandwich"] > 0.90
    assert result["coverage"]["independent_comparisons"] < result["coverage"]["sandwich"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("scenario", [REALISTIC, Scenario(name="close", elo=(0.0, 10.0, 20.0, 20.0))])
def test_intervals_cover_in_a_thousand_tournaments(scenario: Scenario) -> None:
    assert holds(study(scenario, tournaments=1000, resamples=500))
