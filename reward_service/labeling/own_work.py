"""What labelers see of their own work: how much, how fast. Nobody else is shown this."""

import statistics
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from reward_service.preferences.records import Label

ACTIVE_S = 600.0
"""Who answered within this is taken to be at work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnWork:
    """One labeler's figures, ready to be shown."""

    today: int
    total: int
    median: str
    ties: str
    skips: int
    remaining: str
    """How long the rest takes at this pace, shared by those who are at work; empty where that is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    submitted_at: float
    seconds: float
    verdict: str


class OwnWorkBook:
    """Counts as labels come in, so that no request reads all labels of a labeler again.

    Args:
        labels_of: The standing labels of a labeler; asked once for each.
    """

    def __init__(self, labels_of: Callable[[str], Iterable[Label]]) -> None:
        self._labels_of = labels_of
        self._entries: dict[str, dict[str, _Entry]] = {}
        self._lock = threading.Lock()

    def add(self, label: Label) -> None:
        """Count a label that was recorded; a correction takes the place of what it corrects."""
        entries = self._of(label.labeler_id)
        with self._lock:
            if label.supersedes is not None:
                entries.pop(label.supersedes, None)
            entries[label.label_id] = _entry(label)

    def count(self, labeler_id: str) -> int:
        """Return how many answers of a labeler stand."""
        return len(self._of(labeler_id))

    def figures(self, labeler_id: str, *, tasks_left: int, now: float) -> OwnWork:
        """Return one labeler's figures.

        Args:
            labeler_id: Whose.
            tasks_left: Tasks that still want answers.
            now: Seconds since the epoch.
        """
        self._of(labeler_id)
        with self._lock:
            entries = list(self._entries[labeler_id].values())
            at_work = sum(_last(one.values()) > now - ACTIVE_S for one in self._entries.values())
        judged = [entry for entry in entries if entry.verdict != "skip"]
        pace = statistics.median([entry.seconds for entry in judged]) if judged else None
        midnight = time.mktime((*time.localtime(now)[:3], 0, 0, 0, 0, 0, -1))
        ties = sum(entry.verdict == "tie" for entry in judged)
        return OwnWork(
            today=sum(entry.submitted_at >= midnight for entry in entries),
            total=len(entries),
            median="–" if pace is None else duration(pace),
            ties=f"{ties / len(judged):.0%}" if judged else "–",
            skips=len(entries) - len(judged),
            remaining="" if pace is None or not tasks_left else duration(pace * tasks_left / max(1, at_work)),
        )

    def _of(self, labeler_id: str) -> dict[str, _Entry]:
        with self._lock:
            known = self._entries.get(labeler_id)
        if known is None:
            read = {label.label_id: _entry(label) for label in self._labels_of(labeler_id)}
            with self._lock:
                known = self._entries.setdefault(labeler_id, read)
        return known


def duration(seconds: float) -> str:
    """Write a duration the way people say it."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if seconds < 3600:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def _entry(label: Label) -> _Entry:
    seconds = max(0.0, label.submitted_at - label.shown_at)
    return _Entry(submitted_at=label.submitted_at, seconds=seconds, verdict=label.outcome.verdict)


def _last(entries: Iterable[_Entry]) -> float:
    return max((entry.submitted_at for entry in entries), default=0.0)
