"""The stages of a real run: each phase carried out with the pools and the learner group.

Every phase leaves something durable and is skipped where that is there, so a run that was killed in any of them goes on
with the same data and trains and labels nothing twice.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import checkpoint, evaluation, guards, lineage, resumption, retention, run_directory, schedule, tracking
from cluster.collection import Collection
from cluster.committer import Committer
from cluster.crew import Crew
from cluster.driver import Roles
from cluster.evaluation import Evaluation
from cluster.incident_log import IncidentLog
from cluster.learner_group import Progress
from cluster.lineage import Artefact
from cluster.lost_batches import LostBatches
from cluster.prompts import PromptSource, PromptStream
from cluster.ranking import Ranking
from cluster.refresh import Refresh
from cluster.restarts import Restarts
from cluster.run_directory import RunDirectory
from cluster.schedule import Phase, RunState
from cluster.scores import Scores
from cluster.stopping import STOPPING, Stopped
from cluster.tracking import Sinks
from configs.load import config_hash
from configs.run import RunConfig
from protocol import metrics as names
from protocol.errors import LearnerLostError, Resumable, UserError
from protocol.files import write_json
from protocol.messages import IterationReport, RoundReport

_LOG = logging.getLogger(__name__)
_AGAIN_S = 30.0
"""Between two attempts at a checkpoint that the run cannot do without."""
_LAST_COMMIT_S = 20.0
"""For a commit that is under way when the run ends for another reason; less than the grace that a signal
leaves by default (`cluster.deadlines.grace_s`), which ends the process whatever is under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a run is put together from."""

    crew: Crew
    """The workers."""
    collection: Collection
    """Tasks and labels."""
    refresh: Refresh
    """Reward models."""
    prompts: PromptSource
    """The training and the held-out prompts."""
    make_ranking: Callable[[Callable[[int], Evaluation]], Ranking]
    """Makes the ladder's keeper, given how a version is evaluated."""


@dataclass(frozen=True, slots=True)
class _Standstill:
    """The end of an iteration: what a checkpoint of it holds, as long as the learner has not moved on."""

    state: RunState
    prompts: dict[str, Any]
    updates: int | None
    """Batches that the learner had been given."""


