"""A language model as judge, asked in both orders."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import cast

from configs.labels import JudgeConfig
from protocol.tokens import Message
from reward_service.preferences.completion import Completer, CompletionFailure
from reward_service.preferences.labeling_protocol import Clock, make_label, outcome_of, require_few_invalid
from reward_service.preferences.labeling_report import disagreement_note, num_comparisons
from reward_service.preferences.question import Answer, QuestionTemplate, read_answer
from reward_service.preferences.records import Label, LabelerKind, Outcome, Task, stable_id


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two candidates, and what the judge said about them in both orders."""

    one: str
    other: str
    forward: Answer
    """With `one` first."""
    backward: Answer
    """With `other` first."""

    @property
    def agrees(self) -> bool:
        """Tell whether both orders say the same."""
        return {self.forward, self.backward} in ({"A", "B"}, {"TIE"})

    @property
    def winner(self) -> str | None:
        """Return whom both orders prefer; None for a tie, and where they disagree."""
        if not self.agrees or self.forward == "TIE":
            return None
        return self.one if self.forward == "A" else self.other


class Judge:
    """A language model that is asked about every pair twice, with the order swapped.

    Judges favour a place (Shi et al., arXiv 2406.07791), so only what they say in both orders counts; a disagreement
    is a tie, and the label's note says so, from which `summarise_labels` computes flip rate and position bias. An
    answer that did not come or cannot be read makes the label invalid, with the reason: it is never taken for a tie.

    A ranking of K is made of all K (K - 1) / 2 pairs (72 questions for 9, the most that a task may have), in the order
    of their Copeland points:
        points_i = #{j: i beats j} + 1/2 #{j: i ties with j}
    Equal points are a tie. One missing answer makes the whole ranking invalid, because points with a gap are biased.

    The model and the question make the judge: where it is served may change without making another labeler of it.

    Args:
        config: The model's name, the template, the longest answer, how many labels may be invalid.
        complete: Who answers: an endpoint, or this run's own rollout workers.

    Raises:
        UserError: If the template is not usable.
    """

    kind: LabelerKind = "judge"

    def __init__(self, config: JudgeConfig, *, complete: Completer) -> None:
        self._config = config
        self._completer = complete
        self._question = QuestionTemplate(config.template)
        identity = stable_id(config.model, config.max_answer_tokens, self._question.version)
        self.labeler_id = f"judge-{identity[:8]}"

    def label(self, tasks: Sequence[Task], *, now: Clock) -> list[Label]:
        """Judge tasks; all questions are handed to the completer at once.

        Use `label_chunks` for more than a few dozen tasks, so that what was judged is recorded while the rest is asked.

        Raises:
            UserError: If the endpoint refuses (wrong address, model or token); nothing is labelled then.
            InvalidLabelsError: If more than `max_invalid_fraction` of the labels are invalid; it carries all labels.
        """
        if not tasks:
            return []
        shown_at = now()
        questions = [question for task in tasks for question in self._questions(task)]
        answers = self._completer.complete(questions, max_tokens=self._config.max_answer_tokens)
        if len(answers) != len(questions):
            raise RuntimeError(f"{len(answers)} answers came to {len(questions)} questions")
        submitted_at = now()
        labels: list[Label] = []
        start = 0
        for task in tasks:
            end = start + 2 * num_comparisons(len(task.candidates))
            labels.append(self._decide(task, answers[start:end], shown_at=shown_at, submitted_at=submitted_at))
            start = end
        require_few_invalid(labels, num_tasks=len(tasks), max_fraction=self._config.max_invalid_fraction)
        return labels

    def _questions(self, task: Task) -> list[list[Message]]:
        pairs = combinations(task.candidates, 2)
        ordered = [order for one, other in pairs for order in ((one, other), (other, one))]
        texts = [self._question.render(task.prompt, first.text, second.text) for first, second in ordered]
        return [[{"role": "user", "content": text}] for text in texts]

    def _decide(
        self, task: Task, answers: Sequence[str | CompletionFailure], *, shown_at: float, submitted_at: float
    ) -> Label:
        read = [answer if isinstance(answer, CompletionFailure) else read_answer(answer) for answer in answers]
        failures = [answer for answer in read if isinstance(answer, CompletionFailure)]
        ids = [candidate.candidate_id for candidate in task.candidates]
        note = ""
        if failures:
            outcome = Outcome(verdict="invalid", reason=failures[0].reason)
        else:
            comparisons = _comparisons(ids, cast(list[Answer], read))
            outcome = outcome_of(copeland_groups(ids, comparisons), task=task)
            flips = [(found.forward, found.backward) for found in comparisons if not found.agrees]
            note = disagreement_note(flips, comparisons=len(comparisons))
        label = make_label(task, by=self, presented=ids, outcome=outcome, shown_at=shown_at, submitted_at=submitted_at)
        return replace(label, note=note, guideline_version=self._question.version)


def copeland_groups(ids: Sequence[str], comparisons: Sequence[Comparison]) -> list[list[str]]:
    """Order candidates by their Copeland points, best first; equal points share a group.

    Args:
        ids: The candidates.
        comparisons: Every pair of them once.
    """
    points = dict.fromkeys(ids, 0.0)
    for comparison in comparisons:
        if comparison.winner is None:
            points[comparison.one] += 0.5
            points[comparison.other] += 0.5
        else:
            points[comparison.winner] += 1
    levels = sorted(set(points.values()), reverse=True)
    return [[name for name in ids if points[name] == level] for level in levels]


def _comparisons(ids: Sequence[str], answers: Sequence[Answer]) -> list[Comparison]:
    pairs = list(combinations(ids, 2))
    return [
        Comparison(one=one, other=other, forward=forward, backward=backward)
        for (one, other), forward, backward in zip(pairs, answers[::2], answers[1::2], strict=True)
    ]
