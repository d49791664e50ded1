"""The pretraining loss that PPO-ptx adds, so that what the policy knew before is not forgotten."""

import torch
from torch import Tensor

from learner.ops.aggregate import weighted_sum
from learner.ops.masked import check_alike


def loss(logprobs: Tensor, *, weights: Tensor, coefficient: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the negative log-likelihood of pretraining text, scaled to be added to the policy's loss.

        L = -coefficient * sum_t log pi W_t

    Both gradients go into one optimiser step: apart, Adam would scale each on its own, and the coefficient would mean
    nothing.

    Source: Ouyang et al., "Training language models to follow instructions" (2022), eq. 2 and appendix C.4, with the
    token mean as normaliser, which the paper does not state.

    Args:
        logprobs: `[N]` or `[B, T]`, nats; the policy's now, at temperature 1.
        weights: The same shape; 1 / (tokens of the whole step) for a token mean.
        coefficient: `algorithm.ptx_coefficient`.

    Returns:
        The loss, a scalar, and the diagnostic `nll`, nats per token and without the coefficient. Both add over
        micro-batches and ranks.

    Raises:
        ValueError: If shapes or dtypes differ.
    """
    check_alike(logprobs=logprobs, weights=weights)
    nll = -weighted_sum(logprobs, weights)
    with torch.no_grad():
        diagnostics = {"nll": nll.clone()}
    return coefficient * nll, diagnostics
