"""Layouts hold every token once at the right place, and splits are deterministic, complete and within budget."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from learner.batch import Layout, TokenSequence, balance, collate, micro_batches, minibatches, plan

LAYOUTS: tuple[Layout, ...] = ("packed", "sorted")
LENGTHS = st.lists(st.integers(2, 90), min_size=1, max_size=40)


def sequence(prompt: list[int], response: list[int]) -> TokenSequence:
    return TokenSequence(np.array(prompt, dtype=np.int32), np.array(response, dtype=np.int32))


TWO = [sequence([5, 6, 7], [8, 9]), sequence([4], [3, 2, 1])]


def test_sorted_layout_of_two_sequences() -> None:
    m = collate(TWO, pad_id=0, layout="sorted")
    assert m.input_ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 2, 1, 0]]
    assert m.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert m.predict_index.tolist() == [2, 3, 5, 6, 7]
    assert m.target_ids.tolist() == [8, 9, 3, 2, 1]
    assert m.sequence.tolist() == [0, 0, 1, 1, 1]
    assert m.offset.tolist() == [0, 1, 0, 1, 2]
    assert m.last_index.tolist() == [4, 8]
    assert m.value_index.tolist() == [2, 3, 5, 6, 7, 4, 8]


def test_v0_a_token_is_predicted_one_position_before_it(vectors) -> None:
    v = vectors["V0_alignment"]
    ids, prompt, num_tokens = v["ids"], v["prompt_len"], sum(v["response_mask"])
    told_apart = sequence(ids[:prompt], ids[prompt : prompt + num_tokens])
    m = collate([told_apart, sequence([1], [1] * (len(ids) - 1))], pad_id=0, layout="sorted")
    assert m.input_ids[0].tolist() == ids
    own = m.sequence == 0
    assert m.predict_index[own].tolist() == np.flatnonzero(v["action_mask_len_Tm1"]).tolist()
    assert m.target_ids[own].tolist() == ids[prompt : prompt + num_tokens]
    # The response's part of the mask starts where its first token is predicted, at the prompt's last.
    assert v["action_mask_len_Tm1"][prompt - 1 :] == v["response_mask"] == v["correct_mask"]


def test_packed_layout_of_two_sequences() -> None:
    m = collate(TWO, pad_id=0, layout="packed")
    assert m.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3, 2, 1]]
    assert m.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert m.predict_index.tolist() == [2, 3, 5, 6, 7]
    assert m.target_ids.tolist() == [8, 9, 3, 2, 1]
    assert m.last_index.tolist() == [4, 8]


def test_nothing_to_do_gives_a_stand_in_without_response_tokens() -> None:
    m = collate([], pad_id=7, layout="packed")
    assert m.input_ids.tolist() == [[7, 7]]
    assert len(m.predict_index) == len(m.target_ids) == len(m.last_index) == 0


@pytest.mark.parametrize("bad", [sequence([], [1]), sequence([1], [])])
def test_empty_prompt_or_response_is_refused(bad: TokenSequence) -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate([TWO[0], bad], pad_id=0, layout="sorted")


@given(LENGTHS, st.integers(90, 400), st.sampled_from(LAYOUTS))
def test_micro_batches_keep_the_budget_and_every_sequence(lengths: list[int], budget: int, layout: Layout) -> None:
    groups = micro_batches(lengths, token_budget=budget, layout=layout)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        own = [lengths[i] for i in group]
        assert (sum(own) if layout == "packed" else len(own) * max(own)) <= budget
        assert own == sorted(own, reverse=True)


def test_a_sequence_over_the_budget_goes_alone() -> None:
    assert micro_batches([5, 50, 5], token_budget=10, layout="sorted") == [[1], [0, 2]]


def test_balance_of_known_lengths() -> None:
    assert balance([7, 6, 5, 4, 3], num_ranks=2) == [[0, 3, 4], [1, 2]]


@given(LENGTHS, st.integers(1, 5))
def test_balance_is_complete_and_within_one_sequence(lengths: list[int], num_ranks: int) -> None:
    shares = balance(lengths, num_ranks=num_ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)
    if len(lengths) >= num_ranks:
        assert all(shares)


@given(LENGTHS, st.integers(1, 4), st.sampled_from(LAYOUTS))
def test_all_ranks_run_equally_many_micro_batches(lengths: list[int], num_ranks: int, layout: Layout) -> None:
    indices = list(range(len(lengths)))[::-1]
    plans = plan(indices, lengths=lengths, num_ranks=num_ranks, token_budget=128, layout=layout)
    assert len({len(groups) for groups in plans}) == 1
    assert sorted(i for groups in plans for group in groups for i in group) == list(range(len(lengths)))
    assert plans == plan(indices, lengths=lengths, num_ranks=num_ranks, token_budget=128, layout=layout)


def test_minibatches_are_a_shuffle_that_depends_on_the_seed_alone() -> None:
    first = minibatches(10, size=4, seed=1)
    assert [len(m) for m in first] == [4, 4, 2]
    assert sorted(i for m in first for i in m) == list(range(10))
    assert first == minibatches(10, size=4, seed=1)
    assert first != minibatches(10, size=4, seed=2)
