"""Advantages, with a critic (generalised advantage estimation) or without one, and their normalisation.

Response tokens are a left-aligned prefix of each row. Advantages and returns are computed once for a batch of
rollouts, with the critic and the KL coefficient of that moment, and are constants in all epochs.
"""

from typing import Literal

import torch
from torch import Tensor

from learner.ops.masked import WHITEN_EPS, check_alike, check_mask, moments, whiten
from learner.ops.rewards import last_token_mask


@torch.no_grad()
def choose_bootstrap_values(
    final_values: Tensor, *, truncated_mask: Tensor, truncated_value: Literal["terminal", "bootstrap", "drop"]
) -> Tensor:
    """Choose the value of the state that follows each response.

        V_{T+1} = V(s_{T+1}) if truncated and "bootstrap", else 0        ("drop": nobody learns from it)

    Source: AReaL, actor.py:201, but by the sampler's flag and not by the width of the batch.

    Args:
        final_values: `[B]`; the critic's, read at the last response token.
        truncated_mask: `[B]`, bool; True where the sampler stopped at the length limit.
        truncated_value: `algorithm.truncated_value`.

    Returns:
        `[B]`, zero for finished rows, for `gae`.

    Raises:
        ValueError: If shapes or dtypes are wrong, or the choice is unknown.
    """
    check_alike(final_values=final_values, ranks=(1,))
    check_mask(truncated_mask, final_values.shape)
    match truncated_value:
        case "terminal" | "drop":
            return torch.zeros_like(final_values)
        case "bootstrap":
            return torch.where(truncated_mask, final_values, 0)
        case _:
            raise ValueError(f"unknown truncated_value {truncated_value!r}")


