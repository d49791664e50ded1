"""Several rewards as one: the published numbers, slow loops, and what no rule may depend on."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.load import ConfigError
from configs.scoring import (
    CombineConfig,
    LinearCombination,
    MeanMinusStdCombination,
    MinimumCombination,
    SafetyFirstCombination,
)
from reward_service.combination import combine, linear, mean_minus_std, minimum, safety_first
from tests.reference_vectors import VECTORS
from tests.tiny_run import tiny_config

VECTOR = VECTORS["V13_llama2"]
GATE = SafetyFirstCombination(helpfulness="a", safety="b")
RULES = [LinearCombination(), MinimumCombination(), MeanMinusStdCombination(num_stds=0.7), GATE]
ROWS = st.lists(st.tuples(st.floats(-4, 4), st.floats(-4, 4), st.booleans()), min_size=1, max_size=6)
EXAMPLES = settings(deadline=None, derandomize=True)


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def logits(probabilities: list[float]) -> np.ndarray:
    return np.array([math.log(p / (1 - p)) for p in probabilities])


def by_rule(rows: list[tuple[float, float, bool]], rule: CombineConfig) -> np.ndarray:
    return combine(
        {"b": array(*(row[1] for row in rows)), "a": array(*(row[0] for row in rows))},
        weights={"a": 1.0, "b": 1.0},
        config=rule,
        about_safety=[row[2] for row in rows],
    )


def slow(row: tuple[float, float, bool], rule: CombineConfig) -> float:
    a, b, tagged = float(np.float32(row[0])), float(np.float32(row[1])), row[2]
    if rule.kind == "linear":
        return a + b
    if rule.kind == "minimum":
        return a if a < b else b
    if rule.kind == "mean_minus_std":
        return (a + b) / 2 - 0.7 * abs(a - b) / 2
    return b if tagged or 1 / (1 + math.exp(-b)) < 0.15 else a


def test_v13_the_rule_of_llama_2() -> None:
    found = safety_first(logits(VECTOR["R_h"]), logits(VECTOR["R_s"]), about_safety=VECTOR["is_safety"], threshold=0.15)
    np.testing.assert_allclose(found, VECTOR["logit"], atol=1e-8)
    np.testing.assert_allclose(1 / (1 + np.exp(-found)), VECTOR["R_c"], atol=1e-8)
    # Whitening over the batch, as the paper does, moves and stretches all of them alike.
    np.testing.assert_allclose((found - found.mean()) / found.std(), VECTOR["whitened_biased"], atol=1e-7)


def test_v13_linear_on_logits() -> None:
    scores = {"h": logits(VECTOR["R_h"]), "s": logits(VECTOR["R_s"])}
    found = linear(scores, weights={"h": 0.5, "s": 0.5})
    np.testing.assert_allclose(found, VECTOR["linear_on_logits_half"], atol=1e-8)
    # On probabilities the sum saturates: another number, and one that is no sum of log-odds.
    on_probabilities = linear(
        {"h": np.array(VECTOR["R_h"]), "s": np.array(VECTOR["R_s"])}, weights={"h": 0.5, "s": 0.5}
    )
    np.testing.assert_allclose(on_probabilities, VECTOR["linear_half"], atol=1e-8)
    assert np.abs(1 / (1 + np.exp(-found)) - VECTOR["linear_half"]).max() > 0.05


def test_the_weighted_sum() -> None:
    combined = combine(
        {"harmless": array(2, 4), "helpful": array(1, -1)},
        weights={"helpful": 2.0, "harmless": -0.5},
        config=LinearCombination(),
        about_safety=[],
    )
    assert combined.dtype == np.float32
    assert combined.tolist() == [1.0, -4.0]
    with pytest.raises(ValueError, match="do not fit"):
        combine(
            {"helpful": array(1)},
            weights={"helpful": 1.0, "harmless": 1.0},
            config=LinearCombination(),
            about_safety=[],
        )


def test_an_ensemble_is_charged_for_disagreeing() -> None:
    scores = {"a": array(1, 1), "b": array(1, 4), "c": array(1, 7)}
    assert mean_minus_std(scores, num_stds=0.5).tolist() == pytest.approx([1.0, 4 - 0.5 * math.sqrt(6)])
    assert mean_minus_std(scores, num_stds=0).tolist() == [1.0, 4.0]
    assert minimum(scores).tolist() == [1.0, 1.0]


@EXAMPLES
@given(rows=ROWS, rule=st.sampled_from(RULES))
def test_every_rule_equals_a_slow_loop(rows: list[tuple[float, float, bool]], rule: CombineConfig) -> None:
    np.testing.assert_allclose(by_rule(rows, rule), [slow(row, rule) for row in rows], rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(rows=ROWS, rule=st.sampled_from(RULES), data=st.data())
def test_a_score_depends_neither_on_batch_mates_nor_on_their_order(
    rows: list[tuple[float, float, bool]], rule: CombineConfig, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(rows))))
    cut = data.draw(st.integers(0, len(rows)))
    whole = by_rule(rows, rule)
    assert np.array_equal(by_rule([rows[i] for i in order], rule), whole[list(order)])
    assert np.array_equal(np.concatenate([by_rule(rows[:cut], rule), by_rule(rows[cut:], rule)]), whole)


@EXAMPLES
@given(rows=ROWS, rise=st.floats(0, 5))
def test_i16_helpfulness_buys_nothing_where_safety_is_at_stake(
    rows: list[tuple[float, float, bool]], rise: float
) -> None:
    before = by_rule(rows, GATE)
    after = by_rule([(a + rise, b, tagged) for a, b, tagged in rows], GATE)
    for (_, b, tagged), old, new in zip(rows, before, after, strict=True):
        if tagged or 1 / (1 + math.exp(-b)) < 0.149:
            assert new == old


REWARDS = "scoring.rewards=[{kind: model, name: a, path: one}, {kind: model, name: b, path: two}]"
FUNCTION = "{kind: function, name: c, path: 'm:f'%s}"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["scoring.combine.kind=minimum"], "needs two rewards or more, and there is 1"),
        ([REWARDS.replace("path: one", "path: one, weight: 2.0"), "scoring.combine.kind=minimum"], "weight of a to 1"),
        (
            [REWARDS.replace("]", f", {FUNCTION % ''}]"), "scoring.combine.kind=mean_minus_std"],
            "set normalization of c to reference",
        ),
        (
            ["scoring.rewards=[{kind: model, name: a}, {kind: model, name: b}]", "scoring.combine.kind=minimum"],
            "the run's one trained reward model",
        ),
        ([REWARDS, "scoring.combine={kind: safety_first, helpfulness: a, safety: c}"], "names a, b"),
        ([REWARDS, "scoring.combine={kind: safety_first, helpfulness: a, safety: a}"], "a and a"),
        (["scoring.length.buffer_tokens=24"], "leaves no response free of charge"),
    ],
)
def test_what_cannot_be_combined_is_refused(overrides: list[str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        tiny_config(tmp_path, *overrides)


def test_what_can_be_combined_is_not_refused(tmp_path: Path) -> None:
    gate = "scoring.combine={kind: safety_first, helpfulness: b, safety: a, threshold: 0.3}"
    assert tiny_config(tmp_path, REWARDS, gate).scoring.combine.kind == "safety_first"
    with_function = REWARDS.replace("]", f", {FUNCTION % ', normalization: reference'}]")
    assert tiny_config(tmp_path, with_function, "scoring.combine.kind=minimum").scoring.combine.kind == "minimum"
    assert tiny_config(tmp_path, "scoring.length.buffer_tokens=8").scoring.length is not None
