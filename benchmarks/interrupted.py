"""A run that is interrupted again and again: started, watched line by line, ended by a signal, and started anew."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

_GONE_S = 90.0
"""Processes of a run that has ended may take so long to notice."""


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start `rondo train quickstart ARGUMENTS` in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "train", "quickstart", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
    )


def until(process: subprocess.Popen[str], log: Path, *, stop: Callable[[str], bool], timeout_s: float) -> str | None:
    """Read a run's output up to a line, or to its end.

    Args:
        process: The run.
        log: What it says is added here.
        stop: Says whether a line is the one.
        timeout_s: A run that takes longer is killed.

    Returns:
        The line; None if the run ended without it.
    """
    assert process.stdout is not None
    watchdog = threading.Timer(timeout_s, lambda: os.killpg(process.pid, signal.SIGKILL))
    watchdog.start()
    try:
        with log.open("a") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                if stop(line):
                    return line
        return None
    finally:
        watchdog.cancel()


def finish(process: subprocess.Popen[str], log: Path, *, timeout_s: float) -> int:
    """Read a run's output to its end, and return its exit code."""
    until(process, log, stop=lambda line: False, timeout_s=timeout_s)
    return process.wait(timeout=timeout_s)


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """List the processes that a run has started, so that they can be looked for when it is gone."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def orphans(processes: Sequence[psutil.Process]) -> list[str]:
    """Wait for processes to end, and name those that do not."""
    _, alive = psutil.wait_procs(list(processes), timeout=_GONE_S)
    return [f"{one.pid} {' '.join(one.cmdline()[:3])}" for one in alive if one.is_running()]


def complete(arguments: Sequence[str], log: Path, *, timeout_s: float = 1800.0) -> float:
    """Run to the end in one go, and return the seconds it took.

    Raises:
        SystemExit: If it failed.
    """
    started = time.monotonic()
    if code := finish(start(arguments), log, timeout_s=timeout_s):
        raise SystemExit(f"a run ended with {code}; see {log}")
    return time.monotonic() - started