def choose_learned(
    truncated_mask: Tensor,
    *,
    groups: Tensor,
    truncated_value: Literal["terminal", "bootstrap", "drop"],
    estimator: Literal["gae", "rloo", "grpo", "reinforce"],
) -> Tensor:
    """Choose the responses that are learned from: all, or with "drop" those that the sampler finished.

    `rloo` and `grpo` compare within a prompt, so there a response that is the only one left of its prompt goes too.

    Args:
        truncated_mask: `[B]`, bool; True where the sampler stopped at the length limit.
        groups: `[B]`, int64; which prompt each response answers, numbered from zero.
        truncated_value: `algorithm.truncated_value`.
        estimator: `algorithm.advantage`.

    Returns:
        `[B]`, bool; perhaps none.
    """
    if truncated_value != "drop":
        return torch.ones_like(truncated_mask)
    learned = ~truncated_mask
    if estimator in ("rloo", "grpo"):
        left = torch.zeros_like(groups).index_add(0, groups, learned.long())
        learned &= left[groups] > 1
    return learned


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, *, mask: Tensor, bootstrap_values: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Estimate advantages and returns.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t     = delta_t + gamma lambda A_{t+1},  A_{T+1} = 0
        Ret_t   = A_t + V_t

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage Estimation" (2016),
    eq. 16.

    Args:
        rewards: `[B, T]`, in units of the score.
        values: `[B, T]`; the critic's when the batch was sampled, V_t read at the position before token t.
        mask: `[B, T]`, bool; True at response tokens, a prefix of each row.
        bootstrap_values: `[B]`; V_{T+1}, zero for a finished response, from `choose_bootstrap_values`.
        gamma: The discount per token.
        gae_lambda: The decay of the estimate; 1 gives rewards-to-go, 0 the one-step error.

    Returns:
        Advantages and returns, each `[B, T]`, zero where the mask is False; without gradient.

    Raises:
        ValueError: If shapes or dtypes differ, or if the mask is not a prefix.
    """
    check_alike(rewards=rewards, values=values, ranks=(2,))
    check_alike(one_value_per_row=rewards.new_empty(len(rewards)), bootstrap_values=bootstrap_values, ranks=(1,))
    check_mask(mask, rewards.shape)
    if (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError("response tokens must be a left-aligned prefix of each row")
    values = torch.where(mask, values, 0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    next_values = torch.where(last_token_mask(mask), bootstrap_values[:, None], next_values)
    deltas = torch.where(mask, rewards + gamma * next_values - values, 0)

    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(bootstrap_values)
    # Deltas are zero in the padding, so `running` still is when it reaches the last token of a row.
    for t in range(deltas.shape[1] - 1, -1, -1):
        running = deltas[:, t] + gamma * gae_lambda * running
        advantages[:, t] = running
    return advantages, advantages + values


@torch.no_grad()
def without_critic(
    totals: Tensor, *, groups: Tensor, mask: Tensor, estimator: Literal["rloo", "grpo", "reinforce"]
) -> Tensor:
    """Estimate advantages by comparing whole responses with each other; all tokens of a response get the same.

        reinforce  A_i = R_i - mean over the batch
        rloo       A_i = R_i - mean over the other responses to the same prompt
        grpo       A_i = (R_i - mean) / sqrt(var + 1e-8)        both over the responses to the same prompt

    `rloo` and `reinforce` have the units of the reward, `grpo` has none. Only the baseline of `rloo` leaves the policy
    gradient unbiased: the others hold the response's own reward, which shrinks it by a factor of 1 - 1 / (responses).

    Source: Ahmadian et al., "Back to Basics" (2024), eq. 8; Shao et al., "DeepSeekMath" (2024), section 4.1.2 (the
    variance here is the biased one, as everywhere); Williams, "REINFORCE" (1992).

    Args:
        totals: `[B]`; R, the rewards of each response summed over its tokens, in units of the score.
        groups: `[B]`, int64; which prompt each response answers, numbered from zero.
        mask: `[B, T]`, bool; True at response tokens.
        estimator: `algorithm.advantage`.

    Returns:
        `[B, T]`, zero where the mask is False.

    Raises:
        ValueError: If shapes or dtypes differ, a prompt has a single response to compare, or the estimator is unknown.
    """
    check_alike(totals=totals, ranks=(1,))
    check_mask(mask, torch.Size((len(totals), mask.shape[-1])))
    if groups.shape != totals.shape or groups.dtype != torch.int64:
        raise ValueError(f"groups must be int64 of shape {tuple(totals.shape)}, got {groups.dtype}")
    if estimator not in ("rloo", "grpo", "reinforce"):
        raise ValueError(f"unknown advantage estimator {estimator!r}")
    precise = totals.double()
    if estimator == "reinforce":
        groups = torch.zeros_like(groups)
    own_size = torch.bincount(groups).double()[groups]
    if estimator != "reinforce" and (own_size < 2).any():
        raise ValueError(f"{estimator} compares the responses to a prompt, and a prompt has only one")
    advantages = precise - _group_means(precise, groups)
    if estimator == "rloo":
        advantages = advantages * own_size / (own_size - 1)
    elif estimator == "grpo":
        advantages = advantages / group_std(totals, groups)
    return torch.where(mask, advantages.to(totals.dtype)[:, None], 0)


def group_std(totals: Tensor, groups: Tensor) -> Tensor:
    """Compute what `grpo` divides by: sqrt(var + 1e-8) over the responses to the same prompt.

    Args:
        totals: `[B]`; the rewards of each response summed over its tokens.
        groups: `[B]`, int64; which prompt each response answers, numbered from zero.

    Returns:
        `[B]`, fp64, for each response that of its prompt.
    """
    precise = totals.double()
    away = precise - _group_means(precise, groups)
    return torch.sqrt(_group_means(away.square(), groups) + WHITEN_EPS)


def _group_means(values: Tensor, groups: Tensor) -> Tensor:
    sizes = torch.bincount(groups).double()
    return (torch.zeros_like(sizes).index_add(0, groups, values) / sizes)[groups]


@torch.no_grad()
def normalize(
    advantages: Tensor,
    mask: Tensor,
    *,
    mode: Literal["none", "batch_std_only", "whiten"],
    mean: Tensor | None = None,
    var: Tensor | None = None,
) -> Tensor:
    """Bring advantages to the scale that the algorithm expects.

        none            A
        batch_std_only  A / sqrt(var + 1e-8)
        whiten          (A - mean) / sqrt(var + 1e-8)

    Anything but "none" takes the units from `apa_lambda`: the KL weight becomes apa_lambda times the standard
    deviation of the advantages.

    Args:
        advantages: `[B, T]`, in units of the score.
        mask: `[B, T]`, bool; True at response tokens.
        mode: `algorithm.adv_norm`.
        mean: Scalar from `moments`, over the rollouts of all ranks; by default that of these advantages.
        var: Scalar from `moments`, over the rollouts of all ranks; given exactly when `mean` is.

    Returns:
        `[B, T]`, zero where the mask is False.

    Raises:
        ValueError: If shapes or dtypes are wrong, the mode is unknown, or only one of the moments is given.
    """
    check_alike(advantages=advantages, ranks=(2,))
    check_mask(mask, advantages.shape)
    if (mean is None) != (var is None):
        raise ValueError("give both mean and var, or neither")
    match mode:
        case "none":
            return torch.where(mask, advantages, 0)
        case "batch_std_only":
            scale = moments(advantages, mask)[1] if var is None else var
            return torch.where(mask, advantages * torch.rsqrt(scale + WHITEN_EPS), 0)
        case "whiten":
            return whiten(advantages, mask, mean=mean, var=var)
        case _:
            raise ValueError(f"unknown advantage normalisation {mode!r}")
