"""What every labeler is, whoever judges: one label for each task, and the same label when asked again.

A label's id is made of the task and the labeler, so that a chunk that is labelled twice is recorded once. A label that
says `invalid` has an id of its own: it must not stand in the way of the judgement that a later attempt brings.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from protocol.errors import UserError
from protocol.messages import FloatArray, RolloutKey
from reward_service.preferences.labeling_report import LabelingReport, summarise_labels
from reward_service.preferences.records import Candidate, Label, LabelerKind, Outcome, Task, stable_id
from reward_service.scoring import require_scores

Clock = Callable[[], float]
"""Seconds since the epoch."""


class Labeler(Protocol):
    """Somebody or something that judges tasks."""

    @property
    def labeler_id(self) -> str:
        """A pseudonym that changes with everything the judgement depends on."""
        ...

    @property
    def kind(self) -> LabelerKind:
        """Person, simulated, reward model or judge."""
        ...

    def label(self, tasks: Sequence[Task], *, now: Clock) -> list[Label]:
        """Judge tasks.

        Args:
            tasks: What to judge. Neither their order nor how they are cut into calls changes a label.
            now: The clock for `shown_at` and `submitted_at`.

        Returns:
            One label for each task, in the order of the tasks.

        Raises:
            UserError: If the labeler cannot be asked at all; nothing is labelled then.
            InvalidLabelsError: If too many labels are invalid; it carries all of them.
            RewardError: If a score on which the labels rest could not be computed.
        """
        ...


class InvalidLabelsError(UserError):
    """Report that a labeler failed on too many tasks.

    Args:
        what: What happened.
        where: The labeler.
        labels: Every label that was made, the invalid ones among them.
        max_fraction: How large a share may be invalid.
    """

    def __init__(
        self, what: str, *, where: str | None = None, labels: Sequence[Label] = (), max_fraction: float = 0.0
    ) -> None:
        super().__init__(
            what,
            where=where,
            cause="the labeler was out of reach, or does not answer in the form that it is asked for",
            next_step="mend the labeler and run the same command again, or raise max_invalid_fraction",
        )
        self.labels = tuple(labels)
        self.max_fraction = max_fraction

    @property
    def report(self) -> LabelingReport:
        """What the labels say, counted."""
        return summarise_labels(self.labels)


def label_chunks(
    labeler: Labeler, tasks: Sequence[Task], *, now: Clock, chunk_tasks: int = 64, num_tasks: int | None = None
) -> Iterator[list[Label]]:
    """Judge tasks chunk by chunk, so that the caller can record each chunk before the next is asked for.

    The share of invalid labels is measured against all tasks, and not against a chunk, in which one bad answer may be
    a large share. It stops as soon as the share is out of reach, after the labels have been handed out.

    Args:
        labeler: Who judges.
        tasks: What to judge.
        now: The clock.
        chunk_tasks: Tasks in a chunk.
        num_tasks: Of how many tasks these are the rest, where others were labelled before; these alone if not given.

    Yields:
        The labels of one chunk, in the order of the tasks.

    Raises:
        InvalidLabelsError: If too many labels are invalid.
    """
    made: list[Label] = []
    max_fraction = None
    for start in range(0, len(tasks), chunk_tasks):
        try:
            labels = labeler.label(tasks[start : start + chunk_tasks], now=now)
        except InvalidLabelsError as error:
            labels, max_fraction = list(error.labels), error.max_fraction
        made += labels
        yield labels
        # A share that no single chunk exceeds is not exceeded by all together either.
        if max_fraction is not None:
            require_few_invalid(made, num_tasks=num_tasks or len(tasks), max_fraction=max_fraction)


def require_few_invalid(labels: Sequence[Label], *, num_tasks: int, max_fraction: float) -> None:
    """Check that not too many labels are invalid.

    Args:
        labels: The labels made so far, all by one labeler.
        num_tasks: How many tasks there are in all.
        max_fraction: The share of them that may be invalid.

    Raises:
        InvalidLabelsError: If more are; it names the counts and the reasons.
    """
    invalid = sum(label.outcome.verdict == "invalid" for label in labels)
    if not num_tasks or invalid / num_tasks <= max_fraction:
        return
    reasons = summarise_labels(labels).invalid_reasons
    counted = ", ".join(f"{count} x {reason}" for reason, count in reasons.items())
    example = next(label.outcome.reason for label in labels if label.outcome.verdict == "invalid")
    raise InvalidLabelsError(
        f"{invalid} of {len(labels)} labels are invalid, and at most {max_fraction:.1%} of {num_tasks} may be: "
        f"{counted}; the first says {example!r}",
        where=f"labeler {labels[0].labeler_id}",
        labels=labels,
        max_fraction=max_fraction,
    )


def make_label(
    task: Task, *, by: Labeler, presented: Sequence[str], outcome: Outcome, shown_at: float, submitted_at: float
) -> Label:
    """Write a judgement down as a label whose id follows from who judged what."""
    attempt = ("invalid",) if outcome.verdict == "invalid" else ()
    return Label(
        label_id=stable_id(task.task_id, by.labeler_id, *attempt),
        task_id=task.task_id,
        labeler_id=by.labeler_id,
        labeler_kind=by.kind,
        presented=tuple(presented),
        outcome=outcome,
        shown_at=shown_at,
        submitted_at=submitted_at,
    )


def outcome_of(groups: Sequence[Sequence[str]], *, task: Task) -> Outcome:
    """Express groups of candidates, best first, as the outcome of a pair or a ranking.

    Args:
        groups: Candidate ids; those in one group are tied.
        task: What was judged.
    """
    if len(groups) == 1:
        return Outcome(verdict="tie")
    if task.kind == "pair":
        return Outcome(verdict="preference", winner=groups[0][0])
    return Outcome(verdict="preference", ranking=tuple(tuple(group) for group in groups))


def grouped_by_score(order: Sequence[str], *, scores: dict[str, float], tie_below: float) -> list[list[str]]:
    """Cut an order into groups of ties: whoever is closer than `tie_below` to the head of a group belongs to it.

    Closeness to the head, and not to the neighbour, keeps a chain of small steps from tying the best to the worst.

    Args:
        order: Candidate ids, best first.
        scores: Candidate id -> score.
        tie_below: Scores that differ by less are tied.
    """
    groups: list[list[str]] = []
    for candidate in order:
        if groups and abs(scores[groups[-1][0]] - scores[candidate]) < tie_below:
            groups[-1].append(candidate)
        else:
            groups.append([candidate])
    return groups


def every_candidate(tasks: Sequence[Task]) -> list[tuple[Task, Candidate]]:
    """List the candidates of all tasks, task by task."""
    return [(task, candidate) for task in tasks for candidate in task.candidates]


def scores_by_task(raw: object, tasks: Sequence[Task], *, component: str) -> list[dict[str, float]]:
    """Check the scores of `every_candidate(tasks)` and deal them out.

    Args:
        raw: [N] what the scorer returned.
        tasks: The tasks.
        component: The scorer's name, for the error.

    Returns:
        For each task: candidate id -> score.

    Raises:
        RewardError: If there is not one finite number for each candidate.
    """
    scores: FloatArray = require_scores(raw, component=component, keys=candidate_keys(tasks))
    ends = np.cumsum([len(task.candidates) for task in tasks])
    parts = np.split(scores.astype(np.float64), ends[:-1])
    ids = [[candidate.candidate_id for candidate in task.candidates] for task in tasks]
    return [dict(zip(names, part.tolist(), strict=True)) for names, part in zip(ids, parts, strict=True)]


def candidate_keys(tasks: Sequence[Task]) -> list[RolloutKey]:
    """Name each candidate the way that a RewardError names a response: by prompt, and place in its task."""
    return [RolloutKey(task.round, 0, task.prompt_id, place) for task in tasks for place in range(len(task.candidates))]
