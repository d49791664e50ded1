"""Preferences from the formats that other tools write: TRL, HelpSteer3, Arena battles, K-wise rankings.

Every comparison becomes a task with the labels that it got. Ids follow from the content, so that reading a file twice
gives the same records. Columns that no field holds are kept in the task's metadata, and come back on export.
"""

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from protocol.data_files import REPAIR
from protocol.datasets import ReadReport, open_records
from protocol.errors import UserError
from protocol.records import (
    PreferenceRecord,
    RankingRecord,
    Record,
    Text,
    UnpairedRecord,
    UnusableRow,
    check_whole,
    normalize,
)
from reward_service.preferences.outbound import COLUMNS
from reward_service.preferences.records import (
    MAX_RANKED,
    MAX_STRENGTH,
    Candidate,
    Label,
    Outcome,
    Purpose,
    Task,
    stable_id,
)

UNKNOWN_POLICY = "imported"
_MAX_ROUND = 1_000_000
LIKED_RATING, DISLIKED_RATING = 7, 1
Located = tuple[str, dict[str, Any]]
_PARTS = ("role", "content")
Judge = Callable[[Task], Outcome]


class Gathering:
    """The tasks and labels read so far.

    Args:
        format: Part of every id.
        round: Of tasks whose row names none.
        purpose: Of all tasks.
        report: Counts labels, and rows that were left out.
    """

    def __init__(self, *, format: str, round: int, purpose: Purpose, report: ReadReport) -> None:
        self.report = report
        self._format = format
        self._round = round
        self._purpose: Purpose = purpose
        self._tasks: dict[str, Task] = {}
        self._labels: dict[str, dict[str, Label]] = {}

    def task(
        self, prompt: Text, responses: Sequence[tuple[str, str]], *, columns: Mapping[str, Any], prompt_id: str = ""
    ) -> Task:
        """Make a task of (policy, text) pairs, or find the one with the same content and id."""
        identity = stable_id(
            self._format, json.dumps(prompt), prompt_id, *(part for pair in responses for part in pair)
        )
        if identity not in self._tasks:
            found_round = columns.get("round")
            kept = {name: value for name, value in columns.items() if value is not None and name != "round"}
            self._tasks[identity] = Task(
                task_id=identity,
                round=found_round if type(found_round) is int else self._round,
                kind="pair" if len(responses) == 2 else "ranking",
                purpose=self._purpose,
                prompt_id=prompt_id or stable_id("prompt", json.dumps(prompt)),
                prompt=prompt,
                candidates=tuple(
                    Candidate(candidate_id=stable_id(identity, place), text=text, policy=policy, policy_version=None)
                    for place, (policy, text) in enumerate(responses)
                ),
                metadata={COLUMNS: json.dumps(kept, default=str)} if kept else {},
            )
        return self._tasks[identity]

    def label(
        self,
        task: Task,
        outcome: Outcome,
        *,
        labeler: str | None = None,
        presented: Sequence[str] | None = None,
        **fields: Any,
    ) -> None:
        """Add a label. One whose labeler is not known counts as somebody new; a known one corrects what they said."""
        labels = self._labels.setdefault(task.task_id, {})
        name = labeler if labeler is not None else f"imported-{len(labels) + 1}"
        before = [label for label in labels.values() if label.labeler_id == name]
        if before and before[-1].outcome == outcome:
            self.report.drop("the same judgement again", before[-1].label_id)
            return
        label = Label(
            label_id=stable_id(task.task_id, name, len(before), outcome.verdict, outcome.winner, outcome.ranking),
            task_id=task.task_id,
            labeler_id=name,
            labeler_kind="imported",
            presented=tuple(presented or (candidate.candidate_id for candidate in task.candidates)),
            outcome=outcome,
            supersedes=before[-1].label_id if before else None,
            **fields,
        )
        label.check_against(task)
        labels[label.label_id] = label
        self.report.keep()

    def result(self) -> tuple[list[Task], list[Label]]:
        """Return tasks, each with the overlap that its labels make, and labels."""
        labels = [label for given in self._labels.values() for label in given.values()]
        tasks = [
            replace(task, overlap=max(1, len({label.labeler_id for label in self._labels.get(identity, {}).values()})))
            for identity, task in self._tasks.items()
        ]
        return tasks, labels


Read = Callable[[Iterator[Located], Gathering], None]


def located(path: Path) -> Iterator[Located]:
    """Yield the rows of a file with their places.

    Raises:
        UserError: If the file or a row cannot be read, or a row names a round that cannot be.
    """
    for number, row in enumerate(open_records(str(path)), start=1):
        where, round = f"{path}, row {number}", row.get("round")
        if type(round) is int and not 0 <= round <= _MAX_ROUND:
            raise UserError(f"there is no round {str(round)[:20]}", where=where, next_step="correct the column `round`")
        yield where, row


