"""The loop that the supervised stages share: SFT, and reward modelling.

A step's composition is global and a pure function of data and seed; what one rank does of it is a pure function of the
lengths. So the result depends on the number of ranks by no more than the rounding of sums.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from configs.learner import LearnerConfig, OptimizerConfig
from learner import batch
from learner.batch import Layout, TokenSequence
from learner.models import TrainedModel
from learner.training import TrainingEngine
from protocol.records import Text
from protocol.tokens import encode_prompt, encode_response

Report = Callable[[Mapping[str, Any]], None]
"""Takes the figures of a running stage: step, steps, loss, lr, tokens_per_s."""
Forward = Callable[..., Any]
"""A network's forward: an engine's `forward` or `evaluate`."""

_REPORT_STEPS = 10


class EngineFactory(Protocol):
    """Makes an engine; `functools.partial(DeepSpeedEngine, settings=..., context=...)` is one."""

    def __call__(self, module: nn.Module, *, optimizer: OptimizerConfig, name: str, total_steps: int) -> TrainingEngine:
        """Put a network under an engine."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StageContext:
    """One rank's place in a supervised stage, and how it gets its engine."""

    rank: int
    world_size: int
    device: torch.device
    make_engine: EngineFactory
    beat: Callable[[], None] = lambda: None
    """Called with everything that is encoded: whoever watches the rank sees that it gets on."""


def beating(make_engine: EngineFactory, beat: Callable[[], None]) -> EngineFactory:
    """Have every call of an engine's network, in training and in validation, call `beat` first."""

    def make(module: nn.Module, *, optimizer: OptimizerConfig, name: str, total_steps: int) -> TrainingEngine:
        module.register_forward_pre_hook(lambda *_: beat())
        return make_engine(module, optimizer=optimizer, name=name, total_steps=total_steps)

    return make


