"""Arms: what the learner is given, wrong units, files by settings, and a queue that goes on where it stopped."""

import csv
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.experiments import algorithms
from benchmarks.experiments.laboratory.arm_queue import Places, Task, run_all, run_tasks
from benchmarks.experiments.laboratory.arms import Arm, curve, described, run
from benchmarks.experiments.laboratory.language import worth
from benchmarks.experiments.laboratory.plan import ALGORITHMS, FULL, SLICE, parse, tempered
from benchmarks.experiments.laboratory.units import WrongUnitController, mistaken_kl
from benchmarks.experiments.laboratory.world import RewardSpec, Size, World
from configs.base import Section
from configs.kl import KLControllerConfig
from learner.ops.kl import AdaptiveKLController, SequenceKL
from tests.learner_batches import scored_batch

TINY = Size(demonstrations=64, sft_epochs=1, heldout_pairs=20, anchors=400)
SPEC = RewardSpec(num_pairs=40)


def arm(**settings: object) -> Arm:
    fixed = {"learning_rate": 1e-3, "seed": 3, "iterations": 2, "evaluate_every": 1, "rewards": (SPEC,), "size": TINY}
    return Arm(**({"experiment": "e", "name": "a", "algorithm": ALGORITHMS["ppo"]} | fixed | settings))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("worlds"), seed=3, size=TINY)


def test_a_curve_begins_at_the_supervised_policy_and_is_the_same_again(world: World) -> None:
    first, second = (list(curve(arm(), world)) for _ in range(2))
    assert [row["iteration"] for row in first] == [0, 1, 2]
    assert first[0]["kl_exact_nats"] == pytest.approx(0, abs=1e-6)
    assert first[0]["kl_beta"] == pytest.approx(0.05)
    assert first[2]["kl_exact_nats"] > 1e-4
    assert repr(first) == repr(second)
    less_often = list(curve(arm(evaluate_every=2), world))
    assert repr(less_often) == repr(first[::2])


def test_arms_of_a_seed_start_alike_whatever_the_algorithm(world: World) -> None:
    starts = [next(iter(curve(arm(algorithm=a), world))) for a in ALGORITHMS.values()]
    assert len({row["gold"] for row in starts}) == len({row["proxy"] for row in starts}) == 1


def test_scores_have_the_unit_of_the_supervised_policy(world: World) -> None:
    start = next(iter(curve(arm(), world)))
    assert abs(start["proxy"]) < 0.3
    assert abs(start["gold"]) < 0.3


def test_fewer_pairs_are_the_beginning_of_more(world: World) -> None:
    def responses(num: int) -> list[list[int]]:
        return [s.response_ids.tolist() for pair in world.pairs(SPEC, num=num, what="pairs") for s in pair.sequences]

    assert responses(30) == responses(60)[:60]


def test_hard_labels_follow_gold_and_sampled_ones_do_so_more_often_than_not(world: World) -> None:
    def gold_leads(spec: RewardSpec) -> np.ndarray:
        pairs = world.pairs(spec, num=300, what="pairs")
        worths = [[worth(s.prompt_ids, s.response_ids, gold="helpful") for s in pair.sequences] for pair in pairs]
        return np.array([w[p.better[0]] - w[p.worse[0]] for w, p in zip(worths, pairs, strict=True)])

    assert (gold_leads(SPEC) > 0).all()
    assert 0.55 < (gold_leads(RewardSpec(num_pairs=40, labels="sampled")) > 0).mean() < 0.95


def test_other_settings_have_other_files() -> None:
    base = arm()
    assert arm().file == base.file
    others = [
        arm(learning_rate=2e-3),
        arm(algorithm=tempered(ALGORITHMS["ppo"], kl_beta=0.1)),
        arm(wrong_unit="released"),
        arm(rewards=(RewardSpec(num_pairs=41),)),
    ]
    assert len({a.file for a in [base, *others]}) == 5


DIGESTS = {
    ("apa", 4e-4, None): "ab9b0aa2",
    ("ppo", 1e-4, None): "b2ca94e5",
    ("ppo", 1e-4, "released"): "22fcce13",
    ("awr", 2.5e-5, None): "8bacaf72",
}
"""By algorithm, learning rate and wrong unit: of curves of seed 1 below docs/experiments."""


@pytest.mark.parametrize("which", DIGESTS, ids=str)
def test_a_digest_stays_what_it_was_when_the_configuration_gets_more_keys(which: tuple[Any, ...]) -> None:
    name, rate, unit = which
    mine = FULL.arm("any", "any", ALGORITHMS[name], learning_rate=rate, seed=1, wrong_unit=unit)
    assert mine.digest == DIGESTS[which]


def test_a_key_that_came_later_counts_where_it_is_set() -> None:
    class First(Section):
        kl_beta: float = 0.1

    class Grown(First):
        invented: bool = False

    first, default, other = described(First()), described(Grown()), described(Grown(invented=True))
    assert (first, default) == ("First(kl_beta=0.1)", "Grown(kl_beta=0.1)")
    assert other == "Grown(kl_beta=0.1, invented=True)"
    assert described(First(kl_beta=0.2)) == repr(First(kl_beta=0.2))
    settings = [{"repeat_minibatch": True}, {"adv_norm_over": "minibatch"}, {}]
    assert len({arm(algorithm=tempered(ALGORITHMS["ppo"], **s)).file for s in settings}) == 3


