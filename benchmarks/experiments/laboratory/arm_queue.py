"""Runs arms on a few processes: worlds first, finished arms skipped, one line of progress and time left."""

import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.experiments.laboratory.arms import Arm, run
from benchmarks.experiments.laboratory.language import GOLDS
from benchmarks.experiments.laboratory.world import RewardSpec, Size, World

PROCESSES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where everything is kept."""

    worlds: Path
    """Supervised policies and reward models, by seed; can be deleted and comes back the same."""
    results: Path
    """Curves, tables and figures, by experiment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Something to do in a process of its own."""

    what: str
    do: Callable[..., Any]
    arguments: tuple[Any, ...]


def run_all(arms: Sequence[Arm], places: Places, *, processes: int = PROCESSES) -> list[Path]:
    """Run all arms that have no curve yet, after the worlds that they need.

    Args:
        arms: In the order in which they are begun.
        places: Where everything is kept.
        processes: How many at a time, each on one thread.

    Returns:
        Every arm's curve, in the same order.

    Raises:
        RuntimeError: If a process dies; what has been finished is kept.
    """
    missing = [arm for arm in arms if not (places.results / arm.file).exists()]
    specs: dict[tuple[int, Size], set[RewardSpec]] = {}
    for arm in missing:
        specs.setdefault((arm.seed, arm.size), set()).update(arm.rewards)
    worlds = [
        Task(
            what=f"world of seed {seed}", do=build_world, arguments=(places.worlds, seed, size, sorted(needed, key=str))
        )
        for (seed, size), needed in specs.items()
    ]
    curves = [
        Task(what=f"{arm.name}, seed {arm.seed}", do=run, arguments=(arm, places.worlds, places.results))
        for arm in missing
    ]
    print(f"{len(arms) - len(missing)} of {len(arms)} curves are there already, in {places.results}", flush=True)
    if curves:
        run_tasks(worlds, processes=processes)
        run_tasks(curves, processes=processes)
    return [places.results / arm.file for arm in arms]


def build_world(worlds: Path, seed: int, size: Size, specs: Sequence[RewardSpec]) -> None:
    """Make a seed's supervised policy, units of gold and reward models; what is on disk is kept."""
    world = World(worlds, seed=seed, size=size)
    world.unit(GOLDS[0])
    for spec in specs:
        world.reward_model(spec)


def run_tasks(tasks: Sequence[Task], *, processes: int) -> None:
    """Run tasks, a few at a time, and print a line after each."""
    if not tasks:
        return
    console, since = Console(stderr=True), time.monotonic()
    # Worker processes are forked by nobody: torch and DeepSpeed keep threads.
    with ProcessPoolExecutor(
        max_workers=min(processes, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_one_thread,
    ) as pool:
        futures: dict[Future[Any], Task] = {pool.submit(task.do, *task.arguments): task for task in tasks}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                spent = time.monotonic() - since
                left = spent / done * (len(tasks) - done)
                task = futures[future]
                console.print(f"{done:>3}/{len(tasks)}  {task.what:<44} {spent:6.0f} s, about {left:.0f} s left")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
