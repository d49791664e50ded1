"""Interchangeable workers: started under a deadline, and replaced when they fail."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Protocol, TypeVar

import ray
from ray.exceptions import RayActorError

from cluster.stacks import stacks_of
from cluster.supervision import (
    LATE,
    DeadlineError,
    Handle,
    PlaceWatch,
    SilentWorkerError,
    died_with_node,
    first_line,
    wait,
)
from configs.cluster import DeadlinesConfig
from protocol.errors import NoPlaceError, WorkersLostError
from protocol.incidents import Incident

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
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
    asked: float = field(default_factory=monotonic)
    """When it was asked for."""

    def met(self, status: Any) -> None:
        """Take note of where the worker is, from its first status."""
        found = status_fields(status)
        self.pid, self.node_id = found["pid"], found["node_id"]


def status_fields(status: Any) -> dict[str, Any]:
    """Read what every worker's status says: where it runs, and what it is doing."""
    return {n: status[n] if isinstance(status, dict) else getattr(status, n) for n in ("state", "pid", "node_id")}


class Places(Protocol):
    """Where the workers of a pool may run."""

    @property
    def indices(self) -> Sequence[int]:
        """The places there are."""
        ...

    def granted(self, index: int, /) -> bool:
        """Say whether the cluster has room for a place."""
        ...

    def give_back(self, index: int, /) -> None:
        """Give a place back to the cluster."""
        ...


@dataclass(slots=True)
class Anywhere:
    """Places on whatever node has room."""

    indices: Sequence[int]

    def granted(self, index: int) -> bool:
        """Every place is."""
        return True

    def give_back(self, index: int) -> None:
        """Forget the place."""
        self.indices = [place for place in self.indices if place != index]


