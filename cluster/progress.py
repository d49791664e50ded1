"""Progress for people: a live line on a terminal, a plain line now and then in a job's log."""

from time import monotonic
from typing import Any

from rich.console import Console

from cluster.schedule import Phase, RunState

_PLAIN_PERIOD_S = 10.0
_PHASES = {
    Phase.SFT: "Supervised fine-tuning on the demonstrations",
    Phase.REWARD_MODEL: "Reward model from the comparisons",
    Phase.CALIBRATE: "Rollout and scoring workers; the reward model's zero and unit",
    Phase.BASELINE: "Evaluation of the supervised policy",
    Phase.OPTIMISE: "Optimising the policy",
    Phase.EVALUATE: "Evaluation of the new policy",
    Phase.DONE: "Done",
}


class Progress:
    """Prints phases as they begin and a long stage's figures as they change."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = monotonic()
        self._last_line_s = 0.0

    def announce(self, state: RunState) -> None:
        """Say which phase begins."""
        where = f"round {state.round}, {state.iteration} iterations done" if state.phase is Phase.OPTIMISE else ""
        clock = f"[{monotonic() - self._started:6.1f} s]"
        self._console.print(
            f"{clock} {_PHASES[state.phase]}{': ' + where if where else ''}", style="bold", markup=False
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
