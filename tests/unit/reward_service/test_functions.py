"""Rewards from Python functions, and what is kept when one fails."""

import json
import math
from pathlib import Path

import pytest

from protocol.errors import UserError
from reward_service.functions import FunctionReward, import_function
from reward_service.scoring import RewardError
from tests.reward_batches import batch

HERE = "tests.unit.reward_service.test_functions"


def length_of(*, prompts: list, responses: list, finish_reasons: list, metadata: list) -> list[float]:
    return [len(response) + (reason == "length") for response, reason in zip(responses, finish_reasons, strict=True)]


def tag_of(*, metadata: list[dict], **rest: object) -> list[float]:
    return [float(row["tag"]) for row in metadata]


def raises(**batch: object) -> list[float]:
    raise ZeroDivisionError("no luck")


def one_nan(*, prompts: list, **rest: object) -> list[float]:
    return [math.nan if prompt == "b?" else 0.0 for prompt in prompts]


def too_few(**batch: object) -> list[float]:
    return [1.0]


not_a_function = 3


def test_a_function_scores_the_whole_batch(tmp_path: Path) -> None:
    reward = FunctionReward(name="length", path=f"{HERE}:length_of", incident_dir=tmp_path)
    assert reward.raw_scores(batch()).tolist() == [1.0, 3.0, 3.0]
    reward = FunctionReward(name="tag", path=f"{HERE}:tag_of", incident_dir=tmp_path)
    assert reward.raw_scores(batch()).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("path", ["no_such_module_here:f", f"{HERE}:missing", f"{HERE}:not_a_function"])
def test_a_wrong_path_is_found_at_the_start(path: str) -> None:
    with pytest.raises(UserError, match="reward tone"):
        import_function(path, component="tone")


@pytest.mark.parametrize(
    ("function", "key", "words"),
    [("raises", "r2/i7/a#0", "no luck"), ("one_nan", "r2/i7/b#0", "nan"), ("too_few", "r2/i7/a#0", "3 responses")],
)
def test_a_failing_function_names_itself_and_saves_the_batch(
    function: str, key: str, words: str, tmp_path: Path
) -> None:
    reward = FunctionReward(name="tone", path=f"{HERE}:{function}", incident_dir=tmp_path / "incidents")
    with pytest.raises(RewardError, match="tone") as caught:
        reward.raw_scores(batch())
    assert str(caught.value.key) == key
    assert words in str(caught.value)
    assert caught.value.incident is not None
    record = json.loads(Path(caught.value.incident).read_text())
    assert (record["kind"], record["where"]) == ("reward_failed", "reward tone")
    assert (record["round"], record["iteration"], record["policy_version"]) == (2, 7, 31)
    assert words in record["what"]
    assert "the run stops" in record["action"]
    assert record["reproduce"] == f"rondo incident show {caught.value.incident}"
    assert record["data"]["key"] == key
    assert record["data"]["keys"] == ["r2/i7/a#0", "r2/i7/b#0", "r2/i7/c#0"]
    assert ("ZeroDivisionError" in record["cause"]) == (function == "raises")
    saved = (tmp_path / "incidents" / record["data"]["batch"]).read_text().splitlines()
    assert [json.loads(line) for line in saved] == [
        {"key": "r2/i7/a#0", "prompt": "a?", "response": "x", "finish_reason": "stop", "metadata": {"tag": "1"}},
        {"key": "r2/i7/b#0", "prompt": "b?", "response": "yy", "finish_reason": "length", "metadata": {"tag": "2"}},
        {"key": "r2/i7/c#0", "prompt": "c?", "response": "zzz", "finish_reason": "stop", "metadata": {"tag": "3"}},
    ]


def test_a_failure_that_comes_again_overwrites_its_own_files(tmp_path: Path) -> None:
    reward = FunctionReward(name="to/ne", path=f"{HERE}:raises", incident_dir=tmp_path)
    for _ in range(2):
        with pytest.raises(RewardError):
            reward.raw_scores(batch())
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".jsonl"]
