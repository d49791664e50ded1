"""Proximal policy optimisation: raise what was better than expected, but no further than a clip of the ratio."""

import torch
from torch import Tensor

from configs.algorithm import PPOConfig
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
    settings: PPOConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the clipped surrogate loss of PPO.

        rho_t = exp(log pi - log pi_old)
        L_t   = max( -A_t rho_t, -A_t clip(rho_t, 1 - clip_low, 1 + clip_high) )
        L_t   = min( L_t, -dual_clip A_t )  where A_t < 0, if dual_clip is set

    The KL to the reference is in the reward or, with `kl_in = loss`, a term that the step adds to this loss; in both
    cases `ref_logprobs` does not enter here.

    Source: Schulman et al., "Proximal Policy Optimization Algorithms" (2017), eq. 7; the dual clip: Ye et al.,
    "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning" (2020).

    Args:
        logprobs: `[B, T]` or `[N]`, nats; the policy's now.
        old_logprobs: The same shape, nats; the learner's before the first step of this iteration.
        ref_logprobs: The same shape, nats; the frozen reference's, by the learner's numerics.
        advantages: The same shape; normalised as `adv_norm` says.
        weights: The same shape; from `aggregate.token_weights`.
        settings: `algorithm`.

    Returns:
        The loss, a scalar, and the diagnostics `approx_kl` (k2 of the policy against the old one, nats), `ratio_mean`
        and `clip_fraction` (tokens that the clip holds back). All are weighted sums and add over micro-batches and
        ranks. Only `logprobs` gets a gradient.

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

    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    per_token = torch.maximum(unclipped, clipped)
    if settings.dual_clip is not None:
        bounded = torch.minimum(per_token, -settings.dual_clip * advantages)
        per_token = torch.where(advantages < 0, bounded, per_token)

    with torch.no_grad():
        diagnostics = {
            "approx_kl": weighted_sum(k2(logprobs, old_logprobs), weights),
            "ratio_mean": weighted_sum(ratio, weights),
            "clip_fraction": weighted_sum((clipped > unclipped).to(weights.dtype), weights),
        }
    return weighted_sum(per_token, weights), diagnostics
