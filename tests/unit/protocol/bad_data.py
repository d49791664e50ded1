"""Two hundred data files that cannot be right: (name, file name, bytes, what the message must say), always the same."""

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

GOOD = {"prompt": "What is a tide?", "chosen": "The sea rises.", "rejected": "No idea."}
HH = "\n\nHuman: hi\n\nAssistant:"


@dataclass(frozen=True, slots=True, kw_only=True)
class BadFile:
    """One bad file; `says` is the place and the fault that the message must name."""

    name: str
    path: str
    content: bytes
    says: tuple[str, ...]
    format: str | None = None
    """The format for `rondo label import`; None for a data set of a run."""


def user(text: Any) -> dict[str, Any]:
    """A user's turn."""
    return {"role": "user", "content": text}


def said(text: Any) -> dict[str, Any]:
    """An assistant's turn."""
    return {"role": "assistant", "content": text}


def lines(*rows: Any) -> bytes:
    """Rows as JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]] | pa.Table) -> bytes:
    """Rows as a Parquet file whose pages carry checksums."""
    stream = io.BytesIO()
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), stream, write_page_checksum=True)
    return stream.getvalue()


_BAD_ROWS: tuple[tuple[Any, str], ...] = (
    (3, "the row is a int"),
    (None, "the row is a NoneType"),
    ("text", "the row is a str"),
    ([GOOD], "the row is a list"),
    (True, "the row is a bool"),
    ({}, "do not make a known record type"),
    ({"question": "x"}, "do not make a known record type"),
    ({"prompt": None}, "do not make a known record type"),
    ({"prompt": "x", "chosen": "a"}, "do not make a known record type"),
    ({"prompt": "x", "rejected": "a"}, "do not make a known record type"),
    ({"completion": "a"}, "the row has no prompt"),
    ({"chosen": "yes", "rejected": "no"}, "the row has no prompt"),
    ({"prompt": ""}, "the row has no prompt"),
    ({"prompt": " \n\t "}, "the row has no prompt"),
    ({"prompt": []}, "the row has no prompt"),
    ({"prompt": [user("")]}, "the row has no prompt"),
    ({"prompt": 3}, "not a list of messages"),
    ({"prompt": {"text": "x"}}, "not a list of messages"),
    ({"prompt": float("nan")}, "not a list of messages"),
    ({"prompt": ["x"]}, "not a message with role and text content"),
    ({"prompt": [[user("x")]]}, "not a message with role and text content"),
    ({"prompt": [{"from": "human", "value": "x"}]}, "not a message with role and text content"),
    ({"prompt": [{"role": "tool", "content": "x"}]}, "not a message with role and text content"),
    ({"prompt": [{"role": "User", "content": "x"}]}, "not a message with role and text content"),
    ({"prompt": [{"role": ["user"], "content": "x"}]}, "not a message with role and text content"),
    ({"prompt": [{"role": "user"}]}, "not a message with role and text content"),
    ({"prompt": [user(None)]}, "not a message with role and text content"),
    ({"prompt": [user([{"type": "image"}])]}, "not a message with role and text content"),
    ({"prompt": [user("x"), said("y")]}, "ends with an assistant turn"),
    ({"prompt": "x", "completion": ""}, "completion is empty"),
    ({"prompt": "x", "completion": 3}, "completion is a int"),
    ({"prompt": "x", "completion": {"text": "a"}}, "completion is a dict"),
    ({"prompt": [user("x")], "completion": []}, "exactly one assistant turn"),
    ({"prompt": [user("x")], "completion": [said("")]}, "completion is empty"),
    ({"prompt": [user("x")], "completion": [user("y")]}, "exactly one assistant turn"),
    ({"prompt": [user("x")], "completion": [said("a"), said("b")]}, "exactly one assistant turn"),
    ({"prompt": [user("x")], "completion": [said("a"), user("b")]}, "exactly one assistant turn"),
    ({"messages": []}, "the row has no prompt"),
    ({"messages": "x"}, "not a list of messages"),
    ({"messages": [user("x")]}, "the row has no prompt"),
    ({"messages": [user("x"), user("y")]}, "exactly one assistant turn"),
    ({"messages": [user("x"), said("a"), said("b")]}, "ends with an assistant turn"),
    (GOOD | {"chosen": ""}, "chosen is empty"),
    (GOOD | {"rejected": ""}, "rejected is empty"),
    (GOOD | {"chosen": 1}, "chosen is a int"),
    (GOOD | {"chosen": ["a"]}, "chosen is a list"),
    (GOOD | {"margin": "big"}, "margin is not a number"),
    (GOOD | {"margin": True}, "margin is not a number"),
    (GOOD | {"margin": float("nan")}, "margin is not a number"),
    (GOOD | {"margin": float("-inf")}, "margin is not a number"),
    (GOOD | {"margin": 10**400}, "margin is not a number"),
    (GOOD | {"chosen": "\ud83d"}, "half a character"),
    (GOOD | {"note": {"deep": ["\udc00"]}}, "half a character"),
    ({"prompt": [user("\ud800")]}, "half a character"),
    ({"prompt": "x", "completion": "a", "label": "good"}, "neither true nor false"),
    ({"prompt": "x", "completion": "a", "label": 2}, "neither true nor false"),
    ({"prompt": "x", "completion": "a", "label": [True]}, "neither true nor false"),
    ({"prompt": "x", "completions": ["a", "b"], "ranks": [1]}, "not lists of the same length"),
    ({"prompt": "x", "completions": "ab", "ranks": [1, 2]}, "not lists of the same length"),
    ({"prompt": "x", "completions": ["a", "b"], "ranks": ["1", "2"]}, "whole numbers"),
    ({"prompt": "x", "completions": ["a", "b"], "ranks": [1.0, 2.0]}, "whole numbers"),
    ({"prompt": "x", "completions": ["a"], "ranks": [1]}, "two or more completions"),
    ({"prompt": "x", "completions": ["a", ""], "ranks": [1, 2]}, "completions is empty"),
    ({"chosen": [user("x"), said("a")], "rejected": "b"}, "rejected is a str"),
    ({"chosen": [user("x"), said("a")], "rejected": [user("y"), said("b")]}, "no prompt"),
    ({"chosen": HH + " a", "rejected": "hi Assistant: b"}, "the row has no prompt"),
    ({"chosen": "hi Assistant: a", "rejected": "Human: hi b"}, "the row has no prompt"),
)

_FIRST = lines(GOOD)
_BROKEN_LINES: tuple[tuple[str, bytes, str], ...] = (
    ("cut off", b'{"prompt": "x"', "broken JSON"),
    ("cut inside text", b'{"prompt": "x', "broken JSON"),
    ("single quotes", b"{'prompt': 'x'}", "broken JSON"),
    ("a comma too many", b'{"prompt": "x",}', "broken JSON"),
    ("two objects", b'{"prompt": "x"} {"prompt": "y"}', "broken JSON"),
    ("a raw NUL", b'{"prompt": "x\x00"}', "broken JSON"),
    ("NULs alone", b"\x00" * 50, "broken JSON"),
    ("a raw control character", b'{"prompt": "x\x07"}', "broken JSON"),
    ("a wrong escape", rb'{"prompt": "\q"}', "broken JSON"),
    ("no quotation marks", b"prompt: x", "broken JSON"),
    ("a name twice", b'{"prompt": "x", "prompt": "y"}', "comes twice"),
    ("a name twice inside", b'{"prompt": [{"role": "user", "role": "system", "content": "x"}]}', "comes twice"),
    ("a number of ten thousand digits", b'{"prompt": ' + b"9" * 10_000 + b"}", "digits"),
    ("a hundred thousand brackets", b'{"a":' * 100_000, "too deep"),
    ("Latin-1", '{"prompt": "größer"}'.encode("latin-1"), "not UTF-8"),
    ("bytes that are no UTF-8", b'{"prompt": "\xff\xfe"}', "not UTF-8"),
    ("half of a UTF-8 sequence", b'{"prompt": "\xe2\x82"}', "not UTF-8"),
    ("a surrogate as UTF-8", b'{"prompt": "\xed\xa0\x80"}', "not UTF-8"),
    ("a byte order mark in the middle", b'\xef\xbb\xbf{"prompt": "x"}', "broken JSON"),
    ("five megabytes cut off", b'{"prompt": "' + b"x" * 5_000_000, "broken JSON"),
)


def data_sets() -> Iterator[BadFile]:
    """Bad data sets of a run."""
    for number, (row, says) in enumerate(_BAD_ROWS):
        yield BadFile(
            name=f"row {number}: {says}", path="x.jsonl", content=lines(GOOD, GOOD, row), says=("line 3", says)
        )
    for name, line, says in _BROKEN_LINES:
        yield BadFile(
            name=f"line: {name}", path="x.jsonl", content=_FIRST + b"\n" + line + b"\n" + _FIRST, says=("line 3", says)
        )
    yield from _whole_files()
    yield from _packed()
    yield from _parquet_files()


def _whole_files() -> Iterator[BadFile]:
    same = GOOD | {"rejected": GOOD["chosen"]}
    tied = {"prompt": "x", "completions": ["a", "b"], "ranks": [1, 1]}
    alike = {"prompt": "x", "completions": ["a", "a"], "ranks": [1, 2]}
    question = {"chosen": HH[:11], "rejected": HH[:11] + "x"}
    for name, path, content, says in (
        ("nothing", "x.jsonl", b"", "empty"),
        ("a byte order mark alone", "x.jsonl", b"\xef\xbb\xbf", "empty"),
        ("empty lines", "x.jsonl", b"\n \n\t\n", "empty"),
        ("an empty array", "x.json", b"[]", "empty"),
        ("an array cut off", "x.json", b'[{"prompt": "x"},', "broken JSON"),
        ("an array of numbers", "x.json", b"[1, 2]", "row 1"),
        ("an array with a null", "x.json", b'[{"prompt": "x"}, null]', "row 2"),
        ("one object over several lines", "x.json", b'{\n  "prompt": "x"\n}\n', "line 1"),
        ("UTF-16", "x.jsonl", '{"prompt": "x"}\n'.encode("utf-16"), "line 1"),
        ("UTF-16 without a mark", "x.jsonl", '{"prompt": "x"}\n'.encode("utf-16-le"), "broken JSON"),
        ("gzip without saying so", "x.jsonl", gzip.compress(_FIRST, mtime=0), "line 1"),
        ("Parquet without saying so", "x.jsonl", parquet([GOOD]), "line 1"),
        ("a table of commas", "x.csv", b"prompt\nhi\n", "kind of file is not known"),
        ("no suffix", "./data", _FIRST, "kind of file is not known"),
        ("chosen is rejected", "x.jsonl", lines(same, same), "identical"),
        (
            "a ranking that ties all",
            "x.jsonl",
            lines(tied),
            "ties",
        ),
        (
            "a ranking of one answer",
            "x.jsonl",
            lines(alike),
            "identical",
        ),
        ("transcripts without an answer", "x.jsonl", lines({"chosen": HH + " a", "rejected": HH}), "Assistant turn"),
        (
            "transcripts of a question",
            "x.jsonl",
            lines(question),
            "Assistant turn",
        ),
        (
            "transcripts of different talks",
            "x.jsonl",
            lines({"chosen": HH + " a" + HH + " b", "rejected": HH + " c" + HH + " d"}),
            "differ in more than one",
        ),
    ):
        yield BadFile(name=f"file: {name}", path=path, content=content, says=(Path(path).name, says))


def _packed() -> Iterator[BadFile]:
    whole = gzip.compress(lines(*[GOOD | {"prompt": f"question {number}"} for number in range(50)]), mtime=0)
    for cut in (1, 5, 12, 40, 100, len(whole) - 9, len(whole) - 4, len(whole) - 1):
        yield BadFile(name=f"gzip cut at {cut}", path="x.jsonl.gz", content=whole[:cut], says=("x.jsonl.gz", "read"))
    for place in (0, 1, 2, 30, 60, len(whole) - 8, len(whole) - 2):
        content = whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        yield BadFile(name=f"gzip flipped at {place}", path="x.jsonl.gz", content=content, says=("x.jsonl.gz",))
    yield BadFile(name="text as gzip", path="x.jsonl.gz", content=_FIRST, says=("x.jsonl.gz", "read"))
    yield BadFile(name="nothing as gzip", path="x.jsonl.gz", content=b"", says=("x.jsonl.gz", "empty"))
    yield BadFile(
        name="packed Latin-1", path="x.jsonl.gz", content=gzip.compress(_FIRST + b'"\xe4"', mtime=0), says=("line 2",)
    )


def _parquet_files() -> Iterator[BadFile]:
    rows = [GOOD | {"prompt": f"question {number}", "note": f"{number} " * 20} for number in range(40)]
    whole = parquet(rows)
    for cut in (0, 3, 4, 11, 100, len(whole) // 2, len(whole) - 200, len(whole) - 8, len(whole) - 1):
        says = "x.parquet", "Parquet file can not be read"
        yield BadFile(name=f"Parquet cut at {cut}", path="x.parquet", content=whole[:cut], says=says)
    # The last bytes of a column are those of its values, which the page's checksum covers.
    group = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(0)
    for number in range(group.num_columns):
        column = group.column(number)
        start = column.dictionary_page_offset or column.data_page_offset
        for back in (1, 2, 3):
            place = start + column.total_compressed_size - back
            content = whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]
            yield BadFile(
                name=f"Parquet flipped at {place}", path="x.parquet", content=content, says=("x.parquet", "read")
            )
    no_text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    for name, content, says in (
        ("a wrong magic number", b"RAP1" + whole[4:-4] + b"RAP1", "can not be read"),
        ("a footer of impossible length", whole[:-8] + b"\xff\xff\xff\x7fPAR1", "can not be read"),
        ("text", _FIRST, "can not be read"),
        ("no rows", parquet(pa.table({"prompt": pa.array([], pa.string())})), "empty"),
        ("numbers as prompts", parquet([{"prompt": 1}]), "row 1"),
        ("bytes as prompts", parquet([{"prompt": b"x"}]), "row 1"),
        ("lists of numbers as prompts", parquet([{"prompt": [1, 2]}]), "row 1"),
        ("objects as prompts", parquet([{"prompt": {"text": "x"}}]), "row 1"),
        ("nothing but nulls", parquet(pa.table({"prompt": pa.array([None, None], pa.string())})), "row 1"),
        ("unknown columns", parquet([{"question": "x"}]), "row 1"),
        ("an empty answer", parquet([GOOD, GOOD | {"chosen": ""}]), "row 2"),
        ("a column twice", parquet(pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt"] * 2)), "same name"),
        ("bytes that are no text", parquet(pa.table({"prompt": no_text})), "can not be read"),
        (
            "an impossible date",
            parquet(pa.table({"prompt": ["x"], "at": pa.array([2**62], pa.timestamp("us"))})),
            "can not be read",
        ),
    ):
        yield BadFile(name=f"Parquet: {name}", path="x.parquet", content=content, says=("x.parquet", says))
