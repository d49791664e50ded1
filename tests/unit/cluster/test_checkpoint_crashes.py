"""A crash anywhere in a commit or a deletion loses nothing that was acknowledged: cut off after each operation."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cluster import checkpoint, retention
from cluster.checkpoint import Checkpoint
from cluster.committer import Committer
from cluster.schedule import Phase, RunState
from configs.cluster import ClusterConfig
from protocol.errors import UserError
from tests.crashes import (
    CrashState,
    NamesChanged,
    Operation,
    Recording,
    Returned,
    Synced,
    crash_states,
    record,
    shape,
    write_tree,
)

PLACES = ((1, 4), (1, 6), (1, 6), (2, 2))
"""The third commit repeats the second: its iterations were done again."""
SETTINGS = ClusterConfig(checkpoints_kept=1, checkpoint_period_iterations=2)


def commit(run: Path, number: int) -> Checkpoint:
    """Commit the n-th checkpoint of the story."""
    return checkpoint.commit(run / "checkpoints", **contents(number))


def contents(number: int) -> dict[str, Any]:
    """Make up the n-th checkpoint of the story; files come in three sizes and two directories."""
    round, iteration = PLACES[number]

    def write_parts(staging: Path) -> None:
        (staging / "learner" / "policy").mkdir(parents=True)
        (staging / "learner" / "policy" / "rank0.pt").write_bytes(bytes([65 + number]) * 60)
        (staging / "learner" / "learner.json").write_text(json.dumps({"policy_version": number}))

    phase = Phase.EVALUATE if iteration == 6 else Phase.OPTIMISE
    state = RunState(phase=phase, round=round, iteration=iteration, policy_version=number)
    return {
        "name": checkpoint.name_of(round=round, iteration=iteration),
        "driver": {"state": state.to_json(), "number": number},
        "config_hash": "abc",
        "write_parts": write_parts,
    }


def kept(found: Sequence[Checkpoint]) -> set[str]:
    return retention.kept(found, SETTINGS, best_version=0, referred=())


def retain(run: Path, latest: Checkpoint) -> None:
    checkpoint.retain(run / "checkpoints", latest, choose=kept)


def told(run: Path, *, commits: int) -> Recording:
    """Commit so many checkpoints, each followed by a retention, and record what happens on the disk."""
    run.mkdir()
    with record(run) as recording:
        for number in range(commits):
            latest = commit(run, number)
            recording.returned(number)
            retain(run, latest)
    return recording


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A place for thousands of small directories: in memory, where there is one, for these need no disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as place:
        yield Path(place)


def losses(
    recording: Recording,
    scratch: Path,
    operations: Sequence[Operation] | None = None,
    *,
    only_acknowledged: bool = False,
) -> Iterator[tuple[CrashState, str]]:
    """Try every crash, and tell what a resume would find wrong after it."""
    for number, state in enumerate(crash_states(recording, operations)):
        if only_acknowledged and not state.returned:
            continue
        run = scratch / str(number)
        write_tree(run, state.tree)
        wrong = what_is_wrong(run, state)
        if wrong is not None:
            yield state, wrong
        shutil.rmtree(run)


def what_is_wrong(run: Path, state: CrashState) -> str | None:
    """Resume as a run would, and compare with what had been acknowledged."""
    root = run / "checkpoints"
    try:
        found = checkpoint.newest(root)
    except UserError as error:
        return f"nothing to resume from: {error}"
    number = -1 if found is None else found.driver["number"]
    acknowledged = max(state.returned, default=-1)
    if number < acknowledged:
        return f"found {number} after {acknowledged} was acknowledged"
    try:
        for directory in checkpoint.committed(root):
            checkpoint.verify(directory)
    except checkpoint.CheckpointError as error:
        return f"what looks like a checkpoint is none: {error}"
    return None


def test_after_a_crash_anywhere_the_newest_acknowledged_checkpoint_is_found_and_the_run_goes_on(
    tmp_path: Path, scratch: Path
) -> None:
    recording = told(tmp_path / "run", commits=len(PLACES))
    count, shapes = 0, set()
    for count, state in enumerate(crash_states(recording), start=1):
        run = scratch / str(count)
        write_tree(run, state.tree)
        assert what_is_wrong(run, state) is None, state.after
        if shape(state.tree) not in shapes:
            shapes.add(shape(state.tree))
            go_on(run, state)
        shutil.rmtree(run)
    assert count > 1000
    assert len(shapes) > 200


def go_on(run: Path, state: CrashState) -> None:
    """Commit once more: nothing that the crash has left stands in the way or stays behind."""
    latest = commit(run, len(PLACES) - 1)
    retain(run, latest)
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert latest.name in names
    assert len(names) <= 2, f"{names} after {state.after}"
    assert not [name for name in names if name.startswith(".")], f"{names} after {state.after}"


def test_of_the_story_the_last_and_the_end_of_the_round_remain(tmp_path: Path) -> None:
    told(tmp_path / "run", commits=len(PLACES))
    names = [path.name for path in checkpoint.committed(tmp_path / "run" / "checkpoints")]
    assert names == ["r001-i000006.02", "r002-i000002"]


def test_what_is_tried_here_is_what_a_run_does_in_the_background(tmp_path: Path) -> None:
    """The same operations in the same order, so that all of the above holds for the committer's thread."""
    ours = told(tmp_path / "ours", commits=len(PLACES))
    run = tmp_path / "run"
    run.mkdir()
    with record(run) as recording:
        committer = Committer(run / "checkpoints", settings=SETTINGS, report=lambda incident: None)
        for number in range(len(PLACES)):
            committer.begin(**contents(number), choose=kept)
            committer.settle()
    assert [spelled(o) for o in recording.operations] == [
        spelled(o) for o in ours.operations if not isinstance(o, Returned)
    ]


