"""Best of n: sample n responses, keep the one that the reward model scores highest. Pure numpy.

The oldest optimiser against a reward model: its distance from the sampling policy has a formula, and what it earns at
every n can be estimated from one pool of samples. Learning from the choice is learner/selection.py's.
"""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def kl_bound(n: int) -> float:
    """Bound the KL of the best of n from the policy that samples.

        KL = log n - (n - 1) / n

    It is exact where no two responses can have the same score, and an upper bound elsewhere.

    Source: Stiennon et al., "Learning to summarize from human feedback" (2020), appendix G.3; Beirami et al.,
    "Theoretical guarantees on the best-of-n alignment policy" (2024) for the bound.

    Args:
        n: Samples, at least one.

    Returns:
        Nats.

    Raises:
        ValueError: If n is less than one.
    """
    if n < 1:
        raise ValueError(f"the best of {n} is nobody")
    return math.log(n) - (n - 1) / n


def expected_best(scores: Floats, values: Floats, *, n: int) -> float:
    """Estimate, without bias, the mean value of the best of n from N >= n samples.

        E = sum_i C(i - 1, n - 1) / C(N, n) v_(i)        with v_(i) the value of the sample with the i-th lowest score

    Among equal scores the lot decides, whose expectation is the mean of their values.

    Source: Nakano et al., "WebGPT" (2021), appendix I.

    Args:
        scores: [N] what the best is chosen by.
        values: [N] what it is worth, such as the gold score; the scores themselves give the proxy's mean.
        n: Samples that the best is chosen from.

    Returns:
        The mean over all subsets of n samples.

    Raises:
        ValueError: If there are fewer than n samples, or scores and values do not fit.
    """
    _check(scores)
    num = len(scores)
    if values.shape != scores.shape or not 1 <= n <= num:
        raise ValueError(f"the best of {n} cannot be estimated from scores {scores.shape} and values {values.shape}")
    order = np.argsort(scores, kind="stable")
    _, group = np.unique(scores[order], return_inverse=True)
    means = np.bincount(group, weights=values[order]) / np.bincount(group)
    return float(np.dot(_weights(num, n), means[group]))


def _weights(num: int, n: int) -> Floats:
    """Compute C(i - 1, n - 1) / C(N, n) for i = 1..N, from the top down.

    w_N = n / N,  w_(i-1) = w_i (i - n) / (i - 1)
    """
    ranks = np.arange(num, 1, -1, dtype=np.float64)
    ratios = np.maximum(ranks - n, 0.0) / (ranks - 1.0)
    downwards = (n / num) * np.cumprod(np.append(1.0, ratios)).astype(np.float64)
    return downwards[::-1]


def _check(scores: Floats) -> None:
    if scores.ndim != 1 or not len(scores) or np.isnan(scores).any():
        raise ValueError(f"best of n needs a list of scores, none of them NaN, got {scores.tolist()[:8]}")
