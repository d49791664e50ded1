"""The rounds: what each collects, learns from and optimises, and when it stops."""

from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, model_validator

from configs.base import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Temperature,
    VariableName,
)
from configs.labels import LabelerConfig

PolicyName = Annotated[str, Field(pattern=r"^(sft|current|best|v[0-9]{3,9})$")]
"""`sft` (version 0), `current` (the last round's), `best` (the ladder's incumbent), or a version such as `v020`."""
StartName = Annotated[str, Field(pattern=r"^(sft|current|best|previous|v[0-9]{3,9})$")]
"""What a round may start from: a policy, or `previous` (what it is in the round before)."""


class CollectConfig(Section):
    """Which responses of a round are put before labelers."""

    comparisons: NonNegativeInt = 0
    """Tasks a round; 0 collects nothing and learns from what is there."""
    policies: list[PolicyName] = ["current"]
    """Who writes the responses; several policies are compared with each other."""
    temperatures: list[Temperature] = [1.0]
    """Dealt out over the responses in turn."""
    responses_per_task: Annotated[int, Field(ge=2, le=9)] = 2
    """2: a pair; 3 to 9: a ranking."""
    samples_per_prompt: PositiveInt = 2
    """Responses sampled for each prompt, of which the tasks are formed; at least `responses_per_task`."""

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if self.samples_per_prompt < self.responses_per_task:
            raise ValueError(
                f"samples_per_prompt = {self.samples_per_prompt} is less than "
                f"responses_per_task = {self.responses_per_task}"
            )
        if self.samples_per_prompt < len(self.policies):
            raise ValueError(
                f"samples_per_prompt = {self.samples_per_prompt} is less than the {len(self.policies)} policies"
            )
        return self


class MixtureConfig(Section):
    """How much the comparisons of each source count in the reward model's loss."""

    base: NonNegativeFloat = 1.0
    """`data.preferences`."""
    earlier: NonNegativeFloat = 1.0
    """Comparisons of earlier rounds."""
    newest: NonNegativeFloat = 1.0
    """This round's comparisons."""


class GateConfig(Section):
    """When a refreshed reward model may replace the one before: better on held-out pairs, by an interval."""

    enabled: bool = True
    metric: Literal["nll", "accuracy"] = "nll"
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    bootstrap_resamples: PositiveInt = 2000
    pairs: Literal["newest", "all"] = "newest"
    """Held-out pairs of this round alone, or of all sources."""
    min_prompts: PositiveInt = 20
    """With fewer held-out prompts the gate cannot tell, and the old reward model stays."""


class GuardsConfig(Section):
    """Alarms that stop a round; the best version is kept."""

    kl_nats_per_sequence: PositiveFloat | None = None
    """The round's KL budget."""
    heldout_gap: PositiveFloat | None = None
    """Largest rise of (score - held-out reward model's score) over the round's start, in standard deviations."""
    response_tokens_factor: PositiveFloat | None = None
    """Largest mean response length, as a multiple of the round's start."""
    repetition_fraction: Fraction | None = None
    """Largest mean share of repeated 3-grams in a response."""
    entropy_nats: PositiveFloat | None = None
    """Smallest mean entropy of the policy's next-token distribution."""
    window_iterations: PositiveInt = 3
    """Iterations over which a figure is averaged before it is compared with its bound."""


class EvaluationConfig(Section):
    """The evaluation of each round's policy, on held-out prompts, and its place on the ladder."""

    num_prompts: PositiveInt = 256
    bootstrap_resamples: PositiveInt = 2000
    opponents: list[PolicyName] = ["sft", "best"]
    """Whom the new version is compared with for the ladder."""
    num_comparisons: PositiveInt | None = None
    """Comparisons with each opponent; one for each held-out prompt if not given."""
    labeler: LabelerConfig | None = None
    """Who judges those comparisons; the round's labeler if not given, and without one the gold score or the score."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of the ladder's intervals. A version becomes the best where its whole lead over the incumbent is above zero."""


class RoundOverride(Section):
    """What one round does differently."""

    iterations: PositiveInt | None = None
    collect: CollectConfig | None = None
    labeler: LabelerConfig | None = None
    mixture: MixtureConfig | None = None
    init_policy: StartName | None = None
    reward_start: Literal["cold", "warm"] | None = None
    guards: GuardsConfig | None = None


_MERGED = ("collect", "mixture", "guards")


def _merged(override: Any, general: dict[str, Any]) -> Any:
    """Fill the sections of one round's override."""
    if not isinstance(override, dict):
        return cast(object, override)
    filled = dict(cast(dict[str, Any], override))
    for name in _MERGED:
        given, common = filled.get(name), general.get(name)
        if isinstance(given, dict) and isinstance(common, dict):
            filled[name] = {**cast(dict[str, Any], common), **cast(dict[str, Any], given)}
    return filled


