"""What comes next: phases, keys, groups and seeds. Pure functions of the configuration and of how far the run is."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any, Self

from configs.run import RunConfig
from protocol.messages import Prompt, RolloutKey, RolloutRequest

EVALUATION = -1
"""In place of an iteration's number, in the keys of evaluation samples."""
CALIBRATION = -2
"""Likewise for the samples that fix a reward model's zero and unit."""


class Phase(StrEnum):
    """The phases of a run, in their order."""

    SFT = "sft"
    REWARD_MODEL = "reward_model"
    CALIBRATE = "calibrate"
    BASELINE = "baseline"
    OPTIMISE = "optimise"
    EVALUATE = "evaluate"
    DONE = "done"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """How far a run is. Together with the configuration and the data it decides everything that follows."""

    phase: Phase = Phase.SFT
    round: int = 1
    iteration: int = 0
    """Iterations done in this round."""
    policy_version: int = 0

    def to_json(self) -> dict[str, Any]:
        """Write the state as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what `to_json` wrote."""
        numbers = {name: int(values[name]) for name in ("round", "iteration", "policy_version")}
        return cls(phase=Phase(values["phase"]), **numbers)


def after(state: RunState, config: RunConfig) -> RunState:
    """Say what follows a finished phase (or, while optimising, a finished iteration)."""
    match state.phase:
        case Phase.SFT:
            return replace(state, phase=Phase.REWARD_MODEL)
        case Phase.REWARD_MODEL:
            return replace(state, phase=Phase.CALIBRATE)
        case Phase.CALIBRATE:
            return replace(state, phase=Phase.BASELINE)
        case Phase.BASELINE:
            return replace(state, phase=Phase.OPTIMISE)
        case Phase.OPTIMISE:
            done = state.iteration + 1
            phase = Phase.EVALUATE if done >= config.rounds.iterations else Phase.OPTIMISE
            return replace(state, phase=phase, iteration=done, policy_version=state.policy_version + 1)
        case Phase.EVALUATE:
            return replace(state, phase=Phase.DONE)
        case Phase.DONE:
            return state


def checkpoint_is_due(state: RunState, config: RunConfig) -> bool:
    """Whether a checkpoint follows the iteration that led to this state."""
    period = config.cluster.checkpoint_period_iterations
    return state.iteration % period == 0 or state.phase is not Phase.OPTIMISE


def requests(
    prompts: Sequence[Prompt], config: RunConfig, *, round: int, iteration: int, samples: int | None = None
) -> tuple[RolloutRequest, ...]:
    """Turn prompts into requests, in key order within each prompt's place.

    A prompt that comes twice in one batch gets further sample numbers, so that keys stay unique.
    """
    num_samples = config.rollout.samples_per_prompt if samples is None else samples
    seen: dict[str, int] = {}
    result: list[RolloutRequest] = []
    for prompt in prompts:
        first = seen.get(prompt.prompt_id, 0)
        seen[prompt.prompt_id] = first + num_samples
        for sample in range(first, first + num_samples):
            key = RolloutKey(round=round, iteration=iteration, prompt_id=prompt.prompt_id, sample=sample)
            result.append(
                RolloutRequest(
                    key=key,
                    prompt=prompt,
                    seed=key.seed(config.run.seed),
                    max_response_tokens=config.rollout.max_response_tokens,
                )
            )
    return tuple(result)


def groups(keys: Sequence[RolloutKey], *, size: int) -> tuple[tuple[RolloutKey, ...], ...]:
    """Form scoring groups by position in the batch, never by time of arrival."""
    return tuple(tuple(keys[start : start + size]) for start in range(0, len(keys), size))


def shares(num: int, *, workers: int) -> tuple[range, ...]:
    """Deal requests out to rollout workers: worker w gets the positions w, w + W, w + 2W, ..."""
    return tuple(range(worker, num, workers) for worker in range(workers))
