"""What is recorded, and where."""

from configs.base import NonNegativeInt, Section


class TrackingConfig(Section):
    """Metric sinks besides metrics.jsonl, which is always written."""

    tensorboard: bool = True
    samples_per_iteration: NonNegativeInt = 3
    """Decoded responses shown after each iteration, with score, KL and reward."""
    save_rollouts: bool = True
    """Write each iteration's rollouts as Parquet."""
