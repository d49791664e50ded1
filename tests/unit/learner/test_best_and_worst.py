"""Which responses are chosen: against brute force, with ties, duplicates and the lot."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.selection import best_against_worst, num_tied_for_best, ranked
from protocol.messages import PolicyVersions, Prompt, Rollout, RolloutKey, ScoredBatch, ScoredRollout

RESPONSES = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2)), min_size=1, max_size=5), min_size=1, max_size=4
)
"""For each prompt its responses: which text, and which score."""


def batch_of(prompts: dict[str, list[tuple[str, float]]], *, round: int = 1, iteration: int = 0) -> ScoredBatch:
    rollouts = []
    for prompt_id, responses in prompts.items():
        for sample, (text, score) in enumerate(responses):
            ids = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
            rollout = Rollout(
                key=RolloutKey(round, iteration, prompt_id, sample),
                prompt=Prompt(prompt_id=prompt_id, text=prompt_id, token_ids=np.array([1], np.int32)),
                response_ids=ids,
                behavior_logprobs=np.zeros(len(ids), np.float32),
                finish_reason="stop",
                policy_versions=PolicyVersions(1, 1),
                worker="rollout-0",
            )
            reference = np.zeros(len(ids), np.float32)
            rollouts.append(ScoredRollout(rollout=rollout, score=score, components={}, ref_logprobs=reference))
    return ScoredBatch(round=round, iteration=iteration, policy_version=1, rollouts=tuple(rollouts))


def texts(batch: ScoredBatch, places: list[int]) -> list[str]:
    return [bytes(batch.rollouts[place].rollout.response_ids.astype(np.uint8)).decode() for place in places]


def test_the_best_comes_first_and_the_worst_last() -> None:
    batch = batch_of({"p": [("a", 0.1), ("b", 0.9), ("c", -0.3)], "q": [("d", 2.0), ("e", 3.0), ("f", 2.5)]})
    assert ranked(batch, run_seed=0) == [[1, 0, 2], [4, 5, 3]]
    pairs = best_against_worst(batch, ranked(batch, run_seed=0))
    assert pairs.places == ((1, 2), (4, 3))
    assert (pairs.num_tied, pairs.num_identical) == (0, 0)


def test_prompts_without_a_pair_are_counted_by_their_reason() -> None:
    batch = batch_of(
        {
            "all the same": [("x", 1.0), ("x", 0.5), ("x", 0.0)],  # also where the scores say otherwise
            "one": [("y", 1.0)],
            "pair": [("a", 0.0), ("b", 1.0), ("a", 0.0)],
            "tied": [("c", 0.25), ("d", 0.25), ("e", 0.25)],
        }
    )
    ranking = ranked(batch, run_seed=3)
    pairs = best_against_worst(batch, ranking)
    assert pairs.places == ((5, 4),)
    assert (pairs.num_tied, pairs.num_identical) == (1, 2)
    assert num_tied_for_best(batch, ranking) == 1
    assert [len(order) for order in ranking] == [1, 1, 2, 3]


@settings(deadline=None, derandomize=True)
@given(responses=RESPONSES, seed=st.integers(0, 5))
def test_the_choice_equals_brute_force(responses: list[list[tuple[int, int]]], seed: int) -> None:
    prompts = {f"p{i}": [(f"r{text}", float(score)) for text, score in one] for i, one in enumerate(responses)}
    batch = batch_of(prompts)
    ranking = ranked(batch, run_seed=seed)
    starts = np.cumsum([0, *(len(one) for one in responses)]).tolist()
    num_pairs = 0
    for order, start, one in zip(ranking, starts, prompts.values(), strict=False):
        first = {text: next(i for i, (t, _) in enumerate(one) if t == text) for text, _ in one}
        scores = {start + i: one[i][1] for i in first.values()}
        assert sorted(order) == sorted(scores)
        assert [scores[place] for place in order] == sorted(scores.values(), reverse=True)
        num_pairs += len(set(scores.values())) > 1
    pairs = best_against_worst(batch, ranking)
    assert len(pairs.chosen) == num_pairs
    assert num_pairs + pairs.num_tied + pairs.num_identical == len(responses)


def test_the_lot_between_equals_is_uniform_and_the_prompt_s_own() -> None:
    p = [("a", 0.2), ("b", 1.0), ("c", -3.0), ("d", 1.0)]
    first = [texts(batch_of({"p": p}), ranked(batch_of({"p": p}), run_seed=seed)[0])[0] for seed in range(400)]
    assert set(first) == {"b", "d"}
    assert 150 < first.count("b") < 250
    others = [(text, 1.0) for text in "vwxyz"]
    for seed in range(20):
        alone, together = batch_of({"p": p}), batch_of({"o": others, "p": p})
        assert texts(together, ranked(together, run_seed=seed)[1]) == texts(alone, ranked(alone, run_seed=seed)[0])


@pytest.mark.parametrize("place", [{"round": 2}, {"iteration": 7}], ids=["round", "iteration"])
def test_another_round_or_iteration_draws_another_lot(place: dict[str, int]) -> None:
    prompts = {f"p{i}": [(text, 0.0) for text in "abcd"] for i in range(20)}
    assert ranked(batch_of(prompts), run_seed=0) == ranked(batch_of(prompts), run_seed=0)
    assert ranked(batch_of(prompts), run_seed=0) != ranked(batch_of(prompts, **place), run_seed=0)
