"""What a run goes on from: its newest checkpoint that verifies, if it is one of the run's own configuration."""

from pathlib import Path

from cluster import checkpoint
from cluster.checkpoint import Checkpoint
from cluster.resizing import way_on
from cluster.run_directory import RunDirectory, differences
from configs.load import ConfigError, config_hash, dump
from configs.run import RunConfig
from protocol.errors import UserError

RUN_ID = "run_id"
"""In the driver's state: whose checkpoint it is."""
_CONFIG = "config.yaml"


def write_config(staging: Path, config: RunConfig) -> None:
    """Put the configuration into a checkpoint, so that a difference can be named."""
    (staging / _CONFIG).write_text(dump(config), encoding="utf-8")


def newest(root: Path, config: RunConfig, *, trusts_all: bool = False) -> Checkpoint | None:
    """Find the checkpoint that a resume uses.

    Args:
        root: The run's `checkpoints/` directory.
        config: The run's configuration.
        trusts_all: Whether it may be another run's. Loading it reads pickles, and a pickle runs code.

    Returns:
        The newest that verifies, or None for a run without checkpoints.

    Raises:
        UserError: If none verifies, or the newest that does is of another run or configuration.
    """
    found = checkpoint.newest(root)
    if found is None:
        return None
    if is_foreign(found) and not trusts_all:
        raise UserError(
            "the checkpoint is not known to be of this run: it does not name the run's id",
            where=str(found.directory),
            cause="it was copied here from another run, or written before checkpoints named their run",
            next_step="if you trust whoever wrote it, as its files may run code when they are read, give the same "
            "command with --trust-checkpoint; otherwise move it away",
        )
    differing = config_differences(found, config)
    if differing:
        another = way_on(root.parent, config, differing) or "start a run of another name with the new one"
        raise UserError(
            f"the checkpoint is of another configuration: {'; '.join(differing[:4])}",
            where=str(found.directory),
            cause="the run's config.yaml was edited, or the checkpoint was copied here from another run",
            next_step=f"restore the configuration with `cp {found.directory / _CONFIG} {root.parent / _CONFIG}`, or "
            + another,
        )
    return found


def is_foreign(found: Checkpoint) -> bool:
    """Say whether a checkpoint names another run than the one in whose directory it is, or none."""
    own = RunDirectory(found.directory.parents[1]).run_id
    return not own.is_file() or found.driver.get(RUN_ID) != own.read_text()


def config_differences(found: Checkpoint, config: RunConfig) -> list[str]:
    """Compare a checkpoint's configuration with the run's.

    Args:
        found: A checkpoint that has been verified.
        config: The run's configuration.

    Returns:
        What differs; empty for the same configuration, also if it was written before some of today's keys existed.
    """
    if found.config_hash == config_hash(config):
        return []
    stored = found.directory / _CONFIG
    if not stored.is_file():
        return [f"its hash is {found.config_hash}, the run's is {config_hash(config)}"]
    try:
        return differences(stored, config)
    except ConfigError as error:
        return [f"it cannot be read: {error}"]
