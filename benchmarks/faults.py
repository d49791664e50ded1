"""Every kind of worker, killed or stopped in every state: how soon it is noticed, and how soon the run goes on.

    python -m benchmarks.faults --output runs/benchmark-faults --table docs/reliability-table.md

Each cell is a small run of its own on the real stack, with one fault made on purpose, whose final policy is compared
with the undisturbed run's. Writes results.json and a table; exits with 1 unless every cell ends as it should.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.tiny_run import tiny_overrides

SILENCE_S = 20.0
SETTINGS = ("rounds.iterations=5", "cluster.checkpoint_period_iterations=2", f"cluster.deadlines.silence_s={SILENCE_S}")
FAULTS = [
    f"{worker}:{state}:{act}@2"
    for worker, states in (
        ("rollout-0", ("serving", "publishing", "idle")),
        ("reward-0", ("scoring", "idle")),
        ("reference-0", ("scoring", "idle")),
        ("learner-0", ("update", "publish", "save", "idle")),
    )
    for state in states
    for act in ("kill", "stop")
]
TIMEOUT_S = 600.0


def main() -> None:
    """Run every cell, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-faults"))
    parser.add_argument("--faults", nargs="*", default=FAULTS, help="ROLE-INDEX:STATE:ACT[@ITERATION]")
    parser.add_argument("--table", type=Path, default=None, help="where to write the table as Markdown")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    undisturbed = run(None, output=options.output)
    results = [run(fault, output=options.output) for fault in options.faults]
    for result in results:
        result["same"] = result["policy_sha256"] == undisturbed["policy_sha256"]
    (options.output / "results.json").write_text(json.dumps([undisturbed, *results], indent=2))
    show(results)
    if options.table is not None:
        options.table.write_text(markdown(results))
    sys.exit(0 if all(result["returncode"] == 0 and result["noticed_s"] is not None for result in results) else 1)


def run(fault: str | None, *, output: Path) -> dict[str, Any]:
    """Run one cell and read its output as it comes."""
    name = "undisturbed" if fault is None else fault.replace(":", "-").replace("@", "-")
    directory = output / name
    options = [] if fault is None else ["--fault", fault]
    command = [sys.executable, "-m", "cluster.cli", "train", "quickstart", *options]
    command += tiny_overrides(directory, *SETTINGS)
    happened: dict[str, float | None] = {"fault": None, "incident": None, "iteration": None}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    watchdog = threading.Timer(TIMEOUT_S, process.kill)  # a run that hangs ends its cell, not the benchmark
    watchdog.start()
    with (output / f"{name}.log").open("w") as log:
        for line in process.stdout:
            log.write(line)
            now = time.monotonic()
            if "s] fault: " in line:
                happened["fault"] = now
            elif "s] incident: " in line and happened["incident"] is None:
                happened["incident"] = now
            elif line.startswith("iteration ") and happened["incident"] is not None and happened["iteration"] is None:
                happened["iteration"] = now
    process.wait()
    watchdog.cancel()
    return {
        "fault": fault,
        "returncode": process.returncode,
        "noticed_s": _between(happened["fault"], happened["incident"]),
        "recovered_s": _between(happened["incident"], happened["iteration"]),
        "policy_sha256": _hash(directory / "tiny" / "policies" / "v005"),
    }


def _between(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else second - first


def _hash(policy: Path) -> str | None:
    weights = sorted(policy.glob("*.safetensors"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest() if weights else None


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Lay the results out: worker, state, act, noticed after, went on after, same policy."""
    laid: list[list[str]] = []
    for r in results:
        worker, state, act = r["fault"].split("@")[0].split(":")
        seconds = [("never" if r[name] is None else f"{r[name]:.1f} s") for name in ("noticed_s", "recovered_s")]
        laid.append([worker, state, act, *seconds, "yes" if r["same"] else "NO"])
    return laid


HEADINGS = ("worker", "state", "act", "noticed after", "next iteration after", "same policy in the end, bit for bit")


def show(results: list[dict[str, Any]]) -> None:
    """Print one row a cell."""
    table = Table(*HEADINGS, title=f"Faults, cluster.deadlines.silence_s = {SILENCE_S:g}")
    for row in rows(results):
        table.add_row(*row)
    Console(width=140).print(table)


def markdown(results: list[dict[str, Any]]) -> str:
    """Lay the table out for a document."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows(results)]) + "\n"


if __name__ == "__main__":
    main()
