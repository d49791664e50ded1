"""Does refreshing the reward model beat one shot, with equally many labels? Two arms over seeds of the whole chain.

    python -m benchmarks.experiments.refresh --seeds 0 1 2 3 4 --output runs/experiment-refresh

Both arms have the same supervised policy, 1,500 labelled pairs to begin with and 1,500 labelled rankings of four, train
one reward model on both with the same weights and epochs, and optimise the supervised policy with it for as many
iterations. They differ in whose responses are ranked:

    one shot    the supervised policy's
    refreshed   those of a policy that 20 iterations have optimised with a reward model of the first 1,500 pairs

Gold is read off every iteration's batch and, for the policy at the end, off the held-out prompts; nothing learns from
it. Writes curves.csv, results.csv and refresh.png.
"""

import argparse
import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats

from benchmarks.chain import run_chain
from benchmarks.rounds import wrong_share

ARMS = ("one shot", "refreshed")
COLORS = {"one shot": "#b35806", "refreshed": "#1f6fb4"}
SMOOTHED_ITERATIONS = 5

Curve = dict[str, NDArray[np.float64]]


def main() -> None:
    """Run both arms for every seed, and compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--iterations", type=int, default=60, help="of the optimisation that is compared")
    parser.add_argument("--output", type=Path, default=Path("runs/experiment-refresh"))
    parser.add_argument("--results", type=Path, default=Path("docs/experiments/refresh"), help="where figures go")
    parser.add_argument("--set", nargs="*", default=[], help="further overrides, a.b=c")
    options = parser.parse_args()
    results, curves = [], []
    for seed in options.seeds:
        for arm in ("refreshed", "one shot"):
            directory = run(arm, seed, iterations=options.iterations, output=options.output, overrides=options.set)
            curve = read_curve(directory)
            curves.append((arm, seed, curve))
            results.append({"arm": arm, "seed": seed} | figures(directory, curve))
            write(options.results, results, curves)
    show(results)


def run(arm: str, seed: int, *, iterations: int, output: Path, overrides: Sequence[str]) -> Path:
    """Run one arm of one seed; a finished one is only read."""
    name = f"{arm.replace(' ', '-')}-seed{seed}"
    if arm == "refreshed":
        plan = [f'rounds.overrides={{"1": {{collect: {{comparisons: 0}}}}, "2": {{iterations: {iterations}}}}}']
    else:
        plan = [
            "rounds.count=1",
            f"rounds.iterations={iterations}",
            'rounds.overrides={"1": {collect: {policies: [sft]}}}',
        ]
        shared = output / f"refreshed-seed{seed}" / "policies" / "v000"
        if not (output / name / "policies").exists():  # the same supervised policy, bit for bit
            shutil.copytree(shared, output / name / "policies" / "v000")
    run_chain(name, output=output, overrides=[f"run.seed={seed}", *plan, *overrides])
    return output / name


def read_curve(directory: Path) -> Curve:
    """Read the last round's iterations: gold, the reward model's score, the held-out one's, and KL to the reference."""
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["counter/round"] == lines[-1]["counter/round"]]
    named = {
        "gold": "gold/gold",
        "proxy": "score/reward_model",
        "heldout": "score/heldout",
        "kl_nats": "objective/kl_k1_per_sequence",
    }
    return {short: np.array([line[name] for line in last]) for short, name in named.items()}


def figures(directory: Path, curve: Curve) -> dict[str, float]:
    """Read what the arm ended with, and where its gold was highest."""
    after = json.loads((directory / "evaluation.json").read_text())["after"]
    report = json.loads((directory / "reward_models" / newest(directory) / "reward_model_report.json").read_text())
    smooth = smoothed(curve["gold"])
    peak = int(np.argmax(smooth))
    return {
        "gold": after["gold_mean"],
        "kl_nats": after["kl_k1_per_sequence"],
        "wrong_share": wrong_share(directory, f"v{after['policy_version']:03d}"),
        "reward_model_accuracy": report["heldout"]["accuracy"],
        "peak_gold": float(smooth[peak]),
        "peak_iteration": peak + SMOOTHED_ITERATIONS // 2 + 1,
        "peak_kl_nats": float(smoothed(curve["kl_nats"])[peak]),
        "last_gold": float(smooth[-1]),
    }


