"""A checkpoint's manifest: every file with its size and SHA-256, and beside it the manifest's own SHA-256.

Everything is checked before anything is loaded, because a learner's shards are pickles and a pickle runs code when it
is read. The digests find what was damaged, cut short, added or left out. They are no signature: whoever may write the
whole directory can write a manifest to go with it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"


class CheckpointError(RuntimeError):
    """A checkpoint is damaged, or is none of this version's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What the manifest says of one file."""

    sha256: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint holds."""

    config_hash: str
    files: Mapping[str, Entry]
    """By path below the checkpoint, with slashes."""

    @property
    def num_bytes(self) -> int:
        """The size of all files together."""
        return sum(entry.num_bytes for entry in self.files.values())


def write(directory: Path, *, config_hash: str) -> Manifest:
    """Describe all files of a directory, and then the description itself.

    Args:
        directory: Holds every other file of the checkpoint already.
        config_hash: Which configuration the state belongs to.

    Returns:
        What was written.

    Raises:
        CheckpointError: If it holds something that could not be verified later, such as a symlink.
    """
    files = {
        name: Entry(sha256=_sha256(directory / name), num_bytes=(directory / name).stat().st_size)
        for name in sorted(_files(directory))
    }
    described = {name: {"sha256": entry.sha256, "bytes": entry.num_bytes} for name, entry in files.items()}
    values = {"format_version": FORMAT_VERSION, "config_hash": config_hash, "files": described}
    content = json.dumps(values, indent=1).encode()
    (directory / MANIFEST).write_bytes(content)
    (directory / DIGEST).write_bytes(_digest_line(content))
    return Manifest(config_hash=config_hash, files=files)


def read(directory: Path) -> Manifest:
    """Read a manifest, and check all that can be checked without reading the files: what is there, and how long it is.

    Raises:
        CheckpointError: Naming what is missing, too much, of another length or not its own.
    """
    if directory.is_symlink():
        raise CheckpointError(f"{directory} is a symlink: a checkpoint is refused where it may change unseen")
    try:
        found = set(_files(directory))
        if MANIFEST not in found:
            raise CheckpointError(f"{directory} has no {MANIFEST}: it was never completed")
        content = (directory / MANIFEST).read_bytes()
        if DIGEST not in found:
            raise CheckpointError(_without_digest(directory, content))
        if (directory / DIGEST).read_bytes() != _digest_line(content):
            raise CheckpointError(f"{directory}: {MANIFEST} does not match its hash in {DIGEST}")
        manifest = _parsed(directory, content)
        _check_names(directory, manifest, found - {MANIFEST, DIGEST})
        for name, entry in manifest.files.items():
            num_bytes = (directory / name).stat().st_size
            if num_bytes != entry.num_bytes:
                raise CheckpointError(f"{directory}: {name} has {num_bytes} bytes instead of {entry.num_bytes}")
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {error}") from None
    return manifest


def check_hashes(directory: Path, manifest: Manifest, names: Iterable[str]) -> None:
    """Compare the content of files with the manifest.

    Args:
        directory: Of the checkpoint.
        manifest: As `read` found it.
        names: The files to read.

    Raises:
        CheckpointError: Naming the first that differs or cannot be read.
    """
    for name in names:
        try:
            found = _sha256(directory / name)
        except OSError as error:
            raise CheckpointError(f"{directory}: {name} cannot be read: {error}") from None
        if found != manifest.files[name].sha256:
            raise CheckpointError(f"{directory}: {name} does not match its hash")


def _files(directory: Path) -> Iterator[str]:
    """List all files below a directory; only plain files and directories have a place in a checkpoint."""
    pending = [directory]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                name = Path(entry.path).relative_to(directory).as_posix()
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    yield name
                else:
                    kind = "a symlink" if entry.is_symlink() else "neither a file nor a directory"
                    raise CheckpointError(f"{directory}: {name} is {kind}: it is refused")


def _parsed(directory: Path, content: bytes) -> Manifest:
    try:
        values: Any = json.loads(content)
        version = values["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{directory} has format {version}, and this version reads {FORMAT_VERSION}")
        files = {
            str(name): Entry(sha256=str(entry["sha256"]), num_bytes=int(entry["bytes"]))
            for name, entry in values["files"].items()
        }
        return Manifest(config_hash=str(values["config_hash"]), files=files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{directory / MANIFEST} is no manifest: {error!r}") from None


def _check_names(directory: Path, manifest: Manifest, found: set[str]) -> None:
    named = set(manifest.files)
    for name in sorted(named - found):
        # An absolute path begins with an empty part.
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise CheckpointError(f"{directory}: the manifest names {name}, outside the checkpoint")
        raise CheckpointError(f"{directory}: {name} is missing")
    if found - named:
        strangers = ", ".join(sorted(found - named))
        raise CheckpointError(f"{directory}: files that the manifest does not name: {strangers}")


def _without_digest(directory: Path, content: bytes) -> str:
    try:
        first_format = json.loads(content)["format_version"] == 1
    except (ValueError, KeyError, TypeError):
        first_format = False
    if first_format:
        return (
            f"{directory} has format 1, which has no hash of its manifest: finish the run with the version of Rondo "
            "that wrote it, or start a new run from one of its exported policies"
        )
    return f"{directory} has no {DIGEST}: it was never completed"


def _digest_line(content: bytes) -> bytes:
    return f"{hashlib.sha256(content).hexdigest()}\n".encode()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
