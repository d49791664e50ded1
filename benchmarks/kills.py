"""A driver that is killed at random moments, and started again each time: does it come to the same end?

    python -m benchmarks.kills --kills 20 --output runs/benchmark-kills

Two small runs of two rounds on the real stack. One is left alone; the other's driver gets SIGKILL after a random time,
anywhere from its first second on, again and again until enough kills have struck, and is then left to finish. Weights,
metrics, responses, ladder and the last checkpoint must be the same, bit for bit, and no process of a killed run may
live on. Writes results.json; exits with 1 if anything differs.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.interrupted import complete, family, finish, orphans, start
from benchmarks.outcome import differing, outcome
from tests.tiny_run import tiny_overrides

SETTINGS = (
    "rounds.count=2",
    "rounds.iterations=40",
    'rounds.overrides={"2": {collect: {comparisons: 30}}}',
    "rounds.collect.responses_per_task=2",
    "rounds.collect.samples_per_prompt=2",
    "rounds.gate.min_prompts=2",
    "rounds.evaluation.bootstrap_resamples=200",
    "cluster.checkpoint_period_iterations=1",
)
KILL_S = (1.0, 55.0)
"""Between these times after its start a driver is killed; reaching the first iteration takes about half of it."""


def main() -> None:
    """Kill, start again, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-kills"))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the moments; what is killed there depends on the machine"
    )
    options = parser.parse_args()
    shutil.rmtree(options.output, ignore_errors=True)
    options.output.mkdir(parents=True)
    undisturbed_s = complete(
        tiny_overrides(options.output / "undisturbed", *SETTINGS), options.output / "undisturbed.log"
    )
    arguments = tiny_overrides(options.output / "killed", *SETTINGS)
    moments = random.Random(options.seed)
    kills = [
        kill(arguments, options.output / "killed.log", after_s=moments.uniform(*KILL_S)) for _ in range(options.kills)
    ]
    complete(arguments, options.output / "killed.log")
    one, other = (outcome(options.output / name / "tiny") for name in ("undisturbed", "killed"))
    result: dict[str, Any] = {
        "undisturbed_s": undisturbed_s,
        "kills": kills,
        "struck": sum(found["struck"] for found in kills),
        "differing": differing(one, other),
        "outcome": one,
    }
    (options.output / "results.json").write_text(json.dumps(result, indent=2))
    left = [orphan for found in kills for orphan in found["orphans"]]
    print(f"{result['struck']} kills; differing: {result['differing'] or 'nothing'}; orphans: {left or 'none'}")
    sys.exit(1 if result["differing"] or left or result["struck"] < options.kills else 0)


def kill(arguments: list[str], log: Path, *, after_s: float) -> dict[str, Any]:
    """Start the run, kill its driver after a time, and wait until everything that it had started is gone."""
    process = start(arguments)
    struck: list[Any] = []

    def strike() -> None:
        struck.extend(family(process))
        process.send_signal(signal.SIGKILL)

    timer = threading.Timer(after_s, strike)
    timer.start()
    code = finish(process, log, timeout_s=600.0)
    timer.cancel()
    last = log.read_text().splitlines()[-1]
    begun = time.monotonic()
    found = {"after_s": after_s, "struck": code == -signal.SIGKILL, "last_line": last, "orphans": orphans(struck)}
    return found | {"gone_after_s": time.monotonic() - begun}


if __name__ == "__main__":
    main()
