"""What is looked at before anything starts: that policies are judged on prompts which they have not learned from."""

import logging
from pathlib import Path

import pytest

from cluster import preflight
from configs.load import load
from protocol.errors import UserError
from tests.tiny_run import TINY

HELD_OUT = ("a", "b", "c", "d")


def test_prompts_that_are_apart_pass_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    preflight.require_held_out(HELD_OUT, {"data.prompts": {"x", "y"}, "data.preferences": set()})
    preflight.require_held_out((), {"data.prompts": {"x"}})
    assert caplog.text == ""


def test_a_few_that_are_shared_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        preflight.require_held_out(HELD_OUT, {"data.prompts": {"x"}, "data.demonstrations": {"a", "b", "x"}})
    assert "2 of 4 prompts of data.eval_prompts are in data.demonstrations too, such as 'a'" in caplog.text


def test_more_than_half_are_refused() -> None:
    with pytest.raises(UserError, match=r"3 of 4 prompts of data\.eval_prompts are in data\.prompts too"):
        preflight.require_held_out(HELD_OUT, {"data.prompts": {"a", "b", "c"}})


def test_a_run_that_evaluates_on_its_training_prompts_does_not_start() -> None:
    config = load("quickstart", [*TINY, "data.eval_prompts={source: examples.quickstart.data:prompts, count: 16}"])
    with pytest.raises(UserError, match=r"16 of 16 prompts of data\.eval_prompts are in data\.prompts too"):
        preflight.check(config)


def test_a_fixed_set_is_looked_at_like_the_rest() -> None:
    given = "data.responses={{source: 'examples.quickstart.data:{}', count: 40}}"
    offline = ("rollout.source=data", "rollout.max_response_tokens=56", "algorithm={name: awr, minibatch_responses: 8}")
    preflight.check(load("quickstart", [*TINY, *offline, given.format("preferences")]))
    with pytest.raises(UserError, match="needs completions beside the prompt"):
        preflight.check(load("quickstart", [*TINY, *offline, given.format("heldout_prompts")]))
    short = load("quickstart", [*TINY, *offline, given.format("preferences"), "rollout.max_response_tokens=4"])
    with pytest.raises(UserError, match=r"an iteration takes 16"):
        preflight.check(short)


def test_the_quickstart_is_apart(caplog: pytest.LogCaptureFixture) -> None:
    preflight.check(load("quickstart", [*TINY]))
    assert "held out" not in caplog.text


@pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "runs/other/reward_models/v000"])
def test_a_reward_model_that_is_not_there_is_missed_before_the_run(path: str) -> None:
    config = load("quickstart", [*TINY, f"scoring.rewards=[{{kind: model, name: theirs, path: {path}}}]"])
    with pytest.raises(UserError, match="no reward model in") as caught:
        preflight.check(config)
    assert "path of theirs" in str(caught.value)


def test_a_reward_model_that_is_there_and_one_of_a_hub_are_left_to_who_loads_them(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, "owner/model"):
        preflight.check(load("quickstart", [*TINY, f"scoring.rewards=[{{kind: model, name: theirs, path: {path}}}]"]))
