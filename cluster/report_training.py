"""A report's sections on the iterations: objective, gold, behaviour, throughput, and every metric."""

import math
from collections.abc import Callable, Sequence
from itertools import groupby

from cluster.report_charts import Axis, Band, Point, Series, describe, stacked_chart, xy_chart
from cluster.report_parts import (
    Cell,
    Figure,
    Legend,
    Section,
    Table,
    duration,
    number,
    percent,
    short,
    spread,
    style_of,
)
from cluster.report_record import Moment, Record
from configs.scoring import HELDOUT
from protocol import metrics as names

_HELDOUT = names.SCORE_PREFIX + HELDOUT
_GOLD = names.GOLD_PREFIX + "gold"
_MAX_TABLE_ROWS = 120
_TITLED_POINTS = 160
"""With more points than this nobody finds one with a pointer, so they carry no titles."""
_STAGES = {"generate": names.TIME_GENERATE, "score": names.TIME_SCORE, "learn": names.TIME_LEARN} | {
    "publish": names.TIME_PUBLISH
}


def objective_section(record: Record) -> Section:
    """Show score, held-out score and KL by iteration."""
    title, anchor = "Reward and KL", "reward"
    if not record.moments:
        return Section(anchor=anchor, title=title, prose=("Curves appear here after the first iteration.",))
    scores = [("score (optimised)", names.OBJECTIVE_SCORE, False)]
    if record.series(_HELDOUT):
        scores.append(("held-out score", _HELDOUT, True))
    figures = [_figure(record, "Score", scores, unit="score", note=_SCORE_NOTE)]
    prose = (_OBJECTIVE_PROSE, *_thinned(record))
    if record.series(names.OBJECTIVE_KL):
        kl = [("KL", names.OBJECTIVE_KL, False)]
        figures.append(_figure(record, "KL from the reference", kl, unit="nats", zero=True))
    else:
        prose += (_OFFLINE_PROSE,)
    if record.series(names.DPO_MARGIN):
        likelihoods = [("better", names.DPO_CHOSEN_RATIO, False), ("worse", names.DPO_REJECTED_RATIO, True)]
        figures.append(_figure(record, "Pairs: log-ratio to the reference", likelihoods, unit="nats", note=_PAIRS_NOTE))
    if record.series(names.HELDOUT_GAP):
        gap = [("score minus held-out score", names.HELDOUT_GAP, False)]
        figures.append(_figure(record, "Over-optimisation", gap, unit="score", note=_GAP_NOTE))
    if record.series(_GOLD):
        gold = sorted({name for moment in record.moments for name in moment.metrics if name.startswith("gold/")})
        gold.sort(key=lambda name: name != _GOLD)
        shown = [(name.removeprefix(names.GOLD_PREFIX), name, name != _GOLD) for name in gold[:4]]
        figures.append(_figure(record, "Gold score", shown, unit="gold", note=_GOLD_NOTE))
    table = _iterations_table(record)
    return Section(anchor=anchor, title=title, prose=prose, figures=tuple(figures), tables=(table,))


def gold_section(record: Record) -> Section | None:
    """Show gold against the square root of the KL, by round; None for a run without a gold score."""
    if record.config.scoring.gold is None and not record.series(_GOLD):
        return None
    title, anchor = "Gold score for the KL that was spent", "gold"
    found = [m for m in record.series(_GOLD) if math.isfinite(m.metrics.get(names.OBJECTIVE_KL, math.nan))]
    if not found:
        return Section(anchor=anchor, title=title, prose=("Gold scores appear here after the first iteration.",))
    series = [
        Series(
            name=f"round {round_}",
            style=style_of(place),
            marks=True,
            runs=(tuple(_gold_point(moment) for moment in group),),
        )
        for place, (round_, group) in enumerate(groupby(found, key=lambda moment: moment.round))
    ]
    points = [point for one in series for point in one.points]
    x = Axis.over([p.x for p in points], "square root of KL (nats a sequence)", include=(0.0,))
    y = Axis.over([p.y for p in points], "gold score")
    figure = Figure(
        title="Gold against the square root of KL",
        svg=xy_chart(series, x=x, y=y, alternative=describe(series, x=x.label, y=y.label)),
        legend=tuple(Legend(name=one.name, style=one.style, mark=True) for one in series),
        note="One mark an iteration, joined in their order. A KL estimate below zero is drawn at zero.",
        wide=True,
    )
    return Section(anchor=anchor, title=title, prose=(_GOLD_PROSE,), figures=(figure,))


def behaviour_section(record: Record) -> Section:
    """Show length, entropy, repetition and cut-off responses by iteration."""
    title, anchor = "How the policy writes", "behaviour"
    shown = (
        ("Response length", names.ROLLOUT_TOKENS_MEAN, "tokens"),
        ("Entropy of the next token", names.POLICY_ENTROPY, "nats a token"),
        ("Repeated 3-grams", names.ROLLOUT_REPEATED, "share"),
        ("Responses cut off at the limit", names.ROLLOUT_TRUNCATED, "share"),
    )
    figures = tuple(
        _figure(record, heading, [(heading.lower(), name, False)], unit=unit, zero=unit == "share")
        for heading, name, unit in shown
        if record.series(name)
    )
    prose = (_BEHAVIOUR_PROSE,) if figures else ("Length, entropy and repetition appear here with the iterations.",)
    return Section(anchor=anchor, title=title, prose=prose, figures=figures)


