"""Preferences as rows of the formats that other tools read: TRL, HelpSteer3, Arena battles, K-wise rankings.

Whatever a format cannot carry is left out and counted, never bent into something else.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from protocol.datasets import ReadReport
from protocol.records import Text
from protocol.tokens import Message
from reward_service.preferences.consensus import Consensus, consensus
from reward_service.preferences.records import Candidate, Label, LabeledTask, Task

COLUMNS = "columns"
"""Metadata key: columns of an imported row that no field of a task holds, as a JSON object."""
MIDDLE_RATING = 4.0
UNKNOWN_STRENGTH = 2
"""HelpSteer3 has no preference without a strength."""


@dataclass(slots=True, kw_only=True)
class ExportReport(ReadReport):
    """What was written of labelled tasks and what was left out, each by name: one ranking gives many pairs."""

    unit: str
    """What a row is, such as a pair."""
    num_tasks: int = 0
    """How many there were to write."""
    tasks: set[str] = field(default_factory=set[str])
    """Those of which something was written."""
    units: dict[str, str] = field(default_factory=dict[str, str])
    """Reason -> what was left out for it."""

    def keep_of(self, task: Task) -> None:
        """Count a row that is written."""
        self.keep()
        self.tasks.add(task.task_id)

    def leave(self, unit: str, reason: str, where: str) -> None:
        """Count a task, or something of a task, that is left out."""
        self.drop(reason, where)
        self.units[reason] = unit

    def summary(self) -> str:
        """Say in one line what was written and left out."""
        reasons = [
            f"{counted(count, self.units[reason])} left out: {reason} (such as {', '.join(self.examples[reason])})"
            for reason, count in self.dropped.items()
        ]
        made = f"{counted(self.num_kept, self.unit)} from {len(self.tasks)} of {counted(self.num_tasks, 'task')}"
        return "; ".join([made, *reasons])


ToRows = Callable[[Sequence[LabeledTask], ExportReport], Iterator[dict[str, Any]]]


def preference_rows(labeled: Sequence[LabeledTask], report: ExportReport) -> Iterator[dict[str, Any]]:
    """Yield TRL preferences: prompt, chosen, rejected, round, source, and margin if any pair has a strength.

    A margin column is all or nothing, because TRL cannot collate an empty one; 0 leaves its loss as it is without. A
    ranking gives every pair that it orders.
    """
    decided = list(_decided(labeled, report))
    has_margin = any(found.strength is not None for _, found in decided)
    for task, found in decided:
        for better, worse in combinations(found.groups, 2):
            for chosen, rejected in ((task.candidate(a), task.candidate(b)) for a in better for b in worse):
                if not _is_useful(task, (chosen, rejected), report):
                    continue
                row: dict[str, Any] = {
                    "prompt": task.prompt,
                    "chosen": completion(task.prompt, chosen.text),
                    "rejected": completion(task.prompt, rejected.text),
                }
                if has_margin:
                    row["margin"] = float(found.strength or 0.0)
                report.keep_of(task)
                yield {**row, "round": task.round, "source": source_of(task)}


def unpaired_rows(labeled: Sequence[LabeledTask], report: ExportReport) -> Iterator[dict[str, Any]]:
    """Yield TRL unpaired preferences: prompt, completion, label, round, source.

    Where responses were rated, a mean above 4 is true and one below is false. Otherwise the best of a task are true and
    the last are false; both bad makes two false.
    """
    for entry in labeled:
        task = entry.task
        liked = _liked(entry, report)
        for candidate in task.candidates:
            label = liked.get(candidate.candidate_id)
            if label is None:
                continue
            if not candidate.text.strip():
                report.leave("response", "empty response", task.task_id)
                continue
            report.keep_of(task)
            yield {
                "prompt": task.prompt,
                "completion": completion(task.prompt, candidate.text),
                "label": label,
                "round": task.round,
                "source": source_of(task),
            }


def kwise_rows(labeled: Sequence[LabeledTask], report: ExportReport) -> Iterator[dict[str, Any]]:
    """Yield rankings, a pair as one of two: prompt, completions, ranks (1 is best, ties share one), round, source."""
    for entry in labeled:
        task, found = entry.task, consensus(entry)
        if isinstance(found, str) and found != "tie":
            report.leave("task", found, task.task_id)
            continue
        if not _is_useful(task, task.candidates, report):
            continue
        ranks = {c.candidate_id: 1 for c in task.candidates} if isinstance(found, str) else found.rank_of()
        report.keep_of(task)
        yield {**ranking_row(task, ranks), "round": task.round, "source": source_of(task)}


def helpsteer_rows(labeled: Sequence[LabeledTask], report: ExportReport) -> Iterator[dict[str, Any]]:
    """Yield HelpSteer3 rows, one a pair: the preference runs from -3 (response 1 much better) to 3.

    The overall preference is the rounded mean of the individual ones. Both bad is 0 like a tie.
    """
    for entry in labeled:
        task = entry.task
        judged = [label for label in entry.labels if _is_carried(label, report)]
        if task.kind != "pair":
            report.leave("task", "a ranking", task.task_id)
            continue
        if not judged:
            continue
        first, second = task.candidates
        individual = [_individual(label, first=first.candidate_id) for label in judged]
        report.keep_of(task)
        yield {
            **_columns(task),
            "context": conversation(task.prompt),
            "response1": first.text,
            "response2": second.text,
            "overall_preference": round(sum(one["score"] for one in individual) / len(individual)),
            "individual_preference": individual,
        }


def arena_rows(labeled: Sequence[LabeledTask], report: ExportReport) -> Iterator[dict[str, Any]]:
    """Yield Arena battles, one a judgement of a pair; model a is the one that was shown first."""
    for entry in labeled:
        task = entry.task
        for label in entry.labels:
            if task.kind != "pair":
                report.leave("label", "a ranking", label.label_id)
            elif _is_carried(label, report):
                report.keep_of(task)
                yield _battle(task, label)


def source_of(task: Task) -> str:
    """Name where a task came from: what an import said, else its round."""
    return str(_columns(task).get("source", f"round {task.round}"))


def completion(prompt: Text, text: str) -> Text:
    """Write a response in the form of its prompt: text after text, an assistant message after messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def conversation(prompt: Text, *answers: str) -> list[Message]:
    """Write a prompt, and perhaps an answer, as messages."""
    opening: list[Message] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return opening + [{"role": "assistant", "content": answer} for answer in answers]