class Task(Protocol):
    """Something to learn from elements (demonstrations, comparisons) that are numbered from zero."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens that each element takes in a micro-batch."""
        ...

    def normalizer(self, indices: Sequence[int]) -> float:
        """Return what the losses of a whole step are divided by."""
        ...

    def loss(self, forward: Forward, indices: Sequence[int], *, normalizer: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute a micro-batch's share of the loss, and diagnostics that add in the same way."""
        ...


def run_steps(
    engine: TrainingEngine, task: Task, steps: Sequence[Sequence[int]], *, settings: LearnerConfig, report: Report
) -> dict[str, float]:
    """Take optimiser steps; all ranks call this with the same steps.

    Args:
        engine: Over the network that the task trains.
        task: What to learn.
        steps: The elements of each step, over all ranks.
        settings: Token budget and layout of micro-batches.
        report: Called every few steps, on every rank.

    Returns:
        The last report's figures.
    """
    figures: dict[str, float] = {}
    sums: list[Tensor] = []
    done, tokens, since = 0, 0, perf_counter()
    for number, indices in enumerate(steps, start=1):
        normalizer = task.normalizer(indices)
        groups = own_groups(engine, task, indices, settings=settings)
        for place, group in enumerate(groups):
            loss, diagnostics = task.loss(engine.forward, group, normalizer=normalizer)
            engine.backward(loss, last=place == len(groups) - 1)
            sums.append(torch.stack([loss.detach(), *diagnostics.values()]))
        result = engine.step()
        done += 1
        tokens += sum(task.lengths[index] for index in indices)
        if number % _REPORT_STEPS == 0 or number == len(steps):
            means = (engine.all_reduce_sum(torch.stack(sums).sum(0)) / done).tolist()
            speed = tokens / (perf_counter() - since)
            figures = dict(zip(("loss", *diagnostics), means, strict=True))
            report({"step": number, "steps": len(steps), **figures, "lr": result.learning_rate, "tokens_per_s": speed})
            sums, done, tokens, since = [], 0, 0, perf_counter()
    return figures


def evaluate_sums(
    engine: TrainingEngine, task: Task, indices: Sequence[int], *, settings: LearnerConfig
) -> dict[str, float]:
    """Add up loss and diagnostics over elements, without gradient and without a normaliser.

    Args:
        engine: Over the network.
        task: What it is judged on.
        indices: The elements, over all ranks; not empty.
        settings: Token budget and layout of micro-batches.

    Returns:
        `loss` and the diagnostics, the same on all ranks.
    """
    sums: list[Tensor] = []
    names: tuple[str, ...] = ()
    for group in own_groups(engine, task, indices, settings=settings):
        loss, diagnostics = task.loss(engine.evaluate, group, normalizer=1.0)
        names = ("loss", *diagnostics)
        sums.append(torch.stack([loss, *diagnostics.values()]).double())
    return dict(zip(names, engine.all_reduce_sum(torch.stack(sums).sum(0)).tolist(), strict=True))


def own_groups(
    engine: TrainingEngine, task: Task, indices: Sequence[int], *, settings: LearnerConfig
) -> list[list[int]]:
    """Split elements into micro-batches and take this rank's.

    Args:
        engine: Knows the rank.
        task: Knows the lengths.
        indices: The elements, over all ranks.
        settings: Token budget and layout.

    Returns:
        Element indices of each micro-batch; on every rank equally many, some of them empty.
    """
    plan = batch.plan(
        list(indices),
        lengths=task.lengths,
        num_ranks=engine.context.world_size,
        token_budget=settings.micro_batch_tokens,
        layout=layout_of(trained(engine), settings),
    )
    return plan[engine.context.rank]


def trained(engine: TrainingEngine) -> Any:
    """Return the network behind an engine, as what it is: a PolicyModel or a ScalarModel."""
    return engine.module


def layout_of(module: TrainedModel, settings: LearnerConfig) -> Layout:
    """Choose the layout of micro-batches: what the settings say, else what suits the network."""
    return module.layout if settings.packing == "auto" else settings.packing


def stage_seed(run_seed: int, *parts: object) -> int:
    """Derive a seed from the run's seed and what it is for."""
    text = "/".join(map(str, (run_seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") & 0x7FFF_FFFF


def shuffled_steps(
    num: int, *, size: int, num_epochs: int, num_steps: int | None, seed: Callable[[int], int]
) -> list[list[int]]:
    """Plan the steps of all epochs, each epoch shuffled anew.

    Args:
        num: Elements.
        size: Elements of a step; an epoch's last may have fewer.
        num_epochs: Passes over the data; ignored when `num_steps` is given.
        num_steps: Exactly so many steps, over as many epochs as that takes.
        seed: Epoch -> seed of its shuffle.

    Returns:
        Element indices of each step.
    """
    steps: list[list[int]] = []
    epoch = 0
    while len(steps) < num_steps if num_steps is not None else epoch < num_epochs:
        steps += batch.minibatches(num, size=size, seed=seed(epoch))
        epoch += 1
    return steps[:num_steps]


def split_by_prompt(prompts: Sequence[Hashable], *, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Hold some prompts out, with everything that belongs to them.

    Args:
        prompts: The prompt of each element.
        fraction: Share of the different prompts to hold out; at least one and never all, unless zero.
        seed: Of the choice.

    Returns:
        Indices of the elements to train on and of those held out, in order.
    """
    unique = list(dict.fromkeys(prompts))
    num_heldout = 0 if fraction == 0 else min(max(1, round(fraction * len(unique))), len(unique) - 1)
    chosen = np.random.default_rng(seed).permutation(len(unique))[:num_heldout]
    heldout = {unique[index] for index in chosen}
    train = [index for index, prompt in enumerate(prompts) if prompt not in heldout]
    return train, [index for index, prompt in enumerate(prompts) if prompt in heldout]


def check_ranks_agree(engine: TrainingEngine, sequences: Iterable[TokenSequence]) -> None:
    """Check that every rank has read and encoded the same data.

    Args:
        engine: Reduces over the ranks.
        sequences: All of this rank's data.

    Raises:
        RuntimeError: If they differ: sums over ranks would mean nothing.
    """
    digest = hashlib.sha256()
    for sequence in sequences:
        digest.update(np.asarray(sequence.prompt_ids, np.int32).tobytes() + b"|")
        digest.update(np.asarray(sequence.response_ids, np.int32).tobytes() + b"\n")
    own = int.from_bytes(digest.digest()[:4], "big")
    total = engine.all_reduce_sum(torch.tensor([own], dtype=torch.float64, device=engine.context.device))
    if total.item() != own * engine.context.world_size:
        raise RuntimeError("the ranks have read different data: is the source the same file on every node?")


def context_tokens(model: TrainedModel) -> int | None:
    """Return the longest sequence that a network takes, or None where it sets no limit."""
    return getattr(model.network.config.get_text_config(), "max_position_embeddings", None)


def encode_pair(tokenizer: Any, prompt: Text, completion: Text) -> TokenSequence:
    """Encode a prompt and a response, apart, as they will be sampled.

    Args:
        tokenizer: The policy's.
        prompt: Text or messages.
        completion: Text or one assistant message.

    Returns:
        Their token ids.
    """
    before = None if isinstance(prompt, str) else prompt
    return TokenSequence(
        np.array(encode_prompt(tokenizer, prompt), np.int32),
        np.array(encode_response(tokenizer, completion, prompt=before), np.int32),
    )
