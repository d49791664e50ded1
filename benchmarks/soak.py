"""Many iterations with a fault every now and then: does the run end, and does anything grow?

    python -m benchmarks.soak --iterations 300 --every 10 --output runs/benchmark-soak

A small run on the real stack. Every few iterations a worker drawn at random is killed or halted in a state drawn at
random. After each iteration the resident memory, file handles, threads and processes of the run are counted, and the
object store's pages. The last fifth is compared with the second fifth (the first one warms up). Writes curves.csv,
results.json and soak.png; exits with 1 if the run fails, anything grew by more than 5%, or a process lives on.
"""

import argparse
import csv
import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import psutil
from matplotlib import pyplot as plt

from benchmarks.interrupted import family, finish, orphans, start, until
from tests.tiny_run import tiny_overrides

PLACES = (
    ("rollout-0", ("serving", "publishing", "idle")),
    ("reward-0", ("scoring", "idle")),
    ("reference-0", ("scoring", "idle")),
    ("learner-0", ("update", "publish", "idle")),
)
SILENCE_S = 8.0
MAX_GROWTH = 0.05
MEASURED: tuple[str, ...] = ("memory_mib", "file_handles", "threads", "processes", "object_store_mib")
_MIB = 2**20


def main() -> None:
    """Run, count, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-soak"))
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--every", type=int, default=10, help="iterations between two faults")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    faults = drawn(options.iterations, every=options.every, seed=options.seed)
    settings = (
        f"rounds.iterations={options.iterations}",
        "cluster.checkpoint_period_iterations=5",
        f"cluster.deadlines.silence_s={SILENCE_S}",
        f"cluster.worker_replacements={len(faults)}",
        f"cluster.learner_restarts={len(faults)}",
        "tracking.save_rollouts=false",
    )
    arguments = [part for fault in faults for part in ("--fault", fault)]
    arguments += tiny_overrides(options.output, *settings)
    curves, code, left = watched(arguments, options.output / "soak.log")
    write(options.output, curves)
    incidents = len(list((options.output / "tiny" / "incidents").glob("*.json")))
    result: dict[str, Any] = {
        "returncode": code, "iterations": len(curves), "faults": faults, "incidents": incidents, "orphans": left,
        "growth": {name: growth([row[name] for row in curves]) for name in MEASURED},
    }  # fmt: skip
    (options.output / "results.json").write_text(json.dumps(result, indent=2))
    print(json.dumps({name: value for name, value in result.items() if name != "faults"}, indent=2))
    grown = [name for name, value in result["growth"].items() if value > MAX_GROWTH]
    sys.exit(1 if code or grown or left or incidents < len(faults) else 0)


def drawn(iterations: int, *, every: int, seed: int) -> list[str]:
    """Draw a fault for every so many iterations."""
    chance = random.Random(seed)
    faults: list[str] = []
    for iteration in range(every, iterations, every):
        worker, states = chance.choice(PLACES)
        faults.append(f"{worker}:{chance.choice(states)}:{chance.choice(('kill', 'stop'))}@{iteration}")
    return faults


def watched(arguments: list[str], log: Path) -> tuple[list[dict[str, float]], int, list[str]]:
    """Run to the end and count after every iteration."""
    process = start(arguments)
    curves: list[dict[str, float]] = []
    met: dict[int, psutil.Process] = {}
    while until(process, log, stop=lambda line: line.startswith("iteration "), timeout_s=900.0) is not None:
        members = family(process)
        met |= {member.pid: member for member in members}
        curves.append({"iteration": len(curves) + 1, **counted([psutil.Process(process.pid), *members])})
    code = finish(process, log, timeout_s=300.0)
    return curves, code, orphans(list(met.values()))


def counted(members: list[psutil.Process]) -> dict[str, float]:
    """Sum what the processes of a run hold."""
    totals: dict[str, float] = dict.fromkeys(MEASURED, 0.0)
    for member in members:
        try:
            with member.oneshot():
                memory = member.memory_info()
                # Shared pages are the object store's; every process that maps them would count them again.
                held = {
                    "memory_mib": (memory.rss - memory.shared) / _MIB,
                    "file_handles": member.num_fds(),
                    "threads": member.num_threads(),
                    "processes": 1,
                    "object_store_mib": memory.shared / _MIB if member.name() == "raylet" else 0.0,
                }
        except psutil.NoSuchProcess:
            continue
        totals = {name: totals[name] + value for name, value in held.items()}
    return totals


def growth(values: list[float]) -> float:
    """Compare the median of the last fifth with that of the second fifth."""
    fifth = max(1, len(values) // 5)
    early, late = (sorted(part)[len(part) // 2] for part in (values[fifth : 2 * fifth], values[-fifth:]))
    return late / early - 1


def write(output: Path, curves: list[dict[str, float]]) -> None:
    """Write the counts and draw them, each relative to its median."""
    with (output / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=["iteration", *MEASURED])
        writer.writeheader()
        writer.writerows(curves)
    mpl.use("Agg")
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name in MEASURED:
        values = [row[name] for row in curves]
        middle = sorted(values)[len(values) // 2]
        axes.plot([row["iteration"] for row in curves], [value / middle for value in values], label=name)
    axes.set_xlabel("iterations, with faults on the way")
    axes.set_ylabel("relative to the median")
    axes.legend()
    figure.savefig(output / "soak.png", dpi=120, bbox_inches="tight")
    plt.close(figure)


if __name__ == "__main__":
    main()
