"""Reads rows out of JSON and Parquet files, each with the place where it stands.

Whatever is wrong with a file (cut off, damaged, not what its name says) is a UserError that names the file, and the
line or row as far as it is known.
"""

import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, cast

from protocol.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")

REPAIR = "repair or remove this row"
"""What to do about a row that is wrong."""

Located = tuple[str, dict[str, Any]]
"""Where a row comes from (file and line), and the row."""


def local_files(source: str) -> list[Path] | None:
    """Find the files that a source names: a file, all data files below a directory, or what fits a glob.

    Returns:
        The files by name, or None where the source can only be a hub id.

    Raises:
        UserError: If it should be a file, and there is none.
    """
    try:
        path = Path(source).expanduser()
        found = _found(source, path)
        if found is None or found:
            return found
        cause = f"no file ends in {', '.join(SUFFIXES)}" if path.is_dir() else "the path is wrong"
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a NUL, the home of nobody
        cause = error.strerror if isinstance(error, OSError) else str(error)
    raise UserError(
        "there is no data file here",
        where=source if len(source) < _SHOWN else f"{source[:_SHOWN]}...",
        cause=cause,
        next_step="check the path; relative paths start at the folder in which the command runs",
    )


def file_rows(files: list[Path]) -> Iterator[Located]:
    """Yield the rows of files, one file after the other.

    Raises:
        UserError: If a file cannot be read, or one of its rows is broken.
    """
    for file in files:
        if file.name.endswith(".parquet"):
            yield from _parquet_rows(file)
        elif file.name.endswith(SUFFIXES):
            yield from _json_rows(file)
        else:
            raise UserError("the kind of file is not known", where=str(file), next_step=f"use {', '.join(SUFFIXES)}")


def checked_row(where: str, row: Any) -> dict[str, Any]:
    """Return a row that is an object with named columns.

    Raises:
        UserError: If it is something else.
    """
    if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
        raise UserError(
            f"the row is a {type(row).__name__}, not an object with named columns",
            where=where,
            next_step="write one object with named columns for each row",
        )
    return row


_SHOWN = 200
_DAMAGED = "the file is cut off or damaged"
_AGAIN = "write or copy the file again"


def _found(source: str, path: Path) -> list[Path] | None:
    if not source:
        return []
    if any(letter in source for letter in "*?["):
        names = sorted(glob.glob(str(path), recursive=True))
        return [Path(name) for name in names if name.endswith(SUFFIXES) and Path(name).is_file()]
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
    if path.exists() or source.endswith(SUFFIXES) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        return [path] if path.is_file() else []
    return None


def _json_rows(file: Path) -> Iterator[Located]:
    """Read one object a line, or one array of objects, which some tools write under the same suffix."""
    try:
        with _opened(file) as lines:
            yield from _rows_of_text(file, lines)
    except UnicodeDecodeError as error:
        raise UserError(
            "the file can not be read as text",
            where=f"{file}, line {_undecodable_line(file)}",
            cause=f"it is not UTF-8 ({error.reason})",
            next_step="save it as UTF-8",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable("the file can not be read as text", str(file), error) from error


def _opened(file: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb"))


def _rows_of_text(file: Path, stream: BinaryIO) -> Iterator[Located]:
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig")
    first = lines.read(1)
    while first and first.isspace():
        first = lines.read(1)
    lines.seek(0)
    if first == "[":
        for number, row in enumerate(_parsed(str(file), lines.read()), start=1):
            where = f"{file}, row {number}"
            yield where, checked_row(where, row)
        return
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{file}, line {number}"
            yield where, checked_row(where, _parsed(where, line))


def _undecodable_line(file: Path) -> int:
    with _opened(file) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


def _parsed(where: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise _broken(where, f"{error.msg} at {place}") from error
    except RecursionError:
        raise _broken(where, "brackets inside brackets, too deep") from None
    except ValueError as error:  # a name twice, or a number of thousands of digits
        raise _broken(where, str(error)) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object, of which a name that comes twice would silently lose a value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = sorted(name for name, _ in pairs)
        twice = next(name for name, same in groupby(names) if len(list(same)) > 1)
        raise ValueError(f"the name {twice!r} comes twice in one object")
    return found


def _broken(where: str, what: str) -> UserError:
    return UserError(
        f"broken JSON ({what})",
        where=where,
        cause="the file is cut off or was edited by hand",
        next_step=REPAIR,
    )


def _parquet_rows(file: Path) -> Iterator[Located]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file, page_checksum_verification=True) as table:
            names = table.schema_arrow.names
            if len(set(names)) < len(names):
                raise UserError("two columns have the same name", where=str(file), next_step="rename one of them")
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    # Arrow raises the errors of Python for what is damaged inside: bytes that are no text, dates that do not exist.
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        where = f"{file}, after row {number}" if number else str(file)
        raise _unreadable("the Parquet file can not be read", where, error) from error


def _unreadable(what: str, where: str, error: Exception) -> UserError:
    return UserError(what, where=where, cause=f"{_DAMAGED} ({str(error)[:_SHOWN]})", next_step=_AGAIN)
