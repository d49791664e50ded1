"""The command line as a user has it, in a process of its own, and what a run of it leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.tiny_run import tiny_overrides

ROOT = Path(__file__).parents[1]
_TIMED = ("time/", "busy/", "sync/seconds", "rollout/tokens_per_s")


def rondo(*arguments: str, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    """Run `rondo ARGUMENTS` to its end, whatever that is."""
    return subprocess.run(
        _command(*arguments),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        env=_environment(),
    )


def train_tiny(directory: Path, *overrides: str, timeout_s: float = 590) -> Path:
    """Run the tiny quickstart with some lines changed, to its good end; return the run's directory."""
    done = rondo("train", "quickstart", *tiny_overrides(directory, *overrides), timeout_s=timeout_s)
    assert done.returncode == 0, done.stderr + done.stdout
    return directory / "tiny"


def signalled_when(said: str, arguments: list[str], number: signal.Signals) -> tuple[int, str]:
    """Run `rondo ARGUMENTS` until it says something, signal the driver (SIGKILL: and all it started) and wait.

    Returns:
        How it ended, and all that it said.
    """
    process = subprocess.Popen(
        _command(*arguments),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env=_environment(),
    )
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if said in line:
            break
    assert said in lines[-1], "".join(lines)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
        return process.wait(timeout=30), "".join(lines)  # what lives on a little longer may hold the pipe open
    process.send_signal(number)
    rest = process.communicate(timeout=300)[0]
    return process.returncode, "".join(lines) + rest


def metrics_of(run: Path) -> list[dict[str, float]]:
    """Read a run's metrics, a line an iteration."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def untimed(run: Path) -> list[dict[str, float]]:
    """Read a run's metrics without those that another run of the same would not have: times and rates."""
    return [{name: value for name, value in line.items() if not name.startswith(_TIMED)} for line in metrics_of(run)]


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cluster.cli", *arguments]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
