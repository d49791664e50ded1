"""Which checkpoints a run keeps. A pure function of what they say about themselves."""

from collections.abc import Collection, Sequence

from cluster.checkpoint import Checkpoint
from cluster.schedule import Phase, RunState
from configs.cluster import ClusterConfig


def kept(
    checkpoints: Sequence[Checkpoint],
    settings: ClusterConfig,
    *,
    best_version: int,
    referred: Collection[str],
) -> set[str]:
    """Say which checkpoints to keep.

    Args:
        checkpoints: Of a run, oldest first.
        settings: How many of which kind.
        best_version: The policy that the ladder holds for the best.
        referred: The names of those that something else was made from; they are kept, whatever the settings say.

    Returns:
        Their names.
    """
    states = {found.name: RunState.from_json(found.driver["state"]) for found in checkpoints}
    round_ends = [name for name, state in states.items() if state.phase is Phase.EVALUATE]
    names = {*referred, *_last(list(states), settings.checkpoints_kept)}
    names.update(_last(round_ends, settings.round_end_checkpoints_kept))
    if settings.best_policy_checkpoint_kept:
        names.update(name for name in round_ends if states[name].policy_version == best_version)
    if settings.every_nth_checkpoint_kept is not None:
        period = settings.every_nth_checkpoint_kept * settings.checkpoint_period_iterations
        names.update(name for name, state in states.items() if state.iteration % period == 0)
    return names


def _last(names: Sequence[str], count: int) -> Sequence[str]:
    return names[max(0, len(names) - count) :]