class RunStages:
    """Everything a run does besides its iterations.

    Args:
        config: The run's configuration.
        directory: Of the run.
        parts: What it is put together from.
        open_sinks: Opens the metric sinks, given the iterations that stand.
        progress: Shows the figures of a running stage.
        incidents: Keeps what went wrong.
        trust_checkpoint: As `resumption.newest` has it.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        parts: Parts,
        *,
        open_sinks: Callable[[int], Sinks],
        progress: Progress,
        incidents: IncidentLog,
        trust_checkpoint: bool = False,
    ) -> None:
        self.config = config
        self._trusts = trust_checkpoint
        self.directory = directory
        self.crew = parts.crew
        self._collection = parts.collection
        self._refresh = parts.refresh
        self._prompts = parts.prompts
        self._scores = Scores(config, directory, crew=parts.crew, prompts=parts.prompts, heldout=parts.refresh.heldout)
        self._ranking = parts.make_ranking(lambda version: self._scores.evaluated(version, self._state))
        self._open_sinks = open_sinks
        self._progress = progress
        self.incidents = incidents
        self._restarts = Restarts(config.cluster.learner_restarts, report=incidents)
        self._lost_batches = LostBatches(incidents, allowed=config.cluster.worker_replacements)
        self._standstill: _Standstill | None = None
        self._committer = Committer(directory.checkpoints, settings=config.cluster, report=incidents)
        self._sinks: Sinks | None = None
        self._history: list[dict[str, float]] = []
        self._state = RunState()

    def resume(self) -> RunState:
        """Find where the run stands: where its phases or its newest checkpoint have got, or its beginning."""
        state, root = run_directory.state_of(self.directory), self.directory.checkpoints
        found = self._committer.latest = resumption.newest(root, self.config, trusts_all=self._trusts)
        if found is not None:
            saved = RunState.from_json(found.driver["state"])
            _LOG.info("the newest checkpoint is %s", found.directory)
            if state.position > saved.position and not schedule.goes_on_from(saved, state):
                # The prompt cursor and what a method carries over are in that checkpoint alone, and a policy that is
                # not exported yet too; an older one must not stand in. What is repeated keeps what is durable.
                text = "round %d, %s goes on from a checkpoint that is gone; what followed %s is repeated"
                _LOG.warning(text, state.round, state.phase.value, found.name)
                state = saved
            state = max(state, saved, key=lambda found: found.position)
        elif state.round > 1 or state.phase in (Phase.EVALUATE, Phase.RANK):
            raise UserError(
                f"the run is in round {state.round}, {state.phase.value}, but has no checkpoint",
                where=str(root),
                next_step="restore one from a copy, or move the run directory away to start again",
            )
        checkpoint.tidy(root)
        self._state = state
        self.incidents.at(state)
        return state

    def recover(self, error: LearnerLostError) -> RunState:
        """Give the learner's ranks up, and go on where a new process would: at what is durable.

        Raises:
            LearnerLostError: If they may not start again.
            Stopped: If the run was asked to stop; a signal also ends ranks that are in the same terminal.
        """
        self._standstill = None  # nobody holds it any more
        if STOPPING.asked:
            raise Stopped from error
        self._restarts.spend(error)
        self.crew.stop_learner()
        self._close_sinks()
        self._prompts.rewind()
        self._committer.settle()
        return self.resume()

    def save(self) -> None:
        """Commit what stands, if the learner is exactly there: for a run that must stop between two checkpoints."""
        self._committer.settle()
        last = self._standstill
        if last is not None and not self._is_durable(last.state) and self.crew.updates == last.updates:
            self._commit(last)
            self._committer.settle()
            _LOG.warning("checkpoint after iteration %d of round %d", last.state.iteration, last.state.round)

    def in_hand(self) -> bool:
        """Say whether the learner has begun an iteration that is not over: `save` could commit nothing now."""
        return self._standstill is not None and self.crew.updates not in (None, self._standstill.updates)

    def reached(self, state: RunState) -> None:
        """Make the beginning of a phase durable, after the checkpoint that it goes on from.

        What follows a round's iterations needs their checkpoint: later rounds take the prompts up where it says. So
        where the disk does not take it the learner stands still, and it is tried again until it is there or the
        failures in a row are more than `cluster.checkpoint_failures_allowed`.
        """
        self._committer.settle()
        last = self._standstill
        while last is not None and last.state == state and not self._is_committed(state):
            time.sleep(_AGAIN_S)
            self._commit(last)
            self._committer.settle()
        self._standstill = None
        write_json(self.directory.state, state.to_json())
        self._state = state
        self.incidents.at(state)

    def sft(self) -> None:
        """Train the supervised policy, or keep the one that is there."""
        output = self.directory.policy(0)
        if output.exists():
            _LOG.info("keeping the supervised policy in %s", output)
        else:
            self.crew.learner.train_sft(output, progress=self._progress)
        self._note_policy(0, round=0, parents=())

    def collect(self, state: RunState) -> None:
        """Have this round's tasks for labelers."""
        if self.config.rounds.of(state.round).collect.comparisons:
            self._collection.collect(state, self._prompts.training(), self._prompts.tokenizer())

    def label(self, state: RunState) -> None:
        """Have them labelled."""
        labeler = self.config.rounds.of(state.round).labeler
        self._collection.label(labeler, round=state.round, purpose="training")

    def refresh(self, state: RunState) -> RunState:
        """Have this round's reward model, if it is better than the one before."""
        return schedule.scored_by(state, self._refresh.refresh(state))

    def calibrate(self, state: RunState) -> None:
        """Fix the zero and the unit of the rewards on samples of the reference policy, for the whole round."""
        self._scores.calibrate(state)

    def baseline(self, state: RunState) -> None:
        """Sample the supervised policy's responses to the held-out prompts."""
        if self._prompts.held_out():
            self._scores.responses(0)

    def roles(self, state: RunState) -> Roles:
        """Start the learner's engines, from the checkpoint where there is one, and bring the rollout workers to it.

        Publishing first is what makes a resume safe: no worker samples before it has proven the state's version.
        """
        scoring = self._scores.workers(state)
        stream = self._start_learning(state)
        self.crew.publish(state.policy_version)
        self._stands(state)
        if self._sinks is None:
            self._sinks = self._open_sinks(
                tracking.standing_iterations(self.directory.metrics, round=state.round, iteration=state.iteration)
            )
        self._history = tracking.round_lines(self.directory.metrics, round=state.round, iterations=state.iteration)
        return Roles(
            rollouts=self._prompts.answered(self.crew.rollouts),
            scoring=scoring,
            learner=self.crew.learner,
            prompts=stream,
            lost=self._lost_batches,
        )

    def alarm(self, report: IterationReport) -> str | None:
        """Judge an iteration by the round's guards."""
        self._history.append(dict(report.metrics))
        found = guards.alarm(self._history, self.config.rounds.of(report.round).guards)
        if found is not None:
            _LOG.warning("round %d ends after iteration %d: %s", report.round, report.iteration + 1, found)
        return found

    def iterated(self, report: IterationReport, state: RunState) -> None:
        """Log an iteration and begin a checkpoint where one is due.

        A periodic checkpoint that the disk does not take is not tried again before the next is due.
        """
        assert self._sinks is not None
        self._committer.attend()
        self.crew.holds(state.policy_version)
        self._sinks.write(report)
        if self.config.tracking.save_rollouts:
            self.directory.rollouts.mkdir(exist_ok=True)
            self.crew.learner.write_rollouts(self.directory.rollouts / f"v{report.policy_version - 1:05d}.parquet")
        standstill = self._stands(state)
        if schedule.checkpoint_is_due(state, self.config):
            self._commit(standstill)
        self.incidents.look()
        self.incidents.at(state)
        if STOPPING.asked:
            raise Stopped
        if ranks := self.crew.ranks_to_go():
            self.save()
            raise Resumable(f"Ray drains the node of {', '.join(ranks)}; the same command goes on from this iteration")

    def evaluate(self, state: RunState) -> None:
        """Export the policy that the round ends with, and compare it with the supervised one."""
        output = self.directory.policy(state.policy_version)
        if not output.exists():
            if not self.crew.optimises(state.round):
                self._start_learning(state)
            self.crew.learner.export(output, card=self._card(state))
        start = schedule.named_version(self.config.rounds.of(state.round).init_policy, state)
        parents = [f"policies/v{start:03d}"]
        if state.reward_version is not None:
            parents.append(f"reward_models/v{state.reward_version:03d}")
        data = {"iterations": state.iteration} | ({} if state.alarm is None else {"stopped": state.alarm})
        self._note_policy(state.policy_version, round=state.round, parents=tuple(parents), data=data)
        self._standstill = None
        self.crew.finish_rl()
        if not self._prompts.held_out():
            return
        before, after = (self._scores.evaluated(version, state) for version in (0, state.policy_version))
        compared = evaluation.compare(before, after, self.config)
        write_json(self.directory.round(state.round) / "evaluation.json", compared)
        write_json(self.directory.evaluation, compared)

    def rank(self, state: RunState) -> RunState:
        """Place the round's policy on the ladder, and keep the round's report."""
        best = self._ranking.rank(state) if self._prompts.held_out() else state.best_version
        state = schedule.promoted(state, best)
        history = tracking.round_lines(self.directory.metrics, round=state.round, iterations=state.iteration)
        report = RoundReport(
            round=state.round,
            policy_version=state.policy_version,
            reward_version=state.reward_version,
            best_version=best,
            iterations=state.iteration,
            alarm=state.alarm,
            score_start=history[0][names.OBJECTIVE_SCORE],
            score_end=history[-1][names.OBJECTIVE_SCORE],
        )
        write_json(self.directory.round_report(state.round), report.to_json())
        return state

    def close(self) -> None:
        """Stop all workers and finish all files; a commit that is under way gets a bounded time to end."""
        try:
            self._close_sinks()
            self.crew.release()
        finally:
            self._committer.close(wait_s=_LAST_COMMIT_S)
            self.incidents.look()

    def _stands(self, state: RunState) -> _Standstill:
        prompts = self._prompts.stream().state_dict()
        self._standstill = _Standstill(state, prompts, updates=self.crew.updates)
        return self._standstill

    def _close_sinks(self) -> None:
        if self._sinks is not None:
            self._sinks.__exit__(None, None, None)
            self._sinks = None

    def _start_learning(self, state: RunState) -> PromptStream:
        """Build the learner's engines for this round, and load the checkpoint: of an earlier round what outlives it."""
        plan = self.config.rounds.of(state.round)
        start = schedule.named_version(plan.init_policy, state)
        scored = None if state.reward_version is None else self.directory.reward_model(state.reward_version)
        self.crew.start_rl(
            state.round, policy=self.directory.policy(start), reward_model=scored, iterations=plan.iterations
        )
        stream = self._prompts.stream()
        latest = self._committer.latest
        if latest is not None:
            stream.load_state_dict(latest.driver["prompts"])
            if latest.driver["state"]["round"] == state.round:
                self.crew.learner.load(latest.directory / "learner")
            else:
                self.crew.learner.carry_over(latest.directory / "learner")
        return stream

    def _note_policy(
        self, version: int, *, round: int, parents: tuple[str, ...], data: dict[str, Any] | None = None
    ) -> None:
        name = f"policies/v{version:03d}"
        config = config_hash(self.config)
        artefact = Artefact(name=name, kind="policy", round=round, config=config, parents=parents, data=data or {})
        lineage.note(self.directory.lineage, artefact)

    def _is_durable(self, state: RunState) -> bool:
        """Say whether a run that ends here goes on from here: a round's beginning needs no checkpoint."""
        return state.iteration == 0 or self._is_committed(state)

    def _is_committed(self, state: RunState) -> bool:
        latest = self._committer.latest
        return latest is not None and RunState.from_json(latest.driver["state"]) == state

    def _commit(self, last: _Standstill) -> None:
        """Begin the commit of what the learner holds; the other calls of the learner wait until it is written."""

        def write_parts(staging: Path) -> None:
            (staging / "learner").mkdir()
            self.crew.learner.save(staging / "learner")
            resumption.write_config(staging, self.config)

        state, settings = last.state, self.config.cluster
        own = run_directory.run_id(self.directory)
        referred = lineage.referred(self.directory.lineage, below=self.directory.checkpoints.name)
        self._committer.begin(
            checkpoint.name_of(round=state.round, iteration=state.iteration),
            driver={"state": state.to_json(), "prompts": last.prompts, resumption.RUN_ID: own},
            config_hash=config_hash(self.config),
            write_parts=write_parts,
            choose=lambda found: retention.kept(found, settings, best_version=state.best_version, referred=referred),
        )

    def _card(self, state: RunState) -> dict[str, Any]:
        return {
            "run": self.config.run.name,
            "policy_version": state.policy_version,
            "round": state.round,
            "iterations": state.iteration,
            "algorithm": self.config.algorithm.name,
            "config": config_hash(self.config),
        }
