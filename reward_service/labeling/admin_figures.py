"""What admins see in numbers: backlog, agreement, time, and each labeler against the others."""

import statistics
import threading
import time
from dataclasses import dataclass
from typing import get_args

from reward_service.labeling.own_work import duration
from reward_service.preferences.agreement import AgreementReport, LabelerReport, agreement_report
from reward_service.preferences.records import Progress, Purpose
from reward_service.preferences.store import Labeler, PreferenceStore

KEPT_S = 5.0
NONE = "–"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One number of the overview."""

    name: str
    value: str
    fine: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BacklogRow:
    """The tasks of one round for one purpose."""

    round: int
    purpose: Purpose
    progress: Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonRow:
    """Somebody who was invited."""

    labeler_id: str
    name: str
    role: str
    disabled: bool
    answers: int
    median: str
    ties: str
    skips: int
    consensus: str
    checks: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """All of it, at one moment."""

    made_at: str
    tiles: tuple[Tile, ...]
    backlog: tuple[BacklogRow, ...]
    people: tuple[PersonRow, ...]


class AdminFigures:
    """Reads the figures from the store, at most once in a few seconds.

    Args:
        store: Tasks, labels and labelers.
    """

    def __init__(self, store: PreferenceStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._kept: tuple[float, AgreementReport, tuple[BacklogRow, ...], dict[str, float], str] | None = None

    def read(self) -> Figures:
        """Return the figures; who was invited is always as of now."""
        with self._lock:
            if self._kept is None or time.monotonic() - self._kept[0] > KEPT_S:
                self._kept = (time.monotonic(), *self._count())
            _, report, backlog, ties, made_at = self._kept
        reports = {one.labeler_id: one for one in report.labelers}
        people = tuple(
            _person(labeler, reports.get(labeler.labeler_id), ties.get(labeler.labeler_id))
            for labeler in self._store.labelers()
        )
        return Figures(made_at=made_at, tiles=_tiles(report, backlog), backlog=backlog, people=people)

    def _count(self) -> tuple[AgreementReport, tuple[BacklogRow, ...], dict[str, float], str]:
        labeled = self._store.labeled()
        rounds = sorted({task.round for task in self._store.tasks()})
        rows = [
            BacklogRow(round=number, purpose=purpose, progress=self._store.progress(round=number, purpose=purpose))
            for number in rounds
            for purpose in get_args(Purpose)
        ]
        said: dict[str, list[bool]] = {}
        for one in labeled:
            for label in one.labels:
                if label.outcome.verdict not in ("skip", "invalid"):
                    said.setdefault(label.labeler_id, []).append(label.outcome.verdict == "tie")
        ties = {labeler: statistics.fmean(verdicts) for labeler, verdicts in said.items()}
        made_at = time.strftime("%H:%M:%S")
        return agreement_report(labeled), tuple(row for row in rows if row.progress.tasks), ties, made_at


def _tiles(report: AgreementReport, backlog: tuple[BacklogRow, ...]) -> tuple[Tile, ...]:
    tasks = sum(row.progress.tasks for row in backlog)
    done = sum(row.progress.done for row in backlog)
    kappas = [pair.kappa for pair in report.pairs if pair.kappa is not None]
    checks = sum(one.num_checks for one in report.labelers)
    passed = sum(one.checks_passed for one in report.labelers)
    return (
        Tile(name="Tasks left", value=str(tasks - done), fine=f"of {tasks}"),
        Tile(name="Agreement", value=_percent(report.percent), fine=f"on {report.num_shared} shared pairs"),
        Tile(
            name="Cohen's kappa",
            value=_number(statistics.fmean(kappas) if kappas else None),
            fine=f"mean over {len(kappas)} couples of labelers",
        ),
        Tile(
            name="Krippendorff's alpha",
            value=_number(report.alpha_nominal),
            fine=f"ordinal {_number(report.alpha_ordinal)}",
        ),
        Tile(name="Median time", value=_seconds(report.median_s), fine="a task"),
        Tile(name="Checks passed", value=_percent(passed / checks if checks else None), fine=f"{passed} of {checks}"),
    )


def _person(labeler: Labeler, report: LabelerReport | None, ties: float | None) -> PersonRow:
    return PersonRow(
        labeler_id=labeler.labeler_id,
        name=labeler.display_name,
        role=labeler.role,
        disabled=labeler.disabled,
        answers=0 if report is None else report.num_judgements,
        median=_seconds(None if report is None else report.median_s),
        ties=_percent(ties),
        skips=0 if report is None else report.num_skips,
        consensus=NONE
        if report is None or report.consensus is None
        else f"{report.consensus:.0%} of {report.num_consensus}",
        checks=NONE if report is None or not report.num_checks else f"{report.checks_passed} of {report.num_checks}",
    )


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{share:.0%}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _seconds(value: float | None) -> str:
    return NONE if value is None else duration(value)