class RoundsConfig(Section):
    """The schedule of rounds; `overrides` changes single ones."""

    count: Annotated[int, Field(gt=0, le=500)] = 1
    iterations: PositiveInt = 100
    """Iterations (generate, score, learn, publish) in each round."""
    collect: CollectConfig = CollectConfig()
    labeler: LabelerConfig | None = None
    """Who labels what a round collects."""
    mixture: MixtureConfig = MixtureConfig()
    init_policy: StartName = "sft"
    """What a round's optimisation starts from. Starting again from `sft` is what iterated RLHF found robust."""
    reward_start: Literal["cold", "warm"] = "cold"
    """`cold`: a new reward model from `models.reward.init`; `warm`: from the one before."""
    refresh: bool = True
    """Train a reward model in every round; otherwise the first round's one serves all."""
    heldout_share: Annotated[float, Field(ge=0, le=0.5)] = 0.5
    """Share of the comparisons that trains the held-out reward model, which never rewards anything: score minus
    held-out score measures over-optimisation. 0 trains none."""
    gate: GateConfig = GateConfig()
    guards: GuardsConfig = GuardsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    store_env: VariableName | None = None
    """Environment variable that holds the URL of a PostgreSQL database for tasks and labels (postgresql+psycopg://...);
    without one they are kept in the run directory's preferences.db (SQLite)."""
    overrides: dict[str, RoundOverride] = {}
    """Round number -> what it does differently."""

    @model_validator(mode="before")
    @classmethod
    def _overrides_change_single_values(cls, values: Any) -> Any:
        """Fill what an override of a section leaves out with what the section says for all rounds."""
        if not isinstance(values, dict):
            return cast(object, values)  # whatever is wrong with it is said in its place
        general = cast(dict[str, Any], values)
        overrides = general.get("overrides")
        if not isinstance(overrides, dict):
            return general
        merged = {number: _merged(override, general) for number, override in cast(dict[str, Any], overrides).items()}
        return {**general, "overrides": merged}

    @model_validator(mode="after")
    def _overrides_name_rounds(self) -> Self:
        numbers = {str(number) for number in range(1, self.count + 1)}
        for name in self.overrides:
            # Only what `of` will look up: "01" would change nothing.
            if name not in numbers:
                raise ValueError(f"overrides.{name}: rounds are numbered from 1 to {self.count}")
        return self

    @model_validator(mode="after")
    def _somebody_labels(self) -> Self:
        for number in range(1, self.count + 1):
            plan = self.of(number)
            if plan.collect.comparisons and plan.labeler is None:
                raise ValueError(
                    f"round {number} collects comparisons, but rounds.labeler does not say who labels them"
                )
        return self

    @model_validator(mode="after")
    def _policies_will_be_there(self) -> Self:
        ends = {0}
        version = 0
        for number in range(1, self.count + 1):
            plan = self.of(number)
            here = {*ends, version + plan.iterations + (number > 1)}
            for name in (plan.init_policy, *plan.collect.policies):
                _require(name, ends, f"round {number}")
            for name in self.evaluation.opponents:
                _require(name, here if number == self.count else ends | {0}, f"round {number}'s evaluation")
            ends, version = here, max(here)
        return self

    @model_validator(mode="after")
    def _nothing_is_asked_in_vain(self) -> Self:
        for number in range(1, self.count + 1):
            plan = self.of(number)
            if plan.guards.heldout_gap is not None and self.heldout_share == 0:
                raise ValueError("guards.heldout_gap needs a held-out reward model: set rounds.heldout_share above 0")
            if plan.collect.comparisons and number > 1 and not self.refresh:
                raise ValueError(
                    f"round {number} collects comparisons, but with rounds.refresh = false no reward model learns from "
                    "them"
                )
            judged = plan.labeler is not None or self.evaluation.labeler is not None
            if not judged and "best" in (plan.init_policy, *plan.collect.policies):
                raise ValueError(
                    f"round {number} uses the best policy, but nobody judges which that is: set rounds.labeler or "
                    "rounds.evaluation.labeler (a gold score must not decide what is trained)"
                )
        return self

    def of(self, number: int) -> "RoundPlan":
        """Return what a round does, its overrides applied."""
        override = self.overrides.get(str(number), RoundOverride())
        chosen: dict[str, Any] = {}
        for name in RoundOverride.model_fields:
            value = getattr(override, name)
            chosen[name] = getattr(self, name) if value is None else value
        return RoundPlan(**chosen)


class RoundPlan(Section):
    """One round, resolved."""

    iterations: PositiveInt
    collect: CollectConfig
    labeler: LabelerConfig | None
    mixture: MixtureConfig
    init_policy: StartName
    reward_start: Literal["cold", "warm"]
    guards: GuardsConfig


def _require(name: str, there: set[int], where: str) -> None:
    """Refuse a version that will not have been exported by then."""
    if name.startswith("v") and int(name[1:]) not in there:
        known = ", ".join(f"v{version:03d}" for version in sorted(there))
        raise ValueError(f"{where} names policy {name}, which will not be there; there will be {known}")
