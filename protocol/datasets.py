"""Reads data sets: files, Python generators and Hugging Face hub ids, all as the records of `protocol.records`.

A malformed row stops the reading and is named by file and line. A row that is well formed but of no use (two identical
answers) is left out and counted in a `ReadReport`, so nothing disappears silently.
"""

import glob
import gzip
import importlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from protocol.errors import UserError
from protocol.records import (
    DemonstrationRecord,
    PreferenceRecord,
    PromptRecord,
    RankingRecord,
    Record,
    RecordType,
    UnpairedRecord,
    UnusableRow,
    detect_type,
    normalize,
)

_LOG = logging.getLogger(__name__)
_SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
_GENERATOR = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_NUM_EXAMPLES = 5
_T = TypeVar("_T")

Located = tuple[str, dict[str, Any]]
"""Where a row comes from (file and line), and the row."""


@dataclass(slots=True, kw_only=True)
class ReadReport:
    """What became of the rows of a data set: how many were kept, how many dropped, why, and where examples are."""

    source: str
    num_kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    examples: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    @property
    def num_dropped(self) -> int:
        """Return the number of rows left out, for whatever reason."""
        return sum(self.dropped.values())

    def keep(self) -> None:
        """Count a row that is used."""
        self.num_kept += 1

    def drop(self, reason: str, where: str) -> None:
        """Count a row that is left out."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _NUM_EXAMPLES:
            places.append(where)

    def summary(self) -> str:
        """Say in one line what was kept and dropped."""
        reasons = [
            f"{count} dropped: {reason} (such as {', '.join(self.examples[reason])})"
            for reason, count in self.dropped.items()
        ]
        return "; ".join([f"{self.num_kept} of {self.num_kept + self.num_dropped} rows kept", *reasons])


def open_records(
    source: str, *, split: str = "train", seed: int = 0, count: int | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the raw rows of a data set, in its own order.

    Args:
        source: A .jsonl, .json or .parquet file, a directory or glob of them, `package.module:callable`, or a hub id
            (`owner/name` or `owner/name:subset`).
        split: Which split of a hub data set; files and generators have none.
        seed: Given to a generator; nothing else depends on it.
        count: At most so many rows; a generator is asked for so many.

    Raises:
        UserError: There is no such source, it is empty, or a row can not be read.
    """
    for _, row in _located_rows(source, split=split, seed=seed, count=count):
        yield row


def peek(source: str, *, split: str = "train") -> RecordType:
    """Return the type of the first record, without reading on."""
    for where, row in _located_rows(source, split=split, seed=0, count=1, streaming=True):
        return _placed(detect_type, where, row)
    raise _empty(source)


def is_local(source: str) -> bool:
    """Whether a source is read from this machine: files, or a Python generator."""
    return _GENERATOR.fullmatch(source) is not None or _local_files(source) is not None


def read_records(
    source: str,
    *,
    split: str = "train",
    seed: int = 0,
    count: int | None = None,
    report: ReadReport | None = None,
) -> Iterator[Record]:
    """Yield the records of a data set; see `open_records` for the arguments.

    Args:
        report: Where kept and dropped rows are counted; without one, drops are logged as a warning in the end.
    """
    for _, record in _located_records(source, split=split, seed=seed, count=count, report=report):
        yield record


def read_prompts(
    source: str,
    *,
    split: str = "train",
    seed: int = 0,
    count: int | None = None,
    report: ReadReport | None = None,
) -> Iterator[PromptRecord]:
    """Yield the prompts of a data set of any type, leaving answers aside."""
    for _, record in _located_records(source, split=split, seed=seed, count=count, report=report):
        yield record if isinstance(record, PromptRecord) else PromptRecord(prompt=record.prompt)


def read_demonstrations(
    source: str,
    *,
    split: str = "train",
    seed: int = 0,
    count: int | None = None,
    report: ReadReport | None = None,
) -> Iterator[DemonstrationRecord]:
    """Yield prompts with an answer to imitate: completions, or the chosen answers of a preference data set."""
    for where, record in _located_records(source, split=split, seed=seed, count=count, report=report):
        if isinstance(record, DemonstrationRecord):
            yield record
        elif isinstance(record, PreferenceRecord):
            yield DemonstrationRecord(prompt=record.prompt, completion=record.chosen)
        else:
            raise _wrong_type("demonstrations", "a completion to imitate", where, record)


def read_preferences(
    source: str,
    *,
    split: str = "train",
    seed: int = 0,
    count: int | None = None,
    report: ReadReport | None = None,
) -> Iterator[PreferenceRecord]:
    """Yield pairs of a better and a worse answer; a ranking yields every pair that it orders."""
    for where, record in _located_records(source, split=split, seed=seed, count=count, report=report):
        if isinstance(record, PreferenceRecord):
            yield record
        elif isinstance(record, RankingRecord):
            yield from record.pairs()
        else:
            raise _wrong_type("preferences", "a chosen and a rejected answer", where, record)


def _located_records(
    source: str, *, split: str, seed: int, count: int | None, report: ReadReport | None
) -> Iterator[tuple[str, Record]]:
    counted = ReadReport(source=source) if report is None else report
    for where, row in _located_rows(source, split=split, seed=seed, count=count):
        try:
            record = _placed(normalize, where, row)
        except UnusableRow as unusable:
            counted.drop(unusable.reason, where)
            continue
        reason = _why_useless(record)
        if reason is not None:
            counted.drop(reason, where)
            continue
        counted.keep()
        yield where, record
    if not counted.num_kept:
        raise UserError(f"no row of the data set can be used: {counted.summary()}", where=source)
    if report is None and counted.num_dropped:
        _LOG.warning("%s: %s", source, counted.summary())


