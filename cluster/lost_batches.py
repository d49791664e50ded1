"""Batches that are lost with a node before anything was learned from them."""

from collections.abc import Callable

from protocol.errors import LostDataError
from protocol.incidents import Incident


class LostBatches:
    """Keeps a record of each lost batch, and bounds how many may be sampled again.

    Args:
        report: Takes note of faults.
        allowed: So many batches.
    """

    def __init__(self, report: Callable[[Incident], None], *, allowed: int) -> None:
        self._report = report
        self._left = allowed

    def __call__(self, error: LostDataError) -> None:
        """Take note of a lost batch.

        Raises:
            LostDataError: If it is one too many.
        """
        spent = self._left <= 0
        self._left -= 1
        again = "the batch is sampled again, with the same keys and seeds"
        self._report(
            Incident(
                kind="batch_lost",
                what=str(error),
                where="the batch in hand",
                cause=str(error.__cause__ or ""),
                action="the run stops: cluster.worker_replacements batches were sampled again" if spent else again,
            )
        )
        if spent:
            raise error
