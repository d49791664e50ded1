"""Scores: calibration, combination, truncation rule, clip and scale, in the normative order."""

import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from pydantic import ValidationError

from configs.scoring import (
    FunctionRewardConfig,
    LengthConfig,
    SafetyFirstCombination,
    ScoringConfig,
    TruncationConfig,
)
from protocol.messages import FinishReason, PolicyVersions, Prompt, Rollout, RolloutKey
from reward_service import scoring
from reward_service.scoring import Calibration, RewardError
from tests.reference_vectors import VECTORS

KEYS = tuple(RolloutKey(0, 3, f"p{i}", 0) for i in range(3))


def config(**changes: object) -> ScoringConfig:
    rewards = [
        FunctionRewardConfig(name="helpful", path="a.b:c", weight=2.0),
        FunctionRewardConfig(name="harmless", path="a.b:d", weight=-0.5),
    ]
    return ScoringConfig(rewards=rewards, **changes)


def array(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def rollouts(
    *finish_reasons: FinishReason, tokens: Sequence[int] = (), metadata: Sequence[dict[str, str]] = ()
) -> list[Rollout]:
    lengths, columns = tokens or [3] * len(finish_reasons), metadata or [{}] * len(finish_reasons)
    return [
        Rollout(
            key=RolloutKey(0, 3, f"p{number}", 0),
            prompt=Prompt(
                prompt_id=f"p{number}", text="say", token_ids=np.array([5], np.int32), metadata=columns[number]
            ),
            response_ids=np.full(lengths[number], 7, np.int32),
            behavior_logprobs=np.zeros(lengths[number], np.float32),
            finish_reason=reason,
            policy_versions=PolicyVersions(1, 1),
            worker="rollout-0",
        )
        for number, reason in enumerate(finish_reasons)
    ]


def test_calibration_gives_mean_zero_and_unit_deviation() -> None:
    raw = np.array([3.0, 5.0, 7.0, 9.0])
    found = scoring.calibrate(raw)
    assert found.gain == pytest.approx(1 / np.sqrt(5.0))
    assert found.bias == pytest.approx(-6 / np.sqrt(5.0))
    done = found.apply(raw)
    assert done.dtype == np.float32
    assert done.mean() == pytest.approx(0, abs=1e-6)
    assert done.std() == pytest.approx(1, abs=1e-6)
    assert np.argsort(done).tolist() == np.argsort(raw).tolist()


@pytest.mark.parametrize("raw", [[1.0], [2.0, 2.0, 2.0], [1.0, float("nan")], [[1.0, 2.0]]])
def test_calibration_refuses_scores_without_spread(raw: list) -> None:
    with pytest.raises(ValueError, match="calibration needs"):
        scoring.calibrate(np.array(raw))


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("subtract", "subtract_1"), ("replace", "replace_minus1"), ("none", None)],
)
def test_truncation_rules_match_the_vectors(rule: str, expected: str | None) -> None:
    vector = VECTORS["V19_eos"]
    reasons = ["stop" if ended else "length" for ended in vector["has_eos"]]
    charged = scoring.apply_truncation(
        array(*vector["score"]), finish_reasons=reasons, truncation=TruncationConfig(rule=rule, penalty=1.0)
    )
    wanted = vector["score"] if expected is None else vector[expected]
    np.testing.assert_allclose(charged, wanted, atol=1e-6)


def test_v19_a_factor_would_reward_the_truncation_of_a_negative_score() -> None:
    vector = VECTORS["V19_eos"]
    raw, ended = array(*vector["score"]), np.array(vector["has_eos"], bool)
    scaled = np.where(ended, raw, 0.5 * raw)
    np.testing.assert_allclose(scaled, vector["scale_0p5"], atol=1e-6)
    assert scaled[2] > raw[2]
    with pytest.raises(ValidationError, match="rule"):
        TruncationConfig(rule="scale", penalty=0.5)
    for rule in ("subtract", "replace"):
        charged = scoring.apply_truncation(
            raw,
            finish_reasons=["stop" if end else "length" for end in ended],
            truncation=TruncationConfig(rule=rule, penalty=1.0),
        )
        assert (charged[~ended] < raw[~ended]).all()
        assert not np.allclose(charged, vector["scale_0p5"])


def test_clip_comes_before_scale_and_is_counted() -> None:
    done, fraction = scoring.clip_and_scale(array(-4, -3, 0.5, 9), clip=3.0, scale=0.5)
    assert done.tolist() == [-1.5, -1.5, 0.25, 1.5]
    assert fraction == 0.5
    done, fraction = scoring.clip_and_scale(array(-4, 9), clip=None, scale=2.0)
    assert done.tolist() == [-8.0, 18.0]
    assert fraction == 0.0


