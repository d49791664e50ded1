"""Deadlines from measured durations: a wait that usually takes seconds is not waited for by the hour.

The configured bounds (`cluster.deadlines.generate_s` and so on) must fit the largest batch of the slowest start, so a
group that hangs as a whole would cost all of that. Once a kind of work has been done a few times, it is bounded by

    min(configured, max(floor_s, multiple x the longest of the last 20))

What must not expire wrongly, and why it does not:

- The first work after a start (it compiles, fills caches, finds its files cold): the configured bound holds until three
  have been measured, and the slow first one is among them.
- A restart or a replacement: `forget` begins again, so the batch in which a replacement starts, and those after it,
  have the configured bound. A batch that was disturbed is not measured.
- More work than before (an evaluation after small batches): a duration counts in proportion to the size of its work. A
  smaller batch than those measured is given as long as they were.
- Responses that grow longer, a critic that is joined by the policy, a busy machine: `multiple` is for these.
- A worker that is silent: whoever waits asks before it gives up, so silence is named as such.
"""

from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from time import monotonic
from typing import Literal, NamedTuple

from configs.cluster import DeadlinesConfig

Kind = Literal["start", "generate", "score", "learn", "publish", "checkpoint"]
_MIN_SAMPLES = 3
_WINDOW = 20


class Bound(NamedTuple):
    """How long a wait may take."""

    seconds: float
    key: str
    """The configuration key that says so, and what was measured, for messages."""


class _Measured(NamedTuple):
    seconds: float
    size: int


class Deadlines:
    """Bounds the waits of one group of workers.

    Args:
        config: The configured bounds, and how measured ones are made.
    """

    def __init__(self, config: DeadlinesConfig) -> None:
        self._config = config
        self._measured: dict[tuple[str, str], deque[_Measured]] = {}
        self._epoch = 0

    def bound(self, kind: Kind, work: str = "", *, size: int = 1) -> Bound:
        """Say how long work may take.

        Args:
            kind: Whose configured bound is the longest.
            work: What is done; each has durations of its own.
            size: How much there is of it: requests, tokens, or 1 where it is always the same.

        Returns:
            The bound.
        """
        key = f"cluster.deadlines.{kind}_s"
        configured = Bound(getattr(self._config, f"{kind}_s"), key)
        found = self._measured.get((kind, work), ())
        if len(found) < _MIN_SAMPLES or kind == "start":  # a start may find its files cold at any time
            return configured
        longest = max(seconds * max(1.0, size / measured) for seconds, measured in found)
        floor_s, multiple = self._config.floor_s, self._config.multiple
        derived = max(floor_s, multiple * longest)
        if derived >= configured.seconds:
            return configured
        rule = "floor_s" if derived == floor_s else f"multiple = {multiple:g}"
        seen = f"the longest of the last {len(found)} took {longest:.3g} s; {key} = {configured.seconds:g} s"
        return Bound(derived, f"cluster.deadlines.{rule} ({seen})")

    @contextmanager
    def measuring(self, kind: Kind, work: str = "", *, size: int = 1, since: float | None = None) -> Generator[None]:
        """Measure work that goes well and that nobody's loss disturbs; `since` is when it began, if before now."""
        began, epoch = monotonic() if since is None else since, self._epoch
        yield
        if epoch == self._epoch:
            self.measured(kind, work, seconds=monotonic() - began, size=size)

    def measured(self, kind: Kind, work: str = "", *, seconds: float, size: int = 1) -> None:
        """Take note of a duration."""
        self._measured.setdefault((kind, work), deque(maxlen=_WINDOW)).append(_Measured(seconds, max(size, 1)))

    def forget(self) -> None:
        """Begin again, as after a replacement: what was measured says nothing about workers that have just started."""
        self._measured.clear()
        self._epoch += 1
