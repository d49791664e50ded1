"""Where the workers run, and how long anything may take."""

from typing import Annotated, Literal

from pydantic import Field

from configs.base import NonNegativeInt, PositiveFloat, PositiveInt, Seconds, Section

HostName = Annotated[str, Field(pattern=r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?$")]
"""`HOST` or `HOST:PORT`; an IPv6 address stands in brackets."""


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
    """Upper bounds of every wait, in seconds.

    What is done again and again (generate, score, learn, publish, checkpoint) is bounded more tightly once it has been
    measured three times: min(bound, max(floor_s, multiple x the longest of the last 20)).
    """

    placement_s: Seconds = 60.0
    """Until the cluster has granted all placement groups."""
    start_s: Seconds = 600.0
    """Until a worker has loaded its model."""
    silence_s: Seconds = 120.0
    """A worker that owes something and neither delivers nor answers for so long is taken for lost and replaced."""
    generate_s: Seconds = 1800.0
    score_s: Seconds = 600.0
    stage_s: Seconds = 259_200.0
    """A whole supervised stage (SFT or reward modelling)."""
    learn_s: Seconds = 3600.0
    """The update of one iteration; and how long a supervised stage may stand still, where that is not measured."""
    publish_s: Seconds = 600.0
    checkpoint_s: Seconds = 1800.0
    floor_s: Seconds = 120.0
    """No measured bound is shorter."""
    multiple: Annotated[float, Field(ge=2)] = 10.0
    """So many times the longest measured duration."""
    grace_s: Seconds = 30.0
    """From SIGTERM, SIGINT or SIGUSR1 to the end of the process: the iteration in hand, a checkpoint and the workers'
    end. What is not done by then is left undone."""


class ClusterConfig(Section):
    """The Ray cluster and the life of the run on it."""

    backend: Literal["cpu", "cuda"] = "cpu"
    address: str | None = None
    """A Ray address; without one, the cluster this command runs in, or else a new one on this machine."""
    allowed_hosts: list[HostName] | None = None
    """Hosts (`HOST` or `HOST:PORT`) at which reward endpoints and judges may be; if not given, wherever their urls say.
    Link-local addresses and clouds' metadata services never are."""
    placement: PlacementConfig = PlacementConfig()
    deadlines: DeadlinesConfig = DeadlinesConfig()
    worker_replacements: NonNegativeInt = 3
    """How many lost workers of each kind (rollout, reward, reference) may be replaced while this command runs, and how
    often a batch that was lost with a node may be sampled again."""
    learner_restarts: NonNegativeInt = 3
    """How often the learner's ranks may be started again, all together, from the last checkpoint."""
    checkpoint_period_iterations: PositiveInt = 20
    checkpoint_failures_allowed: NonNegativeInt = 3
    """So many checkpoints in a row may fail because the disk is full, read-only or broken; the next stops the run."""
    checkpoints_kept: PositiveInt = 2
    """The newest so many checkpoints are kept. Each holds the optimizers' state too, several times the models' size."""
    round_end_checkpoints_kept: NonNegativeInt = 1
    """So many checkpoints of the ends of rounds, the newest, are kept besides."""
    best_policy_checkpoint_kept: bool = False
    """Keep the checkpoint of the round that ended with the ladder's best policy. The policy itself is always kept, in
    policies/; the checkpoint adds the critic and the optimizers' state."""
    every_nth_checkpoint_kept: PositiveInt | None = None
    """Keep every n-th checkpoint of a round for good: the one after every n x checkpoint_period_iterations
    iterations."""
