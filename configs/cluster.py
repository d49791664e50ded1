"""Where the workers run, and how long anything may take."""

from typing import Literal

from configs.base import NonNegativeInt, PositiveFloat, PositiveInt, Seconds, Section


class RolePlacementConfig(Section):
    """The placement group of one role."""

    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    resources: dict[str, PositiveFloat] = {}
    """Custom Ray resources each worker needs besides CPUs and accelerators, to pin a role to certain nodes."""


class PlacementConfig(Section):
    """One placement group a role."""

    rollout: RolePlacementConfig = RolePlacementConfig()
    scoring: RolePlacementConfig = RolePlacementConfig()
    learner: RolePlacementConfig = RolePlacementConfig()


class DeadlinesConfig(Section):
    """Upper bounds of every wait, in seconds."""

    placement_s: Seconds = 60.0
    """Until the cluster has granted all placement groups."""
    start_s: Seconds = 600.0
    """Until a worker has loaded its model."""
    generate_s: Seconds = 1800.0
    score_s: Seconds = 600.0
    stage_s: Seconds = 259_200.0
    """A whole supervised stage (SFT or reward modelling)."""
    learn_s: Seconds = 3600.0
    """The update of one iteration."""
    publish_s: Seconds = 600.0
    checkpoint_s: Seconds = 1800.0


class ClusterConfig(Section):
    """The Ray cluster and the life of the run on it."""

    backend: Literal["cpu", "cuda"] = "cpu"
    address: str | None = None
    """A Ray address; without one, the cluster this command runs in, or else a new one on this machine."""
    placement: PlacementConfig = PlacementConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    worker_replacements: NonNegativeInt = 3
    """How many failed rollout workers may be replaced during a run. A failed scoring worker or learner rank ends the
    run; the same command goes on from its last checkpoint."""
    checkpoint_period_iterations: PositiveInt = 20
    checkpoints_kept: PositiveInt = 2
