"""Rondo's own file of preferences: every task and every label, superseded ones too, as JSON lines or Parquet.

Reading what was written gives equal records in the same order.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from protocol.datasets import open_records
from protocol.errors import UserError
from reward_service.preferences.records import (
    Label,
    Task,
    label_from_json,
    label_to_json,
    task_from_json,
    task_to_json,
)
from reward_service.preferences.typed import check_types

_NAME, _VERSION = "rondo-preferences", 1
# For people and queries; `body` holds the whole record.
_WHOLE = ("round", "strength")
_TEXTS = (
    "record",
    "task_id",
    "purpose",
    "kind",
    "label_id",
    "labeler_id",
    "labeler_kind",
    "verdict",
    "winner",
    "supersedes",
    "body",
)


def write_jsonl(path: Path, tasks: Sequence[Task], labels: Sequence[Label]) -> None:
    """Write a first line that names the format, then tasks, then labels, one JSON object a line."""
    with path.open("w", encoding="utf-8") as file:
        for row in _rows(tasks, labels):
            # ASCII alone, because a response may hold half a character, which UTF-8 cannot carry.
            file.write(json.dumps(row) + "\n")


def write_parquet(path: Path, tasks: Sequence[Task], labels: Sequence[Label]) -> None:
    """Write tasks, then labels, one row each: a few columns for queries, and the whole record as JSON."""
    # The store imports this module, and most of its users never write Parquet.
    import pyarrow
    from pyarrow import parquet

    columns = [(name, pyarrow.int64()) for name in _WHOLE] + [(name, pyarrow.string()) for name in _TEXTS]
    schema = pyarrow.schema([*columns, ("submitted_at", pyarrow.float64())], metadata={"format": _NAME})
    rows = [_flat(row) for row in _rows(tasks, labels)]
    # What is read again is checked page by page.
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), path, write_page_checksum=True)


def read_native(path: Path) -> tuple[list[Task], list[Label]]:
    """Read what `write_jsonl` or `write_parquet` wrote.

    Raises:
        UserError: If the file is something else, is damaged, or a newer version has written it.
    """
    tasks: list[Task] = []
    labels: list[Label] = []
    rows = open_records(str(path))
    header = _header(next(rows), path)
    for number, row in enumerate(rows, start=2):
        try:
            read = _read(row)
        # What is not as `write_jsonl` leaves it shows in any of these ways.
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise UserError(
                "the record cannot be read",
                where=f"{path}, record {number}",
                cause=f"{type(error).__name__}: {error}",
                next_step="export the preferences again",
            ) from error
        tasks.append(read) if isinstance(read, Task) else labels.append(read)
    _check_complete(header, path, tasks=len(tasks), labels=len(labels))
    return tasks, labels


def _read(row: dict[str, Any]) -> Task | Label:
    values = _unpacked(row)
    record = values.pop("record", None)
    if record not in ("task", "label"):
        raise ValueError(f"a record is a task or a label, not {record!r}")
    read = task_from_json(values) if record == "task" else label_from_json(values)
    check_types(read)
    return read


def _rows(tasks: Sequence[Task], labels: Sequence[Label]) -> Iterator[dict[str, Any]]:
    yield {"record": _NAME, "version": _VERSION, "tasks": len(tasks), "labels": len(labels)}
    for task in tasks:
        yield {"record": "task", **task_to_json(task)}
    for label in labels:
        yield {"record": "label", **label_to_json(label)}


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    outcome = row.get("outcome", {})
    columns = {name: row.get(name, outcome.get(name)) for name in (*_WHOLE, *_TEXTS, "submitted_at")}
    return {**columns, "body": json.dumps(row)}


def _unpacked(row: dict[str, Any]) -> dict[str, Any]:
    body = row.get("body")
    found = json.loads(body) if isinstance(body, str) else row
    if not isinstance(found, dict):
        raise TypeError(f"the body is a {type(found).__name__}, not an object")
    return cast(dict[str, Any], found)


def _header(row: dict[str, Any], path: Path) -> Mapping[str, Any]:
    with suppress(RecursionError, TypeError, ValueError):  # not ours, which is said next
        row = _unpacked(row)
    if row.get("record") != _NAME:
        raise UserError(
            "this is no file of preferences that rondo wrote",
            where=str(path),
            cause=f"its first record has the columns {', '.join(sorted(row))}",
            next_step="name the format that it has",
        )
    if row.get("version") != _VERSION:
        raise UserError(
            f"the file has version {row.get('version')}, and this rondo reads version {_VERSION}",
            where=str(path),
            cause="a newer rondo has written it",
            next_step="update rondo",
        )
    return row


def _check_complete(header: Mapping[str, Any], path: Path, **found: int) -> None:
    """Compare what was read with what the first record announces; files of before it did say nothing."""
    for name, number in found.items():
        if header.get(name, number) != number:
            raise UserError(
                f"{header[name]} {name} were written, and {number} are there",
                where=str(path),
                cause="the file is cut off or was edited by hand",
                next_step="export the preferences again",
            )
