"""Files that are there whole or not at all, also after a power cut."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Give a place to write a file at; when the block ends well, the file is on the disk under its own name.

    Args:
        path: The file; replaced if it exists, left as it is if the block raises.

    Yields:
        The path to write at, in the same directory.
    """
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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
