"""How good a reward model is on pairs that it has not seen. Pure numpy."""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_BINS = 10


def validation_report(
    scores: NDArray[np.float64],
    *,
    better: NDArray[np.int64],
    worse: NDArray[np.int64],
    response_tokens: NDArray[np.int64],
) -> dict[str, Any]:
    """Judge scores by held-out pairs.

        accuracy = share of gaps > 0 (a tie is an error),  NLL = mean -log sigma(gap),  gap = s_better - s_worse

    Source: algorithms.md 12; the calibration by gap is Bai et al. (2022), Fig. 9.

    Args:
        scores: [S] of the different responses.
        better: [P] which response each pair prefers.
        worse: [P] to which.
        response_tokens: [S] lengths of the responses, in tokens.

    Returns:
        `accuracy`, `nll_nats`, `ece`, `calibration` (the bins behind it), `length_correlation` (Pearson; None where
        scores or lengths are all equal), `accuracy_both_high` on pairs with both scores above the median and
        `num_pairs_both_high`, `temperature` (what the scores would have to be divided by; above 1 the model is too
        sure of itself), `score_mean`, `score_std`, `num_pairs`, `num_responses`.
    """
    gaps = scores[better] - scores[worse]
    middle = np.median(scores)
    high = (scores[better] > middle) & (scores[worse] > middle)
    ece, bins = expected_calibration_error(gaps)
    return {
        "num_pairs": len(gaps),
        "num_responses": len(scores),
        "accuracy": float(np.mean(gaps > 0)),
        "nll_nats": float(np.mean(np.logaddexp(0, -gaps))),
        "ece": ece,
        "length_correlation": _pearson(scores, response_tokens),
        "num_pairs_both_high": int(high.sum()),
        "accuracy_both_high": float(np.mean(gaps[high] > 0)) if high.any() else None,
        "temperature": best_temperature(gaps, np.ones(len(gaps))),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "calibration": bins,
    }


def expected_calibration_error(gaps: NDArray[np.float64]) -> tuple[float, list[dict[str, float]]]:
    """Compare how sure a reward model is with how often it is right.

        ECE = sum over bins of n_b / n |accuracy_b - mean sigma(|gap|)_b|

    Args:
        gaps: [P] score of the better response minus the worse one's; the bins hold equally many, by |gap|.

    Returns:
        The error, and of each bin the number of pairs, the mean |gap|, the predicted and the observed accuracy.
    """
    parts = np.array_split(gaps[np.argsort(np.abs(gaps), kind="stable")], min(_BINS, len(gaps)))
    bins = [
        {
            "num_pairs": len(part),
            "gap_mean": float(np.abs(part).mean()),
            "predicted_accuracy": float(np.mean(1 / (1 + np.exp(-np.abs(part))))),
            "observed_accuracy": float(np.mean(part > 0)),
        }
        for part in parts
    ]
    errors = [b["num_pairs"] * abs(b["observed_accuracy"] - b["predicted_accuracy"]) for b in bins]
    return float(np.sum(errors) / len(gaps)), bins


def best_temperature(gaps: NDArray[np.float64], preferred: NDArray[np.float64]) -> float | None:
    """Find the temperature at which scores predict labels best.

        T = argmin mean -[ p log sigma(gap / T) + (1 - p) log sigma(-gap / T) ]

    Source: the recalibration of proxy logits in Gao et al. (2022), section 2.2; Guo et al. (2017).

    Args:
        gaps: [P] score of one response minus that of another.
        preferred: [P] how likely the one is preferred, 0 to 1: soft labels, or ones where it was.

    Returns:
        T; None where no positive, finite temperature is best: the scores contradict the labels, or say nothing about
        them, or all pairs are told apart without an error.
    """

    def slope(factor: float) -> float:
        """Differentiate the loss by 1 / T, in which it is convex."""
        predicted = np.exp(-np.logaddexp(0, -factor * gaps))
        return float(np.mean(gaps * (predicted - preferred)))

    low, high = 0.0, 1.0
    if slope(low) >= 0 or np.mean(gaps * ((gaps > 0) - preferred)) <= 0:
        return None
    while slope(high) < 0:
        high *= 2
    for _ in range(60):  # to the last digit of float64
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def paired_gain(
    new: NDArray[np.float64],
    old: NDArray[np.float64],
    *,
    prompts: NDArray[np.int64],
    metric: Literal["nll", "accuracy"],
    confidence: float,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Compare two reward models on the same held-out pairs, with a bootstrap over prompts.

        gain = mean (log sigma(gap_new) - log sigma(gap_old))      for nll, in nats
        gain = mean ([gap_new > 0] - [gap_old > 0])                for accuracy

    Each model's gaps are first divided by its own best temperature when the metric is nll, so that a model is not
    called better for being less sure of itself.

    Args:
        new: [P] score of the better response minus the worse one's, by the new model.
        old: [P] the same by the old one.
        prompts: [P] the prompt of each pair; pairs of one prompt are drawn together.
        metric: What is compared.
        confidence: Of the two-sided interval.
        resamples: Bootstrap resamples.
        seed: Of the bootstrap.

    Returns:
        `metric`, `gain`, `ci_low`, `ci_high`, `passed` (the whole interval above zero), `num_pairs`, `num_prompts`, and
        each model's `accuracy` and `nll_nats`.
    """
    per_pair = _log_likelihoods(new) - _log_likelihoods(old) if metric == "nll" else (new > 0) * 1.0 - (old > 0) * 1.0
    _, index = np.unique(prompts, return_inverse=True)
    sums, counts = np.bincount(index, weights=per_pair), np.bincount(index)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(counts), size=(resamples, len(counts)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {
        "metric": metric,
        "gain": float(per_pair.mean()),
        "ci_low": float(low),
        "ci_high": float(high),
        "passed": bool(low > 0),
        "num_pairs": len(new),
        "num_prompts": len(counts),
        "new": {"accuracy": float(np.mean(new > 0)), "nll_nats": float(np.mean(np.logaddexp(0, -new)))},
        "old": {"accuracy": float(np.mean(old > 0)), "nll_nats": float(np.mean(np.logaddexp(0, -old)))},
    }


def _log_likelihoods(gaps: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return log sigma(gap / T) of each pair at the temperature T that fits all of them best."""
    factors = np.geomspace(0.05, 20.0, 121)
    total = [float(np.logaddexp(0, -gaps * factor).mean()) for factor in factors]
    return -np.logaddexp(0, -gaps * factors[int(np.argmin(total))])


def _pearson(left: NDArray[np.float64], right: NDArray[np.int64]) -> float | None:
    if left.std() == 0 or right.std() == 0:
        return None
    return float(np.corrcoef(left, right)[0, 1])
