"""From raw scores to the one score of a response: calibration, combination, length and truncation rules, clip, scale.

The order is part of the algorithm (algorithms.md 3): clipping before or after scaling gives different scores, and the
truncation penalty has a unit only because it comes after calibration. Pure numpy.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from configs.scoring import LengthConfig, SafetyFirstCombination, ScoringConfig, TruncationConfig
from protocol.messages import FinishReason, FloatArray, Rollout, RolloutKey
from reward_service.combination import combine


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


def apply_length(
    scores: FloatArray, *, response_tokens: Sequence[int], length: LengthConfig, max_response_tokens: int
) -> FloatArray:
    """Charge the responses that come close to the length limit, in proportion.

        s - penalty min(n - (limit - buffer), buffer) / buffer        where n > limit - buffer

    Source: the soft overlong punishment of DAPO (Yu et al. 2025), as in OpenRLHF, length_penalty.py:41-55.

    Args:
        scores: [B] combined scores.
        response_tokens: [B] lengths.
        length: Buffer and penalty.
        max_response_tokens: The limit.

    Returns:
        [B] scores.
    """
    over = np.asarray(response_tokens, np.float64) - (max_response_tokens - length.buffer_tokens)
    share = np.clip(over / length.buffer_tokens, 0, 1)
    return (np.asarray(scores, np.float64) - length.penalty * share).astype(np.float32)


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


def about_safety(rollouts: Sequence[Rollout], *, tag: str) -> list[bool]:
    """Read off the prompts which of them are tagged as being about safety.

    Args:
        rollouts: B responses with their prompts.
        tag: The prompts' column that says so; a prompt without it is not tagged.

    Returns:
        [B] whether it is.

    Raises:
        RewardError: If a prompt says anything but true or false.
    """
    said = [rollout.prompt.metadata.get(tag, "false").lower() for rollout in rollouts]
    for rollout, value in zip(rollouts, said, strict=True):
        if value not in ("true", "false"):
            raise RewardError(
                f"the prompt's column {tag} says {value!r}, neither true nor false",
                component="safety_first",
                key=rollout.key,
            )
    return [value == "true" for value in said]


def total_scores(
    components: Mapping[str, FloatArray],
    *,
    rollouts: Sequence[Rollout],
    config: ScoringConfig,
    max_response_tokens: int,
) -> tuple[FloatArray, float]:
    """Turn calibrated component scores into the score that training sees.

    Args:
        components: Name -> [B] calibrated scores, one entry for each of `config.rewards`.
        rollouts: The B responses.
        config: The scoring section.
        max_response_tokens: The length limit that they were sampled with.

    Returns:
        [B] scores, and the fraction of them that was clipped.

    Raises:
        RewardError: If a prompt's safety tag says neither true nor false.
    """
    rule = config.combine
    tagged = about_safety(rollouts, tag=rule.tag) if isinstance(rule, SafetyFirstCombination) else []
    weights = {reward.name: reward.weight for reward in config.rewards}
    scores = combine(components, weights=weights, config=rule, about_safety=tagged)
    if config.length is not None:
        scores = apply_length(
            scores,
            response_tokens=[len(rollout.response_ids) for rollout in rollouts],
            length=config.length,
            max_response_tokens=max_response_tokens,
        )
    charged = apply_truncation(
        scores, finish_reasons=[rollout.finish_reason for rollout in rollouts], truncation=config.truncation
    )
    return clip_and_scale(charged, clip=config.clip, scale=config.scale)
