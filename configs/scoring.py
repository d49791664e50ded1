"""How responses are scored: reward models, reward functions, truncation, and the gold score for evaluation."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.base import (
    DottedPath,
    HTTPAddress,
    Location,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
    VariableName,
)

HELDOUT = "heldout"
"""The component that the held-out reward model's scores are recorded as."""
TAKEN: dict[str, str] = {
    HELDOUT: "that of the held-out reward model",
    f"{HELDOUT}_gap": "that of the reward model's score minus the held-out reward model's",
}
"""Names that no reward may have, since score/NAME is a metric already -> whose they are."""


class ModelRewardConfig(Section):
    """A score from a reward model."""

    kind: Literal["model"] = "model"
    name: str = "reward_model"
    path: Location = "trained"
    """`trained`: the reward model of this run's current round; otherwise a directory or hub id."""
    weight: float = 1.0


class FunctionRewardConfig(Section):
    """A score from a Python function."""

    kind: Literal["function"] = "function"
    name: str
    path: DottedPath
    """Called as f(prompts=[...], responses=[...], finish_reasons=[...], metadata=[...]) -> list of floats."""
    weight: float = 1.0
    normalization: Literal["none", "reference"] = "none"
    """`reference`: mean 0 and standard deviation 1 on the anchor responses (`scoring.calibration_anchor`), as reward
    models have. `none`: the function's own zero and unit, also within a sum."""


class HTTPRewardConfig(Section):
    """A score from an HTTP endpoint."""

    kind: Literal["http"] = "http"
    name: str
    url: HTTPAddress
    """No user, password or key in it: these go into the variable that `token_env` names."""
    weight: float = 1.0
    normalization: Literal["none", "reference"] = "none"
    timeout_s: Seconds = 30.0
    """Of one try."""
    attempts: PositiveInt = 3
    """Tries of a request that was not answered (lost connections, time-outs, 429, 502, 503, 504)."""
    deadline_s: Seconds = 120.0
    """Of all tries and pauses for a group of responses; less than `cluster.deadlines.score_s`."""
    batch_responses: PositiveInt = 32
    """Responses of one request; a larger group is asked for in several."""
    concurrency: PositiveInt = 4
    """Requests of one scoring worker that are under way at a time."""
    breaker_failures: PositiveInt = 3
    """After so many groups in a row that were left unanswered, the endpoint is not asked for a while ..."""
    breaker_cooldown_s: Seconds = 60.0
    """... of so many seconds, and then by one group as a probe."""
    token_env: VariableName | None = None
    """Environment variable that holds a bearer token."""


RewardConfig = Annotated[ModelRewardConfig | FunctionRewardConfig | HTTPRewardConfig, Field(discriminator="kind")]


class LinearCombination(Section):
    """The sum of the scores by weight. It is not calibrated again: of two calibrated ones with weights 1 its standard
    deviation is up to 2."""

    kind: Literal["linear"] = "linear"


class MinimumCombination(Section):
    """The worst score."""

    kind: Literal["minimum"] = "minimum"


class MeanMinusStdCombination(Section):
    """The mean of an ensemble minus some standard deviations over its members."""

    kind: Literal["mean_minus_std"] = "mean_minus_std"
    num_stds: NonNegativeFloat = 1.0


class SafetyFirstCombination(Section):
    """The safety score where safety is at stake, and the helpfulness score elsewhere (Llama 2)."""

    kind: Literal["safety_first"] = "safety_first"
    helpfulness: str
    """The name of one reward."""
    safety: str
    """The name of the other."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Safety is at stake where the sigmoid of the calibrated safety score is below this. The score is standardised, so
    this is no probability of harm: 0.15 is 1.73 standard deviations below the mean on the anchor responses."""
    tag: str = "is_safety"
    """Safety is also at stake where the prompt's column of this name is true; a prompt without it is not tagged."""


CombineConfig = Annotated[
    LinearCombination | MinimumCombination | MeanMinusStdCombination | SafetyFirstCombination,
    Field(discriminator="kind"),
]


class TruncationConfig(Section):
    """What a response that hit the length limit costs."""

    rule: Literal["subtract", "replace", "none"] = "subtract"
    penalty: NonNegativeFloat = 1.0
    """`subtract`: score - penalty. `replace`: score becomes -penalty. In units of the combined score, before `scale`:
    standard deviations on the anchor responses where there is one calibrated reward of weight 1."""


class LengthConfig(Section):
    """What a response costs that comes close to the length limit: nothing at first, then more with every token."""

    buffer_tokens: PositiveInt
    """So many tokens before `rollout.max_response_tokens` it begins to cost."""
    penalty: PositiveFloat = 1.0
    """What is subtracted at the limit, in the unit of `truncation.penalty`."""


