"""Attention checks: tasks with a known answer, dealt out among the others on the labeling page."""

from collections.abc import Iterator

from configs.labels import PeopleConfig
from protocol import datasets
from protocol.records import PreferenceRecord, Text
from reward_service.preferences.records import Candidate, Task, stable_id

_EVERYBODY = 1_000_000
"""Everybody is to answer every check, so no number of answers is enough."""


def attention_checks(people: PeopleConfig, *, round: int, seed: int) -> Iterator[Task]:
    """Make the attention checks of a round.

    Args:
        people: Says where they come from, if there are any.
        round: Which round.
        seed: For sources that are generators.

    Yields:
        Tasks whose expected winner is the source's `chosen`.
    """
    if people.check_period == 0 or people.checks is None:
        return
    source = people.checks
    records = datasets.read_preferences(source.source, split=source.split, seed=seed, count=source.count)
    for number, record in enumerate(records):
        yield _check(record, round=round, number=number)


def _check(record: PreferenceRecord, *, round: int, number: int) -> Task:
    task_id = stable_id("check", round, number)
    sides = {stable_id(task_id, side)[:12]: side for side in ("chosen", "rejected")}
    candidates = tuple(
        Candidate(candidate_id=name, text=_said(getattr(record, side)), policy="check", policy_version=None)
        for name, side in sorted(sides.items())  # by name, so that the place says nothing
    )
    expected = next(name for name, side in sides.items() if side == "chosen")
    return Task(
        task_id=task_id,
        round=round,
        kind="pair",
        purpose="check",
        prompt_id=f"check-{number}",
        prompt=record.prompt,
        candidates=candidates,
        expected=expected,
        overlap=_EVERYBODY,
    )


def _said(text: Text) -> str:
    return text if isinstance(text, str) else text[-1]["content"]
