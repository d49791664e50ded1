"""DPO and rejection sampling in the laboratory: several samples of a prompt, their updaters, and the claims' rules."""

import numpy as np
import pytest

from benchmarks.experiments.laboratory.arms import Arm, curve, make_updater, scored_batch
from benchmarks.experiments.laboratory.language import draw_prompts
from benchmarks.experiments.laboratory.networks import copy_of
from benchmarks.experiments.laboratory.plan import ALGORITHMS, SELECTION, SLICE, Command, Places, tempered
from benchmarks.experiments.laboratory.report import BySeed, frontier
from benchmarks.experiments.laboratory.sampling import Samples, sample
from benchmarks.experiments.laboratory.world import RewardSpec, Size, World
from benchmarks.experiments.selection import arms, claims
from configs.algorithm import AlgorithmConfig
from learner.selection import best_against_worst, ranked
from protocol import metrics as names
from protocol.messages import ScoredBatch

TINY = Size(demonstrations=64, sft_epochs=1, heldout_pairs=20, anchors=400)
SPEC = RewardSpec(num_pairs=40)


def arm(algorithm: AlgorithmConfig) -> Arm:
    fixed = {"learning_rate": 1e-3, "seed": 3, "iterations": 2, "evaluate_every": 1, "rewards": (SPEC,), "size": TINY}
    return Arm(experiment="e", name="a", algorithm=algorithm, **fixed)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("worlds"), seed=3, size=TINY)


def drawn(world: World, *, num_prompts: int, each: int, seed: int = 5) -> Samples:
    prompts = draw_prompts(num_prompts, np.random.default_rng(seed))
    return sample(world.policy, [prompt for prompt in prompts for _ in range(each)], seed=seed)


def batch(world: World, *, iteration: int, each: int = 4) -> ScoredBatch:
    samples = drawn(world, num_prompts=8, each=each, seed=5 + iteration)
    score = np.arange(len(samples.responses), dtype=np.float32)
    return scored_batch(samples, score, {"proxy": score}, world=world, iteration=iteration, each=each)


