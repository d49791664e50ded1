"""Corrections for samples of another policy than the learner's: an older version, or the engine's other numerics.

    w_t = pi_old(y_t) / mu(y_t)      pi_old: the learner's before the first step; mu: the engine's when it sampled

The correction multiplies each token's loss and is a constant. It multiplies the token weights outright, so that the
normaliser stays that of all tokens: dividing by the tokens that are left would make the rest count more. Together with
PPO's ratio pi / pi_old it gives pi / mu, hence not with a ratio that is taken against mu already.
"""

import math

import torch
from torch import Tensor

from configs.correction import CorrectionConfig
from learner.ops.kl import MAX_EXPONENT, k3
from learner.ops.masked import check_alike, check_mask


@torch.no_grad()
def importance_weights(
    old_logprobs: Tensor, behavior_logprobs: Tensor, *, mask: Tensor, settings: CorrectionConfig
) -> Tensor:
    """Compute what each token's loss is multiplied by.

        full           w_t                                 (decoupled PPO)
        tis            min(w_t, high)
        clamp          clip(w_t, low, high)
        icepop         w_t 1[low <= w_t <= high]
        sequence_mask  w_t 1[low <= g <= high],            g the geometric mean of w over the response
        sequence_tis   min(product of w over the response, high)

    Source: Hilton et al., "Batch size-invariance for policy optimization" (2021), eq. 5, for the decoupled loss; the
    variants as in verl (rollout_corr_helper.py) and OpenRLHF (loss.py:195-218).

    Args:
        old_logprobs: `[B, T]`, nats; the learner's, before the first step of this iteration.
        behavior_logprobs: `[B, T]`, nats; the engine's, recorded when it sampled.
        mask: `[B, T]`, bool; True at response tokens.
        settings: `algorithm.correction`.

    Returns:
        `[B, T]`, 1 throughout for `none`, else zero where the mask is False; without gradient.

    Raises:
        ValueError: If shapes or dtypes differ, or the kind is unknown.
    """
    check_alike(old_logprobs=old_logprobs, behavior_logprobs=behavior_logprobs, ranks=(2,))
    check_mask(mask, old_logprobs.shape)
    if settings.weight == "none":
        return torch.ones_like(old_logprobs)
    log_ratio = torch.where(mask, old_logprobs - behavior_logprobs, 0)
    ratio = _exp(log_ratio)
    sums = log_ratio.sum(dim=1, keepdim=True)
    geometric = _exp(sums / mask.sum(dim=1, keepdim=True).clamp(min=1))
    low, high = settings.low, settings.high
    match settings.weight:
        case "full":
            weights = ratio
        case "tis":
            weights = ratio.clamp(max=high)
        case "clamp":
            weights = ratio.clamp(low, high)
        case "icepop":
            weights = torch.where((ratio >= low) & (ratio <= high), ratio, 0)
        case "sequence_mask":
            weights = torch.where((geometric >= low) & (geometric <= high), ratio, 0)
        case "sequence_tis":
            weights = _exp(sums).clamp(max=high).expand_as(ratio)
        case _:
            raise ValueError(f"unknown correction {settings.weight!r}")
    return torch.where(mask, weights, 0)


@torch.no_grad()
def mismatch(
    old_logprobs: Tensor, behavior_logprobs: Tensor, *, mask: Tensor, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """Describe how far the policy that sampled is from the learner's.

        ess = (sum w)^2 / (n sum w^2)

    Args:
        old_logprobs: `[B, T]` or `[N]`, nats; the learner's, before the first step of this iteration.
        behavior_logprobs: The same shape, nats; the engine's.
        mask: The same shape, bool; True at the tokens to describe, at least one.
        weights: The same shape; w, from `importance_weights`. Without them w is the plain ratio.

    Returns:
        In float64: `gap_max` and `gap_mean` (of |log pi_old - log mu|, nats), `k3_mean` (of KL(mu || pi_old), nats),
        `ratio_max`, `ratio_p999`, `ess` (the effective sample size of w, as a fraction) and `changed_fraction` (tokens
        whose w is not their ratio).

    Raises:
        ValueError: If shapes or dtypes differ.
    """
    check_alike(old_logprobs=old_logprobs, behavior_logprobs=behavior_logprobs)
    check_mask(mask, old_logprobs.shape)
    ratio = _exp(old_logprobs - behavior_logprobs)[mask]
    gaps = (old_logprobs - behavior_logprobs)[mask].double()
    precise = _exp(gaps)
    w = precise if weights is None else weights[mask].double()
    return {
        "gap_max": gaps.abs().max(),
        "gap_mean": gaps.abs().mean(),
        "k3_mean": k3(-gaps, torch.zeros_like(gaps)).mean(),
        "ratio_max": precise.max(),
        "ratio_p999": precise.kthvalue(math.ceil(0.999 * len(precise))).values,
        "ess": w.sum().square() / (len(w) * w.square().sum()).clamp(min=1e-30),
        "changed_fraction": (w.to(ratio.dtype) != ratio).double().mean(),
    }


def lag_histogram(versions: Tensor, *, current: int, mask: Tensor) -> dict[int, int]:
    """Count the tokens by how many versions ago they were sampled.

    Args:
        versions: `[B, T]` or `[N]`, int64; the policy version that sampled each token.
        current: The version that learns.
        mask: The same shape, bool; True at response tokens.

    Returns:
        Lag -> tokens, ascending; the counts sum to the number of response tokens.
    """
    lags, counts = torch.unique(current - versions[mask], return_counts=True)
    return dict(zip(lags.tolist(), counts.tolist(), strict=True))


def interpolate_old_logprobs(behavior_logprobs: Tensor, logprobs: Tensor, *, versions: tuple[int, int, int]) -> Tensor:
    """Guess pi_old from the policies before and after it, without a forward pass.

        log pi_old = log mu + a (log pi - log mu),  a = (v_old - v_mu) / (v - v_mu)

    Source: AReaL, docs/prox_approx.md (its log-linear approximation).

    Args:
        behavior_logprobs: Any shape, nats; of version v_mu.
        logprobs: The same shape, nats; of version v.
        versions: v_mu, v_old and v, in this order.

    Returns:
        The same shape, nats; without gradient.

    Raises:
        ValueError: If the versions are not in order.
    """
    behavior, old, now = versions
    if not (behavior <= old <= now and behavior < now):
        raise ValueError(f"versions must ascend, got {versions}")
    share = (old - behavior) / (now - behavior)
    return (behavior_logprobs + share * (logprobs - behavior_logprobs)).detach()


def _exp(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT).exp()