def read_trl_preferences(rows: Iterator[Located], gathering: Gathering) -> None:
    """Read TRL preferences, with an explicit or implicit prompt: the chosen response comes first."""
    for where, row in rows:
        record = _record(where, row, gathering.report)
        if record is None:
            continue
        if not isinstance(record, PreferenceRecord):
            raise _wrong(where, "prompt, chosen, rejected")
        responses = [(UNKNOWN_POLICY, said(record.chosen)), (UNKNOWN_POLICY, said(record.rejected))]
        columns = _others(row, "prompt", "chosen", "rejected")
        whole = record.margin in range(1, MAX_STRENGTH + 1)
        if whole or record.margin == 0.0:
            del columns["margin"]
        task = gathering.task(record.prompt, responses, columns=columns)
        strength = int(record.margin) if whole and record.margin is not None else None
        outcome = Outcome(verdict="preference", winner=task.candidates[0].candidate_id, strength=strength)
        gathering.label(task, outcome)


def read_trl_unpaired(rows: Iterator[Located], gathering: Gathering) -> None:
    """Read TRL unpaired preferences: neighbouring rows with one prompt are compared with each other.

    A liked response is rated 7 and another 1, so that what was said about each is kept even where all are alike.
    """
    read = ((where, row, _record(where, row, gathering.report)) for where, row in rows)
    for _, group in groupby(read, key=lambda item: _prompt_key(item[2])):
        kept = [(where, row, record) for where, row, record in group if record is not None]
        for start in range(0, len(kept), MAX_RANKED):
            chunk = kept[start : start + MAX_RANKED]
            where, row, _ = chunk[0]
            records = [_unpaired(place, record) for place, _, record in chunk]
            if len(records) < 2:
                gathering.report.drop("a response alone, with nothing to compare it with", where)
                continue
            columns = _others(row, "prompt", "completion", "label")
            responses = [(UNKNOWN_POLICY, said(record.completion)) for record in records]
            task = gathering.task(records[0].prompt, responses, columns=columns)
            ids = [candidate.candidate_id for candidate in task.candidates]
            liked = {one: record.label for one, record in zip(ids, records, strict=True)}
            ratings = {one: LIKED_RATING if good else DISLIKED_RATING for one, good in liked.items()}
            gathering.label(task, _outcome_of_liked(task, liked), ratings=ratings)


def read_kwise(rows: Iterator[Located], gathering: Gathering) -> None:
    """Read rankings: prompt, completions, ranks."""
    for where, row in rows:
        record = _record(where, row, gathering.report)
        if record is None:
            continue
        if not isinstance(record, RankingRecord):
            raise _wrong(where, "prompt, completions, ranks")
        if len(record.completions) > MAX_RANKED:
            gathering.report.drop(f"more than {MAX_RANKED} responses", where)
            continue
        responses = [(UNKNOWN_POLICY, said(one)) for one in record.completions]
        task = gathering.task(record.prompt, responses, columns=_others(row, "prompt", "completions", "ranks"))
        ids = [candidate.candidate_id for candidate in task.candidates]
        ranks = dict(zip(ids, record.ranks, strict=True))
        groups = [[one for one in ids if ranks[one] == rank] for rank in sorted(set(ranks.values()))]
        gathering.label(task, _outcome_of_groups(task, groups))


def read_helpsteer(rows: Iterator[Located], gathering: Gathering) -> None:
    """Read HelpSteer3: a label for each individual preference, or one for the overall one where there is none."""
    for where, row in rows:
        context, overall = row.get("context"), row.get("overall_preference")
        texts = row.get("response1"), row.get("response2")
        if not context or overall is None or not all(isinstance(text, str) for text in texts):
            raise _wrong(where, "context, response1, response2, overall_preference")
        columns = _others(row, "context", "response1", "response2", "overall_preference", "individual_preference")
        prompt = _checked(where, context)
        task = gathering.task(prompt, [(UNKNOWN_POLICY, str(text)) for text in texts], columns=columns)
        individual = row.get("individual_preference") or [{"score": overall}]
        if not isinstance(individual, list) or not all(isinstance(one, dict) for one in individual):
            raise _wrong(where, "individual_preference as a list of objects with score and reasoning")
        for one in individual:
            score = one.get("score")
            if type(score) is not int or abs(score) > MAX_STRENGTH:
                gathering.report.drop("a score that is no whole number from -3 to 3", where)
                continue
            gathering.label(task, _outcome_of_score(task, score), note=str(one.get("reasoning") or ""))


