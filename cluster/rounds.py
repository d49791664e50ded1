"""The rounds of a run as a state machine. A phase leaves something durable, and is skipped where that is there."""

from collections.abc import Callable
from typing import Protocol

from cluster import driver, schedule
from cluster.driver import Roles
from cluster.schedule import Phase, RunState
from configs.run import RunConfig
from protocol.messages import IterationReport


class Stages(Protocol):
    """What the rounds need done besides iterations; the composition root knows how."""

    def sft(self) -> None:
        """Have a supervised policy, version 0."""
        ...

    def reward_model(self) -> None:
        """Have this round's reward model."""
        ...

    def calibrate(self) -> None:
        """Start the rollout and scoring workers, and fix the reward model's zero and unit."""
        ...

    def baseline(self) -> None:
        """Evaluate the supervised policy."""
        ...

    def roles(self, state: RunState) -> Roles:
        """Bring learner and rollout workers to the state's policy version, and return everybody."""
        ...

    def iterated(self, report: IterationReport, state: RunState) -> None:
        """Consume an iteration: log it, and commit a checkpoint where one is due."""
        ...

    def evaluate(self, state: RunState) -> None:
        """Evaluate and export the policy that a round ends with."""
        ...


def play(stages: Stages, config: RunConfig, state: RunState, *, announce: Callable[[RunState], None]) -> RunState:
    """Run all phases that are left."""
    while state.phase is not Phase.DONE:
        announce(state)
        if state.phase is Phase.OPTIMISE:
            for report, reached in driver.optimise(stages.roles(state), config, state):
                stages.iterated(report, reached)
                state = reached
            continue
        match state.phase:
            case Phase.SFT:
                stages.sft()
            case Phase.REWARD_MODEL:
                stages.reward_model()
            case Phase.CALIBRATE:
                stages.calibrate()
            case Phase.BASELINE:
                stages.baseline()
            case Phase.EVALUATE:
                stages.evaluate(state)
        state = schedule.after(state, config)
    announce(state)
    return state
