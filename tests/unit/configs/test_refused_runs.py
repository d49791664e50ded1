"""Runs that could learn nothing or not what they say are refused, and those next to them are not."""

import pytest

from configs.algorithm import PenalizedBase, PolicyGradientBase
from configs.load import ConfigError, load
from configs.scoring import HELDOUT
from protocol import metrics

PREFIX = metrics.SCORE_PREFIX
FIXED = [str(value).removeprefix(PREFIX) for value in vars(metrics).values() if str(value).startswith(PREFIX)]
PPO = "algorithm.name=ppo"
ALLOW = "rollout.truncated_sampling=allow"
ALONE = ("rollout.responses_per_iteration=1", "algorithm.minibatch_responses=1")


@pytest.mark.parametrize("name", [HELDOUT, *filter(None, FIXED)])  # without the prefix itself
def test_no_reward_takes_the_name_of_a_metric(name: str) -> None:
    assert "heldout_gap" in FIXED
    with pytest.raises(ConfigError, match=f"the name {name} is that of"):
        load("quickstart", [f"scoring.rewards=[{{kind: model, name: {name}}}]"])


@pytest.mark.parametrize(
    "overrides",
    [
        (PPO, ALLOW, "rollout.top_p=0.9"),  # what `allow` is for: the learner's own ratio
        (PPO, "algorithm.correction.weight=tis", "rollout.temperature=0.8"),
        (PPO, "algorithm.correction.old_policy=behavior"),
        (PPO, "algorithm.correction={weight: icepop, low: 1.0, high: 1.5}"),
        (PPO, "algorithm.correction={weight: icepop, low: 0.9, high: 1.0}"),
        (PPO, "algorithm.correction={weight: tis, low: 0.5, high: 1.0}"),  # the default, spelled out
        (PPO, "algorithm.correction={weight: none, low: 0.5, high: 2.0}"),
        ("algorithm={name: apa, value_clip: null}",),
        ("algorithm={name: awr, value_clip: 0.2}",),
        ("algorithm.name=a2c", "algorithm.value_clip=0.2"),
        (*ALONE,),  # APA does not whiten by default
        (PPO, *ALONE, "algorithm.adv_norm=batch_std_only"),
        (PPO, "algorithm.advantage=reinforce", "rollout.responses_per_iteration=2", "algorithm.minibatch_responses=1"),
        ("rounds.iterations=3",),
        ("rounds.iterations=1", "algorithm.name=dpo"),
        ("rounds.iterations=1", PPO, "algorithm.advantage=rloo"),  # there is no critic to warm up
        ("scoring.calibration_responses=2",),
        ("scoring.rewards=[{kind: model}, {kind: function, name: f, path: 'm:f', weight: -0.1}]",),
        ("scoring.rewards=[{kind: model}, {kind: function, name: f, path: 'examples.quickstart.gold:helpfulness'}]",),
        (PPO, "algorithm.advantage=grpo"),
        ("algorithm.advantage=grpo",),
    ],
    ids=" ".join,
)
def test_what_can_be_meant_is_accepted(overrides: tuple[str, ...]) -> None:
    assert isinstance(load("quickstart", overrides).algorithm.minibatch_responses, int)


@pytest.mark.parametrize("kl_beta", [0.0, 0.05])
def test_a_sweep_of_the_penalty_may_begin_at_none(kl_beta: float) -> None:
    penalty = ["algorithm.kl_in=loss", "algorithm.kl_estimator=k2", f"algorithm.kl_beta={kl_beta}"]
    algorithm = load("quickstart", [PPO, *penalty]).algorithm
    assert isinstance(algorithm, PenalizedBase)
    assert algorithm.kl_beta == kl_beta


def test_bounds_of_a_correction_keep_their_defaults() -> None:
    algorithm = load("quickstart", [PPO]).algorithm
    assert isinstance(algorithm, PolicyGradientBase)
    assert (algorithm.correction.low, algorithm.correction.high) == (0.5, 2.0)
