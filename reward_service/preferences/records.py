"""The records of labeling: a task shows candidates, a label says what somebody thinks of them.

Records are append-only. A correction is a new label that supersedes an old one; a task is never changed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from protocol.records import Text

TaskKind = Literal["pair", "ranking"]
Purpose = Literal["training", "evaluation", "check"]
"""What a task is for: data for a reward model; a place on the ladder; an attention check with a known answer."""
Verdict = Literal["preference", "tie", "both_bad", "skip", "invalid"]
"""`skip`: the labeler would not judge (with a reason). `invalid`: a labeler failed, such as a judge that answered
garbage; kept for the record, and never taken for a tie."""
LabelerKind = Literal["person", "simulated", "reward_model", "judge", "imported"]

MIN_RANKED, MAX_RANKED = 3, 9
MAX_STRENGTH = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One response that is compared with others."""

    candidate_id: str
    """Unique within its task, and telling nothing about who wrote it."""
    text: str
    policy: str
    """Who wrote it: a policy's name (`v000`), or where an imported response came from. Never shown to labelers."""
    policy_version: int | None
    """None for responses that no policy of this run wrote."""
    sampling: Mapping[str, float] = field(default_factory=dict[str, float])
    """Temperature and the like."""
    finish_reason: str | None = None
    token_ids: tuple[int, ...] | None = None
    """As they were sampled, without the prompt; None where only text is known."""
    scores: Mapping[str, float] = field(default_factory=dict[str, float])
    """Reward model -> its score, where one was asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Something to be judged: a prompt, and two candidates to compare or several to rank."""

    task_id: str
    round: int
    kind: TaskKind
    purpose: Purpose
    prompt_id: str
    prompt: Text
    candidates: tuple[Candidate, ...]
    expected: str | None = None
    """The candidate that an attention check expects to win."""
    overlap: int = 1
    """How many labelers are to judge it."""
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])

    def __post_init__(self) -> None:
        """Check what every reader relies on.

        Raises:
            ValueError: If the candidates do not fit the kind of the task.
        """
        ids = [candidate.candidate_id for candidate in self.candidates]
        if len(set(ids)) != len(ids):
            raise ValueError(f"task {self.task_id}: a candidate id comes twice")
        fits = len(ids) == 2 if self.kind == "pair" else MIN_RANKED <= len(ids) <= MAX_RANKED
        if not fits:
            raise ValueError(f"task {self.task_id}: {len(ids)} candidates do not make a {self.kind}")
        if self.expected is not None and self.expected not in ids:
            raise ValueError(f"task {self.task_id}: the expected winner is none of its candidates")

    def candidate(self, candidate_id: str) -> Candidate:
        """Find one of the candidates.

        Raises:
            KeyError: If there is no such candidate.
        """
        for candidate in self.candidates:
            if candidate.candidate_id == candidate_id:
                return candidate
        raise KeyError(candidate_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a label says.

    A pair with a preference has a winner, and perhaps a strength. A ranking has groups of candidates, best first; those
    in one group are tied. A tie, both bad, a skip and an invalid label have neither.
    """

    verdict: Verdict
    winner: str | None = None
    strength: int | None = None
    """1 slightly, 2 clearly, 3 much better."""
    ranking: tuple[tuple[str, ...], ...] = ()
    reason: str | None = None
    """Why it was skipped, or why it is invalid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Label:
    """One labeler's judgement of one task."""

    label_id: str
    """Chosen by whoever submits, so that a repeated submit is the same label."""
    task_id: str
    labeler_id: str
    """A pseudonym."""
    labeler_kind: LabelerKind
    presented: tuple[str, ...]
    """Candidate ids in the order in which they were shown."""
    outcome: Outcome
    ratings: Mapping[str, int] = field(default_factory=dict[str, int])
    """Candidate id -> 1 (bad) to 7 (good)."""
    flags: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Candidate id -> what is wrong with it, from the configured list."""
    note: str = ""
    shown_at: float = 0.0
    """Seconds since the epoch."""
    submitted_at: float = 0.0
    ui_version: str = ""
    guideline_version: str = ""
    supersedes: str | None = None
    """The label that this one corrects."""

    def check_against(self, task: Task) -> None:
        """Check that the label fits its task.

        Raises:
            ValueError: Saying what does not fit.
        """
        ids = {candidate.candidate_id for candidate in task.candidates}
        outcome = self.outcome
        if self.task_id != task.task_id:
            raise ValueError(f"the label is for task {self.task_id}, not {task.task_id}")
        if set(self.presented) != ids or len(self.presented) != len(ids):
            raise ValueError("the order shown does not name every candidate once")
        strange = ({*self.ratings} | {*self.flags}) - ids
        if strange:
            raise ValueError(f"ratings or flags for unknown candidates: {', '.join(sorted(strange))}")
        if any(not 1 <= rating <= 7 for rating in self.ratings.values()):
            raise ValueError("a rating is a whole number from 1 to 7")
        if outcome.verdict == "preference":
            _check_preference(outcome, task.kind, ids)
        elif outcome.winner is not None or outcome.strength is not None or outcome.ranking:
            raise ValueError(f"a label that says {outcome.verdict} has no winner, strength or ranking")
        if outcome.verdict in ("skip", "invalid") and not outcome.reason:
            raise ValueError(f"a label that says {outcome.verdict} needs a reason")


def _check_preference(outcome: Outcome, kind: TaskKind, ids: set[str]) -> None:
    if kind == "pair":
        if outcome.winner not in ids or outcome.ranking:
            raise ValueError("a preference between two names the winner")
        if outcome.strength is not None and not 1 <= outcome.strength <= MAX_STRENGTH:
            raise ValueError(f"a strength is a whole number from 1 to {MAX_STRENGTH}")
        return
    ranked = [candidate for group in outcome.ranking for candidate in group]
    if sorted(ranked) != sorted(ids) or outcome.winner is not None or outcome.strength is not None:
        raise ValueError("a ranking names every candidate once, best first, and has no separate winner or strength")
    if len(outcome.ranking) < 2:
        raise ValueError("a ranking with everything in one place is a tie")


@dataclass(frozen=True, slots=True, kw_only=True)
class LabeledTask:
    """A task with the labels that stand (superseded ones left out), oldest first."""

    task: Task
    labels: tuple[Label, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the labeling of some tasks is."""

    tasks: int
    done: int
    """Tasks with as many judgements (skips and invalid labels left out) as their overlap asks for."""
    judgements: int
    preferences: int
    ties: int
    both_bad: int
    skips: int
    invalid: int


def stable_id(*parts: object) -> str:
    """Derive an id from what makes a record what it is, so that doing something twice makes it once.

    Returns:
        24 hexadecimal digits.
    """
    text = json.dumps([str(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def task_to_json(task: Task) -> dict[str, Any]:
    """Write a task as plain JSON values."""
    return asdict(task)


def task_from_json(values: Mapping[str, Any]) -> Task:
    """Read what `task_to_json` wrote."""
    candidates = tuple(
        Candidate(**{**c, "token_ids": None if c["token_ids"] is None else tuple(c["token_ids"])})
        for c in values["candidates"]
    )
    return Task(**{**values, "candidates": candidates})


def label_to_json(label: Label) -> dict[str, Any]:
    """Write a label as plain JSON values."""
    return asdict(label)


def label_from_json(values: Mapping[str, Any]) -> Label:
    """Read what `label_to_json` wrote."""
    outcome = dict(values["outcome"])
    outcome["ranking"] = tuple(tuple(group) for group in outcome["ranking"])
    flags = {candidate: tuple(named) for candidate, named in values["flags"].items()}
    return Label(**{**values, "presented": tuple(values["presented"]), "outcome": Outcome(**outcome), "flags": flags})
