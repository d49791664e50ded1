"""The people who label, and the log of what happened around them, kept in the same database as their labels."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from sqlalchemy import Connection, Row, delete, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from protocol.errors import UserError
from reward_service.preferences.schema import AUDIT, LABELERS, LEASES

Role = Literal["labeler", "admin"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Labeler:
    """Somebody who was invited."""

    labeler_id: str
    """The pseudonym under which labels are kept."""
    display_name: str
    role: Role
    added_at: float
    disabled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """One line of the log."""

    at: float
    event: str
    labeler_id: str | None
    details: Mapping[str, Any]


def insert_labeler(
    connection: Connection, labeler_id: str, *, display_name: str, token_hash: str, role: Role, now: float
) -> Labeler:
    """Add somebody, or give who has this name already a new invitation; see `PreferenceStore.add_labeler`."""
    known = [one for one in all_labelers(connection) if _person(one.display_name) == _person(display_name)]
    if known:
        # Two identities of one name are from before names were looked up.
        found = min(known, key=lambda one: one.disabled)
        _set_token_hash(connection, found.labeler_id, token_hash)
        return replace(found, disabled=False)
    try:
        connection.execute(
            insert(LABELERS).values(
                labeler_id=labeler_id, display_name=display_name, token_hash=token_hash, role=role, added_at=now
            )
        )
    except IntegrityError as error:
        raise UserError(
            f"there is a labeler {labeler_id} already", next_step="choose another id, or give this one a new link"
        ) from error
    return Labeler(labeler_id=labeler_id, display_name=display_name, role=role, added_at=now, disabled=False)


def labeler_by_token_hash(connection: Connection, token_hash: str) -> Labeler | None:
    """Find the labeler whose invitation hashes to this, unless disabled."""
    found = connection.execute(
        select(LABELERS).where(LABELERS.c.token_hash == token_hash, LABELERS.c.disabled_at.is_(None))
    ).one_or_none()
    return None if found is None else _labeler(found)


def all_labelers(connection: Connection) -> list[Labeler]:
    """List everybody, disabled ones too, in the order in which they were added."""
    found = connection.execute(select(LABELERS).order_by(LABELERS.c.added_at, LABELERS.c.labeler_id))
    return [_labeler(row) for row in found]


def disable(connection: Connection, labeler_id: str, *, now: float) -> None:
    """End a labeler's access and what they hold."""
    changed = connection.execute(
        update(LABELERS)
        .where(LABELERS.c.labeler_id == labeler_id)
        .values(disabled_at=func.coalesce(LABELERS.c.disabled_at, now))
    )
    if changed.rowcount != 1:
        raise UserError(f"there is no labeler {labeler_id}", next_step="`rondo label stats` lists who was invited")
    connection.execute(delete(LEASES).where(LEASES.c.labeler_id == labeler_id))


def insert_audit(
    connection: Connection, event: str, *, labeler_id: str | None, details: Mapping[str, Any], now: float
) -> None:
    """Add a line to the log."""
    last = connection.execute(select(func.coalesce(func.max(AUDIT.c.position), 0))).scalar_one()
    connection.execute(
        insert(AUDIT).values(
            position=last + 1, at=now, event=event, labeler_id=labeler_id, details=json.dumps(dict(details))
        )
    )


def audit_entries(connection: Connection, *, last: int) -> list[AuditEntry]:
    """Read the newest lines of the log, oldest first."""
    found = connection.execute(select(AUDIT).order_by(AUDIT.c.position.desc()).limit(last)).all()
    return [
        AuditEntry(at=row.at, event=row.event, labeler_id=row.labeler_id, details=json.loads(row.details))
        for row in reversed(found)
    ]


def _person(display_name: str) -> str:
    return " ".join(display_name.split()).casefold()


def _set_token_hash(connection: Connection, labeler_id: str, token_hash: str) -> None:
    """End the old invitation, and enable who was disabled."""
    connection.execute(
        update(LABELERS).where(LABELERS.c.labeler_id == labeler_id).values(token_hash=token_hash, disabled_at=None)
    )


def _labeler(row: Row[Any]) -> Labeler:
    return Labeler(
        labeler_id=row.labeler_id,
        display_name=row.display_name,
        role=row.role,
        added_at=row.added_at,
        disabled=row.disabled_at is not None,
    )


def claim(connection: Connection, run_id: str, *, now: float) -> None:
    """Make a store that is nobody's this run's.

    Raises:
        UserError: If it is another run's.
    """
    found = connection.execute(select(AUDIT.c.details).where(AUDIT.c.event == _CLAIM)).scalars().first()
    if found is None:
        insert_audit(connection, _CLAIM, labeler_id=None, details={"run_id": run_id}, now=now)
    elif json.loads(found)["run_id"] != run_id:
        raise UserError(
            "the database holds the labels of another run",
            where="rounds.store_env",
            next_step="give every run a database of its own",
        )


_CLAIM = "the store belongs to a run"
