"""Where the score lies, what rewards are divided by, and which responses are learned from."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.algorithm import AlgorithmConfig, APAConfig, PPOConfig
from configs.kl import KLControllerConfig
from configs.learner import LearnerConfig, OptimizerConfig
from learner.estimates import estimate
from learner.experience import Opinions, PassSettings, flatten
from learner.update import Updater, UpdateSettings
from protocol import metrics as names
from protocol.errors import NonFiniteError, UserError
from protocol.messages import ScoredBatch
from tests.learner_batches import scored_batch, tiny_critic, tiny_policy
from tests.plain_engine import RecordingEngine

CPU = torch.device("cpu")
PLAIN: dict[str, Any] = {"adv_norm": "none", "gamma": 0.9, "gae_lambda": 0.8}


def make(algorithm: AlgorithmConfig, *, layout: Any = "sorted") -> Updater:
    rate, settings = OptimizerConfig(learning_rate=1e-3), LearnerConfig()
    critic = None
    if algorithm.has_critic:
        critic = RecordingEngine(tiny_critic(), optimizer=rate, settings=settings, name="critic")
    return Updater(
        policy=RecordingEngine(tiny_policy(), optimizer=rate, settings=settings, name="policy"),
        critic=critic,
        settings=UpdateSettings(
            algorithm=algorithm,
            passes=PassSettings(temperature=1.0, token_budget=60, layout=layout, pad_id=0),
            max_response_tokens=24,
            run_seed=0,
        ),
    )


def opinions_of(batch: ScoredBatch, seed: int = 3) -> Opinions:
    """Draw log-probs and values of all states, the last ones included."""
    lengths = [len(scored.rollout.response_ids) for scored in batch.rollouts]
    drawn = torch.randn(3, sum(lengths), generator=torch.Generator().manual_seed(seed))
    ends = torch.randn(len(lengths), generator=torch.Generator().manual_seed(seed + 1))
    return Opinions(old_logprobs=drawn[0] - 4, entropies=drawn[1], values=drawn[2], final_values=ends)


def rows(flat: Tensor, batch: ScoredBatch) -> list[list[float]]:
    return [part.tolist() for part in flat.split([len(scored.rollout.response_ids) for scored in batch.rollouts])]


def slow_rewards(batch: ScoredBatch, opinions: Opinions, *, kl_beta: float) -> list[list[float]]:
    """The KL of every token and, one position after the last, the score."""
    return [
        [-kl_beta * (old - float(ref)) for old, ref in zip(own, scored.ref_logprobs, strict=True)] + [scored.score]
        for own, scored in zip(rows(opinions.old_logprobs, batch), batch.rollouts, strict=True)
    ]


def slow_gae(rewards: list[float], values: list[float], *, gamma: float, gae_lambda: float) -> list[float]:
    """Sum the discounted one-step errors outright; nothing follows the last position."""
    states = [*values, 0.0]
    errors = [r + gamma * states[t + 1] - states[t] for t, r in enumerate(rewards)]
    return [sum((gamma * gae_lambda) ** (k - t) * errors[k] for k in range(t, len(errors))) for t in range(len(errors))]


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.7, 0.0)])
def test_a_score_after_the_last_token_is_that_of_a_response_one_position_longer(
    gamma: float, gae_lambda: float
) -> None:
    batch = scored_batch(5)
    opinions = opinions_of(batch)
    algorithm = PPOConfig(score_at="after_last_token", adv_norm="none", gamma=gamma, gae_lambda=gae_lambda)
    found = estimate(flatten(batch, device=CPU), opinions, algorithm=algorithm, kl_beta=0.3)
    assert found.value_targets is not None
    num_tokens = len(opinions.old_logprobs)
    returns = rows(found.value_targets.returns[:num_tokens], batch)
    everything = zip(
        slow_rewards(batch, opinions, kl_beta=0.3),
        rows(opinions.values, batch),
        opinions.final_values.tolist(),
        rows(found.advantages, batch),
        returns,
        found.value_targets.returns[num_tokens:].tolist(),
        found.value_targets.old_values[num_tokens:].tolist(),
        found.rewards.tolist(),
        strict=True,
    )
    for rewards, values, end, advantages, learned, end_learned, end_value, total in everything:
        expected = slow_gae(rewards, [*values, end], gamma=gamma, gae_lambda=gae_lambda)
        assert advantages == pytest.approx(expected[:-1], rel=1e-4, abs=1e-5)
        assert learned == pytest.approx([a + v for a, v in zip(expected, values, strict=False)], rel=1e-4, abs=1e-5)
        # The value of the end is taught the score alone.
        assert (end_learned, end_value) == pytest.approx((rewards[-1], end), rel=1e-5)
        assert total == pytest.approx(sum(rewards), rel=1e-4, abs=1e-5)
        # The same by algebra: one more lambda for the score, and its forecast for the rest.
        mixed = [*rewards[:-2], rewards[-2] + gamma * (gae_lambda * rewards[-1] + (1 - gae_lambda) * end)]
        again = slow_gae(mixed, values, gamma=gamma, gae_lambda=gae_lambda)
        assert advantages == pytest.approx(again, rel=1e-4, abs=1e-5)


def test_a_score_after_the_last_token_in_numbers() -> None:
    """One token, KL 0, score 2, V = (0.5, 1.5), gamma 1, lambda 0.9: A = 0.9 * 2 + 0.1 * 1.5 - 0.5 = 1.45."""
    batch = scored_batch(1)
    rollout = replace(batch.rollouts[0].rollout, response_ids=np.array([5], dtype=np.int32))
    one = np.array([-1.0], dtype=np.float32)
    scored = replace(
        batch.rollouts[0], score=2.0, ref_logprobs=one, rollout=replace(rollout, behavior_logprobs=one.copy())
    )
    batch = replace(batch, rollouts=(scored,))
    opinions = Opinions(
        old_logprobs=torch.tensor([-1.0]),
        entropies=torch.zeros(1),
        values=torch.tensor([0.5]),
        final_values=torch.tensor([1.5]),
    )
    advantages = {}
    for score_at in ("last_token", "after_last_token"):
        algorithm = PPOConfig(score_at=score_at, adv_norm="none", gae_lambda=0.9)
        found = estimate(flatten(batch, device=CPU), opinions, algorithm=algorithm, kl_beta=0.1)
        advantages[score_at] = found.advantages.item()
    assert advantages == pytest.approx({"last_token": 1.5, "after_last_token": 1.45})
    assert found.value_targets is not None
    assert found.value_targets.returns.tolist() == pytest.approx([1.95, 2.0])


@pytest.mark.parametrize("layout", ["sorted", "packed"])
@pytest.mark.parametrize("aggregation", ["token_mean", "seq_mean_token_mean"])
def test_the_critic_learns_the_state_after_the_response_too(layout: Any, aggregation: Any) -> None:
    """One step of the critic on N + B states, against a plain forward of each response."""
    batch, critic = scored_batch(5), tiny_critic()
    algorithm = PPOConfig(
        score_at="after_last_token", minibatch_responses=5, aggregation=aggregation, kl_beta=0.0, gae_lambda=0.8
    )
    losses = []
    for scored in batch.rollouts:
        prompt, response = scored.rollout.prompt.token_ids, scored.rollout.response_ids
        ids = torch.from_numpy(np.concatenate([prompt, response])).long()
        states = critic.network.model(input_ids=ids[None]).last_hidden_state[0]
        values = critic.network.score(states)[len(prompt) - 1 :, 0]
        rewards = [0.0] * len(response) + [scored.score]
        advantages = slow_gae(rewards, values.tolist(), gamma=1.0, gae_lambda=0.8)
        losses.append(0.5 * (values - values.detach() - torch.tensor(advantages)).square())
    if aggregation == "token_mean":
        torch.cat(losses).mean().backward()
    else:
        torch.stack([loss.mean() for loss in losses]).mean().backward()
    expected = torch.cat([p.grad.flatten() for p in critic.parameters()])
    updater = make(algorithm, layout=layout)
    updater.update(batch)
    assert updater.critic is not None
    found = updater.critic.gradients[0]
    assert (found - expected).norm() < 1e-4 * expected.norm()
    assert [len(part) for part in updater.computed["returns"]] == [len(s.rollout.response_ids) for s in batch.rollouts]


def test_v4b_whitened_rewards_are_what_advantages_come_from(vectors: Any) -> None:
    """With values of zero and no tomorrow, a token's advantage is its reward."""
    v, expected = vectors["V2_reward"], vectors["V4b_whiten_rewards_no_shift"]
    lengths, rollouts, old = [3, 4], [], []
    for number, length in enumerate(lengths):
        scored = scored_batch(2).rollouts[number]
        ref = np.array(v["ref_logp"][number][:length], dtype=np.float32)
        rollout = replace(scored.rollout, response_ids=np.full(length, 5, dtype=np.int32), behavior_logprobs=ref)
        rollouts.append(replace(scored, rollout=rollout, ref_logprobs=ref, score=v["score"][number]))
        old += v["logp"][number][:length]
    batch, zeros = replace(scored_batch(2), rollouts=tuple(rollouts)), torch.zeros(sum(lengths))
    opinions = Opinions(
        old_logprobs=torch.tensor(old), entropies=zeros, values=zeros, final_values=torch.zeros(len(lengths))
    )
    algorithm = PPOConfig(whiten_rewards=True, adv_norm="none", gamma=0.0, gae_lambda=0.0)
    found = estimate(flatten(batch, device=CPU), opinions, algorithm=algorithm, kl_beta=v["beta"])
    whitened = [expected["whitened"][row][t] for row, length in enumerate(lengths) for t in range(length)]
    assert found.advantages.tolist() == pytest.approx(whitened, abs=1e-5)
    # What is reported of the rewards stays in units of the score.
    assert found.rewards.tolist() == pytest.approx(v["score_minus_beta_kl"], abs=1e-6)


