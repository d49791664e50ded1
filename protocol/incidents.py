"""What went wrong in a run: one record a fault, for people and for programs."""

import json
import shlex
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from protocol.files import write_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """A fault and what was done about it."""

    kind: str
    """`worker_lost`, `worker_silent`, `worker_late`, `learner_lost`, `nonfinite`, `reward_failed` and the like."""
    what: str
    """One line for people."""
    where: str
    """The worker, the rank or the key."""
    cause: str = ""
    """What was seen, in full."""
    action: str = ""
    """What was done about it."""
    round: int | None = None
    iteration: int | None = None
    policy_version: int | None = None
    data: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Whatever else helps: stacks, the file that holds the batch, numbers."""
    reproduce: str = ""
    """A command that makes it happen again, or shows what was kept of it; by default the one that shows the record."""
    at: float = field(default_factory=time.time)
    """Seconds since 1970."""


def write(directory: Path, incident: Incident, *, name: str | None = None) -> Path:
    """Keep an incident as JSON.

    Args:
        directory: The run's `incidents/`; made if it is not there.
        incident: What happened.
        name: The file's name without `.json`; by default its time and kind. Data files beside it may share the name.

    Returns:
        The file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    moment = time.strftime("%Y%m%dT%H%M%S", time.gmtime(incident.at))
    path = directory / f"{name or f'{moment}-{incident.kind}-{uuid.uuid4().hex[:6]}'}.json"
    record = asdict(incident)
    record["reproduce"] = incident.reproduce or f"rondo incident show {shlex.quote(str(path))}"
    write_text(path, json.dumps(record, indent=1, ensure_ascii=False, default=str), errors="replace")
    return path
