"""Who labels comparisons, and what is asked of people."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.base import (
    DottedPath,
    Fraction,
    HTTPAddress,
    Location,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seconds,
    Section,
    VariableName,
)
from configs.data import SourceConfig


class PeopleConfig(Section):
    """People, on the labeling page (`rondo label serve RUN`)."""

    kind: Literal["people"] = "people"
    overlap: PositiveInt = 1
    """Labelers a task."""
    lease_s: Seconds = 900.0
    """How long a task stays with the labeler it was shown to before somebody else may have it."""
    min_labels: PositiveInt | None = None
    """Go on as soon as so many tasks of the round are done; all of them if not given."""
    max_wait_s: Seconds | None = None
    """Wait no longer than this; for ever if not given."""
    on_timeout: Literal["continue", "stop"] = "stop"
    """After `max_wait_s`: go on with the labels that are there, or stop; the same command waits again."""
    poll_s: Seconds = 5.0
    guidelines: str | None = None
    """A text file shown beside every task; a short built-in one if not given."""
    ask_ratings: bool = False
    """Ask for a rating of each response from 1 to 7."""
    flags: list[str] = ["untrue", "harmful", "off topic", "does not follow the request", "repetitive"]
    """Failures that a labeler may tick for each response."""
    check_period: NonNegativeInt = 0
    """An attention check with a known answer after every so many tasks; 0 for none."""
    checks: SourceConfig | None = None
    """Where the attention checks come from: preferences whose `chosen` anybody who reads would choose."""
    min_read_s: NonNegativeFloat = 0.0
    """Refuse answers that come sooner than this after the task was shown."""

    @model_validator(mode="after")
    def _checks_come_from_somewhere(self) -> Self:
        if self.check_period and self.checks is None:
            raise ValueError("check_period needs checks: say where the attention checks come from")
        return self


class SimulatedLabelerConfig(Section):
    """Simulated people, who prefer the response with the higher gold score, most of the time.

    P(a over b) = sigmoid(sharpness (gold_a - gold_b) + position_bias (+1 where a is shown first, else -1))
    """

    kind: Literal["simulated"] = "simulated"
    score: DottedPath
    """A reward function; its scores are seen by the labeler alone."""
    sharpness: PositiveFloat = 1.0
    noise: Fraction = 0.0
    """Share of labels that are a coin flip."""
    tie_below: NonNegativeFloat = 0.0
    """Call it a tie where the gold scores differ by less."""
    position_bias: float = 0.0
    """Log-odds in favour of what is shown first."""


class RewardModelLabelerConfig(Section):
    """A reward model that labels: the one with the higher score wins."""

    kind: Literal["reward_model"] = "reward_model"
    path: Location
    """A Hugging Face directory or hub id."""
    tie_below: NonNegativeFloat = 0.0


class JudgeConfig(Section):
    """A language model as judge, asked twice with the order swapped; where it disagrees with itself it is a tie."""

    kind: Literal["judge"] = "judge"
    url: HTTPAddress | None = None
    """An OpenAI-compatible endpoint, such as http://127.0.0.1:8000/v1."""
    model: Location
    """The model's name at the endpoint; without `url` a directory or hub id for this run's own rollout workers."""
    token_env: VariableName | None = None
    """Environment variable that holds the bearer token."""
    template: str | None = None
    """A Jinja2 file with the question; it gets `prompt`, `first`, `second` and must ask for A, B or TIE."""
    timeout_s: Seconds = 60.0
    attempts: PositiveInt = 4
    """Tries for an answer that did not come (time-outs, 429, 5xx), with growing pauses."""
    concurrency: PositiveInt = 8
    max_answer_tokens: PositiveInt = 512
    max_invalid_fraction: Fraction = 0.1
    """More invalid labels than this stop the round."""


AutomaticLabelerConfig = SimulatedLabelerConfig | RewardModelLabelerConfig | JudgeConfig
LabelerConfig = Annotated[PeopleConfig | AutomaticLabelerConfig, Field(discriminator="kind")]
