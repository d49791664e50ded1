"""The records of the ladder: comparisons go in; ratings, leads and what they rest on come out."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

Interval = tuple[float, float]


class LadderError(ValueError):
    """Report comparisons from which no ladder can be made."""


class DisconnectedError(LadderError):
    """Report versions that no chain of comparisons connects: they have no common scale.

    Args:
        components: The groups of versions that are connected among themselves.
    """

    def __init__(self, components: Sequence[Sequence[str]]) -> None:
        named = "; ".join(", ".join(component) for component in components)
        super().__init__(f"no comparison connects these groups of versions, so they have no common scale: {named}")
        self.components = tuple(tuple(component) for component in components)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One judgement between the responses of two versions to one prompt."""

    first: str
    second: str
    prompt_id: str
    outcome: float
    """Share of the win that `first` gets: 1, 0.5 for a tie, 0."""
    weight: float = 1.0
    length_difference: float | None = None
    """Length of the first's response minus the second's, in tokens or characters."""
    judge: str = ""
    labeler: str = ""
    shown_first: str | None = None
    """Whichever of the two the labeler saw first."""

    def __post_init__(self) -> None:
        """Check the comparison.

        Raises:
            ValueError: Saying what is wrong with it.
        """
        if self.first == self.second:
            raise ValueError(f"version {self.first} is compared with itself")
        if not 0 <= self.outcome <= 1:
            raise ValueError(f"an outcome is a share from 0 to 1, not {self.outcome}")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(f"a weight is a positive number, not {self.weight}")
        if self.length_difference is not None and not math.isfinite(self.length_difference):
            raise ValueError(f"a length difference is a finite number, not {self.length_difference}")
        if self.shown_first not in (None, self.first, self.second):
            raise ValueError(f"{self.shown_first} was shown first, but is not compared")

    def line(self) -> str:
        """Return the comparison as one line, the same for equal comparisons."""
        length = None if self.length_difference is None else float(self.length_difference)
        numbers = (float(self.outcome), float(self.weight), length)
        return json.dumps(
            [self.prompt_id, self.first, self.second, *numbers, self.judge, self.labeler, self.shown_first]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """One version's place."""

    version: str
    elo: float
    """173.7178 theta; the anchor has 0."""
    theta: float
    """Log-odds of beating the anchor."""
    se_elo: float
    """From the inverse Fisher information: as if all comparisons were independent."""
    ci: Interval
    """Elo, by bootstrap over prompts."""
    ci_sandwich: Interval
    """Elo, cluster-robust by prompt."""
    num_comparisons: int
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """How far one version is above another; the intervals know that the two estimates depend on each other."""

    version: str
    over: str
    elo: float
    se_elo: float
    ci: Interval
    """By bootstrap over prompts."""
    ci_sandwich: Interval
    """Cluster-robust by prompt."""

    @property
    def ci_low(self) -> float:
        """Return the lower of the two lower ends: what a promotion must bring above zero."""
        return min(self.ci[0], self.ci_sandwich[0])

    @property
    def ci_high(self) -> float:
        """Return the higher of the two higher ends."""
        return max(self.ci[1], self.ci_sandwich[1])

    def turned(self) -> "Lead":
        """Return the same seen from the other version."""
        return Lead(
            version=self.over,
            over=self.version,
            elo=-self.elo,
            se_elo=self.se_elo,
            ci=(-self.ci[1], -self.ci[0]),
            ci_sandwich=(-self.ci_sandwich[1], -self.ci_sandwich[0]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two versions against each other: what was seen between them, and what the whole ladder says."""

    version: str
    """The one that stands higher."""
    over: str
    num_comparisons: int
    wins: int
    ties: int
    losses: int
    win_rate: float | None
    """Weighted share of the wins, ties half; None where the two were never compared."""
    win_rate_ci: Interval | None
    """Wilson's, cluster-robust by prompt."""
    lead: Lead


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionBias:
    """How often what was shown first won: half the time, if labelers do not mind the position."""

    share: float
    ci: Interval
    num_comparisons: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlledRating:
    """One version's place if all responses had the same length."""

    version: str
    elo: float
    ci_sandwich: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthControl:
    """The ladder with the length difference as a covariate, set to 0."""

    ratings: tuple[ControlledRating, ...]
    """Best first."""
    typical_difference: float
    """Root mean square of the length differences, in their unit."""
    length_elo: float
    """Elo that a response gains by being longer by the typical difference."""
    length_elo_ci: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """The versions, best first, and what their places rest on."""

    anchor: str
    ratings: tuple[Rating, ...]
    pairs: tuple[Pair, ...]
    """Every two versions once."""
    log_likelihood: float
    """Of the comparisons, without pseudo-wins."""
    position_bias: PositionBias | None
    """None where nobody recorded what was shown first."""
    length_controlled: LengthControl | None
    """None where a length is missing, or lengths hardly vary within a version."""
    separable: bool
    """Some versions won all their comparisons with the others, so pseudo-wins hold the ratings finite."""
    num_comparisons: int
    num_prompts: int
    judges: Mapping[str, int]
    """Judge -> comparisons."""
    confidence: float
    bootstrap_resamples: int
    seed: int
    comparisons_sha256: str
    """Of the comparisons, whatever their order."""

    def rating(self, version: str) -> Rating:
        """Find a version's rating.

        Raises:
            KeyError: If the version is not on the ladder.
        """
        for rating in self.ratings:
            if rating.version == version:
                return rating
        raise KeyError(version)

    def to_json(self) -> dict[str, Any]:
        """Write the ladder as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Ladder":
        """Read what `to_json` wrote; what else a file holds beside it is left alone."""
        read = {field.name: values[field.name] for field in fields(cls)}
        bias, control = values["position_bias"], values["length_controlled"]
        read["ratings"] = tuple(Rating(**_intervals(rating)) for rating in values["ratings"])
        read["pairs"] = tuple(_pair(pair) for pair in values["pairs"])
        read["position_bias"] = None if bias is None else PositionBias(**_intervals(bias))
        read["length_controlled"] = None if control is None else _length_control(control)
        return cls(**read)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """What a reward model's scores promise beside what was measured."""

    version: str
    over: str
    predicted_elo: float
    measured_elo: float
    ci: Interval
    """Of the measured lead."""
    alarm: bool
    """The promise lies above the interval: the policy has learnt to please the reward model, not the judge."""


def _intervals(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the lists that JSON makes of intervals back into pairs."""
    return {name: tuple(cast(list[Any], value)) if isinstance(value, list) else value for name, value in values.items()}


def _pair(values: Mapping[str, Any]) -> Pair:
    read = _intervals(values)
    read["lead"] = Lead(**_intervals(values["lead"]))
    return Pair(**read)


def _length_control(values: Mapping[str, Any]) -> LengthControl:
    read = _intervals(values)
    read["ratings"] = tuple(ControlledRating(**_intervals(rating)) for rating in values["ratings"])
    return LengthControl(**read)
