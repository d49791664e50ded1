"""Files that are there whole or not at all, also after a power cut; and what a disk says that takes no more."""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from protocol.errors import StorageError, UserError

STORAGE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
"""The disk is full, a quota or a limit is reached, it is read-only, or it is broken."""
T = TypeVar("T")
_RUST_ERRNO = re.compile(r"\(os error (\d+)\)")


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a place to write a file at; when the block ends well, the file is on the disk under its own name.

    Args:
        path: The file; replaced if it exists, left as it is if the block raises.

    Yields:
        The path to write at, in the same directory.

    Raises:
        StorageError: If the disk does not take it.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            yield staging
            sync(staging)
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
        sync(path.parent)


def write_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a UTF-8 text file whole or not at all; `errors` as `open` has it."""
    with staged(path) as staging:
        staging.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: Path, values: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(values, indent=2))


def read_json(path: Path, parse: Callable[[Any], T], *, next_step: str) -> T:
    """Read a JSON file that people may edit and disks may damage.

    Args:
        path: The file.
        parse: Makes what it is to be of plain JSON values; whatever it raises of a wrong value counts as damage.
        next_step: What to do about a damaged one.

    Raises:
        UserError: If it is damaged, naming it.
    """
    try:
        return parse(json.loads(path.read_bytes()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"the file cannot be read: {type(error).__name__}: {error}",
            where=str(path),
            cause="it was edited or damaged",
            next_step=next_step,
        ) from None


def make_directory(path: Path) -> None:
    """Make a directory, and those above it that are missing, and see its name to the disk."""
    if not path.is_dir():
        if not path.parent.is_dir():
            make_directory(path.parent)
        path.mkdir(exist_ok=True)
    # Whoever made it may have died before its name was on the disk.
    sync(path.parent)


def sync_tree(directory: Path) -> None:
    """See a directory, and all files and directories below it, to the disk."""
    for path in (*sorted(directory.rglob("*")), directory):
        sync(path)


def sync(path: Path) -> None:
    """See a file's content, or a directory's names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def storage_failure(error: BaseException) -> OSError | None:
    """Recognise an error by which a disk refuses to take or to give data.

    Returns:
        It, with its errno; None for any other error.
    """
    if isinstance(error, OSError):
        return error if error.errno in STORAGE_ERRNOS else None
    if isinstance(error, UserError | StorageError):
        return None
    # safetensors and tokenizers raise errors of their own, with the number in the text.
    found = _RUST_ERRNO.search(str(error))
    return OSError(int(found[1]), str(error)) if found is not None and int(found[1]) in STORAGE_ERRNOS else None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what a disk says that takes no more into an error that says which file and what to do.

    Args:
        path: The file that the block writes; or a directory, for what is written somewhere below it.

    Raises:
        StorageError: If the block fails for want of space, of rights to write, or of a working disk.
    """
    try:
        yield
    except Exception as error:
        failure = storage_failure(error)
        if failure is None:
            raise
        named = path.is_dir() and isinstance(failure.filename, str)
        place = Path(failure.filename) if named else path
        told = UserError(
            "it cannot be written",
            where=str(place),
            cause=failure.strerror or str(failure),
            next_step=f"{space_command(place)}; then give the same command again",
        )
        raise StorageError(str(told)) from error


def space_command(path: Path) -> str:
    """Say how to look at the space that a file's or a directory's file system has left."""
    directory = path if path.is_dir() else path.parent
    return f"look at the space with `df -h {directory}` and `df -i {directory}`, and free some or raise the quota"


class RecordFile:
    """A file that grows by whole records: one that the disk does not take in full is taken back.

    Args:
        path: The file; made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with writing(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, record: bytes) -> None:
        """Add a record and see it to the disk.

        Raises:
            StorageError: If the disk does not take it; the file is as it was before.
        """
        length = os.fstat(self._descriptor).st_size
        with writing(self._path):
            try:
                rest = memoryview(record)
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
                os.fsync(self._descriptor)
            except OSError:
                os.ftruncate(self._descriptor, length)
                raise

    def close(self) -> None:
        """Close the file; nothing is waiting to be written."""
        os.close(self._descriptor)


def keep_lines(path: Path, count: int) -> int:
    """Cut a file off after so many lines, in place, which needs no space.

    Args:
        path: The file; need not exist.
        count: How many of its first lines are kept. Half a line at its end counts as one.

    Returns:
        How many lines were cut off.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    if len(lines) > count:
        os.truncate(path, sum(map(len, lines[:count])))
        sync(path)
    return max(0, len(lines) - count)