def test_rewards_are_whitened_over_all_places_that_have_one() -> None:
    """The one after the last token too, as TRL does."""
    batch = scored_batch(4)
    opinions = opinions_of(batch)
    algorithm = PPOConfig(whiten_rewards=True, score_at="after_last_token", **PLAIN)
    found = estimate(flatten(batch, device=CPU), opinions, algorithm=algorithm, kl_beta=0.3)
    rewards = slow_rewards(batch, opinions, kl_beta=0.3)
    flat = [r for row in rewards for r in row]
    mean = sum(flat) / len(flat)
    std = math.sqrt(sum((r - mean) ** 2 for r in flat) / len(flat))
    for row, values, end, advantages in zip(
        rewards,
        rows(opinions.values, batch),
        opinions.final_values.tolist(),
        rows(found.advantages, batch),
        strict=True,
    ):
        white = [(r - mean) / std + mean for r in row]
        expected = slow_gae(white, [*values, end], gamma=0.9, gae_lambda=0.8)[:-1]
        assert advantages == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_rewards_too_large_to_have_a_variance_are_refused() -> None:
    batch = scored_batch(3)
    loud = replace(batch, rollouts=(batch.rollouts[0], replace(batch.rollouts[1], score=1e30), batch.rollouts[2]))
    with pytest.raises(NonFiniteError, match=r"variance of the rewards .* r1/i0/p0001#0, the largest"):
        estimate(flatten(loud, device=CPU), opinions_of(loud), algorithm=PPOConfig(whiten_rewards=True), kl_beta=0.0)


