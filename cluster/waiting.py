"""Waiting for people: without holding a worker, saying what is missing, and for as long as the configuration says."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from configs.labels import PeopleConfig
from protocol.errors import Resumable
from protocol.files import write_json
from reward_service.preferences.records import Progress


class NotLabelledYetError(Resumable):
    """People have not labelled enough in the time that was given; the run can go on when they have."""


class Tasks(Protocol):
    """Says how far some tasks are."""

    def __call__(self) -> Progress:
        """Count them now."""
        ...


def wait_for_people(
    progress: Tasks,
    people: PeopleConfig,
    *,
    takeable: Callable[[], int],
    what: str,
    begun: Path,
    say: Callable[[str], None],
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.time,
) -> Progress:
    """Wait until enough tasks are done, or for as long as `max_wait_s` allows, counted over restarts.

    Args:
        progress: Counts the tasks.
        people: How many are enough, how long to wait, and what then.
        takeable: Counts the open tasks that somebody may still take: not those that everybody has skipped.
        what: What is waited for, for people to read.
        begun: A file that keeps when the waiting began.
        say: Takes a line whenever something has changed.
        sleep: Passes the time between two looks.
        now: Seconds since the epoch.

    Returns:
        How far the tasks are.

    Raises:
        NotLabelledYetError: If the time is over and `on_timeout` is `stop`.
    """
    if not begun.exists():
        write_json(begun, {"since": now()})
    since = float(json.loads(begun.read_text())["since"])
    last = -1
    while True:
        found = progress()
        wanted = found.tasks if people.min_labels is None else min(people.min_labels, found.tasks)
        if found.done >= wanted:
            return found
        if takeable() == 0:
            return _over(
                found, wanted, people, begun, why="nobody is left who could take the others", what=what, say=say
            )
        if found.done != last:
            say(f"waiting for people: {what}: {found.done} of {wanted} tasks are done (rondo label serve shows them)")
            last = found.done
        if people.max_wait_s is not None and now() - since >= people.max_wait_s:
            why = f"{people.max_wait_s:g} s are over"
            return _over(found, wanted, people, begun, why=why, what=what, say=say)
        sleep(people.poll_s)


def _over(
    found: Progress, wanted: int, people: PeopleConfig, begun: Path, *, why: str, what: str, say: Callable[[str], None]
) -> Progress:
    """Go on with the labels that are there, or stop; the next start waits anew."""
    begun.unlink()
    sofar = f"{what}: {found.done} of {wanted} tasks are done, and {why}"
    if people.on_timeout == "continue" and found.preferences > 0:
        say(f"{sofar}; going on with these, as on_timeout says")
        return found
    raise NotLabelledYetError(f"{sofar}; the same command waits again and goes on when there are enough")
