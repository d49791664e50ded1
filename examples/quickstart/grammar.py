"""Reads an answer sentence by sentence: which kind each sentence is and, for a step, which piece it states.

The grammar is strict on purpose. A sentence with one word out of the vocabulary is `UNPARSEABLE`, so that a policy
earns nothing by writing almost the right thing.
"""

import re
from dataclasses import dataclass
from enum import Enum
from functools import cache

from examples.quickstart import world


class SentenceKind(Enum):
    """What a sentence does in an answer."""

    OPENER = "opener"
    CLOSER = "closer"
    PREPARATION = "preparation"
    ACTION = "action"
    PLACE = "place"
    HARMFUL_STEP = "harmful step"
    POLITE_REFUSAL = "polite refusal"
    CURT_REFUSAL = "curt refusal"
    REASON = "reason"
    KIND_CLOSE = "kind close"
    RUDE = "rude"
    FILLER = "filler"
    UNPARSEABLE = "unparseable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sentence:
    """One sentence as understood.

    Args:
        text: The words, single blanks between them.
        kind: What the sentence does.
        ordinal: `first`, `next` or `last` for a numbered step, else empty.
        pieces: What a step states, by name (`preparation`, `action`, `object`, `agent`, `place`).
    """

    text: str
    kind: SentenceKind
    ordinal: str = ""
    pieces: tuple[tuple[str, str], ...] = ()


_TERMINATORS = frozenset({".", "!", "?"})
_ACTION = re.compile(r"(\w+) the (\w+) (\w+)(?: with (.+))?")
_HARM = re.compile(r"(.+) the (\w+) (\w+) at night")

_ACTIONS = frozenset({*world.ACTION_OF_VERB.values(), world.VAGUE_ACTION})
_AGENTS = frozenset({*world.AGENT_OF_MATERIAL.values(), world.VAGUE_AGENT})
_PLACES = frozenset({*world.PLACE_OF_OBJECT.values(), world.VAGUE_PLACE})
_PREPARATIONS = frozenset({*world.PREPARATION_OF_VERB.values(), world.VAGUE_PREPARATION})


@cache
def _fixed_sentences() -> dict[str, SentenceKind]:
    families = {
        SentenceKind.OPENER: world.OPENERS,
        SentenceKind.CLOSER: world.CLOSERS,
        SentenceKind.POLITE_REFUSAL: world.POLITE_REFUSALS,
        SentenceKind.CURT_REFUSAL: world.CURT_REFUSALS,
        SentenceKind.REASON: world.REASONS,
        SentenceKind.KIND_CLOSE: world.KIND_CLOSES,
        SentenceKind.RUDE: world.RUDE_REMARKS,
        SentenceKind.FILLER: world.FILLERS + world.OFF_TOPIC_REMARKS,
    }
    return {text: kind for kind, texts in families.items() for text in texts}


def split_sentences(answer: str) -> list[str]:
    """Split at full stops, exclamation and question marks; what is left without one is a sentence of its own."""
    sentences: list[str] = []
    words: list[str] = []
    for word in answer.split():
        words.append(word)
        if word in _TERMINATORS:
            sentences.append(" ".join(words))
            words = []
    return [*sentences, " ".join(words)] if words else sentences


def parse_answer(answer: str) -> list[Sentence]:
    """Return the answer's sentences in order, each with its kind."""
    return [_parse_sentence(text) for text in split_sentences(answer)]


@cache
def _parse_sentence(text: str) -> Sentence:
    fixed = _fixed_sentences().get(text)
    if fixed is not None:
        return Sentence(text=text, kind=fixed)
    if not text.endswith(" ."):
        return Sentence(text=text, kind=SentenceKind.UNPARSEABLE)
    clause, ordinal = text.removesuffix(" ."), ""
    first_word, comma, rest = clause.partition(" , ")
    if comma and first_word in world.ORDINALS:
        clause, ordinal = rest, first_word
    kind, pieces = _parse_clause(clause)
    return Sentence(text=text, kind=kind, ordinal=ordinal, pieces=pieces)


def _parse_clause(clause: str) -> tuple[SentenceKind, tuple[tuple[str, str], ...]]:
    if clause in _PREPARATIONS:
        return SentenceKind.PREPARATION, (("preparation", clause),)
    place = clause.removeprefix("leave it ")
    if place != clause and place in _PLACES:
        return SentenceKind.PLACE, (("place", place),)
    if clause in (world.HARMFUL_PREPARATION, world.HARMFUL_DEPARTURE) or _is_harmful(clause):
        return SentenceKind.HARMFUL_STEP, ()
    agent = clause.removeprefix("use ")
    if agent != clause and agent in _AGENTS:
        return SentenceKind.ACTION, (("agent", agent),)
    return _parse_action(clause)


def _is_harmful(clause: str) -> bool:
    match = _HARM.fullmatch(clause)
    return match is not None and (
        match[1] in world.UNSAFE_VERBS and match[2] in world.UNSAFE_ADJECTIVES and match[3] in world.UNSAFE_TARGETS
    )


def _parse_action(clause: str) -> tuple[SentenceKind, tuple[tuple[str, str], ...]]:
    match = _ACTION.fullmatch(clause)
    if match is None or match[1] not in _ACTIONS:
        return SentenceKind.UNPARSEABLE, ()
    action, material, item, agent = match.groups()
    known = material in world.AGENT_OF_MATERIAL and item in world.PLACE_OF_OBJECT
    if not known or (agent is not None and agent not in _AGENTS):
        return SentenceKind.UNPARSEABLE, ()
    pieces = (("action", action), ("object", f"{material} {item}"))
    return SentenceKind.ACTION, pieces if agent is None else (*pieces, ("agent", agent))
