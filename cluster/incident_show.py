"""Shows an incident's record to people, and of a failed reward what it was asked about."""

import json
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from cluster.report_origins import without_secrets
from cluster.report_parts import clipped
from protocol.errors import UserError

_FIRST = ("kind", "what", "where", "round", "iteration", "policy_version", "action", "reproduce", "cause")
_NUM_RESPONSES = 3
_MAX_CHARS = 2_000


def described(path: Path) -> str:
    """Lay an incident out as text that no terminal can stumble over.

    Args:
        path: A file of the run's `incidents/`.

    Returns:
        Lines for people. Of a failed reward's batch the first responses are among them, the one it failed on first.

    Raises:
        UserError: If the file is not there or is no incident, or its batch cannot be read.
    """
    record = without_secrets(_read(path))
    at = record.get("at")
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at)) if isinstance(at, float) else "unknown"
    lines = [f"when: {when}"]
    lines += [f"{name}: {_text(record[name])}" for name in _FIRST if record.get(name) not in (None, "")]
    data = record.get("data")
    data = data if isinstance(data, dict) else {}
    lines += [f"{name}: {_text(value)}" for name, value in data.items()]
    batch = path.with_name(Path(str(data.get("batch", ""))).name)
    if batch.suffix == ".jsonl" and batch.is_file():
        lines += _responses(batch, str(data.get("key")))
    return "\n".join(lines)


def _read(path: Path) -> Mapping[str, Any]:
    step = "name a .json file of a run's incidents/"
    try:
        record: object = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise UserError(f"it cannot be read: {error.strerror}", where=str(path), next_step=step) from None
    except (ValueError, RecursionError):
        raise UserError("it is no JSON", where=str(path), next_step=step) from None
    if not isinstance(record, dict) or "kind" not in record:
        raise UserError("it is no incident", where=str(path), next_step=step)
    return record


def _responses(batch: Path, key: str) -> list[str]:
    """Show the response that a reward failed on, then the first of the others."""
    try:
        with batch.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        rows.sort(key=lambda row: row["key"] != key)
        lines: list[str] = []
        for row in islice(rows, _NUM_RESPONSES):
            lines += ["", f"{_text(row['key'])} ({_text(row['finish_reason'])})"]
            lines += [f"prompt: {_text(row['prompt'])}", f"response: {_text(row['response'])}"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the batch cannot be read: {type(error).__name__}", where=str(batch)) from error
    return [*lines, "", f"({len(rows)} responses in {clipped(batch.name, 200)})"]


def _text(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return clipped(text.rstrip("\n"), _MAX_CHARS).replace("\n", "\n    ")
