"""Commits in the background: one at a time, counted when they are over, and a full disk ends no run at once."""

import errno
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import checkpoint
from cluster.committer import Committer
from cluster.supervision import DeadlineError
from configs.cluster import ClusterConfig, DeadlinesConfig
from protocol.errors import StorageError
from protocol.incidents import Incident
from tests.small_disk import files_no_longer_than, fill, small_disk

MIB = 2**20


def parts_of(num_bytes: int) -> Callable[[Path], None]:
    def write_parts(staging: Path) -> None:
        for name in ("policy", "critic"):
            (staging / name).write_bytes(os.urandom(num_bytes // 2))

    return write_parts


SMALL = parts_of(100)


class Run:
    """A committer, what it has reported, and an event that its commits wait for before they delete anything."""

    def __init__(self, root: Path, *, allowed: int = 2, deadline_s: float = 30.0) -> None:
        settings = ClusterConfig(
            checkpoint_failures_allowed=allowed, deadlines=DeadlinesConfig(checkpoint_s=deadline_s)
        )
        self.incidents: list[Incident] = []
        self.committer = Committer(root, settings=settings, report=self.incidents.append)
        self.go_on = threading.Event()
        self.go_on.set()
        self._root = root

    def begin(self, iteration: int, write_parts: Callable[[Path], None] = SMALL, **other: Any) -> None:
        def choose(found: Any) -> set[str]:
            assert self.go_on.wait(30)
            return {each.name for each in found[-2:]}

        common: dict[str, Any] = {"driver": {"iteration": iteration}, "config_hash": "abc", "choose": choose}
        self.committer.begin(f"r001-i{iteration:06d}", write_parts=write_parts, **(common | other))

    def commit(self, iteration: int, write_parts: Callable[[Path], None] = SMALL) -> None:
        self.begin(iteration, write_parts)
        self.committer.settle()

    @property
    def latest(self) -> str | None:
        return None if self.committer.latest is None else self.committer.latest.name

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self._root.iterdir())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size="4m") as place:
        yield place


def refuse(code: int) -> Callable[[Path], None]:
    def write_parts(staging: Path) -> None:
        (staging / "half").write_bytes(b"x" * 100)
        raise OSError(code, os.strerror(code), str(staging))

    return write_parts


