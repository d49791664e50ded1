"""The desk between the page and the store: hands out tasks, takes answers, and takes every answer once."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from configs.labels import PeopleConfig
from reward_service.labeling.forms import Answer, flags_of, outcome_of, ratings_of
from reward_service.labeling.own_work import OwnWorkBook
from reward_service.labeling.security import Keeper, Refusal, Ticket
from reward_service.preferences.records import Label, Purpose, Task
from reward_service.preferences.store import LabelRefused, Lease, PreferenceStore

PROGRESS_KEPT_S = 0.5
WORK: tuple[Purpose, ...] = ("training", "evaluation")
TOO_LATE = "The time for this task is over and it went on to somebody else, so this answer was not taken."
ANSWERED = "You have answered this task already, and differently. Undo changes your last answer."


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A task as one labeler sees it now."""

    task: Task
    presented: tuple[str, ...]
    ticket: str
    label_id: str
    shown_at: float
    expires_at: float | None = None
    corrects: Label | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What every label says about the page on which it was given."""

    ui_version: str
    guideline_version: str


class Desk:
    """Hands out tasks and takes answers.

    Args:
        store: Tasks and labels.
        keeper: Makes and checks tickets.
        config: Lease, ratings, flags, and how long a task must be read.
        terms: Goes into every label.
        clock: Seconds since the epoch.
    """

    def __init__(
        self,
        store: PreferenceStore,
        keeper: Keeper,
        *,
        config: PeopleConfig,
        terms: Terms,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._keeper = keeper
        self._config = config
        self._terms = terms
        self._clock = clock
        self._progress: tuple[float, int, int] | None = None
        self._progress_lock = threading.Lock()
        self.book = OwnWorkBook(lambda labeler_id: store.labels(labeler_id=labeler_id))

    def next(self, labeler_id: str) -> Shown | None:
        """Lease the next task, or show again the one that this labeler has.

        After every `check_period` answers comes an attention check, if there is one; nothing about it is different.
        """
        period = self._config.check_period
        turn = period > 0 and (self.book.count(labeler_id) + 1) % (period + 1) == 0
        for purpose in ("check", *WORK) if turn else WORK:
            lease = self._store.next_task(labeler_id, now=self._clock(), lease_s=self._config.lease_s, purpose=purpose)
            if lease is not None:
                return self._shown(lease, labeler_id)
        return None

    def previous(self, labeler_id: str) -> Shown | None:
        """Show the labeler's last answer again, to be corrected; a correction can be corrected as well."""
        last = self._store.last_label(labeler_id)
        if last is None:
            return None
        shown_at = self._clock()
        ticket, label_id = self._keeper.ticket(labeler_id, showing=f"label {last.label_id}", shown_at=shown_at)
        return Shown(
            task=self._store.task(last.task_id),
            presented=last.presented,
            ticket=ticket,
            label_id=label_id,
            shown_at=shown_at,
            corrects=last,
        )

    def submit(self, labeler_id: str, answer: Answer) -> Label:
        """Take an answer.

        The same ticket is the same label, however often it arrives.

        Returns:
            The label that is in the store.

        Raises:
            Refusal: 403 for somebody else's task, 409 where the lease is over or the answer was a different one before,
                422 for an answer that does not fit, 429 for one that came before the task can have been read.
        """
        ticket = self._keeper.read_ticket(answer.ticket, labeler_id=labeler_id)
        shown = self._find(ticket, labeler_id)
        if shown is None:
            return self._repeated(ticket, labeler_id, answer)
        wait = self.read_s(shown)
        if wait > 0.0 and answer.action != "skip":
            raise Refusal(429, "That was fast. Please read a little longer.", retry_after_s=wait, keep=True)
        label = self._label(labeler_id, answer, shown, ticket)
        try:
            recorded = self._store.record(label, now=label.submitted_at, lease_required=shown.corrects is None)
        except LabelRefused as refused:
            raise Refusal(409, ANSWERED if refused.reason == "id_taken" else TOO_LATE) from refused
        if recorded:
            self.book.add(label)
        return label

    def find(self, answer: Answer, labeler_id: str) -> Shown | None:
        """Find the task of an answer that was not taken, if it is still with this labeler."""
        return self._find(self._keeper.read_ticket(answer.ticket, labeler_id=labeler_id), labeler_id)

    def progress(self, *, kept_s: float = PROGRESS_KEPT_S) -> tuple[int, int]:
        """Tell how many tasks are done, and of how many, as of a moment ago; attention checks are no work."""
        now = time.monotonic()
        with self._progress_lock:
            if self._progress is None or now - self._progress[0] >= kept_s:
                counts = [self._store.progress(purpose=purpose) for purpose in WORK]
                done, tasks = sum(one.done for one in counts), sum(one.tasks for one in counts)
                self._progress = (now, done, tasks)
            return self._progress[1:]

    def read_s(self, shown: Shown) -> float:
        """Return how long the task must still be read before an answer is taken."""
        if shown.corrects is not None:
            return 0.0
        return max(0.0, self._config.min_read_s - (self._clock() - shown.shown_at))

    def left_s(self, shown: Shown) -> int:
        """Return how long the task stays with its labeler; 0 where that has no end."""
        return 0 if shown.expires_at is None else max(1, int(shown.expires_at - self._clock()))

    def _find(self, ticket: Ticket, labeler_id: str) -> Shown | None:
        lease = self._store.lease(labeler_id, now=self._clock())
        shown = None if lease is None else self._shown(lease, labeler_id)
        if shown is None or shown.label_id != ticket.label_id:
            shown = self.previous(labeler_id)
        return shown if shown is not None and shown.label_id == ticket.label_id else None

    def _shown(self, lease: Lease, labeler_id: str) -> Shown:
        ticket, label_id = self._keeper.ticket(labeler_id, showing=f"lease {lease.token}", shown_at=lease.leased_at)
        return Shown(
            task=lease.task,
            presented=lease.presented,
            ticket=ticket,
            label_id=label_id,
            shown_at=lease.leased_at,
            expires_at=lease.expires_at,
        )

    def _repeated(self, ticket: Ticket, labeler_id: str, answer: Answer) -> Label:
        """Find the label that this very submit made before, when its acknowledgement may have been lost."""
        for label in reversed(self._store.labels(labeler_id=labeler_id, standing_only=False)):
            if label.label_id == ticket.label_id:
                shown = Shown(
                    task=self._store.task(label.task_id),
                    presented=label.presented,
                    ticket=answer.ticket,
                    label_id=label.label_id,
                    shown_at=label.shown_at,
                )
                again = self._label(labeler_id, answer, shown, ticket)
                if (again.outcome, again.note) != (label.outcome, label.note):
                    raise Refusal(409, ANSWERED)
                return label
        raise Refusal(409, TOO_LATE)

    def _label(self, labeler_id: str, answer: Answer, shown: Shown, ticket: Ticket) -> Label:
        presented = shown.presented
        outcome = outcome_of(answer, kind=shown.task.kind, presented=presented)
        return Label(
            label_id=ticket.label_id,
            task_id=shown.task.task_id,
            labeler_id=labeler_id,
            labeler_kind="person",
            presented=presented,
            outcome=outcome,
            ratings=ratings_of(answer, presented=presented, asked=self._config.ask_ratings),
            flags=flags_of(answer, presented=presented, known=self._config.flags),
            note=answer.note,
            shown_at=ticket.shown_at_ms / 1000,
            submitted_at=self._clock(),
            ui_version=self._terms.ui_version,
            guideline_version=self._terms.guideline_version,
            supersedes=None if shown.corrects is None else shown.corrects.label_id,
        )
