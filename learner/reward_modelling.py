"""Reward modelling: a score for responses, learnt from pairs of a better and a worse one.

All pairs of one prompt are one element of a step, so that a prompt with many pairs counts no more than one with few, a
completion runs through the network once however many pairs it is in, and no prompt is on both sides of the split.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.load import config_hash
from configs.run import RunConfig
from learner import batch
from learner.batch import Layout, MicroBatch, TokenSequence
from learner.export import export_reward_model, padding_id
from learner.models import ScalarModel, load_scalar, scalar_from_policy
from learner.ops.reward_model import pairwise_loss
from learner.supervised_loop import (
    Forward,
    Report,
    StageContext,
    check_ranks_agree,
    context_tokens,
    encode_pair,
    layout_of,
    own_groups,
    run_steps,
    split_by_prompt,
    stage_seed,
)
from learner.training import TrainingEngine
from learner.validation import validation_report
from protocol.datasets import ReadReport, read_preferences
from protocol.errors import UserError
from protocol.records import PreferenceRecord
from protocol.tokens import load_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparisons:
    """One prompt's completions, and the pairs among them."""

    sequences: tuple[TokenSequence, ...]
    """[K] the prompt with each of its different completions."""
    better: tuple[int, ...]
    """[P] which completion each pair prefers."""
    worse: tuple[int, ...]
    """[P] to which."""
    margins: tuple[float, ...]
    """[P] by how much, in units of the score; 0 where nobody said."""

    @property
    def num_tokens(self) -> int:
        """Tokens that the completions take when they are stacked."""
        return len(self.sequences) * max(sequence.num_tokens for sequence in self.sequences)


