"""A report's sections on who judged what: rounds, ladder, reward models and labels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.report_charts import Axis, IntervalRow, Point, Series, interval_chart, xy_chart
from cluster.report_parts import (
    Cell,
    Figure,
    Legend,
    Section,
    Table,
    interval,
    listed,
    number,
    percent,
    plural,
    signed,
)
from cluster.report_record import Record, RoundFiles, Standing
from reward_service.ladder_records import Ladder, Pair

_HELDOUT_SUFFIX = "_heldout"
_MAX_PLOTS = 8


def rounds_section(record: Record) -> Section:
    """Show what each round did and where it ended."""
    title, anchor = "Rounds", "rounds"
    done = [files for files in record.rounds if files.report is not None]
    if not done:
        return Section(anchor=anchor, title=title, prose=("The first row appears when the first round has ended.",))
    columns = ("round", "ended with", "iterations", "reward model", "score", "gold", "KL (nats)", "tokens")
    table = Table(
        caption="What each round did; score is that of its first and last iteration, gold, KL and tokens are those of "
        "its policy on the held-out prompts",
        columns=(*columns, "win rate against SFT", "best after it"),
        rows=tuple(_round_row(files) for files in done),
    )
    left = len(record.rounds) - len(done)
    prose = (f"{plural(left, 'round')} still to come.",) if left else ()
    return Section(anchor=anchor, title=title, prose=prose, tables=(table,))


def ladder_section(record: Record) -> Section:
    """Show ratings with intervals, the win matrix, and what the reward model promised."""
    title, anchor = "The ladder", "ladder"
    if record.standing is None:
        prose = "The ladder appears when a round's policy has been compared with the supervised one."
        return Section(anchor=anchor, title=title, prose=(prose,))
    found = record.standing
    ladder = found.ladder
    sure = percent(ladder.confidence)
    prose = [
        f"Elo over {ladder.anchor} (the supervised policy), fitted to {plural(ladder.num_comparisons, 'comparison')} "
        f"on {plural(ladder.num_prompts, 'prompt')}, judged by {_judges(found)}. Intervals cover {sure} and are drawn "
        "over prompts; 70 Elo are a win rate of 60%, 191 one of 75%."
    ]
    if ladder.separable:
        prose.append(
            "Some versions won all their comparisons with others, so their ratings are held finite by pseudo-wins: "
            "read them as lower bounds."
        )
    if ladder.length_controlled is not None:
        control = ladder.length_controlled
        typical = number(control.typical_difference, 1)
        prose.append(
            f"A response that is longer by the typical difference of {typical} tokens gains "
            f"{signed(control.length_elo, 0)} Elo for that alone ({interval(control.length_elo_ci, _elo)}); "
            "length-controlled ratings take this out."
        )
    tables = [_ratings_table(found), _win_matrix(ladder)]
    if found.drift:
        tables.append(_drift_table(found))
    alarms = tuple(
        f"The reward model overrates {drift.version}: it predicts {_elo(drift.predicted_elo)} Elo over {drift.over}, "
        f"measured are {_elo(drift.measured_elo)} ({interval(drift.ci, _elo)})."
        for drift in found.drift
        if drift.alarm
    )
    return Section(
        anchor=anchor,
        title=title,
        prose=tuple(prose),
        alarms=alarms,
        figures=(_ladder_figure(found),),
        tables=tuple(tables),
    )


def reward_models_section(record: Record) -> Section | None:
    """Show calibration, accuracy by source, and what the gate decided; None for a run that trains none."""
    if not record.config.trains_reward_model:
        return None
    title, anchor = "Reward models", "reward-models"
    if not record.reward_models:
        return Section(anchor=anchor, title=title, prose=("They appear here as soon as the first one is trained.",))
    newest = list(record.reward_models)[-_MAX_PLOTS:]
    figures = tuple(_reliability_figure(name, record.reward_models[name]["heldout"]) for name in newest)
    tables = [_models_table(record.reward_models), _sources_table(record.reward_models)]
    decided = [files for files in record.rounds if files.refresh is not None]
    if decided:
        tables.append(_gate_table(record, decided))
    calibrated = [files for files in record.rounds if files.calibrations]
    if calibrated:
        tables.append(_units_table(calibrated))
    alarms = tuple(
        f"Round {files.number}: {files.refresh['why']}."
        for files in decided
        if files.refresh is not None and "stays" in str(files.refresh.get("why", ""))
    )
    return Section(
        anchor=anchor, title=title, prose=(_MODELS_PROSE,), alarms=alarms, figures=figures, tables=tuple(tables)
    )


def model_title(name: str) -> str:
    """Say what a reward model's directory holds."""
    held_out = name.endswith(_HELDOUT_SUFFIX)
    return f"{name.removesuffix(_HELDOUT_SUFFIX)} (held-out)" if held_out else name


