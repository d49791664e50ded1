"""Stopped at every kind of boundary and started again, a run must end where the unbroken one ends: bit for bit.

    python -m benchmarks.diamond --output runs/benchmark-diamond

For PPO and APA, one and two learner ranks, ZeRO 0, 2 and 3: a small run of six iterations in one go, and one that gets
SIGTERM in each of several places (a supervised stage, the calibration, inside an iteration before and after a
checkpoint, at the end of an epoch of prompts, in the evaluation) and is started again by the same command. Weights,
metrics, responses and the last checkpoint are compared. Writes results.json; exits with 1 if anything differs.
"""

import argparse
import json
import shutil
import signal
import sys
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.interrupted import complete, family, finish, orphans, start, until
from benchmarks.outcome import differing, outcome
from tests.tiny_run import tiny_overrides

SETTINGS = ("rounds.iterations=6",)  # 64 prompts, 16 an iteration: an epoch of prompts ends after the fourth
BOUNDARIES = (
    "Supervised",
    "Reward model",
    "zero and unit",
    "iteration 1/6",
    "iteration 2/6",
    "iteration 4/6",
    "Evaluation",
)
STOPPED = 75


def main() -> None:
    """Run all combinations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-diamond"))
    parser.add_argument("--algorithms", nargs="+", default=["ppo", "apa"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 2, 3], help="ZeRO stages")
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    results: list[dict[str, Any]] = []
    for algorithm, ranks, stage in product(options.algorithms, options.ranks, options.stages):
        results.append(run(algorithm, ranks, stage, output=options.output))
        (options.output / "results.json").write_text(json.dumps(results, indent=2))
    show(results)
    sys.exit(0 if all(not r["differing"] and not r["orphans"] for r in results) else 1)


def run(algorithm: str, ranks: int, stage: int, *, output: Path) -> dict[str, Any]:
    """Run one combination in one go and with stops."""
    name = f"{algorithm}-{ranks}-zero{stage}"
    folder = output / name
    folder.mkdir(parents=True)
    settings = (*SETTINGS, f"algorithm.name={algorithm}", f"learner.workers={ranks}", f"learner.zero_stage={stage}")
    complete(tiny_overrides(folder / "unbroken", *settings), folder / "unbroken.log")
    arguments = tiny_overrides(folder / "stopped", *settings)
    left = [orphan for boundary in BOUNDARIES for orphan in stop(arguments, folder / "stopped.log", boundary=boundary)]
    complete(arguments, folder / "stopped.log")
    one, other = (outcome(folder / way / "tiny") for way in ("unbroken", "stopped"))
    return {
        "algorithm": algorithm, "ranks": ranks, "zero_stage": stage, "stops": len(BOUNDARIES),
        "differing": differing(one, other), "orphans": left, "weights": one["weights"],
    }  # fmt: skip


def stop(arguments: list[str], log: Path, *, boundary: str) -> list[str]:
    """Run until a line says that a boundary is reached, send SIGTERM, and name the processes that live on.

    Raises:
        SystemExit: If the run did not get there, or did not end as a stopped run ends.
    """
    process = start(arguments)
    if until(process, log, stop=lambda line: boundary in line, timeout_s=600.0) is None:
        raise SystemExit(f"a run ended before {boundary!r}; see {log}")
    started = family(process)
    process.send_signal(signal.SIGTERM)
    code = finish(process, log, timeout_s=120.0)
    if code != STOPPED:
        raise SystemExit(f"SIGTERM at {boundary!r} ended the run with {code}, not {STOPPED}; see {log}")
    return orphans(started)


def show(results: list[dict[str, Any]]) -> None:
    """Print one row a combination."""
    table = Table("algorithm", "ranks", "ZeRO", "stops", "differing", "orphans", title="Stopped and started again")
    for r in results:
        cells = (r["algorithm"], r["ranks"], r["zero_stage"], r["stops"])
        table.add_row(*map(str, cells), ", ".join(r["differing"]) or "nothing", str(len(r["orphans"])))
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
