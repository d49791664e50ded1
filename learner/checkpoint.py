"""The learner's part of a checkpoint: DeepSpeed's shards of each engine, and everything else as JSON.

What was chosen to be learned again lies beside it (learner/sample_memory.py).
The shards are pickles. They are loaded only after the caller has verified their hashes.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from learner.training import TrainingEngine
from protocol.errors import UserError

_STATE_FILE = "learner.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnerState:
    """What an update depends on besides the engines. Shuffles are seeded by iteration, so no generator has a state."""

    policy_version: int | None
    """The version published last."""
    kl_controller: dict[str, float] | None
    """The KL controller's state; None for an algorithm without one."""
    world_size: int
    """Ranks, each of which has written a shard of its own."""
    zero_stage: int
    """How the shards are cut."""
    negative_kls: int = 0
    """Iterations in a row, up to this one, whose KL was negative; a checkpoint from before it was counted has none."""


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


def load(directory: Path, *, engines: Mapping[str, TrainingEngine], zero_stage: int) -> LearnerState:
    """Restore what `save` wrote; all ranks call this.

    Args:
        directory: Verified by the caller.
        engines: By the same names, freshly built from the same models.
        zero_stage: Theirs.

    Returns:
        The rest of the state.

    Raises:
        FileNotFoundError: If the directory holds no learner's state.
        ValueError: If a part is missing.
        UserError: If it was written by another number of ranks or under another ZeRO stage; nothing is loaded then.
    """
    state = LearnerState(**json.loads((directory / _STATE_FILE).read_text(encoding="utf-8")))
    [world_size] = {engine.context.world_size for engine in engines.values()}
    if (state.world_size, state.zero_stage) != (world_size, zero_stage):
        raise UserError(
            f"the learner's state was written with learner.workers={state.world_size} and "
            f"learner.zero_stage={state.zero_stage}, and cannot be read with {world_size} and {zero_stage}",
            where=str(directory),
            next_step=f"go back to learner.workers={state.world_size} learner.zero_stage={state.zero_stage}, or start "
            "a new run from an exported policy with models.policy.path=RUN/policies/vNNN",
        )
    for name, engine in engines.items():
        engine.load(directory / name)
    return state
