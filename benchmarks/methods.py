"""Each method in the quickstart's world, by the line that names it: does the gold score rise, and at what distance?

    python -m benchmarks.methods --output runs/benchmark-methods --json docs/results/methods.json

One run trains the supervised policy and the reward model; every method then learns for one round of the quickstart from
these same two, on as many responses an iteration. Nothing is tuned for any of them: these are the quickstart's settings
and the methods' defaults, under one seed. Finished runs are kept, so that the command goes on where it was interrupted.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

ROUND = ("rounds.count=1", "rounds.collect.comparisons=0")
METHODS: dict[str, tuple[str, ...]] = {
    "apa": (),
    "ppo": ("algorithm.name=ppo",),
    "a2c": ("algorithm.name=a2c",),
    "awr": ("algorithm.name=awr",),
    "ppo-reinforce": ("algorithm.name=ppo", "algorithm.advantage=reinforce"),
    "ppo-rloo": ("algorithm.name=ppo", "algorithm.advantage=rloo"),
    "ppo-grpo": ("algorithm.name=ppo", "algorithm.advantage=grpo"),
    "dpo": ("algorithm.name=dpo",),
    "rft": ("algorithm.name=rft",),
}
"""What is changed of the quickstart."""


def main() -> None:
    """Train what is missing, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-methods"))
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    base = trained("apa", directory=options.output, base=None)
    found: dict[str, dict[str, Any]] = {}
    for method in options.methods:
        found[method] = figures(trained(method, directory=options.output, base=base))
        print(f"{method}: gold {found[method]['gold']:+.3f}", file=sys.stderr)
    table = Table("method", "gold", "change", "score", "KL (nats a sequence)", "tokens", "win rate against SFT")
    for method, row in found.items():
        low, high = row["win_rate_ci95"]
        table.add_row(
            method,
            f"{row['gold']:+.3f}",
            f"{row['gold'] - row['gold_before']:+.3f}",
            f"{row['score']:+.3f}",
            f"{row['kl']:.2f}",
            f"{row['tokens']:.1f}",
            f"{row['win_rate']:.3f} [{low:.3f}, {high:.3f}]",
        )
    Console().print(table)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def trained(method: str, *, directory: Path, base: Path | None) -> Path:
    """Train by a method, or find what it has trained already.

    Args:
        method: A name of METHODS.
        directory: For the runs.
        base: The run whose supervised policy and reward model are used; None to train these too.

    Returns:
        The run's directory.
    """
    run = directory / method
    if base is None or run == base:
        own: tuple[str, ...] = ()
    else:
        own = (
            f"models.policy={{path: {(base / 'policies' / 'v000').absolute()}}}",
            f"scoring.rewards=[{{kind: model, path: {(base / 'reward_models' / 'v000').absolute()}}}]",
            "data.demonstrations=null",
            "data.preferences=null",
        )
    named = (f"run.dir={directory}", f"run.name={method}")
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{method}.log").open("a") as log:
        subprocess.run(
            [sys.executable, "-m", "cluster.cli", "train", "quickstart", *ROUND, *METHODS[method], *own, *named],
            stdout=log,
            stderr=subprocess.STDOUT,
            check=True,
        )
    return run


def figures(run: Path) -> dict[str, Any]:
    """Read what a run has come to, on the held-out prompts."""
    evaluation = json.loads((run / "evaluation.json").read_text())
    before, after = evaluation["before"], evaluation["after"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "gold_before": before["gold_mean"],
        "gold": after["gold_mean"],
        "score": after["score_mean"],
        "kl": after["kl_k1_per_sequence"],
        "tokens": after["response_tokens_mean"],
        "win_rate": after["win_rate"],
        "win_rate_ci95": after["win_rate_ci95"],
        "gold_by_iteration": [round(line["gold/gold"], 4) for line in lines],
        "kl_by_iteration": [round(line["objective/kl_k1_per_sequence"], 4) for line in lines],
    }


if __name__ == "__main__":
    main()
