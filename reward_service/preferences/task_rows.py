"""Writes tasks into the tables and reads them out, inside a transaction of the store."""

import json
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, func, insert, select

from protocol.errors import UserError
from reward_service.preferences import assignment
from reward_service.preferences.records import Task, task_from_json, task_to_json
from reward_service.preferences.schema import QUEUE, TASKS


def add(connection: Connection, tasks: Sequence[Task], *, place: str) -> int:
    """Add tasks; a task that is there already is left as it is.

    Args:
        connection: Inside a write transaction.
        tasks: The tasks.
        place: The database's name, for the error.

    Returns:
        How many were new.

    Raises:
        UserError: If a different task has the same id.
    """
    known = bodies(connection, [task.task_id for task in tasks])
    position = connection.execute(select(func.coalesce(func.max(TASKS.c.position), 0))).scalar_one()
    rows: list[dict[str, Any]] = []
    for task in tasks:
        body = json.dumps(task_to_json(task))
        if task.task_id not in known:
            known[task.task_id] = body
            rows.append(_row(task, body, position=position + len(rows) + 1))
        elif not _same(known[task.task_id], body):
            raise UserError(f"there is a different task with the id {task.task_id}", where=place)
    for table in (TASKS, QUEUE) if rows else ():
        columns = {column.name for column in table.columns}
        connection.execute(insert(table), [{n: v for n, v in row.items() if n in columns} for row in rows])
    return len(rows)


def bodies(connection: Connection, task_ids: Sequence[str]) -> dict[str, str]:
    """Read tasks by id, as JSON; ids that are not there are left out."""
    found: dict[str, str] = {}
    for start in range(0, len(task_ids), 500):  # a statement takes only so many parameters
        chunk = task_ids[start : start + 500]
        rows = connection.execute(select(TASKS.c.task_id, TASKS.c.body).where(TASKS.c.task_id.in_(chunk)))
        found |= {row.task_id: row.body for row in rows}
    return found


def _row(task: Task, body: str, *, position: int) -> dict[str, Any]:
    return {
        "position": position,
        "task_id": task.task_id,
        "round": task.round,
        "purpose": task.purpose,
        "body": body,
        "precedence": assignment.PRECEDENCE[task.purpose],
        "judgements": 0,
        "overlap": task.overlap,
    }


def _same(kept: str, body: str) -> bool:
    """Compare as records, so that one written before a field was added equals one with the field's default."""
    return task_from_json(json.loads(kept)) == task_from_json(json.loads(body))
