"""Simulated people and reward models as labelers: probabilities, ties, biases, and scores that fail."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.labels import RewardModelLabelerConfig, SimulatedLabelerConfig
from protocol.errors import UserError
from reward_service.preferences.labeling_protocol import grouped_by_score
from reward_service.preferences.labeling_report import summarise_labels
from reward_service.preferences.records import Label, Task
from reward_service.preferences.scored import RewardModelLabeler
from reward_service.preferences.simulated import SimulatedLabeler
from reward_service.scoring import RewardError
from tests.label_tasks import gold, score_texts, task

MANY = 4000


def label(tasks: list[Task], *, seed: int = 0, **settings: float) -> list[Label]:
    config = SimulatedLabelerConfig(score="tests.label_tasks:gold", **settings)
    return SimulatedLabeler(config, run_seed=seed).label(tasks, now=lambda: 1.0)


def many(*texts: str) -> list[Task]:
    return [task(f"t{number}", *texts) for number in range(MANY)]


def share(labels: list[Label], winner: str) -> float:
    return sum(one.outcome.winner == winner for one in labels) / len(labels)


def assert_share(measured: float, expected: float, *, of: int) -> None:
    """Allow four standard errors: one false alarm in 16,000 seeds, and the seed is fixed."""
    assert abs(measured - expected) < 4 * math.sqrt(expected * (1 - expected) / of)


# 1 / (1 + exp(-sharpness * difference)), worked out by hand.
@pytest.mark.parametrize(
    ("better", "sharpness", "expected"),
    [("x 1", 1.0, 0.7310586), ("x 0.5", 4.0, 0.8807971), ("x -1", 2.0, 0.1192029), ("x 0", 3.0, 0.5)],
)
def test_it_prefers_by_bradley_terry(better: str, sharpness: float, expected: float) -> None:
    labels = label(many(better, "y 0"), sharpness=sharpness)
    assert_share(share(labels, "c0"), expected, of=MANY)


def test_position_bias_is_log_odds_for_what_is_shown_first() -> None:
    labels = label(many("x 0.5", "y 0"), sharpness=1.0, position_bias=1.0)
    first = [one for one in labels if one.presented == ("c0", "c1")]
    second = [one for one in labels if one.presented == ("c1", "c0")]
    assert_share(len(first) / MANY, 0.5, of=MANY)
    assert_share(share(first, "c0"), 0.8175745, of=len(first))  # sigmoid(0.5 + 1)
    assert_share(share(second, "c0"), 0.3775407, of=len(second))  # sigmoid(0.5 - 1)


def test_the_report_shows_the_position_bias() -> None:
    labels = label(many("x 0", "y 0"), position_bias=2.0)
    report = summarise_labels(labels)
    assert report.position_bias is not None
    assert_share((report.position_bias + 1) / 2, 0.8807971, of=MANY)  # sigmoid(2)
    assert report.flip_rate is None


def test_noise_is_the_share_of_coin_flips() -> None:
    labels = label(many("x 9", "y 0"), sharpness=100.0, noise=0.3, position_bias=3.0)
    assert_share(share(labels, "c0"), 0.85, of=MANY)
    assert_share(share(label(many("x 9", "y 0"), noise=1.0, tie_below=100.0), "c0"), 0.5, of=MANY)


def test_ties_are_where_gold_differs_by_less() -> None:
    assert {one.outcome.verdict for one in label(many("x 1", "y 0.8"), tie_below=0.25)} == {"tie"}
    assert {one.outcome.verdict for one in label(many("x 1", "y 0.75"), tie_below=0.25)} == {"preference"}
    assert {one.outcome.verdict for one in label(many("x 1", "y 1"))} == {"preference"}


def test_rankings_are_plackett_luce() -> None:
    labels = label(many("x 1", "y 0", "z -0.5"), sharpness=1.0)
    seen = Counter(tuple(group[0] for group in one.outcome.ranking) for one in labels)
    worth = {"c0": math.exp(1.0), "c1": 1.0, "c2": math.exp(-0.5)}
    for order in permutations(worth):
        expected, left = 1.0, sum(worth.values())
        for name in order:
            expected *= worth[name] / left
            left -= worth[name]
        assert_share(seen[order] / MANY, expected, of=MANY)


def test_a_ranking_ties_what_is_close_to_the_head_of_its_group() -> None:
    scores = {"a": 3.0, "b": 2.5, "c": 2.1, "d": 1.0}
    assert grouped_by_score("abcd", scores=scores, tie_below=0.6) == [["a", "b"], ["c"], ["d"]]
    assert grouped_by_score("abcd", scores=scores, tie_below=0.0) == [["a"], ["b"], ["c"], ["d"]]
    assert grouped_by_score("abcd", scores=scores, tie_below=9.0) == [["a", "b", "c", "d"]]


@given(
    worth=st.lists(st.integers(-3, 3), min_size=2, max_size=9),
    turn=st.randoms(use_true_random=False),
    noise=st.sampled_from([0.0, 0.5]),
    tie_below=st.sampled_from([0.0, 1.5]),
)
@settings(max_examples=60, deadline=None)
def test_the_order_of_the_candidates_changes_nothing(worth, turn, noise, tie_below) -> None:
    original = task("t", *(f"x {value}" for value in worth))
    candidates = list(original.candidates)
    turn.shuffle(candidates)
    mirrored = Task(
        task_id="t",
        round=1,
        kind=original.kind,
        purpose="training",
        prompt_id=original.prompt_id,
        prompt=original.prompt,
        candidates=tuple(candidates),
    )
    (one,) = label([original], noise=noise, tie_below=tie_below, position_bias=1.0)
    (other,) = label([mirrored], noise=noise, tie_below=tie_below, position_bias=1.0)
    assert one == other
    one.check_against(original)


def test_swapping_what_two_candidates_say_mirrors_the_probability() -> None:
    one = share(label(many("x 0.7", "y 0"), position_bias=0.5), "c0")
    other = share(label(many("y 0", "x 0.7"), position_bias=0.5), "c1")
    # 1/2 (sigmoid(0.7 + 0.5) + sigmoid(0.7 - 0.5)), by hand
    assert_share(one, 0.6591789, of=MANY)
    assert_share(other, 0.6591789, of=MANY)


def test_another_seed_is_another_person() -> None:
    one, other = (label(many("x 0", "y 0"), seed=seed) for seed in (0, 1))
    agreement = np.mean([a.outcome == b.outcome for a, b in zip(one, other, strict=True)])
    assert_share(float(agreement), 0.5, of=MANY)
    assert {a.label_id for a in one}.isdisjoint(b.label_id for b in other)


def test_the_gold_function_sees_what_reward_functions_see() -> None:
    seen: dict[str, list] = {}

    def watching(**batch: list) -> list[float]:
        seen.update(batch)
        return gold(**batch)

    config = SimulatedLabelerConfig(score="any:thing")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "?"}, {"role": "user", "content": "Go"}]
    SimulatedLabeler(config, run_seed=0, score=watching).label([task("t", "a 1", "b 2", prompt=talk)], now=lambda: 0.0)
    assert seen == {
        "prompts": ["Go", "Go"],
        "responses": ["a 1", "b 2"],
        "finish_reasons": ["stop", "stop"],
        "metadata": [{"topic": "t"}, {"topic": "t"}],
    }


def broken(**batch: list) -> list[float]:
    raise ZeroDivisionError("no luck")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (broken, "ZeroDivisionError: no luck"),
        (lambda **batch: [1.0], "shape"),
        (lambda **batch: [0.0, math.nan], "nan"),
        (lambda **batch: None, "NoneType"),
    ],
)
def test_a_gold_score_that_fails_is_a_failure(function, words: str) -> None:
    labeler = SimulatedLabeler(SimulatedLabelerConfig(score="any:thing"), run_seed=0, score=function)
    with pytest.raises(RewardError, match=words) as caught:
        labeler.label([task("t", "a 1", "b 2")], now=lambda: 0.0)
    assert labeler.labeler_id in str(caught.value)
    assert "p-t" in str(caught.value)


def test_a_wrong_path_is_found_at_the_start() -> None:
    with pytest.raises(UserError, match="no_such_module_here"):
        SimulatedLabeler(SimulatedLabelerConfig(score="no_such_module_here:f"), run_seed=0)


def model(*, tie_below: float = 0.0, ask=score_texts) -> RewardModelLabeler:
    return RewardModelLabeler(RewardModelLabelerConfig(path="m", tie_below=tie_below), score_texts=ask)


@pytest.mark.parametrize(
    ("texts", "tie_below", "winner"),
    [
        (("a 1", "b 1"), 0.0, None),
        (("a 1", "b 1.0001"), 0.0, "c1"),
        (("a 1", "b 1.5"), 0.5, "c1"),
        (("a 1", "b 1.25"), 0.5, None),
    ],
)
def test_a_reward_model_has_no_doubts(texts: tuple[str, str], tie_below: float, winner: str | None) -> None:
    (found,) = model(tie_below=tie_below).label([task("t", *texts)], now=lambda: 0.0)
    assert found.outcome.winner == winner
    assert found.outcome.verdict == ("tie" if winner is None else "preference")
    assert summarise_labels([found]).position_bias is None


def test_a_reward_model_sees_whole_conversations() -> None:
    seen = []
    talk = [{"role": "user", "content": "Hi"}]
    labeler = model(ask=lambda prompts, responses: seen.append((prompts, responses)) or [1.0, 2.0])
    labeler.label([task("t", "a 1", "b 2", prompt=talk)], now=lambda: 0.0)
    assert seen == [([talk, talk], ["a 1", "b 2"])]


def test_a_reward_model_that_fails_labels_nothing() -> None:
    with pytest.raises(RewardError, match="inf"):
        model(ask=lambda prompts, responses: np.array([1.0, np.inf])).label([task("t", "a", "b")], now=lambda: 0.0)
