"""How often the learner may start again, and when that is of no use."""

from collections.abc import Callable

from protocol.errors import LearnerLostError, RollbackError
from protocol.incidents import Incident


class Restarts:
    """The budget of one command.

    Args:
        allowed: How many restarts.
        report: Takes note of each, and of the one that is refused.
    """

    def __init__(self, allowed: int, *, report: Callable[[Incident], None]) -> None:
        self._left = allowed
        self._report = report
        self._rolled_back: set[tuple[int, int]] = set()

    def spend(self, error: LearnerLostError) -> None:
        """Take one restart, or stop.

        Raises:
            LearnerLostError: The error itself, if none is left, or if the learner refuses an iteration that it has
                been rolled back for: where nothing has changed, it meets the same batch for ever.
        """
        place = error.place if isinstance(error, RollbackError) else None
        refused = None
        if self._left <= 0:
            refused = "the run stops: cluster.learner_restarts is used up"
        elif place in self._rolled_back:
            refused = "the run stops: after a rollback the learner refuses the same iteration again"
        self._report(
            Incident(
                kind="learner_lost" if place is None else "rolled_back",
                what=str(error),
                where="learner",
                cause=str(error.__cause__ or ""),
                action=refused or "all ranks start again, from the last checkpoint",
                data={"stacks": error.stacks},
            )
        )
        if refused is not None:
            raise error
        self._left -= 1
        if place is not None:
            self._rolled_back.add(place)
