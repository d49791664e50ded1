"""Waiting for workers: under a deadline, by name, and only for as long as they answer.

A worker that computes answers `status` from a thread of its own. One that was stopped, or that hangs as a whole, does
not, and would otherwise be waited for until the deadline of its work, which must be long.
"""

import re
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Protocol, TypeVar

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, ObjectLostError, RayActorError, RayTaskError

from actors.errors import EngineFailedError
from protocol.errors import LostDataError, NoPlaceError, UserError

Handle = Any


class DeadlineError(RuntimeError):
    """A wait took longer than the configuration allows; the message names what was waited for."""


class SilentWorkerError(RuntimeError):
    """A worker is there and does not answer, or answers and gets nowhere."""


class UnprovenWorkerError(RuntimeError):
    """A worker lives and cannot prove that it computes with the current weights."""


FAILURES = (RayActorError, SilentWorkerError, EngineFailedError, UnprovenWorkerError)
"""What a lost worker looks like to the driver, as opposed to a worker that raised an error of its own."""
LATE = (*FAILURES, DeadlineError)
"""Likewise, where a worker that answers and does not finish is replaced too."""
GONE = (ObjectLostError, RayActorError)
"""What an object looks like that lay on a lost node: Ray may put the death of the worker that made it in its place."""


class Watched(Protocol):
    """A worker that answers `status` while it works."""

    @property
    def name(self) -> str:
        """Who it is, for messages."""
        ...

    @property
    def handle(self) -> Handle:
        """Its Ray actor."""
        ...


class Starting(Watched, Protocol):
    """A worker that has been asked for."""

    @property
    def index(self) -> int:
        """Its place."""
        ...

    @property
    def asked(self) -> float:
        """When it was asked for, on the monotonic clock."""
        ...


class Patience(Protocol):
    """Whom to ask, and how often, while a result does not come."""

    @property
    def quiet_s(self) -> float:
        """How long nothing may come before the workers are asked."""
        ...

    def require_answers(self, workers: Sequence[Any], /) -> None:
        """Raise what is wrong with the workers, if anything is."""
        ...


W = TypeVar("W", bound=Watched)


class Watch:
    """Finds the workers that do not answer.

    Args:
        silence_s: A worker that neither delivers nor answers for so long counts as lost. Half of it passes before
            anybody is asked, the other half is the time to answer.
    """

    def __init__(self, *, silence_s: float) -> None:
        self.quiet_s = silence_s / 2
        self._silence_s = silence_s

    def answers(self, workers: Sequence[W]) -> list[tuple[W, Any]]:
        """Ask every worker for its status.

        Returns:
            Each worker with its status, or with what is wrong with it: a SilentWorkerError or Ray's error of its death.
        """
        asked = {worker.handle.status.remote(): worker for worker in workers}
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=self.quiet_s)
        return [
            (worker, self.answer(ref, worker) if ref in done else self.silence(worker)) for ref, worker in asked.items()
        ]

    def lost(self, workers: Sequence[W]) -> list[tuple[W, BaseException]]:
        """List the workers that have died or do not answer, each with what is wrong with it."""
        return [(worker, answer) for worker, answer in self.answers(workers) if isinstance(answer, FAILURES)]

    def require_answers(self, workers: Sequence[Watched]) -> None:
        """Ask every worker for its status. One that is dead is not silent: whatever it owes says so by itself.

        Raises:
            SilentWorkerError: Naming the first that does not answer.
        """
        for _, error in self.lost(workers):
            if isinstance(error, SilentWorkerError):
                raise error

    def answer(self, ref: Any, worker: Watched) -> Any:
        """Fetch a worker's status, or what is wrong with it."""
        try:
            return ray.get(ref, timeout=self.quiet_s)
        except RayActorError as error:
            return error
        except GetTimeoutError:
            return self.silence(worker)

    def silence(self, worker: Watched) -> SilentWorkerError:
        """Say that a worker does not answer."""
        return SilentWorkerError(
            f"{worker.name} neither delivered nor answered for cluster.deadlines.silence_s = {self._silence_s:g} s"
        )


