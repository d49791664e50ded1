"""Best of n in the laboratory: one pool of the supervised policy's samples a seed, and every n read off it.

The pool holds samples of sixteen prompts, one of each topic and style; 1,024 of each make the 2^14 of the full size.
Chosen is by what reinforcement learning is rewarded with: the proxy, less the penalty for a missing end.
"""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.experiments.laboratory.arms import MISSING_EOS_PENALTY
from benchmarks.experiments.laboratory.language import NUM_STYLES, NUM_TOPICS, Floats, draw_prompts, read_prompt
from benchmarks.experiments.laboratory.plan import write_table
from benchmarks.experiments.laboratory.sampling import Samples, sample
from benchmarks.experiments.laboratory.world import RewardSpec, Size, World
from learner.supervised_loop import stage_seed
from protocol.messages import IntArray
from reward_service.best_of_n import expected_best, kl_bound


def file_of(spec: RewardSpec, *, seed: int, size: Size, num: int) -> str:
    """Name a curve's file; different settings have different files."""
    digest = f"{zlib.crc32(repr((spec, seed, size, num)).encode()):08x}"
    return f"{spec.name}-seed{seed}-{digest}.csv"


def evaluate(worlds: Path, directory: Path, seed: int, size: Size, specs: Sequence[RewardSpec], num: int) -> None:
    """Write the curves of best of n with several proxies, of one pool; those that are there are kept.

    Args:
        worlds: Where the worlds of all seeds are kept.
        directory: Where curves go.
        seed: Of world and pool.
        size: Of the world.
        specs: The proxies.
        num: Samples a prompt, and the largest n.
    """
    missing = {spec: directory / file_of(spec, seed=seed, size=size, num=num) for spec in specs}
    missing = {spec: path for spec, path in missing.items() if not path.exists()}
    if not missing:
        return
    world = World(worlds, seed=seed, size=size)
    pool = [
        sample(world.policy, [prompt] * num, seed=stage_seed(seed, "best of n", place))
        for place, prompt in enumerate(one_of_each(stage_seed(seed, "best of n")))
    ]
    for spec, path in missing.items():
        rows = judge_pool(world, pool, spec)
        draft = path.with_suffix(f".{os.getpid()}")
        write_table(draft, rows)
        draft.replace(path)


def one_of_each(seed: int) -> list[IntArray]:
    """Draw a prompt of each topic and style."""
    rng, found = np.random.default_rng(seed), dict[tuple[int, int], IntArray]()
    while len(found) < NUM_TOPICS * NUM_STYLES:
        (prompt,) = draw_prompts(1, rng)
        question = read_prompt(prompt)
        found.setdefault((question.topic, question.style), prompt)
    return [found[key] for key in sorted(found)]


def judge_pool(world: World, pool: Sequence[Samples], spec: RewardSpec) -> list[dict[str, float]]:
    """Score a pool, one element a prompt, by a proxy and by its gold, and describe the best of every n."""
    if spec.gold == "mixed":
        raise ValueError("a pool is judged by one gold score, and this reward model learned from two")
    model = world.reward_model(spec)
    proxy = np.stack([model(samples) for samples in pool]).astype(np.float64)
    gold = np.stack([world.standardised_gold(samples, spec.gold) for samples in pool]).astype(np.float64)
    cut = np.array([samples.truncated for samples in pool], np.float64)
    accuracy = world.report(spec)["accuracy"]
    rows = best_of_n(proxy - MISSING_EOS_PENALTY * cut, proxy=proxy, gold=gold)
    return [row | {"heldout_accuracy": accuracy} for row in rows]


def best_of_n(chosen_by: Floats, *, proxy: Floats, gold: Floats) -> list[dict[str, float]]:
    """Estimate proxy and gold of the best of 1, 2, 4, ... up to all samples, without bias.

    The distance is the analytic one, log n - (n - 1) / n; where a prompt's scores tie it is an upper bound.

    Args:
        chosen_by: [P, N] of P prompts with N samples each.
        proxy: [P, N].
        gold: [P, N].

    Returns:
        A row for each n, with means over prompts.
    """
    num = chosen_by.shape[1]
    rows: list[dict[str, float]] = []
    for n in (2**power for power in range(num.bit_length())):
        row = {"n": float(n), "kl_exact_nats": kl_bound(n)}
        for name, values in (("gold", gold), ("proxy", proxy)):
            best = [expected_best(by, value, n=n) for by, value in zip(chosen_by, values, strict=True)]
            row[name] = float(np.mean(best))
        rows.append(row)
    return rows