def throughput_section(record: Record) -> Section:
    """Show where the time of an iteration goes."""
    title, anchor = "Throughput", "throughput"
    timed = record.series(names.TIME_ITERATION)
    if not timed:
        return Section(anchor=anchor, title=title, prose=("Times appear here after the first iteration.",))
    figures = [_stages_figure(record, timed)]
    if record.series(names.ROLLOUT_TOKENS_PER_S):
        speed = [("tokens per second", names.ROLLOUT_TOKENS_PER_S, False)]
        figures.append(_figure(record, "Generation", speed, unit="tokens per second", zero=True))
    memory = sorted({name for moment in timed for name in moment.metrics if "memory" in name})
    if memory:
        shown = [(name.split("/")[-1].replace("_", " "), name, False) for name in memory[:6]]
        unit = "GiB" if all(name.endswith("_bytes") for name in memory) else "memory"
        scale = 2.0**-30 if unit == "GiB" else 1.0
        figures.append(_figure(record, "Memory", shown, unit=unit, zero=True, scale=scale))
    weights = [moment.num_iterations for moment in timed]
    mean = _weighted([moment.metrics[names.TIME_ITERATION] for moment in timed], weights)
    prose = (
        f"{record.num_iterations:,} iterations took {duration(record.seconds)}, {duration(mean)} each on average. "
        "Times are exposed wall time: what overlaps with another stage is not counted twice.",
    )
    return Section(
        anchor=anchor, title=title, prose=prose, figures=tuple(figures), tables=(_stages_table(timed, weights, mean),)
    )


def metrics_section(record: Record) -> Section | None:
    """Show every metric in a row; None before the first iteration."""
    keys = sorted({name for moment in record.moments for name in moment.metrics})
    rows: list[tuple[str | Cell, ...]] = []
    for name in keys:
        values = [moment.metrics[name] for moment in record.series(name)]
        if values and not name.startswith("counter/"):
            rows.append((name, *(short(v) for v in (values[0], values[-1], min(values), max(values)))))
    if not rows:
        return None
    table = Table(
        caption="Every metric of metrics.jsonl",
        columns=("metric", "first", "last", "lowest", "highest"),
        rows=tuple(rows),
        fold=True,
        printed=False,
    )
    return Section(anchor="metrics", title="All metrics", tables=(table,))


def _figure(
    record: Record,
    title: str,
    shown: Sequence[tuple[str, str, bool]],
    *,
    unit: str,
    note: str = "",
    zero: bool = False,
    scale: float = 1.0,
) -> Figure:
    """Draw metrics by iteration.

    Args:
        record: The run.
        title: Of the figure.
        shown: What a metric is called, its name, and whether its line is dashed.
        unit: Of the y axis.
        note: Under the figure.
        zero: Whether the y axis begins at zero.
        scale: What values are multiplied by.
    """
    series = [
        Series(name=label, style=style_of(place), dashed=dashed, runs=_runs(record, name, label, scale))
        for place, (label, name, dashed) in enumerate(shown)
    ]
    x = _x_axis(record)
    y = Axis.over((p.y for one in series for p in one.points), unit, include=(0.0,) if zero else ())
    legend = tuple(Legend(name=one.name, style=one.style, dashed=one.dashed) for one in series)
    return Figure(
        title=title,
        svg=xy_chart(series, x=x, y=y, bands=_bands(record), alternative=describe(series, x="iteration", y=title)),
        legend=legend if len(legend) > 1 else (),
        note=note,
    )


def _runs(record: Record, name: str, label: str, scale: float) -> tuple[tuple[Point, ...], ...]:
    """Return a metric's points, one run a round, because a round may begin where another policy stands."""
    found = record.series(name)
    titled = len(found) <= _TITLED_POINTS

    def point(moment: Moment) -> Point:
        value = scale * moment.metrics[name]
        return Point(x=moment.place, y=value, label=f"{_when(moment)}: {label} {short(value)}" if titled else "")

    return tuple(tuple(map(point, group)) for _, group in groupby(found, key=lambda moment: moment.round))


def _stages_figure(record: Record, timed: Sequence[Moment]) -> Figure:
    bars = spread(timed, 80)
    rows = [
        (
            moment.place,
            f"{_when(moment)}: {duration(moment.metrics[names.TIME_ITERATION])}",
            [moment.metrics.get(name, 0.0) for name in _STAGES.values()],
        )
        for moment in bars
    ]
    y = Axis.over([sum(values) for _, _, values in rows], "seconds", include=(0.0,))
    bands = _bands(record)
    svg = stacked_chart(list(_STAGES), rows, x=_x_axis(record), y=y, bands=bands)
    legend = tuple(Legend(name=name, style=number + 1, mark=True) for number, name in enumerate(_STAGES))
    note = "" if len(bars) == len(timed) else f"{len(bars)} iterations of {record.num_iterations:,}, evenly chosen."
    return Figure(title="Time of an iteration, by stage", svg=svg, legend=legend, note=note)


