"""How responses are scored: reward models, reward functions, truncation, and the gold score for evaluation."""

from typing import Annotated, Literal

from pydantic import Field

from configs.base import (
    DottedPath,
    HTTPAddress,
    Location,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
)

HELDOUT = "heldout"
"""The component that the held-out reward model's scores are recorded as."""


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
    """`reference`: mean 0 and standard deviation 1 on samples of the reference policy, as reward models have."""


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
    token_env: str | None = None
    """Environment variable that holds a bearer token."""


RewardConfig = Annotated[ModelRewardConfig | FunctionRewardConfig | HTTPRewardConfig, Field(discriminator="kind")]


class TruncationConfig(Section):
    """What a response that hit the length limit costs."""

    rule: Literal["subtract", "replace", "none"] = "subtract"
    penalty: NonNegativeFloat = 1.0
    """`subtract`: score - penalty. `replace`: score becomes -penalty. In standard deviations of the score."""


class GoldConfig(Section):
    """A trusted score for evaluation only; it never reaches training."""

    path: DottedPath
    components: dict[str, DottedPath] = {}
    """Further functions, reported as gold/NAME."""


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
    """Samples of the reference policy that fix the zero and the unit of a new reward model."""
    truncation: TruncationConfig = TruncationConfig()
    clip: PositiveFloat | None = None
    """Clip the combined score to +- so many standard deviations."""
    scale: PositiveFloat = 1.0
    gold: GoldConfig | None = None
