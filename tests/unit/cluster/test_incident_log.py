"""Incidents are kept and said, and said also where they cannot be kept."""

import json
import os
from pathlib import Path

import pytest

from cluster.incident_log import IncidentLog
from cluster.schedule import Phase, RunState
from protocol.incidents import Incident, write
from tests.small_disk import files_no_longer_than

INCIDENT = Incident(kind="checkpoint_failed", what="no room", where="here", cause="28 bytes", action="the run goes on")


def test_an_incident_is_a_record_and_a_line(tmp_path: Path) -> None:
    said: list[str] = []
    log = IncidentLog(tmp_path / "incidents", say=said.append)
    log.at(RunState(phase=Phase.OPTIMISE, round=2, iteration=7, policy_version=9))
    log(INCIDENT)
    [path] = (tmp_path / "incidents").iterdir()
    found = json.loads(path.read_text())
    assert (found["kind"], found["round"], found["iteration"], found["policy_version"]) == (
        "checkpoint_failed",
        2,
        7,
        9,
    )
    assert said == [f"incident: no room; the run goes on (incidents/{path.name})"]


def test_one_that_cannot_be_written_is_said_with_its_cause(tmp_path: Path) -> None:
    said: list[str] = []
    log = IncidentLog(tmp_path / "incidents", say=said.append)
    with files_no_longer_than(10):
        log(INCIDENT)
    assert list((tmp_path / "incidents").iterdir()) == []
    [line] = said
    assert line.startswith("incident: no room; the run goes on (no record of it could be written: ")
    assert "File too large" in line
    assert "28 bytes" in line


def test_what_a_worker_keeps_is_said_once_and_again_only_when_it_happens_again(tmp_path: Path) -> None:
    said: list[str] = []
    log = IncidentLog(tmp_path, say=said.append)
    log.look()
    assert said == []
    path = write(tmp_path, INCIDENT, name="nonfinite-r001-i000003")
    log.look()
    log.look()
    assert said == [f"incident: no room; the run goes on ({tmp_path.name}/{path.name})"]
    log(INCIDENT)  # the driver's own is said at once
    log.look()
    assert len(said) == 2
    os.utime(write(tmp_path, INCIDENT, name="nonfinite-r001-i000003"), ns=(0, 1))  # the iteration was repeated
    log.look()
    assert len(said) == 3


@pytest.mark.parametrize("text", ["my notes", '{"a": 1}', "[]", "3", "\xff", "[" * 100_000])
def test_what_is_no_record_is_passed_over_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    said: list[str] = []
    log = IncidentLog(tmp_path, say=said.append)
    (tmp_path / "notes.json").write_bytes(text.encode("latin-1"))
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")  # as a file that goes between two looks at it
    path = write(tmp_path, INCIDENT, name="nonfinite-r001-i000003")
    log.look()
    log.look()
    assert said == [f"incident: no room; the run goes on ({tmp_path.name}/{path.name})"]
    warnings = sorted(record.getMessage() for record in caplog.records)
    assert [line.split(" is passed over: ")[0] for line in warnings] == [
        str(tmp_path / "gone.json"),
        str(tmp_path / "notes.json"),
    ]