def test_v19_the_overlong_ramp() -> None:
    vector = VECTORS["V19_eos"]["overlong"]
    charged = scoring.apply_length(
        array(0, 0, 0, 2),
        response_tokens=vector["len"],
        length=LengthConfig(buffer_tokens=vector["buffer"], penalty=vector["factor"]),
        max_response_tokens=vector["max_new"],
    )
    np.testing.assert_allclose(charged, np.add(vector["penalty"], [0, 0, 0, 2]), atol=1e-6)


def test_total_follows_the_normative_order() -> None:
    # 2*2 - .5*2 = 3; truncated: 3 - 5 = -2, clipped to -1, scaled by 10. Clipping first would give -40.
    total, fraction = scoring.total_scores(
        {"helpful": array(2, 2, 0.25), "harmless": array(2, 2, 0)},
        rollouts=rollouts("length", "stop", "stop"),
        config=config(truncation=TruncationConfig(rule="subtract", penalty=5.0), clip=1.0, scale=10.0),
        max_response_tokens=8,
    )
    assert total.tolist() == [-10.0, 10.0, 5.0]
    assert fraction == pytest.approx(2 / 3)


def test_a_truncated_response_pays_for_its_length_and_for_the_missing_end() -> None:
    charges = {"length": LengthConfig(buffer_tokens=4, penalty=2.0)}
    for rule, expected in (("subtract", [-5.0, -1.0]), ("replace", [-3.0, -1.0])):
        total, _ = scoring.total_scores(
            {"helpful": array(0, 0), "harmless": array(0, 0)},
            rollouts=rollouts("length", "stop", tokens=(8, 6)),
            config=config(truncation=TruncationConfig(rule=rule, penalty=3.0), **charges),
            max_response_tokens=8,
        )
        assert total.tolist() == expected


def test_the_safety_tag_comes_from_the_prompt() -> None:
    rewards = [FunctionRewardConfig(name=n, path="a.b:c", normalization="reference") for n in ("helpful", "harmless")]
    gate = SafetyFirstCombination(helpfulness="helpful", safety="harmless", tag="risky")
    settings = ScoringConfig(rewards=rewards, combine=gate, truncation=TruncationConfig(rule="none"))
    scores = {"helpful": array(3, 3, 3, 3), "harmless": array(-1, -1, -1, -2)}

    def total(*tags: dict[str, str]) -> list[float]:
        given = rollouts(*["stop"] * 4, metadata=tags)
        return scoring.total_scores(scores, rollouts=given, config=settings, max_response_tokens=8)[0].tolist()

    # sigma(-2) = .12 is below .15 whatever the tag says; sigma(-1) = .27 is not.
    assert total({}, {"risky": "true"}, {"risky": "False"}, {"topic": "true"}) == [3.0, -1.0, 3.0, -2.0]
    with pytest.raises(RewardError, match=r"p2#0: the prompt's column risky says 'maybe'"):
        total({}, {}, {"risky": "maybe"}, {})


def test_a_failed_component_names_itself_and_the_response() -> None:
    with pytest.raises(RewardError) as caught:
        scoring.require_scores([0.5, float("nan"), 1.0], component="helpful", keys=KEYS)
    assert caught.value.component == "helpful"
    assert caught.value.key == KEYS[1]
    assert "helpful" in str(caught.value)
    assert "r0/i3/p1#0" in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [[1.0, 2.0], [1.0, None, 2.0], "abc", None, [[1.0], [2.0], [3.0]], [1e300, 0.0, 0.0], [[1.0], [2.0, 3.0], 4.0]],
)
def test_anything_but_one_finite_number_a_response_is_a_failure(raw: object) -> None:
    with pytest.raises(RewardError):
        scoring.require_scores(raw, component="helpful", keys=KEYS)


def test_integers_and_arrays_are_numbers() -> None:
    assert scoring.require_scores([1, 2, 3], component="c", keys=KEYS).tolist() == [1.0, 2.0, 3.0]
    assert scoring.require_scores(array(1, 2, 3), component="c", keys=KEYS).dtype == np.float32


def test_the_error_survives_pickling() -> None:
    error = RewardError("it returned nan", component="helpful", key=KEYS[0]).saved_at("/tmp/x.json")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.component, again.key, again.incident) == ("helpful", KEYS[0], "/tmp/x.json")


def test_identity_changes_nothing() -> None:
    assert Calibration(gain=1.0, bias=0.0) == scoring.IDENTITY
    assert scoring.IDENTITY.apply(array(1, -2)).tolist() == [1.0, -2.0]
