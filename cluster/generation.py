"""One batch in the making: which worker owes which responses, and what becomes of them when a worker is lost."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from time import monotonic
from typing import Any, NamedTuple, Protocol

import ray
from ray.exceptions import GetTimeoutError, RayTaskError

from cluster import schedule
from cluster.deadlines import Bound
from cluster.pool import Member
from cluster.supervision import FAILURES, LATE, DeadlineError, SilentWorkerError, Vigil, Watch, cause_of
from protocol.messages import RolloutKey, RolloutMeta, RolloutRequest
from protocol.roles import Finished, Payload, RolloutRef


class Workers(Protocol):
    """The pool, as a batch sees it."""

    @property
    def members(self) -> list[Member]:
        """The workers that fill the pool's places now."""
        ...

    def replace(self, member: Member, error: BaseException, /) -> tuple[Member, Any]:
        """Put a new worker in a lost one's place; the reference is ready when it may be admitted."""
        ...

    def admit(self, fresh: Member, ref: Any, /) -> Any:
        """Check that a replacement holds the current version."""
        ...

    def without_place(self, member: Member, /) -> bool:
        """Say whether the cluster has had no room for a replacement for too long."""
        ...

    def overdue(self, member: Member, /) -> DeadlineError | None:
        """Say whether a replacement takes too long to start."""
        ...

    def leave(self, member: Member, /) -> None:
        """Go on without a worker that has no place."""
        ...


class Generation:
    """A batch that is being sampled.

    A lost worker's share is asked of its replacement, by key, so that nothing is lost or doubled. Nobody waits for the
    replacement: the other workers' responses are passed on while it starts. Where the cluster has no room for it, the
    share is dealt to the others.

    Args:
        workers: The pool.
        watch: Asks whether workers live.
        owed: A worker's place -> the requests it has not answered yet.
        policy_version: The version that samples.
    """

    def __init__(
        self,
        workers: Workers,
        watch: Watch,
        owed: dict[int, dict[RolloutKey, RolloutRequest]],
        *,
        policy_version: int,
    ) -> None:
        self._workers = workers
        self._watch = watch
        self._vigil = Vigil(watch)
        self._owed = owed
        self._version = policy_version
        self._streams: dict[Any, Member] = {}
        self._starting: dict[Any, Member] = {}
        self._steps: dict[str, int] = {}
        self._began = monotonic()
        self._bound: Callable[[], Bound]

    def responses(self, *, bound: Callable[[], Bound]) -> Iterator[Finished]:
        """Yield each response as it is finished.

        Args:
            bound: Says how long the whole batch may take. Workers that are late are replaced like those that are lost,
                and the time begins again with every replacement.

        Raises:
            WorkersLostError: If a worker was lost or late and may not be replaced; its cause says who owes what.
            Exception: What a worker raised.
        """
        self._began, self._bound = monotonic(), bound
        for member in list(self._workers.members):
            if self._owed[member.index]:
                self._ask(member, self._owed[member.index])
        while self._streams or self._starting:
            ref = self._next()
            member = self._streams.get(ref) or self._starting[ref]
            try:
                if ref in self._starting:
                    del self._starting[ref]
                    self._workers.admit(member, ref)
                    self._ask(member, self._owed[member.index])
                    continue
                step = _take(ref, deadline=self._deadline(), watch=self._watch, member=member)
            except RayTaskError as error:  # first: it is an actor error too, where that is what the worker met
                cause = cause_of(error)
                if not isinstance(cause, LATE):
                    raise cause from None
                self._lost(member, cause)
                continue
            except LATE as error:
                self._lost(member, error)
                continue
            self._vigil.heard(member)
            if step is None:
                del self._streams[ref]
                continue
            for place, meta in enumerate(step.metas):
                del self._owed[member.index][meta.key]
                handed = monotonic()
                yield Finished(meta=meta, payload=RolloutRef(step=step.payload, place=place))
                self._began += monotonic() - handed  # what the caller does with it is not the workers' time
        missing = [str(key) for share in self._owed.values() for key in share]
        if missing:
            raise RuntimeError(f"the rollout workers ended without {len(missing)} responses, the first: {missing[0]}")

    def _ask(self, member: Member, requests: Mapping[RolloutKey, RolloutRequest]) -> None:
        stream = member.handle.generate.remote(list(requests.values()), policy_version=self._version)
        self._streams[stream] = member
        self._vigil.heard(member)

    def _deadline(self) -> float:
        return self._began + self._bound().seconds

    def _next(self) -> Any:
        """Wait for whoever has something; each time see to those who have fallen silent or are late as well."""
        while True:
            self._go_on_without_the_unplaced()
            for member, error in [*self._stuck(), *self._overdue()]:
                self._lost(member, error)
            left = max(0.0, self._deadline() - monotonic())
            refs = [*self._streams, *self._starting]
            ready, _ = ray.wait(refs, timeout=min(left, self._vigil.poll_s), fetch_local=False)
            if monotonic() >= self._deadline():
                ready = []
                self._replace_the_late()
            if ready:
                return ready[0]

    def _replace_the_late(self) -> None:
        """Replace everybody who owes something at the batch's deadline; silence has another cause than slowness."""
        seconds, key = self._bound()
        silent = self._watch.lost(_each(self._streams.values()))
        for member, error in silent:
            self._lost(member, error)
        if silent:  # a replacement moves the deadline
            return
        for member in _each([*self._streams.values(), *self._starting.values()]):
            owed = list(self._owed[member.index])
            text = f"{member.name} owes {len(owed)} responses{f', the first {owed[0]}' if owed else ''}"
            self._lost(member, DeadlineError(f"generating: {text}, after {key} = {seconds:.4g} s"))

    def _overdue(self) -> list[tuple[Member, DeadlineError]]:
        """Find replacements that take too long to start."""
        found = [(member, self._workers.overdue(member)) for member in self._starting.values()]
        return [(member, error) for member, error in found if error is not None]

    def _stuck(self) -> list[tuple[Member, SilentWorkerError]]:
        """Find workers that do not answer, or whose engines have not made a step since they were last asked."""
        found: list[tuple[Member, SilentWorkerError]] = []
        for member, answer in self._vigil.answers(_each(self._streams.values())):
            if isinstance(answer, SilentWorkerError):
                found.append((member, answer))
            elif isinstance(answer, FAILURES):
                continue  # it has died, as its stream will say
            elif self._steps.get(member.name) == answer.engine_steps:
                text = f"{member.name} answers, but its engine makes no step"
                found.append((member, SilentWorkerError(text)))
            else:
                self._steps[member.name] = answer.engine_steps
        return found

    def _lost(self, member: Member, error: BaseException) -> None:
        """Have a worker replaced, and forget what it was doing."""
        for doing in (self._streams, self._starting):
            for ref in [ref for ref, busy in doing.items() if busy is member]:
                del doing[ref]
        fresh, ready = self._workers.replace(member, error)
        self._starting[ready] = fresh
        self._began = monotonic()

    def _go_on_without_the_unplaced(self) -> None:
        """Deal what a replacement without a place owes to the others; one that is sampling does it afterwards."""
        for ref, member in list(self._starting.items()):
            if not self._workers.without_place(member):
                continue
            self._workers.leave(member)
            del self._starting[ref]
            self._began = monotonic()
            owed = list(self._owed.pop(member.index).values())
            others = self._workers.members
            for other, more in zip(others, schedule.dealt(owed, workers=len(others)), strict=True):
                self._owed[other.index] |= more
                if more and other not in self._starting.values():  # else it is asked when it has started
                    self._ask(other, more)


