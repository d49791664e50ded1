"""Recognises a row of data by its columns and brings it into one of a few forms.

Rows follow the dataset types that the field agrees on: prompt, prompt-completion, preference with an explicit or an
implicit prompt, unpaired preference; each as plain strings or as conversations. Beside them: whole conversations
(`messages`), K-wise rankings, margins, and transcripts in the form of Anthropic's helpful-harmless data.
"""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal

from protocol.errors import UserError
from protocol.tokens import Message

Text = str | list[Message]
"""A prompt or a completion: plain text, or messages."""

Form = Literal["standard", "conversational", "transcript"]

_ROLES = ("system", "user", "assistant")
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):[ \t]?")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
_EXPECTED = (
    "expected columns: prompt | prompt, completion | messages | prompt, chosen, rejected [, margin] | chosen, rejected"
    " | prompt, completion, label | prompt, completions, ranks"
)


class RecordKind(StrEnum):
    """What a row is for."""

    PROMPT_ONLY = "prompt-only"
    PROMPT_COMPLETION = "prompt-completion"
    CONVERSATION = "conversation"
    PREFERENCE = "preference"
    IMPLICIT_PREFERENCE = "preference with implicit prompt"
    UNPAIRED_PREFERENCE = "unpaired preference"
    RANKING = "ranking"


