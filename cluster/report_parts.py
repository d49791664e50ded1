"""What a report is made of: sections of prose, figures and tables, and how numbers are written in them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from markupsafe import Markup

from protocol.records import Text
from reward_service.labeling.shown import visible

_T = TypeVar("_T")
NUM_STYLES = 6
"""Colours (and marks) of the page's style sheet: s1 to s6; s0 is neutral."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A table's cell with something small under it, or a shade."""

    text: str
    note: str = ""
    shade: int | None = None
    """From 0 (a share of 0) to 10 (a share of 1)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table; the first cell of a row is its header."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    text_columns: frozenset[int] = frozenset({0})
    """Columns that hold words; all others are numbers and stand to the right."""
    fold: bool = False
    """Shown when somebody asks for it."""
    printed: bool = True
    """Whether a folded table is unfolded on paper."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Legend:
    """One entry of a figure's legend."""

    name: str
    style: int
    dashed: bool = False
    mark: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A chart with what stands around it."""

    title: str
    svg: Markup
    note: str = ""
    legend: tuple[Legend, ...] = ()
    wide: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One side's words in a prompt."""

    speaker: str | None
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What one policy answered."""

    policy: str
    text: str
    verdict: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A prompt with the answers of several policies, side by side."""

    prompt: tuple[Turn, ...]
    responses: tuple[Response, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """An artefact and what was made from it."""

    name: str
    kind: str
    figures: str
    made_with: str
    is_best: bool
    children: tuple["Node", ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Folded:
    """Text for those who want to see it all."""

    title: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of the report; what has nothing to show is left out by the template."""

    anchor: str
    title: str
    prose: tuple[str, ...] = ()
    alarms: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    tree: tuple[Node, ...] = ()
    folded: tuple[Folded, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A headline figure."""

    name: str
    value: str
    note: str


def number(value: float | None, digits: int = 2) -> str:
    """Write a number with a real minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return _minus(f"{value:,.{digits}f}")


def signed(value: float | None, digits: int = 2) -> str:
    """Write a number with its sign."""
    return "–" if value is None or not math.isfinite(value) else _minus(f"{value:+,.{digits}f}")


def short(value: float) -> str:
    """Write a number with four significant digits at most."""
    return _minus(f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}")


def percent(share: float | None, digits: int = 0) -> str:
    """Write a share from 0 to 1."""
    return "–" if share is None or not math.isfinite(share) else _minus(f"{100 * share:.{digits}f}%")


def interval(bounds: Sequence[float], write: Callable[[float], str]) -> str:
    """Write an interval."""
    return f"{write(bounds[0])} to {write(bounds[1])}"


def duration(seconds: float) -> str:
    """Write a time in its two largest units."""
    if seconds < 90:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{seconds / 60:.0f} min"
    return f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, one: str, many: str | None = None) -> str:
    """Write a count with its noun."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def listed(items: Sequence[str]) -> str:
    """Put words into a row: a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "none"


def clipped(text: str, limit: int) -> str:
    """Make a text from anywhere safe to read, and say what was left out of a very long one."""
    shown = visible(text[:limit])
    left_out = len(text) - limit
    return shown if left_out <= 0 else f"{shown}\n… ({left_out:,} more characters)"


def turns(prompt: Text, limit: int) -> tuple[Turn, ...]:
    """Split a prompt into what each side says."""
    if isinstance(prompt, str):
        return (Turn(speaker=None, text=clipped(prompt, limit)),)
    return tuple(Turn(speaker=visible(turn["role"]), text=clipped(turn["content"], limit)) for turn in prompt)


def spread(items: Sequence[_T], limit: int) -> list[_T]:
    """Choose some items evenly, the first and the last among them."""
    if len(items) <= limit:
        return list(items)
    return [items[round(place * (len(items) - 1) / (limit - 1))] for place in range(limit)]


def style_of(place: int) -> int:
    """Return the style of a series by its place."""
    return 1 + place % NUM_STYLES


def _minus(text: str) -> str:
    # The sign of a zero says nothing.
    zero = not any(digit in text for digit in "123456789")
    return text.lstrip("+-") if zero else text.replace("-", "\u2212")