def _stages_table(timed: Sequence[Moment], weights: Sequence[int], mean: float) -> Table:
    rows: list[tuple[str | Cell, ...]] = []
    for label, name in (*_STAGES.items(), *_overlapping(timed)):
        value = _weighted([moment.metrics.get(name, 0.0) for moment in timed], weights)
        share = percent(value / mean) if name in _STAGES.values() and mean else ""
        rows.append((label, number(value, 3), share))
    return Table(caption="Mean seconds of a stage", columns=("stage", "seconds", "share"), rows=tuple(rows))


def _overlapping(timed: Sequence[Moment]) -> list[tuple[str, str]]:
    found = sorted({name for moment in timed for name in moment.metrics if name.startswith("busy/")})
    return [(f"{name.removeprefix('busy/')} (busy, overlapping)", name) for name in found]


def _iterations_table(record: Record) -> Table:
    columns: list[tuple[str, str, Callable[[float], str]]] = [
        ("score", names.OBJECTIVE_SCORE, lambda v: number(v, 3)),
        ("held-out", _HELDOUT, lambda v: number(v, 3)),
        ("gold", _GOLD, lambda v: number(v, 3)),
        ("KL (nats)", names.OBJECTIVE_KL, lambda v: number(v, 2)),
        ("tokens", names.ROLLOUT_TOKENS_MEAN, lambda v: number(v, 1)),
        ("entropy", names.POLICY_ENTROPY, lambda v: number(v, 3)),
        ("repeated", names.ROLLOUT_REPEATED, lambda v: percent(v, 1)),
        ("seconds", names.TIME_ITERATION, lambda v: number(v, 2)),
    ]
    there = [column for column in columns if record.series(column[1])]
    chosen = spread(record.moments, _MAX_TABLE_ROWS)
    rows = tuple(
        (_when(moment), *(write(moment.metrics.get(name, math.nan)) for _, name, write in there)) for moment in chosen
    )
    caption = "The numbers behind the charts"
    if len(chosen) < len(record.moments):
        caption += f", {len(chosen)} rows evenly chosen"
    return Table(
        caption=caption, columns=("iteration", *(label for label, _, _ in there)), rows=rows, fold=True, printed=False
    )


def _gold_point(moment: Moment) -> Point:
    kl, gold = moment.metrics[names.OBJECTIVE_KL], moment.metrics[_GOLD]
    label = f"{_when(moment)}: gold {short(gold)} at a KL of {short(kl)} nats"
    return Point(x=math.sqrt(max(kl, 0.0)), y=gold, label=label)


def _bands(record: Record) -> list[Band]:
    found: list[Band] = []
    start = 0.5
    for round_, group in groupby(record.moments, key=lambda moment: moment.round):
        stop = start + sum(moment.num_iterations for moment in group)
        found.append(Band(label=f"round {round_}", start=start, stop=stop))
        start = stop
    return found


def _x_axis(record: Record) -> Axis:
    axis = Axis.over([0.5, record.num_iterations + 0.5], "iteration", pad=0.0)
    return Axis(label=axis.label, low=axis.low, high=axis.high, ticks=tuple(t for t in axis.ticks if t == int(t)))


def _thinned(record: Record) -> tuple[str, ...]:
    most = max(moment.num_iterations for moment in record.moments)
    return () if most == 1 else (f"Each point of a chart is the mean of {most} iterations.",)


def _when(moment: Moment) -> str:
    if moment.num_iterations == 1:
        return f"round {moment.round}, iteration {moment.iteration}"
    return f"round {moment.round}, iterations {moment.iteration - moment.num_iterations + 1} to {moment.iteration}"


def _weighted(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


_OBJECTIVE_PROSE = (
    "What was optimised, iteration by iteration. Lines break where a round ends, because the next one may start from "
    "another policy and be scored by another reward model."
)
_OFFLINE_PROSE = (
    "The policy learned from a fixed set of responses. The scores here are those of the set and do not move with the "
    "policy; what the policy gained is in the evaluation."
)
_SCORE_NOTE = (
    "In standard deviations of the supervised policy's scores. The held-out score comes from a reward model that saw "
    "other comparisons and rewards nothing."
)
_GAP_NOTE = (
    "A gap that grows says that the policy pleases the reward model in ways that an independent one does not see."
)
_PAIRS_NOTE = (
    "The distance of the lines is the margin that DPO learns. Where the better responses fall below zero too, the "
    "probability goes to responses that nobody has scored."
)
_GOLD_NOTE = "A trusted score that never reaches training."
_GOLD_PROSE = (
    "The KL is the price of each gain. A curve that turns down says that more optimisation made the policy worse by "
    "the gold score, although the optimised score went on rising."
)
_BEHAVIOUR_PROSE = (
    "Signs of a policy that games its reward: answers that only grow longer, an entropy that collapses, phrases that "
    "repeat."
)
