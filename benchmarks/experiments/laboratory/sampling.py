"""Sampling from a policy of the laboratory, and everything that is read off samples."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks.experiments.laboratory.language import EOS, MAX_TOKENS, PAD
from benchmarks.experiments.laboratory.networks import PASSES
from learner.batch import MicroBatch, TokenSequence, collate
from learner.models import PolicyModel, ScalarModel
from learner.ops import kl
from protocol.logprobs import token_logprobs
from protocol.messages import FloatArray, IntArray

_SCORED_AT_A_TIME = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Responses to prompts, one each."""

    prompts: list[IntArray]
    responses: list[IntArray]
    """[T] each, with EOS where it was sampled."""
    logprobs: list[FloatArray] = field(default_factory=list[FloatArray])
    """[T] each, of the sampled tokens; none where nobody needs them."""

    @property
    def truncated(self) -> list[bool]:
        """Which were cut at the length limit."""
        return [int(response[-1]) != EOS for response in self.responses]

    @property
    def sequences(self) -> list[TokenSequence]:
        """Prompts with responses, as the learner's batches take them."""
        return [TokenSequence(p, r) for p, r in zip(self.prompts, self.responses, strict=True)]


@torch.no_grad()
def sample(policy: PolicyModel, prompts: Sequence[IntArray], *, seed: int) -> Samples:
    """Draw one response to each prompt, at temperature 1 from the whole vocabulary, all at a time.

    Args:
        policy: Whom to ask.
        prompts: [5] token ids each.
        seed: Of the draws: the same prompts in the same order have the same responses.

    Returns:
        The responses, up to EOS or the length limit.
    """
    generator = torch.Generator().manual_seed(seed)
    trunk, cache = policy.network.base_model, None
    inputs = torch.from_numpy(np.stack(prompts).astype(np.int64))
    tokens = torch.full((len(prompts), MAX_TOKENS), PAD)
    logprobs = torch.zeros(len(prompts), MAX_TOKENS)
    alive = torch.ones(len(prompts), dtype=torch.bool)
    for position in range(MAX_TOKENS):
        output = trunk(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = policy.head(output.last_hidden_state[:, -1])
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
        tokens[:, position] = torch.where(alive, drawn, PAD)
        logprobs[:, position] = token_logprobs(logits, drawn)
        lengths = position + 1
        alive &= drawn != EOS
        if not alive.any():
            break
        inputs = drawn[:, None]
    ends = (tokens[:, :lengths] == EOS).int()
    sizes = torch.where(ends.any(1), ends.argmax(1) + 1, lengths).tolist()
    return Samples(
        prompts=list(prompts),
        responses=[row[:size].numpy().astype(np.int32) for row, size in zip(tokens, sizes, strict=True)],
        logprobs=[row[:size].numpy() for row, size in zip(logprobs, sizes, strict=True)],
    )


def lay_out(samples: Samples) -> MicroBatch:
    """Lay samples out for one pass."""
    return collate(samples.sequences, pad_id=PAD, layout=PASSES.layout)


@torch.no_grad()
def scores(model: ScalarModel, samples: Samples) -> FloatArray:
    """Score samples by a reward model, at their last token: [B], as the model gives them."""
    sequences, found = samples.sequences, []
    for start in range(0, len(sequences), _SCORED_AT_A_TIME):
        m = collate(sequences[start : start + _SCORED_AT_A_TIME], pad_id=PAD, layout=PASSES.layout)
        found.append(model(m.input_ids, m.position_ids, m.last_index).numpy())
    return np.concatenate(found)


@torch.no_grad()
def logprobs_of(policy: PolicyModel, samples: Samples) -> list[FloatArray]:
    """Compute a policy's log-probs of samples: [T] each."""
    m = lay_out(samples)
    flat, _ = policy(m.input_ids, m.position_ids, m.predict_index, m.target_ids)
    ends = np.cumsum([len(response) for response in samples.responses])
    return np.split(flat.numpy(), ends[:-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Distance:
    """How far a policy is from its reference, in four ways of which three are of one quantity."""

    exact_nats: float
    """Mean over sequences of the sum over visited states of the KL over the whole vocabulary."""
    k1_nats: float
    """Mean over sequences of the sum of log-ratios."""
    k1_nats_per_token: float
    """Mean over response tokens of log-ratios."""
    released: float
    """What trlX and the released APA code call KL: exp(lr) - 1 - lr on samples of the policy, averaged over the
    padded responses. Its expectation is chi^2 - KL."""
    entropy_nats_per_token: float


@torch.no_grad()
def distance(policy: PolicyModel, reference: PolicyModel, samples: Samples) -> Distance:
    """Measure how far a policy is from its reference, on its own samples."""
    m = lay_out(samples)

    def logits(model: PolicyModel) -> Tensor:
        return model.head(model.hidden(m.input_ids, m.position_ids, m.predict_index)).float()

    own, ref = logits(policy), logits(reference)
    logprobs, ref_logprobs = token_logprobs(own, m.target_ids), token_logprobs(ref, m.target_ids)
    k1 = kl.k1(logprobs, ref_logprobs).double()
    num = len(samples.responses)
    entropies = -(own.log_softmax(-1).exp() * own.log_softmax(-1)).sum(-1)
    return Distance(
        exact_nats=float(kl.exact(own, ref).double().sum()) / num,
        k1_nats=float(k1.sum()) / num,
        k1_nats_per_token=float(k1.mean()),
        released=released_kl(logprobs, ref_logprobs, num_rows=num, num_columns=_columns(samples)),
        entropy_nats_per_token=float(entropies.double().mean()),
    )


def released_kl(logprobs: Tensor, ref_logprobs: Tensor, *, num_rows: int, num_columns: int) -> float:
    """Compute what the released APA code feeds its controller.

        mean over [rows, columns] of exp(lr) - 1 - lr, zero in the padding

    The prompt's columns count, as they do there, and their terms are left out: the policy's opinion of a prompt is
    nothing that it was trained on.

    Source: microsoft/RLHF-APA, accelerate_ppo_trainer.py:439-440, as trlX before its issue 438.

    Args:
        logprobs: [N], nats; the policy's, of its samples.
        ref_logprobs: [N], nats.
        num_rows: Samples.
        num_columns: Of the padded batch, prompt included.

    Returns:
        A number in nats, and no KL.
    """
    log_ratio = (logprobs - ref_logprobs).double()
    return float((log_ratio.expm1() - log_ratio).sum()) / (num_rows * num_columns)


def _columns(samples: Samples) -> int:
    return max(sequence.num_tokens for sequence in samples.sequences) - 1
