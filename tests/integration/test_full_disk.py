"""A disk that fills up under a run: it goes on or stops with the cause, and ends where the undisturbed run ends."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.test_faults import incidents_of
from tests.rondo_process import ROOT, metrics_of, rondo, untimed
from tests.small_disk import fill, small_disk
from tests.tiny_run import tiny_overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
SETTINGS = ("rounds.iterations=5", "cluster.checkpoint_period_iterations=2")
ROOM_FOR_LINES = 600_000
"""Enough for what every iteration writes, and not for a checkpoint."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    done = rondo("train", "quickstart", *tiny_overrides(directory, *SETTINGS), timeout_s=600)
    assert done.returncode == 0, done.stderr + done.stdout
    smallest = min(path.stat().st_size for path in (directory / "tiny" / "policies").rglob("*.safetensors"))
    assert smallest > ROOM_FOR_LINES / 6  # with the critic and the optimizers' state a checkpoint is 6 times as much
    return directory / "tiny"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", size="100m") as place:
        yield place


class Training:
    """A run in a process of its own, while its disk is seen to."""

    def __init__(self, disk: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "train", "quickstart", *tiny_overrides(disk, *SETTINGS)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def until(self, what: Callable[[], bool]) -> None:
        """Wait until something is there."""
        deadline = time.monotonic() + 600
        while not what():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                output, errors = self.process.communicate()
                pytest.fail(f"exit code {self.process.returncode}: {output}\n{errors}")
            time.sleep(0.01)

    def end(self) -> tuple[int, str, str]:
        """Wait for its end."""
        output, errors = self.process.communicate(timeout=600)
        return self.process.returncode, output, errors


def assert_same(directory: Path, undisturbed: Path) -> None:
    assert untimed(directory) == untimed(undisturbed)
    paths = sorted((undisturbed / "policies").rglob("*.safetensors"))
    assert len(paths) == 2
    for path in paths:
        assert (directory / path.relative_to(undisturbed)).read_bytes() == path.read_bytes()


def test_a_run_outlives_checkpoints_that_find_no_room(undisturbed: Path, disk: Path) -> None:
    """The first fills the disk while a rank writes it; the round's last is not begun, and waits until there is room."""
    directory = disk / "tiny"
    training = Training(disk)
    training.until((directory / "rounds" / "r001" / "calibrations.json").exists)
    ballast = fill(disk, leave=ROOM_FOR_LINES)
    training.until(lambda: len(incidents_of(directory)) == 1)
    ballast.unlink()
    training.until((directory / "checkpoints" / "r001-i000004").is_dir)
    ballast = fill(disk, leave=ROOM_FOR_LINES)
    training.until(lambda: len(incidents_of(directory)) == 2)
    ballast.unlink()
    code, output, errors = training.end()
    assert code == 0, errors + output
    first, second = incidents_of(directory)
    assert {first["kind"], second["kind"]} == {"checkpoint_failed"}
    assert "r001-i000002" in first["what"]
    assert "No space left on device (learner rank 0)" in first["cause"]
    assert "the run goes on: failure 1 in a row" in first["action"]
    assert "r001-i000005" in second["what"]
    assert "1.2 x the last checkpoint" in second["cause"]
    assert "df -h" in second["data"]["next"]
    assert output.count("incident: ") == 2
    names = sorted(path.name for path in (directory / "checkpoints").iterdir())
    assert names == ["r001-i000004", "r001-i000005"]
    assert_same(directory, undisturbed)


def test_a_run_whose_files_find_no_room_stops_with_the_cause_and_goes_on_when_there_is(
    undisturbed: Path, disk: Path
) -> None:
    directory = disk / "tiny"
    training = Training(disk)
    training.until(lambda: (directory / "metrics.jsonl").exists() and (directory / "metrics.jsonl").stat().st_size > 0)
    ballast = fill(disk, leave=0)
    code, output, errors = training.end()
    assert code == 1, errors + output
    assert f"error: StorageError: {directory}" in errors
    assert "No space left on device" in errors
    assert "df -h" in errors
    assert "Traceback" not in errors + output
    assert 1 <= len(metrics_of(directory)) < 5
    ballast.unlink()
    done = rondo("train", "quickstart", *tiny_overrides(disk, *SETTINGS), timeout_s=600)
    assert done.returncode == 0, done.stderr + done.stdout
    assert_same(directory, undisturbed)
