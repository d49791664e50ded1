"""The Ray processes of the scoring pool: reward workers and reference workers, scaled apart."""

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import ray
import torch

from configs.run import RunConfig
from configs.scoring import HELDOUT, ModelRewardConfig
from protocol.errors import UserError
from protocol.messages import FloatArray, ReferenceLogprobs, ReferenceSummary, RewardScores, Rollout
from protocol.records import Text
from protocol.roles import RolloutRef, resolve
from protocol.tokens import decode, encode_prompt, encode_response, load_tokenizer
from reward_service.functions import gold_functions, text_rewards
from reward_service.reference_model import ReferenceModel
from reward_service.reward_model import RewardModel
from reward_service.scoring import IDENTITY, Calibration, require_scores, total_scores
from reward_service.text_batch import TextBatch, batch_saved_on_failure


class RewardWorker:
    """Scores groups of responses with every configured reward, and with the gold functions if there are any.

    Args:
        config: The run's configuration.
        name: This worker's name, for its status.
        policy: The policy's directory or hub id; functions read the text that its tokenizer decodes.
        incidents: Where the batch of a failed reward is kept.
        trained: The current round's reward model, for rewards with `path: trained`; may come later by `load`.
        heldout: The current round's held-out reward model: its scores are recorded, and reward nothing.
        calibrations: Component name -> gain and bias, for components that do not carry their own.

    Raises:
        UserError: If a model cannot be loaded or a function cannot be imported.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        name: str,
        policy: str | Path,
        incidents: str | Path,
        trained: str | Path | None = None,
        heldout: str | Path | None = None,
        calibrations: Mapping[str, Calibration] | None = None,
    ) -> None:
        torch.set_num_threads(config.scoring.threads_per_worker)
        self._config = config
        self._name = name
        self._incident_dir = Path(incidents)
        self._tokenizer = load_tokenizer(policy)
        self._text_rewards = text_rewards(config, self._incident_dir)
        self._gold = gold_functions(config, self._incident_dir)
        self._models: dict[str, RewardModel] = {}
        self._labeler: tuple[str, RewardModel, Any] | None = None
        self._calibrations: dict[str, Calibration] = {}
        self._num_responses, self._busy_s = 0, 0.0
        self.state = "idle"
        for reward in config.scoring.rewards:
            if isinstance(reward, ModelRewardConfig) and reward.path != "trained":
                self._models[reward.name] = self._load_model(reward.path)
        self.load(trained=trained, heldout=heldout, calibrations=calibrations)

    def load(
        self,
        *,
        trained: str | Path | None = None,
        heldout: str | Path | None = None,
        calibrations: Mapping[str, Calibration] | None = None,
    ) -> None:
        """Switch to a new round's reward models, or set the calibration of components.

        Args:
            trained: A Hugging Face directory; what was known of the old one's calibration is forgotten.
            heldout: Likewise, of the held-out reward model.
            calibrations: Component name -> gain and bias; wins over the constants in a model's config.json.

        Raises:
            UserError: If the model cannot be loaded, or there is no such component.
        """
        if heldout is not None:
            self._models[HELDOUT] = self._load_model(str(heldout))
            self._calibrations.pop(HELDOUT, None)
        if unknown := set(calibrations or {}) - set(self._names):
            raise UserError(f"there is no reward named {', '.join(sorted(unknown))}", where="scoring.rewards")
        learned = [r for r in self._config.scoring.rewards if isinstance(r, ModelRewardConfig) and r.path == "trained"]
        if trained is not None and learned:
            model = self._load_model(str(trained))
            for reward in learned:
                self._models[reward.name] = model
                self._calibrations.pop(reward.name, None)
        self._calibrations.update(calibrations or {})

    @ray.method(num_returns=2)
    def score(self, rollout_refs: Sequence[RolloutRef]) -> tuple[RewardScores, RewardScores]:
        """Score a group of responses.

        Args:
            rollout_refs: Where the Rollouts lie.

        Returns:
            Scores and components in the order given, with the gold scores for the driver and without them for the
            learner, which never sees them.

        Raises:
            RewardError: If a reward fails.
            UserError: If a component has no calibration yet.
        """
        with _scoring(self):
            rollouts = fetch(rollout_refs, timeout_s=self._config.cluster.deadlines.score_s)
            started = perf_counter()
            batch = self._text(rollouts)
            calibrations = {name: self._calibration(name) for name in self._names}
            raw = self._raw(rollouts, batch)
            components = {name: calibrations[name].apply(scores) for name, scores in raw.items()}
            rewards = {name: scores for name, scores in components.items() if name != HELDOUT}
            total, _ = total_scores(
                rewards,
                rollouts=rollouts,
                config=self._config.scoring,
                max_response_tokens=self._config.rollout.max_response_tokens,
            )
            gold = {reward.name: reward.raw_scores(batch) for reward in self._gold}
            busy_s = self._count(len(rollouts), since=started)
            scored = RewardScores(keys=batch.keys, scores=total, components=components, gold={}, busy_s=busy_s)
            return replace(scored, gold=gold), scored

    def raw_scores(self, rollout_refs: Sequence[RolloutRef]) -> dict[str, FloatArray]:
        """Score a group without calibration, to find the calibration.

        Args:
            rollout_refs: Where the Rollouts lie of the reference policy.

        Returns:
            Component name -> [B] raw scores, in the order given.

        Raises:
            RewardError: If a reward fails.
        """
        rollouts = fetch(rollout_refs, timeout_s=self._config.cluster.deadlines.score_s)
        started = perf_counter()
        raw = self._raw(rollouts, self._text(rollouts))
        self._count(len(rollouts), since=started)
        return raw

    def score_texts(self, path: str, prompts: Sequence[Text], responses: Sequence[str]) -> FloatArray:
        """Score texts with a model of any family, raw: for a labeler, not for rewards.

        Args:
            path: The model's directory or hub id; loaded at the first call.
            prompts: [B] text or messages.
            responses: [B] one response each.

        Returns:
            [B] scores.
        """
        if self._labeler is None or self._labeler[0] != path:
            scoring = self._config.scoring
            model = RewardModel(
                path, dtype=scoring.dtype, device=_device(self._config), micro_batch_tokens=scoring.micro_batch_tokens
            )
            self._labeler = (path, model, load_tokenizer(path))
        _, model, tokenizer = self._labeler
        sequences = [
            np.array(
                encode_prompt(tokenizer, prompt)
                + encode_response(tokenizer, response, prompt=None if isinstance(prompt, str) else prompt),
                np.int32,
            )
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return model.raw_scores(sequences)

    @ray.method(concurrency_group="control")
    def status(self) -> dict[str, Any]:
        """Tell what is loaded, which components still need a calibration, and how much has been done."""
        names = self._names
        return {
            "name": self._name,
            "models": {name: model.path for name, model in self._models.items()},
            "uncalibrated": [name for name in names if self._find_calibration(name) is None],
            "state": self.state,
            "num_responses": self._num_responses,
            "busy_s": self._busy_s,
            "pid": os.getpid(),
            "node_id": ray.get_runtime_context().get_node_id(),
        }

    @property
    def _names(self) -> list[str]:
        """Every component: the configured rewards, then the held-out reward model if there is one."""
        return [reward.name for reward in self._config.scoring.rewards] + ([HELDOUT] if HELDOUT in self._models else [])

    def _load_model(self, path: str) -> RewardModel:
        scoring = self._config.scoring
        model = RewardModel(
            path, dtype=scoring.dtype, device=_device(self._config), micro_batch_tokens=scoring.micro_batch_tokens
        )
        _check_vocabulary(path, policy_vocabulary=self._tokenizer.get_vocab())
        return model

    def _raw(self, rollouts: Sequence[Rollout], batch: TextBatch) -> dict[str, FloatArray]:
        sequences = [np.concatenate([rollout.prompt.token_ids, rollout.response_ids]) for rollout in rollouts]
        raw: dict[str, FloatArray] = {}
        for name in self._names:
            if name in self._text_rewards:
                raw[name] = self._text_rewards[name].raw_scores(batch)
                continue
            if name not in self._models:
                raise UserError("the reward model of this round has not been loaded", where=f"reward {name}")
            with batch_saved_on_failure(batch, incident_dir=self._incident_dir):
                scores = self._models[name].raw_scores(sequences)
                raw[name] = require_scores(scores, component=name, keys=batch.keys)
        return raw

    def _text(self, rollouts: Sequence[Rollout]) -> TextBatch:
        versions = {rollout.policy_versions.last for rollout in rollouts}
        return TextBatch(
            keys=tuple(rollout.key for rollout in rollouts),
            prompts=tuple(rollout.prompt.text for rollout in rollouts),
            responses=tuple(decode(self._tokenizer, rollout.response_ids.tolist()) for rollout in rollouts),
            finish_reasons=tuple(rollout.finish_reason for rollout in rollouts),
            metadata=tuple(rollout.prompt.metadata for rollout in rollouts),
            policy_version=versions.pop() if len(versions) == 1 else None,
        )

    def _find_calibration(self, name: str) -> Calibration | None:
        if name in self._calibrations:
            return self._calibrations[name]
        reward = next((reward for reward in self._config.scoring.rewards if reward.name == name), None)
        if reward is None or isinstance(reward, ModelRewardConfig):
            return self._models[name].calibration if name in self._models else None
        return IDENTITY if reward.normalization == "none" else None

    def _calibration(self, name: str) -> Calibration:
        found = self._find_calibration(name)
        if found is None:
            raise UserError(
                "it has no calibration, so its scores have no unit",
                where=f"reward {name}",
                next_step="calibrate it on samples of the reference policy before it scores",
            )
        return found

    def _count(self, num_responses: int, *, since: float) -> float:
        seconds = perf_counter() - since
        self._num_responses += num_responses
        self._busy_s += seconds
        return seconds


class ReferenceWorker:
    """Computes the frozen reference's log-probs of sampled tokens.

    Args:
        config: The run's configuration.
        name: This worker's name, for its status.
        path: The reference policy's directory or hub id.

    Raises:
        UserError: If the model cannot be loaded.
    """

    def __init__(self, *, config: RunConfig, name: str, path: str | Path) -> None:
        torch.set_num_threads(config.scoring.threads_per_worker)
        self._config = config
        self._name = name
        self._num_responses, self._busy_s = 0, 0.0
        self.state = "idle"
        self._model = ReferenceModel(
            str(path),
            temperature=config.rollout.temperature,
            dtype=config.scoring.dtype,
            device=_device(config),
            micro_batch_tokens=config.scoring.micro_batch_tokens,
        )

    @ray.method(num_returns=2)
    def logprobs(self, rollout_refs: Sequence[RolloutRef]) -> tuple[ReferenceSummary, ReferenceLogprobs]:
        """Compute log-probs at the sampling temperature.

        Args:
            rollout_refs: Where the Rollouts lie.

        Returns:
            What the driver may see, and for each response [T] log-probs, both in the order given.
        """
        with _scoring(self):
            rollouts = fetch(rollout_refs, timeout_s=self._config.cluster.deadlines.score_s)
            started = perf_counter()
            logprobs = self._model.logprobs(
                [rollout.prompt.token_ids for rollout in rollouts], [rollout.response_ids for rollout in rollouts]
            )
            kl_nats = {
                rollout.key: float(np.sum(rollout.behavior_logprobs.astype(np.float64) - reference))
                for rollout, reference in zip(rollouts, logprobs, strict=True)
                if rollout.behavior_logprobs is not None
            }
            keys = tuple(rollout.key for rollout in rollouts)
            seconds = perf_counter() - started
            self._num_responses += len(rollouts)
            self._busy_s += seconds
            summary = ReferenceSummary(keys=keys, behavior_kl_nats=kl_nats, busy_s=seconds)
            return summary, ReferenceLogprobs(keys=keys, logprobs=logprobs)

    @ray.method(concurrency_group="control")
    def status(self) -> dict[str, Any]:
        """Tell what is loaded and how much has been done."""
        return {
            "name": self._name,
            "models": {"reference": self._model.path},
            "state": self.state,
            "num_responses": self._num_responses,
            "busy_s": self._busy_s,
            "pid": os.getpid(),
            "node_id": ray.get_runtime_context().get_node_id(),
        }


@contextmanager
def _scoring(worker: RewardWorker | ReferenceWorker) -> Generator[None]:
    """Have a worker's status say that it scores."""
    worker.state = "scoring"
    try:
        yield
    finally:
        worker.state = "idle"