def newest(directory: Path) -> str:
    """Name the reward model that scored in the last round."""
    refreshed = sorted(directory.glob("rounds/r*/refresh.json"))[-1]
    return f"v{json.loads(refreshed.read_text())['reward_version']:03d}"


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average over neighbouring iterations; a batch of 128 responses is noisy."""
    weights = np.full(SMOOTHED_ITERATIONS, 1 / SMOOTHED_ITERATIONS)
    return np.convolve(values, weights, mode="valid").astype(np.float64)


def difference(results: Sequence[dict[str, Any]], figure: str) -> tuple[float, float, float]:
    """Compare the arms seed by seed.

    Returns:
        The mean of refreshed minus one shot, and the ends of its 95% t interval over seeds (none for a single seed).
    """
    by_arm = {arm: {r["seed"]: r[figure] for r in results if r["arm"] == arm} for arm in ARMS}
    both = sorted(by_arm["one shot"].keys() & by_arm["refreshed"].keys())
    gains = np.array([by_arm["refreshed"][seed] - by_arm["one shot"][seed] for seed in both])
    if len(gains) < 2:
        return float(gains.mean()), float("nan"), float("nan")
    half = float(stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains)))
    return float(gains.mean()), float(gains.mean() - half), float(gains.mean() + half)


def write(target: Path, results: list[dict[str, Any]], curves: Sequence[tuple[str, int, Curve]]) -> None:
    """Keep all figures, after every run."""
    target.mkdir(parents=True, exist_ok=True)
    with (target / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(results[0]))
        writer.writeheader()
        writer.writerows(results)
    with (target / "curves.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["arm", "seed", "iteration", *curves[0][2]])
        for arm, seed, curve in curves:
            for number, values in enumerate(zip(*curve.values(), strict=True), start=1):
                rows.writerow([arm, seed, number, *(f"{value:.6g}" for value in values)])
    draw(target / "refresh.png", curves)


def draw(path: Path, curves: Sequence[tuple[str, int, Curve]]) -> None:
    """Draw gold against iterations and against the square root of KL, and how far the reward model overrates."""
    mpl.use("agg")
    figure, (steps, frontier, gap) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for arm in ARMS:
        mine = [curve for named, _, curve in curves if named == arm]
        if not mine:
            continue
        gold = np.array([smoothed(curve["gold"]) for curve in mine])
        over = np.array([smoothed(curve["proxy"] - curve["heldout"]) for curve in mine])
        x = np.arange(gold.shape[1]) + SMOOTHED_ITERATIONS // 2 + 1
        for axis, values in ((steps, gold), (gap, over)):
            axis.fill_between(x, values.min(0), values.max(0), color=COLORS[arm], alpha=0.15, linewidth=0)
            axis.plot(x, values.mean(0), color=COLORS[arm], label=arm)
        for number, curve in enumerate(mine):
            root = np.sqrt(np.maximum(smoothed(curve["kl_nats"]), 0))
            label = arm if number == 0 else None
            frontier.plot(root, smoothed(curve["gold"]), color=COLORS[arm], alpha=0.7, linewidth=1, label=label)
    steps.set(xlabel="iteration", ylabel="gold", title="Gold: mean, least and greatest over seeds")
    frontier.set(xlabel="square root of KL (nats)", ylabel="gold", title="Gold against distance, each seed")
    gap.set(xlabel="iteration", ylabel="score minus held-out score", title="How far the reward model overrates")
    for axis in (steps, frontier, gap):
        axis.grid(alpha=0.25)
        axis.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(results: list[dict[str, Any]]) -> None:
    """Print every run and the differences."""
    shown = [name for name in results[0] if name not in ("arm", "seed")]
    table = Table("arm", "seed", *shown, title="One reward model for all, or refreshed")
    for result in results:
        table.add_row(result["arm"], str(result["seed"]), *(f"{result[name]:.3f}" for name in shown))
    gains = [difference(results, name) for name in shown]
    table.add_section()
    table.add_row("difference", "95%", *(f"{gain:+.3f} [{low:+.3f}, {high:+.3f}]" for gain, low, high in gains))
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
