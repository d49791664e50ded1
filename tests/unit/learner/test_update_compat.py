"""What the released code of the APA paper does in an update: whitening per minibatch, and each minibatch repeated."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from configs.algorithm import AlgorithmConfig, APAConfig, AWRConfig, PolicyGradientConfig, PPOConfig
from configs.learner import LearnerConfig, OptimizerConfig
from learner.batch import TokenSequence
from learner.experience import PassSettings
from learner.update import Updater, UpdateSettings
from protocol import metrics as names
from tests.learner_batches import scored_batch, tiny_critic, tiny_policy
from tests.plain_engine import RecordingEngine

RATE = OptimizerConfig(learning_rate=1e-3)
STILL = OptimizerConfig(learning_rate=1e-30)
"""Too small to move anything: every step sees the networks of the first."""
APART: dict[str, Any] = {"adv_norm": "whiten", "adv_norm_over": "minibatch"}
REPEATED: dict[str, Any] = {"minibatch_responses": 4, "num_epochs": 2, "repeat_minibatch": True}
TEXTS = [TokenSequence(np.array([t]), np.arange(t, t + 4)) for t in range(1, 9)]


class Updating:
    """An updater on plain engines, which notes the responses of every step."""

    def __init__(
        self,
        algorithm: PolicyGradientConfig,
        *,
        rate: OptimizerConfig = RATE,
        budget: int = 256,
        layout: Any = "sorted",
    ) -> None:
        def engine(module: torch.nn.Module, name: str) -> RecordingEngine:
            return RecordingEngine(module, optimizer=rate, settings=LearnerConfig(), name=name)

        self.policy = engine(tiny_policy(), "policy")
        self.updater = Updater(
            policy=self.policy,
            critic=engine(tiny_critic(), "critic") if algorithm.has_critic else None,
            settings=UpdateSettings(
                algorithm=algorithm,
                passes=PassSettings(temperature=1.0, token_budget=budget, layout=layout, pad_id=0),
                max_response_tokens=24,
                run_seed=0,
            ),
            texts=TEXTS,
        )
        self.minibatches: list[list[int]] = []
        step: Callable[..., None] = self.updater._step

        def noting(train: Any, indices: list[int], **sides: Any) -> None:
            self.minibatches.append(indices)
            step(train, indices, **sides)

        self.updater._step = noting


def moments_of(rows: list[list[float]]) -> tuple[float, float]:
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in flat) / len(flat))


def own_logprobs(policy: Any, rollout: Any) -> Tensor:
    ids = torch.from_numpy(np.concatenate([rollout.prompt.token_ids, rollout.response_ids])).long()
    every = torch.log_softmax(policy.network(input_ids=ids[None]).logits[0], dim=-1)[:-1].gather(-1, ids[1:, None])
    return every[len(rollout.prompt.token_ids) - 1 :, 0]


@pytest.mark.parametrize(
    "shape", [{}, {"budget": 48}, {"budget": 60, "layout": "packed"}], ids=["whole", "micro-batches", "packed"]
)
def test_every_minibatch_is_whitened_by_its_own_moments_against_a_slow_loop(shape: dict[str, Any]) -> None:
    """The gradient of each minibatch, written out: its own mean and deviation over tokens, however it is split."""
    batch = scored_batch()
    mine = Updating(PPOConfig(minibatch_responses=4, kl_beta=0.0, **APART), rate=STILL, **shape)
    report = mine.updater.update(batch)
    estimated = [part.tolist() for part in mine.updater.computed["advantages"]]
    assert len(mine.minibatches) == 3
    for number, indices in enumerate(mine.minibatches):
        policy = tiny_policy()
        mean, std = moments_of([estimated[i] for i in indices])
        loss, num_tokens = torch.zeros(()), sum(len(estimated[i]) for i in indices)
        for i in indices:
            logprobs = own_logprobs(policy, batch.rollouts[i].rollout)
            for t, advantage in enumerate(estimated[i]):
                ratio = (logprobs[t] - logprobs[t].detach()).exp()
                loss = loss - (advantage - mean) / std * ratio / num_tokens
        loss.backward()
        expected = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        assert (mine.policy.gradients[number] - expected).norm() < 1e-4 * expected.norm()
    assert report.metrics[names.POLICY_ADVANTAGE_STD] == pytest.approx(moments_of(estimated)[1], rel=1e-4)


def test_kept_advantages_are_those_estimated_where_no_single_whitening_is_right() -> None:
    plain, apart = (
        Updating(PPOConfig(minibatch_responses=4, **settings)) for settings in ({"adv_norm": "none"}, APART)
    )
    for one in (plain, apart):
        one.updater.update(scored_batch())
    pairs = zip(plain.updater.computed["advantages"], apart.updater.computed["advantages"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_one_minibatch_of_the_whole_batch_is_whitening_of_the_batch() -> None:
    whole: dict[str, Any] = {"minibatch_responses": 12, "num_epochs": 2}
    batch, apart = Updating(PPOConfig(**whole)), Updating(PPOConfig(**whole, **APART))
    assert batch.updater.update(scored_batch()) == apart.updater.update(scored_batch())


def test_the_kl_weight_of_apa_is_that_of_the_minibatches() -> None:
    mine = Updating(APAConfig(minibatch_responses=4, apa_lambda=0.3, **APART))
    metrics = mine.updater.update(scored_batch()).metrics
    estimated = [part.tolist() for part in mine.updater.computed["advantages"]]
    stds = [moments_of([estimated[i] for i in indices])[1] for indices in mine.minibatches]
    assert len(stds) == 6
    assert metrics[names.POLICY_BETA_EFF] == pytest.approx(0.3 * sum(stds) / 6, rel=1e-4)
    assert metrics[names.POLICY_BETA_EFF] != pytest.approx(0.3 * metrics[names.POLICY_ADVANTAGE_STD], rel=1e-3)


def test_before_the_policy_moves_the_kl_weight_is_that_of_the_batch() -> None:
    mine = Updating(APAConfig(minibatch_responses=4, apa_lambda=0.3, critic_warmup_iterations=1, **APART))
    metrics = mine.updater.update(scored_batch(iteration=0)).metrics
    assert metrics[names.POLICY_BETA_EFF] == pytest.approx(0.3 * metrics[names.POLICY_ADVANTAGE_STD])


@pytest.mark.parametrize(
    "algorithm", [PPOConfig(**REPEATED), APAConfig(**REPEATED, **APART), AWRConfig(**REPEATED)], ids=lambda a: a.name
)
def test_repeated_minibatches_are_those_of_the_first_pass_each_twice_in_a_row(algorithm: AlgorithmConfig) -> None:
    passes = Updating(algorithm.model_copy(update={"repeat_minibatch": False}))
    mine = Updating(algorithm)
    reports = [one.updater.update(scored_batch()) for one in (passes, mine)]
    first_pass = passes.minibatches[:3]
    assert mine.minibatches == [first_pass[0]] * 2 + [first_pass[1]] * 2 + [first_pass[2]] * 2
    assert [r.num_steps for r in reports] == [6, 6]
    assert mine.updater.critic.num_steps == passes.updater.critic.num_steps == 6
    assert torch.equal(mine.policy.gradients[0], passes.policy.gradients[0])
    # The second step is on the first one's responses, after that step.
    assert not torch.equal(mine.policy.gradients[1], mine.policy.gradients[0])
    assert not torch.equal(mine.policy.gradients[1], passes.policy.gradients[1])


def test_where_nothing_moves_a_repeated_step_is_the_same_step() -> None:
    mine = Updating(PPOConfig(**REPEATED), rate=STILL)
    mine.updater.update(scored_batch())
    gradients = mine.policy.gradients
    assert [torch.equal(a, b) for a, b in pairwise(gradients)] == [True, False, True, False, True]


def test_a_policy_that_is_far_enough_stops_within_the_repeats_and_the_critic_goes_on() -> None:
    mine = Updating(PPOConfig(max_approx_kl=1e-9, **REPEATED))
    report = mine.updater.update(scored_batch())
    # The first step is on the old policy itself; its repeat, on the same responses, sees how far that step went.
    assert (report.num_steps, report.metrics[names.POLICY_STOPPED_EARLY]) == (2, 1.0)
    assert mine.updater.critic.num_steps == len(mine.minibatches) == 6


def test_every_repeat_rehearses_texts_of_its_own() -> None:
    ptx: dict[str, Any] = {"ptx_coefficient": 0.5, "ptx_texts": 2}
    once = Updating(PPOConfig(**ptx, **REPEATED), rate=STILL)
    report = once.updater.update(scored_batch())
    assert report.metrics[names.POLICY_PTX_RATIO] > 0
    assert report.num_steps == 6
    assert not torch.equal(once.policy.gradients[0], once.policy.gradients[1])  # the same responses, other texts
    passes = Updating(PPOConfig(**ptx, **REPEATED | {"repeat_minibatch": False}), rate=STILL)
    again = passes.updater.update(scored_batch())
    for metric in (names.POLICY_PTX_RATIO, names.POLICY_PTX_NLL):  # the same texts over the whole update
        assert again.metrics[metric] == pytest.approx(report.metrics[metric], rel=1e-5)


def test_an_update_is_the_same_bit_for_bit_with_everything_on() -> None:
    def run() -> tuple[Any, Tensor]:
        mine = Updating(APAConfig(**REPEATED, **APART))
        report = mine.updater.update(scored_batch(iteration=2))
        return report, torch.cat([p.detach().flatten() for p in mine.policy.module.parameters()])

    (first, weights), (second, again) = run(), run()
    assert first == second
    assert torch.equal(weights, again)
