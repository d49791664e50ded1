"""Export and import of preferences, and the rows that a reward model trains on."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow
from pyarrow import parquet

from protocol.datasets import ReadReport
from protocol.errors import UserError
from protocol.files import staged
from reward_service.preferences import inbound, outbound
from reward_service.preferences.consensus import consensus
from reward_service.preferences.native import read_native, write_jsonl, write_parquet
from reward_service.preferences.records import Label, LabeledTask, Purpose, Task
from reward_service.preferences.store import PreferenceStore

_LOG = logging.getLogger(__name__)

Format = Literal["jsonl", "parquet", "trl-preference", "trl-unpaired", "kwise", "helpsteer3", "arena"]
"""`jsonl` and `parquet` are rondo's own and keep everything; the others go into .jsonl or .parquet files, by suffix."""

_OUTBOUND: Mapping[str, outbound.ToRows] = {
    "trl-preference": outbound.preference_rows,
    "trl-unpaired": outbound.unpaired_rows,
    "kwise": outbound.kwise_rows,
    "helpsteer3": outbound.helpsteer_rows,
    "arena": outbound.arena_rows,
}
_UNITS: Mapping[str, str] = {
    "trl-preference": "pair",
    "trl-unpaired": "response",
    "kwise": "ranking",
    "helpsteer3": "pair",
    "arena": "battle",
}
"""What a row is. A record of rondo's own formats is a task or a label."""
_INBOUND: Mapping[str, inbound.Read] = {
    "trl-preference": inbound.read_trl_preferences,
    "trl-unpaired": inbound.read_trl_unpaired,
    "kwise": inbound.read_kwise,
    "helpsteer3": inbound.read_helpsteer,
    "arena": inbound.read_arena,
}


def export(
    source: PreferenceStore | Sequence[LabeledTask],
    path: Path,
    *,
    format: Format,
    purposes: Sequence[Purpose] = ("training",),
) -> outbound.ExportReport:
    """Write preferences to a file, whole or not at all.

    Args:
        source: A store, or labelled tasks. Of a store, rondo's own formats keep every task and label, superseded too.
        path: The file; replaced if it exists.
        format: What to write.
        purposes: For the formats of others: which tasks. Comparisons that measure a policy are left out unless named.

    Returns:
        How many rows were written (records, for rondo's own formats), and what was left out, and why.

    Raises:
        UserError: If there is nothing to write, or the path's suffix does not fit.
    """
    report = outbound.ExportReport(source=str(path), unit=_UNITS.get(format, "record"))
    path.parent.mkdir(parents=True, exist_ok=True)
    if format in ("jsonl", "parquet"):
        tasks, labels = _everything(source)
        report.num_kept, report.num_tasks = len(tasks) + len(labels), len(tasks)
        report.tasks = {task.task_id for task in tasks}
        with staged(path) as staging:
            (write_jsonl if format == "jsonl" else write_parquet)(staging, tasks, labels)
    else:
        labeled = source.labeled() if isinstance(source, PreferenceStore) else source
        report.num_tasks = len(labeled)
        wanted = [entry for entry in labeled if entry.task.purpose in purposes]
        for entry in labeled:
            if entry.task.purpose not in purposes:
                report.leave("task", f"a task for {entry.task.purpose}", entry.task.task_id)
        rows = list(_OUTBOUND[format](wanted, report))
        if not rows:
            raise UserError(f"nothing can be exported as {format}: {report.summary()}", where=str(path))
        with staged(path) as staging:
            _write_rows(staging, rows, suffix=path.suffix)
    return report


def read_import(
    path: Path, *, format: Format, round: int = 0, purpose: Purpose = "training", report: ReadReport | None = None
) -> tuple[list[Task], list[Label]]:
    """Read preferences from a file.

    Args:
        path: A .jsonl, .json or .parquet file.
        format: What it holds.
        round: Of tasks whose row names no round; rondo's own formats keep theirs.
        purpose: What the tasks are for; rondo's own formats keep theirs.
        report: Where labels, and rows that were left out, are counted; without one, the latter are logged in the end.

    Returns:
        Tasks, and labels in an order in which they can be recorded.

    Raises:
        UserError: If the file cannot be read, or holds something else.
    """
    counted = ReadReport(source=str(path)) if report is None else report
    if format in ("jsonl", "parquet"):
        tasks, labels = read_native(path)
        counted.num_kept += len(labels)
        return tasks, labels
    gathering = inbound.Gathering(format=format, round=round, purpose=purpose, report=counted)
    _INBOUND[format](inbound.located(path), gathering)
    if not counted.num_kept:
        raise UserError(
            f"no row of the file can be used: {counted.summary()}",
            where=str(path),
            next_step="look at the rows named here, or name the format that the file has",
        )
    if report is None:
        _log_dropped(counted)
    return gathering.result()


def training_rows(
    labeled: Sequence[LabeledTask], *, source: str, report: ReadReport | None = None
) -> Iterator[dict[str, Any]]:
    """Yield what a reward model trains on, readable by `protocol.datasets.read_preferences`.

    A pair gives {prompt, chosen, rejected, margin, source}, with the mean strength as margin or None where nobody gave
    one; a ranking {prompt, completions, ranks, source}. Several labels of one task give the row of their consensus.
    What is undecided, a tie, both bad, a skip or invalid gives none.

    Args:
        labeled: Tasks with their labels.
        source: Name of these comparisons, the same in every row.
        report: Where rows and what gave none are counted; without one, the latter is logged in the end.
    """
    counted = ReadReport(source=source) if report is None else report
    for entry in labeled:
        task, found = entry.task, consensus(entry)
        reason = found if isinstance(found, str) else outbound.why_useless(task.candidates)
        if isinstance(found, str) or reason is not None:
            counted.drop(str(reason), task.task_id)
            continue
        counted.keep()
        if task.kind == "ranking":
            yield {**outbound.ranking_row(task, found.rank_of()), "source": source}
            continue
        chosen, rejected = (task.candidate(group[0]) for group in found.groups)
        yield {
            "prompt": task.prompt,
            "chosen": outbound.completion(task.prompt, chosen.text),
            "rejected": outbound.completion(task.prompt, rejected.text),
            "margin": found.strength,
            "source": source,
        }
    if report is None:
        _log_dropped(counted)


def _everything(source: PreferenceStore | Sequence[LabeledTask]) -> tuple[list[Task], list[Label]]:
    if isinstance(source, PreferenceStore):
        # Labels first: a task that is added meanwhile does no harm, a label without its task would.
        labels = source.labels(standing_only=False)
        return source.tasks(), labels
    return [entry.task for entry in source], [label for entry in source for label in entry.labels]


def _write_rows(path: Path, rows: Iterable[dict[str, Any]], *, suffix: str) -> None:
    if suffix == ".parquet":
        try:
            parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path, write_page_checksum=True)
        except (pyarrow.ArrowException, UnicodeEncodeError) as error:
            raise UserError(
                "the rows do not fit into a Parquet file",
                where=str(path),
                cause=str(error),
                next_step="export to a .jsonl file",
            ) from error
    elif suffix in (".jsonl", ".json"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        raise UserError(f"{suffix or 'no suffix'} is no kind of file to export to", next_step="use .jsonl or .parquet")


def _log_dropped(report: ReadReport) -> None:
    if report.num_dropped:
        _LOG.warning("%s: %s", report.source, report.summary())