def read_arena(rows: Iterator[Located], gathering: Gathering) -> None:
    """Read Arena battles: models become policies, judges labelers; model a was shown first."""
    taken = ("question_id", "model_a", "model_b", "winner", "judge", "conversation_a", "conversation_b", "tstamp")
    for where, row in rows:
        a, b = (_checked(where, row.get(name)) for name in ("conversation_a", "conversation_b"))
        if a[:-1] != b[:-1] or not a[:-1] or [a[-1]["role"], b[-1]["role"]] != ["assistant", "assistant"]:
            gathering.report.drop("the conversations part before the last answer", where)
            continue
        if not isinstance(row.get("model_a"), str) or not isinstance(row.get("model_b"), str):
            raise _wrong(where, "the names of two models, model_a and model_b")
        sides = [(str(row.get("model_a")), a[-1]["content"]), (str(row.get("model_b")), b[-1]["content"])]
        # Judges may have seen the two in either order: the task is the same.
        task = gathering.task(
            a[:-1], sorted(sides), columns=_others(row, *taken), prompt_id=str(row.get("question_id", ""))
        )
        ids = [candidate.candidate_id for candidate in task.candidates]
        presented = ids if sides == sorted(sides) else ids[::-1]
        outcomes = {
            "model_a": Outcome(verdict="preference", winner=presented[0]),
            "model_b": Outcome(verdict="preference", winner=presented[1]),
            "tie": Outcome(verdict="tie"),
            "tie (bothbad)": Outcome(verdict="both_bad"),
        }
        winner, judge, at = row.get("winner"), row.get("judge"), row.get("tstamp") or 0.0
        if not isinstance(winner, str) or winner not in outcomes:
            raise _wrong(where, f"a winner that is one of {', '.join(outcomes)}")
        if not isinstance(at, int | float) or not abs(at) <= sys.float_info.max:
            raise _wrong(where, "tstamp as seconds since 1970")
        labeler = None if judge is None else str(judge)
        gathering.label(task, outcomes[winner], labeler=labeler, presented=presented, submitted_at=float(at))


def said(text: Text) -> str:
    """Return what a completion says: the text, or the content of its one message."""
    return text if isinstance(text, str) else text[-1]["content"]


def _outcome_of_groups(task: Task, groups: Sequence[Sequence[str]]) -> Outcome:
    if len(groups) == 1:
        return Outcome(verdict="tie")
    if task.kind == "pair":
        return Outcome(verdict="preference", winner=groups[0][0])
    return Outcome(verdict="preference", ranking=tuple(tuple(group) for group in groups))


def _outcome_of_liked(task: Task, liked: Mapping[str, bool]) -> Outcome:
    if not any(liked.values()):
        return Outcome(verdict="both_bad")
    groups = [[one for one, good in liked.items() if good is wanted] for wanted in (True, False)]
    return _outcome_of_groups(task, [group for group in groups if group])


def _outcome_of_score(task: Task, score: int) -> Outcome:
    if score == 0:
        return Outcome(verdict="tie")
    first, second = (candidate.candidate_id for candidate in task.candidates)
    return Outcome(verdict="preference", winner=first if score < 0 else second, strength=abs(score))


def _record(where: str, row: Mapping[str, Any], report: ReadReport) -> Record | None:
    try:
        return normalize(row)
    except UserError as error:
        raise error.at(where, next_step=REPAIR) from None
    except UnusableRow as unusable:
        report.drop(unusable.reason, where)
        return None


def _prompt_key(record: Record | None) -> str:
    return "" if record is None else json.dumps(getattr(record, "prompt", ""))


def _unpaired(where: str, record: Record) -> UnpairedRecord:
    if not isinstance(record, UnpairedRecord):
        raise _wrong(where, "prompt, completion, label")
    return record


def _checked(where: str, messages: Any) -> list[Any]:
    """Check messages, and leave out what they carry beside role and content."""
    if not isinstance(messages, list) or not all(_is_message(turn) for turn in messages):
        raise _wrong(where, "conversations of messages with role and content")
    try:
        check_whole(messages, "the conversation")
    except UserError as error:
        raise error.at(where, next_step=REPAIR) from None
    return [{part: turn[part] for part in _PARTS} for turn in messages]


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(part), str) for part in _PARTS)


def _others(row: Mapping[str, Any], *taken: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in taken}


def _wrong(where: str, needed: str) -> UserError:
    return UserError(
        f"the row does not have what this format needs: {needed}", where=where, next_step="name the format that it has"
    )