def environment(config: RunConfig) -> dict[str, str]:
    """Make the environment variables of a scoring worker.

    Args:
        config: The run's configuration.

    Returns:
        Name -> value.
    """
    threads = str(config.scoring.threads_per_worker)
    return {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # Threads that spin while they wait for each other stand still for milliseconds when a core is shared.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }


_OPTIONS: dict[str, Any] = {"concurrency_groups": {"control": 1}, "max_restarts": 0, "max_task_retries": 0}


def reward_worker_class() -> Any:
    """Make the Ray actor class of reward workers; resources, placement and environment come with `.options(...)`."""
    return ray.remote(**_OPTIONS)(RewardWorker)


def reference_worker_class() -> Any:
    """Make the Ray actor class of reference workers; the same goes for it."""
    return ray.remote(**_OPTIONS)(ReferenceWorker)


def fetch(rollout_refs: Sequence[RolloutRef], *, timeout_s: float) -> list[Rollout]:
    """Get a group's rollouts from the object store, waiting at most `timeout_s` seconds."""
    return resolve(rollout_refs, lambda steps: ray.get(steps, timeout=timeout_s))


def _device(config: RunConfig) -> str:
    return "cuda" if config.cluster.backend == "cuda" and config.scoring.gpus_per_worker > 0 else "cpu"


def _check_vocabulary(path: str, *, policy_vocabulary: Mapping[str, int]) -> None:
    """Refuse a reward model that reads other ids: it would score nonsense, and nothing would show it."""
    vocabulary = load_tokenizer(path).get_vocab()
    strange = sorted(token for token, number in policy_vocabulary.items() if vocabulary.get(token) != number)
    if strange:
        raise UserError(
            f"{len(strange)} of the policy's {len(policy_vocabulary)} tokens have another id or none ({strange[0]!r})",
            where=f"reward model {path}",
            cause="it was trained with another tokenizer, and sampled tokens are never re-tokenised",
            next_step="use a reward model of the policy's family, or serve this one over HTTP (kind: http)",
        )
