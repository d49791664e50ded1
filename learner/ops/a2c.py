"""Advantage actor-critic: raise what was better than expected, by the plain policy gradient."""

import torch
from torch import Tensor

from configs.algorithm import A2CConfig
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
    settings: A2CConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the policy-gradient loss, which is right for samples of this very policy only.

        L_t = -A_t log pi

    No ratio and no clip: `old_logprobs` is for the diagnostics, and `ref_logprobs` and `settings` do not enter.

    Source: Mnih et al., "Asynchronous Methods for Deep Reinforcement Learning" (2016), section 4.

    Args:
        logprobs: `[B, T]` or `[N]`, nats; the policy's now.
        old_logprobs: The same shape, nats; the learner's before the first step of this iteration.
        ref_logprobs: The same shape, nats; the frozen reference's, by the learner's numerics.
        advantages: The same shape; normalised as `adv_norm` says.
        weights: The same shape; from `aggregate.token_weights`.
        settings: `algorithm`.

    Returns:
        The loss, a scalar, and the diagnostics `approx_kl` (k2 of the policy against the old one, nats) and
        `ratio_mean`. All are weighted sums and add over micro-batches and ranks. Only `logprobs` gets a gradient.

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

    per_token = -advantages * where_weighted(logprobs, weights)

    with torch.no_grad():
        diagnostics = {
            "approx_kl": weighted_sum(k2(logprobs, old_logprobs), weights),
            "ratio_mean": weighted_sum(ratio, weights),
        }
    return weighted_sum(per_token, weights), diagnostics
