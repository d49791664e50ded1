"""Guards: each bound, in its own direction, over its window."""

import pytest

from cluster.guards import alarm
from configs.rounds import GuardsConfig


def iteration(**changes: float) -> dict[str, float]:
    calm = {
        "objective/kl_k1_per_sequence": 1.0,
        "score/heldout_gap": 0.1,
        "rollout/response_tokens_mean": 30.0,
        "rollout/repeated_3gram_fraction": 0.05,
        "policy/entropy": 1.5,
    }
    return calm | {name.replace("__", "/"): value for name, value in changes.items()}


def test_nothing_is_watched_unless_it_is_asked_for() -> None:
    wild = iteration(objective__kl_k1_per_sequence=1e3, policy__entropy=0.0)
    assert alarm([iteration(), wild], GuardsConfig()) is None


@pytest.mark.parametrize(
    ("guards", "calm", "bad", "says"),
    [
        (
            {"kl_nats_per_sequence": 6.0},
            {"objective__kl_k1_per_sequence": 5.9},
            {"objective__kl_k1_per_sequence": 6.1},
            "KL",
        ),
        ({"heldout_gap": 0.5}, {"score__heldout_gap": 0.59}, {"score__heldout_gap": 0.61}, "held-out"),
        (
            {"response_tokens_factor": 2.0},
            {"rollout__response_tokens_mean": 59.0},
            {"rollout__response_tokens_mean": 61.0},
            "length",
        ),
        (
            {"repetition_fraction": 0.3},
            {"rollout__repeated_3gram_fraction": 0.29},
            {"rollout__repeated_3gram_fraction": 0.31},
            "3-grams",
        ),
        ({"entropy_nats": 0.5}, {"policy__entropy": 0.51}, {"policy__entropy": 0.49}, "below"),
    ],
)
def test_each_guard_has_its_bound(guards: dict, calm: dict, bad: dict, says: str) -> None:
    bounds = GuardsConfig(**guards, window_iterations=1)
    assert alarm([iteration(), iteration(**calm)], bounds) is None
    found = alarm([iteration(), iteration(**bad)], bounds)
    assert found is not None
    assert says in found


def test_a_single_spike_is_averaged_out() -> None:
    bounds = GuardsConfig(kl_nats_per_sequence=6.0, window_iterations=3)
    spike = iteration(objective__kl_k1_per_sequence=12.0)
    assert alarm([iteration(), iteration(), spike], bounds) is None
    assert alarm([iteration(), spike, spike], bounds) is not None


def test_without_a_held_out_reward_model_its_gap_is_not_watched() -> None:
    bare = {name: value for name, value in iteration().items() if name != "score/heldout_gap"}
    assert alarm([bare, bare], GuardsConfig(heldout_gap=0.01)) is None
