"""The rounds of a run as a state machine. A phase leaves something durable, and is skipped where that is there."""

from collections.abc import Callable
from typing import Protocol

from cluster import driver, schedule
from cluster.driver import Roles
from cluster.schedule import Phase, RunState
from configs.run import RunConfig
from protocol.errors import LearnerLostError
from protocol.messages import IterationReport


class Stages(Protocol):
    """What the rounds need done besides iterations; the composition root knows how."""

    def sft(self) -> None:
        """Have a supervised policy, version 0."""
        ...

    def collect(self, state: RunState) -> None:
        """Have this round's tasks for labelers."""
        ...

    def label(self, state: RunState) -> None:
        """Have them labelled."""
        ...

    def refresh(self, state: RunState) -> RunState:
        """Have this round's reward model, if it is better than the one before, and say which one scores."""
        ...

    def calibrate(self, state: RunState) -> None:
        """Have rollout and scoring workers, and fix the reward models' zero and unit."""
        ...

    def baseline(self, state: RunState) -> None:
        """Evaluate the supervised policy."""
        ...

    def roles(self, state: RunState) -> Roles:
        """Bring learner and rollout workers to the state's policy version, and return everybody."""
        ...

    def alarm(self, report: IterationReport) -> str | None:
        """Judge an iteration by the round's guards; a reason ends the round."""
        ...

    def iterated(self, report: IterationReport, state: RunState) -> None:
        """Consume an iteration: log it, and commit a checkpoint where one is due."""
        ...

    def evaluate(self, state: RunState) -> None:
        """Evaluate and export the policy that a round ends with."""
        ...

    def rank(self, state: RunState) -> RunState:
        """Place it on the ladder, and say which policy is the best."""
        ...

    def reached(self, state: RunState) -> None:
        """Make the beginning of a phase durable."""
        ...

    def recover(self, error: LearnerLostError) -> RunState:
        """Give the learner's ranks up, and say where the run goes on: at what is durable."""
        ...


def play(stages: Stages, config: RunConfig, state: RunState, *, announce: Callable[[RunState], None]) -> RunState:
    """Run all phases that are left.

    collect -> label -> refresh -> calibrate -> optimise -> evaluate -> rank -> next round
    """
    while state.phase is not Phase.DONE:
        announce(state)
        try:
            if state.phase is Phase.OPTIMISE:
                state = _optimise(stages, config, state)
            else:
                state = schedule.after(carry_out(stages, state), config)
            stages.reached(state)
        except LearnerLostError as error:
            state = stages.recover(error)
    announce(state)
    return state


def carry_out(stages: Stages, state: RunState) -> RunState:
    """Carry out a phase other than the iterations.

    Args:
        stages: Who does it.
        state: Where the run stands.

    Returns:
        The state with what the phase has decided, still in that phase.
    """
    match state.phase:
        case Phase.SFT:
            stages.sft()
        case Phase.COLLECT:
            stages.collect(state)
        case Phase.LABEL:
            stages.label(state)
        case Phase.REFRESH:
            return stages.refresh(state)
        case Phase.CALIBRATE:
            stages.calibrate(state)
        case Phase.BASELINE:
            stages.baseline(state)
        case Phase.EVALUATE:
            stages.evaluate(state)
        case Phase.RANK:
            return stages.rank(state)
    return state


def _optimise(stages: Stages, config: RunConfig, state: RunState) -> RunState:
    """Run a round's iterations until they are done or a guard stops them."""
    for report, reached in driver.optimise(stages.roles(state), config, state):
        alarm = stages.alarm(report)
        state = reached if alarm is None else schedule.stopped(reached, alarm=alarm)
        stages.iterated(report, state)
        if alarm is not None:
            break
    return state
