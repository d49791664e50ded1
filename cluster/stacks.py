"""What a process that does not answer is doing: its Python stacks, read from outside."""

import subprocess
import sys
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_DUMP_S = 20.0
"""Stacks are worth having and not worth waiting for."""


def stacks_of(*, pid: int | None, node_id: str | None) -> str | None:
    """Read a process's stacks with py-spy, on the node where it runs.

    Args:
        pid: The process; None if it is not known.
        node_id: Its node.

    Returns:
        The stacks, or why there are none; None if the process is not known.
    """
    if pid is None or node_id is None:
        return None
    there = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
    try:
        return ray.get(_dump.options(scheduling_strategy=there).remote(pid), timeout=_DUMP_S)
    except RayError as error:  # its node may be gone as well
        return f"no stacks: {error}"


@ray.remote(num_cpus=0, max_retries=0)
def _dump(pid: int) -> str:
    spy = Path(sys.executable).with_name("py-spy")
    # A stopped process cannot be paused first, so it is read as it stands.
    command = [str(spy) if spy.exists() else "py-spy", "dump", "--nonblocking", "--pid", str(pid)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DUMP_S / 2, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"no stacks: {error}"
    return done.stdout or f"no stacks: {done.stderr.strip()}"