def _each(members: Iterable[Member]) -> list[Member]:
    """Name every worker once, however many streams it has."""
    return list({member.name: member for member in members}.values())


class _Step(NamedTuple):
    """What one engine step finished."""

    payload: Payload
    metas: Sequence[RolloutMeta]


def _take(stream: Any, *, deadline: float, watch: Watch, member: Member) -> _Step | None:
    """Read one step from a worker's stream: a payload, which is only passed on, and what the driver may know of it.

    Returns:
        The step, or None at the end of the stream.

    Raises:
        DeadlineError: If the worker stops between a payload and its description until the batch's deadline.
        SilentWorkerError: Likewise, if it does not answer any more.
        Exception: What the worker raised or died of; it comes in the place of an item and ends the stream.
    """
    try:
        payload = next(stream)
    except StopIteration:
        return None
    while not ray.wait([stream], timeout=watch.quiet_s, fetch_local=False)[0]:
        if monotonic() >= deadline:
            raise DeadlineError(f"generating: {member.name} stopped in the middle of a step until the deadline")
        watch.require_answers([member])
    # What is there needs some time to come from another node, however near the deadline is.
    left_s = max(watch.quiet_s, deadline - monotonic())
    try:
        return _Step(payload, ray.get(next(stream), timeout=left_s))
    except StopIteration:
        ray.get(payload, timeout=left_s)
        raise RuntimeError(f"{member.name}'s stream ended between a payload and its description") from None
    except RayTaskError:
        raise  # it is a timeout too, where that is what the worker met
    except GetTimeoutError:
        raise DeadlineError(f"generating: a step of {member.name} did not arrive within {left_s:.4g} s") from None