def test_the_run_goes_on_while_a_commit_is_under_way_and_it_counts_when_it_is_over(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.go_on.clear()
    run.begin(2)
    run.committer.attend()
    assert run.latest is None
    run.go_on.set()
    run.committer.settle()
    assert run.latest == "r001-i000002"
    assert run.committer.latest == checkpoint.verify(tmp_path / "r001-i000002")
    assert run.incidents == []


def test_a_second_commit_waits_for_the_first(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.go_on.clear()
    run.begin(2)
    threading.Timer(0.3, run.go_on.set).start()
    seen: list[Any] = []
    run.begin(4, lambda staging: seen.append(run.latest))
    assert seen == ["r001-i000002"]  # the first was over before the second's parts were written
    run.committer.settle()
    run.committer.settle()  # nothing is left to wait for
    assert run.latest == "r001-i000004"
    assert run.files == ["r001-i000002", "r001-i000004"]


def test_old_ones_go_in_the_background_too(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for iteration in (2, 4, 6, 8):
        run.commit(iteration)
    assert run.files == ["r001-i000006", "r001-i000008"]


def test_a_commit_that_does_not_end_is_waited_for_no_longer_than_its_deadline(tmp_path: Path) -> None:
    run = Run(tmp_path, deadline_s=0.2)
    run.go_on.clear()
    run.begin(2)
    with pytest.raises(DeadlineError, match=r"r001-i000002 in .*cluster\.deadlines\.checkpoint_s = 0\.2 s"):
        run.committer.settle()
    assert run.latest is None
    run.committer.close(wait_s=30.0)  # nobody waits for it again
    run.go_on.set()


@pytest.mark.parametrize("ends", [True, False])
def test_the_end_of_the_process_waits_for_a_commit_within_a_bound(tmp_path: Path, ends: bool) -> None:
    run = Run(tmp_path)
    run.go_on.clear()
    run.begin(2)
    timer = threading.Timer(0.2 if ends else 10.0, run.go_on.set)
    timer.start()
    run.committer.close(wait_s=5.0 if ends else 0.3)
    timer.cancel()
    run.go_on.set()
    assert [incident.cause for incident in run.incidents] == ([] if ends else ["not over after 0.3 s"])


def test_what_fails_in_the_background_is_raised_where_it_is_waited_for(tmp_path: Path) -> None:
    def choose(found: Any) -> set[str]:
        raise KeyError("best_version")

    run = Run(tmp_path)
    run.begin(2, choose=choose)
    with pytest.raises(KeyError, match="best_version"):
        run.committer.settle()
    run.commit(4)
    assert run.latest == "r001-i000004"


def test_what_is_no_failure_of_the_disk_is_raised_and_not_counted(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(PermissionError):
        run.begin(2, refuse(errno.EACCES))
    assert run.incidents == []
    assert run.files == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_no_more_is_an_incident_until_too_many_fail_in_a_row(tmp_path: Path, code: int) -> None:
    run = Run(tmp_path, allowed=2)
    run.commit(2)
    for iteration in (4, 6):
        run.commit(iteration, refuse(code))
    run.commit(8)  # and the count begins anew
    for iteration in (10, 12):
        run.commit(iteration, refuse(code))
    assert run.files == ["r001-i000002", "r001-i000008"]
    with pytest.raises(StorageError) as error:
        run.commit(14, refuse(code))
    assert run.files == ["r001-i000002", "r001-i000008"]
    assert "3 times in a row" in str(error.value)
    assert f"{tmp_path / 'r001-i000008'} stands" in str(error.value)
    assert os.strerror(code) in str(error.value)
    assert f"df -h {tmp_path}" in str(error.value)
    assert [incident.kind for incident in run.incidents] == ["checkpoint_failed"] * 5
    assert "the run goes on: failure 2 in a row" in run.incidents[3].action
    assert "the run stops" in run.incidents[4].action
    assert "r001-i000014" in run.incidents[4].what
    assert os.strerror(code) in run.incidents[4].cause
    assert f"df -h {tmp_path}" in run.incidents[4].data["next"]


def test_a_limit_reached_in_the_second_half_leaves_nothing_behind(tmp_path: Path) -> None:
    """The parts are short enough, the manifest that names them is not."""
    run = Run(tmp_path)
    run.commit(2)
    with files_no_longer_than(200):
        run.begin(4)
        assert run.incidents == []  # the first half went well
        run.committer.settle()
    assert run.files == ["r001-i000002"]
    assert run.latest == "r001-i000002"
    assert os.strerror(errno.EFBIG) in run.incidents[0].cause
    run.commit(6)
    assert run.latest == "r001-i000006"


def test_one_that_is_there_counts_also_where_the_old_ones_cannot_be_removed(tmp_path: Path) -> None:
    def choose(found: Any) -> set[str]:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    run = Run(tmp_path)
    run.commit(2)
    run.begin(4, choose=choose)
    run.committer.settle()
    assert run.latest == "r001-i000004"
    [incident] = run.incidents
    assert incident.what.startswith("checkpoint r001-i000004 was committed, but what it replaces cannot be removed")


def test_what_does_not_read_back_as_it_was_written_is_not_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)
    run.commit(2)
    sync = checkpoint.sync

    def spoil(path: Path) -> None:
        sync(path)
        if path == tmp_path and (path / "r001-i000004").is_dir():
            (path / "r001-i000004" / "policy").write_bytes(b"?" * 50)

    monkeypatch.setattr(checkpoint, "sync", spoil)
    run.commit(4)
    assert run.latest == "r001-i000002"
    assert "does not read back as it was written" in run.incidents[0].cause
    monkeypatch.undo()
    run.commit(6)
    assert run.files == ["r001-i000002", "r001-i000006"]


def test_a_disk_without_room_for_another_one_is_not_written_to(disk: Path) -> None:
    run = Run(disk / "checkpoints")
    run.commit(2, parts_of(MIB))
    ballast = fill(disk, leave=int(1.1 * MIB))
    written: list[Path] = []
    run.commit(4, written.append)
    assert written == []
    assert "0.00107 GiB are free, and 1.2 x the last checkpoint are 0.00117 GiB" in run.incidents[0].cause
    ballast.unlink()
    fill(disk, leave=int(1.3 * MIB))
    run.commit(6, parts_of(MIB))
    assert run.latest == "r001-i000006"
    assert len(run.incidents) == 1


@pytest.mark.parametrize("after_the_parts", [None, 0, 4096], ids=["in the parts", "in driver.json", "in the manifest"])
def test_a_disk_that_fills_up_meanwhile_gets_all_its_space_back(disk: Path, after_the_parts: int | None) -> None:
    run = Run(disk / "checkpoints")
    ballasts: list[Path] = []

    def write_parts(staging: Path) -> None:
        parts_of(8 * MIB if after_the_parts is None else MIB)(staging)
        assert after_the_parts is not None
        ballasts.append(fill(disk, leave=after_the_parts))

    run.commit(2, write_parts)
    assert run.files == []
    [incident] = run.incidents
    assert os.strerror(errno.ENOSPC) in incident.cause
    assert "there is no checkpoint yet" in incident.action
    for ballast in ballasts:
        ballast.unlink()
    run.commit(4, parts_of(2 * MIB))
    assert run.latest == "r001-i000004"


def test_a_disk_that_became_read_only_is_said_to_be(disk: Path) -> None:
    run = Run(disk / "checkpoints", allowed=0)
    run.commit(2)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        run.commit(4)
    assert run.latest == "r001-i000002"
