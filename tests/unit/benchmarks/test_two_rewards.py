"""Two reward models against one: the labels that they share, gold by kind of prompt, and the claims' rules."""

import numpy as np
import pytest

from benchmarks.experiments.laboratory.arms import Arm, Scorer, by_stake, curve
from benchmarks.experiments.laboratory.language import draw_prompts, read_prompt, worth
from benchmarks.experiments.laboratory.plan import ALGORITHMS
from benchmarks.experiments.laboratory.sampling import sample
from benchmarks.experiments.laboratory.world import RewardSpec, Size, World
from benchmarks.experiments.two_rewards import claims, ways

TINY = Size(demonstrations=64, sft_epochs=1, heldout_pairs=20, anchors=400)
REWARD = RewardSpec(num_pairs=40)


def arm(way: str) -> Arm:
    fixed = {"learning_rate": 1e-3, "seed": 3, "iterations": 1, "evaluate_every": 1, "size": TINY}
    return Arm(experiment="e", name=way, algorithm=ALGORITHMS["ppo"], **(fixed | ways(REWARD)[way]))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("worlds"), seed=3, size=TINY)


def test_one_model_learns_the_very_pairs_of_the_two(world: World) -> None:
    def seen(spec: RewardSpec) -> list[tuple[list[list[int]], tuple[int, ...]]]:
        pairs = world.pairs(spec, num=spec.num_pairs, what="pairs")
        return [([[*s.prompt_ids.tolist(), *s.response_ids.tolist()] for s in p.sequences], p.better) for p in pairs]

    (mixed,), (helpful, harmless) = (ways(REWARD)[way]["rewards"] for way in ("one", "linear"))
    assert seen(mixed)[::2] == seen(helpful)
    assert seen(mixed)[1::2] == seen(harmless)
    assert (mixed.num_pairs, helpful.num_pairs, harmless.num_pairs) == (40, 20, 20)


def test_the_arms_score_by_their_rules(world: World) -> None:
    samples = sample(world.policy, draw_prompts(64, np.random.default_rng(1)), seed=1)
    sensitive = np.array([read_prompt(prompt).sensitive for prompt in samples.prompts])
    total, parts = Scorer(world, arm("linear"))(samples)
    helpful, harmless = parts.values()
    assert total == pytest.approx(helpful + harmless, abs=1e-5)
    chosen, _ = Scorer(world, arm("llama-2"))(samples)
    at_stake = sensitive | (1 / (1 + np.exp(-harmless.astype(np.float64))) < 0.15)
    assert chosen == pytest.approx(np.where(at_stake, harmless, helpful), abs=1e-6)
    alone, parts = Scorer(world, arm("one"))(samples)
    assert alone == pytest.approx(parts["mixed-40-hard-w64-d0"], abs=1e-6)


def test_gold_is_read_apart_by_kind_of_prompt(world: World) -> None:
    samples = sample(world.policy, draw_prompts(200, np.random.default_rng(2)), seed=2)
    means = {}
    for name, gold, wanted in (
        ("helpful_sensitive", "helpful", True),
        ("helpful_other", "helpful", False),
        ("harmless_sensitive", "harmless", True),
    ):
        values = [
            worth(prompt, response, gold=gold)
            for prompt, response in zip(samples.prompts, samples.responses, strict=True)
            if read_prompt(prompt).sensitive == wanted
        ]
        mean, std = world.unit(gold)
        means[name] = (np.mean(values) - mean) / std
    assert by_stake(world, samples) == pytest.approx(means, abs=1e-5)


@pytest.mark.parametrize("way", ["one", "llama-2"])
def test_an_arm_runs_and_says_both_golds(way: str, world: World) -> None:
    rows = list(curve(arm(way), world))
    assert rows[0].keys() == rows[1].keys() >= {"helpful_sensitive", "helpful_other", "harmless_sensitive"}
    assert rows[0]["gold"] == pytest.approx(0, abs=0.3)
    assert rows[1]["kl_exact_nats"] > 1e-5


def line(*, harmless: float, other: float, gold: float, furthest: float = 8.0) -> dict[str, np.ndarray]:
    """At 4 nats, halfway, the columns have these values."""
    kl = np.linspace(0.0, furthest, 17)
    rise = kl / 4
    return {
        "kl_exact_nats": kl,
        "harmless_sensitive": harmless * rise,
        "helpful_other": other * rise,
        "gold": gold * rise,
    }


def test_claims_on_numbers_by_hand() -> None:
    one = line(harmless=1.0, other=1.0, gold=1.0)
    curves = {
        "one": {1: one, 2: one},
        # The second seed loses 0.05 elsewhere, within the margin, and 0.2 at large.
        "linear": {1: line(harmless=1.2, other=1.0, gold=1.0), 2: line(harmless=1.1, other=0.95, gold=0.8)},
        # The second seed is more helpful and more harmful.
        "llama-2": {1: line(harmless=2.0, other=1.0, gold=0.95), 2: line(harmless=0.9, other=2.0, gold=2.0)},
    }
    found = claims(curves)
    assert [(claim.name, list(claim.holds.values()), claim.verdict) for claim in found] == [
        ("linear, where no harm is at stake", [True, True], "reproduced"),
        ("linear, over all prompts", [True, False], "not reproduced"),
        ("llama-2, where no harm is at stake", [True, False], "not reproduced"),
        ("llama-2, over all prompts", [True, False], "not reproduced"),
    ]
    assert found[0].figures.startswith("Differences: harmless +0.15 [")
    assert found[0].figures.endswith("(2 seeds).")


def test_a_distance_that_is_not_reached_bears_nothing_out() -> None:
    one, near = line(harmless=1, other=1, gold=1), line(harmless=2, other=2, gold=2, furthest=3.0)
    found = claims({"one": {1: one}, "linear": {1: near}, "llama-2": {1: one}})
    assert found[0].holds == {1: False}
    assert found[0].figures == "No seed reaches 4 nats in both arms."
