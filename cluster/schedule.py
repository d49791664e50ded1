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
JUDGING = -3
"""Likewise for a judge's answers."""
COLLECTION = -4
"""Likewise for the responses that are put before labelers; of several policies the second has -5, and so on."""


class Phase(StrEnum):
    """The phases of a run. `SFT` and `BASELINE` come once, the others in every round, in this order."""

    SFT = "sft"
    COLLECT = "collect"
    LABEL = "label"
    REFRESH = "refresh"
    CALIBRATE = "calibrate"
    BASELINE = "baseline"
    OPTIMISE = "optimise"
    EVALUATE = "evaluate"
    RANK = "rank"
    DONE = "done"


_ORDER = {phase: number for number, phase in enumerate(Phase)}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """How far a run is. Together with the configuration and the data it decides everything that follows."""

    phase: Phase = Phase.SFT
    round: int = 1
    iteration: int = 0
    """Iterations done in this round."""
    policy_version: int = 0
    reward_version: int | None = None
    """The reward model that scores; a round's first is numbered one less than the round."""
    best_version: int = 0
    """The policy that the ladder holds for the best."""
    last_version: int = 0
    """The policy that the round before ended with."""
    alarm: str | None = None
    """Why a guard stopped this round early."""

    @property
    def position(self) -> tuple[int, int, int]:
        """Where the run stands; grows as it goes on."""
        return self.round, _ORDER[self.phase], self.iteration

    def to_json(self) -> dict[str, Any]:
        """Write the state as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError: If that is not what the values are.
        """
        rest = {name: value for name, value in values.items() if name != "phase"}
        state = cls(phase=Phase(values["phase"]), **rest)
        counts = (state.round, state.iteration, state.policy_version, state.best_version, state.last_version)
        if any(type(count) is not int or count < 0 for count in counts):
            raise ValueError(f"a count is no whole number: {values}")
        return state


def after(state: RunState, config: RunConfig) -> RunState:
    """Say what follows a finished phase (or, while optimising, a finished iteration)."""
    match state.phase:
        case Phase.OPTIMISE:
            done = state.iteration + 1
            phase = Phase.EVALUATE if done >= config.rounds.of(state.round).iterations else Phase.OPTIMISE
            return replace(state, phase=phase, iteration=done, policy_version=state.policy_version + 1)
        case Phase.CALIBRATE if state.round == 1:
            return replace(state, phase=Phase.BASELINE)
        case Phase.CALIBRATE:
            return _optimising(state)
        case Phase.BASELINE:
            return _optimising(state)
        case Phase.RANK if state.round < config.rounds.count:
            return replace(
                state,
                phase=Phase.COLLECT,
                round=state.round + 1,
                iteration=0,
                last_version=state.policy_version,
                alarm=None,
            )
        case Phase.DONE:
            return state
        case phase:
            following = Phase.DONE if phase is Phase.RANK else list(Phase)[_ORDER[phase] + 1]
            return replace(state, phase=following)


def _optimising(state: RunState) -> RunState:
    """Begin a round's iterations; from the second round on, what they start from is published as a version."""
    version = state.policy_version + (state.round > 1)
    return replace(state, phase=Phase.OPTIMISE, policy_version=version)


def stopped(state: RunState, *, alarm: str) -> RunState:
    """End a round's iterations early."""
    return replace(state, phase=Phase.EVALUATE, alarm=alarm)


def scored_by(state: RunState, reward_version: int | None) -> RunState:
    """Take note of the reward model that scores."""
    return replace(state, reward_version=reward_version)


def promoted(state: RunState, best_version: int) -> RunState:
    """Take note of the best policy."""
    return replace(state, best_version=best_version)


def named_version(name: str, state: RunState) -> int:
    """Turn a policy's name in the configuration into its version.

    Args:
        name: `sft`, `current`, `previous`, `best`, or a version such as `v020`.
        state: Where the run stands.

    Returns:
        The version; `current` and `previous` are what the round before ended with, once there was one.
    """
    match name:
        case "sft":
            return 0
        case "current" | "previous":
            return state.last_version
        case "best":
            return state.best_version
        case _:
            return int(name[1:])


def checkpoint_is_due(state: RunState, config: RunConfig) -> bool:
    """Whether a checkpoint follows the iteration that led to this state."""
    period = config.cluster.checkpoint_period_iterations
    return state.iteration % period == 0 or state.phase is not Phase.OPTIMISE


def goes_on_from(saved: RunState, state: RunState) -> bool:
    """Say whether what is saved is the end of the iterations that a phase after them follows.

    Args:
        saved: What a checkpoint holds.
        state: The beginning of a phase: of one that follows its round's iterations, or the round before's.
    """
    iterated = _ORDER[state.phase] > _ORDER[Phase.OPTIMISE]
    return saved.phase is Phase.EVALUATE and saved.round == state.round - (not iterated)


def requests(
    prompts: Sequence[Prompt],
    config: RunConfig,
    *,
    round: int,
    iteration: int,
    samples: int | None = None,
    temperatures: Sequence[float] | None = None,
) -> tuple[RolloutRequest, ...]:
    """Turn prompts into requests, in key order within each prompt's place.

    A prompt that comes twice in one batch gets further sample numbers, so that keys stay unique.

    Args:
        prompts: In the order of the batch.
        config: The run's configuration.
        round: For the keys.
        iteration: Likewise.
        samples: Responses a prompt; the configured number if not given.
        temperatures: Dealt out over a prompt's samples in turn; the configured one if not given.

    Returns:
        One request a response.
    """
    num_samples = config.rollout.samples_per_prompt if samples is None else samples
    dealt = temperatures or (config.rollout.temperature,)
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
                    temperature=dealt[(sample - first) % len(dealt)],
                )
            )
    return tuple(result)


def groups(keys: Sequence[RolloutKey], *, size: int) -> tuple[tuple[RolloutKey, ...], ...]:
    """Form scoring groups by position in the batch, never by time of arrival."""
    return tuple(tuple(keys[start : start + size]) for start in range(0, len(keys), size))


def shares(num: int, *, workers: int) -> tuple[range, ...]:
    """Deal requests out to rollout workers: worker w gets the positions w, w + W, w + 2W, ..."""
    return tuple(range(worker, num, workers) for worker in range(workers))


def dealt(owed: Sequence[RolloutRequest], *, workers: int) -> tuple[dict[RolloutKey, RolloutRequest], ...]:
    """Deal requests out to so many workers, by key. What one of them cannot do may be dealt to the others again."""
    return tuple({owed[i].key: owed[i] for i in share} for share in shares(len(owed), workers=workers))
