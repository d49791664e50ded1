"""Supervised workers: started under a deadline, waited for by name, replaced when they fail."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from protocol.errors import UserError

Handle = Any


class DeadlineError(RuntimeError):
    """A wait took longer than the configuration allows; the message names what was waited for."""


class WorkersLostError(RuntimeError):
    """More workers failed than may be replaced."""


@dataclass(slots=True)
class Member:
    """One place in a pool, and the worker that fills it now."""

    index: int
    name: str
    handle: Handle


def wait(refs: Sequence[Any], *, deadline_s: float, what: str, key: str) -> list[Any]:
    """Fetch results, or say what was waited for.

    Args:
        refs: Object references.
        deadline_s: The bound on the whole wait.
        what: What is being waited for, for the message.
        key: The configuration key of the deadline.

    Returns:
        The values, in order.

    Raises:
        DeadlineError: If they are not all there in time.
        Exception: What the worker raised, itself rather than wrapped.
    """
    try:
        return ray.get(list(refs), timeout=deadline_s)
    except GetTimeoutError:
        _, late = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        raise DeadlineError(
            f"{what}: {len(late)} of {len(refs)} did not answer within {key} = {deadline_s:g} s"
        ) from None
    except RayTaskError as error:
        raise cause_of(error) from None


def cause_of(error: RayTaskError) -> Exception:
    """Unwrap what a worker raised; Ray's wrapper stays as its cause for `--traceback`."""
    inner = getattr(error, "cause", None)
    if isinstance(inner, UserError):
        return inner
    if isinstance(inner, Exception):
        inner.__cause__ = error
        return inner
    return error


def node_of(status: Any) -> str:
    """Read the node from a worker's status."""
    return status["node_id"] if isinstance(status, dict) else status.node_id


class Pool:
    """Interchangeable workers. The subclass says what they do; this says that they are there."""

    def __init__(self, *, role: str, size: int, make: Callable[[int, str], Handle], replacements: int) -> None:
        self.role = role
        self._make = make
        self._replacements = replacements
        self._generation = 0
        self.members = [self._member(index) for index in range(size)]

    def _member(self, index: int) -> Member:
        suffix = f".{self._generation}" if self._generation else ""
        name = f"{self.role}-{index}{suffix}"
        return Member(index=index, name=name, handle=self._make(index, name))

    def started(self, *, deadline_s: float) -> dict[str, str]:
        """Wait until every worker has loaded its model.

        Returns:
            Worker name -> the id of its node.
        """
        refs = [member.handle.status.remote() for member in self.members]
        names = [member.name for member in self.members]
        what = f"starting {', '.join(names)}"
        states = wait(refs, deadline_s=deadline_s, what=what, key="cluster.deadlines.start_s")
        return dict(zip(names, map(node_of, states), strict=True))

    def replace(self, member: Member, *, cause: BaseException) -> Member:
        """Put a new worker in a failed one's place.

        Raises:
            WorkersLostError: If no replacement is left.
        """
        if self._replacements <= 0:
            raise WorkersLostError(
                f"{member.name} failed and cluster.worker_replacements is used up; the cause was: {cause}"
            ) from cause
        self._replacements -= 1
        self._generation += 1
        ray.kill(member.handle, no_restart=True)
        self.members[member.index] = self._member(member.index)
        return self.members[member.index]

    def stop(self) -> None:
        """Stop every worker."""
        for member in self.members:
            ray.kill(member.handle, no_restart=True)


FAILURES = (RayActorError,)
"""What a lost worker looks like to the driver, as opposed to a worker that raised an error of its own."""
