"""The one definition of token log-probs, shared by the learner and the frozen reference."""

from collections.abc import Callable

import torch
import torch.utils.checkpoint
from torch import Tensor

# Rows of logits held at a time: 1,024 rows of a 128k vocabulary are 0.5 GB in fp32.
_CHUNK_ROWS = 1024


def token_logprobs(logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute the log-probs of tokens at the sampling temperature, in fp32.

    log softmax(logits / temperature)[token]   (algorithms.md 1.1)

    Args:
        logits: [N, V] next-token logits, of any float type.
        token_ids: [N] the tokens whose log-probs are wanted.
        temperature: The temperature at which the tokens were sampled.

    Returns:
        [N] log-probs, fp32.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if logits.ndim != 2 or token_ids.shape != logits.shape[:1]:
        raise ValueError(f"logits {tuple(logits.shape)} and token_ids {tuple(token_ids.shape)} do not fit")
    scaled = logits.float() / temperature
    return scaled.gather(-1, token_ids.long().unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)


def entropy(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Compute the entropy of each next-token distribution, in nats.

    Args:
        logits: [N, V] next-token logits.
        temperature: The sampling temperature.

    Returns:
        [N] entropies, fp32.
    """
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    return -(logp.exp() * logp).sum(-1)


def logprobs_in_chunks(hidden: Tensor, head: torch.nn.Module, token_ids: Tensor, *, temperature: float) -> Tensor:
    """Compute log-probs from hidden states, a bounded number of logit rows at a time.

    Args:
        hidden: [N, D] hidden states at the positions that predict the tokens.
        head: The language-model head, [D] -> [V].
        token_ids: [N] the predicted tokens.
        temperature: The sampling temperature.

    Returns:
        [N] log-probs, fp32. Each chunk's logits are computed again in the backward pass rather than kept.
    """
    (logprobs,) = _in_chunks(
        lambda h, t: (token_logprobs(head(h), t, temperature=temperature),), hidden=hidden, token_ids=token_ids
    )
    return logprobs


def logprobs_and_entropy(
    hidden: Tensor, head: torch.nn.Module, token_ids: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Compute log-probs and entropies from hidden states, a bounded number of logit rows at a time.

    Args:
        hidden: [N, D] hidden states at the positions that predict the tokens.
        head: The language-model head, [D] -> [V].
        token_ids: [N] the predicted tokens.
        temperature: The sampling temperature.

    Returns:
        [N] log-probs, bit for bit those of `logprobs_in_chunks`, and [N] entropies in nats; fp32, both with gradient.
    """

    def both(rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(rows)
        return token_logprobs(logits, tokens, temperature=temperature), entropy(logits, temperature=temperature)

    logprobs, entropies = _in_chunks(both, hidden=hidden, token_ids=token_ids)
    return logprobs, entropies


def _in_chunks(
    compute: Callable[[Tensor, Tensor], tuple[Tensor, ...]], *, hidden: Tensor, token_ids: Tensor
) -> tuple[Tensor, ...]:
    if hidden.shape[0] <= _CHUNK_ROWS:
        return compute(hidden, token_ids)
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, hidden.shape[0], _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        if torch.is_grad_enabled():
            part = torch.utils.checkpoint.checkpoint(compute, hidden[rows], token_ids[rows], use_reentrant=False)
        else:
            part = compute(hidden[rows], token_ids[rows])
        parts.append(part)
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))
