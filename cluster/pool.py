"""Interchangeable workers: started under a deadline, and replaced when they fail."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray

from cluster.stacks import stacks_of
from cluster.supervision import DeadlineError, Handle, SilentWorkerError, first_line, wait
from protocol.errors import WorkersLostError
from protocol.incidents import Incident

Report = Callable[[Incident], None]
"""Takes note of a fault."""


@dataclass(slots=True)
class Member:
    """One place in a pool, and the worker that fills it now."""

    index: int
    name: str
    handle: Handle
    pid: int | None = None
    node_id: str | None = None

    def met(self, status: Any) -> None:
        """Take note of where the worker is, from its first status."""
        found = status_fields(status)
        self.pid, self.node_id = found["pid"], found["node_id"]


def status_fields(status: Any) -> dict[str, Any]:
    """Read what every worker's status says: where it runs, and what it is doing."""
    return {n: status[n] if isinstance(status, dict) else getattr(status, n) for n in ("state", "pid", "node_id")}


class Pool:
    """Interchangeable workers. The subclass says what they do; this says that they are there.

    Args:
        role: What they are called.
        size: How many there are.
        make: Starts a worker, given its place and its name.
        replacements: How many lost workers may be replaced.
        report: Takes note of lost workers.
    """

    def __init__(
        self, *, role: str, size: int, make: Callable[[int, str], Handle], replacements: int, report: Report
    ) -> None:
        self.role = role
        self._make = make
        self._replacements = replacements
        self._report = report
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
        names = ", ".join(member.name for member in self.members)
        refs = [member.handle.status.remote() for member in self.members]
        states = wait(refs, deadline_s=deadline_s, what=f"starting {names}", key="cluster.deadlines.start_s")
        for member, status in zip(self.members, states, strict=True):
            member.met(status)
        return {member.name: str(member.node_id) for member in self.members}

    def replace(self, member: Member, *, cause: BaseException) -> Member:
        """Put a new worker in a failed one's place. It begins to start; nobody waits for it here.

        Raises:
            WorkersLostError: If no replacement is left.
        """
        silent, late = isinstance(cause, SilentWorkerError), isinstance(cause, DeadlineError)
        stacks = stacks_of(pid=member.pid, node_id=member.node_id) if silent or late else None
        spent = self._replacements <= 0
        if not spent:
            self._replacements -= 1
            self._generation += 1
            ray.kill(member.handle, no_restart=True)
            self.members[member.index] = self._member(member.index)
        fresh = self.members[member.index]
        self._report(
            Incident(
                kind="worker_silent" if silent else "worker_late" if late else "worker_lost",
                what=f"{member.name} is lost: {first_line(cause)}",
                where=member.name,
                cause=str(cause),
                action="the run stops: cluster.worker_replacements is used up"
                if spent
                else f"{fresh.name} replaces it",
                data={"pid": member.pid, "node_id": member.node_id} | ({"stacks": stacks} if stacks else {}),
            )
        )
        if spent:
            raise WorkersLostError(
                f"{member.name} failed and cluster.worker_replacements is used up; the cause was: {cause}"
            ) from cause
        return fresh

    def holds(self, member: Member) -> bool:
        """Say whether a worker still fills its place."""
        return self.members[member.index] is member

    def admit(self, fresh: Member, *, deadline_s: float) -> None:
        """Wait until a replacement has started."""
        what = f"starting {fresh.name}"
        [status] = wait(
            [fresh.handle.status.remote()], deadline_s=deadline_s, what=what, key="cluster.deadlines.start_s"
        )
        fresh.met(status)

    def stop(self) -> None:
        """Stop every worker."""
        for member in self.members:
            ray.kill(member.handle, no_restart=True)
