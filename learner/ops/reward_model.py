"""The loss of a reward model on pairs, and the calibration that gives its scores a unit."""

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