# The first kind whose columns are all there wins, so the more demanding ones come first.
_COLUMNS: tuple[tuple[RecordKind, tuple[str, ...]], ...] = (
    (RecordKind.RANKING, ("prompt", "completions", "ranks")),
    (RecordKind.PREFERENCE, ("prompt", "chosen", "rejected")),
    (RecordKind.IMPLICIT_PREFERENCE, ("chosen", "rejected")),
    (RecordKind.UNPAIRED_PREFERENCE, ("prompt", "completion", "label")),
    (RecordKind.PROMPT_COMPLETION, ("prompt", "completion")),
    (RecordKind.CONVERSATION, ("messages",)),
    (RecordKind.PROMPT_ONLY, ("prompt",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordType:
    """The detected type of a row."""

    kind: RecordKind
    form: Form

    def __str__(self) -> str:
        return f"{self.kind.value}, {self.form}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRecord:
    """A prompt without an answer."""

    prompt: Text
    record_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True, kw_only=True)
class DemonstrationRecord:
    """A prompt with an answer to imitate."""

    prompt: Text
    completion: Text


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceRecord:
    """A prompt with a better and a worse answer, and by how much where that is known."""

    prompt: Text
    chosen: Text
    rejected: Text
    margin: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpairedRecord:
    """A prompt with an answer that somebody liked (`label` true) or did not."""

    prompt: Text
    completion: Text
    label: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RankingRecord:
    """A prompt with K answers and their ranks; 1 is best, equal ranks are ties."""

    prompt: Text
    completions: tuple[Text, ...]
    ranks: tuple[int, ...]

    def pairs(self) -> list[PreferenceRecord]:
        """Return every pair that the ranking orders, ties left out."""
        ranked = list(zip(self.ranks, self.completions, strict=True))
        return [
            PreferenceRecord(prompt=self.prompt, chosen=better, rejected=worse)
            for better_rank, better in ranked
            for worse_rank, worse in ranked
            if better_rank < worse_rank
        ]


Record = PromptRecord | DemonstrationRecord | PreferenceRecord | UnpairedRecord | RankingRecord


class UnusableRow(Exception):
    """A well-formed row that carries no usable comparison: to be left out and counted under its reason."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def detect_type(record: Mapping[str, Any]) -> RecordType:
    """Tell a row's type by its columns and the type of their values; a null counts as absent.

    Raises:
        UserError: The columns fit no type.
    """
    present = {name for name, value in record.items() if value is not None}
    fitting = next((entry for entry in _COLUMNS if present.issuperset(entry[1])), None)
    if fitting is None:
        raise UserError(_complaint(present), cause=_EXPECTED, next_step="rename the columns of the data set")
    kind, columns = fitting
    if kind is RecordKind.PROMPT_ONLY and present & {"chosen", "rejected"}:
        raise UserError(_complaint(present), cause="a comparison needs both chosen and rejected")
    values = [record[name] for name in columns if name not in ("label", "ranks")]
    if kind is RecordKind.IMPLICIT_PREFERENCE and all(_is_transcript(value) for value in values):
        return RecordType(kind=kind, form="transcript")
    conversational = kind is RecordKind.CONVERSATION or any(_is_messages(value) for value in values)
    return RecordType(kind=kind, form="conversational" if conversational else "standard")


def normalize(record: Mapping[str, Any]) -> Record:
    """Bring a row into the form of its type: prompt apart, answers as text or as one assistant message.

    Raises:
        UserError: The row is malformed (no prompt, an empty answer, a wrong type).
        UnusableRow: Two transcripts differ in more than their last answer.
    """
    for column, value in record.items():
        check_whole(value, column)
    found = detect_type(record)
    if found.kind is RecordKind.IMPLICIT_PREFERENCE:
        return _implicit_preference(record, found.form)
    if found.kind is RecordKind.CONVERSATION:
        messages = _messages(record["messages"], "messages")
        return DemonstrationRecord(prompt=_checked_prompt(messages[:-1]), completion=_answer(messages[-1:], "messages"))
    prompt = _prompt(record["prompt"], found.form)
    if found.kind is RecordKind.PROMPT_ONLY:
        identity = record.get("id")
        others = {name: value for name, value in record.items() if name not in ("prompt", "id") and value is not None}
        return PromptRecord(
            prompt=prompt,
            record_id=None if identity is None else str(identity),
            metadata={name: _as_text(value) for name, value in others.items()},
        )
    if found.kind is RecordKind.RANKING:
        return _ranking(prompt, record)
    if found.kind is RecordKind.PREFERENCE:
        return PreferenceRecord(
            prompt=prompt,
            chosen=_completion(prompt, record["chosen"], "chosen"),
            rejected=_completion(prompt, record["rejected"], "rejected"),
            margin=_margin(record),
        )
    completion = _completion(prompt, record["completion"], "completion")
    if found.kind is RecordKind.PROMPT_COMPLETION:
        return DemonstrationRecord(prompt=prompt, completion=completion)
    return UnpairedRecord(prompt=prompt, completion=completion, label=_label(record["label"]))


def text_of(text: Text) -> str:
    """Return what a person reads: the text, or of a conversation what its last user turn (else last turn) says."""
    if isinstance(text, str):
        return text
    spoken = [message for message in text if message["role"] == "user"] or text
    return spoken[-1]["content"]


def check_whole(value: Any, column: str) -> None:
    """Refuse half of a character (a lone surrogate), which JSON can write but no tokenizer and no file can take."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{column} holds half a character",
                cause="text was cut inside a \\ud83d\\ude00 pair",
                next_step="write the text again from its source, or remove this row",
            ) from None
    elif isinstance(value, Mapping):
        for inner in value.values():
            check_whole(inner, column)
    elif isinstance(value, list | tuple):
        for inner in value:
            check_whole(inner, column)


def _complaint(present: set[str]) -> str:
    names = ", ".join(sorted(present)) or "none"
    if present & {"completion", "completions", "label"} and "prompt" not in present:
        return f"the row has no prompt (columns: {names})"
    return f"the columns do not make a known record type (columns: {names})"


def _is_messages(value: Any) -> bool:
    if isinstance(value, list) and value:
        return isinstance(value[0], Mapping) or _is_messages(value[0])
    return False


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _messages(value: Any, column: str) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"{column} is a {type(value).__name__}, not a list of messages")
    messages: list[Message] = []
    for turn in value:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if role not in _ROLES or not isinstance(content, str):
            raise UserError(
                f"{column} holds a turn that is not a message with role and text content: {_shortened(turn)}",
                cause=f"roles are {', '.join(_ROLES)}; content is plain text",
            )
        messages.append({"role": role, "content": content})
    return messages


def _prompt(value: Any, form: Form) -> Text:
    if form == "standard" and isinstance(value, str):
        return _checked_prompt(value)
    if isinstance(value, str):  # a plain question beside answers that are conversations
        return _checked_prompt([{"role": "user", "content": value}])
    return _checked_prompt(_messages(value, "prompt"))


