"""A whole run in a process of its own, with the time and the memory that it took."""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil


def run_chain(name: str, *, output: Path, overrides: Sequence[str], preset: str = "quickstart") -> dict[str, Any]:
    """Run a configuration to its end, or go on with it; a finished one is left as it is.

    Args:
        name: The run's name; its output goes to `NAME.log` beside its directory.
        output: Where the run's directory is made.
        overrides: Of the preset's settings, `a.b=c`.
        preset: The configuration.

    Returns:
        The seconds it took and the peak of its processes' summed resident memory.

    Raises:
        SystemExit: If the run failed.
    """
    output.mkdir(parents=True, exist_ok=True)
    settings = [f"run.name={name}", f"run.dir={output}", *overrides]
    started = time.monotonic()
    with (output / f"{name}.log").open("a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", "train", preset, *settings], stdout=log, stderr=subprocess.STDOUT
        )
        peak_bytes = _watch(process)
    if process.returncode:
        raise SystemExit(f"{name} ended with {process.returncode}; see {log.name}")
    return {"seconds": time.monotonic() - started, "peak_memory_gib": peak_bytes / 2**30}


def _watch(process: subprocess.Popen[bytes]) -> int:
    """Wait for a run and return the peak of its processes' summed resident memory, in bytes."""
    peak = 0
    root = psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        for member in [root, *root.children(recursive=True)]:
            try:
                total += member.memory_info().rss
            except psutil.NoSuchProcess:
                continue
        peak = max(peak, total)
        time.sleep(1.0)
    return peak
