"""The critic's loss, and how much of the returns it explains."""

from collections.abc import Callable

import torch
from torch import Tensor

from learner.ops.aggregate import weighted_sum, where_weighted
from learner.ops.masked import check_alike, moments


def loss(
    values: Tensor, *, old_values: Tensor, returns: Tensor, weights: Tensor, value_clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute half the squared error of the critic, optionally the larger of that with and without a clipped move.

        L_t = 0.5 max( (V - Ret)^2, (V_old + clip(V - V_old, -eps, eps) - Ret)^2 )

    Source: the value loss of "PPO2" (OpenAI baselines), as in openai/lm-human-preferences, train_policy.py:343-357.

    Args:
        values: `[B, T]` or `[N]`, in units of the score; the critic's now.
        old_values: The same shape; the critic's before the first step of this iteration.
        returns: The same shape; from `advantages.gae`.
        weights: The same shape; from `aggregate.token_weights`.
        value_clip: eps, in units of the returns: the score's, or with `whiten_rewards` the deviation of the rewards of
            the batch; None for the plain squared error.

    Returns:
        The loss, a scalar, and the diagnostics `clip_fraction` (tokens where the clipped error is the larger one),
        `value_mean` and `return_mean`. All are weighted sums and add over micro-batches and ranks.

    Raises:
        ValueError: If shapes or dtypes differ.
    """
    check_alike(values=values, old_values=old_values, returns=returns, weights=weights)
    values = where_weighted(values, weights)
    old_values = where_weighted(old_values.detach(), weights)
    returns = where_weighted(returns.detach(), weights)

    unclipped = (values - returns).square()
    clipped = unclipped
    if value_clip is not None:
        clipped = (old_values + (values - old_values).clamp(-value_clip, value_clip) - returns).square()
    per_token = 0.5 * torch.maximum(unclipped, clipped)

    with torch.no_grad():
        diagnostics = {
            "clip_fraction": weighted_sum((clipped > unclipped).to(weights.dtype), weights),
            "value_mean": weighted_sum(values, weights),
            "return_mean": weighted_sum(returns, weights),
        }
    return weighted_sum(per_token, weights), diagnostics


@torch.no_grad()
def explained_variance(
    values: Tensor, returns: Tensor, *, mask: Tensor, all_reduce_sum: Callable[[Tensor], Tensor] | None = None
) -> float:
    """Compute the share of the variance of the returns that the critic accounts for.

        1 - var(Ret - V) / var(Ret)

    Args:
        values: `[B, T]` or `[N]`; the critic's before the first step of this iteration.
        returns: The same shape.
        mask: The same shape, bool; True at response tokens.
        all_reduce_sum: As in `masked.moments`, for the share over all ranks.

    Returns:
        At most 1; 0 for a critic that knows only the mean, negative for one that is worse. 0 if all returns are equal.

    Raises:
        ValueError: If shapes or dtypes differ, or if the mask keeps nothing.
    """
    check_alike(values=values, returns=returns)
    var_error = moments(returns - values, mask, all_reduce_sum=all_reduce_sum)[1].item()
    var_returns = moments(returns, mask, all_reduce_sum=all_reduce_sum)[1].item()
    return 1 - var_error / var_returns if var_returns > 0 else 0.0
