"""`rondo workers drain`: a wish that nobody would hear of is refused, and leaves no file."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.run_directory import RunDirectory, claim, lock
from protocol.files import write_json
from tests.command_line import command
from tests.tiny_run import tiny_config


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run that has workers, and that nobody is running."""
    directory = claim(tiny_config(tmp_path))
    write_json(directory.workers, dict.fromkeys(("rollout-0", "rollout-1.3", "reward-0", "learner-0"), "a-node"))
    return directory


@pytest.fixture
def running(run: RunDirectory) -> Iterator[RunDirectory]:
    """The same while it is running."""
    descriptor = lock(run)
    yield run
    os.close(descriptor)


@pytest.mark.parametrize("name", ["rollout-0", "rollout-1", "rollout-1.3"])
def test_a_worker_of_a_running_run_may_leave(running: RunDirectory, name: str) -> None:
    ended = command("workers", "drain", name, "--run", str(running.root))
    assert ended.code == 0, ended
    assert [path.name for path in running.leaving.iterdir()] == [name]


@pytest.mark.parametrize("name", ["rollout-2", "rollout-0.1", "rollout-1.2"])
def test_a_worker_that_is_not_there_cannot(running: RunDirectory, name: str) -> None:
    ended = command("workers", "drain", name, "--run", str(running.root))
    assert ended.code == 2
    assert f"the run has no rollout worker '{name}'; it has rollout-0, rollout-1.3" in ended.err
    assert not running.leaving.exists()


def test_before_there_are_workers_none_can(running: RunDirectory) -> None:
    running.workers.unlink()
    ended = command("workers", "drain", "rollout-0", "--run", str(running.root))
    assert ended.code == 2
    assert "it has none yet" in ended.err


def test_nobody_leaves_a_run_that_is_not_running(run: RunDirectory) -> None:
    os.close(lock(run))  # it was running
    for name in ("rollout-0", "rollout-9"):
        ended = command("workers", "drain", name, "--run", str(run.root))
        assert ended.code == 2
        assert "no process is running this run" in ended.err
    assert not run.leaving.exists()
    os.close(lock(run))  # asking did not take the lock