def ranking_row(task: Task, ranks: dict[str, int]) -> dict[str, Any]:
    """Write a task and its ranks as a K-wise row."""
    return {
        "prompt": task.prompt,
        "completions": [completion(task.prompt, candidate.text) for candidate in task.candidates],
        "ranks": [ranks[candidate.candidate_id] for candidate in task.candidates],
    }


def num_pairs(row: Mapping[str, Any]) -> int:
    """Count the pairs that a row for a reward model orders: a ranking's of different ranks; any other row is one."""
    ranks: Sequence[int] = row.get("ranks", (1, 2))
    return sum(one != other for one, other in combinations(ranks, 2))


def counted(count: int, noun: str) -> str:
    """Write a count with its noun."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def why_useless(candidates: Sequence[Candidate]) -> str | None:
    """Say why nothing can be learned from an order of these, if so."""
    texts = [candidate.text for candidate in candidates]
    if not all(text.strip() for text in texts):
        return "empty response"
    return "identical responses" if len(set(texts)) < len(texts) else None


def _decided(labeled: Sequence[LabeledTask], report: ExportReport) -> Iterator[tuple[Task, Consensus]]:
    for entry in labeled:
        found = consensus(entry)
        if isinstance(found, str):
            report.leave("task", found, entry.task.task_id)
        else:
            yield entry.task, found


def _is_useful(task: Task, candidates: Sequence[Candidate], report: ExportReport) -> bool:
    reason = why_useless(candidates)
    if reason is not None:
        report.leave("task" if len(candidates) == len(task.candidates) else "pair", reason, task.task_id)
    return reason is None


def _is_carried(label: Label, report: ExportReport) -> bool:
    verdict = label.outcome.verdict
    if verdict in ("skip", "invalid"):
        report.leave("label", "skipped" if verdict == "skip" else "invalid", label.label_id)
        return False
    return True


def _liked(entry: LabeledTask, report: ExportReport) -> dict[str, bool]:
    ids = [candidate.candidate_id for candidate in entry.task.candidates]
    ratings = {one: [label.ratings[one] for label in entry.labels if one in label.ratings] for one in ids}
    if any(ratings.values()):
        means = {one: sum(given) / len(given) for one, given in ratings.items() if given}
        for one in ids:
            if one not in means:
                report.leave("response", "not rated", entry.task.task_id)
            elif means[one] == MIDDLE_RATING:
                report.leave("response", "rated in the middle", entry.task.task_id)
        return {one: mean > MIDDLE_RATING for one, mean in means.items() if mean != MIDDLE_RATING}
    found = consensus(entry)
    if found == "both bad":
        return dict.fromkeys(ids, False)
    if isinstance(found, str):
        report.leave("task", found, entry.task.task_id)
        return {}
    for _ in (one for group in found.groups[1:-1] for one in group):
        report.leave("response", "neither best nor last", entry.task.task_id)
    return dict.fromkeys(found.groups[0], True) | dict.fromkeys(found.groups[-1], False)


def _individual(label: Label, *, first: str) -> dict[str, Any]:
    size = 0 if label.outcome.winner is None else label.outcome.strength or UNKNOWN_STRENGTH
    score = -size if label.outcome.winner == first else size
    return {"score": score, "reasoning": label.note, "feedback1": "", "feedback2": ""}


def _battle(task: Task, label: Label) -> dict[str, Any]:
    a, b = (task.candidate(one) for one in label.presented)
    named = {a.candidate_id: "model_a", b.candidate_id: "model_b"}
    without_winner = "tie" if label.outcome.verdict == "tie" else "tie (bothbad)"
    return {
        "turn": sum(message["role"] == "user" for message in conversation(task.prompt)),
        "anony": True,
        "language": "unknown",
        **_columns(task),
        "question_id": task.prompt_id,
        "model_a": a.policy,
        "model_b": b.policy,
        "winner": without_winner if label.outcome.winner is None else named[label.outcome.winner],
        "judge": label.labeler_id,
        "conversation_a": conversation(task.prompt, a.text),
        "conversation_b": conversation(task.prompt, b.text),
        "tstamp": label.submitted_at,
    }


def _columns(task: Task) -> dict[str, Any]:
    return json.loads(task.metadata.get(COLUMNS, "{}"))
