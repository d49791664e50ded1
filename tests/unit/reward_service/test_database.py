"""What SQLite's errors mean: locked, damaged, or on a disk that takes no more; each with the file and what to do."""

import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from protocol.errors import StorageError, UserError
from reward_service.preferences import database
from reward_service.preferences.records import Candidate, Task
from reward_service.preferences.store import PreferenceStore
from tests.small_disk import fill, small_disk


def opened(path: Path) -> PreferenceStore:
    return PreferenceStore.open(f"sqlite:///{path}")


def tasks(num: int) -> list[Task]:
    return [
        Task(
            task_id=f"task-{number}",
            round=1,
            kind="pair",
            purpose="training",
            prompt_id=f"p{number}",
            prompt="what ?",
            candidates=tuple(
                Candidate(candidate_id=name, text=name * 2000, policy="v000", policy_version=0) for name in "ab"
            ),
        )
        for number in range(num)
    ]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size="2m") as place:
        yield place


def test_a_store_that_somebody_else_has_locked_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_BUSY_S", 0.3)
    path = tmp_path / "preferences.db"
    with closing(opened(path)) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(UserError, match=f"{path}: the preference database is locked.*`fuser {path}`"):
            store.add_tasks(tasks(1))
        with pytest.raises(UserError, match="is locked"):
            opened(path)
        other.execute("ROLLBACK")
        assert store.add_tasks(tasks(1)) == 1


def test_a_damaged_store_says_so(tmp_path: Path) -> None:
    path = tmp_path / "preferences.db"
    opened(path).close()
    whole = path.read_bytes()
    path.write_bytes(b"x" * len(whole))
    with pytest.raises(UserError, match=f"{path}: the preference database is damaged: file is not a database"):
        opened(path)
    path.write_bytes(whole[:100] + bytes(len(whole) - 100))
    with pytest.raises(UserError, match=f"{path}: the preference database is damaged: .*malformed"):
        opened(path)


def test_a_store_on_a_full_disk_keeps_what_it_had_and_goes_on_when_there_is_room(disk: Path) -> None:
    path = disk / "preferences.db"
    with closing(opened(path)) as store:
        assert store.add_tasks(tasks(2)) == 2
        ballast = fill(disk, leave=20_000)
        with pytest.raises(StorageError, match=f"{path}: it cannot be written.*disk is full"):
            store.add_tasks(tasks(50))
        assert len(store.tasks(round=1, purpose="training")) == 2
        ballast.unlink()
        assert store.add_tasks(tasks(50)) == 48


def test_a_store_on_a_disk_that_became_read_only_says_so(disk: Path) -> None:
    path = disk / "preferences.db"
    opened(path).close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises((StorageError, UserError), match=str(path)):
        opened(path)
