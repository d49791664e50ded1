"""Where the algorithms end, through the real update: pi_0 exp(r / beta) / Z in a bandit, which is known exactly.

A bandit of three arms is a policy of three logits. Each batch holds every arm once, as if an engine had sampled them
evenly, and the correction weighs them by the policy: so that one update takes the expectation over the policy, without
any chance.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from configs.algorithm import A2CConfig, AlgorithmConfig, APAConfig, AWRConfig, PPOConfig
from configs.correction import CorrectionConfig
from configs.learner import LearnerConfig, OptimizerConfig
from learner.experience import PassSettings
from learner.update import Updater, UpdateSettings
from protocol.messages import PolicyVersions, Prompt, Rollout, RolloutKey, ScoredBatch, ScoredRollout
from tests.plain_engine import PlainEngine

PI_INIT, REWARDS, BETA = (0.5, 0.3, 0.2), (0.0, 1.0, 2.0), 0.5
PI_STAR = (0.03666671, 0.16255943, 0.80077385)
"""V22, and V8h for raw APA: (0.5, 0.3 e^2, 0.2 e^4) / 13.63634684."""
NUM_UPDATES = 300
EXACT: dict[str, Any] = {
    "minibatch_responses": 3,
    "num_epochs": 1,
    "advantage": "reinforce",
    "adv_norm": "none",
    "correction": CorrectionConfig(weight="full"),
}


class Bandit(nn.Module):
    """A policy of one state."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(PI_INIT).log())

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, predict_index: Tensor, target_ids: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.log_softmax(self.logits, dim=0)
        entropy = -(logprobs.exp() * logprobs).sum()
        return logprobs[target_ids], entropy.expand(len(target_ids))


def every_arm() -> ScoredBatch:
    prompt = Prompt(prompt_id="p", token_ids=np.array([3], dtype=np.int32), text="pull")
    rollouts = [
        ScoredRollout(
            rollout=Rollout(
                key=RolloutKey(1, 0, "p", arm),
                prompt=prompt,
                response_ids=np.array([arm], dtype=np.int32),
                behavior_logprobs=np.array([-math.log(3)], dtype=np.float32),
                finish_reason="stop",
                policy_versions=PolicyVersions(1, 1),
                worker="rollout-0",
            ),
            score=score,
            components={},
            ref_logprobs=np.array([math.log(reference)], dtype=np.float32),
        )
        for arm, (score, reference) in enumerate(zip(REWARDS, PI_INIT, strict=True))
    ]
    return ScoredBatch(round=1, iteration=0, policy_version=2, rollouts=tuple(rollouts))


def limit(algorithm: AlgorithmConfig) -> list[float]:
    bandit = Bandit()
    policy = PlainEngine(
        bandit,
        optimizer=OptimizerConfig(learning_rate=0.05, schedule="cosine", final_fraction=0.0),
        settings=LearnerConfig(max_grad_norm=100.0),
        total_steps=NUM_UPDATES,
    )
    passes = PassSettings(temperature=1.0, token_budget=64, layout="sorted", pad_id=0)
    settings = UpdateSettings(algorithm=algorithm, passes=passes, max_response_tokens=1, run_seed=0)
    updater, batch = Updater(policy=policy, critic=None, settings=settings), every_arm()
    for _ in range(NUM_UPDATES):
        updater.update(batch)
    return torch.softmax(bandit.logits.detach(), dim=0).tolist()


@pytest.mark.parametrize(
    "algorithm",
    [
        PPOConfig(kl_beta=BETA, **EXACT),
        PPOConfig(kl_beta=BETA, kl_in="loss", kl_estimator="k2", **EXACT),
        A2CConfig(kl_beta=BETA, **EXACT),
        APAConfig(apa_lambda=BETA, **EXACT),
    ],
    ids=["ppo, k1 in the reward", "ppo, k2 in the loss", "a2c, k1 in the reward", "apa, raw advantages"],
)
def test_i22_the_limit_is_the_tilted_reference(algorithm: AlgorithmConfig, vectors) -> None:
    v = vectors["V22_kl_optimal"]
    assert (tuple(v["pi0"]), tuple(v["reward"]), v["beta"], tuple(v["pi_star"])) == (PI_INIT, REWARDS, BETA, PI_STAR)
    found = limit(algorithm)
    assert found == pytest.approx(PI_STAR, abs=1e-3)
    expected_reward = sum(p * r for p, r in zip(found, REWARDS, strict=True))
    divergence = sum(p * math.log(p / q) for p, q in zip(found, PI_INIT, strict=True))
    assert expected_reward - BETA * divergence == pytest.approx(v["beta_logZ"], abs=1e-4)


def test_k3_in_the_loss_ends_elsewhere() -> None:
    """Its gradient is that of KL(ref || pi), whose optimum solves r = b - beta ref / pi."""
    found = limit(PPOConfig(kl_beta=BETA, kl_in="loss", kl_estimator="k3", **EXACT))
    offsets = [r + BETA * q / p for p, q, r in zip(found, PI_INIT, REWARDS, strict=True)]
    assert offsets == pytest.approx([offsets[0]] * 3, abs=0.02)
    assert abs(found[2] - PI_STAR[2]) > 0.02


def test_an_entropy_bonus_pulls_to_the_uniform_policy() -> None:
    """Without a KL, maximising E[r] + c H ends at exp(r / c) / Z."""
    found = limit(PPOConfig(kl_beta=0.0, entropy_bonus=0.8, **EXACT))
    total = sum(math.exp(r / 0.8) for r in REWARDS)
    assert found == pytest.approx([math.exp(r / 0.8) / total for r in REWARDS], abs=1e-3)


def test_awr_collapses_without_an_anchor_and_not_with_one() -> None:
    assert limit(AWRConfig(awr_lambda=1.0, **EXACT))[2] > 0.999
    anchored = limit(AWRConfig(awr_lambda=1.0, kl_beta=2.0, kl_in="loss", kl_estimator="k2", **EXACT))
    assert 0.2 < anchored[2] < 0.95