def _round_row(files: RoundFiles) -> tuple[str | Cell, ...]:
    report: Mapping[str, Any] = files.report or {}
    after: Mapping[str, Any] = (files.evaluation or {}).get("after", {})
    reward = report.get("reward_version")
    rate = Cell(text="–")
    if "win_rate" in after:
        rate = Cell(text=percent(after["win_rate"]), note=interval(after["win_rate_ci95"], percent))
    return (
        Cell(text=f"round {files.number}", note="stopped by a guard" if report.get("alarm") else ""),
        f"v{report['policy_version']:03d}",
        f"{report['iterations']}",
        "–" if reward is None else f"v{reward:03d}",
        f"{signed(report['score_start'])} → {signed(report['score_end'])}",
        signed(after.get("gold_mean")),
        number(after.get("kl_k1_per_sequence")),
        number(after.get("response_tokens_mean"), 1),
        rate,
        f"v{report['best_version']:03d}",
    )


def _judges(found: Standing) -> str:
    judges = found.ladder.judges or {found.judge: found.ladder.num_comparisons}
    return listed([f"{_JUDGES.get(name, name or found.judge)} ({count:,})" for name, count in judges.items()])


def _elo(value: float) -> str:
    return signed(value, 0)


def _ladder_figure(found: Standing) -> Figure:
    ladder, control = found.ladder, found.ladder.length_controlled
    controlled = {} if control is None else {r.version: (r.elo, *r.ci_sandwich) for r in control.ratings}
    rows = [
        IntervalRow(
            label=f"{rating.version}{' ★' if rating.version == found.best else ''}",
            value=rating.elo,
            low=rating.ci[0],
            high=rating.ci[1],
            style=1 if rating.version != ladder.anchor else 0,
            note=f"{rating.version}: {_elo(rating.elo)} Elo, {interval(rating.ci, _elo)}",
            other=None if rating.version == ladder.anchor else controlled.get(rating.version),
        )
        for rating in ladder.ratings
    ]
    ends = [value for row in rows for value in (row.low, row.high, *(row.other or ()))]
    said = ". ".join(row.note for row in rows)
    legend = [Legend(name="rating", style=1, mark=True)]
    if controlled:
        legend.append(Legend(name="length-controlled", style=0, mark=True))
    return Figure(
        title=f"Ratings with {percent(ladder.confidence)} intervals",
        svg=interval_chart(rows, x=Axis.over(ends, "Elo"), alternative=f"Ratings, best first. {said}."),
        legend=tuple(legend),
        note="★ the best so far: what the run would keep.",
        wide=True,
    )


def _ratings_table(found: Standing) -> Table:
    control = found.ladder.length_controlled
    controlled = {} if control is None else {rating.version: rating for rating in control.ratings}
    rows: list[tuple[str | Cell, ...]] = []
    for rating in found.ladder.ratings:
        row: list[str | Cell] = [
            f"{rating.version}{' ★' if rating.version == found.best else ''}",
            _elo(rating.elo),
            interval(rating.ci, _elo) if rating.version != found.ladder.anchor else "anchor",
            interval(rating.ci_sandwich, _elo) if rating.version != found.ladder.anchor else "anchor",
        ]
        if controlled:
            own = controlled.get(rating.version)
            row.append("–" if own is None else Cell(text=_elo(own.elo), note=interval(own.ci_sandwich, _elo)))
        rows.append((*row, f"{rating.wins}", f"{rating.ties}", f"{rating.losses}"))
    middle = ("length-controlled",) if controlled else ()
    columns = ("version", "Elo", "by bootstrap", "cluster-robust", *middle, "wins", "ties", "losses")
    return Table(caption="Ratings", columns=columns, rows=tuple(rows))


