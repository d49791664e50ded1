"""How the policy is updated: one class per algorithm, chosen by `algorithm.name`."""

from typing import Annotated, Literal

from pydantic import Field

from configs.base import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section


class KLControllerConfig(Section):
    """How the KL coefficient moves between iterations."""

    kind: Literal["fixed", "adaptive"] = "fixed"
    target_nats_per_sequence: PositiveFloat = 6.0
    """The adaptive controller's target for the mean over sequences of the summed k1 estimate."""
    horizon_episodes: PositiveInt = 10_000
    """Responses over which the controller may change the coefficient by about 20%."""


class AlgorithmBase(Section):
    """What all policy-gradient algorithms with a critic have in common."""

    minibatch_responses: PositiveInt = 64
    """Responses in one optimiser step, over all ranks."""
    num_epochs: PositiveInt = 1
    """Passes over the responses of an iteration, reshuffled each time."""
    gamma: Fraction = 1.0
    gae_lambda: Fraction = 0.95
    truncated_value: Literal["terminal", "bootstrap"] = "terminal"
    """What follows a response that was cut at the length limit: nothing, or the critic's estimate."""
    aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm"] = "token_mean"
    critic_warmup_iterations: NonNegativeInt = 0
    """Iterations at the start that train the critic alone."""


class PPOConfig(AlgorithmBase):
    """Proximal policy optimisation with clipped ratios and the KL penalty in the reward."""

    name: Literal["ppo"] = "ppo"
    kl_beta: NonNegativeFloat = 0.05
    """The KL coefficient (its first value, where the controller adapts it), in units of the score."""
    kl_controller: KLControllerConfig = KLControllerConfig()
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """An upper bound on -ratio * advantage for negative advantages, as a multiple of the advantage."""
    value_clip: PositiveFloat | None = 0.2
    adv_norm: Literal["none", "batch_std_only", "whiten"] = "whiten"


class APAConfig(AlgorithmBase):
    """Advantage-induced policy alignment: squared error between log-probs and the advantage-tilted reference."""

    name: Literal["apa"] = "apa"
    apa_lambda: PositiveFloat = 0.5
    """The KL weight, in units of the score (one standard deviation of reference samples)."""
    num_epochs: PositiveInt = 2
    value_clip: PositiveFloat | None = None
    adv_norm: Literal["none", "batch_std_only", "whiten"] = "none"
    """Anything but "none" takes the units from apa_lambda; `whiten` is what the paper's released code does."""


AlgorithmConfig = Annotated[PPOConfig | APAConfig, Field(discriminator="name")]
