"""The options of an update: other algorithms, advantages without a critic, penalties, corrections, early stopping."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.algorithm import A2CConfig, AlgorithmConfig, APAConfig, AWRConfig, PPOConfig
from configs.correction import CorrectionConfig
from configs.learner import LearnerConfig, OptimizerConfig
from configs.load import load
from learner import checkpoint
from learner.experience import PassSettings
from learner.ops import advantages
from learner.update import Updater, UpdateSettings
from protocol import metrics as names
from protocol.messages import PolicyVersions, ScoredBatch
from tests.learner_batches import scored_batch, tiny_critic, tiny_policy
from tests.plain_engine import RecordingEngine

RATE = OptimizerConfig(learning_rate=1e-3)
MINE: dict[str, Any] = {"minibatch_responses": 4}
TIS = CorrectionConfig(weight="tis", high=1.2)
ALGORITHMS: dict[str, AlgorithmConfig] = {
    "awr": AWRConfig(**MINE),
    "a2c": A2CConfig(**MINE),
    "ppo, rloo": PPOConfig(advantage="rloo", num_epochs=2, **MINE),
    "ppo, grpo, k2 in the loss, entropy": PPOConfig(
        advantage="grpo", num_epochs=2, kl_in="loss", kl_estimator="k2", entropy_bonus=0.01, **MINE
    ),
    "apa, reinforce": APAConfig(advantage="reinforce", **MINE),
    "ppo, tis": PPOConfig(correction=TIS, num_epochs=2, **MINE),
    "ppo, sequence mask": PPOConfig(correction=CorrectionConfig(weight="sequence_mask", low=0.9), num_epochs=2, **MINE),
    "ppo, k3+ in the loss, whitened and repeated by minibatch": PPOConfig(
        kl_in="loss", kl_estimator="k3+", num_epochs=2, repeat_minibatch=True, adv_norm_over="minibatch", **MINE
    ),
    "ppo, bypass": PPOConfig(correction=CorrectionConfig(old_policy="behavior"), num_epochs=2, **MINE),
}


def make(algorithm: AlgorithmConfig, *, token_budget: int = 256, layout: Any = "sorted") -> Updater:
    critic = None
    if algorithm.has_critic:
        critic = RecordingEngine(tiny_critic(), optimizer=RATE, settings=LearnerConfig(), name="critic")
    return Updater(
        policy=RecordingEngine(tiny_policy(), optimizer=RATE, settings=LearnerConfig(), name="policy"),
        critic=critic,
        settings=UpdateSettings(
            algorithm=algorithm,
            passes=PassSettings(temperature=1.0, token_budget=token_budget, layout=layout, pad_id=0),
            max_response_tokens=24,
            run_seed=0,
        ),
    )


def near(batch: ScoredBatch, *, lag: int = 0, scale: float = 0.2) -> ScoredBatch:
    """Let three responses answer each prompt, sampled near the policy by a version that is `lag` behind."""
    network, rng = tiny_policy().network, np.random.default_rng(5)
    rollouts = []
    for number, scored in enumerate(batch.rollouts):
        old = rollouts[-(number % 3)].rollout if number % 3 else scored.rollout
        rollout = replace(
            scored.rollout,
            key=old.key._replace(sample=number % 3),
            prompt=old.prompt,
            policy_versions=PolicyVersions(batch.policy_version - lag, batch.policy_version - lag),
        )
        own = plain_logprobs(network, rollout).detach().numpy()
        rollout = replace(rollout, behavior_logprobs=own + rng.normal(scale=scale, size=own.shape).astype(np.float32))
        reference = own + rng.normal(scale=0.3, size=own.shape).astype(np.float32)
        rollouts.append(replace(scored, rollout=rollout, ref_logprobs=reference))
    return replace(batch, rollouts=tuple(rollouts))


def plain_logprobs(network: Any, rollout: Any, *, distributions: bool = False) -> Tensor:
    """Compute the log-probs of a response, or the whole next-token log-probs at its states, by a plain forward."""
    ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.response_ids])).long()
    every = torch.log_softmax(network(input_ids=ids[None]).logits[0], dim=-1)[:-1]
    begin = len(rollout.prompt.token_ids) - 1
    return every[begin:] if distributions else every.gather(-1, ids[1:, None])[begin:, 0]


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    "other", [{"token_budget": 48}, {"token_budget": 60, "layout": "packed"}], ids=["small micro-batches", "packed"]
)
def test_layout_and_split_change_neither_gradients_nor_metrics(name: str, other: dict) -> None:
    plain, varied = make(ALGORITHMS[name]), make(ALGORITHMS[name], **other)
    batch = near(scored_batch(), lag=1)
    reports = [updater.update(batch) for updater in (plain, varied)]
    for engine, twin in zip(plain.engines.values(), varied.engines.values(), strict=True):
        assert len(engine.gradients) == len(twin.gradients) == 3 * ALGORITHMS[name].num_epochs
        assert (engine.gradients[0] - twin.gradients[0]).norm() < 1e-5 * engine.gradients[0].norm()
    for metric, value in reports[0].metrics.items():
        assert reports[1].metrics[metric] == pytest.approx(value, rel=1e-3, abs=1e-5), metric


def test_one_step_of_everything_at_once_against_a_slow_loop() -> None:
    """RLOO, k2 and entropy in the loss, truncated weights: written out for single numbers."""
    algorithm = PPOConfig(
        minibatch_responses=12,
        advantage="rloo",
        adv_norm="none",
        kl_in="loss",
        kl_estimator="k2",
        kl_beta=0.3,
        entropy_bonus=0.05,
        correction=TIS,
    )
    batch, policy, updater = near(scored_batch()), tiny_policy(), make(algorithm)
    num_tokens = sum(len(scored.rollout.response_ids) for scored in batch.rollouts)
    scores = [scored.score for scored in batch.rollouts]
    loss = torch.zeros(())
    for number, scored in enumerate(batch.rollouts):
        own_group = range(number - number % 3, number - number % 3 + 3)
        advantage = scores[number] - sum(scores[j] for j in own_group if j != number) / 2
        now = plain_logprobs(policy.network, scored.rollout)
        sampled = scored.rollout.behavior_logprobs
        assert sampled is not None
        every = plain_logprobs(policy.network, scored.rollout, distributions=True)
        for t in range(len(now)):
            weight = min(math.exp(now[t].item() - float(sampled[t])), 1.2)
            ratio = (now[t] - now[t].detach()).exp()
            k2 = (now[t] - float(scored.ref_logprobs[t])) ** 2 / 2
            entropy = -(every[t].exp() * every[t]).sum()
            loss = loss + weight * (-advantage * ratio + 0.3 * k2 - 0.05 * entropy) / num_tokens
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    report = updater.update(batch)
    assert (updater.policy.gradients[0] - expected).norm() < 1e-4 * expected.norm()
    assert report.metrics[names.POLICY_LOSS] == pytest.approx(loss.item(), abs=1e-5)
    assert report.metrics[names.OBJECTIVE_KL_BETA] == 0.3
    assert report.metrics[names.OBJECTIVE_REWARD] == pytest.approx(sum(scores) / 12, abs=1e-6)
    assert updater.reward_kl_beta == 0.0


def test_one_step_of_awr_against_a_slow_loop() -> None:
    algorithm = AWRConfig(
        minibatch_responses=12, num_epochs=1, advantage="reinforce", adv_norm="whiten", awr_lambda=0.7, max_weight=2.0
    )
    batch, policy, updater = near(scored_batch()), tiny_policy(), make(algorithm)
    scores, lengths = zip(*((s.score, len(s.rollout.response_ids)) for s in batch.rollouts), strict=True)
    raw = [score - sum(scores) / 12 for score in scores]
    mean = sum(a * n for a, n in zip(raw, lengths, strict=True)) / sum(lengths)
    std = math.sqrt(sum((a - mean) ** 2 * n for a, n in zip(raw, lengths, strict=True)) / sum(lengths))
    weights = [min(math.exp((a - mean) / std / 0.7), 2.0) for a in raw]
    parts = [w * plain_logprobs(policy.network, s.rollout).sum() for w, s in zip(weights, batch.rollouts, strict=True)]
    (-sum(parts) / sum(lengths)).backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    metrics = updater.update(batch).metrics
    assert (updater.policy.gradients[0] - expected).norm() < 1e-4 * expected.norm()
    squares = sum(w * w * n for w, n in zip(weights, lengths, strict=True)) * sum(lengths)
    ess = sum(w * n for w, n in zip(weights, lengths, strict=True)) ** 2 / squares
    assert metrics[names.POLICY_WEIGHT_ESS] == pytest.approx(ess, rel=1e-4)
    clipped = sum(n for w, n in zip(weights, lengths, strict=True) if w == 2.0) / sum(lengths)
    assert metrics[names.POLICY_WEIGHT_CLIP] == pytest.approx(clipped, rel=1e-4)


@pytest.mark.parametrize("name", [name for name, algorithm in ALGORITHMS.items() if not algorithm.has_critic])
def test_without_a_critic_there_is_no_trace_of_one(name: str, tmp_path: Path) -> None:
    """And what a checkpoint keeps without it continues bit for bit."""
    updater, batch = make(ALGORITHMS[name]), near(scored_batch())
    report = updater.update(batch)
    assert list(updater.engines) == ["policy"]
    assert not [metric for metric in report.metrics if metric.startswith("value/")]
    assert report.num_steps == updater.policy.num_steps == 6
    state = checkpoint.LearnerState(policy_version=3, kl_controller=None, world_size=1, zero_stage=0)
    checkpoint.save(tmp_path, engines=updater.engines, state=state)
    resumed = make(ALGORITHMS[name])
    checkpoint.load(tmp_path, engines=resumed.engines, zero_stage=0)
    assert resumed.update(batch) == updater.update(batch)


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_a_critic_too_many_or_too_few_is_refused(advantage: Any) -> None:
    mine = make(PPOConfig(advantage="reinforce" if advantage == "gae" else "gae"))
    settings = replace(mine.settings, algorithm=PPOConfig(advantage=advantage))
    with pytest.raises(ValueError, match="critic"):
        Updater(policy=mine.policy, critic=mine.critic, settings=settings)


def test_the_policy_stands_still_once_it_is_far_enough_and_the_critic_goes_on() -> None:
    report = make(PPOConfig(num_epochs=2, max_approx_kl=1e-9, **MINE)).update(scored_batch())
    # The first step's minibatch was on the old policy itself, the second's was not.
    assert report.num_steps == 2
    assert report.metrics[names.POLICY_STOPPED_EARLY] == 1.0
    patient = make(PPOConfig(num_epochs=2, max_approx_kl=100.0, **MINE))
    again = patient.update(scored_batch())
    assert (again.num_steps, again.metrics[names.POLICY_STOPPED_EARLY]) == (6, 0.0)
    unbounded = make(PPOConfig(num_epochs=2, **MINE)).update(scored_batch())
    assert names.POLICY_STOPPED_EARLY not in unbounded.metrics
    assert {k: v for k, v in again.metrics.items() if k != names.POLICY_STOPPED_EARLY} == unbounded.metrics


def test_bypass_takes_the_ratio_against_the_engine() -> None:
    batch = near(scored_batch())
    bypass = PPOConfig(correction=CorrectionConfig(old_policy="behavior"), **MINE)
    gap = max(
        float(
            np.abs(
                np.expm1(plain_logprobs(tiny_policy().network, s.rollout).detach() - s.rollout.behavior_logprobs)
            ).max()
        )
        for s in batch.rollouts
    )
    assert 0 < make(bypass).update(batch).metrics[names.POLICY_FIRST_RATIO_GAP] <= gap + 1e-4
    assert make(PPOConfig(**MINE)).update(batch).metrics[names.POLICY_FIRST_RATIO_GAP] < 1e-5


@pytest.mark.parametrize("kind", [APAConfig, AWRConfig])
def test_targets_are_reweighed_for_old_versions_only(kind: type) -> None:
    gradients = {}
    for lag in (0, 1):
        for correction in (CorrectionConfig(), TIS):
            updater = make(kind(minibatch_responses=12, num_epochs=1, correction=correction))
            updater.update(near(scored_batch(), lag=lag))
            gradients[lag, correction.weight] = updater.policy.gradients[0]
    assert torch.equal(gradients[0, "none"], gradients[0, "tis"])
    assert torch.equal(gradients[0, "none"], gradients[1, "none"])
    assert not torch.equal(gradients[1, "none"], gradients[1, "tis"])


@pytest.mark.parametrize("lag", [0, 2])
def test_i21_the_mismatch_is_reported_with_its_lag(lag: int) -> None:
    batch = near(scored_batch(), lag=lag)
    metrics = make(PPOConfig(correction=TIS, **MINE)).update(batch).metrics
    gaps = [
        (
            plain_logprobs(tiny_policy().network, s.rollout).detach() - torch.from_numpy(s.rollout.behavior_logprobs)
        ).tolist()
        for s in batch.rollouts
    ]
    flat = [gap for row in gaps for gap in row]
    k3 = sum(math.exp(gap) - 1 - gap for gap in flat) / len(flat)
    assert metrics[names.SYNC_K3] == pytest.approx(k3, rel=1e-2)
    assert metrics[names.SYNC_CORRECTED] == pytest.approx(sum(math.exp(g) > 1.2 for g in flat) / len(flat), abs=1e-6)
    # What is measured at this very version is left out where no token is of it.
    ratios = [math.exp(gap) for gap in flat]
    ess = sum(ratios) ** 2 / len(ratios) / sum(ratio * ratio for ratio in ratios)
    here = {
        names.SYNC_LOGPROB_GAP_MEAN: sum(map(abs, flat)) / len(flat),
        names.SYNC_RATIO_MAX: max(ratios),
        names.SYNC_ESS_FRACTION: ess,
    }
    assert {name: metrics[name] for name in here if name in metrics} == pytest.approx(
        here if lag == 0 else {}, rel=1e-3
    )
    assert (names.SYNC_K3_LAG0 in metrics) == (lag == 0)
    lags = {name: value for name, value in metrics.items() if name.startswith(names.SYNC_LAG_PREFIX)}
    assert lags == {f"{names.SYNC_LAG_PREFIX}{lag}": len(flat)}


def test_a_correction_that_leaves_no_token_takes_no_mean_of_nothing() -> None:
    correction = CorrectionConfig(weight="icepop", low=1e8, high=1e9)
    report = make(PPOConfig(correction=correction, **MINE)).update(near(scored_batch()))
    assert report.metrics[names.POLICY_LOSS] == 0.0
    assert names.POLICY_APPROX_KL not in report.metrics
    assert all(math.isfinite(value) for value in report.metrics.values())


RECORDED = {
    "ppo": {
        "policy/loss": -0.00339,
        "policy/grad_norm": 3.8648353,
        "policy/approx_kl": 0.0007475,
        "policy/advantage_std": 0.9759182,
        "value/loss": 0.4571325,
        "value/grad_norm": 3.1615073,
        "objective/kl_k1_per_sequence": -10.654387,
        "objective/reward": 0.4190872,
    },
    "apa": {
        "policy/loss": 81.36918,
        "policy/grad_norm": 73.4840495,
        "policy/approx_kl": 0.0009248,
        "policy/advantage_std": 0.8795678,
        "value/loss": 0.3731487,
        "value/grad_norm": 2.8780437,
        "objective/kl_k1_per_sequence": -10.5232587,
        "objective/reward": -0.1136322,
    },
}
"""Of the fourth update with the settings of the quickstart, from before there were any of these options."""


@pytest.mark.parametrize("name", RECORDED)
def test_without_options_the_quickstart_computes_what_it_always_did(name: str) -> None:
    algorithm = load("quickstart", [f"algorithm.name={name}"]).algorithm.model_copy(update={"minibatch_responses": 4})
    updater = make(algorithm)
    passes = PassSettings(temperature=0.9, token_budget=70, layout="sorted", pad_id=0)
    updater.settings = replace(updater.settings, passes=passes)
    for number in range(4):
        metrics = updater.update(scored_batch(seed=number, iteration=number)).metrics
    for metric, value in RECORDED[name].items():
        assert metrics[metric] == pytest.approx(value, rel=2e-4, abs=2e-6), metric


@pytest.mark.parametrize("estimator", ["rloo", "grpo", "reinforce"])
def test_without_a_critic_a_better_response_stays_one_however_long_the_others_are(estimator: Any) -> None:
    """Whitening would subtract a mean that the longest response draws to itself."""
    algorithm = PPOConfig(advantage=estimator)
    totals, lengths = torch.tensor([0.3, -0.3, 3.0, -3.0]), torch.tensor([5, 5, 40, 5])
    mask = torch.arange(40)[None] < lengths[:, None]
    raw = advantages.without_critic(totals, groups=torch.tensor([0, 0, 1, 1]), mask=mask, estimator=estimator)
    found = advantages.normalize(raw, mask, mode=algorithm.adv_norm)[:, 0]
    assert (found.sign() == totals.sign()).all()
    assert PPOConfig(advantage="reinforce", adv_norm="whiten").adv_norm == "whiten"  # said is said
    assert APAConfig(advantage=estimator).adv_norm == "none"


def test_the_kl_weight_of_apa_is_reported_in_units_of_the_score_where_groups_are_normalised() -> None:
    """Group-normalised advantages of scores ten times as large are the same, and pull ten times less against the KL."""
    batch = near(scored_batch())
    louder = replace(batch, rollouts=tuple(replace(s, score=10 * s.score) for s in batch.rollouts))
    quiet, loud = (make(APAConfig(advantage="grpo", apa_lambda=0.5, **MINE)).update(b).metrics for b in (batch, louder))
    stds = [np.std([s.score for s in batch.rollouts[i : i + 3]]) for i in range(0, 12, 3)]
    assert quiet[names.POLICY_BETA_EFF] == pytest.approx(0.5 * np.mean(stds), rel=1e-4)
    assert loud[names.POLICY_BETA_EFF] == pytest.approx(10 * quiet[names.POLICY_BETA_EFF], rel=1e-4)
    assert loud[names.POLICY_LOSS] == pytest.approx(quiet[names.POLICY_LOSS], rel=1e-4)
