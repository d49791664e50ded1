"""How good a reward model is on pairs that it has not seen. Pure numpy."""

from typing import Any

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
        `num_pairs_both_high`, `score_mean`, `score_std`, `num_pairs`, `num_responses`.
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


def _pearson(left: NDArray[np.float64], right: NDArray[np.int64]) -> float | None:
    if left.std() == 0 or right.std() == 0:
        return None
    return float(np.corrcoef(left, right)[0, 1])