class Vigil:
    """Looks after workers of which some deliver and others may not, and never waits for any of them.

    Args:
        watch: Knows how long a worker may be silent.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self._heard: dict[str, float] = {}
        self._asked: dict[str, tuple[Any, float]] = {}
        self.poll_s = min(1.0, watch.quiet_s / 2)
        """How often to look, at least."""

    def heard(self, worker: Watched) -> None:
        """Take note that a worker has been given work, or has delivered some."""
        self._heard[worker.name] = monotonic()
        self._asked.pop(worker.name, None)

    def answers(self, workers: Sequence[W]) -> list[tuple[W, Any]]:
        """Ask those that have been quiet for half of silence_s; list what those say that were asked before.

        Returns:
            As Watch.answers, of the workers that have answered or have let the other half pass.
        """
        found: list[tuple[W, Any]] = []
        for worker in workers:
            if worker.name not in self._asked:
                if monotonic() - self._heard.setdefault(worker.name, monotonic()) >= self._watch.quiet_s:
                    self._asked[worker.name] = worker.handle.status.remote(), monotonic()
                continue
            ref, asked = self._asked[worker.name]
            if ray.wait([ref], timeout=0)[0]:
                self.heard(worker)
                found.append((worker, self._watch.answer(ref, worker)))
            elif monotonic() - asked >= self._watch.quiet_s:
                found.append((worker, self._watch.silence(worker)))
        return found


class PlaceWatch:
    """Finds the workers that cannot start because the cluster has no room for them.

    Args:
        granted: Says whether a place is granted.
        placement_s: How long a worker may be without one.
    """

    quiet_s = 1.0

    def __init__(self, granted: Callable[[int], bool], *, placement_s: float) -> None:
        self._granted = granted
        self._placement_s = placement_s

    def without_place(self, worker: Starting) -> bool:
        """Say whether a worker has waited too long for its place."""
        return monotonic() - worker.asked > self._placement_s and not self._granted(worker.index)

    def require_answers(self, workers: Sequence[Starting]) -> None:
        """Look for workers without places.

        Raises:
            NoPlaceError: Naming the first.
        """
        for worker in workers:
            if self.without_place(worker):
                raise NoPlaceError(self.complaint(worker))

    def complaint(self, worker: Starting) -> str:
        """Say what is wrong with a worker without a place."""
        key = "cluster.deadlines.placement_s"
        return f"the cluster had no room for {worker.name} within {key} = {self._placement_s:g} s"


def wait(
    refs: Sequence[Any],
    *,
    deadline_s: float,
    what: str,
    key: str,
    watch: Patience | None = None,
    workers: Sequence[Any] = (),
) -> list[Any]:
    """Fetch results, or say what was waited for.

    Args:
        refs: Object references.
        deadline_s: The bound on the whole wait.
        what: What is being waited for, for the message.
        key: The configuration key of the deadline.
        watch: Asks the workers what is wrong, whenever nothing has come for a while.
        workers: Whose results they are.

    Returns:
        The values, in order.

    Raises:
        DeadlineError: If they are not all there in time.
        SilentWorkerError: If a worker stopped answering.
        LostDataError: If a worker could not fetch what it was given.
        Exception: What the worker raised, itself rather than wrapped. The first failure ends the wait: the others may
            be waiting for the one that failed.
    """
    deadline = monotonic() + deadline_s
    pending, found = list(refs), dict[Any, Any]()
    while pending:
        left = max(0.0, deadline - monotonic())
        done, pending = ray.wait(pending, timeout=left if watch is None else min(left, watch.quiet_s))
        if done:
            found[done[0]] = result_of(done[0])
            continue
        if watch is not None:  # also at the deadline: silence has another cause than slowness
            watch.require_answers(workers)
        if monotonic() >= deadline:
            late = _names([refs.index(ref) for ref in pending], workers if len(workers) == len(refs) else ())
            text = f"{what}: {len(pending)} of {len(refs)} did not answer within {key} = {deadline_s:.4g} s{late}"
            raise DeadlineError(text)
    return [found[ref] for ref in refs]


def _names(places: Sequence[int], workers: Sequence[Watched]) -> str:
    return f": {', '.join(workers[place].name for place in sorted(places))}" if workers else ""


def result_of(ref: Any) -> Any:
    """Fetch one result that is there; raise what the worker raised itself rather than Ray's wrapper."""
    try:
        return ray.get(ref, timeout=_TRANSFER_S)
    except RayTaskError as error:  # first: it is an actor error or a timeout too, where that is what the worker met
        raise cause_of(error) from None
    except GetTimeoutError:
        raise DeadlineError(f"a result that was ready did not arrive within {_TRANSFER_S:g} s") from None


_TRANSFER_S = 120.0
"""The bound on bringing a small result that is ready from another node."""


def cause_of(error: RayTaskError) -> Exception:
    """Unwrap what a worker raised; Ray's wrapper stays as its cause for `--traceback`."""
    inner: Any = getattr(error, "cause", None)
    if isinstance(inner, GONE):
        return LostDataError(f"what a worker was to fetch is gone: {first_line(inner)}")
    if isinstance(inner, GetTimeoutError):
        # Ray names call, process and address in the text alone, in colour.
        who = re.sub(r"\x1b\[\d*m", "", first_line(error))
        return LostDataError(f"what a worker was to fetch did not come: {first_line(inner)}; it was {who}")
    if isinstance(inner, UserError):
        return inner
    if isinstance(inner, Exception):
        inner.__cause__ = error
        return inner
    return error


def died_with_node(error: BaseException) -> bool:
    """Say whether Ray blames a worker's death on its node; the error says so in its text alone."""
    return isinstance(error, ActorDiedError) and "its node has died" in str(error)


def first_line(error: BaseException) -> str:
    """Shorten an error to what fits into a line."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
