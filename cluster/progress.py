"""Progress for people: a live line on a terminal, a plain line now and then in a job's log."""

from collections.abc import Callable
from time import monotonic
from typing import Any

from rich.console import Console

from cluster.schedule import Phase, RunState

_PLAIN_PERIOD_S = 10.0
_PHASES = {
    Phase.SFT: "Supervised fine-tuning on the demonstrations",
    Phase.COLLECT: "Collecting responses to compare",
    Phase.LABEL: "Labelling the comparisons",
    Phase.REFRESH: "Reward model from the comparisons",
    Phase.CALIBRATE: "Rollout and scoring workers; the reward model's zero and unit",
    Phase.BASELINE: "The supervised policy's responses to the held-out prompts",
    Phase.OPTIMISE: "Optimising the policy",
    Phase.EVALUATE: "Evaluation of the new policy",
    Phase.RANK: "Its place on the ladder",
    Phase.DONE: "Done",
}


class Progress:
    """Prints phases as they begin and a long stage's figures as they change."""

    def __init__(self, console: Console, *, collects: Callable[[int], bool]) -> None:
        """Begin to count the time.

        Args:
            console: Where to print.
            collects: Says whether a round collects comparisons.
        """
        self._console = console
        self._collects = collects
        self._started = monotonic()
        self._last_line_s = 0.0

    def announce(self, state: RunState) -> None:
        """Say which phase begins."""
        if state.phase in (Phase.COLLECT, Phase.LABEL) and not self._collects(state.round):
            return
        where = "" if state.phase in (Phase.SFT, Phase.BASELINE, Phase.DONE) else f"Round {state.round}: "
        done = f", {state.iteration} iterations done" if state.phase is Phase.OPTIMISE and state.iteration else ""
        self.say(f"{where}{_PHASES[state.phase]}{done}", style="bold")

    def say(self, what: str, *, style: str | None = None) -> None:
        """Print a line with the time since the start."""
        self._console.print(
            f"[{monotonic() - self._started:6.1f} s] {what}", style=style, markup=False, highlight=False
        )

    def __call__(self, stage: str, status: dict[str, Any]) -> None:
        """Show the figures of a running stage, not more often than a person or a log can bear."""
        figures = status.get("progress")
        period = 2.0 if self._console.is_terminal else _PLAIN_PERIOD_S
        if not figures or monotonic() - self._last_line_s < period:
            return
        self._last_line_s = monotonic()
        text = "  ".join(f"{name} {_spell(value)}" for name, value in figures.items())
        self._console.print(f"           {stage}: {text}", markup=False, highlight=False)


def _spell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
