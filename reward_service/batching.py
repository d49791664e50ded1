"""Micro-batches under a token budget, and the way back to the original order. Pure."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IndexArray = NDArray[np.int64]


def plan_micro_batches(lengths: Sequence[int], *, budget_tokens: int) -> tuple[IndexArray, ...]:
    """Group sequences of similar length, so that each padded micro-batch stays within the budget.

        rows x longest row <= budget

    Equal lengths keep their order, so the plan is a function of the lengths alone.

    Args:
        lengths: [B] tokens of each sequence.
        budget_tokens: Largest number of tokens in a padded micro-batch.

    Returns:
        The indices of each micro-batch, shortest sequences first; every index exactly once.

    Raises:
        ValueError: If a sequence is empty or longer than the budget.
    """
    tokens = np.asarray(lengths, np.int64)
    if tokens.size and (tokens.min() < 1 or tokens.max() > budget_tokens):
        raise ValueError(
            f"sequences of {tokens.min()} to {tokens.max()} tokens do not fit a budget of {budget_tokens} tokens"
        )
    order = np.argsort(tokens, kind="stable")
    plan: list[IndexArray] = []
    start = 0
    for end in range(len(order)):
        # Sorted upwards, so the newest row is the longest.
        if (end + 1 - start) * tokens[order[end]] > budget_tokens:
            plan.append(order[start:end])
            start = end
    if start < len(order):
        plan.append(order[start:])
    return tuple(plan)


def inverse_permutation(plan: Sequence[IndexArray]) -> IndexArray:
    """Find where each sequence went, to undo a plan.

        concatenate(results of the micro-batches)[inverse] = results in the original order

    Args:
        plan: From `plan_micro_batches`.

    Returns:
        [B] positions.
    """
    if not plan:
        return np.empty(0, np.int64)
    order = np.concatenate(plan)
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse


def pad_right(sequences: Sequence[NDArray[np.int32]], *, pad_id: int = 0) -> NDArray[np.int64]:
    """Stack sequences of different lengths.

    Under causal attention no real token sees what stands to the right of it, so padding on the right needs no mask
    and any valid id will do.

    Args:
        sequences: B arrays of token ids.
        pad_id: What to fill up with.

    Returns:
        [B, longest] token ids.
    """
    padded = np.full((len(sequences), max(map(len, sequences))), pad_id, np.int64)
    for row, ids in zip(padded, sequences, strict=True):
        row[: len(ids)] = ids
    return padded
