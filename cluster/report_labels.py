"""A report's section on the labels: how many, how sure, and how far those who gave them agree."""

from collections import Counter
from collections.abc import Sequence

from cluster.report_parts import Cell, Section, Table, duration, interval, number, percent, plural
from cluster.report_record import Record
from reward_service.preferences.agreement import AgreementReport, agreement_report
from reward_service.preferences.labeling_report import LabelingReport, summarise_labels
from reward_service.preferences.records import Label

_PURPOSES = {"training": "for the reward model", "evaluation": "for the ladder", "check": "attention checks"}
_KINDS = {
    "person": "people",
    "simulated": "simulated labelers",
    "reward_model": "a reward model",
    "judge": "a judge model",
    "imported": "imported",
}


def labels_section(record: Record) -> Section:
    """Show label counts, ties, position bias and agreement."""
    title, anchor = "Labels", "labels"
    if not record.tasks:
        why = (
            "Counts and agreement appear here when a round has collected comparisons."
            if any(record.config.rounds.of(files.number).collect.comparisons for files in record.rounds)
            else "This run collects no comparisons: its preferences come from data."
        )
        return Section(anchor=anchor, title=title, prose=(why,))
    tables = [_counts_table(record)]
    labels = [label for entry in record.labeled for label in entry.labels]
    prose = [f"{plural(len(record.tasks), 'task')}, {plural(len(labels), 'label')} that stand."]
    if labels:
        kinds: dict[str, list[Label]] = {}
        for label in labels:
            kinds.setdefault(label.labeler_kind, []).append(label)
        tables.append(_kinds_table([summarise_labels(own) for own in kinds.values()]))
        agreement = agreement_report(record.labeled)
        prose.append(_agreement_sentence(agreement))
        tables.append(_labelers_table(agreement))
        if agreement.pairs:
            tables.append(_pairs_table(agreement))
    if record.standing is not None and record.standing.ladder.position_bias is not None:
        bias = record.standing.ladder.position_bias
        prose.append(
            f"In the ladder's comparisons the response shown first won {percent(bias.share, 1)} of the time "
            f"({interval(bias.ci, lambda value: percent(value, 1))}); fair is 50%."
        )
    return Section(anchor=anchor, title=title, prose=tuple(prose), tables=tuple(tables))


def _counts_table(record: Record) -> Table:
    tasks = Counter((task.round, task.purpose) for task in record.tasks)
    verdicts = Counter(
        (entry.task.round, entry.task.purpose, label.outcome.verdict)
        for entry in record.labeled
        for label in entry.labels
    )
    rows: list[tuple[str | Cell, ...]] = []
    for (number_, purpose), count in sorted(tasks.items()):
        found = {verdict: verdicts[number_, purpose, verdict] for verdict in _VERDICTS}
        judged = sum(found[verdict] for verdict in ("preference", "tie", "both_bad"))
        rows.append(
            (
                f"round {number_}, {_PURPOSES[purpose]}",
                f"{count:,}",
                *(f"{found[verdict]:,}" for verdict in _VERDICTS),
                percent((found["tie"] + found["both_bad"]) / judged, 1) if judged else "–",
            )
        )
    columns = ("tasks of", "tasks", "preferences", "ties", "both bad", "skips", "invalid", "undecided")
    return Table(caption="Tasks and the labels that stand", columns=columns, rows=tuple(rows))


_VERDICTS = ("preference", "tie", "both_bad", "skip", "invalid")


def _kinds_table(reports: Sequence[LabelingReport]) -> Table:
    rows: list[tuple[str | Cell, ...]] = []
    for report in reports:
        reasons = "; ".join(f"{reason} ({count})" for reason, count in list(report.invalid_reasons.items())[:3])
        bias = "–" if report.position_bias is None else number(report.position_bias, 3)
        flips = "–" if report.flip_rate is None else percent(report.flip_rate, 1)
        invalid = Cell(text=percent(report.invalid_fraction, 1), note=reasons)
        rows.append((_KINDS[report.kind], f"{report.labels:,}", f"{report.comparisons:,}", bias, flips, invalid))
    columns = ("labels by", "labels", "pairs", "position bias", "flips", "invalid")
    return Table(
        caption="By kind of labeler. Position bias: −1 always the second, 0 fair, 1 always the first. Flips: answers "
        "that change when the order is swapped",
        columns=columns,
        rows=tuple(rows),
    )


def _agreement_sentence(report: AgreementReport) -> str:
    if report.percent is None:
        return "No comparison was judged twice, so there is no agreement between labelers to report."
    alpha = "not defined" if report.alpha_ordinal is None else number(report.alpha_ordinal)
    return (
        f"On {plural(report.num_shared, 'pair')} with two or more judgements, labelers agree {percent(report.percent)} "
        f"of the time; Krippendorff's alpha (ordinal) is {alpha}, where 0 is chance and 1 is perfect."
    )


def _labelers_table(report: AgreementReport) -> Table:
    rows: list[tuple[str | Cell, ...]] = [
        (
            Cell(text=labeler.labeler_id, note=_KINDS[labeler.labeler_kind]),
            f"{labeler.num_judgements:,}",
            f"{labeler.num_skips:,}",
            "–" if labeler.median_s is None else duration(labeler.median_s),
            Cell(
                text=percent(labeler.consensus), note=f"of {labeler.num_consensus:,}" if labeler.num_consensus else ""
            ),
            f"{labeler.checks_passed} of {labeler.num_checks}" if labeler.num_checks else "–",
        )
        for labeler in report.labelers
    ]
    columns = ("labeler", "judgements", "skips", "median time", "with the consensus", "attention checks")
    return Table(caption="Each labeler", columns=columns, rows=tuple(rows), fold=len(rows) > 12)


def _pairs_table(report: AgreementReport) -> Table:
    rows: list[tuple[str | Cell, ...]] = [
        (f"{pair.first} and {pair.second}", f"{pair.num_units:,}", percent(pair.percent), number(pair.kappa))
        for pair in report.pairs
    ]
    columns = ("labelers", "shared pairs", "agreement", "Cohen's kappa")
    return Table(caption="Each two labelers", columns=columns, rows=tuple(rows), fold=len(rows) > 6)
