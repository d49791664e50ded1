"""What is recorded, and where."""

from configs.base import NonNegativeInt, PositiveInt, Section


class TrackingConfig(Section):
    """Metric sinks besides metrics.jsonl, which is always written."""

    tensorboard: bool = True
    samples_per_iteration: NonNegativeInt = 3
    """Decoded responses kept in samples.jsonl for each iteration, with score, KL and reward."""
    samples_shown_period: PositiveInt = 1
    """Print them on the terminal every so many iterations."""
    save_rollouts: bool = True
    """Write each iteration's rollouts as Parquet."""
