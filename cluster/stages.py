"""The stages of a real run: each phase carried out with the pools and the learner group."""

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster import calibration, checkpoint, evaluation, schedule
from cluster.driver import Roles
from cluster.evaluation import Evaluation
from cluster.learner_group import LearnerGroup, Progress
from cluster.prompts import PromptStream
from cluster.rollout_pool import RolloutPool
from cluster.run_directory import RunDirectory
from cluster.schedule import CALIBRATION, RunState
from cluster.scoring_pool import ScoringPool
from cluster.tracking import Sinks
from configs.load import config_hash
from configs.run import RunConfig
from configs.scoring import ModelRewardConfig
from protocol.messages import IterationReport, Prompt

_LOG = logging.getLogger(__name__)


class RunStages:
    """Everything a run does besides its iterations."""

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        *,
        learner: LearnerGroup,
        open_sinks: Callable[[int], Sinks],
        open_pools: Callable[[], tuple[RolloutPool, ScoringPool]],
        read_prompts: Callable[[], tuple[list[Prompt], list[Prompt]]],
        progress: Progress,
    ) -> None:
        self.config = config
        self.directory = directory
        self._learner = learner
        self._open_sinks = open_sinks
        self._open_pools = open_pools
        self._read_prompts = read_prompts
        self._progress = progress
        self._resumed: checkpoint.Checkpoint | None = None
        self._pools: tuple[RolloutPool, ScoringPool] | None = None
        self._sinks: Sinks | None = None
        self._stream: PromptStream | None = None
        self._held_out: list[Prompt] = []

    def resume(self) -> RunState:
        """Find where the run stands: its newest checkpoint, or its beginning."""
        self._resumed = checkpoint.newest(self.directory.checkpoints)
        if self._resumed is None:
            return RunState()
        _LOG.info("resuming from %s", self._resumed.directory)
        return RunState.from_json(self._resumed.driver["state"])

    def sft(self) -> None:
        """Train the supervised policy, or keep the one that is there."""
        output = self.directory.policy(0)
        if output.exists():
            _LOG.info("keeping the supervised policy in %s", output)
            return
        self._learner.train_sft(output, progress=self._progress)

    def reward_model(self) -> None:
        """Train the reward model, or keep the one that is there."""
        if not self._trains_reward_model:
            return
        output = self.directory.reward_model(0)
        if output.exists():
            _LOG.info("keeping the reward model in %s", output)
            return
        self._learner.train_reward_model(policy=self.directory.policy(0), output=output, progress=self._progress)

    def calibrate(self) -> None:
        """Fix the zero and the unit of the rewards on samples of the reference policy, for the whole round."""
        if self.directory.calibrations.exists():
            return
        rollouts, scoring = self._running()
        stream = self._prompts()
        count = min(self.config.scoring.calibration_responses, len(stream.prompts))
        prompts = PromptStream(stream.prompts, seed=self.config.run.seed + 1).take(count)
        requests = schedule.requests(prompts, self.config, round=0, iteration=CALIBRATION, samples=1)
        finished = {f.meta.key: f.payload for f in rollouts.generate(requests, policy_version=0)}
        raw = scoring.raw_scores([finished[request.key] for request in requests])
        found = calibration.calibrate(raw, self.config, prompts=prompts)
        if self._trains_reward_model:
            calibration.store_with_model(found, self.config, self.directory.reward_model(0))
        evaluation.write_json(self.directory.calibrations, found)
        scoring.use(calibration.parse(found))

    def baseline(self) -> None:
        """Evaluate the supervised policy."""
        if not self._evaluation_prompts() or self.directory.baseline.exists():
            return
        evaluation.write_json(self.directory.baseline, self._evaluated(policy_version=0).to_json())

    def roles(self, state: RunState) -> Roles:
        """Start the learner's engines, from the checkpoint where there is one, and bring the rollout workers to it.

        Publishing first is what makes a resume safe: no worker samples before it has proven the state's version.
        """
        rollouts, scoring = self._running()
        reward_model = self.directory.reward_model(0) if self._trains_reward_model else None
        self._learner.start_rl(policy=self.directory.policy(0), reward_model=reward_model)
        stream = self._prompts()
        if self._resumed is not None:
            self._learner.load(self._resumed.directory / "learner")
            stream.load_state_dict(self._resumed.driver["prompts"])
        rollouts.load(self._learner.publish(policy_version=state.policy_version))
        if self._sinks is None:
            self._sinks = self._open_sinks(state.policy_version)
        return Roles(rollouts=rollouts, scoring=scoring, learner=self._learner, prompts=stream)

    def iterated(self, report: IterationReport, state: RunState) -> None:
        """Log an iteration and commit a checkpoint where one is due."""
        assert self._sinks is not None
        self._sinks.write(report)
        if self.config.tracking.save_rollouts:
            self.directory.rollouts.mkdir(exist_ok=True)
            self._learner.write_rollouts(self.directory.rollouts / f"v{report.policy_version - 1:05d}.parquet")
        if schedule.checkpoint_is_due(state, self.config):
            self._commit(state)

    def evaluate(self, state: RunState) -> None:
        """Export the policy that the round ends with, and compare it with the supervised one."""
        if self._resumed is not None and self._pools is None:
            self.roles(state)
        output = self.directory.policy(state.policy_version)
        if not output.exists():
            self._learner.export(output, card=self._card(state))
        if not self._evaluation_prompts():
            return
        before = Evaluation.from_json(json.loads(self.directory.baseline.read_text()))
        after = self._evaluated(policy_version=state.policy_version)
        evaluation.write_json(self.directory.evaluation, evaluation.compare(before, after, self.config))

    def close(self) -> None:
        """Stop all workers and finish all files."""
        if self._sinks is not None:
            self._sinks.__exit__(None, None, None)
        if self._pools is not None:
            for pool in self._pools:
                pool.stop()
        self._learner.stop()

    @property
    def _trains_reward_model(self) -> bool:
        return any(isinstance(r, ModelRewardConfig) and r.path == "trained" for r in self.config.scoring.rewards)

    def _running(self) -> tuple[RolloutPool, ScoringPool]:
        if self._pools is None:
            self._pools = self._open_pools()
            if self.directory.calibrations.exists():
                stored = json.loads(self.directory.calibrations.read_text())
                self._pools[1].use(calibration.parse(stored))
        return self._pools

    def _prompts(self) -> PromptStream:
        if self._stream is None:
            train, self._held_out = self._read_prompts()
            self._stream = PromptStream(train, seed=self.config.run.seed)
        return self._stream

    def _evaluation_prompts(self) -> Sequence[Prompt]:
        self._prompts()
        return self._held_out

    def _evaluated(self, *, policy_version: int) -> Evaluation:
        rollouts, scoring = self._running()
        return evaluation.evaluate(
            rollouts, scoring, self._evaluation_prompts(), self.config, policy_version=policy_version
        )

    def _commit(self, state: RunState) -> None:
        def write_parts(staging: Path) -> None:
            (staging / "learner").mkdir()
            self._learner.save(staging / "learner")

        root = self.directory.checkpoints
        checkpoint.commit(
            root,
            f"r{state.round:03d}-i{state.iteration:06d}",
            driver={"state": state.to_json(), "prompts": self._prompts().state_dict()},
            config_hash=config_hash(self.config),
            write_parts=write_parts,
        )
        checkpoint.retain(root, keep=self.config.cluster.checkpoints_kept)

    def _card(self, state: RunState) -> dict[str, Any]:
        return {
            "run": self.config.run.name,
            "policy_version": state.policy_version,
            "round": state.round,
            "iterations": state.iteration,
            "algorithm": self.config.algorithm.name,
            "config": config_hash(self.config),
        }
