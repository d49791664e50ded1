"""From scored rollouts to what the losses need: the batch as tensors, and the learner's own log-probs and values.

Every rank holds the whole batch as flat vectors (one response after the other, in key order); only the forward passes
are shared out. Rewards and advantages come from them in learner/estimates.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from learner.batch import Layout, MicroBatch, TokenSequence, collate, plan
from learner.ops import kl
from learner.training import TrainingEngine
from protocol.errors import NonFiniteError
from protocol.messages import RolloutKey, ScoredBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PassSettings:
    """How sequences go through the networks."""

    temperature: float
    token_budget: int
    layout: Layout
    pad_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseBatch:
    """A scored batch as tensors: B responses with N tokens in all."""

    keys: tuple[RolloutKey, ...]
    sequences: tuple[TokenSequence, ...]
    lengths: tuple[int, ...]
    """Tokens of each sequence, prompt included."""
    mask: Tensor
    """[B, T] True at response tokens; `padded[mask]` is flat, and flat vectors count in its order."""
    starts: Tensor
    """[B] where each response begins in the flat vectors."""
    scores: Tensor
    """[B]"""
    truncated: Tensor
    """[B] True where the sampler stopped at the length limit."""
    groups: Tensor
    """[B] which prompt each response answers, numbered from zero."""
    on_policy: Tensor
    """[N] True at tokens that this very policy version sampled."""
    versions: Tensor
    """[N] the policy version that a token's response was begun with."""
    behavior_logprobs: Tensor | None
    """[N] None where the responses were read from data, so that nobody recorded any."""
    ref_logprobs: Tensor
    """[N]"""

    @property
    def num_tokens(self) -> int:
        """N, response tokens."""
        return len(self.ref_logprobs)

    def padded(self, flat: Tensor) -> Tensor:
        """Spread a flat vector [N] over rows [B, T], zero in the padding."""
        return flat.new_zeros(self.mask.shape).masked_scatter_(self.mask, flat)

    def flat_index(self, group: list[int], micro_batch: MicroBatch) -> Tensor:
        """Find a micro-batch's tokens in the flat vectors: [n]."""
        starts = self.starts[torch.tensor(group, dtype=torch.long, device=self.starts.device)]
        return starts[micro_batch.sequence] + micro_batch.offset

    def require_finite(self, what: str, values: Tensor) -> None:
        """Check flat values [N], or values of responses [B].

        Raises:
            NonFiniteError: Naming the first response with a value that is not finite.
        """
        finite = values.isfinite()
        if finite.all():
            return
        position = int(finite.logical_not().nonzero()[0, 0])
        if values.shape == self.starts.shape:
            raise NonFiniteError(what, f"rollout {self.keys[position]}")
        raise NonFiniteError(what, self.place(position))

    def place(self, position: int) -> str:
        """Name a position of the flat vectors, for messages."""
        row = int(torch.searchsorted(self.starts, position, right=True)) - 1
        return f"token {position - int(self.starts[row])} of rollout {self.keys[row]}"

    def only(self, indices: list[int]) -> Tensor:
        """Mark some of the responses: [B]."""
        marked = torch.zeros_like(self.truncated)
        marked[indices] = True
        return marked

    def per_token(self, of_responses: Tensor) -> Tensor:
        """Repeat what is known of each response [B] for each of its tokens: flat [N]."""
        return of_responses[:, None].expand(self.mask.shape)[self.mask]

    def split(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat vector [N] into one part a response."""
        ends = [*self.starts.tolist()[1:], len(flat)]
        return [flat[start:end] for start, end in zip(self.starts.tolist(), ends, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinions:
    """What the learner's networks say of a batch before the first step: flat vectors [N], and [B] at the ends."""

    old_logprobs: Tensor
    entropies: Tensor
    values: Tensor | None
    """This and the next are None where there is no critic."""
    final_values: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueTargets:
    """What the critic learns: flat vectors [N], or, with `score_at: after_last_token`, [N + B], the ends last."""

    old_values: Tensor
    """Its values before the first step."""
    returns: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """Everything that stays constant during the epochs."""

    responses: ResponseBatch
    opinions: Opinions
    advantages: Tensor
    """[N] normalised as `adv_norm` says; as estimated where each minibatch is whitened apart."""
    value_targets: ValueTargets | None
    """None where there is no critic."""
    learned: Tensor
    """[B] False at responses that are not learned from; their advantages are zero, and no moment knows them."""
    corrections: Tensor
    """[N] what a token's loss is multiplied by, as `algorithm.correction` says."""
    kl: kl.SequenceKL
    kl_nats: Tensor
    """[B] the k1 estimate of each response."""
    rewards: Tensor
    """[B] score minus the KL penalty."""
    reward_std: float
    """What `whiten_rewards` divided the tokens' rewards by; 1 without it."""
    advantage_std: float
    """Standard deviation of the advantages before normalisation."""


def flatten(batch: ScoredBatch, *, device: torch.device) -> ResponseBatch:
    """Turn a scored batch into tensors.

    Args:
        batch: In key order.
        device: Where the tensors go.

    Returns:
        The same batch.

    Raises:
        ValueError: If there is no response, or an empty one, or behaviour log-probs of some responses alone.
        NonFiniteError: If a score or a log-prob is not finite.
    """
    rollouts = [scored.rollout for scored in batch.rollouts]
    sizes = np.array([len(r.response_ids) for r in rollouts])
    if not len(sizes) or not sizes.all():
        raise ValueError("a batch needs responses, and every response needs a token")
    sampled_here = [r.policy_versions == (batch.policy_version, batch.policy_version) for r in rollouts]
    recorded = [r.behavior_logprobs for r in rollouts if r.behavior_logprobs is not None]
    if recorded and len(recorded) < len(rollouts):
        raise ValueError("a batch holds responses that were sampled, or such as were read from data, but not both")
    prompts = {key: number for number, key in enumerate(dict.fromkeys(r.key[:3] for r in rollouts))}

    def floats(parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(np.float32, copy=False)).to(device)

    responses = ResponseBatch(
        keys=tuple(r.key for r in rollouts),
        sequences=tuple(TokenSequence(r.prompt.token_ids, r.response_ids) for r in rollouts),
        lengths=tuple(r.num_tokens for r in rollouts),
        mask=torch.from_numpy(np.arange(sizes.max())[None] < sizes[:, None]).to(device),
        starts=torch.from_numpy(np.cumsum(sizes) - sizes).to(device),
        scores=torch.tensor([scored.score for scored in batch.rollouts], dtype=torch.float32, device=device),
        truncated=torch.tensor([r.finish_reason == "length" for r in rollouts], device=device),
        groups=torch.tensor([prompts[r.key[:3]] for r in rollouts], device=device),
        on_policy=torch.from_numpy(np.repeat(sampled_here, sizes)).to(device),
        versions=torch.from_numpy(np.repeat([r.policy_versions.first for r in rollouts], sizes)).to(device),
        behavior_logprobs=floats(recorded) if recorded else None,
        ref_logprobs=floats([scored.ref_logprobs for scored in batch.rollouts]),
    )
    behavior = responses.ref_logprobs if responses.behavior_logprobs is None else responses.behavior_logprobs
    if not len(behavior) == responses.num_tokens == sizes.sum():
        raise ValueError("behaviour or reference log-probs do not have one number a response token")
    responses.require_finite("score", responses.scores)
    responses.require_finite("behaviour log-prob", behavior)
    responses.require_finite("reference log-prob", responses.ref_logprobs)
    return responses


def own_micro_batches(
    indices: Sequence[int], *, lengths: Sequence[int], settings: PassSettings, engine: TrainingEngine
) -> list[list[int]]:
    """Split a minibatch into micro-batches and take this rank's; equally many on every rank, some of them empty."""
    context = engine.context
    return plan(
        indices,
        lengths=lengths,
        num_ranks=context.world_size,
        token_budget=settings.token_budget,
        layout=settings.layout,
    )[context.rank]


def passes(
    responses: ResponseBatch, indices: list[int], *, settings: PassSettings, engine: TrainingEngine
) -> Iterator[tuple[MicroBatch, Tensor, list[int]]]:
    """Iterate over this rank's micro-batches of some responses; equally many on every rank.

    Args:
        responses: The whole batch.
        indices: Which of its responses.
        settings: Budget and layout.
        engine: Gives rank and device.

    Yields:
        A micro-batch, its tokens' places in the flat vectors [n], and its responses.
    """
    for group in own_micro_batches(indices, lengths=responses.lengths, settings=settings, engine=engine):
        sequences = [responses.sequences[i] for i in group]
        micro_batch = collate(sequences, pad_id=settings.pad_id, layout=settings.layout).to(engine.context.device)
        yield micro_batch, responses.flat_index(group, micro_batch), group


def evaluate(
    responses: ResponseBatch, *, policy: TrainingEngine, critic: TrainingEngine | None, settings: PassSettings
) -> Opinions:
    """Ask policy and critic for their opinions: one forward pass each, shared out over the ranks.

    Args:
        responses: The whole batch.
        policy: Gives log-probs and entropies.
        critic: Gives the values of all states, the last one included; None where there is none.
        settings: Temperature, budget and layout.

    Returns:
        The opinions on the whole batch, on every rank.

    Raises:
        NonFiniteError: If one is not finite.
    """
    num_tokens, num_responses = responses.num_tokens, len(responses.keys)
    sizes = [num_tokens] * 2 if critic is None else [num_tokens] * 3 + [num_responses]
    # Each entry is written by one rank and zero on the others, so the sum over ranks is exact.
    together = responses.ref_logprobs.new_zeros(sum(sizes))
    old_logprobs, entropies, *of_critic = together.split(sizes)
    for m, index, group in passes(responses, list(range(num_responses)), settings=settings, engine=policy):
        old_logprobs[index], entropies[index] = policy.evaluate(
            m.input_ids,
            m.position_ids,
            m.predict_index,
            m.target_ids,
            temperature=settings.temperature,
            with_entropy=True,
        )
        if critic is not None:
            values, final_values = of_critic
            states = critic.evaluate(m.input_ids, m.position_ids, m.value_index)
            values[index], final_values[group] = states.split([len(index), len(group)])
    old_logprobs, entropies, *of_critic = policy.all_reduce_sum(together).split(sizes)
    responses.require_finite("log-prob of the policy", old_logprobs)
    if critic is None:
        return Opinions(old_logprobs=old_logprobs, entropies=entropies, values=None, final_values=None)
    values, final_values = of_critic
    responses.require_finite("value", values)
    responses.require_finite("value of the last state", final_values)
    return Opinions(old_logprobs=old_logprobs, entropies=entropies, values=values, final_values=final_values)
