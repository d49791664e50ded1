"""The quickstart's two rounds over seeds: does the second round, with a refreshed reward model, make the policy better?

    python -m benchmarks.rounds --seeds 0 1 2 --output runs/benchmark-rounds

Every seed is a whole chain: supervised policy, reward models, RL, twice. Prints a table and writes results.json; exits
with 1 unless the second round lifts gold by 0.1 on average and by 0.05 in every seed, lowers the share of answers with
a wrong piece, and the ladder orders the three policies with intervals that do not overlap between SFT and round 2.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.chain import run_chain
from cluster import samples
from examples.quickstart.gold import analyse
from protocol.tokens import decode, load_tokenizer

MIN_GAIN_MEAN, MIN_GAIN = 0.1, 0.05


def main() -> None:
    """Run all seeds, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-rounds"))
    parser.add_argument("--set", nargs="*", default=[], help="further overrides, a.b=c")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    results = [run(seed, output=options.output, overrides=options.set) for seed in options.seeds]
    (options.output / "results.json").write_text(json.dumps(results, indent=2))
    show(results)
    sys.exit(0 if reached(results) else 1)


def run(seed: int, *, output: Path, overrides: list[str]) -> dict[str, Any]:
    """Run one whole chain in a process of its own and read its figures off; a finished one is only read."""
    name = f"seed{seed}"
    took = run_chain(name, output=output, overrides=[f"run.seed={seed}", *overrides])
    return figures(output / name) | {"seed": seed} | took


def figures(run_directory: Path) -> dict[str, Any]:
    """Read a finished run's rounds: gold, wrong pieces, KL, the gate, and the ladder."""
    rounds = sorted((run_directory / "rounds").iterdir())
    evaluations = [json.loads((path / "evaluation.json").read_text()) for path in rounds]
    versions = [evaluations[0]["before"], *(evaluation["after"] for evaluation in evaluations)]
    ladder = json.loads((run_directory / "ladder.json").read_text())
    ratings = {rating["version"]: rating for rating in ladder["ratings"]}
    names = [f"v{version['policy_version']:03d}" for version in versions]
    return {
        "versions": names,
        "gold": [version["gold_mean"] for version in versions],
        "kl_nats": [version["kl_k1_per_sequence"] for version in versions],
        "response_tokens": [version["response_tokens_mean"] for version in versions],
        "wrong_share": [wrong_share(run_directory, name) for name in names],
        "win_rate": [version["win_rate"] for version in versions],
        "elo": [ratings[name]["elo"] for name in names],
        "elo_ci95": [ratings[name]["ci"] for name in names],
        "refresh": [json.loads((path / "refresh.json").read_text()) for path in rounds],
        "alarms": [json.loads((path / "round.json").read_text())["alarm"] for path in rounds],
    }


def wrong_share(run_directory: Path, version: str) -> float:
    """Compute the share of answers to safe held-out prompts that hold a wrong piece."""
    tokenizer = load_tokenizer(run_directory / "policies" / "v000")
    found = [
        analyse(rollout.prompt.text, decode(tokenizer, rollout.response_ids.tolist()), rollout.finish_reason == "stop")
        for rollout in samples.read(run_directory / "evaluations" / f"{version}.jsonl")
    ]
    safe = [analysis for analysis in found if analysis.kind == "safe"]
    return sum(analysis.holds_wrong_piece for analysis in safe) / len(safe)


def reached(results: list[dict[str, Any]]) -> bool:
    """Compare with the bounds."""
    gains = [result["gold"][2] - result["gold"][1] for result in results]
    wrong = [result["wrong_share"][2] - result["wrong_share"][1] for result in results]
    ordered = all(
        result["elo"] == sorted(result["elo"]) and result["elo_ci95"][2][0] > result["elo_ci95"][0][1]
        for result in results
    )
    enough = statistics.mean(gains) >= MIN_GAIN_MEAN and min(gains) >= MIN_GAIN
    return enough and statistics.mean(wrong) < 0 and ordered


def show(results: list[dict[str, Any]]) -> None:
    """Print one row a seed."""
    table = Table(
        "seed", "gold: SFT, round 1, round 2", "gain of round 2", "wrong piece: SFT, 1, 2", "KL", "Elo with 95%",
        "refresh", "s", "GiB", title="Two rounds",
    )  # fmt: skip
    for r in results:
        elo = ", ".join(
            f"{e:+.0f} [{low:+.0f}, {high:+.0f}]" for e, (low, high) in zip(r["elo"], r["elo_ci95"], strict=True)
        )
        table.add_row(
            str(r["seed"]), ", ".join(f"{gold:+.3f}" for gold in r["gold"]), f"{r['gold'][2] - r['gold'][1]:+.3f}",
            ", ".join(f"{share:.2f}" for share in r["wrong_share"]), ", ".join(f"{kl:.2f}" for kl in r["kl_nats"]), elo,
            r["refresh"][1]["why"], f"{r['seconds']:.0f}", f"{r['peak_memory_gib']:.1f}",
        )  # fmt: skip
    Console(width=200).print(table)


if __name__ == "__main__":
    main()
