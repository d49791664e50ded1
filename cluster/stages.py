"""The stages of a real run: each phase carried out with the pools and the learner group.

Every phase leaves something durable and is skipped where that is there, so a run that was killed in any of them goes on
with the same data and trains and labels nothing twice.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cluster import calibration, checkpoint, evaluation, guards, lineage, resumption, retention, samples, schedule
from cluster.collection import Collection
from cluster.crew import Crew
from cluster.driver import Roles
from cluster.evaluation import Evaluation
from cluster.learner_group import Progress
from cluster.lineage import Artefact
from cluster.prompts import PromptStream
from cluster.ranking import Ranking
from cluster.refresh import Refresh
from cluster.rollout_pool import put
from cluster.run_directory import RunDirectory
from cluster.schedule import CALIBRATION, Phase, RunState
from cluster.scoring_pool import ScoringPool
from cluster.tracking import Sinks
from configs.load import config_hash
from configs.run import RunConfig
from protocol import metrics as names
from protocol.errors import UserError
from protocol.files import write_json
from protocol.messages import IterationReport, Prompt, RoundReport

_LOG = logging.getLogger(__name__)


class PromptSource(Protocol):
    """The prompts of a run, read when they are first needed: the tokenizer comes with the supervised policy."""

    def training(self) -> Sequence[Prompt]:
        """All training prompts."""
        ...

    def held_out(self) -> Sequence[Prompt]:
        """The prompts of evaluations."""
        ...

    def stream(self) -> PromptStream:
        """The stream that the iterations take from."""
        ...

    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        ...


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


class RunStages:
    """Everything a run does besides its iterations.

    Args:
        config: The run's configuration.
        directory: Of the run.
        parts: What it is put together from.
        open_sinks: Opens the metric sinks, given the iterations that stand.
        progress: Shows the figures of a running stage.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        parts: Parts,
        *,
        open_sinks: Callable[[int], Sinks],
        progress: Progress,
    ) -> None:
        self.config = config
        self.directory = directory
        self._crew = parts.crew
        self._collection = parts.collection
        self._refresh = parts.refresh
        self._prompts = parts.prompts
        self._ranking = parts.make_ranking(self._evaluated)
        self._open_sinks = open_sinks
        self._progress = progress
        self._resumed: checkpoint.Checkpoint | None = None
        self._sinks: Sinks | None = None
        self._history: list[dict[str, float]] = []
        self._loaded: tuple[int, int | None] | None = None
        """Which generation of scoring workers holds which version of the reward model."""
        self._calibrated_for: tuple[int, int] | None = None
        """Which generation of scoring workers holds which round's zero and unit."""
        self._evaluations: dict[int, Evaluation] = {}
        """Version -> its evaluation with the reward models of now."""
        self._state = RunState()

    def resume(self) -> RunState:
        """Find where the run stands: where its phases or its newest checkpoint have got, or its beginning."""
        state = RunState()
        if self.directory.state.exists():
            state = RunState.from_json(json.loads(self.directory.state.read_text()))
        self._resumed = resumption.newest(self.directory.checkpoints, self.config)
        if self._resumed is not None:
            saved = RunState.from_json(self._resumed.driver["state"])
            _LOG.info("the newest checkpoint is %s", self._resumed.directory)
            if state.phase is Phase.EVALUATE and not self.directory.policy(state.policy_version).exists():
                # Its weights are in its own checkpoint alone; an older one must not be given its name.
                if saved.position != state.position:
                    _LOG.warning(
                        "the checkpoint of round %d's end is gone; its last iterations are repeated", state.round
                    )
                state = saved
            state = max(state, saved, key=lambda found: found.position)
        elif state.round > 1 or state.phase in (Phase.EVALUATE, Phase.RANK):
            raise UserError(
                f"the run is in round {state.round}, {state.phase.value}, but has no checkpoint",
                where=str(self.directory.checkpoints),
                next_step="restore one from a copy, or move the run directory away to start again",
            )
        checkpoint.tidy(self.directory.checkpoints)
        self._state = state
        return state

    def reached(self, state: RunState) -> None:
        """Make the beginning of a phase durable."""
        write_json(self.directory.state, state.to_json())
        self._state = state

    def sft(self) -> None:
        """Train the supervised policy, or keep the one that is there."""
        output = self.directory.policy(0)
        if output.exists():
            _LOG.info("keeping the supervised policy in %s", output)
        else:
            self._crew.learner.train_sft(output, progress=self._progress)
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
        path = self.directory.calibrations(state.round)
        if not path.exists():
            found = self._calibrated(state)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
        self._scoring(state)

    def baseline(self, state: RunState) -> None:
        """Sample the supervised policy's responses to the held-out prompts."""
        if self._prompts.held_out():
            self._responses(0)

    def roles(self, state: RunState) -> Roles:
        """Start the learner's engines, from the checkpoint where there is one, and bring the rollout workers to it.

        Publishing first is what makes a resume safe: no worker samples before it has proven the state's version.
        """
        scoring = self._scoring(state)
        stream = self._start_learning(state)
        self._crew.publish(state.policy_version)
        if self._sinks is None:
            self._sinks = self._open_sinks(self._standing_iterations(state))
        self._history = self._standing(state)
        return Roles(rollouts=self._crew.rollouts, scoring=scoring, learner=self._crew.learner, prompts=stream)

    def alarm(self, report: IterationReport) -> str | None:
        """Judge an iteration by the round's guards."""
        self._history.append(dict(report.metrics))
        found = guards.alarm(self._history, self.config.rounds.of(report.round).guards)
        if found is not None:
            _LOG.warning("round %d ends after iteration %d: %s", report.round, report.iteration + 1, found)
        return found

    def iterated(self, report: IterationReport, state: RunState) -> None:
        """Log an iteration and commit a checkpoint where one is due."""
        assert self._sinks is not None
        self._crew.holds(state.policy_version)
        self._sinks.write(report)
        if self.config.tracking.save_rollouts:
            self.directory.rollouts.mkdir(exist_ok=True)
            self._crew.learner.write_rollouts(self.directory.rollouts / f"v{report.policy_version - 1:05d}.parquet")
        if schedule.checkpoint_is_due(state, self.config):
            self._commit(state)

    def evaluate(self, state: RunState) -> None:
        """Export the policy that the round ends with, and compare it with the supervised one."""
        output = self.directory.policy(state.policy_version)
        if not output.exists():
            if not self._crew.optimises(state.round):
                self._start_learning(state)
            self._crew.learner.export(output, card=self._card(state))
        start = schedule.named_version(self.config.rounds.of(state.round).init_policy, state)
        parents = [f"policies/v{start:03d}"]
        if state.reward_version is not None:
            parents.append(f"reward_models/v{state.reward_version:03d}")
        data = {"iterations": state.iteration} | ({} if state.alarm is None else {"stopped": state.alarm})
        self._note_policy(state.policy_version, round=state.round, parents=tuple(parents), data=data)
        self._crew.finish_rl()
        if not self._prompts.held_out():
            return
        before, after = self._evaluated(0), self._evaluated(state.policy_version)
        compared = evaluation.compare(before, after, self.config)
        write_json(self.directory.round(state.round) / "evaluation.json", compared)
        write_json(self.directory.evaluation, compared)

    def rank(self, state: RunState) -> RunState:
        """Place the round's policy on the ladder, and keep the round's report."""
        best = self._ranking.rank(state) if self._prompts.held_out() else state.best_version
        state = schedule.promoted(state, best)
        history = self._standing(state)
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
        """Stop all workers and finish all files."""
        if self._sinks is not None:
            self._sinks.__exit__(None, None, None)
        self._crew.release()

    def _calibrated(self, state: RunState) -> dict[str, dict[str, Any]]:
        """Score the reference samples, which are sampled once in a run, with this round's reward models."""
        path = self.directory.reference_samples
        if not path.exists():
            rollouts = self._crew.sampling(0)
            training = self._prompts.training()
            count = min(self.config.scoring.calibration_responses, len(training))
            prompts = PromptStream(training, seed=self.config.run.seed + 1).take(count)
            requests = schedule.requests(prompts, self.config, round=0, iteration=CALIBRATION, samples=1)
            finished = {f.meta.key: f for f in rollouts.generate(requests, policy_version=0)}
            samples.write(path, rollouts.fetch([finished[request.key] for request in requests]))
        responses = samples.read(path)
        raw = self._load_reward_models(state).raw_scores([finished.payload for finished in put(responses)])
        found = calibration.calibrate(raw, self.config, prompts=[rollout.prompt for rollout in responses])
        if state.reward_version is not None:
            calibration.store_with_model(found, self.config, self.directory.reward_model(state.reward_version))
        return found

    def _load_reward_models(self, state: RunState) -> ScoringPool:
        """Have the scoring workers hold this round's reward models."""
        workers = self._crew.scoring
        wanted = (self._crew.generation, state.reward_version)
        if self._loaded != wanted and state.reward_version is not None:
            workers.load(
                trained=self.directory.reward_model(state.reward_version),
                heldout=self._refresh.heldout(state.reward_version),
            )
            self._loaded = wanted
        return workers

    def _scoring(self, state: RunState) -> ScoringPool:
        """Have the scoring workers use this round's reward models and their constants."""
        workers = self._load_reward_models(state)
        wanted = (self._crew.generation, state.round)
        if self._calibrated_for != wanted:
            workers.use(calibration.parse(json.loads(self.directory.calibrations(state.round).read_text())))
            self._calibrated_for = wanted
            self._evaluations.clear()
        return workers

    def _start_learning(self, state: RunState) -> PromptStream:
        """Build the learner's engines for this round, and load the checkpoint if it is of this round."""
        plan = self.config.rounds.of(state.round)
        start = schedule.named_version(plan.init_policy, state)
        scored = None if state.reward_version is None else self.directory.reward_model(state.reward_version)
        self._crew.start_rl(
            state.round, policy=self.directory.policy(start), reward_model=scored, iterations=plan.iterations
        )
        stream = self._prompts.stream()
        if self._resumed is not None:
            stream.load_state_dict(self._resumed.driver["prompts"])
            if self._resumed.driver["state"]["round"] == state.round:
                self._crew.learner.load(self._resumed.directory / "learner")
        return stream

    def _responses(self, version: int) -> list[Any]:
        path = self.directory.evaluation_of(version)
        if not path.exists():
            rollouts = self._crew.sampling(version)
            finished = evaluation.sample(rollouts, self._prompts.held_out(), self.config, policy_version=version)
            samples.write(path, rollouts.fetch(finished))
        return put(samples.read(path))

    def _evaluated(self, version: int) -> Evaluation:
        responses = self._responses(version)
        workers = self._scoring(self._state)
        if version not in self._evaluations:
            self._evaluations[version] = evaluation.score(workers, responses, policy_version=version)
        return self._evaluations[version]

    def _standing(self, state: RunState) -> list[dict[str, float]]:
        """Read the metrics of this round's iterations that stand."""
        return [
            metrics
            for metrics in _lines(self.directory.metrics)
            if metrics[names.COUNTER_ROUND] == state.round and metrics[names.COUNTER_ITERATION] < state.iteration
        ]

    def _standing_iterations(self, state: RunState) -> int:
        """Count the lines of metrics.jsonl that a resume does not repeat."""
        here = (state.round, state.iteration)
        places = [(m[names.COUNTER_ROUND], m[names.COUNTER_ITERATION]) for m in _lines(self.directory.metrics)]
        return sum(place < here for place in places)

    def _note_policy(
        self, version: int, *, round: int, parents: tuple[str, ...], data: dict[str, Any] | None = None
    ) -> None:
        name = f"policies/v{version:03d}"
        config = config_hash(self.config)
        artefact = Artefact(name=name, kind="policy", round=round, config=config, parents=parents, data=data or {})
        lineage.note(self.directory.lineage, artefact)

    def _commit(self, state: RunState) -> None:
        def write_parts(staging: Path) -> None:
            (staging / "learner").mkdir()
            self._crew.learner.save(staging / "learner")
            resumption.write_config(staging, self.config)

        root = self.directory.checkpoints
        self._resumed = checkpoint.commit(
            root,
            checkpoint.name_of(round=state.round, iteration=state.iteration),
            driver={"state": state.to_json(), "prompts": self._prompts.stream().state_dict()},
            config_hash=config_hash(self.config),
            write_parts=write_parts,
        )
        referred = lineage.referred(self.directory.lineage, below=root.name)
        checkpoint.retain(
            root,
            self._resumed,
            choose=lambda found: retention.kept(
                found, self.config.cluster, best_version=state.best_version, referred=referred
            ),
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


def _lines(path: Path) -> Sequence[dict[str, float]]:
    if not path.exists():
        return []
    # What a full disk or a power cut left of a line has no end, and its iteration is repeated.
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