class GoldConfig(Section):
    """A trusted score for evaluation only; it never reaches training."""

    path: DottedPath
    components: dict[str, DottedPath] = {}
    """Further functions, reported as gold/NAME."""

    @model_validator(mode="after")
    def _names_are_free(self) -> Self:
        if "gold" in self.components:
            raise ValueError("components.gold: gold/gold is the metric of path itself; give it another name")
        return self


class ScoringConfig(Section):
    """The scoring pool: reward-model workers and reference workers, scaled apart."""

    workers: PositiveInt = 1
    reference_workers: PositiveInt = 1
    cpus_per_worker: PositiveFloat = 1.0
    gpus_per_worker: NonNegativeFloat = 1.0
    """Accelerators of one scoring worker (CUDA backend); fractions share one."""
    threads_per_worker: PositiveInt = 1
    group_responses: PositiveInt = 32
    """Responses that are scored together. Groups are formed by key, never by arrival."""
    micro_batch_tokens: PositiveInt = 4096
    dtype: Literal["float32", "bfloat16"] = "float32"
    rewards: list[RewardConfig] = [ModelRewardConfig()]
    calibration_responses: PositiveInt = 256
    """Anchor responses, at most and two at least, that fix the zero and the unit of every reward without
    `normalization: none`."""
    calibration_anchor: Literal["ref_policy", "demonstrations", "responses"] = "ref_policy"
    """Whose responses they are: sampled from the supervised policy (version 0, whatever `models.reference` names),
    taken from `data.demonstrations`, or drawn from `data.responses`. The prompts of data reach reward functions without
    metadata."""
    combine: CombineConfig = LinearCombination()
    """How several rewards become one score, which is not calibrated again. All are kept beside it."""
    length: LengthConfig | None = None
    truncation: TruncationConfig = TruncationConfig()
    clip: PositiveFloat | None = None
    """Clip the combined score to +- so much, after the charges and in their unit (`truncation.penalty`)."""
    scale: PositiveFloat = 1.0
    """Factor on the score in the end; `kl_beta` and `apa_lambda` are in units of the result, per nat."""
    gold: GoldConfig | None = None

    @model_validator(mode="after")
    def _unit_can_be_measured(self) -> Self:
        if self.calibration_responses < 2:
            raise ValueError(
                f"calibration_responses = {self.calibration_responses}: the unit of a reward is the standard deviation "
                "of its scores, which takes two responses or more"
            )
        return self

    @model_validator(mode="after")
    def _gold_stays_out_of_training(self) -> Self:
        for reward in self.rewards:
            if self.gold is not None and isinstance(reward, FunctionRewardConfig) and reward.path == self.gold.path:
                raise ValueError(
                    f"the reward {reward.name} is scoring.gold.path = {reward.path} itself, which is for evaluation "
                    "only and could not show over-optimisation of what is trained on: leave out one of the two"
                )
        return self

    @model_validator(mode="after")
    def _rewards_can_be_combined(self) -> Self:
        kind, names = self.combine.kind, [reward.name for reward in self.rewards]
        if kind == "linear":
            return self._weights_count()
        if len(names) < 2:
            raise ValueError(f"combine.kind = {kind} needs two rewards or more, and there is {len(names)}")
        for reward in self.rewards:
            if reward.weight != 1:
                raise ValueError(
                    f"combine.kind = {kind} compares scores and weighs none: set the weight of {reward.name} to 1, or "
                    "the kind to linear"
                )
            if not isinstance(reward, ModelRewardConfig) and reward.normalization == "none":
                raise ValueError(
                    f"combine.kind = {kind} compares scores, so they need one unit: set normalization of {reward.name} "
                    "to reference"
                )
        if sum(isinstance(reward, ModelRewardConfig) and reward.path == "trained" for reward in self.rewards) > 1:
            raise ValueError(
                f"combine.kind = {kind} compares different rewards, but two of them are the run's one trained reward "
                "model"
            )
        if self.combine.kind == "safety_first":
            given = sorted([self.combine.helpfulness, self.combine.safety])
            if given != sorted(names):
                raise ValueError(
                    f"combine.kind = safety_first chooses between two rewards, {' and '.join(given)}, but "
                    f"scoring.rewards names {', '.join(names)}"
                )
        return self

    def _weights_count(self) -> Self:
        for reward in self.rewards:
            if reward.weight == 0:
                raise ValueError(
                    f"the weight of {reward.name} is 0, so that it would be asked for every response and change "
                    "nothing: leave it out, or report a function as one of scoring.gold.components"
                )
        return self
