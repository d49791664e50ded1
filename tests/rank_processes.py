"""Real learner ranks, one process each: started from a test, they meet, do the same work, and leave what they found.

A module that ranks run ends in `run_rank(work)`; a test starts it with `start_ranks` or `Worlds`, which run

    python -m MODULE RANK WORLD_SIZE DIRECTORY
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from learner.distributed import LOOPBACK, init_distributed, listen
from learner.training import RankContext

ROOT = Path(__file__).parents[1]
_MEETING_S = 60


def start_ranks(module: str, *, world_size: int, directory: Path, timeout_s: float = 240.0) -> list[Any]:
    """Run a module as so many ranks, to the end of each.

    Returns:
        What each rank found, by rank.
    """
    logs = [directory / f"rank-{rank}.log" for rank in range(world_size)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", module, str(rank), str(world_size), str(directory)],
            cwd=ROOT,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "DS_ACCELERATOR": "cpu"},
        )
        for rank, log in enumerate(logs)
    ]
    codes = [process.wait(timeout=timeout_s) for process in processes]
    assert codes == [0] * world_size, "\n".join(log.read_text()[-4000:] for log in logs)
    return [torch.load(_findings(directory, rank)) for rank in range(world_size)]


class Worlds:
    """What the ranks of a module found, by world size; each world is run when it is first asked for."""

    def __init__(self, module: str, directories: pytest.TempPathFactory) -> None:
        self._module, self._directories = module, directories
        self._found: dict[int, list[Any]] = {}

    def __getitem__(self, world_size: int) -> list[Any]:
        if world_size not in self._found:
            directory = self._directories.mktemp(f"world-{world_size}")
            self._found[world_size] = start_ranks(self._module, world_size=world_size, directory=directory)
        return self._found[world_size]


def run_rank(work: Callable[[RankContext, Path], Any]) -> None:
    """Join the other ranks, work in the test's directory, and leave what was found there."""
    rank, world_size, directory = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    listener: socket.socket | None = None
    port_file = directory / "port"
    if rank == 0:
        listener = listen(LOOPBACK)
        staging = port_file.with_suffix(".tmp")
        staging.write_text(str(listener.getsockname()[1]))
        staging.rename(port_file)
    deadline = time.monotonic() + _MEETING_S
    while not port_file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 has not written its port within {_MEETING_S} s")
        time.sleep(0.05)
    context = init_distributed(
        rank=rank,
        world_size=world_size,
        address=LOOPBACK,
        port=int(port_file.read_text()),
        listener=listener,
        timeout_s=_MEETING_S,
    )
    torch.save(work(context, directory), _findings(directory, rank))


def _findings(directory: Path, rank: int) -> Path:
    return directory / f"findings-{rank}.pt"
