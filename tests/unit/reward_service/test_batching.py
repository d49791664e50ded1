"""Micro-batches: every index once, within the budget, and back in order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward_service.batching import inverse_permutation, pad_right, plan_micro_batches

LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@given(LENGTHS, st.integers(40, 200))
def test_every_index_comes_once_within_the_budget(lengths: list[int], budget: int) -> None:
    plan = plan_micro_batches(lengths, budget_tokens=budget)
    assert sorted(int(i) for indices in plan for i in indices) == list(range(len(lengths)))
    for indices in plan:
        assert len(indices) * max(lengths[i] for i in indices) <= budget
    in_order = [lengths[i] for indices in plan for i in indices]
    assert in_order == sorted(in_order)


@given(LENGTHS, st.integers(40, 200))
def test_the_inverse_restores_the_order(lengths: list[int], budget: int) -> None:
    plan = plan_micro_batches(lengths, budget_tokens=budget)
    results = [f"{i}" for indices in plan for i in indices]
    assert [results[place] for place in inverse_permutation(plan)] == [f"{i}" for i in range(len(lengths))]


@given(LENGTHS, st.integers(40, 200))
def test_the_plan_is_a_function_of_its_arguments(lengths: list[int], budget: int) -> None:
    first, second = (plan_micro_batches(lengths, budget_tokens=budget) for _ in range(2))
    assert [a.tolist() for a in first] == [b.tolist() for b in second]


def test_a_plan_by_hand() -> None:
    plan = plan_micro_batches([5, 2, 9, 2, 4], budget_tokens=10)
    assert [indices.tolist() for indices in plan] == [[1, 3], [4, 0], [2]]


@pytest.mark.parametrize("lengths", [[3, 11], [0, 3]])
def test_a_sequence_that_cannot_fit_is_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        plan_micro_batches(lengths, budget_tokens=10)


def test_padding_stands_on_the_right() -> None:
    padded = pad_right([np.array([4, 5, 6], np.int32), np.array([7], np.int32)], pad_id=1)
    assert padded.tolist() == [[4, 5, 6], [7, 1, 1]]
