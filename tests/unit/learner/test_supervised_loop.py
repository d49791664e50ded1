"""What the supervised stages have in common: splits, plans of steps, seeds."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.learner import OptimizerConfig
from learner.supervised_loop import beating, shuffled_steps, split_by_prompt, stage_seed


@given(st.lists(st.integers(0, 20), min_size=2, max_size=60), st.floats(0, 0.9), st.integers(0, 5))
def test_no_prompt_is_on_both_sides(prompts: list[int], fraction: float, seed: int) -> None:
    train, heldout = split_by_prompt(prompts, fraction=fraction, seed=seed)
    assert sorted(train + heldout) == list(range(len(prompts)))
    assert not {prompts[i] for i in train} & {prompts[i] for i in heldout}
    assert train
    num = len({prompts[i] for i in heldout})
    if fraction == 0:
        assert num == 0
    else:
        assert num == min(max(1, round(fraction * len(set(prompts)))), len(set(prompts)) - 1)


def test_the_split_depends_on_the_seed_alone() -> None:
    prompts = [f"p{i % 40}" for i in range(100)]
    first, again, other = (split_by_prompt(prompts, fraction=0.2, seed=seed)[1] for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_epochs_are_shuffled_anew_and_cover_everything() -> None:
    steps = shuffled_steps(10, size=4, num_epochs=2, num_steps=None, seed=lambda epoch: epoch)
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2]
    first, second = ([i for step in epoch for i in step] for epoch in (steps[:3], steps[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second


@pytest.mark.parametrize("num_steps", [1, 3, 7])
def test_the_number_of_steps_can_be_given(num_steps: int) -> None:
    steps = shuffled_steps(10, size=4, num_epochs=1, num_steps=num_steps, seed=lambda epoch: epoch)
    assert len(steps) == num_steps
    assert steps[:1] == shuffled_steps(10, size=4, num_epochs=1, num_steps=None, seed=lambda epoch: epoch)[:1]


def test_seeds_differ_by_purpose() -> None:
    seeds = {stage_seed(run, *parts) for run in (0, 1) for parts in (("sft", 0), ("sft", 1), ("reward model", 0))}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_every_micro_batch_is_a_sign_of_life() -> None:
    beats: list[int] = []
    made: Any = beating(lambda module, **_: module, lambda: beats.append(1))  # pyright: ignore[reportArgumentType]
    network = made(torch.nn.Linear(2, 2), optimizer=OptimizerConfig(learning_rate=1e-3), name="n", total_steps=1)
    network(torch.zeros(1, 2))
    with torch.no_grad():
        network(torch.zeros(1, 2))
    assert len(beats) == 2
