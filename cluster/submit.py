"""Submits a run as a Ray job: what `ray job submit --working-dir .` does, with the job's log followed."""

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import tenacity
from rich.console import Console

from protocol.errors import UserError

# A job's working directory goes to every node; files that usually hold secrets stay here.
_EXCLUDED = [".venv", "runs", ".git", "**/__pycache__", "**/.env", "**/.netrc", "**/*.secret"]
_AGENT_S = 60.0
_GOODBYE_S = 5.0
"""For the process to end by itself after its grace time."""


def submit(config: str, overrides: Sequence[str], *, grace_s: float, address: str, console: Console) -> int:
    """Submit a configuration and follow the job to its end.

    Args:
        config: The configuration file's path within this directory, or a preset's name.
        overrides: `a.b=c` each.
        grace_s: How long a run that is asked to stop may take, `cluster.deadlines.grace_s`.
        address: The cluster's dashboard.
        console: Where the log goes.

    Returns:
        0 if the job succeeded, else 1.

    Raises:
        UserError: If the cluster cannot be reached or refuses the token.
    """
    import asyncio

    from ray.job_submission import JobStatus, JobSubmissionClient

    described = description(config, overrides, grace_s=grace_s)
    command = described["entrypoint"]
    try:
        client = JobSubmissionClient(address)
        job = _once_there_is_an_agent(lambda: client.submit_job(**described))
    except (ConnectionError, RuntimeError) as error:
        raise UserError(
            f"the cluster at {address} did not take the job: {str(error).splitlines()[0]}",
            next_step="check the address; with token authentication set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
        ) from error
    console.print(f"job {job}: {command}", markup=False, highlight=False)
    console.print(f"stop it with: ray job stop --address {address} {job}", markup=False, highlight=False)

    async def follow() -> None:
        async for lines in client.tail_job_logs(job):
            sys.stdout.write(lines)
            sys.stdout.flush()

    asyncio.run(follow())
    ended = client.get_job_status(job)
    console.print(f"job {job}: {ended.value}", markup=False, highlight=False)
    return 0 if ended is JobStatus.SUCCEEDED else 1


def description(config: str, overrides: Sequence[str], *, grace_s: float) -> dict[str, Any]:
    """Describe the job as the cluster keeps it and shows it to everybody: no variable of the environment goes along.

    Args:
        config: As `submit` takes it.
        overrides: Likewise.
        grace_s: Likewise. Ray's own answer to a stop is a kill after 3 s, in which nothing is committed.

    Returns:
        The arguments of Ray's `submit_job`.
    """
    command = shlex.join(["python", "-m", "cluster.cli", "train", config, *overrides])
    stop_wait = {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(grace_s + _GOODBYE_S))}
    return {"entrypoint": command, "runtime_env": {"working_dir": ".", "excludes": _EXCLUDED, "env_vars": stop_wait}}


def _once_there_is_an_agent(submit: Callable[[], str]) -> str:
    """Submit; a cluster that has just started answers before the agent that starts jobs does."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_message(match=".*No available agent"),
        stop=tenacity.stop_after_delay(_AGENT_S),
        wait=tenacity.wait_fixed(1.0),
        reraise=True,
    )
    return retrying(submit)
