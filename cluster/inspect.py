"""Shows what a data set is before a run depends on it: type, examples, lengths, and what would be left out and why."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from protocol.datasets import ReadReport, peek, read_records
from protocol.errors import UserError
from protocol.records import (
    DemonstrationRecord,
    PreferenceRecord,
    PromptRecord,
    RankingRecord,
    Record,
    RecordType,
    Text,
    UnpairedRecord,
)
from protocol.tokens import encode_prompt, encode_response, load_tokenizer

if TYPE_CHECKING:
    from rich.console import RenderableType
    from transformers import PreTrainedTokenizerBase

PERCENTILES = (0, 50, 90, 99, 100)
_NUM_EXAMPLES = 3
_SHOWN = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """The lengths of one part of the records (say the prompts), at `PERCENTILES`.

    Args:
        part: Which part.
        unit: Characters or tokens.
        percentiles: One length for each of `PERCENTILES`.
        num_overlong: How many exceed the limit; None where no limit applies.
    """

    part: str
    unit: str
    percentiles: tuple[int, ...]
    num_overlong: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSummary:
    """What `inspect` found."""

    source: str
    type: RecordType
    num_rows: int
    is_complete: bool
    """Whether the whole data set was surely read, not only its first rows."""
    max_tokens: int | None
    lengths: tuple[Lengths, ...]
    examples: tuple[tuple[tuple[str, str], ...], ...]
    report: ReadReport = field(repr=False)


def inspect(
    source: str,
    *,
    tokenizer: "str | PreTrainedTokenizerBase | None" = None,
    max_tokens: int | None = None,
    limit: int = 10_000,
) -> DataSummary:
    """Read up to `limit` rows and sum them up.

    Args:
        source: As in a config: a file, directory or glob, `package.module:callable`, or a hub id.
        tokenizer: A tokenizer or its directory; with it, lengths are also in tokens, chat template included.
        max_tokens: Count parts with more tokens than this (characters without a tokenizer).
        limit: At most so many rows are read.

    Raises:
        UserError: The source is missing, empty, or holds a malformed row.
    """
    loaded = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
    found = peek(source)
    report = ReadReport(source=source)
    sizes: dict[tuple[str, str], list[int]] = {}
    examples: list[tuple[tuple[str, str], ...]] = []
    for number, record in enumerate(read_records(source, count=limit, report=report), start=1):
        parts = list(_parts(record))
        if len(examples) < _NUM_EXAMPLES:
            examples.append(tuple((name, _written(text)) for name, text in parts))
        for name, text in parts:
            sizes.setdefault((name, "characters"), []).append(_num_characters(text))
            if loaded is not None:
                try:
                    sizes.setdefault((name, "tokens"), []).append(_num_tokens(loaded, name, text))
                except UserError as error:
                    raise error.at(f"{source}, {name} of record {number}") from error
    num_rows = report.num_kept + report.num_dropped
    limited_unit = "characters" if loaded is None else "tokens"
    return DataSummary(
        source=source,
        type=found,
        num_rows=num_rows,
        is_complete=num_rows < limit,
        max_tokens=max_tokens,
        lengths=tuple(
            _lengths(name, unit, values, max_tokens if unit == limited_unit else None)
            for (name, unit), values in sizes.items()
        ),
        examples=tuple(examples),
        report=report,
    )


def render(summary: DataSummary) -> "RenderableType":
    """Lay a summary out for a terminal."""
    from rich.console import Group
    from rich.text import Text as RichText

    rows = f"{summary.num_rows} rows" if summary.is_complete else f"the first {summary.num_rows} rows"
    return Group(
        RichText(f"{summary.source}: {summary.type}; {rows}", style="bold"),
        _lengths_table(summary),
        RichText(_fate(summary)),
        *(_example_panel(number, example) for number, example in enumerate(summary.examples, start=1)),
    )


def _parts(record: Record) -> Iterator[tuple[str, Text]]:
    yield "prompt", record.prompt
    match record:
        case DemonstrationRecord() | UnpairedRecord():
            yield "completion", record.completion
        case PreferenceRecord():
            yield "chosen", record.chosen
            yield "rejected", record.rejected
        case RankingRecord():
            for rank, completion in sorted(
                zip(record.ranks, record.completions, strict=True), key=lambda item: item[0]
            ):
                yield f"rank {rank}", completion
        case PromptRecord():
            pass


def _written(text: Text) -> str:
    if isinstance(text, str):
        return text
    return "\n".join(f"[{message['role']}] {message['content']}" for message in text)


def _num_characters(text: Text) -> int:
    return len(text) if isinstance(text, str) else sum(len(message["content"]) for message in text)


def _num_tokens(tokenizer: "PreTrainedTokenizerBase", part: str, text: Text) -> int:
    return len(encode_prompt(tokenizer, text) if part == "prompt" else encode_response(tokenizer, text))


def _lengths(part: str, unit: str, values: list[int], max_length: int | None) -> Lengths:
    # "higher" names a length that really occurs, and never understates the tail
    percentiles = np.percentile(np.asarray(values), PERCENTILES, method="higher")
    overlong = None if max_length is None else sum(value > max_length for value in values)
    return Lengths(part=part, unit=unit, percentiles=tuple(int(value) for value in percentiles), num_overlong=overlong)


def _lengths_table(summary: DataSummary) -> "RenderableType":
    from rich.table import Table

    table = Table(title="lengths", title_justify="left")
    table.add_column("part")
    table.add_column("unit")
    for percentile in PERCENTILES:
        table.add_column({0: "min", 50: "median", 100: "max"}.get(percentile, f"p{percentile}"), justify="right")
    if summary.max_tokens is not None:
        table.add_column(f"over {summary.max_tokens}", justify="right")
    for lengths in summary.lengths:
        cells = [str(value) for value in lengths.percentiles]
        if summary.max_tokens is not None:
            cells.append("" if lengths.num_overlong is None else str(lengths.num_overlong))
        table.add_row(lengths.part, lengths.unit, *cells)
    return table


def _fate(summary: DataSummary) -> str:
    lines = [summary.report.summary() + ("" if summary.report.num_dropped else "; nothing dropped")]
    lines += [
        f"{lengths.part}: {lengths.num_overlong} longer than {summary.max_tokens} {lengths.unit}"
        + (" (refused by a run, unless data.overlong_prompts=drop)" if lengths.part == "prompt" else "")
        for lengths in summary.lengths
        if lengths.num_overlong
    ]
    return "\n".join(lines)


def _example_panel(number: int, example: tuple[tuple[str, str], ...]) -> "RenderableType":
    from rich.panel import Panel
    from rich.text import Text as RichText

    shown = RichText()
    for name, text in example:
        shown.append(f"{name}\n", style="bold")
        shown.append(text[:_SHOWN])
        shown.append(f"... ({len(text)} characters)\n" if len(text) > _SHOWN else "\n")
    shown.rstrip()
    return Panel(shown, title=f"example {number}", title_align="left")
