"""Does the ladder's Elo follow the gold score? One run of many short rounds, each of which adds a version.

    python -m benchmarks.elo --rounds 7 --output runs/benchmark-elo

Every round goes on where the last one ended, with the same reward model, so that versions lie close together. The
labeler prefers by gold with noise, so the ladder can be right or wrong about a difference that is known. Prints
each version's Elo and gold, and exits with 1 unless they correlate by more than 0.95.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.chain import run_chain

MIN_CORRELATION = 0.95
MIN_VERSIONS = 6


def main() -> None:
    """Run, compare, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=4, help="a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-elo"))
    options = parser.parse_args()
    overrides = [
        f"run.seed={options.seed}",
        f"rounds.count={options.rounds}",
        f"rounds.iterations={options.iterations}",
        "rounds.overrides={}",
        "rounds.init_policy=previous",
        "rounds.refresh=false",
        "rounds.collect.comparisons=0",
        "rounds.evaluation.opponents=[sft, current]",
    ]
    name = f"seed{options.seed}"
    took = run_chain(name, output=options.output, overrides=overrides)
    result = figures(options.output / name) | took
    (options.output / "results.json").write_text(json.dumps(result, indent=2))
    show(result)
    sys.exit(0 if result["correlation"] > MIN_CORRELATION and len(result["versions"]) >= MIN_VERSIONS else 1)


def figures(run_directory: Path) -> dict[str, Any]:
    """Read every version's gold and Elo off a finished run."""
    evaluations = [json.loads(path.read_text()) for path in sorted(run_directory.glob("rounds/r*/evaluation.json"))]
    gold = {"v000": evaluations[0]["before"]["gold_mean"]}
    gold |= {f"v{e['after']['policy_version']:03d}": e["after"]["gold_mean"] for e in evaluations}
    ladder = json.loads((run_directory / "ladder.json").read_text())
    ratings = {rating["version"]: rating for rating in ladder["ratings"]}
    versions = list(gold)
    elo = [ratings[version]["elo"] for version in versions]
    return {
        "versions": versions,
        "gold": list(gold.values()),
        "elo": elo,
        "elo_ci95": [ratings[version]["ci"] for version in versions],
        "correlation": float(np.corrcoef(list(gold.values()), elo)[0, 1]),
    }


def show(result: dict[str, Any]) -> None:
    """Print one row a version."""
    table = Table("version", "gold", "Elo with 95%", title=f"Elo against gold: r = {result['correlation']:.3f}")
    for version, gold, elo, (low, high) in zip(
        result["versions"], result["gold"], result["elo"], result["elo_ci95"], strict=True
    ):
        table.add_row(version, f"{gold:+.3f}", f"{elo:+.0f} [{low:+.0f}, {high:+.0f}]")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
