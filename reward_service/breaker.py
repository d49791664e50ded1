"""A circuit breaker: a server that has failed again and again is left alone for a while."""

import time
from collections.abc import Callable


class Breaker:
    """Opens after so many failures in a row, and then lets one call through in every cooldown, as a probe.

    Args:
        failures: Failures in a row that open it.
        cooldown_s: How long it stays open before a probe may go through, and after a probe that brought nothing.
        clock: Seconds, counted from anywhere.
    """

    def __init__(self, *, failures: int, cooldown_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._failures = failures
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._in_a_row = 0
        self._open_until_s: float | None = None

    def refusal_s(self) -> float:
        """Ask whether a call may be made now.

        Returns:
            0 if it may: then `succeeded` or `failed` follows. Otherwise the seconds until the next probe.
        """
        if self._open_until_s is None:
            return 0.0
        now = self._clock()
        if now < self._open_until_s:
            return self._open_until_s - now
        # Whoever asks while the probe is under way waits as if it had failed.
        self._open_until_s = now + self._cooldown_s
        return 0.0

    def succeeded(self) -> None:
        """Take note that the server answered, well or not."""
        self._in_a_row = 0
        self._open_until_s = None

    def failed(self) -> None:
        """Take note that the server left a call unanswered."""
        self._in_a_row += 1
        if self._in_a_row >= self._failures:
            self._open_until_s = self._clock() + self._cooldown_s
