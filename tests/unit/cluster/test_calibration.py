"""The zero and the unit of the rewards: the published constants, and demonstrations as the anchor."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from cluster import calibration, samples
from configs.load import ConfigError
from configs.run import RunConfig
from protocol.errors import UserError
from protocol.messages import NOT_SAMPLED, Prompt
from protocol.tokens import decode, encode_prompt
from tests.reference_vectors import VECTORS
from tests.tiny import END_ID, tiny_tokenizer
from tests.tiny_run import tiny_config

VECTOR = VECTORS["V12_rm_bias"]
ROWS = [
    {"prompt": "what is a fox?", "completion": "a quick animal"},
    {"prompt": "and a dog?", "completion": "lazy " * 200},
    {"messages": [{"role": "user", "content": "a sky?"}, {"role": "assistant", "content": "blue"}]},
    {"prompt": "a sea?", "completion": "green"},
]


def config_with(tmp_path: Path, rows: list[dict], *overrides: str) -> RunConfig:
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = f"data.demonstrations={{source: {path}}}"
    return tiny_config(tmp_path, source, "scoring.calibration_anchor=demonstrations", *overrides)


def test_v12_the_demonstrations_get_mean_zero_and_unit_deviation(tmp_path: Path) -> None:
    raw = np.array(VECTOR["demo_scores"], np.float32)
    prompts = [Prompt(prompt_id=f"p{i}", token_ids=np.array([1], np.int32), text="") for i in range(4)]
    found = calibration.calibrate({"reward_model": raw}, config_with(tmp_path, ROWS), prompts=prompts)["reward_model"]
    expected = VECTOR["gain_bias_to_unit"]
    assert (found["gain"], found["bias"]) == pytest.approx((expected["gain"], expected["bias"]), abs=1e-6)
    assert (found["anchor"], found["num_responses"]) == ("demonstrations", 4)
    # Without the gain it is the bias that InstructGPT subtracts.
    assert -found["bias"] / found["gain"] == pytest.approx(VECTOR["bias"], abs=1e-6)
    [parsed] = calibration.parse({"reward_model": found}).values()
    np.testing.assert_allclose(parsed.apply(raw), expected["out"], atol=1e-6)
    np.testing.assert_allclose(parsed.apply(raw) / found["gain"], VECTOR["normalised"], atol=1e-6)


def test_demonstrations_come_as_responses(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = tiny_tokenizer()
    config = config_with(tmp_path, ROWS)
    with caplog.at_level(logging.WARNING):
        found = calibration.demonstrated(config, tokenizer, iteration=-2)
    assert "1 dropped: longer than 84 tokens (such as demonstration 2)" in caplog.text
    assert [rollout.key.prompt_id for rollout in found] == ["demonstration-1", "demonstration-3", "demonstration-4"]
    assert {(rollout.key.round, rollout.key.iteration, rollout.key.sample) for rollout in found} == {(0, -2, 0)}
    assert [rollout.prompt.text for rollout in found] == ["what is a fox?", "a sky?", "a sea?"]
    assert found[0].prompt.token_ids.tolist() == encode_prompt(tokenizer, "what is a fox?")
    for rollout, said in zip(found, ("a quick animal", "blue", "green"), strict=True):
        assert rollout.response_ids[-1] == END_ID
        assert decode(tokenizer, rollout.response_ids[:-1].tolist()) == said
        assert rollout.behavior_logprobs is None
        assert rollout.policy_versions == NOT_SAMPLED
    samples.write(tmp_path / "anchors.jsonl", found)
    again = samples.read(tmp_path / "anchors.jsonl")
    assert [rollout.key for rollout in again] == [rollout.key for rollout in found]
    assert all(np.array_equal(a.response_ids, b.response_ids) for a, b in zip(again, found, strict=True))


def test_no_more_demonstrations_are_taken_than_asked_for(tmp_path: Path) -> None:
    config = config_with(tmp_path, ROWS, "scoring.calibration_responses=2")
    found = calibration.demonstrated(config, tiny_tokenizer(), iteration=-2)
    assert [rollout.key.prompt_id for rollout in found] == ["demonstration-1", "demonstration-3"]


def test_one_demonstration_is_no_anchor(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"two demonstrations or more, and 1 can be used: .*longer than 84 tokens"):
        calibration.demonstrated(config_with(tmp_path, ROWS[:2]), tiny_tokenizer(), iteration=-2)
    with pytest.raises(ConfigError, match="there is no data.demonstrations"):
        tiny_config(
            tmp_path,
            "scoring.calibration_anchor=demonstrations",
            "data.demonstrations=null",
            "models.policy={path: somewhere}",
        )


def test_a_reward_that_tells_nothing_apart_is_named(tmp_path: Path) -> None:
    prompts = [Prompt(prompt_id="p", token_ids=np.array([1], np.int32), text="")]
    with pytest.raises(UserError, match="the reward flat has no unit of its own") as caught:
        calibration.calibrate({"flat": np.ones(4, np.float32)}, config_with(tmp_path, ROWS), prompts=prompts)
    assert "scores that differ" in str(caught.value)
