"""What every artefact of a run was made from, in one file beside them."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from protocol.files import read_json, write_json

Kind = Literal["policy", "reward_model", "comparisons"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artefact:
    """One thing that a run made."""

    name: str
    """Its place in the run directory, such as `policies/v020`."""
    kind: Kind
    round: int
    config: str
    """The hash of the configuration."""
    parents: tuple[str, ...] = ()
    """The artefacts it was made from; the first is what it started as."""
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What it was trained on or counts, such as rows and their hash."""


def note(path: Path, artefact: Artefact) -> None:
    """Record an artefact; recording it again changes nothing.

    Args:
        path: The run's lineage.json.
        artefact: What was made.
    """
    known = {entry.name: entry for entry in read(path)}
    if known.get(artefact.name) != artefact:
        known[artefact.name] = artefact
        write_json(path, {name: asdict(entry) for name, entry in known.items()})


def read(path: Path) -> list[Artefact]:
    """Read all artefacts, in the order in which they were made.

    Raises:
        UserError: If the file is damaged.
    """
    if not path.exists():
        return []
    return read_json(path, parsed, next_step="restore it from a copy: it alone says what was made from what")


def parsed(entries: Any) -> list[Artefact]:
    """Make artefacts of the file's plain values."""
    return [Artefact(**{**entry, "parents": tuple(entry["parents"])}) for entry in entries.values()]


def compared(artefact: Artefact) -> str | None:
    """Say how many tasks and pairs comparisons hold; None for other artefacts.

    Runs of before pairs were counted have kept the number of tasks alone, as rows.
    """
    data = artefact.data
    if artefact.kind != "comparisons" or ("tasks" not in data and "rows" not in data):
        return None
    tasks: int = data["tasks"] if "tasks" in data else data["rows"]
    pairs = [f"{data['pairs']:,} pairs"] if "pairs" in data else []
    return ", ".join([f"{tasks:,} tasks", *pairs])


def referred(path: Path, *, below: str) -> set[str]:
    """Find what the lineage refers to in one part of the run directory.

    Args:
        path: The run's lineage.json.
        below: A directory of the run, such as `checkpoints`.

    Returns:
        The names below it that are artefacts or that artefacts were made from.
    """
    mentioned = {name for artefact in read(path) for name in (artefact.name, *artefact.parents)}
    return {name.split("/")[1] for name in mentioned if name.startswith(f"{below}/")}


def sha256(content: bytes) -> str:
    """Hash what an artefact was made from."""
    return hashlib.sha256(content).hexdigest()