class Pool:
    """Interchangeable workers: that they are there. Those who own a pool say what its workers do.

    Args:
        role: What they are called.
        places: Where they run; one worker a place.
        make: Starts a worker, given its place and its name.
        deadlines: How long a start, and the wait for a place, may take.
        replacements: How many lost workers may be replaced.
        minimum: With fewer workers the run stops.
        report: Takes note of lost workers.
    """

    def __init__(
        self,
        *,
        role: str,
        places: Places,
        make: Callable[[int, str], Handle],
        deadlines: DeadlinesConfig,
        replacements: int,
        report: Report,
        minimum: int = 1,
    ) -> None:
        self.role = role
        self._places = places
        self._make = make
        self._deadlines = deadlines
        self._replacements = replacements
        self._minimum = minimum
        self._report = report
        self._generation = 0
        self._place_watch = PlaceWatch(places.granted, placement_s=deadlines.placement_s)
        self._members = {index: self.make(index) for index in places.indices}

    @property
    def members(self) -> list[Member]:
        """The workers that fill the pool's places now."""
        return [self._members[index] for index in sorted(self._members)]

    @property
    def may_shrink(self) -> bool:
        """Say whether a worker may leave."""
        return len(self._members) > self._minimum

    def name_of(self, index: int) -> str:
        """The name of a place, and of the first worker in it."""
        return f"{self.role}-{index}"

    def make(self, index: int) -> Member:
        """Start a worker in a new place; it does not belong to the pool before it joins."""
        name = self.name_of(index)
        return Member(index=index, name=name, handle=self._make(index, name))

    def join(self, member: Member) -> None:
        """Let a worker belong to the pool."""
        self._members[member.index] = member

    def dismiss(self, member: Member) -> None:
        """Stop a worker and give its place back."""
        ray.kill(member.handle, no_restart=True)
        del self._members[member.index]
        self._places.give_back(member.index)

    def _replacement(self, index: int) -> Member:
        name = f"{self.name_of(index)}.{self._generation}"
        return Member(index=index, name=name, handle=self._make(index, name))

    def started(self) -> dict[str, str]:
        """Wait until every worker has loaded its model; one that is lost meanwhile is replaced.

        Returns:
            Worker name -> the id of its node.

        Raises:
            NoPlaceError: If the cluster has no room for one.
            WorkersLostError: If no replacement is left.
            RayActorError: If a worker's constructor raised something; it would raise that again.
        """
        for member in self.members:
            try:
                self._wait_for(member, among=[other for other in self.members if other.pid is None])
            except LATE as error:
                if isinstance(error, RayActorError) and error.actor_init_failed:
                    raise
                self.refill(member, cause=error, admit=self.admit)
        return {member.name: str(member.node_id) for member in self.members}

    def replace(self, member: Member, *, cause: BaseException) -> Member:
        """Put a new worker in a failed one's place. It begins to start; nobody waits for it here.

        Raises:
            WorkersLostError: If no replacement is left.
        """
        silent, late = isinstance(cause, SilentWorkerError), isinstance(cause, DeadlineError)
        stacks = stacks_of(pid=member.pid, node_id=member.node_id) if silent or late else None
        # Ray takes some seconds to miss a node, and until then may start a replacement on it.
        free = member.pid is None and died_with_node(cause)
        spent = self._replacements <= 0 and not free
        if not spent:
            self._replacements -= not free
            self._generation += 1
            ray.kill(member.handle, no_restart=True)
            self._members[member.index] = self._replacement(member.index)
        fresh = self._members[member.index]
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
        _LOG.warning("%s is lost: %s", member.name, first_line(cause))
        if spent:
            raise WorkersLostError(
                f"{member.name} failed and cluster.worker_replacements is used up; the cause was: {cause}"
            ) from cause
        return fresh

    def refill(self, member: Member, *, cause: BaseException, admit: Callable[[Member], T]) -> T | None:
        """Replace a lost worker and wait for the new one; if that is lost before it is admitted, likewise.

        Args:
            member: Who is lost.
            cause: Why.
            admit: Waits until the replacement has started and may be given work.

        Returns:
            What `admit` returned; None if the cluster has no room for a replacement, and the others go on without.

        Raises:
            WorkersLostError: If no replacement is left, or too few workers are.
        """
        while True:
            member = self.replace(member, cause=cause)
            try:
                return admit(member)
            except NoPlaceError:
                self.leave(member)
                return None
            except LATE as error:
                cause = error

    def holds(self, member: Member) -> bool:
        """Say whether a worker still fills its place."""
        return self._members.get(member.index) is member

    def admit(self, fresh: Member) -> None:
        """Wait until a replacement has started.

        Raises:
            NoPlaceError: If the cluster has no room for it.
        """
        self._wait_for(fresh, among=[fresh])

    def without_place(self, member: Member) -> bool:
        """Say whether a worker has waited too long for its place."""
        return self._place_watch.without_place(member)

    def overdue(self, member: Member, *, loading_s: float) -> DeadlineError | None:
        """Say whether a replacement that nobody waits for takes too long to start, and to load what it needs."""
        bound_s = self._deadlines.start_s + loading_s
        if monotonic() - member.asked <= bound_s:
            return None
        key = "cluster.deadlines.start_s" + (" + publish_s" if loading_s else "")
        return DeadlineError(f"starting {member.name}: it did not answer within {key} = {bound_s:g} s")

    def leave(self, member: Member) -> None:
        """Go on without a worker for which the cluster has no room.

        Raises:
            WorkersLostError: If too few are left.
        """
        cause = self._place_watch.complaint(member)
        left = len(self._members) - 1
        enough = self.may_shrink
        self._report(
            Incident(
                kind="worker_unplaced",
                what=cause,
                where=member.name,
                cause=cause,
                action=f"the run goes on with {left} {self.role} worker{'s' if left > 1 else ''}"
                if enough
                else f"the run stops: it needs {self._minimum} {self.role} worker{'s' if self._minimum > 1 else ''}",
            )
        )
        if not enough:
            raise WorkersLostError(f"{cause}; too few {self.role} workers are left")
        self.dismiss(member)

    def stop(self) -> None:
        """Stop every worker."""
        for member in self.members:
            ray.kill(member.handle, no_restart=True)

    def _wait_for(self, starting: Member, *, among: Sequence[Member]) -> None:
        """Wait until a worker has started, as long as those that start with it have places."""
        [status] = wait(
            [starting.handle.status.remote()],
            deadline_s=self._deadlines.start_s,
            what=f"starting {starting.name}",
            key="cluster.deadlines.start_s",
            watch=self._place_watch,
            workers=among,
        )
        starting.met(status)
