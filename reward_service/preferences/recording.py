"""Writes labels, and refuses those that do not belong: labels are added and superseded, never changed or removed."""

import json
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import Connection, Row, bindparam, delete, exists, func, insert, select, update

from reward_service.preferences.assignment import live_lease, num_held_by_others
from reward_service.preferences.records import Label, Task, label_from_json, label_to_json, task_from_json
from reward_service.preferences.schema import LABELS, LEASES, QUEUE, TASKS

Refusal = Literal[
    "unknown_task",
    "does_not_fit",
    "id_taken",
    "no_lease",
    "at_overlap",
    "already_judged",
    "supersedes_unknown",
    "supersedes_other",
    "superseded_already",
]
_NO_JUDGEMENT = ("skip", "invalid")

# Made once: building and hashing a statement costs more than SQLite takes to run it.
_LATER = LABELS.alias("later")
_LABEL = select(LABELS).where(LABELS.c.label_id == bindparam("label_id"))
_TASK = (
    select(TASKS.c.body, QUEUE.c.judgements, QUEUE.c.overlap)
    .join(QUEUE, QUEUE.c.task_id == TASKS.c.task_id)
    .where(TASKS.c.task_id == bindparam("task_id"))
)
_STANDING = select(LABELS.c.label_id).where(
    LABELS.c.task_id == bindparam("task_id"),
    LABELS.c.labeler_id == bindparam("labeler_id"),
    LABELS.c.verdict != "invalid",
    ~exists().where(_LATER.c.supersedes == LABELS.c.label_id),
)
_CORRECTIONS = select(func.count()).select_from(LABELS).where(LABELS.c.supersedes == bindparam("label_id"))
_LAST = select(func.coalesce(func.max(LABELS.c.position), 0))
_INSERT = insert(LABELS)
_COUNT = (
    update(QUEUE)
    .where(QUEUE.c.task_id == bindparam("of_task"))
    .values(judgements=QUEUE.c.judgements + bindparam("gained"))
)
_END_LEASE = delete(LEASES).where(
    LEASES.c.labeler_id == bindparam("labeler_id"), LEASES.c.task_id == bindparam("task_id")
)


class LabelRefused(Exception):
    """Report that a label was not recorded.

    Args:
        reason: Which rule it breaks, for programs.
        message: What happened, for people.
    """

    def __init__(self, reason: Refusal, message: str) -> None:
        super().__init__(reason, message)
        self.reason: Refusal = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.message} ({self.reason})"


def add_label(connection: Connection, label: Label, *, now: float, lease_required: bool) -> bool:
    """Record a label and take note of it in the queue; see `PreferenceStore.record`.

    Args:
        connection: Inside a write transaction.
        label: The label.
        now: Seconds since the epoch.
        lease_required: Whether the labeler must hold the task.

    Returns:
        True if it is new, False if it is there already.

    Raises:
        LabelRefused: If it breaks a rule.
    """
    if _is_repeated(connection, label):
        return False
    row = connection.execute(_TASK, {"task_id": label.task_id}).one_or_none()
    if row is None:
        raise LabelRefused("unknown_task", f"there is no task {label.task_id}")
    _check_content(label, task_from_json(json.loads(row.body)))
    _check_history(connection, label)
    has_lease = _check_lease(connection, label, now=now, lease_required=lease_required)
    gained = _counts(label.outcome.verdict) - _superseded_count(connection, label)
    # Whoever holds a live lease has a place; anybody else must leave the places of those who hold one.
    taken = row.judgements + (
        0 if has_lease else num_held_by_others(connection, label.task_id, label.labeler_id, now=now)
    )
    if gained > 0 and taken >= row.overlap:
        raise LabelRefused("at_overlap", f"task {label.task_id} has, or will have, all the judgements it needs")
    _insert(connection, label, now=now)
    connection.execute(_COUNT, {"of_task": label.task_id, "gained": gained})
    connection.execute(_END_LEASE, {"labeler_id": label.labeler_id, "task_id": label.task_id})
    return True


def add_labels(connection: Connection, labels: Sequence[Label], *, now: float, lease_required: bool) -> int:
    """Record several labels; see `add_label`.

    Returns:
        How many were new.
    """
    return sum(add_label(connection, label, now=now, lease_required=lease_required) for label in labels)


def _is_repeated(connection: Connection, label: Label) -> bool:
    found = _label_row(connection, label.label_id)
    if found is None:
        return False
    if _identity(label_from_json(json.loads(found.body))) != _identity(label):
        raise LabelRefused("id_taken", f"there is a different label with the id {label.label_id}")
    return True


def _identity(label: Label) -> dict[str, Any]:
    """Return what must be the same when a label is submitted again: all but the times, which a retry may not know."""
    values = label_to_json(label)
    del values["shown_at"], values["submitted_at"]
    if label.outcome.verdict == "invalid":
        # A labeler may fail in another way at the next attempt.
        del values["outcome"]["reason"], values["presented"], values["note"]
    return json.loads(json.dumps(values))


def _check_content(label: Label, task: Task) -> None:
    try:
        label.check_against(task)
    except ValueError as error:
        raise LabelRefused("does_not_fit", str(error)) from error


def _check_history(connection: Connection, label: Label) -> None:
    if label.supersedes is None:
        standing = connection.execute(_STANDING, {"task_id": label.task_id, "labeler_id": label.labeler_id}).first()
        if standing is not None and label.outcome.verdict != "invalid":
            raise LabelRefused(
                "already_judged",
                f"{label.labeler_id} has judged task {label.task_id}; a correction names what it corrects",
            )
        return
    target = _label_row(connection, label.supersedes)
    if target is None:
        raise LabelRefused("supersedes_unknown", f"there is no label {label.supersedes} to correct")
    if (target.labeler_id, target.task_id) != (label.labeler_id, label.task_id):
        raise LabelRefused("supersedes_other", f"label {label.supersedes} is somebody else's, or about another task")
    if connection.execute(_CORRECTIONS, {"label_id": label.supersedes}).scalar_one():
        raise LabelRefused("superseded_already", f"label {label.supersedes} has been corrected before")


def _check_lease(connection: Connection, label: Label, *, now: float, lease_required: bool) -> bool:
    lease = live_lease(connection, label.labeler_id, now=now)
    has_lease = lease is not None and lease.task.task_id == label.task_id
    # A correction comes after the lease has ended with the label that it corrects.
    if lease_required and not has_lease and label.supersedes is None:
        raise LabelRefused("no_lease", f"{label.labeler_id} does not hold task {label.task_id} (any more)")
    if lease_required and lease is not None and has_lease and lease.presented != label.presented:
        raise LabelRefused("does_not_fit", "the order shown is not the one that was given out")
    return has_lease


def _superseded_count(connection: Connection, label: Label) -> int:
    if label.supersedes is None:
        return 0
    target = _label_row(connection, label.supersedes)
    return 0 if target is None else _counts(target.verdict)


def _label_row(connection: Connection, label_id: str) -> Row[Any] | None:
    return connection.execute(_LABEL, {"label_id": label_id}).one_or_none()


def _counts(verdict: str) -> int:
    return int(verdict not in _NO_JUDGEMENT)


def _insert(connection: Connection, label: Label, *, now: float) -> None:
    last = connection.execute(_LAST).scalar_one()
    row = {
        "position": last + 1,
        "label_id": label.label_id,
        "task_id": label.task_id,
        "labeler_id": label.labeler_id,
        "verdict": label.outcome.verdict,
        "supersedes": label.supersedes,
        "recorded_at": now,
        "body": json.dumps(label_to_json(label)),
    }
    connection.execute(_INSERT, row)
