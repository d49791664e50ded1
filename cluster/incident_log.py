"""A run's incidents: a record each under `incidents/`, and a line each on the terminal."""

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cluster.schedule import RunState
from protocol.errors import StorageError
from protocol.incidents import Incident, write

_LOG = logging.getLogger(__name__)


class IncidentLog:
    """Keeps incidents and says where in the run they happened.

    Args:
        directory: The run's `incidents/`.
        say: Takes lines for people.
    """

    def __init__(self, directory: Path, *, say: Callable[[str], None]) -> None:
        self._directory = directory
        self._say = say
        self._unreadable: set[Path] = set()
        self._known = self._files()
        self.state = RunState()
        """Where the run stands."""

    def at(self, state: RunState) -> None:
        """Take note of where the run stands."""
        self.state = state

    def __call__(self, incident: Incident) -> None:
        """Keep an incident."""
        state = self.state
        placed = replace(incident, round=state.round, iteration=state.iteration, policy_version=state.policy_version)
        try:
            path = write(self._directory, placed)
            self._known |= {_identity(path)}
            where = _place(path)
        except (OSError, StorageError) as error:
            # The disk may be the very thing that is wrong; what happened is said all the same.
            where = f"no record of it could be written: {error}; cause: {placed.cause}"
        self._tell(placed.what, placed.action, where)

    def look(self) -> None:
        """Say what workers have kept by themselves since the last look: refused batches, skipped steps, rewards."""
        found = self._files()
        for path, _ in sorted(found - self._known):
            try:
                record = json.loads(path.read_bytes())
                what, action = str(record["what"]), str(record["action"])
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                _LOG.warning("%s is passed over: it is no incident's record: %r", path, error)
            else:
                self._tell(what, action, _place(path))
        self._known = found

    def _files(self) -> set[tuple[Path, int]]:
        found: set[tuple[Path, int]] = set()
        for path in self._directory.glob("*.json"):
            try:
                found.add(_identity(path))
            except OSError as error:  # also one that is gone by now
                if path not in self._unreadable:
                    _LOG.warning("%s is passed over: %s", path, error)
                self._unreadable.add(path)
        return found

    def _tell(self, what: str, action: str, where: str) -> None:
        self._say(f"incident: {what}; {action} ({where})")


def _identity(path: Path) -> tuple[Path, int]:
    """Tell a file from one that takes its name later: a repeated iteration may fail again."""
    return path, path.stat().st_mtime_ns


def _place(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"
