"""Advantage-weighted regression: imitate the own samples, the more the better they were."""

import torch
from torch import Tensor

from configs.algorithm import AWRConfig
from learner.ops.aggregate import weighted_sum, where_weighted
from learner.ops.kl import MAX_EXPONENT, k2
from learner.ops.masked import check_alike


def loss(
    logprobs: Tensor,
    *,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    weights: Tensor,
    settings: AWRConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted likelihood loss of AWR.

        w_t = min( exp(A_t / awr_lambda), max_weight )
        L_t = -w_t log pi

    No reference enters: the target is the policy that sampled, tilted. `old_logprobs` is for the diagnostics.

    Source: Peng et al., "Advantage-Weighted Regression" (2019), algorithm 1; the clip is that of its released code.

    Args:
        logprobs: `[B, T]` or `[N]`, nats; the policy's now.
        old_logprobs: The same shape, nats; the learner's before the first step of this iteration.
        ref_logprobs: The same shape, nats; the frozen reference's, by the learner's numerics.
        advantages: The same shape; normalised as `adv_norm` says.
        weights: The same shape; from `aggregate.token_weights`.
        settings: `algorithm`.

    Returns:
        The loss, a scalar, and the diagnostics `approx_kl` (k2 of the policy against the old one, nats), `ratio_mean`,
        `weight_mean` and `weight_square_mean` (mean^2 / square mean is the effective sample size, as a fraction), and
        `weight_clip_fraction`. All are weighted sums and add over micro-batches and ranks. Only `logprobs` gets a
        gradient.

    Raises:
        ValueError: If shapes or dtypes differ.
    """
    check_alike(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        advantages=advantages,
        weights=weights,
    )
    log_ratio = where_weighted(logprobs - old_logprobs.detach(), weights)
    advantages = where_weighted(advantages.detach(), weights)
    ratio = log_ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()

    unclipped = (advantages / settings.awr_lambda).clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
    clipped = unclipped if settings.max_weight is None else unclipped.clamp(max=settings.max_weight)
    per_token = -clipped * where_weighted(logprobs, weights)

    with torch.no_grad():
        diagnostics = {
            "approx_kl": weighted_sum(k2(logprobs, old_logprobs), weights),
            "ratio_mean": weighted_sum(ratio, weights),
            "weight_mean": weighted_sum(clipped, weights),
            "weight_square_mean": weighted_sum(clipped.square(), weights),
            "weight_clip_fraction": weighted_sum((clipped < unclipped).to(weights.dtype), weights),
        }
    return weighted_sum(per_token, weights), diagnostics
