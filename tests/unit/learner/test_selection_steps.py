"""A step's gradient is the sum over ranks and micro-batches, a pair is never split, and minibatches are even."""

import math
from typing import Any

import pytest
import torch

from configs.learner import LearnerConfig, OptimizerConfig
from configs.selection import DPOConfig
from learner.batch import even_minibatches
from learner.experience import PassSettings, evaluate, flatten
from learner.selection import best_against_worst, ranked
from learner.selection_steps import ImitationObjective, Objective, PairObjective, SelectionSteps
from learner.training import RankContext
from tests.learner_batches import tiny_policy
from tests.selection_batches import RecordingEngine, sampled

CPU = torch.device("cpu")


def engine(*, rank: int = 0, world_size: int = 1) -> RecordingEngine:
    context = RankContext(rank=rank, world_size=world_size, device=CPU)
    return RecordingEngine(
        tiny_policy(), optimizer=OptimizerConfig(learning_rate=1e-3), settings=LearnerConfig(), context=context
    )


def passes(layout: Any, token_budget: int) -> PassSettings:
    return PassSettings(temperature=0.8, token_budget=token_budget, layout=layout, pad_id=0)


def objective_of(name: str, settings: PassSettings) -> Objective:
    batch = sampled(7)
    responses = flatten(batch, device=CPU)
    if name == "imitation":
        return ImitationObjective(responses.sequences[:13])
    old = evaluate(responses, policy=engine(), critic=None, settings=settings).old_logprobs
    pairs = best_against_worst(batch, ranked(batch, run_seed=0))
    return PairObjective(responses, old, pairs, settings=DPOConfig(dpo_beta=0.3))


class Spy:
    """Notes which units each micro-batch holds, and how many rows it has."""

    def __init__(self, objective: Objective) -> None:
        self.units = objective.units
        self.weight = objective.weight
        self.seen: list[tuple[list[int], int]] = []
        self._objective = objective

    def share(self, logprobs: Any, m: Any, group: Any, *, weight: float) -> Any:
        self.seen.append((list(group), len(m.last_index)))
        return self._objective.share(logprobs, m, group, weight=weight)


@pytest.mark.parametrize("name", ["pairs", "imitation"])
@pytest.mark.parametrize("layout", ["sorted", "packed"])
def test_the_gradients_of_any_ranks_and_micro_batches_add_up_to_the_same(name: str, layout: Any) -> None:
    """Of seven units to a step, ranks get different numbers; one rank of nine has none and only keeps in step."""
    wide = passes(layout, 10_000)
    whole, indices = engine(), list(range(7))
    SelectionSteps(whole, objective_of(name, wide), settings=wide).take(indices)
    for world_size, token_budget in ((1, 60), (2, 10_000), (2, 60), (3, 60), (9, 60)):
        settings = passes(layout, token_budget)
        parts, seen, calls = [], [], set()
        for rank in range(world_size):
            mine, spy = engine(rank=rank, world_size=world_size), Spy(objective_of(name, settings))
            SelectionSteps(mine, spy, settings=settings).take(indices)
            parts += mine.gradients
            seen += spy.seen
            calls.add(mine.num_forward)
        together = torch.stack(parts).sum(dim=0)
        assert (together - whole.gradients[0]).norm() < 1e-5 * whole.gradients[0].norm(), (world_size, token_budget)
        assert sorted(index for group, _ in seen for index in group) == indices
        assert all(rows == len(group) * (2 if name == "pairs" else 1) for group, rows in seen)
        assert len(calls) == 1  # all ranks enter the collectives equally often


@pytest.mark.parametrize("layout", ["sorted", "packed"])
def test_micro_batches_of_pairs_stay_within_the_budget(layout: Any) -> None:
    settings = passes(layout, 120)
    spy = Spy(objective_of("pairs", settings))
    SelectionSteps(engine(), spy, settings=settings).take(range(7))
    assert len(spy.seen) > 2
    for group, rows in spy.seen:
        lengths = [sequence.num_tokens for index in group for sequence in spy.units[index]]
        tokens = sum(lengths) if layout == "packed" else rows * max(lengths)
        assert tokens <= 120 or len(group) == 1


@pytest.mark.parametrize(("num", "most"), [(0, 4), (1, 4), (4, 4), (5, 4), (13, 4), (64, 16)])
def test_minibatches_are_as_even_as_they_can_be(num: int, most: int) -> None:
    parts = even_minibatches(num, most=most, seed=1)
    assert sorted(index for part in parts for index in part) == list(range(num))
    assert len(parts) == math.ceil(num / most)
    sizes = {len(part) for part in parts}
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert max(sizes, default=0) <= most
