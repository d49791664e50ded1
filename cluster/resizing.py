"""A learner of another size: DeepSpeed's shards fit one number of ranks and one ZeRO stage, so a new run must begin."""

import shlex
from pathlib import Path

from configs.run import RunConfig

_SHAPE = ("learner.workers", "learner.zero_stage")


def way_on(root: Path, config: RunConfig, differing: list[str]) -> str | None:
    """Say how to go on with what a run has learned, on a learner of another size.

    The run's newest exported policy becomes version 0 of the new run as it is; the KL penalty keeps the run's own
    reference. The critic, the optimizers' state and the round's position are those of a new run.

    Args:
        root: The run's directory.
        config: The configuration that is wanted.
        differing: What differs from the run's, as `run_directory.differences` says it.

    Returns:
        A next step with the command; None if the learner's size is not what differs, or the run has exported no policy.
    """
    if not any(line.startswith(tuple(f"{key} was " for key in _SHAPE)) for line in differing):
        return None
    exported = sorted(path for path in (root / "policies").glob("v[0-9]*") if path.is_dir())
    if not exported:
        return None
    learner = config.learner
    settings = {
        "run.name": f"{config.run.name[:50]}-w{learner.workers}z{learner.zero_stage}",
        "run.dir": str(root.parent),
        "learner.workers": str(learner.workers),
        "learner.zero_stage": str(learner.zero_stage),
        "models.policy.path": str(max(exported, key=lambda path: int(path.name[1:]))),
        "models.policy.scratch": "null",
        "data.demonstrations": "null",
    }
    if config.models.reference == "sft":
        settings["models.reference"] = str(root / "policies" / "v000")
    command = shlex.join(
        ["rondo", "train", str(root / "config.yaml"), *(f"{key}={value}" for key, value in settings.items())]
    )
    return f"start a new run from this one's newest policy, on a learner of the new size, with `{command}`"
