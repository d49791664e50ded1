"""Batches of responses that were read from data: nobody recorded log-probs, and nothing is made up in their place."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.algorithm import AlgorithmConfig, APAConfig, AWRConfig, PPOConfig
from configs.correction import CorrectionConfig
from configs.learner import BatchGuardsConfig, LearnerConfig, OptimizerConfig
from learner.experience import PassSettings, flatten
from learner.records import read_batch, write_batch
from learner.trust import require_version
from learner.update import Updater, UpdateSettings
from protocol import metrics as names
from protocol.errors import UntrustedBatchError
from protocol.messages import NOT_SAMPLED, ScoredBatch
from tests.learner_batches import scored_batch, tiny_critic, tiny_policy
from tests.plain_engine import RecordingEngine

RATE = OptimizerConfig(learning_rate=1e-3)
MINE: dict[str, Any] = {"minibatch_responses": 4, "num_epochs": 2}
ALGORITHMS: dict[str, AlgorithmConfig] = {
    "awr": AWRConfig(**MINE),
    "awr, reinforce, k2 in the loss": AWRConfig(
        advantage="reinforce", kl_beta=0.1, kl_in="loss", kl_estimator="k2", **MINE
    ),
    "apa": APAConfig(**MINE),
    "apa, reinforce, whitened": APAConfig(advantage="reinforce", adv_norm="whiten", **MINE),
}


def make(algorithm: AlgorithmConfig) -> Updater:
    critic = None
    if algorithm.has_critic:
        critic = RecordingEngine(tiny_critic(), optimizer=RATE, settings=LearnerConfig(), name="critic")
    return Updater(
        policy=RecordingEngine(tiny_policy(), optimizer=RATE, settings=LearnerConfig(), name="policy"),
        critic=critic,
        settings=UpdateSettings(
            algorithm=algorithm,
            passes=PassSettings(temperature=1.0, token_budget=256, layout="sorted", pad_id=0),
            max_response_tokens=24,
            run_seed=0,
            guards=BatchGuardsConfig(),
        ),
    )


def recorded(batch: ScoredBatch) -> ScoredBatch:
    """Let the behaviour log-probs be those of a plain forward of the policy."""
    network, rollouts = tiny_policy().network, []
    for scored in batch.rollouts:
        prompt, response = scored.rollout.prompt.token_ids, scored.rollout.response_ids
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()
        with torch.no_grad():
            every = torch.log_softmax(network(input_ids=ids[None]).logits[0], dim=-1)[:-1].gather(-1, ids[1:, None])
        own = every[len(prompt) - 1 :, 0].numpy()
        rollouts.append(replace(scored, rollout=replace(scored.rollout, behavior_logprobs=own)))
    return replace(batch, rollouts=tuple(rollouts))


def unrecorded(batch: ScoredBatch) -> ScoredBatch:
    """Read the same responses from data."""
    rollouts = [
        replace(s, rollout=replace(s.rollout, behavior_logprobs=None, policy_versions=NOT_SAMPLED))
        for s in batch.rollouts
    ]
    return replace(batch, rollouts=tuple(rollouts))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_without_recorded_log_probs_the_gradients_are_those_of_the_policys_own_samples(name: str) -> None:
    batch = scored_batch()
    sampled, read = make(ALGORITHMS[name]), make(ALGORITHMS[name])
    with_figures, without = sampled.update(recorded(batch)), read.update(unrecorded(batch))
    for engine, twin in zip(sampled.engines.values(), read.engines.values(), strict=True):
        assert len(engine.gradients) == len(twin.gradients) == 6  # pyright: ignore[reportAttributeAccessIssue]
        assert all(map(torch.equal, engine.gradients, twin.gradients))  # pyright: ignore[reportAttributeAccessIssue]
        assert engine.gradients[0].norm() > 0  # pyright: ignore[reportAttributeAccessIssue]

    # What compares with whoever sampled is absent, not zero, and the log-ratio goes by its own name.
    kl = with_figures.metrics[names.OBJECTIVE_KL]
    left_out = ("sync/", "objective/kl_k", names.OBJECTIVE_KL_CLAMPED)
    kept = {n: v for n, v in with_figures.metrics.items() if not n.startswith(left_out)}
    assert without.metrics == kept | {names.OBJECTIVE_LOG_RATIO: kl}


def test_a_batch_is_sampled_or_read_as_a_whole() -> None:
    sampled, read = scored_batch(), unrecorded(scored_batch())
    mixed = replace(sampled, rollouts=(*sampled.rollouts[:5], *read.rollouts[5:]))
    with pytest.raises(ValueError, match="but not both"):
        flatten(mixed, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("algorithm", "what"),
    [
        (AWRConfig(correction=CorrectionConfig(weight="tis"), **MINE), r"correction\.weight = tis needs behaviour"),
        (PPOConfig(correction=CorrectionConfig(old_policy="behavior"), **MINE), "old_policy = behavior needs behav"),
    ],
    ids=["weight", "bypass"],
)
def test_what_needs_recorded_log_probs_does_not_do_without(algorithm: AlgorithmConfig, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        make(algorithm).update(unrecorded(scored_batch()))


def test_a_learner_takes_what_its_configuration_names_and_nothing_else() -> None:
    sampled, read = scored_batch(), unrecorded(scored_batch())
    require_version(sampled)
    require_version(read, source="data")
    with pytest.raises(UntrustedBatchError, match=r"r1/i0/p0000#0 was read from data .*rollout\.source = policy"):
        require_version(read)
    with pytest.raises(UntrustedBatchError, match=r"r1/i0/p0000#0 was sampled .*rollout\.source = data"):
        require_version(sampled, source="data")


def test_they_are_kept_and_learned_from_again(tmp_path: Path) -> None:
    batch = unrecorded(scored_batch())
    write_batch(tmp_path / "batch.parquet", batch, decode=lambda token_ids: "", kl_nats={})
    again = read_batch(tmp_path / "batch.parquet").batch
    assert {scored.rollout.behavior_logprobs for scored in again.rollouts} == {None}
    first, second = make(ALGORITHMS["apa"]), make(ALGORITHMS["apa"])
    assert first.update(batch).metrics == second.update(again).metrics
