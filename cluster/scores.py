"""A round's scores: its reward models and their unit, and what they say of the policies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster import calibration, evaluation, samples, schedule
from cluster.crew import Crew
from cluster.evaluation import Evaluation
from cluster.prompts import PromptSource, PromptStream
from cluster.rollout_pool import put
from cluster.run_directory import RunDirectory
from cluster.schedule import CALIBRATION, RunState
from cluster.scoring_pool import ScoringPool
from configs.run import RunConfig
from protocol.files import write_json
from protocol.messages import Rollout
from protocol.roles import Finished


class Scores:
    """Sees to it that the scoring workers hold a round's reward models and their unit, and evaluates with them.

    Args:
        config: The run's configuration.
        directory: Of the run.
        crew: The workers.
        prompts: The training and the held-out prompts.
        heldout: A reward model's version -> the held-out reward model that belongs to it, if there is one.
    """

    def __init__(
        self,
        config: RunConfig,
        directory: RunDirectory,
        *,
        crew: Crew,
        prompts: PromptSource,
        heldout: Callable[[int], Path | None],
    ) -> None:
        self._config = config
        self._directory = directory
        self._crew = crew
        self._prompts = prompts
        self._heldout = heldout
        self._loaded: tuple[int, int | None] | None = None
        """Which generation of scoring workers holds which version of the reward model."""
        self._calibrated_for: tuple[int, int] | None = None
        """Which generation of scoring workers holds which round's zero and unit."""
        self._evaluations: dict[int, Evaluation] = {}
        """Version -> its evaluation with the reward models of now."""

    def calibrate(self, state: RunState) -> None:
        """Fix the zero and the unit of the rewards for a round, on samples of the reference policy."""
        path = self._directory.calibrations(state.round)
        if not path.exists():
            found = self._calibrated(state)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found)
        self.workers(state)

    def workers(self, state: RunState) -> ScoringPool:
        """Have the scoring workers use this round's reward models and their constants."""
        workers = self._load_reward_models(state)
        wanted = (self._crew.generation, state.round)
        if self._calibrated_for != wanted:
            workers.use(calibration.parse(json.loads(self._directory.calibrations(state.round).read_text())))
            self._calibrated_for = wanted
            self._evaluations.clear()
        return workers

    def responses(self, version: int) -> list[Finished]:
        """Have a version's responses to the held-out prompts: sampled once, kept in a file."""
        path = self._directory.evaluation_of(version)
        if not path.exists():
            rollouts = self._crew.sampling(version)
            finished = evaluation.sample(rollouts, self._prompts.held_out(), self._config, policy_version=version)
            samples.write(path, rollouts.fetch(finished))
        return put(samples.read(path))

    def evaluated(self, version: int, state: RunState) -> Evaluation:
        """Score a version's responses to the held-out prompts with the reward models of now."""
        responses = self.responses(version)
        workers = self.workers(state)
        if version not in self._evaluations:
            self._evaluations[version] = evaluation.score(workers, responses, policy_version=version)
        return self._evaluations[version]

    def _calibrated(self, state: RunState) -> dict[str, dict[str, Any]]:
        """Score the anchor responses, which stay the same for a whole run, with this round's reward models."""
        path = self._directory.reference_samples
        if not path.exists():
            samples.write(path, self._anchors())
        responses = samples.read(path)
        raw = self._load_reward_models(state).raw_scores([finished.payload for finished in put(responses)])
        found = calibration.calibrate(raw, self._config, prompts=[rollout.prompt for rollout in responses])
        if state.reward_version is not None:
            calibration.store_with_model(found, self._config, self._directory.reward_model(state.reward_version))
        return found

    def _anchors(self) -> list[Rollout]:
        """Have the responses whose scores are the zero and the unit: from data, or samples of the reference."""
        anchor = self._config.scoring.calibration_anchor
        if anchor == "demonstrations":
            return calibration.demonstrated(self._config, self._prompts.tokenizer(), iteration=CALIBRATION)
        fixed = self._prompts.responses() if anchor == "responses" else None
        all_prompts = self._prompts.training() if fixed is None else fixed.prompts
        count = min(self._config.scoring.calibration_responses, len(all_prompts))
        prompts = PromptStream(all_prompts, seed=self._config.run.seed + 1).take(count)
        requests = schedule.requests(prompts, self._config, round=0, iteration=CALIBRATION, samples=1)
        if fixed is not None:
            return [fixed.answer(request) for request in requests]
        rollouts = self._crew.sampling(0)
        finished = {f.meta.key: f for f in rollouts.generate(requests, policy_version=0)}
        return rollouts.fetch([finished[request.key] for request in requests])

    def _load_reward_models(self, state: RunState) -> ScoringPool:
        """Have the scoring workers hold this round's reward models."""
        workers = self._crew.scoring
        wanted = (self._crew.generation, state.reward_version)
        if self._loaded != wanted and state.reward_version is not None:
            workers.load(
                trained=self._directory.reward_model(state.reward_version),
                heldout=self._heldout(state.reward_version),
            )
            self._loaded = wanted
        return workers
