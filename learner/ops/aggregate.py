"""How per-token losses become one number: a weight for every token, fixed before the batch is split.

    agg(L) = sum over tokens of L * W

The normaliser is in W and belongs to the whole optimiser step (all micro-batches and ranks), so losses, diagnostics
and gradients simply add. An engine that averages them over ranks and micro-batches instead has to be handed the loss
times the number of both. It makes no difference whether the tensors are padded `[B, T]` or packed `[N]`:
`weights[mask]` packs the weights.

Diagnostics are weighted sums too: means over tokens where the weights of a step sum to 1, and to be divided by that
sum where they do not.
"""

from typing import Literal

import torch
from torch import Tensor

AggregationMode = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm"]


def token_weights(
    mask: Tensor,
    *,
    mode: AggregationMode,
    num_tokens: int | None = None,
    num_sequences: int | None = None,
    constant: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Weigh every token so that the weighted sum of per-token losses is their aggregate.

        token_mean           W = m / N
        seq_mean_token_mean  W = m / (n_i B)
        seq_mean_token_sum   W = m / B
        token_sum_norm       W = m / constant

    Source: the normalisation of OpenRLHF (loss.py:29-39) and verl (agg_loss), written as weights.

    Args:
        mask: `[B, T]`, bool; True at response tokens. Rows without any are no sequences.
        mode: Which aggregate. What a mode does not use of the following is ignored.
        num_tokens: N, response tokens in the whole optimiser step; by default those of this mask.
        num_sequences: B, responses with at least one token in the whole step; by default those of this mask.
        constant: The divisor of `token_sum_norm`, such as the longest response allowed, in tokens.
        dtype: That of the per-token losses.

    Returns:
        `[B, T]`; zero where the mask is False. The weights of a whole step sum to 1 in the first two modes, to N / B
        in the third and to N / constant in the fourth.

    Raises:
        ValueError: If the mask is not `[B, T]` of bool, the mode is unknown, or its divisor is missing or not positive.
    """
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool of shape [B, T], got {mask.dtype} of {tuple(mask.shape)}")
    tokens_per_row = mask.sum(dim=1, keepdim=True)
    if num_tokens is None:
        num_tokens = int(tokens_per_row.sum())
    if num_sequences is None:
        num_sequences = int((tokens_per_row > 0).sum())

    ones = mask.to(dtype)
    match mode:
        case "token_mean":
            return ones / _positive(num_tokens, "num_tokens", mode)
        case "seq_mean_token_mean":
            return ones / tokens_per_row.clamp(min=1) / _positive(num_sequences, "num_sequences", mode)
        case "seq_mean_token_sum":
            return ones / _positive(num_sequences, "num_sequences", mode)
        case "token_sum_norm":
            return ones / _positive(constant, "constant", mode)
        case _:
            raise ValueError(f"unknown aggregation mode {mode!r}")


def where_weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Replace by zero what carries no weight.

    Padding may hold anything, and zero times infinity is not zero: losses call this on what they compute from
    log-probs before the first exponential or square, so that padding reaches neither the loss nor its gradient.

    Args:
        values: `[B, T]` or `[N]`.
        weights: The shape of `values`, from `token_weights`.

    Returns:
        The shape of `values`.
    """
    return torch.where(weights != 0, values, 0)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Aggregate per-token values.

        sum over tokens of L * W

    Args:
        values: `[B, T]` or `[N]`, per token.
        weights: The shape of `values`, from `token_weights`.

    Returns:
        A scalar, to be added over micro-batches and ranks.
    """
    return (where_weighted(values, weights) * weights).sum()


def _positive(divisor: float | None, name: str, mode: str) -> float:
    if divisor is None or not divisor > 0:
        raise ValueError(f"{mode} needs a positive {name}, got {divisor}")
    return divisor