def siblings(batch: ScoredBatch, cut: Callable[[int], bool]) -> ScoredBatch:
    """Let three responses answer each prompt, and some be cut at the length limit."""
    rollouts = []
    for number, scored in enumerate(batch.rollouts):
        first = scored if number % 3 == 0 else rollouts[number - number % 3]
        rollout = replace(
            scored.rollout,
            key=first.rollout.key._replace(sample=number % 3),
            prompt=first.rollout.prompt,
            finish_reason="length" if cut(number) else "stop",
        )
        rollouts.append(replace(scored, rollout=rollout))
    return replace(batch, rollouts=tuple(rollouts))


DROPPING: dict[str, AlgorithmConfig] = {
    "gae": PPOConfig(minibatch_responses=4, num_epochs=2, kl_beta=0.1),
    "gae, rewards whitened, score after": PPOConfig(
        minibatch_responses=4, whiten_rewards=True, score_at="after_last_token"
    ),
    "rloo": PPOConfig(minibatch_responses=4, num_epochs=2, advantage="rloo"),
    "apa, grpo": APAConfig(minibatch_responses=4, advantage="grpo"),
    "reinforce": PPOConfig(minibatch_responses=4, advantage="reinforce", aggregation="seq_mean_token_sum"),
}


@pytest.mark.parametrize("name", DROPPING)
def test_dropped_responses_are_learned_from_as_if_they_had_not_been_sampled(name: str) -> None:
    algorithm = DROPPING[name]
    # Of the last prompt two are cut: where siblings are compared, the third has nothing to be compared with.
    alone = algorithm.advantage in ("rloo", "grpo")
    batch = siblings(scored_batch(15), lambda number: number % 3 == 0 or number == 13)
    left = tuple(s for n, s in enumerate(batch.rollouts) if n % 3 and n != 13 and not (alone and n == 14))
    dropping = make(algorithm.model_copy(update={"truncated_value": "drop"}))
    without = make(algorithm)
    report = dropping.update(batch)
    expected = without.update(replace(batch, rollouts=left))
    assert report.num_steps == expected.num_steps
    for mine, theirs in zip(dropping.engines.values(), without.engines.values(), strict=True):
        assert len(mine.gradients) == len(theirs.gradients) > 1
        for found, wanted in zip(mine.gradients, theirs.gradients, strict=True):
            assert (found - wanted).norm() < 1e-3 * wanted.norm()
    same = [n for n in expected.metrics if n.startswith(("policy/", "value/")) and n != names.POLICY_ENTROPY]
    assert len(same) > 5
    for metric in same:
        assert report.metrics[metric] == pytest.approx(expected.metrics[metric], rel=1e-3, abs=1e-5), metric
    assert report.metrics[names.POLICY_DROPPED] == 15 - len(left)
    assert names.POLICY_DROPPED not in expected.metrics
    # What was sampled is described whole.
    assert set(report.kl_nats_per_sequence) == {s.rollout.key for s in batch.rollouts}
    assert report.metrics[names.OBJECTIVE_SCORE] == pytest.approx(sum(s.score for s in batch.rollouts) / 15)


