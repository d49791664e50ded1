"""The joint commit: every part of a run's state in one directory that is complete or does not exist.

A checkpoint is staged under a hidden name, seen to the disk and renamed into place under a name that is free, so a
commit takes nothing away. What is no longer needed goes after the new one has been verified: first its name, then its
files. So wherever a crash strikes, the newest checkpoint that was acknowledged is there and verifies.

The two halves of a commit are apart: `stage` writes, and what it writes must not change meanwhile; `finish` needs
nothing but the files, so that the run may go on.
"""

import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import manifest
from cluster.manifest import CheckpointError
from protocol.errors import UserError
from protocol.files import make_directory, sync, sync_tree

_LOG = logging.getLogger(__name__)
DRIVER_STATE = "driver.json"
_STAGING, _DISCARDED = ".staging-", ".discarded-"
_NAME = re.compile(r"r(\d+)-i(\d+)(?:\.(\d+))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint."""

    directory: Path
    driver: dict[str, Any]
    """The driver's own state: phase, counters, prompt cursor."""
    config_hash: str
    num_bytes: int
    """The size of all its files but the manifest."""

    @property
    def name(self) -> str:
        """Its directory's name."""
        return self.directory.name


def name_of(*, round: int, iteration: int) -> str:
    """Name the checkpoint that follows an iteration."""
    return f"r{round:03d}-i{iteration:06d}"


def place_of(name: str) -> tuple[int, int, int] | None:
    """Read a checkpoint's name.

    Returns:
        Its round, its iteration, and which attempt at them it is; None for a directory that somebody else has named.
    """
    found = _NAME.fullmatch(name)
    return None if found is None else (int(found[1]), int(found[2]), int(found[3] or 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """A checkpoint in the making: all of its parts are written, none of it is certain to be on the disk."""

    directory: Path
    """Under a hidden name beside the checkpoints."""
    name: str
    driver: dict[str, Any]
    config_hash: str


def stage(
    root: Path,
    name: str,
    *,
    driver: dict[str, Any],
    config_hash: str,
    write_parts: Callable[[Path], None],
) -> Staged:
    """Write the parts of a checkpoint, none of which may change until this returns; the first half of a commit.

    Args:
        root: The run's `checkpoints/` directory.
        name: What `name_of` says. If it is taken, as by a damaged checkpoint whose iterations have been repeated, the
            new one becomes another attempt: `r001-i000020.02`.
        driver: The driver's state, as plain JSON values.
        config_hash: Which configuration the state belongs to.
        write_parts: Called with the staging directory; every other part of the state is written there.

    Returns:
        What `finish` makes a checkpoint of. Nothing is left of it if this raises.

    Raises:
        ValueError: If the name is none of `name_of`'s.
    """
    if place_of(name) is None:
        raise ValueError(f"{name!r} is no checkpoint's name")
    make_directory(root)
    # A name of its own: a learner rank that outlived its driver may still be writing into the one before.
    staging = root / f"{_STAGING}{name}-{uuid.uuid4().hex[:8]}"
    staging.mkdir()
    with _nothing_left(staging):
        write_parts(staging)
        (staging / DRIVER_STATE).write_text(json.dumps(driver))
    return Staged(directory=staging, name=name, driver=driver, config_hash=config_hash)


def finish(staged: Staged) -> Checkpoint:
    """Make a checkpoint of what is staged; the second half of a commit, and the one that takes long.

    When this returns, it is on the disk; nothing that was there before has been touched.

    Returns:
        The committed checkpoint. Nothing is left of what was staged if this raises.
    """
    root = staged.directory.parent
    with _nothing_left(staged.directory):
        found = manifest.write(staged.directory, config_hash=staged.config_hash)
        sync_tree(staged.directory)
        target = _free(root, staged.name)
        staged.directory.rename(target)
    sync(root)
    return Checkpoint(directory=target, driver=staged.driver, config_hash=staged.config_hash, num_bytes=found.num_bytes)


def commit(
    root: Path,
    name: str,
    *,
    driver: dict[str, Any],
    config_hash: str,
    write_parts: Callable[[Path], None],
) -> Checkpoint:
    """Stage and finish a checkpoint, for those who can wait for both; the arguments are those of `stage`."""
    return finish(stage(root, name, driver=driver, config_hash=config_hash, write_parts=write_parts))


def verify(directory: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest, before anything is loaded from it.

    Raises:
        CheckpointError: Naming what is missing, changed or not its own.
    """
    found = manifest.read(directory)
    manifest.check_hashes(directory, found, found.files)
    return _checkpoint(directory, found)


def committed(root: Path) -> list[Path]:
    """List a run's checkpoint directories, oldest first.

    What a crash has left of a commit or a deletion is no checkpoint. A directory that somebody else has named, such as
    a copy, comes before all others: it is the last that a resume would use.
    """
    if not root.is_dir():
        return []
    directories = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    return sorted(directories, key=lambda path: (place_of(path.name) or (), path.name))


def newest(root: Path) -> Checkpoint | None:
    """Find the newest checkpoint that verifies.

    Returns:
        It, or None for a run without checkpoints.

    Raises:
        UserError: If there are checkpoints and none verifies; a run never starts fresh in place of a resume.
    """
    problems: list[str] = []
    for directory in reversed(committed(root)):
        try:
            return verify(directory)
        except CheckpointError as error:
            _LOG.warning("a damaged checkpoint is passed over: %s", error)
            problems.append(str(error))
    if problems:
        raise UserError(
            f"none of the {len(problems)} checkpoints can be used: {'; '.join(problems)}",
            where=str(root),
            next_step="restore one from a copy, or move the run directory away to start again",
        )
    return None


def retain(root: Path, latest: Checkpoint, *, choose: Callable[[Sequence[Checkpoint]], Collection[str]]) -> None:
    """Delete the checkpoints that are no longer needed, after the latest has been verified.

    Args:
        root: The run's `checkpoints/` directory.
        latest: The one committed last; always kept. Any that sorts behind it was passed over when the run resumed.
        choose: Given the checkpoints of a run, oldest first and ending with the latest, names those to keep. Damaged
            ones and earlier attempts are not among them, so they take nobody's place.

    Raises:
        CheckpointError: If the latest one does not verify; nothing is deleted then.
    """
    verify(latest.directory)
    directories = [path for path in committed(root) if place_of(path.name) is not None]
    older = directories[: directories.index(latest.directory)]
    by_place = {(place_of(path.name) or ())[:2]: found for path in older if (found := _glance(path)) is not None}
    by_place.pop((place_of(latest.name) or ())[:2], None)
    keep = {latest.name, *choose([*by_place.values(), latest])}
    for directory in directories:
        if directory.name not in keep:
            discard(directory)
    tidy(root)


def discard(directory: Path) -> None:
    """Take a checkpoint's name away for good before the first of its files, so that half of it is never a candidate."""
    hidden = directory.with_name(f"{_DISCARDED}{directory.name}-{uuid.uuid4().hex[:8]}")
    directory.rename(hidden)
    sync(directory.parent)
    _remove(hidden)


def tidy(root: Path) -> None:
    """Remove what crashes have left of commits and deletions. Call it when the checkpoint to go on from has verified.

    Args:
        root: The run's `checkpoints/` directory; need not exist.
    """
    if not root.is_dir():
        return
    for path in root.iterdir():
        if path.name.startswith((_STAGING, _DISCARDED)):
            _remove(path)


def _checkpoint(directory: Path, found: manifest.Manifest) -> Checkpoint:
    try:
        driver = json.loads((directory / DRIVER_STATE).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: {DRIVER_STATE} cannot be read: {error}") from None
    if DRIVER_STATE not in found.files or not isinstance(driver, dict):
        raise CheckpointError(f"{directory}: {DRIVER_STATE} holds no driver's state")
    return Checkpoint(directory=directory, driver=driver, config_hash=found.config_hash, num_bytes=found.num_bytes)


def _glance(directory: Path) -> Checkpoint | None:
    """Read a checkpoint's driver state, checking all but the content of the large files."""
    try:
        found = manifest.read(directory)
        manifest.check_hashes(directory, found, {DRIVER_STATE} & set(found.files))
        return _checkpoint(directory, found)
    except CheckpointError as error:
        _LOG.warning("a damaged checkpoint is not counted among those kept: %s", error)
        return None


@contextmanager
def _nothing_left(staging: Path) -> Generator[None]:
    """Give the space back if the block fails: a full disk is no place to leave half a checkpoint on."""
    try:
        yield
    except Exception:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _free(root: Path, name: str) -> Path:
    attempt, target = 1, root / name
    while os.path.lexists(target):
        attempt += 1
        target = root / f"{name}.{attempt:02d}"
    return target


def _remove(path: Path) -> None:
    try:
        if path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path)
    except OSError as error:
        # It is nobody's checkpoint any more; a file that is still open somewhere must not end the run.
        _LOG.warning("%s cannot be removed yet: %s", path, error)
