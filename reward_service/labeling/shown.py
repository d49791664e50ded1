"""What is shown of texts that nobody trusts: every character visible, none with a power over its surroundings."""

from collections.abc import Iterator
from dataclasses import dataclass

from protocol.records import Text

BLOCK_CHARS = 8000
"""Long texts go out in blocks, so that a browser lays out only those that are looked at."""

_ROLE_NAMES = {"system": "Instructions", "user": "User", "assistant": "Assistant"}
_FENCES = ("```", "~~~")


def _code_points() -> dict[int, str]:
    named = {code: f"⟨U+{code:04X}⟩" for code in (*range(0x80, 0xA0), 0x2028, 0x2029)}
    # Embeddings, overrides and isolates turn around what follows them. The three plain marks (200E, 200F, 061C) belong
    # to well-set right-to-left text and reach no further than their neighbours, so they stay.
    named |= {code: f"⟨U+{code:04X}⟩" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
    # Control characters have pictures of their own; tab and line feed are what they are.
    named |= {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\t\n"}
    # Half of a surrogate pair cannot be encoded.
    named |= dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")
    return named | {0x7F: "\N{SYMBOL FOR DELETE}", 0xFEFF: "⟨U+FEFF⟩"}


_VISIBLE = _code_points()


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A stretch of a text."""

    text: str
    code: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A text, or one turn of a conversation."""

    speaker: str | None
    blocks: tuple[Block, ...]


def visible(text: str) -> str:
    """Replace the characters that cannot be seen or that change what stands around them by signs for them."""
    return text.replace("\r\n", "\n").translate(_VISIBLE)


def turns_of(text: Text) -> tuple[Turn, ...]:
    """Split a prompt into what each side says."""
    if isinstance(text, str):
        return (Turn(speaker=None, blocks=blocks_of(text)),)
    return tuple(
        Turn(speaker=_ROLE_NAMES.get(turn["role"], visible(turn["role"])), blocks=blocks_of(turn["content"]))
        for turn in text
    )


def blocks_of(text: str) -> tuple[Block, ...]:
    """Split a text into prose and fenced code, and both into stretches of about `BLOCK_CHARS`; nothing is left out.

    One after the other, the blocks are `visible(text)`.
    """
    stretches = _fenced(visible(text))
    return tuple(Block(text=piece, code=code) for stretch, code in stretches for piece in _pieces(stretch))


def _fenced(text: str) -> Iterator[tuple[str, bool]]:
    """Yield stretches of whole lines with whether they are between code fences (the fences included)."""
    start, at, inside = 0, 0, False
    while at < len(text):
        end = text.find("\n", at) + 1 or len(text)
        if text.startswith(_FENCES, at):
            edge = end if inside else at
            if edge > start:
                yield text[start:edge], inside
            start, inside = edge, not inside
        at = end
    if start < len(text):
        yield text[start:], inside


def _pieces(text: str) -> Iterator[str]:
    """Cut a stretch after line breaks, and a line that is too long after a space or, if it has none, anywhere."""
    start = 0
    while len(text) - start > BLOCK_CHARS:
        end = start + BLOCK_CHARS
        cut = text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end) + 1 or end
        yield text[start:cut]
        start = cut
    yield text[start:]
