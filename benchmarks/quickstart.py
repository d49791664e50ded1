"""The quickstart over seeds and algorithms: the whole chain each time, gold and win rate, time and memory.

    python -m benchmarks.quickstart --seeds 0 1 2 --algorithms apa ppo --output results/quickstart

Every seed trains its own supervised policy, reward model and RL policy. Prints a table and writes results.json; exits
with 1 unless every run reaches the bounds that the README promises. The gold score is only read off at the end.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.chain import run_chain

MIN_WIN_RATE_LOW = 0.60
MIN_GOLD_GAIN = 0.4
KL_NATS = (0.5, 6.0)
MAX_LOGPROB_GAP = 1e-4
MAX_MEMORY_GIB = 10.0


def main() -> None:
    """Run all combinations, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", nargs="+", default=["apa", "ppo"])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-quickstart"))
    parser.add_argument("--set", nargs="*", default=[], help="further overrides, a.b=c")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = [
        run(algorithm, seed, output=options.output, overrides=options.set)
        for seed in options.seeds
        for algorithm in options.algorithms
    ]
    (options.output / "results.json").write_text(json.dumps(results, indent=2))
    show(results)
    sys.exit(0 if all(result["reached"] for result in results) else 1)


def run(algorithm: str, seed: int, *, output: Path, overrides: list[str]) -> dict[str, Any]:
    """Run one whole chain in a process of its own and read its figures off."""
    name = f"{algorithm}-seed{seed}"
    overrides = [f"algorithm.name={algorithm}", f"run.seed={seed}", *overrides]
    took = run_chain(name, output=output, overrides=overrides)
    return figures(output / name, algorithm=algorithm, seed=seed) | took


def figures(run_directory: Path, *, algorithm: str, seed: int) -> dict[str, Any]:
    """Read a finished run's evaluation and the worst of its metrics."""
    evaluation = json.loads((run_directory / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    before, after = evaluation["before"], evaluation["after"]
    result: dict[str, Any] = {
        "algorithm": algorithm,
        "seed": seed,
        "gold_before": before["gold_mean"],
        "gold_after": after["gold_mean"],
        "score_after": after["score_mean"],
        "kl_nats": after["kl_k1_per_sequence"],
        "tokens_before": before["response_tokens_mean"],
        "tokens_after": after["response_tokens_mean"],
        "win_rate": after["win_rate"],
        "win_rate_ci95": after["win_rate_ci95"],
        "logprob_gap_max": max(line["sync/logprob_gap_max"] for line in lines),
        "first_ratio_gap_max": max(line.get("policy/first_minibatch_ratio_gap_max", 0.0) for line in lines),
        "first_clip_fraction_max": max(line.get("policy/first_minibatch_clip_fraction", 0.0) for line in lines),
        "stage_sum_error_max": max(
            abs(1 - sum(line[f"time/{s}"] for s in ("generate", "score", "learn", "publish")) / line["time/iteration"])
            for line in lines
        ),
        "iteration_s": sum(line["time/iteration"] for line in lines) / len(lines),
    }
    result["reached"] = (
        after["win_rate_ci95"][0] > MIN_WIN_RATE_LOW
        and result["gold_after"] - result["gold_before"] >= MIN_GOLD_GAIN
        and KL_NATS[0] <= result["kl_nats"] <= KL_NATS[1]
        and result["logprob_gap_max"] < MAX_LOGPROB_GAP
    )
    return result


def show(results: list[dict[str, Any]]) -> None:
    """Print one row a run."""
    table = Table(
        "algorithm", "seed", "gold", "win rate", "95%", "KL", "tokens", "log-prob gap", "s", "GiB", "reached",
        title="Quickstart",
    )  # fmt: skip
    for r in results:
        low, high = r["win_rate_ci95"]
        table.add_row(
            r["algorithm"], str(r["seed"]), f"{r['gold_before']:+.3f} -> {r['gold_after']:+.3f}",
            f"{r['win_rate']:.3f}", f"[{low:.3f}, {high:.3f}]", f"{r['kl_nats']:.2f}",
            f"{r['tokens_before']:.1f} -> {r['tokens_after']:.1f}", f"{r['logprob_gap_max']:.1e}",
            f"{r['seconds']:.0f}", f"{r['peak_memory_gib']:.1f}", "yes" if r["reached"] else "NO",
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
