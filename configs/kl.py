"""How the KL to the reference is estimated, and how its coefficient moves."""

from typing import Literal

from configs.base import PositiveFloat, PositiveInt, Section

KLEstimator = Literal["k1", "k2", "k3", "k3+"]


class KLControllerConfig(Section):
    """How the KL coefficient moves between iterations."""

    kind: Literal["fixed", "adaptive", "doubling"] = "fixed"
    """`adaptive`: in proportion to the distance from the target, by little each time (Ziegler et al.); `doubling`: to
    half or twice where the KL is off by more than a factor of 1.5 (the PPO paper)."""
    target_nats_per_sequence: PositiveFloat = 6.0
    """The target for the mean over sequences of the summed k1 estimate."""
    horizon_episodes: PositiveInt = 10_000
    """Responses over which the adaptive controller may change the coefficient by about 20%."""