def _why_useless(record: Record) -> str | None:
    if isinstance(record, PreferenceRecord) and record.chosen == record.rejected:
        return "chosen and rejected are identical"
    if isinstance(record, RankingRecord) and len(set(record.ranks)) == 1:
        return "the ranking ties all completions"
    if isinstance(record, RankingRecord) and any(pair.chosen == pair.rejected for pair in record.pairs()):
        return "the ranking orders identical completions"
    return None


def _placed(read: Callable[[Mapping[str, Any]], _T], where: str, row: Mapping[str, Any]) -> _T:
    try:
        return read(row)
    except UserError as error:
        raise error.at(where) from None


def _located_rows(
    source: str, *, split: str, seed: int, count: int | None, streaming: bool = False
) -> Iterator[Located]:
    if _GENERATOR.fullmatch(source):
        rows = _generated_rows(source, seed=seed, count=count)
    else:
        files = _local_files(source)
        rows = _hub_rows(source, split=split, streaming=streaming) if files is None else _file_rows(files)
    num_rows = 0
    for row in islice(rows, count):
        num_rows += 1
        yield row
    if not num_rows:
        raise _empty(source)


def _local_files(source: str) -> list[Path] | None:
    """Return the files that a source names, or None where it can only be a hub id."""
    path = Path(source).expanduser()
    if any(letter in source for letter in "*?["):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if name.endswith(_SUFFIXES)]
    elif path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(_SUFFIXES))
    elif path.exists() or source.endswith(_SUFFIXES) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        found = [path] if path.is_file() else []
    else:
        return None
    if not found:
        raise UserError(
            "there is no data file here",
            where=source,
            cause="the path is wrong" if not path.is_dir() else f"no file ends in {', '.join(_SUFFIXES)}",
            next_step="check the path; relative paths start at the folder in which the command runs",
        )
    return found


def _file_rows(files: list[Path]) -> Iterator[Located]:
    for file in files:
        if file.name.endswith(".parquet"):
            yield from _parquet_rows(file)
        elif file.name.endswith(_SUFFIXES):
            yield from _json_rows(file)
        else:
            raise UserError("the kind of file is not known", where=str(file), next_step=f"use {', '.join(_SUFFIXES)}")


def _json_rows(file: Path) -> Iterator[Located]:
    """Read one object a line, or one array of objects, which some tools write under the same suffix."""
    opener = gzip.open if file.suffix == ".gz" else open
    try:
        with opener(file, "rt", encoding="utf-8-sig") as lines:
            first = lines.read(1)
            while first and first.isspace():
                first = lines.read(1)
            lines.seek(0)
            if first == "[":
                yield from _array_rows(file, lines.read())
                return
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield where, _checked_row(where, _parsed(where, line))
    except (UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise UserError("the file can not be read as text", where=str(file), cause=str(error)) from error


def _array_rows(file: Path, text: str) -> Iterator[Located]:
    for number, row in enumerate(_parsed(str(file), text), start=1):
        where = f"{file}, row {number}"
        yield where, _checked_row(where, row)


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise UserError(
            f"broken JSON ({error.msg} at {place})",
            where=where,
            cause="the file is cut off or was edited by hand",
            next_step="repair or remove this row",
        ) from error


def _checked_row(where: str, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"the row is a {type(row).__name__}, not an object with named columns", where=where)
    return row


def _parquet_rows(file: Path) -> Iterator[Located]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError("the Parquet file can not be read", where=str(file), cause=str(error)) from error


def _generated_rows(source: str, *, seed: int, count: int | None) -> Iterator[Located]:
    if count is None:
        raise UserError(
            "a Python generator has no length of its own", where=source, next_step="set `count` beside `source`"
        )
    module, _, name = source.partition(":")
    try:
        generate = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            "the data generator can not be imported",
            where=source,
            cause=str(error),
            next_step="check the name; its folder must be the working directory or on PYTHONPATH",
        ) from error
    for number, row in enumerate(generate(seed=seed, count=count), start=1):
        where = f"{source}, row {number}"
        yield where, _checked_row(where, row)


def _hub_rows(source: str, *, split: str, streaming: bool) -> Iterator[Located]:
    """Read through `datasets`, which since version 4 runs no code that comes with a data set."""
    from datasets import load_dataset

    name, _, subset = source.partition(":")
    try:
        rows = load_dataset(name, subset or None, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            "there is no such local file, and the hub data set can not be loaded",
            where=source,
            cause=f"{type(error).__name__}: {error}",
            next_step="check the path or hub id, the split, and whether this machine reaches the hub",
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}, {split} row {number}", dict(row)


def _empty(source: str) -> UserError:
    return UserError("the data set is empty", where=source, next_step="check that the file was written completely")


def _wrong_type(role: str, needed: str, where: str, record: Record) -> UserError:
    kinds = {
        PromptRecord: "a prompt",
        DemonstrationRecord: "a demonstration",
        UnpairedRecord: "an unpaired preference",
        RankingRecord: "a ranking",
    }
    found = kinds.get(type(record), "a preference")
    return UserError(f"the row is {found}, but data.{role} needs {needed}", where=where)
