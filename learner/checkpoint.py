"""The learner's part of a checkpoint: DeepSpeed's shards of each engine, and everything else as JSON.

The shards are pickles. They are loaded only after the caller has verified their hashes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from learner.training import TrainingEngine

_STATE_FILE = "learner.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerState:
    """What an update depends on besides the engines. Shuffles are seeded by iteration, so no generator has a state."""

    policy_version: int | None
    """The version published last."""
    kl_controller: dict[str, float] | None
    """The KL controller's state; None for an algorithm without one."""


def save(directory: Path, *, engines: Mapping[str, TrainingEngine], state: LearnerState) -> None:
    """Write all state into an empty directory; all ranks call this.

    Args:
        directory: Shared by the ranks.
        engines: By name.
        state: The rest; rank 0 writes it.

    Raises:
        OSError: If the disk does not take it; the ranks are still in step.
    """
    for name, engine in engines.items():
        engine.save(directory / name)
    # After the last collective, so that nobody waits for a rank 0 that finds no room for it.
    if all(engine.context.rank == 0 for engine in engines.values()):
        text = json.dumps(asdict(state), indent=2, allow_nan=False)
        (directory / _STATE_FILE).write_text(text, encoding="utf-8")


def load(directory: Path, *, engines: Mapping[str, TrainingEngine]) -> LearnerState:
    """Restore what `save` wrote; all ranks call this.

    Args:
        directory: Verified by the caller.
        engines: By the same names, freshly built from the same models.

    Returns:
        The rest of the state.

    Raises:
        FileNotFoundError: If the directory holds no learner's state.
        ValueError: If a part is missing.
    """
    stored = json.loads((directory / _STATE_FILE).read_text(encoding="utf-8"))
    for name, engine in engines.items():
        engine.load(directory / name)
    return LearnerState(**stored)
