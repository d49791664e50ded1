"""Every state that a crash can leave a directory in, found by cutting a recording of real file operations off anywhere.

`record` runs real code on a real directory and notes each change as it happens: what is made, written, renamed, removed
and synced. `crash_states` then works out what may be on the disk if the power fails after any of these operations:

- The content of a file is certain once the file was synced; before, it may be whole, empty, torn in half or all zeros.
- A name that was made, changed or removed is certain once its directory was synced; before, the change may be lost,
  also where a later one is not.
- A rename happens or does not.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Tree = dict[str, "Tree | bytes"]
"""A directory: its files' contents and its directories, by name."""
_ALL_SUBSETS_UP_TO = 5


@dataclass(frozen=True)
class NamesChanged:
    """Names in one directory change together; node None is a name that is gone."""

    directory: int
    names: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True)
class Written:
    """A file has new content."""

    file: int
    content: bytes


@dataclass(frozen=True)
class Synced:
    """A file or directory was seen to the disk."""

    node: int


@dataclass(frozen=True)
class Returned:
    """The code under test has said that something is done."""

    what: Any


Operation = NamesChanged | Written | Synced | Returned


@dataclass
class Disk:
    """Files and directories by number; a directory knows its names, a file its content. Number 0 is the top."""

    directories: dict[int, dict[str, int]] = field(default_factory=lambda: {0: {}})
    contents: dict[int, bytes] = field(default_factory=dict)

    def tree(self, node: int = 0) -> Tree:
        """Lay out what can be reached from the top."""
        return {
            name: self.tree(child) if child in self.directories else self.contents[child]
            for name, child in sorted(self.directories[node].items())
        }

    def copy(self) -> "Disk":
        """Copy it, so that the copy can be changed."""
        return Disk({node: dict(names) for node, names in self.directories.items()}, dict(self.contents))

    def apply(self, operation: Operation) -> None:
        """Carry an operation out."""
        match operation:
            case NamesChanged(directory, names):
                for name, node in names:
                    if node is None:
                        self.directories[directory].pop(name, None)
                    else:
                        self.directories[directory][name] = node
            case Written(file, content):
                self.contents[file] = content
            case _:
                pass


class Recording:
    """The operations on a directory that begins empty, in their order."""

    def __init__(self, top: Path) -> None:
        self.operations: list[Operation] = []
        self.kinds: dict[int, type] = {0: dict}
        """Node -> dict for a directory, bytes for a file."""
        self._top = top.resolve()
        self._live = Disk()

    def returned(self, what: Any) -> None:
        """Note that the code under test has said that something is done."""
        self._observe()
        self.operations.append(Returned(what))

    def finish(self) -> None:
        """Note the last writes, and make sure that nothing was missed."""
        self._observe()
        assert self._live.tree() == read_tree(self._top)

    def renamed(self, source: Path, target: Path) -> None:
        """Note a rename, which is over."""
        directory, old = self._place(source)
        assert self._place(target)[0] == directory, "the model knows renames within one directory only"
        node = self._live.directories[directory][old]
        self._do(NamesChanged(directory, ((old, None), (target.name, node))))

    def removed(self, path: Path) -> None:
        """Note a removal, which is over."""
        directory, name = self._place(path)
        self._do(NamesChanged(directory, ((name, None),)))

    def synced(self, path: Path) -> None:
        """Note a sync, which is over."""
        self._do(Synced(self._node(path)))

    def before(self, path: Path) -> bool:
        """Note what has been made and written since the last operation; say whether the path is in the directory."""
        inside = path == self._top or self._top in path.parents
        if inside:
            self._observe()
        return inside

    def _do(self, operation: Operation) -> None:
        self._live.apply(operation)
        self.operations.append(operation)

    def _observe(self, node: int = 0, path: Path | None = None) -> None:
        path = self._top if path is None else path
        names = self._live.directories[node]
        found = sorted(path.iterdir())
        missing = set(names) - {child.name for child in found}
        assert not missing, f"{missing} went from {path} in a way that is not recorded"
        for child in found:
            if child.name not in names:
                self._make(node, child)
            known = names[child.name]
            if child.is_dir():
                self._observe(known, child)
            elif child.read_bytes() != self._live.contents[known]:
                self._do(Written(known, child.read_bytes()))

    def _make(self, directory: int, path: Path) -> None:
        node = len(self.kinds)
        self.kinds[node] = dict if path.is_dir() else bytes
        if path.is_dir():
            self._live.directories[node] = {}
        else:
            self._live.contents[node] = b""
        self._do(NamesChanged(directory, ((path.name, node),)))

    def _node(self, path: Path) -> int:
        node = 0
        for part in path.relative_to(self._top).parts:
            node = self._live.directories[node][part]
        return node

    def _place(self, path: Path) -> tuple[int, str]:
        return self._node(path.parent), path.name