def test_several_samples_of_a_prompt_have_its_name_and_numbers_of_their_own(world: World) -> None:
    found = batch(world, iteration=7)
    keys = [one.rollout.key for one in found.rollouts]
    assert keys == sorted(set(keys))
    assert [key.sample for key in keys] == [0, 1, 2, 3] * 8
    for place, one in enumerate(found.rollouts):
        first = found.rollouts[place // 4 * 4].rollout
        assert one.rollout.key.prompt_id == one.rollout.prompt.prompt_id == first.key.prompt_id
        assert one.rollout.prompt.token_ids.tolist() == first.prompt.token_ids.tolist()
    assert len({key.prompt_id for key in keys}) == 8


def test_pairs_are_made_within_prompts(world: World) -> None:
    found = batch(world, iteration=0)
    pairs = best_against_worst(found, ranked(found, run_seed=1)).places
    assert pairs
    assert all(best // 4 == worst // 4 and best > worst for best, worst in pairs)


def test_prompts_of_two_iterations_are_never_taken_for_each_other(world: World) -> None:
    first, second = ({one.rollout.key.prompt_id for one in batch(world, iteration=i).rollouts} for i in (0, 1))
    assert not first & second


def test_only_where_responses_are_compared_a_prompt_has_several() -> None:
    assert {name: arm(a).samples_per_prompt for name, a in (ALGORITHMS | SELECTION).items()} == {
        "apa": 1,
        "ppo": 1,
        "awr": 1,
        "dpo": 4,
        "rft": 4,
    }


@pytest.mark.parametrize("name", list(SELECTION))
def test_a_selection_arm_moves_from_the_supervised_policy_and_is_the_same_again(name: str, world: World) -> None:
    first, second = (list(curve(arm(SELECTION[name]), world)) for _ in range(2))
    assert repr(first) == repr(second)
    assert first[0]["kl_exact_nats"] == pytest.approx(0, abs=1e-6)
    assert first[2]["kl_exact_nats"] > 1e-4
    critic = next(iter(curve(arm(ALGORITHMS["ppo"]), world)))
    assert (first[0]["gold"], first[0].keys()) == (critic["gold"], critic.keys())


def test_an_iteration_makes_as_many_steps_whatever_the_algorithm(world: World) -> None:
    forgetful = tempered(SELECTION["rft"], memory_responses=0, minibatch_responses=16)
    for algorithm in (ALGORITHMS["ppo"], *SELECTION.values(), forgetful):
        one = arm(algorithm)
        updater = make_updater(one, world, copy_of(world.policy).requires_grad_(True))
        each = one.samples_per_prompt
        for iteration in range(2):
            samples = drawn(world, num_prompts=128 // each, each=each, seed=iteration)
            score = np.random.default_rng(iteration).normal(size=128).astype(np.float32)
            scored = scored_batch(samples, score, {"x": score}, world=world, iteration=iteration, each=each)
            report = updater.update(scored)
        assert report.num_steps == 4, algorithm.name
        for engine in updater.engines.values():
            engine.close()


def test_memory_is_an_arms_own_and_grows_by_what_was_chosen(world: World) -> None:
    def remembered(num: int) -> float:
        updater = make_updater(arm(SELECTION["rft"]), world, copy_of(world.policy).requires_grad_(True))
        reports = [updater.update(batch(world, iteration=iteration)) for iteration in range(num)]
        for engine in updater.engines.values():
            engine.close()
        return reports[-1].metrics[names.RFT_MEMORY]

    assert [remembered(num) for num in (1, 2, 1)] == [8, 16, 8]


def test_arms_differ_from_each_other_in_what_their_names_say(tmp_path) -> None:
    command = Command(plan=SLICE, places=Places(worlds=tmp_path, results=tmp_path), processes=1)
    found = arms(command, {"apa": 1.0, "ppo": 2.0, "dpo": 3.0, "rft": 4.0})
    first = {a.name: a for a in found if a.seed == 1}
    assert {name: a.learning_rate for name, a in first.items()} == {
        "apa": 1.0,
        "ppo": 2.0,
        "dpo-0.1": 3.0,
        "dpo-0.5": 3.0,
        "rft": 4.0,
        "rft-forgetful": 4.0,
        "apa-early": 1.0,
        "ppo-early": 2.0,
    }
    assert len({a.digest for a in found}) == len(found) == 16
    of_algorithms = SLICE.arm("algorithms", "ppo", ALGORITHMS["ppo"], learning_rate=2.0, seed=1)
    assert first["ppo"].digest == of_algorithms.digest


def line(slope: float, *, furthest: float = 5.0) -> dict[str, np.ndarray]:
    """Gold and proxy rise with the KL at a slope, in 21 evaluations."""
    kl = np.linspace(0, furthest, 21)
    return {"kl_exact_nats": kl, "gold": slope * kl, "proxy": 2 * slope * kl}


def test_claims_on_numbers_by_hand() -> None:
    def both(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> BySeed:
        return {1: first, 2: second}

    curves = {
        "apa-early": both(line(0.2), line(0.2)),
        "ppo-early": both(line(0.4), line(0.1)),
        "dpo-0.1": both(line(0.3), line(0.3)),
        "dpo-0.5": both(line(0.5, furthest=1.9), line(0.5, furthest=1.9)),
        "rft": both(line(0.45, furthest=1.5), line(0.45, furthest=1.5)),
        "rft-forgetful": both(line(0.4, furthest=1.5), line(0.4, furthest=1.5)),
    }
    found = {claim.name: claim for claim in claims(curves)}
    assert {name: list(claim.holds.values()) for name, claim in found.items()} == {
        "dpo-0.1 over apa": [True, True],
        "dpo-0.1 over ppo": [False, True],
        "dpo-0.5 over apa": [False, False],  # the distance is never reached
        "dpo-0.5 over ppo": [False, False],
        "rft over apa": [True, True],
        "rft over ppo": [True, True],
        "dpo_beta": [True, True],
        "DPO deteriorates": [False, False],
        "memory": [True, True],
    }
    assert found["dpo-0.1 over ppo"].verdict == "not reproduced"
    # 2 nats: 0.6 - 0.8 and 0.6 - 0.2; their mean is 0.1.
    assert "2 nats +0.10" in found["dpo-0.1 over ppo"].figures


def test_the_frontier_is_read_at_fixed_distances() -> None:
    rows = frontier({"a": {3: line(0.5, furthest=5.0)}}, ("gold", "proxy"))
    assert [(row["kl_exact_nats"], row["gold"], row["proxy"]) for row in rows[:3]] == [
        (1, pytest.approx(0.5), pytest.approx(1)),
        (2, pytest.approx(1), pytest.approx(2)),
        (4, pytest.approx(2), pytest.approx(4)),
    ]
    assert np.isnan(rows[3]["gold"])
