"""The losses of a reward model, on pairs and on rankings, and the calibration that gives its scores a unit."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from learner.ops.masked import check_alike


def pairwise_loss(
    chosen_scores: Tensor,
    rejected_scores: Tensor,
    *,
    weights: Tensor,
    margins: Tensor | None = None,
    centering_coefficient: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the Bradley-Terry loss of pairs, with a margin and with a pull of the scores to zero if wished.

        L_p = -log sigma(s_w - s_l - margin) + c (s_w + s_l)^2

    Source: Ouyang et al., "Training language models to follow instructions" (2022), eq. 1; the margin: Touvron et
    al., "Llama 2" (2023), eq. 2; the centering: Eisenstein et al., "Helping or Herding?" (2023), as in TRL.

    Args:
        chosen_scores: `[P]`, of the preferred responses.
        rejected_scores: `[P]`, of the others.
        weights: `[P]`; 1 / (number of pairs in the whole optimiser step) for a mean over pairs, divided among the
            pairs of a prompt for a mean over prompts.
        margins: `[P]`, by how much the preferred response should lead, in units of the score; none by default.
        centering_coefficient: c, in inverse squared units of the score.

    Returns:
        The loss, a scalar, and the diagnostics `accuracy` (pairs with the preferred response ahead; a tie is an
        error), `score_mean` and `score_gap_mean`. All are weighted sums and add over micro-batches and ranks.

    Raises:
        ValueError: If shapes or dtypes differ.
    """
    check_alike(chosen_scores=chosen_scores, rejected_scores=rejected_scores, weights=weights, ranks=(1,))
    gap = chosen_scores - rejected_scores
    lead = gap
    if margins is not None:
        check_alike(chosen_scores=chosen_scores, margins=margins, ranks=(1,))
        lead = gap - margins
    total = chosen_scores + rejected_scores
    per_pair = -logsigmoid(lead) + centering_coefficient * total.square()

    with torch.no_grad():
        diagnostics = {
            "accuracy": ((gap > 0).to(weights.dtype) * weights).sum(),
            "score_mean": (0.5 * total * weights).sum(),
            "score_gap_mean": (gap * weights).sum(),
        }
    return (per_pair * weights).sum(), diagnostics


def plackett_luce_loss(
    scores: Tensor, *, ranks: Tensor, weights: Tensor, centering_coefficient: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the Plackett-Luce loss of rankings, with a pull of the scores to zero if wished.

        L_r = sum_i log( e^{s_i} + sum_{j worse than i} e^{s_j} ) - s_i  +  c (2 mean_i s_i)^2

    Each completion in turn has to win against itself and all that are ranked below it. Tied completions do not compete
    with each other, as no pair is made of them either. Of two completions it is `pairwise_loss`; of K it sums K - 1
    terms where a mean over pairs has the size of one, so learning rates do not carry over.

    Source: Plackett (1975), Luce (1959); for reward models Zhu, Jiao and Jordan, "Principled Reinforcement Learning
    with Human Feedback from Pairwise or K-wise Comparisons" (2023).

    Args:
        scores: `[R, K]`, of the completions of each ranking, in any order.
        ranks: `[R, K]`, int64; 1 is best, equal ranks are ties, and 0 marks the padding of a shorter ranking.
        weights: `[R]`; 1 / (number of rankings in the whole optimiser step) for a mean over rankings.
        centering_coefficient: c, in inverse squared units of the score.

    Returns:
        The loss, a scalar, and the diagnostics of `pairwise_loss`, over the pairs that a ranking orders. All are
        weighted sums and add over micro-batches and ranks.

    Raises:
        ValueError: If shapes or dtypes differ, or if a ranking orders nothing.
    """
    check_alike(scores=scores, ranks=(2,))
    check_alike(one_score_per_ranking=scores.new_empty(len(scores)), weights=weights, ranks=(1,))
    if ranks.shape != scores.shape or ranks.dtype != torch.int64:
        raise ValueError(f"ranks must be int64 of shape {tuple(scores.shape)}, got {ranks.dtype}, {tuple(ranks.shape)}")
    ranked = ranks > 0
    better_than = ranked[:, :, None] & ranked[:, None, :] & (ranks[:, :, None] < ranks[:, None, :])
    num_pairs = better_than.sum(dim=(1, 2))
    if not (num_pairs > 0).all():
        raise ValueError("a ranking must order at least two completions")
    scores = torch.where(ranked, scores, 0)
    itself = torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
    rivals = scores[:, None, :].masked_fill(~(better_than | itself), -torch.inf)
    per_ranking = (rivals.logsumexp(dim=2) - scores).sum(dim=1)
    per_ranking = per_ranking + centering_coefficient * (2 * scores.sum(dim=1) / ranked.sum(dim=1)).square()

    with torch.no_grad():
        gaps = scores[:, :, None] - scores[:, None, :]
        middles = 0.5 * (scores[:, :, None] + scores[:, None, :])

        def over_pairs(values: Tensor) -> Tensor:
            return (torch.where(better_than, values, 0).sum(dim=(1, 2)) / num_pairs * weights).sum()

        diagnostics = {
            "accuracy": over_pairs((gaps > 0).to(weights.dtype)),
            "score_mean": over_pairs(middles),
            "score_gap_mean": over_pairs(gaps),
        }
    return (per_ranking * weights).sum(), diagnostics


def calibration(scores: Tensor) -> tuple[float, float]:
    """Find the gain and bias that give the scores of reference samples mean 0 and standard deviation 1.

        gain = 1 / std,  bias = -gain mean        (biased variance)

    Source: `normalize_after` of openai/lm-human-preferences, rewards.py:77-89.

    Args:
        scores: `[S]`, raw; of samples of the reference policy.

    Returns:
        Gain and bias: `gain * score + bias` is in units of the standard deviation.

    Raises:
        ValueError: If the scores are not `[S]`, too few, not finite, or all (almost) equal.
    """
    check_alike(scores=scores, ranks=(1,))
    if len(scores) < 2 or not scores.isfinite().all():
        raise ValueError(f"calibration needs at least two finite scores, got {scores.tolist()[:8]} ({len(scores)})")
    precise = scores.detach().double()
    mean, std = precise.mean().item(), precise.std(correction=0).item()
    # A spread below the resolution of float32 is rounding, and a gain would only blow it up.
    if std <= 1e-6 * precise.abs().max().item():
        raise ValueError(f"calibration needs scores that differ, got mean {mean} and standard deviation {std}")
    gain = 1 / std
    return gain, -gain * mean