def spelled(operation: Operation) -> str:
    return re.sub(r"-[0-9a-f]{8}'", "-'", repr(operation))


def test_every_sync_of_a_commit_is_needed(tmp_path: Path, scratch: Path) -> None:
    """Leave any one out and some crash loses something: neither the syncs nor this test are there for show."""
    recording = told(tmp_path / "run", commits=1)
    syncs = [place for place, operation in enumerate(recording.operations) if isinstance(operation, Synced)]
    assert len(syncs) == 10  # five files, three directories, the name in checkpoints/, and its own
    for place in syncs:
        rest = [*recording.operations[:place], *recording.operations[place + 1 :]]
        directory = scratch / f"without-{place}"
        directory.mkdir()
        found = next(losses(recording, directory, rest, only_acknowledged=True), None)
        assert found is not None, recording.operations[place]


def test_a_deletion_needs_its_sync_between_the_name_and_the_files(tmp_path: Path, scratch: Path) -> None:
    recording = told(tmp_path / "run", commits=3)
    renames = [
        place
        for place, operation in enumerate(recording.operations)
        if isinstance(operation, NamesChanged)
        and any(name.startswith(".discarded-") and node is not None for name, node in operation.names)
    ]
    assert len(renames) == 2
    for place in renames:
        assert isinstance(recording.operations[place + 1], Synced)
    first = renames[0]
    rest = [*recording.operations[: first + 1], *recording.operations[first + 2 :]]
    found = [wrong for _, wrong in losses(recording, scratch, rest, only_acknowledged=True)]
    assert any(wrong.startswith("what looks like a checkpoint is none") for wrong in found)


def test_deleting_the_old_one_before_the_new_one_has_its_name_would_be_found_out(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_room(root: Path, name: str) -> Path:
        shutil.rmtree(root / name, ignore_errors=True)
        return root / name

    monkeypatch.setattr(checkpoint, "_free", make_room)
    recording = told(tmp_path / "run", commits=3)
    found = [wrong for _, wrong in losses(recording, scratch, only_acknowledged=True)]
    assert any(wrong.startswith("nothing to resume from") for wrong in found)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="cluster.checkpoint")
