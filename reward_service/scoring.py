"""From raw scores to the one score of a response: calibration, combination, truncation rule, clip, scale.

The order is part of the algorithm (algorithms.md 3): clipping before or after scaling gives different scores, and the
truncation penalty has a unit only because it comes after calibration. Pure numpy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from configs.scoring import ScoringConfig, TruncationConfig
from protocol.messages import FinishReason, FloatArray, RolloutKey


class RewardError(RuntimeError):
    """Report that a reward could not be computed. A failed reward is a failure, never a zero.

    It survives pickling, so that it reaches the driver from a worker.

    Args:
        what: What happened, in one sentence without a full stop.
        component: The reward's name in the configuration.
        key: The response it failed on, or the first of the batch where nobody knows which.
        incident: The file of the incident, which names the one that holds the batch.
    """

    def __init__(
        self, what: str, *, component: str = "", key: RolloutKey | None = None, incident: str | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.component = component
        self.key = key
        self.incident = incident

    def saved_at(self, incident: str) -> "RewardError":
        """Return the same error with the file of its incident."""
        return RewardError(self.what, component=self.component, key=self.key, incident=incident)

    def __str__(self) -> str:
        saved = "" if self.incident is None else f" Its batch is kept: rondo incident show {self.incident}"
        return f"reward {self.component} failed on {self.key}: {self.what}.{saved}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What gives a score its zero and its unit: gain * score + bias.

    Args:
        gain: 1 / standard deviation of the raw scores of the anchor samples.
        bias: Minus their mean, in units of the standard deviation.
    """

    gain: float = 1.0
    bias: float = 0.0

    def apply(self, raw: FloatArray) -> FloatArray:
        """Bring raw scores to the unit of the anchor samples."""
        return (np.asarray(raw, np.float64) * self.gain + self.bias).astype(np.float32)


IDENTITY = Calibration()


def calibrate(raw: FloatArray) -> Calibration:
    """Find the calibration under which reference samples have mean 0 and standard deviation 1.

        gain = 1 / std,  bias = -mean / std        (biased variance)

    Source: `normalize_after` of openai/lm-human-preferences, rewards.py:77-89 (algorithms.md 12).

    Args:
        raw: [S] raw scores of samples of the reference policy.

    Returns:
        Gain and bias.

    Raises:
        ValueError: If there are fewer than two scores, or they are not finite, or (almost) all equal.
    """
    precise = np.asarray(raw, np.float64)
    if precise.ndim != 1 or len(precise) < 2 or not np.isfinite(precise).all():
        raise ValueError(f"calibration needs at least two finite scores, got {precise.tolist()[:8]} ({precise.shape})")
    mean, std = float(precise.mean()), float(precise.std())
    # Below float32 resolution the spread is rounding, and a gain would only blow it up.
    if std <= 1e-6 * max(1.0, abs(mean)):
        raise ValueError(f"calibration needs scores that differ, got mean {mean} and standard deviation {std}")
    return Calibration(gain=1 / std, bias=-mean / std)


def require_scores(raw: object, *, component: str, keys: Sequence[RolloutKey]) -> FloatArray:
    """Check that there is one finite number for each response.

    Args:
        raw: What the reward returned.
        component: The reward's name.
        keys: The responses it was asked about.

    Returns:
        [B] scores, float32.

    Raises:
        RewardError: If they are not numbers, too many or too few, or not finite; it names the first bad response.
    """
    try:
        scores = np.asarray(raw if hasattr(raw, "__len__") else None)
    except (ValueError, TypeError, RuntimeError) as error:  # a ragged list, or a tensor that NumPy cannot read
        raise RewardError(f"it returned no sequence of numbers: {error}", component=component, key=keys[0]) from error
    if scores.dtype.kind not in "fiub":
        raise RewardError(
            f"it returned {type(raw).__name__}, not a sequence of numbers", component=component, key=keys[0]
        )
    if scores.shape != (len(keys),):
        raise RewardError(
            f"it returned an array of shape {scores.shape} for {len(keys)} responses", component=component, key=keys[0]
        )
    finite = np.abs(scores) <= np.finfo(np.float32).max  # neither for infinity nor for NaN
    if not finite.all():
        bad = int(np.argmin(finite))
        raise RewardError(f"it returned {scores[bad]}", component=component, key=keys[bad])
    return scores.astype(np.float32)


def combine(components: Mapping[str, FloatArray], *, weights: Mapping[str, float]) -> FloatArray:
    """Add the calibrated component scores by weight.

        sum_c w_c s_c        (algorithms.md 13, linear on normalised logits)

    Args:
        components: Name -> [B] calibrated scores.
        weights: Name -> weight.

    Returns:
        [B] combined scores.

    Raises:
        ValueError: If the names differ.
    """
    if not components or components.keys() != weights.keys():
        raise ValueError(f"scores of {sorted(components)} do not fit the weights of {sorted(weights)}")
    # In the order of the weights and in float64, so that the sum does not depend on who finished first.
    weighted = [weight * np.asarray(components[name], np.float64) for name, weight in weights.items()]
    return np.sum(weighted, axis=0).astype(np.float32)


def apply_truncation(
    scores: FloatArray, *, finish_reasons: Sequence[FinishReason], truncation: TruncationConfig
) -> FloatArray:
    """Charge the responses that hit the length limit.

        subtract: s - penalty        replace: -penalty        none: s

    Source: `subtract` is TRL's missing_eos_penalty, `replace` is LMHP-D:619-625. A factor is not offered: it would
    reward the truncation of a negative score (algorithms.md 3).

    Args:
        scores: [B] combined scores.
        finish_reasons: [B] why each response ended.
        truncation: Rule and penalty.

    Returns:
        [B] scores.
    """
    truncated = np.array([reason == "length" for reason in finish_reasons], bool)
    penalty = np.float32(truncation.penalty)
    match truncation.rule:
        case "subtract":
            return np.where(truncated, scores - penalty, scores).astype(np.float32)
        case "replace":
            return np.where(truncated, -penalty, scores).astype(np.float32)
        case "none":
            return np.asarray(scores, np.float32)


def clip_and_scale(scores: FloatArray, *, clip: float | None, scale: float) -> tuple[FloatArray, float]:
    """Clip the scores to +-clip, then scale them.

    Args:
        scores: [B] after the truncation rule.
        clip: Bound, in standard deviations of the score; none by default.
        scale: Factor on what is left.

    Returns:
        [B] scores, and the fraction of them that was clipped.
    """
    if clip is None:
        return (np.asarray(scores) * np.float32(scale)).astype(np.float32), 0.0
    clipped = np.clip(scores, -clip, clip)
    fraction = float(np.mean(np.abs(scores) > clip)) if len(scores) else 0.0
    return (clipped * np.float32(scale)).astype(np.float32), fraction


def total_scores(
    components: Mapping[str, FloatArray], *, finish_reasons: Sequence[FinishReason], config: ScoringConfig
) -> tuple[FloatArray, float]:
    """Turn calibrated component scores into the score that training sees.

    Args:
        components: Name -> [B] calibrated scores, one entry for each of `config.rewards`.
        finish_reasons: [B] why each response ended.
        config: The scoring section.

    Returns:
        [B] scores, and the fraction of them that was clipped.
    """
    combined = combine(components, weights={reward.name: reward.weight for reward in config.rewards})
    charged = apply_truncation(combined, finish_reasons=finish_reasons, truncation=config.truncation)
    return clip_and_scale(charged, clip=config.clip, scale=config.scale)
