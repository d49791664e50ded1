"""Advantage-induced policy alignment: move each log-prob to the reference's, tilted by the advantage."""

import torch
from torch import Tensor

from configs.algorithm import APAConfig
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
    settings: APAConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the squared-error loss of APA.

        target_t = log ref + A_t / apa_lambda
        L_t      = (log pi - target_t)^2

    The KL to the reference is in the loss, so the rewards carry none; `old_logprobs` is for the diagnostics.

    Source: Zhu et al., "Fine-Tuning Language Models with Advantage-Induced Policy Alignment" (2023), eq. 9.

    Args:
        logprobs: `[B, T]` or `[N]`, nats; the policy's now.
        old_logprobs: The same shape, nats; the learner's before the first step of this iteration.
        ref_logprobs: The same shape, nats; the frozen reference's, by the learner's numerics.
        advantages: The same shape; normalised as `adv_norm` says.
        weights: The same shape; from `aggregate.token_weights`.
        settings: `algorithm`.

    Returns:
        The loss, a scalar, and the diagnostics `approx_kl` (k2 of the policy against the old one, nats), `ratio_mean`,
        `residual_mean` (nats) and `target_positive_fraction` (tokens whose target no probability can reach). All are
        weighted sums and add over micro-batches and ranks. Only `logprobs` gets a gradient.

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

    target = where_weighted(ref_logprobs.detach(), weights) + advantages / settings.apa_lambda
    residual = where_weighted(logprobs, weights) - target
    per_token = residual.square()

    with torch.no_grad():
        diagnostics = {
            "approx_kl": weighted_sum(k2(logprobs, old_logprobs), weights),
            "ratio_mean": weighted_sum(ratio, weights),
            "residual_mean": weighted_sum(residual, weights),
            "target_positive_fraction": weighted_sum((target > 0).to(weights.dtype), weights),
        }
    return weighted_sum(per_token, weights), diagnostics
