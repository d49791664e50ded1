"""Being asked to stop by a signal: what is in hand is finished and committed, within a grace time."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""SIGUSR1 is what batch systems send some time before they kill."""
EXIT_RESUMABLE = 75


class Stopped(BaseException):
    """Somebody asked the run to stop. Not a KeyboardInterrupt, which Typer turns into an exit code of its own."""


class Stopping:
    """Unwinds the run at a signal, so that workers are stopped and files closed; a second signal ends it at once."""

    def __init__(self) -> None:
        self.grace_s = 30.0
        """The process ends so long after the signal, whatever it is doing."""
        self.waits: Callable[[], bool] = lambda: False
        """Says whether something is in hand that would be lost, and that ends with a look at `asked`."""
        self.asked = False
        """Whether the run shall stop as soon as nothing is in hand."""

    def listen(self) -> None:
        """Handle the signals."""
        for number in SIGNALS:
            signal.signal(number, self._signalled)

    def _signalled(self, signum: int, frame: FrameType | None) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # Whoever stopped the run may have stopped its Ray too, and then no goodbye is answered.
        grace = threading.Timer(self.grace_s, os._exit, args=(EXIT_RESUMABLE,))
        grace.daemon = True
        grace.start()
        self.asked = True
        if not self.waits():
            raise Stopped


STOPPING = Stopping()
"""Of this process: signals know no other owner."""
