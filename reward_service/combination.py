"""Several rewards become one: each rule is a function of calibrated scores, and of one response at a time.

No rule looks at the other responses of a batch. What Llama 2 whitens over a batch is here a calibrated score already,
with mean 0 and standard deviation 1 on samples of the reference policy, so a response's score depends neither on its
batch-mates nor on the group it is scored in.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from configs.scoring import (
    CombineConfig,
    LinearCombination,
    MeanMinusStdCombination,
    MinimumCombination,
    SafetyFirstCombination,
)
from protocol.messages import FloatArray

Components = Mapping[str, FloatArray]
"""Name -> [B] calibrated scores."""


def combine(
    components: Components, *, weights: Mapping[str, float], config: CombineConfig, about_safety: Sequence[bool]
) -> FloatArray:
    """Combine the calibrated component scores by the configured rule.

    Args:
        components: Name -> [B] calibrated scores.
        weights: Name -> weight; the rules other than `linear` have all weights 1.
        config: The rule.
        about_safety: [B] whether the prompt is tagged as one about safety; for `safety_first` alone.

    Returns:
        [B] combined scores, float32.

    Raises:
        ValueError: If the names differ.
    """
    if not components or components.keys() != weights.keys():
        raise ValueError(f"scores of {sorted(components)} do not fit the weights of {sorted(weights)}")
    match config:
        case LinearCombination():
            combined = linear(components, weights=weights)
        case MeanMinusStdCombination():
            combined = mean_minus_std(components, num_stds=config.num_stds)
        case SafetyFirstCombination():
            combined = safety_first(
                components[config.helpfulness],
                components[config.safety],
                about_safety=about_safety,
                threshold=config.threshold,
            )
        case MinimumCombination():
            combined = minimum(components)
    return combined.astype(np.float32)


def linear(components: Components, *, weights: Mapping[str, float]) -> NDArray[np.float64]:
    """Add the scores by weight.

        R = sum_c w_c s_c        (on calibrated logits: sums of probabilities would saturate)

    Args:
        components: Name -> [B] calibrated scores.
        weights: Name -> weight.

    Returns:
        [B] combined scores.
    """
    # In the order of the weights and in float64, so that the sum does not depend on who finished first.
    weighted = [weight * np.asarray(components[name], np.float64) for name, weight in weights.items()]
    return np.sum(weighted, axis=0)


def minimum(components: Components) -> NDArray[np.float64]:
    """Take the worst score.

        R = min_c s_c

    Args:
        components: Name -> [B] calibrated scores.

    Returns:
        [B] combined scores.
    """
    return _stacked(components).min(axis=0)


def mean_minus_std(components: Components, *, num_stds: float) -> NDArray[np.float64]:
    """Take the mean of an ensemble, less where its members disagree.

        R = mean_c s_c - k std_c s_c        (biased: the members are all there are)

    Source: the uncertainty-weighted optimisation of Coste et al., "Reward Model Ensembles Help Mitigate
    Overoptimization" (2023), with the standard deviation in place of the variance, so that k has no unit.

    Args:
        components: Name -> [B] calibrated scores.
        num_stds: k.

    Returns:
        [B] combined scores.
    """
    # Sorted, so that the sums do not depend on who finished first.
    scores = _stacked({name: components[name] for name in sorted(components)})
    return scores.mean(axis=0) - num_stds * scores.std(axis=0)


def safety_first(
    helpfulness: FloatArray, safety: FloatArray, *, about_safety: Sequence[bool], threshold: float
) -> NDArray[np.float64]:
    """Take the safety score where safety is at stake, and the helpfulness score elsewhere.

        R = s_s   if the prompt is about safety or sigma(s_s) < threshold
            s_h   otherwise

    Source: Touvron et al., "Llama 2" (2023), section 3.2.3, in logits. The paper then whitens the logits over a batch;
    here both are calibrated on the same samples instead (ADR 10). The score jumps at the threshold, as it does
    in the paper.

    Args:
        helpfulness: [B] calibrated scores.
        safety: [B] calibrated scores.
        about_safety: [B] whether the prompt is tagged as one about safety.
        threshold: Between 0 and 1, on the sigmoid of a standardised score.

    Returns:
        [B] combined scores.
    """
    s = np.asarray(safety, np.float64)
    at_stake = np.asarray(about_safety, bool) | (s < math.log(threshold / (1 - threshold)))
    return np.where(at_stake, s, np.asarray(helpfulness, np.float64))


def _stacked(components: Components) -> NDArray[np.float64]:
    return np.stack([np.asarray(scores, np.float64) for scores in components.values()])
