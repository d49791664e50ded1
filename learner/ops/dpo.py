"""Direct preference optimisation: the policy's own log-ratio to the reference is the reward, learnt from pairs."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from learner.ops.masked import check_alike, masked_sum

Kind = Literal["dpo", "cdpo", "robust", "ipo"]


def response_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Sum the log-probs of each response's tokens; a mean would prefer long responses for their length.

        log pi(y|x) = sum_t m_t log pi(y_t|s_t)

    Args:
        logprobs: `[B, T]`, nats.
        mask: `[B, T]`, bool; True at response tokens, the end-of-sequence token included where there is one.

    Returns:
        `[B]`, nats.

    Raises:
        ValueError: If the mask does not fit, or if the log-probs are not `[B, T]`.
    """
    check_alike(logprobs=logprobs, ranks=(2,))
    return masked_sum(logprobs, mask, dim=1)


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, *, beta: float) -> Tensor:
    """Compute the rewards for which the policy is optimal, up to a constant for each prompt.

        r(x, y) - beta log Z(x) = beta (log pi(y|x) - log ref(y|x))

    Source: Rafailov et al., "Direct Preference Optimization" (2023), eq. 5.

    Args:
        logprobs: `[B]`, nats, of whole responses; the policy's.
        ref_logprobs: `[B]`, nats; the frozen reference's.
        beta: The KL coefficient, in units of the reward per nat.

    Returns:
        `[B]`, in units of the reward.
    """
    return beta * (logprobs - ref_logprobs)


def loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    *,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    weights: Tensor,
    kind: Kind,
    beta: float,
    flip_probability: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the loss of pairs, in one of four forms.

        h      = (log pi(y_w) - log pi(y_l)) - (log ref(y_w) - log ref(y_l))
        dpo    L = -log sigma(beta h)
        cdpo   L = -(1 - e) log sigma(beta h) - e log sigma(-beta h)
        robust L = (-(1 - e) log sigma(beta h) + e log sigma(-beta h)) / (1 - 2 e)
        ipo    L = (h - 1 / (2 beta))^2

    `cdpo` holds the policy back where labels are flipped with probability e, `robust` has the expectation of `dpo` on
    labels without flips, and `ipo` aims at a finite log-ratio, which keeps pairs that are always judged alike from
    driving it to infinity.

    Source: Rafailov et al. (2023), eq. 7; Mitchell, "A note on DPO with noisy preferences" (2023); Chowdhury et al.,
    "Provably Robust DPO" (2024); Azar et al., "A General Theoretical Paradigm" (2023), eq. 17.

    Args:
        chosen_logprobs: `[P]`, nats, of whole responses; the policy's, of the preferred ones.
        rejected_logprobs: `[P]`, nats; the policy's, of the others.
        ref_chosen_logprobs: `[P]`, nats; the frozen reference's.
        ref_rejected_logprobs: `[P]`, nats; the frozen reference's.
        weights: `[P]`; 1 / (number of pairs in the whole optimiser step) for a mean over pairs.
        kind: Which form.
        beta: The KL coefficient.
        flip_probability: e, at least 0 and below 1/2; 0 for `dpo` and `ipo`.

    Returns:
        The loss, a scalar, and the diagnostics `accuracy` (pairs with h > 0), `reward_gap` (beta h),
        `chosen_logprobs_mean` and `rejected_logprobs_mean` (nats per response; often both fall). All are weighted sums
        and add over micro-batches and ranks. Only the policy's log-probs get a gradient.

    Raises:
        ValueError: If shapes or dtypes differ, or if a coefficient is out of its range or of no use to this form.
    """
    _check(kind, beta=beta, flip_probability=flip_probability)
    check_alike(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
        weights=weights,
        ranks=(1,),
    )
    h = (chosen_logprobs - rejected_logprobs) - (ref_chosen_logprobs - ref_rejected_logprobs).detach()
    right, flipped = -logsigmoid(beta * h), -logsigmoid(-beta * h)
    match kind:
        case "dpo":
            per_pair = right
        case "cdpo":
            per_pair = (1 - flip_probability) * right + flip_probability * flipped
        case "robust":
            per_pair = ((1 - flip_probability) * right - flip_probability * flipped) / (1 - 2 * flip_probability)
        case "ipo":
            per_pair = (h - 1 / (2 * beta)).square()

    with torch.no_grad():
        diagnostics = {
            "accuracy": ((h > 0).to(weights.dtype) * weights).sum(),
            "reward_gap": (beta * h * weights).sum(),
            "chosen_logprobs_mean": (chosen_logprobs * weights).sum(),
            "rejected_logprobs_mean": (rejected_logprobs * weights).sum(),
        }
    return (per_pair * weights).sum(), diagnostics


def _check(kind: Kind, *, beta: float, flip_probability: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if kind in ("dpo", "ipo") and flip_probability != 0:
        raise ValueError(f"{kind} takes labels as they are: flip_probability must be 0, got {flip_probability}")
    if not 0 <= flip_probability < 0.5:
        raise ValueError(f"flip_probability must be at least 0 and below 1/2, got {flip_probability}")
