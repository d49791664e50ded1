"""Disks that fill up: a small file system of its own where one can be mounted, and a limit on files everywhere."""

import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def small_disk(path: Path, *, size: str) -> Iterator[Path]:
    """Mount a file system of this size in memory, for as long as the block lasts; skip the test where that is refused.

    Args:
        path: The directory to make and mount it at.
        size: As `mount` takes it, such as `4m`.
    """
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        # A worker that has just been stopped may still have a file open; what is no longer used goes by itself.
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def fill(disk: Path, *, leave: int) -> Path:
    """Fill a disk up to so many bytes; removing the returned file frees the space again."""
    ballast = disk / ".ballast"
    with ballast.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, file.tell() + free(disk) - leave)
    return ballast


def free(disk: Path) -> int:
    """Return how many bytes a disk has left."""
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


@contextmanager
def files_no_longer_than(num_bytes: int) -> Iterator[None]:
    """Have the system refuse, to this process, what would make a file longer (EFBIG), as a quota would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
