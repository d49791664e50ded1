"""What the page of one task shows: texts, and what has been answered so far. No ids, policies, scores or purposes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from reward_service.labeling.forms import SKIP_REASONS, STRENGTHS, Answer
from reward_service.labeling.shown import Block, Turn, blocks_of, turns_of
from reward_service.preferences.records import Label, Task, TaskKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Filled:
    """What the form holds when it is shown; responses are named by their place on the page, from 1 on."""

    choice: str | None = None
    strength: int | None = None
    places: Mapping[int, int] = field(default_factory=dict[int, int])
    ratings: Mapping[int, int] = field(default_factory=dict[int, int])
    flags: Mapping[int, Sequence[str]] = field(default_factory=dict[int, Sequence[str]])
    reason: str | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseView:
    """One response."""

    blocks: tuple[Block, ...]
    place: int | None
    rating: int | None
    flagged: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskView:
    """One task, as the template reads it."""

    kind: TaskKind
    prompt: tuple[Turn, ...]
    responses: tuple[ResponseView, ...]
    filled: Filled
    ticket: str
    correction: bool
    left_s: int
    """Until the lease ends; 0 where there is none."""
    read_s: float
    """Until an answer is taken."""
    ask_ratings: bool
    flags: tuple[str, ...]

    @property
    def places(self) -> range:
        """The places of a ranking."""
        return range(1, len(self.responses) + 1)

    @property
    def strengths(self) -> tuple[tuple[int, str], ...]:
        """How much better a response may be."""
        return tuple(STRENGTHS.items())

    @property
    def reasons(self) -> tuple[tuple[str, str], ...]:
        """Why a task may be skipped."""
        return tuple(SKIP_REASONS.items())


def responses_of(task: Task, presented: Sequence[str], filled: Filled) -> tuple[ResponseView, ...]:
    """Put the responses in the order in which this labeler sees them."""
    return tuple(
        ResponseView(
            blocks=blocks_of(task.candidate(candidate_id).text),
            place=filled.places.get(number),
            rating=filled.ratings.get(number),
            flagged=tuple(filled.flags.get(number, ())),
        )
        for number, candidate_id in enumerate(presented, start=1)
    )


def prompt_of(task: Task) -> tuple[Turn, ...]:
    """Return the prompt as turns."""
    return turns_of(task.prompt)


def filled_from_label(label: Label) -> Filled:
    """Fill the form with a label that is to be corrected."""
    number = {candidate: n for n, candidate in enumerate(label.presented, start=1)}
    outcome = label.outcome
    choice = "ranking" if outcome.ranking else outcome.verdict if outcome.verdict in ("tie", "both_bad") else None
    if outcome.winner is not None:
        choice = str(number[outcome.winner])
    return Filled(
        choice=choice,
        strength=outcome.strength,
        places={number[c]: place for place, group in enumerate(outcome.ranking, start=1) for c in group},
        ratings={number[c]: rating for c, rating in label.ratings.items()},
        flags={number[c]: flags for c, flags in label.flags.items()},
        reason=outcome.reason,
        note=label.note,
    )


def filled_from_answer(answer: Answer) -> Filled:
    """Fill the form with an answer that was not accepted."""
    return Filled(
        choice=answer.choice,
        strength=answer.strength,
        places=answer.place,
        ratings=answer.rating,
        flags=answer.flag,
        reason=answer.reason,
        note=answer.note,
    )