def _win_matrix(ladder: Ladder) -> Table:
    order = [rating.version for rating in ladder.ratings]
    pairs: dict[tuple[str, str], Pair] = {(pair.version, pair.over): pair for pair in ladder.pairs}

    def cell(row: str, column: str) -> str | Cell:
        straight, turned = pairs.get((row, column)), pairs.get((column, row))
        pair = straight or turned
        if pair is None or pair.win_rate is None or pair.win_rate_ci is None:
            return Cell(text="·" if row == column else "–")
        low, high = pair.win_rate_ci
        rate = pair.win_rate if straight else 1 - pair.win_rate
        bounds = (low, high) if straight else (1 - high, 1 - low)
        note = f"{interval(bounds, percent)}, n = {pair.num_comparisons}"
        return Cell(text=percent(rate), note=note, shade=round(10 * rate))

    return Table(
        caption="Win matrix: how often the row's version beats the column's, ties half",
        columns=("", *order),
        rows=tuple((row, *(cell(row, column) for column in order)) for row in order),
    )


def _drift_table(found: Standing) -> Table:
    rows: list[tuple[str | Cell, ...]] = [
        (
            f"{drift.version} over {drift.over}",
            _elo(drift.predicted_elo),
            _elo(drift.measured_elo),
            interval(drift.ci, _elo),
            "overrated" if drift.alarm else "in line",
        )
        for drift in found.drift
    ]
    columns = ("lead", "predicted by the reward model", "measured", "interval", "verdict")
    return Table(caption="What the reward model's scores promise, in Elo", columns=columns, rows=tuple(rows))


def _reliability_figure(name: str, heldout: Mapping[str, Any]) -> Figure:
    """Draw observed against predicted accuracy; on the diagonal a model knows how sure it may be."""
    points: list[Point] = []
    for bin_ in heldout.get("calibration", ()):
        observed, num = bin_["observed_accuracy"], int(bin_["num_pairs"])
        low, high = wilson(observed, num)
        predicted = bin_["predicted_accuracy"]
        label = f"predicted {percent(predicted)}, observed {percent(observed)} of {plural(num, 'pair')}"
        points.append(Point(x=predicted, y=observed, label=label, low=low, high=high))
    lowest = min((point.low for point in points if point.low is not None), default=0.5)
    x = Axis.over([0.5, 1.0], "predicted accuracy", include=(0.5, 1.0))
    y = Axis.over([1.0, math.floor(lowest * 10) / 10], "observed accuracy", include=(1.0,), pad=0.0)
    diagonal = Series(
        name="calibrated", style=0, dashed=True, runs=((Point(x=0.5, y=max(0.5, y.low)), Point(x=1.0, y=1.0)),)
    )
    series = Series(name=name, style=1, marks=True, line=False, runs=(tuple(points),))
    said = "; ".join(point.label for point in points)
    return Figure(
        title=f"{model_title(name)}: calibration",
        svg=xy_chart([diagonal, series], x=x, y=y, alternative=f"Reliability of reward model {name}: {said}."),
        note=f"Expected calibration error {percent(heldout.get('ece'), 1)} on "
        f"{plural(int(heldout.get('num_pairs', 0)), 'held-out pair')}.",
    )


def wilson(share: float, num: int, z: float = 1.959964) -> tuple[float, float]:
    """Compute Wilson's 95% interval of a share: (p + z2/2n -+ z sqrt(p (1 - p)/n + z2/4n2)) / (1 + z2/n)."""
    middle = share + z * z / (2 * num)
    half = z * math.sqrt(share * (1 - share) / num + z * z / (4 * num * num))
    return max(0.0, (middle - half) / (1 + z * z / num)), min(1.0, (middle + half) / (1 + z * z / num))


