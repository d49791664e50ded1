"""The driver: one iteration on one screen. It knows roles and small metadata; no machine, no token array."""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Protocol

from cluster import schedule
from cluster.schedule import RunState
from configs.run import RunConfig
from protocol import metrics as names
from protocol.errors import LostDataError
from protocol.messages import IterationReport, Prompt, UpdateReport
from protocol.roles import Learner, RolloutPool, ScoredReferences, ScoringPool


class Prompts(Protocol):
    """A resumable stream of prompts."""

    def take(self, num: int, /) -> list[Prompt]:
        """Take the next prompts."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Everybody who takes part in an iteration."""

    rollouts: RolloutPool
    scoring: ScoringPool
    learner: Learner
    prompts: Prompts
    lost: Callable[[LostDataError], None]
    """Takes note that a batch is gone and must be sampled again; raises if that happens too often."""


def optimise(roles: Roles, config: RunConfig, state: RunState) -> Iterator[tuple[IterationReport, RunState]]:
    """Run the iterations that are left in a round; logging and checkpoints are consumers of what this yields."""
    while state.phase is schedule.Phase.OPTIMISE:
        report = iterate(roles, config, state)
        state = schedule.after(state, config)
        yield report, state


def iterate(roles: Roles, config: RunConfig, state: RunState) -> IterationReport:
    """Run one iteration: generate, score, learn, publish."""
    clock = Clock()
    place = {"round": state.round, "iteration": state.iteration}

    prompts = roles.prompts.take(config.rollout.prompts_per_iteration)
    requests = schedule.requests(prompts, config, round=state.round, iteration=state.iteration)
    while True:
        try:
            with clock.stage(names.TIME_GENERATE):  # scoring runs meanwhile, group by group
                roles.scoring.begin([request.key for request in requests])
                for finished in roles.rollouts.generate(requests, policy_version=state.policy_version):
                    roles.scoring.add(finished)

            with clock.stage(names.TIME_SCORE):
                batch = roles.scoring.collect()

            with clock.stage(names.TIME_LEARN):
                update = roles.learner.update(batch, **place)
            break
        except LostDataError as error:  # nothing has been learned; the same keys and seeds give the same tokens
            roles.lost(error)

    with clock.stage(names.TIME_PUBLISH):
        publication = roles.learner.publish(policy_version=state.policy_version + 1)
        proofs = roles.rollouts.load(publication)

    seconds = clock.finish()
    shown = [request.key for request in requests[: config.tracking.samples_per_iteration]]
    return IterationReport(
        **place,
        policy_version=state.policy_version + 1,
        metrics=_metrics(state, batch, update, seconds)
        | {
            names.COUNTER_PROMPTS: len(prompts),
            names.SYNC_BYTES: publication.manifest.num_bytes,
            names.SYNC_CANARY_GAP: max(proof.canary_gap_max for proof in proofs),
        },
        samples=roles.learner.samples(batch, keys=shown, report=update),
    )


@dataclass(slots=True)
class Clock:
    """Measures the exposed wall time of each stage of an iteration."""

    started: float = field(default_factory=perf_counter)
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    @contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Time a stage."""
        before = perf_counter()
        try:
            yield
        finally:  # what has to be done again counts twice
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - before

    def finish(self) -> dict[str, float]:
        """Close the iteration and return all times."""
        return self.seconds | {names.TIME_ITERATION: perf_counter() - self.started}


def _metrics(
    state: RunState, batch: ScoredReferences, update: UpdateReport, seconds: dict[str, float]
) -> dict[str, float]:
    """Put one iteration into numbers."""
    metas = batch.metas
    tokens = sum(meta.response_tokens for meta in metas)
    truncated = sum(meta.finish_reason == "length" for meta in metas)
    return {
        names.COUNTER_ROUND: state.round,
        names.COUNTER_ITERATION: state.iteration,
        names.COUNTER_POLICY_VERSION: state.policy_version + 1,
        names.COUNTER_RESPONSE_TOKENS: tokens,
        names.ROLLOUT_TOKENS_MEAN: tokens / len(metas),
        names.ROLLOUT_TRUNCATED: truncated / len(metas),
        names.ROLLOUT_REPEATED: sum(meta.repeated_fraction for meta in metas) / len(metas),
        names.ROLLOUT_TOKENS_PER_S: tokens / seconds[names.TIME_GENERATE],
        **batch.summary.means,
        **batch.summary.busy_s,
        **update.metrics,
        names.SYNC_SECONDS: seconds[names.TIME_PUBLISH],
        **seconds,
    }
