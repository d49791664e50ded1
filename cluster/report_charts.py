"""Charts as inline SVG, made by small pure functions.

Colours, strokes and fonts come from the page's style sheet by class, so that a chart follows light, dark and print.
Every chart is an image with a text alternative; points carry a title that browsers show under the pointer.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from cluster.report_parts import short
from reward_service.labeling.shown import visible

WIDTH, HEIGHT = 440, 248
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 26, 44
_ROW = 40
_MARKS = {1: "circle", 2: "square", 3: "diamond", 4: "triangle", 5: "circle", 6: "square"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point, perhaps with an interval upwards and downwards."""

    x: float
    y: float
    label: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Points of one kind; a line connects those of one run and breaks between runs."""

    name: str
    style: int
    runs: tuple[tuple[Point, ...], ...]
    dashed: bool = False
    marks: bool = False
    line: bool = True

    @property
    def points(self) -> list[Point]:
        """All points."""
        return [point for run in self.runs for point in run]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """The range of values along one side, and the values that are written there."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]

    @classmethod
    def over(cls, values: Iterable[float], label: str, *, include: Sequence[float] = (), pad: float = 0.06) -> "Axis":
        """Make an axis for some values, with ticks at round numbers."""
        found = [value for value in (*values, *include) if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(found), max(found)
        flat = high - low <= 1e-9 * max(abs(low), abs(high), 1e-6)
        room = (abs(high) * 0.1 or 1.0) if flat else (high - low) * pad
        # Nothing lies on the other side of a bound that was asked for.
        low = low if low in include else low - room
        high = high if high in include and not flat else high + room
        return cls(label=label, low=low, high=high, ticks=round_numbers(low, high))

    def place(self, value: float, start: float, stop: float) -> float:
        """Return where a value lies between two ends."""
        return start + (value - self.low) / (self.high - self.low) * (stop - start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A round along the x axis."""

    label: str
    start: float
    stop: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IntervalRow:
    """A value with its interval, and perhaps another reading of the same."""

    label: str
    value: float
    low: float
    high: float
    style: int = 1
    note: str = ""
    other: tuple[float, float, float] | None = None
    """value, low, high."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramRow:
    """A distribution in equal bins."""

    label: str
    counts: tuple[int, ...]
    middle: float
    """The median."""
    style: int = 1


def round_numbers(low: float, high: float, wanted: int = 5) -> tuple[float, ...]:
    """Choose about so many round numbers (1, 2 or 5 times a power of ten apart) between two values."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.8)
    first = math.ceil(low / step - 1e-9)
    # Whole multiples of the step, so that 0.30000000000000004 is 0.3.
    digits = max(0, 1 - math.floor(math.log10(step)))
    return tuple(round(k * step, digits) for k in range(first, math.floor(high / step + 1e-9) + 1))


def xy_chart(series: Sequence[Series], *, x: Axis, y: Axis, alternative: str, bands: Sequence[Band] = ()) -> Markup:
    """Draw lines or points over two axes, with the rounds behind them."""
    parts = [_bands(bands, x), _grid(x, y)]
    for one in series:
        style = f"s{one.style}"
        if one.line:
            dashed = " dashed" if one.dashed else ""
            parts += [_tag("path", class_=f"line {style}{dashed}", d=_path(run, x, y)) for run in one.runs if run]
        for point in one.points:
            parts.append(_point(point, x, y, style=one.style, marks=one.marks))
    return _image(parts, HEIGHT, alternative)


def stacked_chart(
    names: Sequence[str], rows: Sequence[tuple[float, str, Sequence[float]]], *, x: Axis, y: Axis, bands: Sequence[Band]
) -> Markup:
    """Draw a bar at each x, made of parts.

    Args:
        names: Of the parts, from the bottom up; the first has style 1.
        rows: x, a label, and the parts.
        x: The axis of the bars' places.
        y: The axis of the sums.
        bands: The rounds.
    """
    half = 0.42 * min((b[0] - a[0] for a, b in pairwise(rows)), default=1.0)
    parts = [_bands(bands, x), _grid(x, y)]
    for place, label, values in rows:
        left, right = _x(place - half, x), _x(place + half, x)
        below, bars = 0.0, [_tag("title", label)]
        for number, value in enumerate(values):
            top, bottom = _y(below + value, y), _y(below, y)
            size = {"width": _f(max(right - left, 0.3)), "height": _f(bottom - top)}
            bars.append(_tag("rect", class_=f"fill s{number + 1}", x=_f(left), y=_f(top), **size))
            below += value
        parts.append(_tag("g", *bars))
    totals = [sum(values) for _, _, values in rows]
    means = ", ".join(f"{name} {short(_mean([r[2][i] for r in rows]))}" for i, name in enumerate(names))
    alternative = f"Stacked bars. {y.label}: on average {short(_mean(totals))} in all; {means}."
    return _image(parts, HEIGHT, alternative)


def interval_chart(rows: Sequence[IntervalRow], *, x: Axis, alternative: str) -> Markup:
    """Draw one row for each value, its interval as a bar, and the other reading hollow beneath it."""
    height = 14 + _ROW * len(rows) + _BOTTOM
    floor = height - _BOTTOM
    left = 74
    parts = [_vertical_grid(x, left=left, top=8, floor=floor)]
    if x.low < 0 < x.high:
        zero = _f(x.place(0, left, WIDTH - _RIGHT))
        parts.append(_tag("line", class_="zero", x1=zero, x2=zero, y1=8, y2=floor))
    for number, row in enumerate(rows):
        at = 14 + _ROW * (number + 0.5)

        def place(value: float) -> str:
            return _f(x.place(value, left, WIDTH - _RIGHT))

        style = f"s{row.style}"
        parts.append(_tag("text", row.label, class_="row", x=left - 10, y=_f(at + 4), text_anchor="end"))
        shapes = [_tag("title", row.note or f"{row.label}: {short(row.value)}")]
        if row.low < row.high:
            ends = {"x1": place(row.low), "x2": place(row.high)}
            shapes.append(_tag("line", class_=f"whisker {style}", y1=_f(at), y2=_f(at), **ends))
        shapes.append(_tag("circle", class_=f"mark {style}", cx=place(row.value), cy=_f(at), r=5))
        if row.other is not None:
            value, low, high = row.other
            lower = _f(at + 11)
            shapes.append(_tag("line", class_="whisker thin s0", x1=place(low), x2=place(high), y1=lower, y2=lower))
            shapes.append(_tag("circle", class_="hollow s0", cx=place(value), cy=lower, r=3.5))
        parts.append(_tag("g", *shapes))
    return _image(parts, height, alternative)


def histogram_rows(rows: Sequence[HistogramRow], *, x: Axis, alternative: str) -> Markup:
    """Draw one small histogram under the other on one axis, each with its median."""
    height = 14 + _ROW * len(rows) + _BOTTOM
    floor = height - _BOTTOM
    left = 74
    parts = [_vertical_grid(x, left=left, top=8, floor=floor)]
    tallest = max((max(row.counts) / sum(row.counts) for row in rows), default=1.0)
    width = (WIDTH - _RIGHT - left) / len(rows[0].counts)
    for number, row in enumerate(rows):
        base, style = 14 + _ROW * (number + 1) - 4, f"s{row.style}"
        total = sum(row.counts)
        shapes = [_tag("title", f"{row.label}: median {short(row.middle)} of {total} responses")]
        for bin_, count in enumerate(row.counts):
            if count:
                high = (_ROW - 8) * count / total / tallest
                at = {"x": _f(left + bin_ * width + 0.4), "y": _f(base - high)}
                shapes.append(_tag("rect", class_=f"fill {style}", width=_f(width - 0.8), height=_f(high), **at))
        middle = _f(x.place(row.middle, left, WIDTH - _RIGHT))
        shapes.append(_tag("line", class_="median", x1=middle, x2=middle, y1=_f(base - _ROW + 8), y2=_f(base + 3)))
        shapes.append(_tag("line", class_="base", x1=left, x2=WIDTH - _RIGHT, y1=_f(base), y2=_f(base)))
        shapes.append(_tag("text", row.label, class_="row", x=left - 10, y=_f(base - 8), text_anchor="end"))
        parts.append(_tag("g", *shapes))
    return _image(parts, height, alternative)


def describe(series: Sequence[Series], *, x: str, y: str) -> str:
    """Put a chart into words: each series' first, last, lowest and highest value."""
    sentences = [f"Chart of {y} by {x}."]
    for one in series:
        values = [point.y for point in one.points]
        if values:
            sentences.append(
                f"{one.name}: {short(values[0])} at first, {short(values[-1])} at last, "
                f"lowest {short(min(values))}, highest {short(max(values))}."
            )
    return " ".join(sentences)


def _image(parts: Sequence[Markup], height: float, alternative: str) -> Markup:
    box = f"0 0 {WIDTH} {_f(height)}"
    return _tag("svg", *parts, class_="chart", viewBox=box, role="img", aria_label=alternative)


def _grid(x: Axis, y: Axis) -> Markup:
    parts: list[Markup] = []
    for value in y.ticks:
        at = _f(_y(value, y))
        parts.append(_tag("line", class_="zero" if value == 0 else "grid", x1=_LEFT, x2=WIDTH - _RIGHT, y1=at, y2=at))
        parts.append(_tag("text", short(value), x=_LEFT - 7, y=_f(_y(value, y) + 4), text_anchor="end"))
    floor = HEIGHT - _BOTTOM
    parts.append(_tag("line", class_="base", x1=_LEFT, x2=WIDTH - _RIGHT, y1=floor, y2=floor))
    for value in x.ticks:
        parts.append(_tag("text", short(value), x=_f(_x(value, x)), y=floor + 17, text_anchor="middle"))
    parts.append(_tag("text", x.label, class_="axis", x=WIDTH - _RIGHT, y=HEIGHT - 6, text_anchor="end"))
    parts.append(_tag("text", y.label, class_="axis", x=4, y=12))
    return Markup("").join(parts)


def _vertical_grid(x: Axis, *, left: float, top: float, floor: float) -> Markup:
    parts: list[Markup] = []
    for value in x.ticks:
        at = _f(x.place(value, left, WIDTH - _RIGHT))
        parts.append(_tag("line", class_="grid", x1=at, x2=at, y1=_f(top), y2=_f(floor)))
        parts.append(_tag("text", short(value), x=at, y=_f(floor + 17), text_anchor="middle"))
    parts.append(_tag("text", x.label, class_="axis", x=WIDTH - _RIGHT, y=_f(floor + 38), text_anchor="end"))
    return Markup("").join(parts)


def _bands(bands: Sequence[Band], x: Axis) -> Markup:
    """Shade every other round and name it at its top."""
    parts: list[Markup] = []
    for number, band in enumerate(bands):
        left, right = _x(max(band.start, x.low), x), _x(min(band.stop, x.high), x)
        if number % 2:
            size = {"width": _f(right - left), "height": HEIGHT - _BOTTOM - _TOP + 8}
            parts.append(_tag("rect", class_="band", x=_f(left), y=_TOP - 8, **size))
        if number:
            parts.append(_tag("line", class_="edge", x1=_f(left), x2=_f(left), y1=_TOP - 8, y2=HEIGHT - _BOTTOM))
        if right - left > 46:
            parts.append(_tag("text", band.label, class_="band-label", x=_f(right - 4), y=_TOP + 5, text_anchor="end"))
    return Markup("").join(parts)


def _point(point: Point, x: Axis, y: Axis, *, style: int, marks: bool) -> Markup:
    at, up = _x(point.x, x), _y(point.y, y)
    shapes = [_tag("title", point.label)] if point.label else []
    if point.low is not None and point.high is not None:
        ends = {"y1": _f(_y(point.low, y)), "y2": _f(_y(point.high, y))}
        shapes.append(_tag("line", class_=f"whisker thin s{style}", x1=_f(at), x2=_f(at), **ends))
    if marks:
        shapes.append(_mark(at, up, style))
    elif point.label:
        shapes.append(_tag("circle", class_="hit", cx=_f(at), cy=_f(up), r=6))
    return _tag("g", *shapes) if shapes else Markup("")


def _mark(at: float, up: float, style: int) -> Markup:
    """Draw a mark whose shape, not only its colour, says which series it belongs to."""
    shape, name = _MARKS.get(style, "circle"), f"mark s{style}"
    if shape == "circle":
        return _tag("circle", class_=name, cx=_f(at), cy=_f(up), r=3.6)
    corners = {
        "square": ((-3.3, -3.3), (3.3, -3.3), (3.3, 3.3), (-3.3, 3.3)),
        "diamond": ((0, -4.6), (4.6, 0), (0, 4.6), (-4.6, 0)),
        "triangle": ((0, -4.4), (4.2, 3.4), (-4.2, 3.4)),
    }[shape]
    return _tag("polygon", class_=name, points=" ".join(f"{_f(at + dx)},{_f(up + dy)}" for dx, dy in corners))


def _path(run: Sequence[Point], x: Axis, y: Axis) -> str:
    return "M" + "L".join(f"{_f(_x(point.x, x))} {_f(_y(point.y, y))}" for point in run)


def _x(value: float, axis: Axis) -> float:
    return axis.place(value, _LEFT, WIDTH - _RIGHT)


def _y(value: float, axis: Axis) -> float:
    return axis.place(value, HEIGHT - _BOTTOM, _TOP)


def _f(value: float) -> str:
    """Write a coordinate, no finer than a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _tag(name: str, *children: str | Markup, **attributes: object) -> Markup:
    """Write an element. Text and attributes are escaped; only what this function made is taken as it is."""
    written = "".join(
        f' {key if key == "viewBox" else key.rstrip("_").replace("_", "-")}="{escape(visible(str(value)))}"'
        for key, value in attributes.items()
    )
    inner = "".join(child if isinstance(child, Markup) else escape(visible(child)) for child in children)
    return Markup(f"<{name}{written}>{inner}</{name}>")