def test_the_arms_as_released_whiten_and_repeat_each_minibatch_and_keep_what_else_they_had() -> None:
    command = parse("", [])
    found = {a.name: a for a in algorithms.arms(command, {"apa": 4e-4, "ppo": 1e-4, "awr": 2.5e-5}) if a.seed == 1}
    assert list(found) == ["apa", "ppo", "awr", "apa-early", "ppo-early", "apa-released", "ppo-released"]
    for name in ("apa", "ppo"):
        assert found[f"{name}-early"] == replace(found[name], name=f"{name}-early", iterations=40, evaluate_every=1)
    theirs = {"adv_norm": "whiten", "adv_norm_over": "minibatch", "repeat_minibatch": True}
    for name in ("apa", "ppo"):
        plain, released = found[name], found[f"{name}-released"]
        settings = plain.algorithm.model_dump() | theirs
        if name == "ppo":
            settings["kl_controller"] |= {"horizon_episodes": 10_000}
        assert released.algorithm.model_dump() == settings
        assert released.learning_rate == plain.learning_rate
        assert released.digest != plain.digest
    assert [a.wrong_unit for a in found.values()] == [None] * 6 + ["released"]


def test_experiments_share_the_arms_that_they_have_in_common(tmp_path) -> None:
    first, second = arm(), arm(experiment="other", name="b")
    path = run(first, tmp_path / "worlds", tmp_path / "results")
    for weights in (tmp_path / "worlds").rglob("*.safetensors"):
        weights.write_bytes(b"")  # whoever trains now, fails
    copied = run(second, tmp_path / "worlds", tmp_path / "results")
    assert (first.digest, copied.parent.parent.name) == (second.digest, "other")
    assert copied.read_bytes() == path.read_bytes()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["iteration"]) for row in rows] == [0, 1, 2]


def test_a_wrong_unit_lets_the_coefficient_decay_where_the_right_one_raises_it() -> None:
    config = KLControllerConfig(kind="adaptive", target_nats_per_sequence=6.0, horizon_episodes=2000)
    right = AdaptiveKLController(config, initial_beta=0.2)
    wrong = WrongUnitController(right)
    wrong.mistaken_nats = 12.0 / 16
    for controller in (right, wrong):
        controller.update(SequenceKL(nats=12.0, num_sequences=128))
    assert right.beta == pytest.approx(0.2 * (1 + 0.2 * 128 / 2000))
    assert wrong.beta == pytest.approx(0.2 * (1 - 0.2 * 128 / 2000))


def test_mistaken_kl_by_hand() -> None:
    batch = scored_batch(6, seed=1)
    total, released, tokens = 0.0, 0.0, 0
    for one in batch.rollouts:
        for own, ref in zip(one.rollout.behavior_logprobs, one.ref_logprobs, strict=True):
            ratio = float(own) - float(ref)
            total, tokens = total + ratio, tokens + 1
            released += np.exp(ratio) - 1 - ratio
    columns = max(one.rollout.num_tokens for one in batch.rollouts) - 1
    assert mistaken_kl(batch, unit="k1_per_token") == pytest.approx(total / tokens, abs=1e-6)
    assert mistaken_kl(batch, unit="released") == pytest.approx(released / (6 * columns), abs=1e-6)


def test_wrong_units_need_an_adaptive_controller(world: World) -> None:
    fixed = tempered(ALGORITHMS["ppo"], kl_controller=KLControllerConfig())
    with pytest.raises(ValueError, match="adaptive"):
        next(iter(curve(arm(algorithm=fixed, wrong_unit="released"), world)))


@pytest.mark.slow
def test_a_queue_goes_on_where_it_stopped(tmp_path) -> None:
    places = Places(worlds=tmp_path / "worlds", results=tmp_path / "results")
    arms = [arm(name="first"), arm(name="second", algorithm=ALGORITHMS["apa"])]
    (first,) = run_all(arms[:1], places, processes=1)
    written = first.stat().st_mtime_ns
    paths = run_all(arms, places, processes=2)
    assert first.stat().st_mtime_ns == written
    assert [p.exists() for p in paths] == [True, True]
    kept = paths[1].read_bytes()
    paths[1].unlink()
    (places.worlds / "curves" / f"{arms[1].digest}.csv").unlink()
    run_all(arms, places, processes=1)
    assert paths[1].read_bytes() == kept
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".csv", ".json", ".safetensors"}


def _fail() -> None:
    raise ValueError("this arm cannot run")


def test_a_failing_task_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="this arm cannot run"):
        run_tasks([Task(what="x", do=_fail, arguments=())], processes=1)


def test_the_slice_differs_from_the_plan_in_size_alone() -> None:
    assert SLICE.arm("e", "a", ALGORITHMS["apa"], learning_rate=1e-3, seed=0).gold == "helpful"
    assert len(SLICE.grid) >= 2