def _models_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    rows: list[tuple[str | Cell, ...]] = []
    for name, report in models.items():
        heldout = report["heldout"]
        low, high = wilson(heldout["accuracy"], int(heldout["num_pairs"]))
        rows.append(
            (
                model_title(name),
                f"{report.get('round', '–')}",
                f"{report.get('num_train_pairs', 0):,}",
                f"{heldout['num_pairs']:,}",
                Cell(text=percent(heldout["accuracy"], 1), note=interval((low, high), lambda v: percent(v, 1))),
                number(heldout.get("nll_nats"), 3),
                percent(heldout.get("ece"), 1),
                percent(heldout.get("accuracy_both_high"), 1),
                number(heldout.get("length_correlation")),
            )
        )
    columns = ("reward model", "round", "training pairs", "held-out pairs", "accuracy", "NLL (nats)", "ECE")
    return Table(
        caption="On pairs that the model has not seen; “both good” are pairs whose two scores lie above the median",
        columns=(*columns, "accuracy, both good", "correlation with length"),
        rows=tuple(rows),
    )


def _sources_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    rows: list[tuple[str | Cell, ...]] = []
    for name, report in models.items():
        trained_on: Mapping[str, Any] = report.get("sources", {})
        judged: Mapping[str, Any] = report.get("heldout_by_source", {})
        for source in dict.fromkeys((*trained_on, *judged)):
            own, held = trained_on.get(source, {}), judged.get(source, {})
            rows.append(
                (
                    model_title(name),
                    source,
                    number(own.get("weight"), 2),
                    f"{own.get('num_train_pairs', 0):,}",
                    f"{held.get('num_pairs', 0):,}",
                    percent(held.get("accuracy"), 1),
                    number(held.get("nll_nats"), 3),
                )
            )
    columns = ("reward model", "source", "weight", "training pairs", "held-out pairs", "accuracy", "NLL (nats)")
    return Table(
        caption="By source of the comparisons", columns=columns, rows=tuple(rows), text_columns=frozenset({0, 1})
    )


def _gate_table(record: Record, decided: Sequence[RoundFiles]) -> Table:
    rows: list[tuple[str | Cell, ...]] = []
    for files in decided:
        refresh: Mapping[str, Any] = files.refresh or {}
        gate: Mapping[str, Any] | None = record.reward_models.get(f"v{files.number - 1:03d}", {}).get("gate")
        figures: tuple[str | Cell, ...] = ("–", "–")
        if gate is not None and "gain" in gate:  # else it could not tell, and the decision says why
            bounds = (gate["ci_low"], gate["ci_high"])
            unit = " nats" if gate.get("metric") == "nll" else ""
            figures = (
                Cell(text=f"{signed(gate['gain'], 3)}{unit}", note=interval(bounds, lambda v: signed(v, 3))),
                f"{percent(gate['old']['accuracy'], 1)} → {percent(gate['new']['accuracy'], 1)}",
            )
        why = str(refresh.get("why", "")).replace("->", "→")
        rows.append((f"round {files.number}", f"v{refresh['reward_version']:03d}", *figures, why))
    columns = ("round", "scores with", "gain over the old one", "accuracy, old → new", "decision")
    return Table(
        caption="Gate: a new reward model scores only if all of the interval of its gain on held-out pairs is above 0",
        columns=columns,
        rows=tuple(rows),
        text_columns=frozenset({0, 4}),
    )


def _units_table(calibrated: Sequence[RoundFiles]) -> Table:
    rows: list[tuple[str | Cell, ...]] = [
        (
            f"round {files.number}: {name}",
            number(found.get("gain"), 4),
            number(found.get("bias"), 4),
            f"{found.get('num_responses', '–')}",
        )
        for files in calibrated
        for name, found in (files.calibrations or {}).items()
    ]
    return Table(
        caption="Zero and unit of each reward, fixed on the supervised policy's samples: score = gain · raw + bias",
        columns=("reward", "gain", "bias", "responses"),
        rows=tuple(rows),
        fold=True,
    )


_JUDGES = {
    "person": "people",
    "simulated": "simulated labelers",
    "reward_model": "a reward model",
    "judge": "a judge model",
    "gold": "the gold score",
    "score": "the optimised score",
    "identical": "nobody, because both said the same: ties",
}
_MODELS_PROSE = (
    "How well each reward model knows the preferences of held-out prompts. A mark below the dashed line is a model "
    "that is too sure of itself, one above it a model that could be surer; bars are 95% intervals."
)
