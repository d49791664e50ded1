"""The ladder if all responses had the same length: Bradley-Terry with a length covariate, set to 0."""

from statistics import NormalDist

import numpy as np

from reward_service import bradley_terry as bt
from reward_service.bradley_terry import ELO_PER_LOGIT, Floats, Ints
from reward_service.comparison_log import ComparisonLog
from reward_service.ladder_records import ControlledRating, LengthControl

# Below this share of the variance of the length differences that versions do not explain, length is a property of the
# version and cannot be told from its quality.
_MIN_VARIATION = 0.01


def control_length(log: ComparisonLog, *, added: Floats, confidence: float) -> LengthControl | None:
    """Fit the ratings beside a length effect, and read them off at equal lengths.

        logit P(first wins) = theta_first - theta_second + phi tanh(d / rms(d)),  d = length difference

    Source: AlpacaEval 2 (Dubois et al. 2024). The root mean square stands for its standard deviation because it does
    not depend on which of the two is called first.

    Args:
        log: The comparisons.
        added: [D] pseudo-wins of the plain fit.
        confidence: Of the intervals.

    Returns:
        None where a length is missing, or lengths hardly vary within a version.
    """
    given = [c.length_difference for c in log.comparisons]
    lengths = np.array([length for length in given if length is not None], np.float64)
    versions = bt.design(log.sides, num_versions=len(log.versions), anchor=log.anchor)
    if len(lengths) < len(given) or not _vary(versions, lengths, log.weights):
        return None
    typical = float(np.sqrt(np.average(lengths**2, weights=log.weights)))
    rows, weights, prompts = _rows(log, np.column_stack([versions, np.tanh(lengths / typical)]), added)
    beta = bt.maximise(rows, weights[None])
    information: Floats = bt.information(rows, weights[None], beta)[0]
    scores = np.zeros((log.num_prompts + 1, rows.shape[1]))
    np.add.at(scores, prompts, weights[:, None] * bt.row_scores(rows, beta[0]))
    variance = np.diag(bt.sandwich(information, scores, num_clusters=log.num_prompts))
    half = bt.quantile(confidence, log.num_prompts) * np.sqrt(variance)
    if added.any():
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        half = np.maximum(half, z * np.sqrt(np.diag(np.linalg.inv(information))))
    half *= ELO_PER_LOGIT
    elo = ELO_PER_LOGIT * beta[0]
    # What phi is worth to a response that is longer by the typical difference.
    effect, effect_half = float(np.tanh(1) * elo[-1]), float(np.tanh(1) * half[-1])
    return LengthControl(
        ratings=_ratings(log, np.insert(elo[:-1], log.anchor, 0.0), np.insert(half[:-1], log.anchor, 0.0)),
        typical_difference=typical,
        length_elo=effect,
        length_elo_ci=(effect - effect_half, effect + effect_half),
    )


def _vary(versions: Floats, lengths: Floats, weights: Floats) -> bool:
    """Tell whether length differences are more than the versions' own mean lengths explain."""
    scale = np.sqrt(weights)
    target = scale * lengths
    if not target.any():
        return False
    explaining = scale[:, None] * versions
    rest = target - explaining @ np.linalg.lstsq(explaining, target)[0]
    return float(rest @ rest) >= _MIN_VARIATION * float(target @ target)


def _rows(log: ComparisonLog, forward: Floats, added: Floats) -> tuple[Floats, Floats, Ints]:
    """Return rows, weights and prompts: wins, losses as wins of the other, and pseudo-wins on a prompt of their own."""
    between = bt.design(log.counts.directions, num_versions=len(log.versions), anchor=log.anchor)
    # One tie between equally good responses of which one is much longer keeps phi finite where length decides all.
    pseudo = np.zeros((len(between) + 2, forward.shape[1]))
    pseudo[:-2, :-1] = between
    pseudo[-2:, -1] = 1.0, -1.0
    weights = [log.weights * log.outcomes, log.weights * (1 - log.outcomes), added, [0.5, 0.5]]
    prompts = [log.prompts, log.prompts, np.full(len(pseudo), log.num_prompts)]
    return np.concatenate([forward, -forward, pseudo]), np.concatenate(weights), np.concatenate(prompts)


def _ratings(log: ComparisonLog, elo: Floats, half: Floats) -> tuple[ControlledRating, ...]:
    ratings = [
        ControlledRating(version=version, elo=float(at), ci_sandwich=(float(at - by), float(at + by)))
        for version, at, by in zip(log.versions, elo, half, strict=True)
    ]
    return tuple(sorted(ratings, key=lambda rating: (-rating.elo, rating.version)))
