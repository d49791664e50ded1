"""The joint commit: every part of a run's state in one directory that is complete or does not exist.

A checkpoint is staged beside its place, synced to disk, and renamed into place; its manifest, with the SHA-256 of every
file, is written last. Old checkpoints go only after a new one has been verified.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protocol.errors import UserError
from protocol.files import sync

FORMAT_VERSION = 1
_LOG = logging.getLogger(__name__)
MANIFEST = "manifest.json"
DRIVER_STATE = "driver.json"
_STAGING = ".staging-"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or belongs to another run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A committed checkpoint."""

    directory: Path
    driver: dict[str, Any]
    """The driver's own state: phase, counters, prompt cursor, baseline evaluation."""
    config_hash: str


def commit(
    root: Path,
    name: str,
    *,
    driver: dict[str, Any],
    config_hash: str,
    write_parts: Callable[[Path], None],
) -> Checkpoint:
    """Write one checkpoint.

    Args:
        root: The run's `checkpoints/` directory.
        name: The new checkpoint's directory name; sorts after the older ones.
        driver: The driver's state, as plain JSON values.
        config_hash: Which configuration the state belongs to.
        write_parts: Called with the staging directory; every other part of the state is written there.

    Returns:
        The committed checkpoint.
    """
    root.mkdir(parents=True, exist_ok=True)
    staging = root / f"{_STAGING}{name}"
    if staging.exists():
        shutil.rmtree(staging)
    staging.mkdir()
    write_parts(staging)
    (staging / DRIVER_STATE).write_text(json.dumps(driver))
    files = {str(path.relative_to(staging)): _sha256(path) for path in _files(staging)}
    manifest = {"format_version": FORMAT_VERSION, "config_hash": config_hash, "files": files}
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*_files(staging), *(p for p in staging.rglob("*") if p.is_dir()), staging):
        sync(path)
    target = root / name
    if target.exists():
        shutil.rmtree(target)
    staging.rename(target)
    sync(root)
    return Checkpoint(directory=target, driver=driver, config_hash=config_hash)


def verify(directory: Path) -> Checkpoint:
    """Check every file of a checkpoint against its manifest, before anything is loaded from it.

    Raises:
        CheckpointError: Naming what is missing, changed or not its own.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{directory} has no {MANIFEST}: it was never completed") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{directory / MANIFEST} is damaged: {error}") from None
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(f"{directory} has format {manifest.get('format_version')}, this is {FORMAT_VERSION}")
    for name, expected in manifest["files"].items():
        path = directory / name
        if path.resolve().parent != path.parent.resolve() or directory.resolve() not in path.resolve().parents:
            raise CheckpointError(f"{directory}: the manifest names {name}, outside the checkpoint")
        if not path.is_file():
            raise CheckpointError(f"{directory}: {name} is missing")
        if _sha256(path) != expected:
            raise CheckpointError(f"{directory}: {name} does not match its hash")
    extra = {str(p.relative_to(directory)) for p in _files(directory)} - set(manifest["files"]) - {MANIFEST}
    if extra:
        raise CheckpointError(f"{directory}: files that the manifest does not name: {', '.join(sorted(extra))}")
    driver = json.loads((directory / DRIVER_STATE).read_text())
    return Checkpoint(directory=directory, driver=driver, config_hash=manifest["config_hash"])


def committed(root: Path) -> list[Path]:
    """List a run's checkpoint directories, oldest first. Staging leftovers are no checkpoints."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def newest(root: Path) -> Checkpoint | None:
    """Find the newest checkpoint that verifies.

    Returns:
        It, or None for a run without checkpoints.

    Raises:
        UserError: If there are checkpoints and none verifies; a run never starts fresh in place of a resume.
    """
    directories = committed(root)
    problems: list[str] = []
    for directory in reversed(directories):
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


def retain(root: Path, *, keep: int) -> None:
    """Delete all but the newest checkpoints, after the newest has been verified.

    Raises:
        CheckpointError: If the newest one does not verify; nothing is deleted then.
    """
    directories = committed(root)
    if directories:
        verify(directories[-1])
    for directory in directories[: -max(1, keep)]:
        shutil.rmtree(directory)


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
