"""Rewards per token: the KL penalty on every response token, and the score on the last one."""

import torch
from torch import Tensor

from learner.ops.kl import k1
from learner.ops.masked import check_alike, check_mask


def last_token_mask(mask: Tensor) -> Tensor:
    """Mark the last token of every response.

    Args:
        mask: `[B, T]`, bool; True at response tokens.

    Returns:
        `[B, T]`, bool; True once in every row that has a token.

    Raises:
        ValueError: If the mask is not `[B, T]` of bool.
    """
    if mask.ndim != 2:
        raise ValueError(f"mask must have shape [B, T], got {tuple(mask.shape)}")
    check_mask(mask, mask.shape)
    tokens_from_here_on = mask.long().flip(1).cumsum(1).flip(1)
    return mask & (tokens_from_here_on == 1)


def one_longer(mask: Tensor) -> Tensor:
    """Mark one position more of every response, that of the state after its last token.

    Args:
        mask: `[B, T]`, bool; True at response tokens, a prefix of each row with one token at least.

    Returns:
        `[B, T + 1]`, bool.
    """
    return torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)


@torch.no_grad()
def per_token_rewards(
    old_logprobs: Tensor, ref_logprobs: Tensor, *, mask: Tensor, scores: Tensor, kl_beta: float
) -> Tensor:
    """Charge every response token for its KL and credit the last one with the score.

        r_t = -beta k1_t + 1[t = T] S,  k1_t = log pi_old - log ref

    so that sum_t r_t = S - beta sum_t k1_t. The end-of-sequence token, if sampled, is charged and carries the score.

    Source: Ouyang et al., "Training language models to follow instructions" (2022), eq. 2, per token as in
    openai/lm-human-preferences, train_policy.py:149-154.

    Args:
        old_logprobs: `[B, T]`, nats; the learner's, before the first step of this iteration.
        ref_logprobs: `[B, T]`, nats; the frozen reference's.
        mask: `[B, T]`, bool; True at response tokens.
        scores: `[B]`, after calibration, combination and the length rules.
        kl_beta: The KL coefficient, in units of the score per nat; zero where the KL is in the loss.

    Returns:
        `[B, T]`, in units of the score; zero where the mask is False; without gradient.

    Raises:
        ValueError: If shapes or dtypes differ, if a response is empty (its score would be lost), or if a score is
            not finite (a failed score must not become a reward).
    """
    check_alike(old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, ranks=(2,))
    check_alike(one_score_per_row=old_logprobs.new_empty(len(old_logprobs)), scores=scores, ranks=(1,))
    check_mask(mask, old_logprobs.shape)
    if not mask.any(dim=1).all():
        raise ValueError("a response without tokens has nowhere to put its score")
    if not scores.isfinite().all():
        raise ValueError("scores must be finite: a failed score is a failure, not a number")
    penalty = torch.where(mask, -kl_beta * k1(old_logprobs, ref_logprobs), 0)
    return penalty + torch.where(last_token_mask(mask), scores[:, None], 0)
