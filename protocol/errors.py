"""The error that a person can act on: what happened, where, why, and what to do next."""

from collections.abc import Mapping


class UserError(Exception):
    """Report a mistake in what the user gave (a config, a file, a flag), not a fault of the program.

    It survives pickling, so that a worker may raise it and the driver may show it.

    Args:
        what: What happened, in one sentence without a full stop.
        where: The file and line, the config key or the component.
        cause: The likely cause.
        next_step: What to do about it, best as a command or an edit.
    """

    def __init__(
        self, what: str, *, where: str | None = None, cause: str | None = None, next_step: str | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.cause = cause
        self.next_step = next_step

    def at(self, where: str, *, next_step: str | None = None) -> "UserError":
        """Return the same error placed at `where`; a place that is already known is kept behind it.

        Args:
            where: The place.
            next_step: What to do about it, unless the error says that itself.
        """
        place = where if self.where is None else f"{where}, {self.where}"
        return UserError(self.what, where=place, cause=self.cause, next_step=self.next_step or next_step)

    def __str__(self) -> str:
        parts = [_sentence(self.what if self.where is None else f"{self.where}: {self.what}")]
        if self.cause is not None:
            parts.append(_sentence(f"Likely cause: {self.cause}"))
        if self.next_step is not None:
            parts.append(_sentence(f"Next: {self.next_step}"))
        return " ".join(parts)


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text if text.endswith((".", "!", "?")) else text + "."


class WorkersLostError(RuntimeError):
    """More workers failed than may be replaced."""


class NoPlaceError(WorkersLostError):
    """The cluster has no room for a worker whose place was lost."""


class LostDataError(RuntimeError):
    """What a worker was to fetch lay on a node or with a worker that is gone; it must be made again."""


class LearnerLostError(RuntimeError):
    """A rank of the learner died or does not answer; the ranks start again together, from the last checkpoint.

    Args:
        what: Which ranks, and what was seen of them.
        stacks: Rank -> what its process was doing, where that is known.
    """

    def __init__(self, what: str, *, stacks: Mapping[str, str] | None = None) -> None:
        super().__init__(what)
        self.stacks = dict(stacks or {})


class BatchRefusedError(RuntimeError):
    """A batch that must not be learned from; weights, optimizer and counters are as they were before it or its step."""


class NonFiniteError(BatchRefusedError):
    """A number that must be finite is not.

    Args:
        what: The quantity, such as "gradient of the policy".
        where: The step or the rollout key.
    """

    def __init__(self, what: str, where: str) -> None:
        super().__init__(what, where)
        self.what = what
        self.where = where

    def __str__(self) -> str:
        return f"{self.what} is not finite at {self.where}"


class UntrustedBatchError(BatchRefusedError):
    """A batch that was not sampled by the policy that it must come from."""


class RollbackError(LearnerLostError):
    """The learner refuses a batch, and `learner.on_nonfinite` says that it goes back to the last checkpoint.

    Args:
        what: Why it refuses.
        round: In which round.
        iteration: In which iteration of it.
    """

    def __init__(self, what: str, *, round: int, iteration: int) -> None:
        super().__init__(f"iteration {iteration} of round {round}: {what}")
        self.place = (round, iteration)


class Resumable(RuntimeError):
    """A run that has stopped in good order, for a reason that is nobody's mistake; the same command goes on."""


class StorageError(RuntimeError):
    """A disk that does not take what must be kept: it is full, over a quota, read-only or broken.

    It is no mistake in what the user gave, but its message reads like a UserError's: it names the file and what to do.
    The same command goes on when the disk is in order.
    """
