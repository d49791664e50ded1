"""`rondo incident show`, and the line that an incident of a worker's own is on the terminal."""

import json
from pathlib import Path

import pytest

from cluster.incident_log import IncidentLog
from cluster.incident_show import described
from protocol.errors import UserError
from protocol.incidents import Incident, write
from reward_service.scoring import RewardError
from reward_service.text_batch import batch_saved_on_failure
from tests.command_line import assert_refused, command
from tests.reward_batches import batch

HOSTILE = "\x1b]0;owned\x07 [bold]x[/bold] \u202egnp.exe \ud800 \x9b31m"


def failed_reward(directory: Path, response: str = "") -> Path:
    asked = batch(6)
    if response:
        object.__setattr__(asked, "responses", (*asked.responses[:4], response, asked.responses[5]))
    with pytest.raises(RewardError) as caught, batch_saved_on_failure(asked, incident_dir=directory):
        raise RewardError("no luck", component="tone", key=asked.keys[4])
    return Path(str(caught.value.incident))


def test_a_failed_reward_is_shown_with_the_response_it_failed_on_first(tmp_path: Path) -> None:
    path = failed_reward(tmp_path / "incidents")
    ended = command("incident", "show", str(path))
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert "kind: reward_failed" in lines
    assert "what: reward tone failed on r2/i7/e#0: no luck" in lines
    assert "policy_version: 31" in lines
    assert f"reproduce: rondo incident show {path}" in lines
    shown = [line for line in lines if line.startswith(("prompt: ", "response: ")) or line.endswith("(stop)")]
    assert shown[:3] == ["r2/i7/e#0 (stop)", "prompt: e?", "response: yyyyy"]
    assert [line for line in lines if line.startswith("prompt: ")] == ["prompt: e?", "prompt: a?", "prompt: b?"]
    assert lines[-1] == f"(6 responses in {path.stem}.jsonl)"


def test_what_a_model_wrote_cannot_touch_the_terminal(tmp_path: Path) -> None:
    path = failed_reward(tmp_path, response=HOSTILE)
    ended = command("incident", "show", str(path))
    assert not {"\x1b", "\x07", "\u202e", "\x9b", "\ud800"} & set(ended.out)
    assert "response: ␛]0;owned␇ [bold]x[/bold] ⟨U+202E⟩gnp.exe" in ended.out


def test_other_incidents_and_long_ones_are_shown_too(tmp_path: Path) -> None:
    incident = Incident(
        kind="worker_lost",
        what="rollout-1 is lost",
        where="rollout-1",
        cause="line one\nline two",
        reproduce="rondo train x --fault rollout-1:serving:kill",
        data={"stacks": "s" * 1_000_000, "api_key": "sk-hush", "batch": "../../etc/passwd.jsonl"},
        at=0.0,
    )
    text = described(write(tmp_path, incident))
    assert text.startswith("when: 1970-01-01 00:00:00 UTC\nkind: worker_lost\n")
    assert "cause: line one\n    line two\n" in text
    assert "reproduce: rondo train x --fault rollout-1:serving:kill\n" in text
    assert "more characters)" in text
    assert "sk-hush" not in text
    assert len(text) < 5_000


def test_what_is_no_incident_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "torn.json").write_text('{"kind": ')
    (tmp_path / "other.json").write_text("{}")
    for name, words in (
        ("nothing.json", "cannot be read"),
        ("list.json", "no incident"),
        ("torn.json", "no JSON"),
        ("other.json", "no incident"),
    ):
        assert_refused(command("incident", "show", str(tmp_path / name)), words)
    path = failed_reward(tmp_path)
    path.with_suffix(".jsonl").write_text('{"key": ')
    with pytest.raises(UserError, match="the batch cannot be read"):
        described(path)


def test_an_incident_that_a_worker_kept_is_a_line_like_any_other(tmp_path: Path) -> None:
    said: list[str] = []
    earlier = failed_reward(tmp_path / "incidents").rename(tmp_path / "incidents" / "earlier.json")
    log = IncidentLog(tmp_path / "incidents", say=said.append)
    path = failed_reward(tmp_path / "incidents")
    log.look()
    log.look()
    assert earlier.exists()  # and was said by the process before
    assert said == [
        "incident: reward tone failed on r2/i7/e#0: no luck; no score is made up: the run stops, and the same command "
        f"goes on from its last checkpoint (incidents/{path.name})"
    ]
    assert json.loads(path.read_text())["where"] == "reward tone"
