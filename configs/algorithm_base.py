"""What all algorithms have in common, and which keys belong to which of them."""

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from pydantic import model_validator

from configs.base import PositiveInt, Section
from configs.rollout import RolloutConfig

OF_THE_KL = ("kl_beta", "kl_controller", "kl_in", "kl_estimator")
OF_THE_RATIO = ("clip_low", "clip_high", "dual_clip", "max_approx_kl")
OF_PPO_ALONE: dict[str, str] = dict.fromkeys(("ptx_coefficient", "ptx_texts"), "only ppo rehearses pretraining texts")


class AlgorithmBase(Section):
    """What all algorithms have in common."""

    responses_together: ClassVar[int] = 1
    """Responses that one term of the loss needs at once, in one micro-batch."""

    not_here: ClassVar[Mapping[str, str]] = {}
    """Key of another algorithm -> why it has no meaning for this one, which "unknown key" would not say."""

    one_pass: ClassVar[bool] = False
    """Whether its loss is right for fresh samples alone, so that there is no second pass over them."""

    minibatch_responses: PositiveInt = 64
    """Responses in one optimiser step, over all ranks."""
    num_epochs: PositiveInt = 1
    """Passes over the responses of an iteration, reshuffled each time."""

    @model_validator(mode="before")
    @classmethod
    def _no_key_without_a_meaning(cls, values: Any) -> Any:
        for key in cast(dict[str, Any], values) if isinstance(values, dict) else {}:
            if key in cls.not_here:
                raise ValueError(f"{key} has no meaning for this algorithm: {cls.not_here[key]}")
        return cast(object, values)

    @property
    def compares_by(self) -> str | None:
        """The setting by which responses to one prompt are compared with each other; None where they are not."""
        return None

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained."""
        return False

    @property
    def warmup_iterations(self) -> int:
        """Iterations at the start in which the policy is left as it is."""
        return 0

    def learned_responses(self, rollout: RolloutConfig) -> int:
        """Count the responses that an iteration learns from, at most."""
        return rollout.responses_per_iteration
