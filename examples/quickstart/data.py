"""The quickstart's data sources: name one as `examples.quickstart.data:prompts` in a config.

Each is a generator of plain records and a pure function of its seed.
"""

import random
from collections.abc import Iterator
from itertools import repeat

from examples.quickstart.demonstrations import write_demonstration
from examples.quickstart.gold import analyse
from examples.quickstart.labels import prefers_first
from examples.quickstart.world import Kind, Task, split_tasks

_BLOCK = 4  # prompts are dealt in blocks of four with one unsafe prompt each, so that every share is 75% safe


def prompts(*, seed: int, count: int) -> Iterator[dict]:
    """Yield training prompts; none comes twice before all of its kind have come."""
    yield from (_prompt_record(task, turn) for task, turn in _deal(seed, count, held_out=False))


def heldout_prompts(*, seed: int, count: int) -> Iterator[dict]:
    """Yield prompts whose combinations no training source ever uses."""
    yield from (_prompt_record(task, turn) for task, turn in _deal(seed, count, held_out=True))


def demonstrations(*, seed: int, count: int) -> Iterator[dict]:
    """Yield training prompts, each with an answer in one of the crowd's styles."""
    rng = random.Random(f"{seed}/demonstrations")
    for task, _ in _deal(seed, count, held_out=False):
        yield {"prompt": _user_says(task), "completion": _assistant_says(write_demonstration(rng, task))}


def preferences(*, seed: int, count: int) -> Iterator[dict]:
    """Yield pairs of different answers by the crowd, in the order in which a simulated labeler prefers them."""
    rng = random.Random(f"{seed}/preferences")
    for task, _ in _deal(seed, count, held_out=False):
        first, second = _two_answers(rng, task)
        gold = [analyse(task.text, answer, True).score for answer in (first, second)]
        chosen, rejected = (first, second) if prefers_first(rng, *gold) else (second, first)
        yield {
            "prompt": _user_says(task),
            "chosen": _assistant_says(chosen),
            "rejected": _assistant_says(rejected),
        }


def _two_answers(rng: random.Random, task: Task) -> tuple[str, str]:
    first = second = write_demonstration(rng, task)
    while second == first:  # identical answers say nothing; every style mixture has many
        second = write_demonstration(rng, task)
    return first, second


def _deal(seed: int, count: int, *, held_out: bool) -> Iterator[tuple[Task, int]]:
    """Yield (prompt, turn): turn counts how often its kind has been dealt through before."""
    rng = random.Random(f"{seed}/prompts/{'held-out' if held_out else 'training'}")
    decks = {kind: _endless_deck(rng, split_tasks(kind)[held_out]) for kind in ("safe", "unsafe")}
    for position in range(count):
        if position % _BLOCK == 0:
            kinds: list[Kind] = [*repeat("safe", _BLOCK - 1), "unsafe"]
            rng.shuffle(kinds)
        yield next(decks[kinds[position % _BLOCK]])


def _endless_deck(rng: random.Random, tasks: tuple[Task, ...]) -> Iterator[tuple[Task, int]]:
    turn = 0
    while True:
        yield from ((task, turn) for task in rng.sample(tasks, len(tasks)))
        turn += 1


def _prompt_record(task: Task, turn: int) -> dict:
    prompt_id = task.task_id if turn == 0 else f"{task.task_id}-again-{turn}"
    return {"prompt": _user_says(task), "id": prompt_id, "kind": task.kind}


def _user_says(task: Task) -> list[dict[str, str]]:
    return [{"role": "user", "content": task.text}]


def _assistant_says(answer: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": answer}]