def test_steps_are_of_even_size_however_many_are_left() -> None:
    """Nine are left of twelve: three steps of three, not of four, four and one."""
    batch = siblings(scored_batch(12), lambda number: number in (1, 5, 7))
    updater = make(PPOConfig(minibatch_responses=4, truncated_value="drop"))
    sizes = []
    learn = updater._learn
    updater._learn = lambda train, indices, **sides: (sizes.append(len(indices)), learn(train, indices, **sides))[1]
    updater.update(batch)
    assert sizes == [3, 3, 3]


def test_the_controller_sees_the_kl_of_all_responses() -> None:
    controller = KLControllerConfig(kind="adaptive", target_nats_per_sequence=1.0, horizon_episodes=100)
    updater = make(PPOConfig(minibatch_responses=4, truncated_value="drop", kl_beta=0.1, kl_controller=controller))
    report = updater.update(siblings(scored_batch(12), lambda number: number % 3 == 0))
    error = min(max(report.metrics[names.OBJECTIVE_KL] - 1, -0.2), 0.2)
    assert updater.kl_beta == pytest.approx(0.1 * (1 + error * 12 / 100))


def test_an_iteration_with_nothing_left_is_an_error_that_names_the_limit() -> None:
    batch = siblings(scored_batch(6), lambda number: True)
    updater = make(PPOConfig(minibatch_responses=3, truncated_value="drop"))
    with pytest.raises(
        UserError, match=r"drop leaves nothing .* 6 responses.* 6 of them were cut at rollout\.max_resp"
    ):
        updater.update(batch)
    assert updater.policy.num_steps == 0
    lonely = siblings(scored_batch(6), lambda number: number % 3 > 0)
    with pytest.raises(UserError, match=r"4 of them were cut"):
        make(PPOConfig(minibatch_responses=3, truncated_value="drop", advantage="rloo")).update(lonely)


def test_clamped_exponents_are_counted() -> None:
    batch = scored_batch()
    metrics = make(PPOConfig(minibatch_responses=4)).update(batch).metrics
    assert (metrics[names.OBJECTIVE_KL_CLAMPED], metrics[names.SYNC_CLAMPED]) == (0.0, 0.0)
    place = max(range(12), key=lambda number: len(batch.rollouts[number].rollout.response_ids))
    scored = batch.rollouts[place]
    assert scored.rollout.behavior_logprobs is not None
    far, recorded = scored.ref_logprobs.copy(), scored.rollout.behavior_logprobs.copy()
    far[[0, 2]] -= 60.0
    recorded[1] -= 60.0
    rollouts = list(batch.rollouts)
    rollouts[place] = replace(scored, ref_logprobs=far, rollout=replace(scored.rollout, behavior_logprobs=recorded))
    metrics = make(PPOConfig(minibatch_responses=4)).update(replace(batch, rollouts=tuple(rollouts))).metrics
    assert (metrics[names.OBJECTIVE_KL_CLAMPED], metrics[names.SYNC_CLAMPED]) == (2.0, 1.0)


@pytest.mark.parametrize("apart", [False, True])
def test_the_kl_weight_of_apa_is_reported_in_units_of_the_score_where_rewards_are_whitened(apart: bool) -> None:
    """Two divisions, by the deviation of the rewards and by that of the advantages: the weight is what both make of it.

    Not to the digit, because whitening leaves the rewards' mean where it is.
    """
    over: dict[str, Any] = {"adv_norm_over": "minibatch"} if apart else {}
    common: dict[str, Any] = {"apa_lambda": 0.5, "adv_norm": "whiten", "minibatch_responses": 12} | over
    batch = scored_batch()
    louder = replace(batch, rollouts=tuple(replace(s, score=10 * s.score) for s in batch.rollouts))

    def beta_eff(scored: ScoredBatch, **settings: Any) -> float:
        updater = make(APAConfig(**common, **settings))
        assert updater.critic is not None
        for parameter in updater.critic.module.parameters():
            torch.nn.init.zeros_(parameter)
        return updater.update(scored).metrics[names.POLICY_BETA_EFF]

    assert beta_eff(batch, whiten_rewards=True) == pytest.approx(beta_eff(batch), rel=0.05)
    assert beta_eff(louder, whiten_rewards=True) == pytest.approx(10 * beta_eff(batch), rel=0.05)
