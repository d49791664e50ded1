"""Commits checkpoints while the run goes on: what has to stand still is staged, the rest is done by a thread.

The learner's ranks write their parts into a staging directory; that is the consistent snapshot, and the run waits for
it. Hashes, manifest, syncs, renaming, reading back and the deletion of old checkpoints need nothing but those files. At
most one commit is under way. It counts when it is over and somebody has taken note, so `latest` is never ahead of the
disk.

A disk that takes no more is no reason to lose what the learner holds. A commit that fails for that leaves nothing
behind and is an incident, and the run goes on, for so many failures in a row as the configuration allows.
"""

import errno
import shutil
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from cluster import checkpoint
from cluster.checkpoint import Checkpoint, Staged
from cluster.manifest import CheckpointError
from cluster.supervision import DeadlineError
from configs.cluster import ClusterConfig
from protocol.errors import StorageError, UserError
from protocol.files import space_command, storage_failure
from protocol.incidents import Incident

Choose = Callable[[Sequence[Checkpoint]], Collection[str]]
_ROOM = 1.2
"""So many times the last checkpoint's size must be free before the next one is begun."""
_GIB = 2**30


class _Commit(threading.Thread):
    """All of a commit that the learner need not stand still for. What has become of it is read when it is over."""

    def __init__(self, staged: Staged, *, choose: Choose) -> None:
        # A daemon: a disk that hangs must not keep the process alive. What is left half done is no checkpoint.
        super().__init__(name=f"commit {staged.name}", daemon=True)
        self.staged = staged
        self.found: Checkpoint | None = None
        self.error: Exception | None = None
        self._choose = choose

    def run(self) -> None:
        try:
            self.found = checkpoint.finish(self.staged)
            self._retain(self.found)
        except Exception as error:  # noqa: BLE001 - it is raised where the commit is waited for
            self.error = error

    @property
    def told(self) -> str:
        """What there is to say if something went wrong."""
        if self.found is None:
            return _lacking(self.staged.name)
        return f"checkpoint {self.found.name} was committed, but what it replaces cannot be removed"

    def _retain(self, found: Checkpoint) -> None:
        try:
            checkpoint.retain(found.directory.parent, found, choose=self._choose)
        except CheckpointError as error:
            self.found = None
            # It must take no sound one's place.
            checkpoint.discard(found.directory)
            raise OSError(errno.EIO, f"it does not read back as it was written: {error}") from error


class Committer:
    """One run's checkpoints in the making.

    Args:
        root: The run's `checkpoints/` directory.
        settings: The deadline of a commit, and how many may fail in a row.
        report: Takes incidents.
    """

    def __init__(self, root: Path, *, settings: ClusterConfig, report: Callable[[Incident], None]) -> None:
        self._root = root
        self._deadline_s = settings.deadlines.checkpoint_s
        self._allowed = settings.checkpoint_failures_allowed
        self._report = report
        self._current: _Commit | None = None
        self._failures = 0
        self.latest: Checkpoint | None = None
        """The newest acknowledged checkpoint: one that was committed and read back, or that a resume has verified."""

    def begin(
        self,
        name: str,
        *,
        driver: dict[str, Any],
        config_hash: str,
        write_parts: Callable[[Path], None],
        choose: Choose,
    ) -> None:
        """Stage a checkpoint and have the rest done meanwhile; one that is under way is waited for first.

        Args:
            name: As `checkpoint.stage` has it.
            driver: Likewise.
            config_hash: Likewise.
            write_parts: Likewise.
            choose: As `checkpoint.retain` has it; called by the thread.

        Raises:
            StorageError: If the disk does not take it, and too many before it were not taken either.
            DeadlineError: If the one before is not over in time.
            Exception: Whatever else failed, of this one's staging or of the one before.
        """
        self.settle()
        try:
            self._require_room()
            staged = checkpoint.stage(self._root, name, driver=driver, config_hash=config_hash, write_parts=write_parts)
        except Exception as error:  # noqa: BLE001 - what is no failure of the disk is raised again
            self._failed(_lacking(name), error)
            return
        self._current = _Commit(staged, choose=choose)
        self._current.start()

    def attend(self) -> None:
        """Take note of a commit that has come to its end, if there is one; wait for nothing.

        Raises:
            Exception: As `settle` does, but for the deadline.
        """
        if self._current is not None and not self._current.is_alive():
            self._conclude(self._current)

    def settle(self) -> None:
        """Wait until no commit is under way. Whoever relies on one calls this first.

        Raises:
            StorageError: If the disk does not take it, and too many before it were not taken either.
            DeadlineError: If it is not over within `cluster.deadlines.checkpoint_s`; nobody waits for it again.
            Exception: Whatever else failed.
        """
        commit = self._current
        if commit is None:
            return
        commit.join(self._deadline_s)
        if commit.is_alive():
            self._current = None
            raise DeadlineError(
                f"the commit of {commit.staged.name} in {self._root}: hashing, syncing and renaming did not end within "
                f"cluster.deadlines.checkpoint_s = {self._deadline_s:g} s"
            )
        self._conclude(commit)

    def close(self, *, wait_s: float) -> None:
        """Give a commit that is under way the time to end, and say what became of it; something else ends the run.

        Args:
            wait_s: The bound. What is not done by then is done by no one, and the checkpoint before it stands.
        """
        commit, self._current = self._current, None
        if commit is None:
            return
        commit.join(min(wait_s, self._deadline_s))
        if commit.is_alive():
            self._tell(commit.told, f"not over after {wait_s:g} s", action="the run ends meanwhile")
        elif commit.error is not None:
            self._tell(commit.told, str(commit.error), action="the run ends")

    def _conclude(self, commit: _Commit) -> None:
        self._current = None
        if commit.found is not None:
            self.latest = commit.found
        if commit.error is None:
            self._failures = 0
        else:
            self._failed(commit.told, commit.error)

    def _require_room(self) -> None:
        if self.latest is None:
            return
        needed = int(_ROOM * self.latest.num_bytes)
        free = shutil.disk_usage(self._root).free
        if free < needed:
            text = f"{free / _GIB:.3g} GiB are free, and {_ROOM} x the last checkpoint are {needed / _GIB:.3g} GiB"
            raise OSError(errno.ENOSPC, text, str(self._root))

    def _failed(self, what: str, error: Exception) -> None:
        """Go on after a failure of the disk, as long as that is allowed."""
        failure = storage_failure(error)
        if failure is None:
            raise error
        self._failures += 1
        count = f"failure {self._failures} in a row, cluster.checkpoint_failures_allowed = {self._allowed}"
        standing = "there is no checkpoint yet" if self.latest is None else f"{self.latest.directory} stands"
        stops = self._failures > self._allowed
        self._tell(what, str(failure), action=f"{'the run stops' if stops else 'the run goes on'}: {count}; {standing}")
        if stops:
            told = UserError(
                f"checkpoints failed {self._failures} times in a row; {standing}",
                where=str(self._root),
                cause=str(failure),
                next_step=f"{space_command(self._root)}; then the same command goes on from there",
            )
            raise StorageError(str(told)) from error

    def _tell(self, what: str, cause: str, *, action: str) -> None:
        self._report(
            Incident(
                kind="checkpoint_failed",
                what=f"{what}: {cause}",
                where=str(self._root),
                cause=cause,
                action=action,
                data={"next": space_command(self._root)},
            )
        )


def _lacking(name: str) -> str:
    return f"checkpoint {name} was not committed"
