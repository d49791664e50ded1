"""The policy's steps where whole responses are learned: pairs for DPO, single ones for imitation.

What is learned at once is a *unit*: a pair, or one response. A unit is never split: its responses go through the
network in one micro-batch, so on one rank. The weights of a step's units (or of their tokens) sum to 1 over all
micro-batches and ranks, and gradients add (docs/adr/0002).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from configs.selection import DPOConfig
from learner import batch
from learner.batch import MicroBatch, TokenSequence
from learner.experience import PassSettings, ResponseBatch, own_micro_batches
from learner.ops import dpo, pretraining
from learner.selection import Pairs
from learner.step_log import StepLog
from learner.training import TrainingEngine


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A micro-batch's share of a step's loss."""

    loss: Tensor
    diagnostics: dict[str, Tensor]
    """Weighted sums."""
    weights: Tensor
    """Of these sums."""
    ratio_gaps: Tensor | None = None
    """[n] how far each token's probability is from what it was before the first step; None where that is not known."""


class Objective(Protocol):
    """What is learned from some units."""

    @property
    def units(self) -> Sequence[tuple[TokenSequence, ...]]:
        """The responses of each unit, with their prompts."""
        ...

    def weight(self, indices: Sequence[int]) -> float:
        """Weigh one term of the loss of a step that learns these units."""
        ...

    def share(self, logprobs: Tensor, m: MicroBatch, group: Sequence[int], *, weight: float) -> Share:
        """Compute a micro-batch's share of the loss.

        Args:
            logprobs: [n] of the micro-batch's response tokens, nats.
            m: The micro-batch: the units' responses in order.
            group: Which units; there may be none.
            weight: What `weight` says of the whole step.
        """
        ...


class PairObjective:
    """Direct preference optimisation of pairs: a mean over pairs, of sums over response tokens.

    Args:
        responses: The batch.
        old_logprobs: [N] the policy's before the first step.
        pairs: Of responses of the batch.
        settings: Which form, and its coefficients.
    """

    def __init__(self, responses: ResponseBatch, old_logprobs: Tensor, pairs: Pairs, *, settings: DPOConfig) -> None:
        self._responses, self._old_logprobs, self._settings = responses, old_logprobs, settings
        self._places = pairs.places
        self.units = [(responses.sequences[best], responses.sequences[worst]) for best, worst in self._places]
        self._reference = dpo.response_logprobs(responses.padded(responses.ref_logprobs), responses.mask)

    def weight(self, indices: Sequence[int]) -> float:
        """Weigh a pair: 1 / (pairs of the step)."""
        return 1 / len(indices)

    def share(self, logprobs: Tensor, m: MicroBatch, group: Sequence[int], *, weight: float) -> Share:
        """Compute the loss of some pairs; a unit's first response is the preferred one."""
        places = [place for index in group for place in self._places[index]]
        sums = _response_logprobs(logprobs, m, num=len(places))
        references = self._reference[torch.tensor(places, dtype=torch.long, device=logprobs.device)]
        chosen, rejected, ref_chosen, ref_rejected = sums[0::2], sums[1::2], references[0::2], references[1::2]
        weights = torch.full_like(chosen, weight).detach()
        loss, diagnostics = dpo.loss(
            chosen,
            rejected,
            ref_chosen_logprobs=ref_chosen,
            ref_rejected_logprobs=ref_rejected,
            weights=weights,
            kind=self._settings.kind,
            beta=self._settings.dpo_beta,
            flip_probability=self._settings.flip_probability,
        )
        with torch.no_grad():
            diagnostics["chosen_log_ratio"] = ((chosen - ref_chosen) * weights).sum()
            diagnostics["rejected_log_ratio"] = ((rejected - ref_rejected) * weights).sum()
            old = self._old_logprobs[self._responses.flat_index(places, m)]
            gaps = (logprobs - old).expm1().abs()
        return Share(loss=loss, diagnostics=diagnostics, weights=weights, ratio_gaps=gaps)


class ImitationObjective:
    """Imitation: the mean negative log-likelihood per response token, at the sampling temperature.

    Args:
        sequences: What is imitated.
    """

    def __init__(self, sequences: Sequence[TokenSequence]) -> None:
        self.units = [(sequence,) for sequence in sequences]

    def weight(self, indices: Sequence[int]) -> float:
        """Weigh a token: 1 / (response tokens of the step)."""
        return 1 / sum(len(self.units[index][0].response_ids) for index in indices)

    def share(self, logprobs: Tensor, m: MicroBatch, group: Sequence[int], *, weight: float) -> Share:
        """Compute the negative log-likelihood of some responses."""
        weights = torch.full_like(logprobs, weight).detach()
        loss, diagnostics = pretraining.loss(logprobs, weights=weights, coefficient=1.0)
        return Share(loss=loss, diagnostics=diagnostics, weights=weights)


class SelectionSteps:
    """The policy's steps during one update.

    Args:
        engine: The policy's.
        objective: What is learned.
        settings: Temperature, budget and layout.
    """

    def __init__(self, engine: TrainingEngine, objective: Objective, *, settings: PassSettings) -> None:
        self.log = StepLog(engine)
        self._engine, self._objective, self._settings = engine, objective, settings
        self._lengths = [unit_tokens(unit, settings) for unit in objective.units]

    def take(self, indices: Sequence[int]) -> None:
        """Take one step on some units, the same on all ranks."""
        context, settings = self._engine.context, self._settings
        weight = self._objective.weight(indices)
        groups = own_micro_batches(indices, lengths=self._lengths, settings=settings, engine=self._engine)
        for number, group in enumerate(groups):
            rows = [sequence for index in group for sequence in self._objective.units[index]]
            m = batch.collate(rows, pad_id=settings.pad_id, layout=settings.layout).to(context.device)
            logprobs, _ = self._engine.forward(
                m.input_ids, m.position_ids, m.predict_index, m.target_ids, temperature=settings.temperature
            )
            share = self._objective.share(logprobs, m, group, weight=weight)
            self.log.add(share.loss, share.diagnostics, weights=share.weights, watched=share.ratio_gaps)
            self._engine.backward(share.loss, last=number == len(groups) - 1)
        self.log.close_step(self._engine.step())


def unit_tokens(unit: Sequence[TokenSequence], settings: PassSettings) -> int:
    """Count what a unit takes of a micro-batch's budget; padding within the unit counts where rows are padded."""
    lengths = [sequence.num_tokens for sequence in unit]
    return sum(lengths) if settings.layout == "packed" else len(lengths) * max(lengths)


def _response_logprobs(logprobs: Tensor, m: MicroBatch, *, num: int) -> Tensor:
    """Sum the log-probs of each response of a micro-batch: [num]."""
    longest = int(m.offset.max()) + 1 if len(m.offset) else 1
    places = (m.sequence, m.offset)
    mask = torch.zeros((num, longest), dtype=torch.bool, device=logprobs.device)
    mask[places] = True
    return dpo.response_logprobs(logprobs.new_zeros(num, longest).index_put(places, logprobs), mask)
