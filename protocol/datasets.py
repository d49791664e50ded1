"""Reads data sets: files, Python generators and Hugging Face hub ids, all as the records of `protocol.records`.

A malformed row stops the reading and is named by file and line. A row that is well formed but of no use (two identical
answers) is left out and counted in a `ReadReport`, so nothing disappears silently.
"""

import importlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from protocol.data_files import REPAIR, Located, checked_row, file_rows, local_files
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
_GENERATOR = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_NUM_EXAMPLES = 5
_T = TypeVar("_T")


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
    return _GENERATOR.fullmatch(source) is not None or local_files(source) is not None


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


def read_responses(
    source: str,
    *,
    split: str = "train",
    seed: int = 0,
    count: int | None = None,
    report: ReadReport | None = None,
) -> Iterator[tuple[str, DemonstrationRecord]]:
    """Yield every completion with its prompt and its place, whatever was said of it: of a preference both sides."""
    for where, record in _located_records(source, split=split, seed=seed, count=count, report=report):
        match record:
            case DemonstrationRecord() | UnpairedRecord():
                completions = {where: record.completion}
            case PreferenceRecord():
                completions = {f"{where}, chosen": record.chosen, f"{where}, rejected": record.rejected}
            case RankingRecord():
                completions = {f"{where}, completion {n}": text for n, text in enumerate(record.completions, start=1)}
            case PromptRecord():
                raise _wrong_type("responses", "completions beside the prompt", where, record)
        for place, completion in completions.items():
            yield place, DemonstrationRecord(prompt=record.prompt, completion=completion)


def read_preferences(
    source: str,
    *,
    split: str = "train",
    seed: int = 0,
    count: int | None = None,
    report: ReadReport | None = None,
) -> Iterator[PreferenceRecord]:
    """Yield pairs of a better and a worse answer; a ranking yields every pair that it orders."""
    for record in read_judgements(source, split=split, seed=seed, count=count, report=report):
        if isinstance(record, PreferenceRecord):
            yield record
        else:
            yield from record.pairs()


def read_judgements(
    source: str,
    *,
    split: str = "train",
    seed: int = 0,
    count: int | None = None,
    report: ReadReport | None = None,
) -> Iterator[PreferenceRecord | RankingRecord]:
    """Yield pairs of a better and a worse answer, and rankings as a whole."""
    for where, record in _located_records(source, split=split, seed=seed, count=count, report=report):
        if isinstance(record, PreferenceRecord | RankingRecord):
            yield record
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
        raise UserError(
            f"no row of the data set can be used: {counted.summary()}",
            where=source,
            next_step="look at the rows named here",
        )
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
        raise error.at(where, next_step=REPAIR) from None


def _located_rows(
    source: str, *, split: str, seed: int, count: int | None, streaming: bool = False
) -> Iterator[Located]:
    if _GENERATOR.fullmatch(source):
        rows = _generated_rows(source, seed=seed, count=count)
    else:
        files = local_files(source)
        rows = _hub_rows(source, split=split, streaming=streaming) if files is None else file_rows(files)
    num_rows = 0
    for row in islice(rows, count):
        num_rows += 1
        yield row
    if not num_rows:
        raise _empty(source)


def _generated_rows(source: str, *, seed: int, count: int | None) -> Iterator[Located]:
    if count is None:
        raise UserError(
            "a Python generator has no length of its own", where=source, next_step="set `count` beside `source`"
        )
    module, _, name = source.partition(":")
    try:
        generate: Callable[..., Iterable[Any]] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            "the data generator can not be imported",
            where=source,
            cause=str(error),
            next_step="check the name; its folder must be the working directory or on PYTHONPATH",
        ) from error
    if not callable(generate):
        raise UserError(f"this is a {type(generate).__name__}, not a generator of data", where=source)
    for number, row in enumerate(generate(seed=seed, count=count), start=1):
        where = f"{source}, row {number}"
        yield where, checked_row(where, row)


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
    return UserError(
        f"the row is {found}, but data.{role} needs {needed}", where=where, next_step="name another source"
    )
