"""What was chosen is kept once, drawn by seed, and the same after it was written and read."""

from pathlib import Path

import numpy as np
import pytest

from learner.batch import TokenSequence
from learner.sample_memory import FILE, Remembered, SampleMemory
from protocol.messages import RolloutKey
from tests.selection_batches import sampled


def remembered(number: int, *, round: int = 1, response: int | None = None) -> Remembered:
    ids = np.arange(3, 5 + (number if response is None else response), dtype=np.int32)
    prompt = np.full(1 + number % 3, number, np.int32)
    return Remembered(
        key=RolloutKey(round, number, f"prompt {number}", number % 2),
        score=0.1 * number,
        sequence=TokenSequence(prompt, ids),
    )


def filled(num: int = 9) -> SampleMemory:
    memory = SampleMemory()
    memory.add(remembered(number) for number in range(num))
    return memory


def names(samples: list[Remembered]) -> list[str]:
    return [sample.key.prompt_id for sample in samples]


def test_an_identical_response_is_kept_once_as_it_was_first_chosen() -> None:
    memory = filled(3)
    memory.add([remembered(1, round=2), remembered(1, round=2, response=7)])
    assert len(memory) == 4
    kept = memory.draw(9, seed=0, without=())
    assert sorted(sample.key.round for sample in kept) == [1, 1, 1, 2]


def test_the_draw_is_of_the_seed_and_without_what_is_excluded() -> None:
    memory = filled()
    assert names(memory.draw(4, seed=1, without=())) == names(memory.draw(4, seed=1, without=()))
    assert len({tuple(names(memory.draw(4, seed=seed, without=()))) for seed in range(10)}) > 5
    assert sorted(names(memory.draw(99, seed=1, without=()))) == [f"prompt {number}" for number in range(9)]
    without = {remembered(number).identity for number in range(8)}
    assert names(memory.draw(3, seed=5, without=without)) == ["prompt 8"]
    assert SampleMemory().draw(5, seed=0, without=()) == []
    drawn = [name for seed in range(900) for name in names(memory.draw(3, seed=seed, without=()))]
    assert all(240 < drawn.count(f"prompt {number}") < 360 for number in range(9))  # 300 each


@pytest.mark.parametrize("num", [0, 1, 9])
def test_what_is_read_is_what_was_written(num: int, tmp_path: Path) -> None:
    memory, other = filled(num), filled(4)
    memory.write(tmp_path)
    other.read(tmp_path)
    assert len(other) == num
    for mine, theirs in zip(memory.draw(9, seed=2, without=()), other.draw(9, seed=2, without=()), strict=True):
        assert (mine.key, mine.score, mine.identity) == (theirs.key, theirs.score, theirs.identity)
        assert mine.sequence.prompt_ids.tolist() == theirs.sequence.prompt_ids.tolist()
        assert theirs.sequence.prompt_ids.dtype == theirs.sequence.response_ids.dtype == np.int32
    other.write(tmp_path)
    again = SampleMemory()
    again.read(tmp_path)
    assert names(again.draw(9, seed=2, without=())) == names(memory.draw(9, seed=2, without=()))


def test_a_memory_that_is_not_there_is_no_empty_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=FILE):
        filled().read(tmp_path)


def test_what_is_remembered_does_not_hold_on_to_the_batch() -> None:
    """Rollouts lie in Ray's shared memory, which one view of them would keep."""
    scored = sampled().rollouts[0]
    mine = Remembered.of(scored)
    assert mine.sequence.response_ids.tolist() == scored.rollout.response_ids.tolist()
    assert not np.shares_memory(mine.sequence.response_ids, scored.rollout.response_ids)
    assert not np.shares_memory(mine.sequence.prompt_ids, scored.rollout.prompt.token_ids)
