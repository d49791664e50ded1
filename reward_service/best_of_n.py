"""Best of n: sample n responses, keep the one that the reward model scores highest. Pure numpy.

The selection of rejection sampling, and the oldest optimiser against a reward model: its distance from the sampling
policy has a formula, and what it earns at every n can be estimated from one pool of samples.
"""

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protocol.messages import ScoredRollout

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


def keep_best(scored: Sequence[ScoredRollout], *, per_prompt: int = 1, seed: int) -> list[ScoredRollout]:
    """Keep the best responses to each prompt, from whatever rounds: what rejection-sampling fine-tuning imitates.

    Scores are compared, so all must come from one reward model: responses of earlier rounds are scored again by the
    newest. With those left out a policy forgets what it could do before (Llama 2, section 3.2.3).

    Args:
        scored: Responses of this round and of all earlier ones, in any order.
        per_prompt: How many to keep of each prompt; fewer where there are not as many different ones.
        seed: Of the lot between equal scores.

    Returns:
        The kept responses, by prompt in order of the prompts' ids, best first. Identical responses count once, as the
        one with the lowest key.

    Raises:
        ValueError: If there is no response, or a score is NaN.
    """
    _check(np.array([one.score for one in scored], np.float64))
    by_prompt: dict[str, dict[bytes, ScoredRollout]] = {}
    for one in sorted(scored, key=lambda one: one.rollout.key):
        different = by_prompt.setdefault(one.rollout.key.prompt_id, {})
        different.setdefault(one.rollout.response_ids.tobytes(), one)
    kept: list[ScoredRollout] = []
    for prompt_id, different in sorted(by_prompt.items()):
        responses = list(different.values())
        # Of the prompt alone, so that no other prompt decides between this one's equals.
        digest = hashlib.sha256(f"{seed}/best of n/{prompt_id}".encode()).digest()
        lot = np.random.default_rng(list(digest)).permutation(len(responses))
        order = np.lexsort((lot, np.array([-one.score for one in responses])))
        kept += [responses[place] for place in order[:per_prompt]]
    return kept


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
