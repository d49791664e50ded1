"""Algorithms that choose among the responses to a prompt."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from configs.algorithm_base import OF_PPO_ALONE, OF_THE_KL, OF_THE_RATIO, AlgorithmBase
from configs.base import NonNegativeInt, PositiveFloat, PositiveInt
from configs.rollout import RolloutConfig

_WITHOUT_ADVANTAGES: dict[str, str] = (
    OF_PPO_ALONE
    | dict.fromkeys(
        (
            *("advantage", "gamma", "gae_lambda", "truncated_value", "critic_warmup_iterations", "adv_norm"),
            *("value_clip", "score_at", "whiten_rewards", "alarm_negative_kl"),
        ),
        "it compares a prompt's responses by their scores, so that there are no advantages and no critic",
    )
    | {"adv_norm_over": "there are no advantages", "repeat_minibatch": "its passes are reshuffled"}
    | dict.fromkeys(
        ("correction", *OF_THE_RATIO), "it learns whole responses, without a ratio to the policy that sampled them"
    )
    | {"entropy_bonus": "its loss is of whole responses", "aggregation": "its loss says how tokens are weighed"}
)


class SelectionBase(AlgorithmBase):
    """What the algorithms have in common that choose among the responses to a prompt, and need no advantages."""

    @property
    def compares_by(self) -> str | None:
        """The setting by which responses to one prompt are compared with each other."""
        return f"algorithm.name = {type(self).model_fields['name'].default}"


class DPOConfig(SelectionBase):
    """Direct preference optimisation, online: the best of a prompt's responses against the worst, by score."""

    responses_together: ClassVar[int] = 2
    not_here = _WITHOUT_ADVANTAGES | dict.fromkeys(
        OF_THE_KL, "its loss holds the policy to the reference by itself, and dpo_beta is the coefficient of that KL"
    )

    name: Literal["dpo"] = "dpo"
    dpo_beta: PositiveFloat = 0.1
    """The KL coefficient, in units of the implicit reward per nat."""
    kind: Literal["dpo", "cdpo", "robust", "ipo"] = "dpo"
    """`cdpo` and `robust` know that a score may prefer the wrong response, with `flip_probability`; `ipo` aims at a
    margin of 1 / (2 dpo_beta) nats and no further."""
    flip_probability: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Of `cdpo` and `robust`."""

    def learned_responses(self, rollout: RolloutConfig) -> int:
        """Count two responses of each prompt; a prompt whose responses all tie gives none."""
        return 2 * rollout.prompts_per_iteration

    @model_validator(mode="after")
    def _pairs_stay_together(self) -> Self:
        if self.minibatch_responses % 2:
            raise ValueError(
                f"minibatch_responses = {self.minibatch_responses} is odd, and a pair counts two: use an even number"
            )
        return self

    @model_validator(mode="after")
    def _flips_are_used(self) -> Self:
        takes_flips = self.kind in ("cdpo", "robust")
        if takes_flips and self.flip_probability == 0:
            raise ValueError(f"kind = {self.kind} without a flip_probability is kind = dpo: set one above 0")
        if not takes_flips and self.flip_probability > 0:
            raise ValueError(
                f"flip_probability = {self.flip_probability:g} is not read by kind = {self.kind}: use cdpo or robust"
            )
        return self


class RFTConfig(SelectionBase):
    """Rejection-sampling fine-tuning: imitate the best of each prompt's responses, and those chosen before."""

    not_here = _WITHOUT_ADVANTAGES | dict.fromkeys(
        OF_THE_KL, "it imitates its best samples, and how far an iteration goes is up to learning rate and num_epochs"
    )

    name: Literal["rft"] = "rft"
    kept_per_prompt: PositiveInt = 1
    """The best so many responses to each prompt are learned, and remembered for later iterations and rounds."""
    memory_responses: NonNegativeInt = 64
    """Remembered responses that each iteration learns once more, chosen at random; fewer while there are not as many.
    0 forgets: policies trained on their newest samples alone have lost what they could do before."""

    def learned_responses(self, rollout: RolloutConfig) -> int:
        """Count the chosen responses and the remembered ones."""
        return self.kept_per_prompt * rollout.prompts_per_iteration + self.memory_responses


SelectionConfig = DPOConfig | RFTConfig
