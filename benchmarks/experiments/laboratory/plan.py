"""What the experiments have in common: seeds, lengths, the grid of learning rates and how one of it is chosen.

The fairness rules: every algorithm has the same grid of five learning rates, as many rollouts and gradient steps, the
same sampling, critic, reward model and units. Its learning rate is the one with the highest *proxy* at a fixed KL on
seed 0; results are of seeds 1 to 5, and what every learning rate did is published.

Tuned on seed 0, before any result: the grid's place and the length. PPO without control went 11 nats away in ten
iterations at 1e-3 and 3 at 2e-4; at 1e-4 gold rose to 4 nats in twenty and then fell while the proxy went on rising.
"""

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiments.laboratory.arm_queue import PROCESSES, Places, run_all
from benchmarks.experiments.laboratory.arms import Arm
from benchmarks.experiments.laboratory.verdicts import at_kl, choose_learning_rate, last, read_curve
from benchmarks.experiments.laboratory.world import RewardSpec, Size
from configs.algorithm import AlgorithmConfig, APAConfig, AWRConfig, KLControllerConfig, PPOConfig
from configs.selection import DPOConfig, RFTConfig

TUNING_SEED = 0
CHOICE_KL_NATS = 4.0
"""Where the proxies of learning rates are compared."""
TARGET_NATS = 6.0
EPISODES_OF_CONTROL = 1000
"""The adaptive controller's horizon. The published one could change the coefficient by a factor of 1.5 in a run of this
length, so that the controller would be no subject of an experiment."""
PUBLISHED_HORIZON = 10_000
SAME: dict[str, Any] = {"num_epochs": 2, "minibatch_responses": 64}
ADAPTIVE = KLControllerConfig(
    kind="adaptive", target_nats_per_sequence=TARGET_NATS, horizon_episodes=EPISODES_OF_CONTROL
)
ALGORITHMS: dict[str, AlgorithmConfig] = {
    "apa": APAConfig(apa_lambda=0.1, adv_norm="none", **SAME),
    "ppo": PPOConfig(kl_beta=0.05, kl_controller=ADAPTIVE, **SAME),
    "awr": AWRConfig(awr_lambda=1.0, max_weight=20.0, **SAME),
}
"""As the papers have them; what is tuned is the learning rate alone."""
HALVES: dict[str, Any] = {"num_epochs": 2, "minibatch_responses": 32}
"""Of 128 rollouts, four a prompt, 64 are learned: two of each prompt, or the best of each and as many of before. In
steps of 32 these are four steps an iteration, as many as the others make."""
SELECTION: dict[str, AlgorithmConfig] = {
    "dpo": DPOConfig(dpo_beta=0.1, **HALVES),
    "rft": RFTConfig(memory_responses=32, **HALVES),
}

EARLY = "-early"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is run."""

    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    iterations: int = 150
    evaluate_every: int = 5
    early_iterations: int = 40
    """Of which every one is evaluated where policies are compared at the same distance."""
    grid: tuple[float, ...] = (2.5e-5, 5e-5, 1e-4, 2e-4, 4e-4)
    reward: RewardSpec = field(default_factory=RewardSpec)
    size: Size = field(default_factory=Size)

    def arm(self, experiment: str, name: str, algorithm: AlgorithmConfig, **settings: Any) -> Arm:
        """Describe an arm of this plan; `settings` are further fields of it, `learning_rate` and `seed` among them."""
        common: dict[str, Any] = {"iterations": self.iterations, "evaluate_every": self.evaluate_every}
        common |= {"rewards": (self.reward,), "gold": self.reward.gold, "size": self.size}
        return Arm(experiment=experiment, name=name, algorithm=algorithm, **(common | settings))

    def early(self, experiment: str, name: str, algorithm: AlgorithmConfig, **settings: Any) -> Arm:
        """Describe the beginning of such an arm once more, evaluated after every iteration."""
        beginning = {"iterations": self.early_iterations, "evaluate_every": 1}
        return self.arm(experiment, f"{name}{EARLY}", algorithm, **(settings | beginning))


FULL = Plan()
SLICE = Plan(
    seeds=(1, 2),
    iterations=4,
    evaluate_every=1,
    early_iterations=2,
    grid=(4e-4, 2e-3),
    reward=RewardSpec(num_pairs=250),
    size=Size(demonstrations=500, sft_epochs=2, heldout_pairs=100, anchors=256),
)
"""Everything once, in two minutes; its figures mean nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What the command line of an experiment says."""

    plan: Plan
    places: Places
    processes: int


def parse(description: str | None, arguments: Sequence[str] | None = None) -> Command:
    """Read the command line that all experiments share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slice", action="store_true", help="a reduced version of two minutes, to see that it runs")
    parser.add_argument(
        "--results", type=Path, help="curves, tables and figures; curves there stay (default: runs/laboratory/results)"
    )
    parser.add_argument("--worlds", type=Path, default=Path("runs/laboratory"), help="policies and reward models")
    parser.add_argument("--processes", type=int, default=PROCESSES, help="arms at a time, on one thread each")
    options = parser.parse_args(arguments)
    results = options.results or Path("runs/laboratory-slice" if options.slice else "runs/laboratory/results")
    return Command(
        plan=SLICE if options.slice else FULL,
        places=Places(worlds=options.worlds, results=results),
        processes=options.processes,
    )


def tuned_rates(
    command: Command,
    names: Sequence[str],
    *,
    algorithms: Mapping[str, AlgorithmConfig] = ALGORITHMS,
    experiment: str = "algorithms",
) -> dict[str, float]:
    """Choose the learning rates of some algorithms, after running the whole grid on seed 0 where it has not been.

    Writes the experiment's learning_rates.csv with what every learning rate did, once all its algorithms are tuned.

    Args:
        command: What to run.
        names: Of `algorithms`.
        algorithms: What the experiment tunes.
        experiment: Which keeps the curves.

    Returns:
        By name.
    """
    plan, chosen = command.plan, {}
    arms = {
        (name, rate): plan.arm(
            experiment, f"grid-{name}-{rate:g}", algorithms[name], learning_rate=rate, seed=TUNING_SEED
        )
        for name in names
        for rate in plan.grid
    }
    run_all(list(arms.values()), command.places, processes=command.processes)
    rows: list[dict[str, Any]] = []
    for name in names:
        curves = {rate: read_curve(command.places.results / arms[name, rate].file) for rate in plan.grid}
        chosen[name] = choose_learning_rate(curves, nats=CHOICE_KL_NATS)
        rows += [
            {
                "algorithm": name,
                "learning_rate": rate,
                f"proxy_at_{CHOICE_KL_NATS:g}_nats": at_kl(curve, CHOICE_KL_NATS, column="proxy"),
                f"gold_at_{CHOICE_KL_NATS:g}_nats": at_kl(curve, CHOICE_KL_NATS, column="gold"),
                "end_proxy": last(curve, "proxy"),
                "end_gold": last(curve, "gold"),
                "end_kl_exact_nats": last(curve, "kl_exact_nats"),
                "chosen": rate == chosen[name],
            }
            for rate, curve in curves.items()
        ]
    if set(names) == set(algorithms):
        write_table(command.places.results / experiment / "learning_rates.csv", rows)
    return chosen


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of the same columns as CSV, numbers with six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float | np.floating) else v for k, v in row.items()})


def tempered(algorithm: AlgorithmConfig, **settings: Any) -> AlgorithmConfig:
    """Return an algorithm with other settings, validated."""
    return type(algorithm).model_validate(algorithm.model_dump() | settings)
