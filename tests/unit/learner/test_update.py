"""An update does what the equations say, and depends on nothing else. The engine here is plain PyTorch on one rank."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.algorithm import AlgorithmConfig, APAConfig, PPOConfig
from configs.kl import KLControllerConfig
from configs.learner import BatchGuardsConfig, LearnerConfig, OptimizerConfig
from learner.experience import PassSettings, flatten
from learner.update import Updater, UpdateSettings
from protocol import metrics as names
from protocol.errors import NonFiniteError
from protocol.messages import PolicyVersions, ScoredBatch, ScoredRollout, UpdateReport
from tests.learner_batches import scored_batch, tiny_critic, tiny_policy
from tests.plain_engine import RecordingEngine

PPO = PPOConfig(minibatch_responses=4, num_epochs=2)
APA = APAConfig(minibatch_responses=4, apa_lambda=0.5, num_epochs=2)
RATE = OptimizerConfig(learning_rate=1e-3)


def make(
    algorithm: AlgorithmConfig = PPO,
    *,
    token_budget: int = 256,
    layout: Any = "sorted",
    pad_id: int = 0,
    settings: LearnerConfig | None = None,
    guards: BatchGuardsConfig | None = None,
) -> Updater:
    settings = settings or LearnerConfig()
    return Updater(
        policy=RecordingEngine(tiny_policy(), optimizer=RATE, settings=settings, name="policy"),
        critic=RecordingEngine(tiny_critic(), optimizer=RATE, settings=settings, name="critic"),
        settings=UpdateSettings(
            algorithm=algorithm,
            passes=PassSettings(temperature=1.0, token_budget=token_budget, layout=layout, pad_id=pad_id),
            max_response_tokens=24,
            run_seed=0,
            guards=guards,
        ),
    )


def changed(batch: ScoredBatch, place: int, **fields: Any) -> ScoredBatch:
    rollouts = list(batch.rollouts)
    rollouts[place] = replace(rollouts[place], **fields)
    return replace(batch, rollouts=tuple(rollouts))


def on_policy(batch: ScoredBatch) -> ScoredBatch:
    """Let the behaviour log-probs be those of a plain forward of the policy."""
    network = tiny_policy().network
    rollouts: list[ScoredRollout] = []
    for scored in batch.rollouts:
        prompt, response = scored.rollout.prompt.token_ids, scored.rollout.response_ids
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()
        with torch.no_grad():
            every = torch.log_softmax(network(input_ids=ids[None]).logits[0], dim=-1)[:-1].gather(-1, ids[1:, None])
        own = every[len(prompt) - 1 :, 0].numpy()
        rollouts.append(replace(scored, rollout=replace(scored.rollout, behavior_logprobs=own)))
    return replace(batch, rollouts=tuple(rollouts))


@pytest.mark.parametrize("algorithm", [PPO, APA], ids=["ppo", "apa"])
@pytest.mark.parametrize(
    "other",
    [{"token_budget": 48}, {"layout": "packed"}, {"token_budget": 60, "layout": "packed"}, {"pad_id": 9}],
    ids=["small micro-batches", "packed", "packed and small", "another padding"],
)
def test_layout_and_split_change_neither_gradients_nor_metrics(algorithm: AlgorithmConfig, other: dict) -> None:
    plain, varied = make(algorithm), make(algorithm, **other)
    reports = [updater.update(scored_batch()) for updater in (plain, varied)]
    for engine, twin in ((plain.policy, varied.policy), (plain.critic, varied.critic)):
        assert len(engine.gradients) == len(twin.gradients) == 6
        assert (engine.gradients[0] - twin.gradients[0]).norm() < 1e-5 * engine.gradients[0].norm()
    for name, value in reports[0].metrics.items():
        assert reports[1].metrics[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("algorithm", [PPO, APA], ids=["ppo", "apa"])
def test_i4_the_first_minibatch_has_a_ratio_of_one(algorithm: AlgorithmConfig) -> None:
    report = make(algorithm).update(scored_batch())
    assert report.metrics[names.POLICY_FIRST_RATIO_GAP] < 1e-5
    if isinstance(algorithm, PPOConfig):
        assert report.metrics[names.POLICY_FIRST_CLIP_FRACTION] == 0.0


def test_one_whitened_ppo_step_against_a_slow_loop() -> None:
    """GAE, whitening, the clipped loss at ratio one and the value loss, written out for single numbers."""
    batch = scored_batch(5)
    algorithm = PPOConfig(minibatch_responses=5, kl_beta=0.3, gae_lambda=0.9, gamma=0.95)
    updater = make(algorithm)
    policy, critic = tiny_policy(), tiny_critic()
    logprobs, values, advantages, returns = [], [], [], []
    for scored in batch.rollouts:
        prompt, response = scored.rollout.prompt.token_ids, scored.rollout.response_ids
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()
        begin, end = len(prompt) - 1, len(ids) - 1
        every = torch.log_softmax(policy.network(input_ids=ids[None]).logits[0], dim=-1)
        logprobs.append(every[begin:end].gather(-1, ids[begin + 1 :, None])[:, 0])
        states = critic.network.model(input_ids=ids[None]).last_hidden_state[0]
        values.append(critic.network.score(states)[begin:end, 0])
        old, v, n = logprobs[-1].tolist(), values[-1].tolist(), end - begin
        rewards = [-0.3 * (old[t] - float(scored.ref_logprobs[t])) for t in range(n)]
        rewards[-1] += scored.score
        own, running = [0.0] * n, 0.0
        for t in reversed(range(n)):
            following = v[t + 1] if t + 1 < n else 0.0
            running = rewards[t] + 0.95 * following - v[t] + 0.95 * 0.9 * running
            own[t] = running
        advantages += own
        returns += [a + b for a, b in zip(own, v, strict=True)]
    mean = sum(advantages) / len(advantages)
    std = (sum((a - mean) ** 2 for a in advantages) / len(advantages)) ** 0.5
    white = torch.tensor([(a - mean) / std for a in advantages])
    flat = torch.cat(logprobs)
    (-(white * (flat - flat.detach()).exp()).sum() / len(white)).backward()
    (0.5 * (torch.cat(values) - torch.tensor(returns)).square().sum() / len(white)).backward()

    report = updater.update(batch)
    for engine, module in ((updater.policy, policy), (updater.critic, critic)):
        expected = torch.cat([p.grad.flatten() for p in module.parameters()])
        assert (engine.gradients[0] - expected).norm() < 1e-4 * expected.norm()
    assert report.metrics[names.POLICY_ADVANTAGE_STD] == pytest.approx(std, rel=1e-4)
    assert report.metrics[names.POLICY_GRAD_NORM] == pytest.approx(float(updater.policy.gradients[0].norm()), rel=1e-5)


def test_apa_pulls_to_the_tilted_reference_and_leaves_the_kl_out_of_the_reward() -> None:
    report = make(APA).update(scored_batch())
    assert report.metrics[names.OBJECTIVE_KL_BETA] == 0.0
    assert report.metrics[names.OBJECTIVE_REWARD] == pytest.approx(report.metrics[names.OBJECTIVE_SCORE])
    assert report.metrics[names.POLICY_BETA_EFF] == 0.5
    assert {names.POLICY_TARGET_POSITIVE, names.POLICY_RESIDUAL_MEAN} <= set(report.metrics)
    assert names.POLICY_CLIP_FRACTION not in report.metrics
    whitened = make(APA.model_copy(update={"adv_norm": "whiten"})).update(scored_batch()).metrics
    assert whitened[names.POLICY_BETA_EFF] == pytest.approx(0.5 * whitened[names.POLICY_ADVANTAGE_STD])


def test_the_reported_kl_is_the_sum_over_each_response() -> None:
    batch = on_policy(scored_batch())
    report = make().update(batch)
    for scored in batch.rollouts:
        sampled = scored.rollout.behavior_logprobs
        assert sampled is not None
        expected = float(np.sum(sampled - scored.ref_logprobs))
        assert report.kl_nats_per_sequence[scored.rollout.key] == pytest.approx(expected, abs=1e-4)
    mean = sum(report.kl_nats_per_sequence.values()) / len(batch.rollouts)
    assert report.metrics[names.OBJECTIVE_KL] == pytest.approx(mean, abs=1e-5)
    ratios = [s.ref_logprobs - s.rollout.behavior_logprobs for s in batch.rollouts]
    k3 = sum(float(np.sum(np.exp(r) - 1 - r)) for r in ratios) / len(ratios)
    assert report.metrics[names.OBJECTIVE_KL_K3] == pytest.approx(k3, rel=1e-4)
    per_token = -float(np.concatenate(ratios).mean())
    assert report.metrics[names.OBJECTIVE_KL_PER_TOKEN] == pytest.approx(per_token, abs=1e-5)
    assert report.metrics[names.SYNC_LOGPROB_GAP] < 1e-5


def test_i21_the_gap_to_the_engine_counts_tokens_of_this_version_only() -> None:
    batch = on_policy(scored_batch())
    sampled = batch.rollouts[1].rollout.behavior_logprobs
    assert sampled is not None
    wrong = replace(batch.rollouts[1].rollout, behavior_logprobs=sampled + np.float32(0.25))
    assert make().update(changed(batch, 1, rollout=wrong)).metrics[names.SYNC_LOGPROB_GAP] == pytest.approx(0.25, 1e-3)
    stale = replace(wrong, policy_versions=PolicyVersions(2, 3))
    assert make().update(changed(batch, 1, rollout=stale)).metrics[names.SYNC_LOGPROB_GAP] < 1e-5


def test_the_controller_moves_after_the_rewards() -> None:
    controller = KLControllerConfig(kind="adaptive", target_nats_per_sequence=1.0, horizon_episodes=100)
    updater = make(PPOConfig(minibatch_responses=4, kl_beta=0.1, kl_controller=controller))
    report = updater.update(scored_batch())
    assert report.metrics[names.OBJECTIVE_KL_BETA] == 0.1
    error = min(max(report.metrics[names.OBJECTIVE_KL] - 1, -0.2), 0.2)
    assert updater.kl_beta == pytest.approx(0.1 * (1 + error * 12 / 100))


def test_forward_passes_are_no_more_than_needed() -> None:
    updater = make(PPO, token_budget=10_000)
    updater.update(scored_batch())
    # One without gradient, and for each of two epochs one a minibatch of 4 out of 12 responses.
    assert updater.policy.num_forward == updater.critic.num_forward == 1 + 2 * 3


def test_the_critic_warms_up_alone() -> None:
    controller = KLControllerConfig(kind="adaptive", target_nats_per_sequence=1.0, horizon_episodes=100)
    updater = make(PPOConfig(minibatch_responses=4, critic_warmup_iterations=1, kl_beta=0.1, kl_controller=controller))
    before = torch.cat([p.detach().flatten().clone() for p in updater.policy.module.parameters()])
    report = updater.update(scored_batch(iteration=0))
    after = torch.cat([p.detach().flatten() for p in updater.policy.module.parameters()])
    assert torch.equal(before, after)
    assert report.num_steps == updater.critic.num_steps == 3
    assert names.POLICY_LOSS not in report.metrics
    assert updater.kl_beta == 0.1  # nor does the controller move for a policy that does not
    assert names.POLICY_LOSS in updater.update(scored_batch(iteration=1)).metrics
    assert updater.kl_beta != 0.1


def test_updates_are_the_same_bit_for_bit() -> None:
    def run() -> tuple[UpdateReport, Tensor]:
        updater = make()
        report = updater.update(scored_batch())
        return report, torch.cat([p.detach().flatten() for p in updater.policy.module.parameters()])

    (first, weights), (second, again) = run(), run()
    assert first == second
    assert torch.equal(weights, again)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"score": float("nan")}, "score"),
        ({"ref_logprobs": float("-inf")}, "reference log-prob"),
        ({"behavior_logprobs": float("nan")}, "behaviour log-prob"),
    ],
)
def test_numbers_that_are_not_finite_name_their_rollout(fields: dict[str, float], what: str) -> None:
    batch = scored_batch()
    scored = batch.rollouts[4]
    [(name, value)] = fields.items()
    if name == "score":
        batch = changed(batch, 4, score=value)
    elif name == "ref_logprobs":
        batch = changed(batch, 4, ref_logprobs=np.full_like(scored.ref_logprobs, value))
    else:
        numbers = np.full_like(scored.ref_logprobs, value)
        batch = changed(batch, 4, rollout=replace(scored.rollout, behavior_logprobs=numbers))
    with pytest.raises(NonFiniteError, match=rf"{what} .* r1/i0/p0004#0"):
        make().update(batch)


@pytest.mark.parametrize(("engine", "what"), [("policy", "log-prob of the policy"), ("critic", "value")])
@torch.no_grad()
def test_a_broken_network_stops_before_any_step(engine: str, what: str) -> None:
    updater = make()
    next(getattr(updater, engine).module.parameters()).fill_(torch.nan)
    with torch.enable_grad(), pytest.raises(NonFiniteError, match=what):
        updater.update(scored_batch())
    assert updater.policy.num_steps == 0


@pytest.mark.parametrize("mode", ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum_norm"])
def test_every_aggregation_reports_diagnostics_as_means(mode: Any) -> None:
    metrics = make(PPO.model_copy(update={"aggregation": mode})).update(scored_batch()).metrics
    assert 0.0 <= metrics[names.VALUE_CLIP_FRACTION] <= 1.0


def test_flat_and_padded_vectors_are_the_same() -> None:
    responses = flatten(scored_batch(), device=torch.device("cpu"))
    flat = torch.arange(responses.num_tokens, dtype=torch.float32)
    padded = responses.padded(flat)
    assert torch.equal(padded[responses.mask], flat)
    assert padded[:, 0].tolist() == responses.starts.tolist()
    assert not padded[~responses.mask].any()