@contextmanager
def record(top: Path) -> Iterator[Recording]:
    """Record what happens in an empty directory.

    Files and directories that are made or written are found by looking, whichever library wrote them; what takes a name
    away, and every sync, is caught at the call.
    """
    recording = Recording(top)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, _noting_rename(recording, getattr(os, name)))
        for name in ("unlink", "remove", "rmdir"):
            patch.setattr(os, name, _noting_removal(recording, getattr(os, name)))
        patch.setattr(os, "fsync", _noting_sync(recording, os.fsync))
        yield recording
    recording.finish()


def _noting_rename(recording: Recording, rename: Callable[..., None]) -> Callable[..., None]:
    def noting(source: Any, target: Any) -> None:
        inside = recording.before(_absolute(source))
        rename(source, target)
        if inside:
            recording.renamed(_absolute(source), _absolute(target))

    return noting


def _noting_removal(recording: Recording, remove: Callable[..., None]) -> Callable[..., None]:
    def noting(path: Any, *, dir_fd: int | None = None) -> None:
        place = _absolute(path, dir_fd)
        inside = recording.before(place)
        remove(path, dir_fd=dir_fd)
        if inside:
            recording.removed(place)

    return noting


def _noting_sync(recording: Recording, sync: Callable[[int], None]) -> Callable[[int], None]:
    def noting(descriptor: int) -> None:
        place = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        inside = recording.before(place)
        sync(descriptor)
        if inside:
            recording.synced(place)

    return noting


def _absolute(path: Any, directory: int | None = None) -> Path:
    base = Path.cwd() if directory is None else Path(os.readlink(f"/proc/self/fd/{directory}"))
    whole = base / path
    return whole.parent.resolve() / whole.name


@dataclass(frozen=True)
class CrashState:
    """What may be found after a crash."""

    tree: Tree
    returned: tuple[Any, ...]
    """What the code under test had said to be done."""
    after: str
    """The operation after which the power failed, for messages."""


def crash_states(recording: Recording, operations: Sequence[Operation] | None = None) -> Iterator[CrashState]:
    """Work out every state that a crash may leave, each once.

    Args:
        recording: What happened.
        operations: In place of the recorded ones, such as the same without a sync.
    """
    certain = Disk()
    for node, kind in recording.kinds.items():
        if kind is dict:
            certain.directories.setdefault(node, {})
        else:
            certain.contents[node] = b""
    unsynced_names: list[NamesChanged] = []
    unsynced_files: dict[int, bytes] = {}
    returned: list[Any] = []
    seen: set[str] = set()
    chosen = recording.operations if operations is None else operations
    for number, operation in enumerate(chosen):
        match operation:
            case NamesChanged():
                unsynced_names.append(operation)
            case Written(file, content):
                unsynced_files[file] = content
            case Synced(node):
                for change in unsynced_names:
                    if change.directory == node:
                        certain.apply(change)
                unsynced_names = [change for change in unsynced_names if change.directory != node]
                if node in unsynced_files:
                    certain.contents[node] = unsynced_files.pop(node)
            case Returned(what):
                returned.append(what)
        for tree in _possible(certain, unsynced_names, unsynced_files):
            key = repr((tree, returned))
            if key not in seen:
                seen.add(key)
                yield CrashState(tree, tuple(returned), f"operation {number}: {operation}")


def _possible(certain: Disk, names: Sequence[NamesChanged], files: dict[int, bytes]) -> Iterator[Tree]:
    for contents in _possible_contents(files):
        for surviving in _possible_names(names):
            disk = certain.copy()
            disk.contents.update(contents)
            for change in surviving:
                disk.apply(change)
            yield disk.tree()


def _possible_contents(files: dict[int, bytes]) -> Iterator[dict[int, bytes]]:
    """All files whole, empty, torn or zeroed alike, and each alone while the others are whole."""
    yield files
    spoilt = (lambda c: b"", lambda c: c[: len(c) // 2], lambda c: bytes(len(c)))
    for spoil in spoilt:
        yield {file: spoil(content) for file, content in files.items()}
        for alone in files:
            yield {**files, alone: spoil(files[alone])}


def _possible_names(names: Sequence[NamesChanged]) -> Iterator[Sequence[NamesChanged]]:
    """Any subset of a few; of many, all up to one, all from one on, all but one, and one alone."""
    count = len(names)
    if count <= _ALL_SUBSETS_UP_TO:
        for mask in range(2**count):
            yield [change for place, change in enumerate(names) if mask >> place & 1]
        return
    for place in range(count + 1):
        yield names[:place]
        yield names[place:]
        yield [*names[:place], *names[place + 1 :]]
        yield names[place : place + 1]


def shape(tree: Tree) -> str:
    """Spell a directory's names without its files' contents."""
    return repr({name: None if isinstance(found, bytes) else shape(found) for name, found in tree.items()})


def read_tree(directory: Path) -> Tree:
    """Read a directory as it is."""
    return {path.name: read_tree(path) if path.is_dir() else path.read_bytes() for path in sorted(directory.iterdir())}


def write_tree(directory: Path, tree: Tree) -> None:
    """Make a directory as a crash may have left it."""
    directory.mkdir()
    for name, found in tree.items():
        if isinstance(found, bytes):
            (directory / name).write_bytes(found)
        else:
            write_tree(directory / name, found)
