"""Who is asked about what: leases, which keep two people from judging the same task without need."""

import json
import random
import secrets
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Select, bindparam, delete, exists, func, insert, or_, select, update

from reward_service.preferences.records import Purpose, Task, stable_id, task_from_json
from reward_service.preferences.schema import LABELERS, LABELS, LEASES, QUEUE, TASKS

PRECEDENCE: dict[Purpose, int] = {"training": 0, "evaluation": 1, "check": 2}
"""Attention checks come last, since whoever hands out tasks asks for them by purpose."""

# Made once: building and hashing a statement costs more than SQLite takes to run it.
_LIVE = (
    select(LEASES, TASKS.c.body)
    .join(TASKS, TASKS.c.task_id == LEASES.c.task_id)
    .where(LEASES.c.labeler_id == bindparam("labeler_id"), LEASES.c.expires_at > bindparam("now"))
)
_HELD_BY_OTHERS = (
    select(func.count())
    .select_from(LEASES)
    .where(
        LEASES.c.task_id == bindparam("task_id"),
        LEASES.c.labeler_id != bindparam("labeler_id"),
        LEASES.c.expires_at > bindparam("now"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A task that one labeler looks at; until it expires nobody else takes the place."""

    task: Task
    presented: tuple[str, ...]
    """Candidate ids in the order to show; the same for the same task and labeler, however often it is asked for."""
    leased_at: float
    """When the labeler was first shown the task under this lease."""
    expires_at: float
    token: str
    """Random; a page carries it to prove that it shows this lease."""


def presented_order(task: Task, labeler_id: str) -> tuple[str, ...]:
    """Shuffle the candidates of a task, by a seed made of the task and the labeler.

    Returns:
        Candidate ids; every order is equally likely over labelers and tasks.
    """
    order = [candidate.candidate_id for candidate in task.candidates]
    random.Random(stable_id("presented", task.task_id, labeler_id)).shuffle(order)
    return tuple(order)


def live_lease(connection: Connection, labeler_id: str, *, now: float) -> Lease | None:
    """Read the lease that a labeler holds, if it has not expired."""
    found = connection.execute(_LIVE, {"labeler_id": labeler_id, "now": now}).one_or_none()
    if found is None:
        return None
    return Lease(
        task=task_from_json(json.loads(found.body)),
        presented=tuple(json.loads(found.presented)),
        leased_at=found.leased_at,
        expires_at=found.expires_at,
        token=found.token,
    )


def next_lease(
    connection: Connection, labeler_id: str, *, now: float, lease_s: float, round: int | None, purpose: Purpose | None
) -> Lease | None:
    """Prolong the lease that a labeler holds, or give out one on the next open task; see `PreferenceStore.next_task`.

    Args:
        connection: Inside a write transaction.
        labeler_id: Who asks.
        now: Seconds since the epoch.
        lease_s: How long the lease is to last from now.
        round: Only tasks of this round.
        purpose: Only tasks for this purpose.
    """
    held = live_lease(connection, labeler_id, now=now)
    if held is not None:
        expires_at = max(held.expires_at, now + lease_s)
        connection.execute(update(LEASES).where(LEASES.c.labeler_id == labeler_id).values(expires_at=expires_at))
        return live_lease(connection, labeler_id, now=now)
    body = _first_open(connection, labeler_id, now=now, round=round, purpose=purpose)
    if body is None:
        return None
    task = task_from_json(json.loads(body))
    connection.execute(delete(LEASES).where(LEASES.c.labeler_id == labeler_id))
    connection.execute(
        insert(LEASES).values(
            labeler_id=labeler_id,
            task_id=task.task_id,
            presented=json.dumps(presented_order(task, labeler_id)),
            leased_at=now,
            expires_at=now + lease_s,
            token=secrets.token_urlsafe(16),
        )
    )
    return live_lease(connection, labeler_id, now=now)


def num_takeable(connection: Connection, *, round: int | None, purpose: Purpose | None) -> int:
    """Count the open tasks that somebody who is invited has not seen; all open ones while nobody is invited."""
    enabled = select(LABELERS.c.labeler_id).where(LABELERS.c.disabled_at.is_(None))
    seen = exists().where(
        LABELS.c.task_id == QUEUE.c.task_id, LABELS.c.labeler_id == LABELERS.c.labeler_id, LABELS.c.verdict != "invalid"
    )
    fresh = exists().where(LABELERS.c.disabled_at.is_(None), ~seen)
    query = select(func.count()).select_from(TASKS).join(QUEUE, QUEUE.c.task_id == TASKS.c.task_id)
    query = query.where(QUEUE.c.judgements < QUEUE.c.overlap, or_(fresh, ~exists(enabled)))
    return connection.execute(_of_kind(query, round=round, purpose=purpose)).scalar_one()


def close_open(connection: Connection, *, round: int, purpose: Purpose) -> None:
    """Hand tasks out no more: what they would say comes too late for the run.

    Those that are done are closed too: a later correction to a skip would take a judgement back and open them again.
    """
    those = _of_kind(select(TASKS.c.task_id), round=round, purpose=purpose)
    connection.execute(update(QUEUE).where(QUEUE.c.task_id.in_(those)).values(overlap=0))


def _of_kind(query: Select[Any], *, round: int | None, purpose: Purpose | None) -> Select[Any]:
    if round is not None:
        query = query.where(TASKS.c.round == round)
    return query if purpose is None else query.where(TASKS.c.purpose == purpose)


def num_held_by_others(connection: Connection, task_id: str, labeler_id: str, *, now: float) -> int:
    """Count the live leases that others hold on a task."""
    values = {"task_id": task_id, "labeler_id": labeler_id, "now": now}
    return connection.execute(_HELD_BY_OTHERS, values).scalar_one()


def _first_open(
    connection: Connection, labeler_id: str, *, now: float, round: int | None, purpose: Purpose | None
) -> str | None:
    held = (
        select(func.count())
        .select_from(LEASES)
        .where(LEASES.c.task_id == QUEUE.c.task_id, LEASES.c.labeler_id != labeler_id, LEASES.c.expires_at > now)
        .scalar_subquery()
    )
    seen = exists().where(
        LABELS.c.task_id == QUEUE.c.task_id, LABELS.c.labeler_id == labeler_id, LABELS.c.verdict != "invalid"
    )
    query = (
        select(TASKS.c.body)
        .join(QUEUE, QUEUE.c.task_id == TASKS.c.task_id)
        .where(QUEUE.c.judgements < QUEUE.c.overlap, QUEUE.c.judgements + held < QUEUE.c.overlap, ~seen)
        .order_by(QUEUE.c.precedence, QUEUE.c.judgements, QUEUE.c.position)
        .limit(1)
    )
    if round is not None:
        query = query.where(TASKS.c.round == round)
    if purpose is not None:
        query = query.where(TASKS.c.purpose == purpose)
    return connection.execute(query).scalar_one_or_none()