def _checked_prompt(prompt: Text) -> Text:
    said = prompt if isinstance(prompt, str) else "".join(message["content"] for message in prompt)
    if not said.strip():
        raise UserError("the row has no prompt", cause="the prompt is empty")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise UserError("the prompt ends with an assistant turn, so there is nothing left to answer")
    return prompt


def _completion(prompt: Text, value: Any, column: str) -> Text:
    if isinstance(prompt, str):
        if not isinstance(value, str):
            raise UserError(f"{column} is a {type(value).__name__}, not text like the prompt")
        if not value:
            raise UserError(f"{column} is empty")
        return value
    messages = [{"role": "assistant", "content": value}] if isinstance(value, str) else _messages(value, column)
    # Some data sets repeat the prompt at the head of every answer.
    return _answer(messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages, column)


def _answer(messages: list[Message], column: str) -> list[Message]:
    if [message["role"] for message in messages] != ["assistant"]:
        raise UserError(f"{column} does not end in exactly one assistant turn after the prompt")
    if not messages[0]["content"].strip():
        raise UserError(f"{column} is empty")
    return messages


def _implicit_preference(record: Mapping[str, Any], form: Form) -> PreferenceRecord:
    chosen, rejected = record["chosen"], record["rejected"]
    if form == "standard":
        return _split_strings(chosen, rejected, _margin(record))
    if form == "transcript":
        sides = _split_transcript(chosen), _split_transcript(rejected)
    else:
        sides = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    shared = _num_shared(*sides)
    if shared and shared == len(sides[0]) == len(sides[1]):
        shared -= 1  # identical sides: the last turn is the answer, and the reader will drop the pair
    answers = [side[shared:] for side in sides]
    if form == "transcript" and not all(_is_one_answer(answer) for answer in answers):
        raise UnusableRow("the transcripts differ in more than one last, non-empty Assistant turn")
    return PreferenceRecord(
        prompt=_checked_prompt(sides[0][:shared]),
        chosen=_answer(answers[0], "chosen"),
        rejected=_answer(answers[1], "rejected"),
        margin=_margin(record),
    )


def _is_one_answer(messages: list[Message]) -> bool:
    return [message["role"] for message in messages] == ["assistant"] and bool(messages[0]["content"])


def _split_strings(chosen: Any, rejected: Any, margin: float | None) -> PreferenceRecord:
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise UserError("chosen and rejected are neither both text nor both messages")
    shared = _num_shared(chosen, rejected)
    while shared and not chosen[shared - 1].isspace():  # never cut a word in two
        shared -= 1
    prompt = _checked_prompt(chosen[:shared])
    return PreferenceRecord(
        prompt=prompt,
        chosen=_completion(prompt, chosen[shared:], "chosen"),
        rejected=_completion(prompt, rejected[shared:], "rejected"),
        margin=margin,
    )


def _split_transcript(transcript: str) -> list[Message]:
    _, *parts = _TRANSCRIPT.split(transcript)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _TRANSCRIPT_ROLES[speaker], "content": said.strip()} for speaker, said in turns]


def _num_shared(left: Sequence[Any], right: Sequence[Any]) -> int:
    length = min(len(left), len(right))
    return next((place for place in range(length) if left[place] != right[place]), length)


def _ranking(prompt: Text, record: Mapping[str, Any]) -> RankingRecord:
    completions, ranks = record["completions"], record["ranks"]
    if not isinstance(completions, list) or not isinstance(ranks, list) or len(completions) != len(ranks):
        raise UserError("completions and ranks are not lists of the same length")
    if len(ranks) < 2 or not all(type(rank) is int for rank in ranks):
        raise UserError("a ranking needs two or more completions with whole numbers as ranks (1 is best)")
    answers = tuple(_completion(prompt, completion, "completions") for completion in completions)
    return RankingRecord(prompt=prompt, completions=answers, ranks=tuple(ranks))


def _margin(record: Mapping[str, Any]) -> float | None:
    margin = record.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) <= sys.float_info.max:
        raise UserError(f"margin is not a number: {_shortened(margin)}", cause="it is text, NaN, infinite or too large")
    return float(margin)


def _label(value: Any) -> bool:
    if value not in (True, False):  # 0 and 1 are equal to these
        raise UserError(f"label is neither true nor false: {_shortened(value)}")
    return bool(value)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
