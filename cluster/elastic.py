"""Rollout workers that join and leave while a run goes on, between two batches.

Nothing that a run computes depends on how many there are: a response depends on its request alone, and groups are
formed by key. So a worker may join wherever all load a version, by loading it with them, and leave where its batch is
over.
"""

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import ray

from cluster.pool import Member, Places, Pool
from cluster.run_directory import RunDirectory, is_running
from cluster.supervision import first_line
from configs.run import RunConfig
from protocol.errors import UserError
from protocol.files import read_json, write_text

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"rollout-\d+(\.\d+)?")


class GrowingPlaces(Places, Protocol):
    """Places of which there may be more."""

    def another(self) -> int | None:
        """Have one more place, if the cluster has room; else see to it that one is asked for. Waits for nothing."""
        ...

    def enough(self) -> None:
        """Ask for no more."""
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a pool of rollout workers is to follow."""

    leaving: Path
    """A directory with a file for every worker that shall leave."""
    draining: Callable[[], set[str]]
    """Names the nodes that Ray is about to give up."""
    note: Callable[[Mapping[str, str]], None]
    """Takes note of where the workers are now."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A worker that starts, and a reference that is ready when it has."""

    member: Member
    started: Any


class Elastic:
    """Lets workers leave that shall, and join where the cluster has room for more, one at a time.

    Args:
        pool: The workers.
        places: Where they run.
        config: How many there may be.
        surroundings: Who shall leave.
    """

    def __init__(self, pool: Pool, places: GrowingPlaces, config: RunConfig, surroundings: Surroundings) -> None:
        self._pool = pool
        self._places = places
        self._surroundings = surroundings
        self._maximum = config.rollout.max_workers or config.rollout.workers
        self._start_s = config.cluster.deadlines.start_s
        self._failures_left = config.cluster.worker_replacements
        self._candidate: _Candidate | None = None
        self._refused: set[str] = set()

    def renew(self) -> bool:
        """Let workers leave and join. It waits for nobody: who has not started yet joins another time.

        Returns:
            Whether anybody has left or joined.
        """
        before = [member.name for member in self._pool.members]
        draining = self._surroundings.draining()
        self._let_leave(draining)
        self._let_join()
        staying = [member for member in self._pool.members if member.node_id not in draining]
        wanted = len(staying) < self._maximum and self._failures_left > 0
        if self._candidate is None and wanted:
            place = self._places.another()
            if place is not None:
                member = self._pool.make(place)
                self._candidate = _Candidate(member, member.handle.status.remote())
                _LOG.info("the cluster has room for %s; it starts", member.name)
        elif not wanted:
            self._places.enough()
        present = {member.name: str(member.node_id) for member in self._pool.members}
        self._surroundings.note(present)
        return list(present) != before

    def stop(self) -> None:
        """Give up what has been asked for."""
        if self._candidate is not None:
            self._give_up(self._candidate.member)
            self._candidate = None
        self._places.enough()

    def _let_leave(self, draining: set[str]) -> None:
        requested = leaving(self._surroundings.leaving)
        found: set[str] = set()
        for member in self._pool.members:
            named = requested & {member.name, self._pool.name_of(member.index)}
            found |= named
            if not named and member.node_id not in draining:
                continue
            if not self._pool.may_shrink:
                if named or member.name not in self._refused:
                    _LOG.warning("%s stays: the run needs rollout.min_workers, and has no more", member.name)
                self._refused.add(member.name)
                continue
            self._pool.dismiss(member)
            self._maximum -= bool(named)  # or another would soon be in its place
            _LOG.info("%s leaves: %s", member.name, "as asked for" if named else "its node is being drained")
        for name in requested:
            if name not in found:
                _LOG.warning("%s shall leave, but there is no such worker", name)
            (self._surroundings.leaving / name).unlink()

    def _let_join(self) -> None:
        candidate = self._candidate
        if candidate is None:
            return
        ready, _ = ray.wait([candidate.started], timeout=0)
        late = monotonic() - candidate.member.asked > self._start_s
        if not ready and not late:
            return
        self._candidate = None
        try:
            candidate.member.met(ray.get(candidate.started, timeout=0))
        except Exception as error:  # noqa: BLE001 - the supervision boundary: the run goes on without it
            self._failures_left -= 1
            _LOG.warning("%s did not start: %s", candidate.member.name, first_line(error))
            self._give_up(candidate.member)
        else:
            self._pool.join(candidate.member)
            _LOG.info("%s joins", candidate.member.name)

    def _give_up(self, member: Member) -> None:
        ray.kill(member.handle, no_restart=True)
        self._places.give_back(member.index)


def ask_to_leave(directory: RunDirectory, name: str) -> None:
    """Have a rollout worker leave a run after its batch.

    Args:
        directory: The run's.
        name: The worker's name, as in workers.json, or its place's.

    Raises:
        UserError: If it is no rollout worker's name, or nobody would hear of the wish.
    """
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no rollout worker",
            where="rondo workers drain",
            next_step="name one as in the run's workers.json, such as rollout-2; no others can leave a run",
        )
    if not is_running(directory):
        raise UserError(
            "no process is running this run, so that nobody can leave it",
            where=str(directory.root),
            next_step=f"go on with it by `rondo resume {directory.root}`; `rondo status` shows how far it is",
        )
    found = read_json(directory.workers, list[str], next_step="wait for it") if directory.workers.exists() else []
    rollouts = [worker for worker in found if _NAME.fullmatch(worker)]
    if name not in {place for worker in rollouts for place in (worker, worker.partition(".")[0])}:
        raise UserError(
            f"the run has no rollout worker {name!r}; it has {', '.join(rollouts) or 'none yet'}",
            where=str(directory.workers),
            next_step="name one of these",
        )
    directory.leaving.mkdir(exist_ok=True)
    write_text(directory.leaving / name, "")


def leaving(directory: Path) -> set[str]:
    """Name the workers that shall leave."""
    return {path.name for path in directory.iterdir() if _NAME.fullmatch(path.name)} if directory.is_dir() else set()
