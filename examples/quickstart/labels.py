"""Simulated labelers: people who usually, not always, prefer the answer with the higher gold score."""

import math
import random

SHARPNESS = 4.0
"""How strongly a difference in gold score decides: at 0.25 of difference, the better answer wins 73% of the time."""


def preference_probability(gold_a: float, gold_b: float) -> float:
    """Return the probability that a labeler prefers answer a over answer b.

    P(a over b) = sigmoid(4 (gold_a - gold_b)), so equal answers are decided by a fair coin.
    """
    return 1.0 / (1.0 + math.exp(-SHARPNESS * (gold_a - gold_b)))


def prefers_first(rng: random.Random, gold_a: float, gold_b: float) -> bool:
    """Draw one label: whether the labeler prefers answer a."""
    return rng.random() < preference_probability(gold_a, gold_b)