class ComparisonTask:
    """Score the better response higher.

        L = mean over prompts of mean over the prompt's pairs of -log sigma(s_w - s_l - margin)

    Args:
        elements: The comparisons of each prompt.
        centering: Coefficient of the squared sum of a pair's scores.
        pad_id: Any token id.
        layout: Of micro-batches.
        device: Where the network is.
    """

    def __init__(
        self,
        elements: Sequence[Comparisons],
        *,
        centering: float,
        pad_id: int,
        layout: Layout,
        device: torch.device,
    ) -> None:
        self.elements = elements
        self.lengths = [element.num_tokens for element in elements]
        self._centering, self._pad_id, self._device = centering, pad_id, device
        self._layout: Layout = layout

    def normalizer(self, indices: Sequence[int]) -> float:
        """Count the prompts of a step."""
        return float(len(indices))

    def loss(self, forward: Forward, indices: Sequence[int], *, normalizer: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute a micro-batch's share of the loss; a pair's two scores are always in the same one."""
        elements = [self.elements[index] for index in indices]
        scores = self.scores(forward, indices)
        starts = np.cumsum([0, *(len(element.sequences) for element in elements)])
        better = [start + i for start, element in zip(starts, elements, strict=False) for i in element.better]
        worse = [start + i for start, element in zip(starts, elements, strict=False) for i in element.worse]
        weights = [1 / (normalizer * len(element.better)) for element in elements for _ in element.better]
        margins = [margin for element in elements for margin in element.margins]
        return pairwise_loss(
            scores[torch.tensor(better, dtype=torch.int64, device=self._device)],
            scores[torch.tensor(worse, dtype=torch.int64, device=self._device)],
            weights=torch.tensor(weights, device=self._device),
            margins=torch.tensor(margins, device=self._device),
            centering_coefficient=self._centering,
        )

    def scores(self, forward: Forward, indices: Sequence[int]) -> Tensor:
        """Score every completion of some elements, in their order."""
        m = self.micro_batch(indices)
        return forward(m.input_ids, m.position_ids, m.last_index)

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """Lay out every completion of some elements."""
        rows = [sequence for index in indices for sequence in self.elements[index].sequences]
        return batch.collate(rows, pad_id=self._pad_id, layout=self._layout).to(self._device)


def train_reward_model(
    config: RunConfig, context: StageContext, *, policy: Path, output: Path, report: Report
) -> dict[str, Any]:
    """Train a reward model on the run's preferences and write it; all ranks call this.

    Args:
        config: The run's configuration.
        context: This rank's place.
        policy: The supervised policy: gives the tokenizer and, unless configured otherwise, the trunk.
        output: The directory that rank 0 writes, with reward_model_report.json in it; must not exist.
        report: Takes progress.

    Returns:
        The validation report on held-out prompts.

    Raises:
        UserError: If data or model cannot be used.
    """
    settings = config.learner.reward_model
    tokenizer = load_tokenizer(policy)
    model = _initial_model(config, policy)
    elements, reading = read_comparisons(config, tokenizer, context_tokens=context_tokens(model))
    train, heldout = split_by_prompt(
        [element.sequences[0].prompt_ids.tobytes() for element in elements],
        fraction=settings.heldout_fraction,
        seed=stage_seed(config.run.seed, "reward model", "held-out"),
    )
    steps = _steps(config, elements, train)
    layout = layout_of(model, config.learner)
    engine = context.make_engine(model, optimizer=settings.optimizer, name="reward model", total_steps=len(steps))
    check_ranks_agree(engine, (sequence for element in elements for sequence in element.sequences))
    task = ComparisonTask(
        elements,
        centering=settings.centering,
        pad_id=padding_id(tokenizer),
        layout=layout,
        device=context.device,
    )
    figures = run_steps(engine, task, steps, settings=config.learner, report=report)
    summary: dict[str, Any] = {
        "num_train_prompts": len(train),
        "num_train_pairs": sum(len(elements[index].better) for index in train),
        "num_dropped": reading.num_dropped,
        "num_steps": len(steps),
        "train_loss": figures["loss"],
        "heldout": _validate(engine, task, heldout, config=config),
    }
    card = _card(config, output, policy=policy, data=reading.summary(), summary=summary)
    export_reward_model(engine, tokenizer, output, card=card, report=summary)
    engine.close()
    return summary


def read_comparisons(
    config: RunConfig, tokenizer: Any, *, context_tokens: int | None
) -> tuple[list[Comparisons], ReadReport]:
    """Read the run's preferences, encode them, and gather them by prompt.

    Args:
        config: The run's configuration.
        tokenizer: The policy's.
        context_tokens: The longest sequence that the reward model takes; None for no limit.

    Returns:
        The comparisons of each prompt, in the order of first appearance, and what became of the rows.

    Raises:
        UserError: If fewer than two prompts are left.
    """
    source = config.data.preferences
    assert source is not None
    reading = ReadReport(source=source.source)
    by_prompt: dict[bytes, list[_EncodedPair]] = {}
    records = read_preferences(
        source.source, split=source.split, seed=config.run.seed, count=source.count, report=reading
    )
    for number, record in enumerate(records, start=1):
        pair = _encode(tokenizer, record)
        if context_tokens is not None and max(pair.better.num_tokens, pair.worse.num_tokens) > context_tokens:
            reading.drop(f"longer than the model's context of {context_tokens} tokens", f"pair {number}")
            reading.num_kept -= 1
            continue
        by_prompt.setdefault(pair.better.prompt_ids.tobytes(), []).append(pair)
    if len(by_prompt) < 2:
        raise UserError(
            f"a reward model needs comparisons on at least two prompts, one to train on and one to hold out: "
            f"{reading.summary()}",
            where="data.preferences",
        )
    return [_comparisons(pairs) for pairs in by_prompt.values()], reading


@dataclass(frozen=True, slots=True, kw_only=True)
class _EncodedPair:
    better: TokenSequence
    worse: TokenSequence
    margin: float


def _encode(tokenizer: Any, record: PreferenceRecord) -> _EncodedPair:
    return _EncodedPair(
        better=encode_pair(tokenizer, record.prompt, record.chosen),
        worse=encode_pair(tokenizer, record.prompt, record.rejected),
        margin=0.0 if record.margin is None else record.margin,
    )


def _comparisons(pairs: Sequence[_EncodedPair]) -> Comparisons:
    """Gather one prompt's pairs; a completion that several of them share is kept once."""
    place: dict[bytes, int] = {}
    sequences: list[TokenSequence] = []
    sides: list[int] = []
    for sequence in (side for pair in pairs for side in (pair.better, pair.worse)):
        key = sequence.response_ids.tobytes()
        if key not in place:
            place[key] = len(sequences)
            sequences.append(sequence)
        sides.append(place[key])
    return Comparisons(
        sequences=tuple(sequences),
        better=tuple(sides[::2]),
        worse=tuple(sides[1::2]),
        margins=tuple(pair.margin for pair in pairs),
    )


def _initial_model(config: RunConfig, policy: Path) -> ScalarModel:
    init, precision = config.models.reward.init, config.learner.precision
    if init == "sft":
        return scalar_from_policy(policy, seed=stage_seed(config.run.seed, "score head"), precision=precision)
    return load_scalar(init, precision=precision)


def _steps(config: RunConfig, elements: Sequence[Comparisons], train: Sequence[int]) -> list[list[int]]:
    """Plan the steps of all epochs: whole prompts, up to `batch_pairs` pairs a step."""
    settings = config.learner.reward_model
    steps: list[list[int]] = []
    for epoch in range(settings.num_epochs):
        order = np.random.default_rng(stage_seed(config.run.seed, "reward model", epoch)).permutation(len(train))
        steps += _filled([train[place] for place in order], elements, size=settings.batch_pairs)
    return steps


def _filled(order: Sequence[int], elements: Sequence[Comparisons], *, size: int) -> Iterator[list[int]]:
    step: list[int] = []
    num_pairs = 0
    for index in order:
        if step and num_pairs + len(elements[index].better) > size:
            yield step
            step, num_pairs = [], 0
        step.append(index)
        num_pairs += len(elements[index].better)
    yield step


def _validate(
    engine: TrainingEngine, task: ComparisonTask, heldout: Sequence[int], *, config: RunConfig
) -> dict[str, Any]:
    """Score the held-out prompts on all ranks and judge the scores."""
    starts = np.cumsum([0, *(len(task.elements[index].sequences) for index in heldout)])
    start_of = dict(zip(heldout, starts.tolist(), strict=False))
    scores = torch.zeros(int(starts[-1]), dtype=torch.float64, device=engine.context.device)
    for group in own_groups(engine, task, heldout, settings=config.learner):
        found = task.scores(engine.evaluate, group).double()
        taken = 0
        for index in group:
            num = len(task.elements[index].sequences)
            scores[start_of[index] : start_of[index] + num] = found[taken : taken + num]
            taken += num
    everything: NDArray[np.float64] = engine.all_reduce_sum(scores).cpu().numpy()
    return {"num_prompts": len(heldout)} | validation_report(
        everything,
        better=np.array([start_of[index] + i for index in heldout for i in task.elements[index].better]),
        worse=np.array([start_of[index] + i for index in heldout for i in task.elements[index].worse]),
        response_tokens=np.array(
            [len(sequence.response_ids) for index in heldout for sequence in task.elements[index].sequences]
        ),
    )


def _card(config: RunConfig, output: Path, *, policy: Path, data: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    init = config.models.reward.init
    heldout = {name: value for name, value in summary["heldout"].items() if isinstance(value, int | float)}
    return {
        "run": config.run.name,
        "version": output.name,
        "base": f"policy {policy.name}" if init == "sft" else init,
        "data": data,
        "algorithm": "Bradley-Terry on pairs",
        "config": config_hash(config),
        "training": {name: value for name, value in summary.items() if name != "heldout"},
        "held-out prompts": heldout,
    }
