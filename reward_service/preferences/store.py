"""The preference store: tasks, the labels they got, and who is asked next. Records are only ever added.

One database holds one run. Several processes of one machine may open the same SQLite file (the driver and the server of
the labeling page do); processes of several machines share a PostgreSQL database.
"""

import json
import sqlite3
import time
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import Select, case, delete, exists, func, select

from protocol.files import staged
from reward_service.preferences import assignment, people, recording, task_rows
from reward_service.preferences.assignment import Lease, presented_order
from reward_service.preferences.database import Database
from reward_service.preferences.native import write_jsonl
from reward_service.preferences.people import AuditEntry, Labeler, Role
from reward_service.preferences.recording import LabelRefused
from reward_service.preferences.records import (
    Label,
    LabeledTask,
    Progress,
    Purpose,
    Task,
    label_from_json,
    task_from_json,
)
from reward_service.preferences.schema import LABELS, LEASES, QUEUE, TASKS

__all__ = ["AuditEntry", "LabelRefused", "Labeler", "Lease", "PreferenceStore", "presented_order"]


_Query = TypeVar("_Query", bound=Select[*tuple[Any, ...]])


class PreferenceStore:
    """Tasks and labels in a database; make one with `PreferenceStore.open`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @classmethod
    def open(cls, url: str, *, create: bool = True) -> Self:
        """Open a store, and bring its tables up to date.

        Args:
            url: `sqlite:///path` (four slashes for an absolute path) or `postgresql+psycopg://user:password@host/name`.
            create: Whether to make a store where there is none.

        Raises:
            UserError: If it cannot be opened, or there is none and `create` is False.
        """
        return cls(Database(url, create=create))

    def close(self) -> None:
        """Close all connections."""
        self._database.engine.dispose()

    def add_tasks(self, tasks: Sequence[Task]) -> int:
        """Add tasks, all in one transaction; a task that is there already is left as it is.

        Returns:
            How many were new.

        Raises:
            UserError: If a different task has the same id; nothing is added then.
        """
        with self._database.writing() as connection:
            return task_rows.add(connection, tasks, place=self._database.place)

    def add_labeled(self, tasks: Sequence[Task], labels: Sequence[Label], *, now: float) -> tuple[int, int]:
        """Add tasks and record their labels in one transaction, everything or nothing.

        Returns:
            How many tasks and how many labels were new.

        Raises:
            UserError: As `add_tasks` does.
            LabelRefused: As `record` does.
        """
        with self._database.writing() as connection:
            added = task_rows.add(connection, tasks, place=self._database.place)
            return added, recording.add_labels(connection, labels, now=now, lease_required=False)

    def task(self, task_id: str) -> Task:
        """Find a task.

        Raises:
            KeyError: If there is none.
        """
        with self._database.reading() as connection:
            bodies = task_rows.bodies(connection, [task_id])
        return task_from_json(json.loads(bodies[task_id]))

    def tasks(self, *, round: int | None = None, purpose: Purpose | None = None) -> list[Task]:
        """List tasks in the order in which they were added."""
        with self._database.reading() as connection:
            found = connection.execute(
                _of(select(TASKS.c.body), round=round, purpose=purpose).order_by(TASKS.c.position)
            ).scalars()
            return [task_from_json(json.loads(body)) for body in found]

    def next_task(
        self, labeler_id: str, *, now: float, lease_s: float, round: int | None = None, purpose: Purpose | None = None
    ) -> Lease | None:
        """Lease a task to a labeler: the one that they hold already, else the next one that needs judgements.

        A task is open to a labeler who has neither judged nor skipped it, if judgements + live leases of others <
        overlap. Open tasks come by purpose (training, evaluation, check), those with fewest judgements first, then in
        the order in which they were added. A lease that is held is prolonged to `now + lease_s`.

        Args:
            labeler_id: Who asks.
            now: Seconds since the epoch.
            lease_s: How long the lease lasts from now.
            round: Only tasks of this round.
            purpose: Only tasks for this purpose. Neither limits a lease that is held already.

        Returns:
            The lease, or None if nothing is left for this labeler now.
        """
        with self._database.writing() as connection:
            return assignment.next_lease(connection, labeler_id, now=now, lease_s=lease_s, round=round, purpose=purpose)

    def lease(self, labeler_id: str, *, now: float) -> Lease | None:
        """Return the live lease of a labeler, unchanged."""
        with self._database.reading() as connection:
            return assignment.live_lease(connection, labeler_id, now=now)

    def release(self, labeler_id: str, task_id: str) -> None:
        """Give a leased task back; nothing happens if it is not held."""
        with self._database.writing() as connection:
            connection.execute(delete(LEASES).where(LEASES.c.labeler_id == labeler_id, LEASES.c.task_id == task_id))

    def record(self, label: Label, *, now: float, lease_required: bool = False) -> bool:
        """Record a label, durably once this returns. It ends the labeler's lease on the task.

        The same label again (whatever its times say) is no error. A correction or an undo is a new label that
        supersedes the old one; it needs no lease. An invalid label is no judgement and does not bar a later one.

        Args:
            label: The label.
            now: Seconds since the epoch.
            lease_required: Whether to refuse a labeler who holds no live lease on the task, or shows another order
                than the one given out.

        Returns:
            True if it is new, False if it is there already.

        Raises:
            LabelRefused: With a `reason`: unknown_task; does_not_fit (the task); id_taken (by a different label);
                no_lease; at_overlap (counting live leases of others, unless the labeler has a lease); already_judged
                (by this labeler, and it supersedes nothing); supersedes_unknown; supersedes_other (labeler or task);
                superseded_already.
        """
        return self.record_all([label], now=now, lease_required=lease_required) == 1

    def record_all(self, labels: Sequence[Label], *, now: float, lease_required: bool = False) -> int:
        """Record several labels in one transaction, all or, if one is refused, none; see `record`.

        Returns:
            How many were new.
        """
        with self._database.writing() as connection:
            return recording.add_labels(connection, labels, now=now, lease_required=lease_required)

    def labels(
        self,
        *,
        round: int | None = None,
        purpose: Purpose | None = None,
        labeler_id: str | None = None,
        standing_only: bool = True,
        up_to: int | None = None,
    ) -> list[Label]:
        """List labels in the order in which they were recorded.

        Args:
            round: Only for tasks of this round.
            purpose: Only for tasks for this purpose.
            labeler_id: Only of this labeler.
            standing_only: Leave out what has been superseded.
            up_to: As the store was at this high-water mark.
        """
        query = select(LABELS.c.body).join(TASKS, TASKS.c.task_id == LABELS.c.task_id).order_by(LABELS.c.position)
        query = _of(query, round=round, purpose=purpose)
        if labeler_id is not None:
            query = query.where(LABELS.c.labeler_id == labeler_id)
        if up_to is not None:
            query = query.where(LABELS.c.position <= up_to)
        if standing_only:
            query = query.where(_standing(up_to))
        with self._database.reading() as connection:
            return [label_from_json(json.loads(body)) for body in connection.execute(query).scalars()]

    def labeled(
        self, *, round: int | None = None, purpose: Purpose | None = None, up_to: int | None = None
    ) -> list[LabeledTask]:
        """List the tasks that have standing labels, in the order of the tasks, each with its labels, oldest first."""
        query = (
            select(TASKS.c.position, TASKS.c.body.label("task"), LABELS.c.body.label("label"))
            .join(LABELS, TASKS.c.task_id == LABELS.c.task_id)
            .where(_standing(up_to))
            .order_by(TASKS.c.position, LABELS.c.position)
        )
        if up_to is not None:
            query = query.where(LABELS.c.position <= up_to)
        with self._database.reading() as connection:
            found = connection.execute(_of(query, round=round, purpose=purpose)).all()
        labeled: list[LabeledTask] = []
        for _, rows in groupby(found, key=lambda row: row.position):
            group = list(rows)
            labels = tuple(label_from_json(json.loads(row.label)) for row in group)
            labeled.append(LabeledTask(task=task_from_json(json.loads(group[0].task)), labels=labels))
        return labeled

    def progress(self, *, round: int | None = None, purpose: Purpose | None = None) -> Progress:
        """Count tasks and standing labels, in the database."""
        done = func.coalesce(func.sum(case((QUEUE.c.judgements >= QUEUE.c.overlap, 1), else_=0)), 0)
        tasks = select(func.count(), done).select_from(TASKS).join(QUEUE, QUEUE.c.task_id == TASKS.c.task_id)
        verdicts = (
            select(LABELS.c.verdict, func.count())
            .join(TASKS, TASKS.c.task_id == LABELS.c.task_id)
            .where(_standing(None))
            .group_by(LABELS.c.verdict)
        )
        with self._database.reading() as connection:
            num_tasks, num_done = connection.execute(_of(tasks, round=round, purpose=purpose)).one()
            found = connection.execute(_of(verdicts, round=round, purpose=purpose)).all()
        counts: dict[str, int] = {row[0]: row[1] for row in found}
        said = {verdict: counts.get(verdict, 0) for verdict in ("preference", "tie", "both_bad")}
        return Progress(
            tasks=num_tasks,
            done=num_done,
            judgements=sum(said.values()),
            preferences=said["preference"],
            ties=said["tie"],
            both_bad=said["both_bad"],
            skips=counts.get("skip", 0),
            invalid=counts.get("invalid", 0),
        )

    def num_takeable(self, *, round: int | None = None, purpose: Purpose | None = None) -> int:
        """Count open tasks that some invited labeler has not judged or skipped; all of them while nobody is invited."""
        with self._database.reading() as connection:
            return assignment.num_takeable(connection, round=round, purpose=purpose)

    def close_open(self, *, round: int, purpose: Purpose) -> None:
        """Hand the tasks of a round out no more, whatever is corrected later: the run has gone on without them."""
        with self._database.writing() as connection:
            assignment.close_open(connection, round=round, purpose=purpose)

    def claim(self, run_id: str) -> None:
        """Say whose store this is, or raise UserError: labels of two runs must not mix."""
        with self._database.writing() as connection:
            people.claim(connection, run_id, now=time.time())

    def last_label(self, labeler_id: str) -> Label | None:
        """Return the newest standing label of a labeler, which is what an undo supersedes."""
        query = select(LABELS.c.body).where(LABELS.c.labeler_id == labeler_id, _standing(None))
        with self._database.reading() as connection:
            body = connection.execute(query.order_by(LABELS.c.position.desc()).limit(1)).scalar_one_or_none()
        return None if body is None else label_from_json(json.loads(body))

    def add_labeler(
        self, labeler_id: str, *, display_name: str, token_hash: str, role: Role = "labeler", now: float
    ) -> Labeler:
        """Invite somebody. A name, in whatever case, is one person.

        Returns:
            Who was added; or who has this name already, under their old id and role, enabled and with the new token in
            place of the old one.

        Raises:
            UserError: If the id or the token is in use.
        """
        with self._database.writing() as connection:
            return people.insert_labeler(
                connection, labeler_id, display_name=display_name, token_hash=token_hash, role=role, now=now
            )

    def labeler_by_token_hash(self, token_hash: str) -> Labeler | None:
        """Find whose invitation hashes to this; None if nobody's, or if that labeler is disabled."""
        with self._database.reading() as connection:
            return people.labeler_by_token_hash(connection, token_hash)

    def labelers(self) -> list[Labeler]:
        """List everybody who was invited, disabled ones too, in the order in which they were added."""
        with self._database.reading() as connection:
            return people.all_labelers(connection)

    def disable_labeler(self, labeler_id: str, *, now: float | None = None) -> None:
        """End a labeler's access and give back what they hold; their labels stay.

        Raises:
            UserError: If there is no such labeler.
        """
        with self._database.writing() as connection:
            people.disable(connection, labeler_id, now=time.time() if now is None else now)

    def audit(self, event: str, *, labeler_id: str | None, details: Mapping[str, Any], now: float) -> None:
        """Add a line to the audit log."""
        with self._database.writing() as connection:
            people.insert_audit(connection, event, labeler_id=labeler_id, details=details, now=now)

    def audit_entries(self, *, last: int = 1000) -> list[AuditEntry]:
        """Read the newest lines of the audit log, oldest first."""
        with self._database.reading() as connection:
            return people.audit_entries(connection, last=last)

    def high_water_mark(self) -> int:
        """Return how many labels there are; `labels(up_to=mark)` later gives what they were at this moment."""
        with self._database.reading() as connection:
            return connection.execute(select(func.coalesce(func.max(LABELS.c.position), 0))).scalar_one()

    def snapshot(self, path: Path) -> None:
        """Write a copy of the store as it is now, while others go on, whole or not at all.

        SQLite gives a database file; PostgreSQL a JSONL export of tasks and labels (its own tools back up the rest).

        Args:
            path: The file; replaced if it exists.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged(path) as staging:
            if self._database.is_sqlite:
                self._vacuum_into(staging)
            else:
                # The lock stops writers, so that tasks and labels are of one moment.
                with self._database.writing():
                    write_jsonl(staging, self.tasks(), self.labels(standing_only=False))

    def _vacuum_into(self, path: Path) -> None:
        pooled = self._database.engine.raw_connection()
        try:
            driver = pooled.driver_connection
            assert isinstance(driver, sqlite3.Connection)
            driver.execute("VACUUM INTO ?", (str(path),))
        finally:
            pooled.close()


def _of(query: _Query, *, round: int | None, purpose: Purpose | None) -> _Query:
    if round is not None:
        query = query.where(TASKS.c.round == round)
    if purpose is not None:
        query = query.where(TASKS.c.purpose == purpose)
    return query


def _standing(up_to: int | None) -> Any:
    """The condition that no label (recorded up to a mark) supersedes this one."""
    later = LABELS.alias("later")
    superseded = later.c.supersedes == LABELS.c.label_id
    return ~exists().where(superseded if up_to is None else superseded & (later.c.position <= up_to))
