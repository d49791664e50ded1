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


class Resumable(RuntimeError):
    """A run that has stopped in good order, for a reason that is nobody's mistake; the same command goes on."""
