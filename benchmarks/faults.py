"""Workers, the driver and whole nodes made to fail in every state: how soon it is noticed, and what comes of it.

    python -m benchmarks.faults --output runs/benchmark-faults --table docs/reliability-faults.md

Each cell is a small run of its own on the real stack, with one fault made on purpose, compared with the undisturbed
run: sampled tokens by key, and the policy in the end. A cell is right if the run goes on and ends as the undisturbed
one; or, for an exception and for the death of the driver, if it ends at once with the cause and the same command then
goes on to that end. A halted driver is continued after some seconds. Finished cells are kept, so that the command goes
on where it was interrupted. Writes results.json and a table; exits with 1 unless every cell is right.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.outcome import outcome
from tests.integration.cluster_run import cluster_command
from tests.tiny_run import tiny_overrides

SILENCE_S = 20.0
SETTINGS = ("rounds.iterations=5", "cluster.checkpoint_period_iterations=2", f"cluster.deadlines.silence_s={SILENCE_S}")
STATES = {
    "rollout-0": ("serving", "publishing", "idle"),
    "reward-0": ("scoring", "idle"),
    "reference-0": ("scoring", "idle"),
    "learner-0": ("update", "publish", "save", "idle"),
    "driver-0": ("serving", "scoring", "publish", "update", "save"),
}
"""What each may be caught doing; the driver while a worker does it."""
ACTS = ("kill", "stop", "raise", "slow=8")
NODES = {
    "rollout-0": ("serving", "publishing"),
    "reward-0": ("scoring",),
    "learner-0": ("update", "publish", "save"),
}
PLACES = {"rollout-0": "for_rollout", "reward-0": "for_scoring", "learner-0": "for_learner"}
HALTED_S = 15.0
TIMEOUT_S = 600.0


def cells() -> list[str]:
    """Name all cells: who, doing what, meets which fault, after how many iterations."""
    found: list[str] = []
    for who, states in STATES.items():
        for state in states:
            for act in ACTS:
                if act == "raise" and state == "idle":
                    continue  # there is nothing that could fail
                if who == "driver-0" and act.startswith("slow"):
                    continue  # as a halted one, only milder
                found.append(f"{who}:{state}:{act}@2")
    return found + [f"{who}:{state}:node@2" for who, states in NODES.items() for state in states]


def main() -> None:
    """Run every cell, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-faults"))
    parser.add_argument("--faults", nargs="*", default=cells(), help="ROLE-INDEX:STATE:ACT[@ITERATION]")
    parser.add_argument("--table", type=Path, default=None, help="where to write the table as Markdown")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    undisturbed = kept(None, output=options.output)
    results = [judged(kept(fault, output=options.output), undisturbed) for fault in options.faults]
    (options.output / "results.json").write_text(json.dumps([undisturbed, *results], indent=2))
    show(results)
    if options.table is not None:
        options.table.write_text(markdown(results))
    sys.exit(0 if all(result["right"] for result in results) else 1)


def kept(fault: str | None, *, output: Path) -> dict[str, Any]:
    """Run a cell, or read what it came to before."""
    name = "undisturbed" if fault is None else fault.replace(":", "-").replace("@", "-")
    path = output / f"{name}.json"
    if not path.exists():
        result = run(fault, directory=output / name, log=output / f"{name}.log")
        path.write_text(json.dumps(result, indent=2))
    return json.loads(path.read_text())


def run(fault: str | None, *, directory: Path, log: Path) -> dict[str, Any]:
    """Run one cell, and the same command again where it ended."""
    happened = watched(command(fault, directory), log, mode="w")
    codes = [happened["returncode"]]
    if codes[0] != 0:
        # The next iteration's time counts from the fault: the two starts are part of it.
        again = watched(command(None, directory), log, mode="a", since_start=True)
        codes.append(again["returncode"])
        happened["iteration"] = again["iteration"]
    return {
        "fault": fault,
        "returncodes": codes,
        "happened": happened["fault"] is not None,
        "noticed_s": _between(happened["fault"], happened["noticed"]),
        "recovered_s": _between(happened["noticed"] or happened["fault"], happened["iteration"]),
        "outcome": outcome(directory / "tiny") if codes[-1] == 0 else None,
    }


def command(fault: str | None, directory: Path) -> list[str]:
    """Write down how a cell is run: on this machine, or, where a node shall die, on a cluster of three."""
    if fault is not None and ":node" in fault:
        dying = PLACES[fault.partition(":")[0]]
        others = {name: 2.0 for name in PLACES.values() if name != dying}
        pinned = [f"cluster.placement.{name.removeprefix('for_')}.resources.{name}=1" for name in PLACES.values()]
        overrides = tiny_overrides(directory, *SETTINGS, *pinned)
        return cluster_command(overrides, nodes=[others, {dying: 2.0}, {dying: 2.0}], faults=[fault])
    options = [] if fault is None else ["--fault", fault]
    return [
        *(sys.executable, "-m", "cluster.cli", "train", "quickstart"),
        *options,
        *tiny_overrides(directory, *SETTINGS),
    ]


def watched(command: Sequence[str], log: Path, *, mode: str, since_start: bool = False) -> dict[str, Any]:
    """Run a command, and take the time of what its lines say: the fault, the first sign of it, the next iteration."""
    happened: dict[str, Any] = {"fault": None, "noticed": None, "iteration": None}
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "RAY_raylet_start_wait_time_s": "180"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    # A run that hangs ends its cell, not the benchmark.
    watchdog = threading.Timer(TIMEOUT_S, lambda: os.killpg(process.pid, signal.SIGKILL))
    watchdog.start()
    with log.open(mode) as file:
        for line in process.stdout:
            file.write(line)
            file.flush()
            now = time.monotonic()
            if "fault: " in line and "(process " in line and happened["fault"] is None:
                happened["fault"] = now
                if "driver-0" in line and ":stop" in line:
                    threading.Timer(HALTED_S, process.send_signal, (signal.SIGCONT,)).start()
            elif ("incident: " in line or line.startswith("error: ")) and happened["noticed"] is None:
                happened["noticed"] = now
            elif (
                line.startswith("iteration ")
                and (since_start or happened["fault"] is not None)
                and _comes_first_after_the_notice(happened)
            ):
                happened["iteration"] = now
    happened["returncode"] = process.wait()
    if happened["noticed"] is None and happened["returncode"] != 0:
        happened["noticed"] = time.monotonic()  # the shell's prompt is the first sign
    watchdog.cancel()
    return happened


def judged(result: dict[str, Any], undisturbed: dict[str, Any]) -> dict[str, Any]:
    """Say whether a cell ended as it should."""
    found, expected = result["outcome"], undisturbed["outcome"]
    ended = result["returncodes"]
    same_tokens = found is not None and found["responses"] == expected["responses"]
    goes_on = ended == [0] or (ended[-1] == 0 and ended[0] == _ends_with(result["fault"]))
    return result | {
        "same_tokens": same_tokens,
        "same_weights": found is not None and found["weights"] == expected["weights"],
        "right": goes_on and same_tokens and result["happened"] and _noticed_in_time(result),
    }


def _noticed_in_time(result: dict[str, Any]) -> bool:
    """Say whether a loss was noticed within its deadline; what is slow, or halted with the whole run, is no loss."""
    who, _, act = result["fault"].split(":")
    act = act.partition("@")[0]
    if act.startswith("slow") or (who == "driver-0" and act == "stop"):
        return True
    bound_s = 2 * SILENCE_S if act == "stop" else SILENCE_S  # a busy machine, and Ray's 10 s to miss a node
    return result["noticed_s"] is not None and result["noticed_s"] < bound_s


def _ends_with(fault: str) -> int | None:
    """The exit code that a fault may end a run with."""
    act = fault.split(":")[2].partition("@")[0]
    if act == "raise":
        return 1
    return -signal.SIGKILL if act == "kill" and fault.startswith("driver") else None


def _comes_first_after_the_notice(happened: dict[str, Any]) -> bool:
    """Say whether no iteration has ended yet since the fault was noticed; one may end between the two."""
    before, noticed = happened["iteration"], happened["noticed"]
    return before is None or (noticed is not None and before < noticed)


def _between(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else second - first


HEADINGS = (
    "who",
    "doing",
    "fault",
    "noticed after",
    "next iteration after",
    "what became of the run",
    "same tokens by key",
    "same weights, bit for bit",
)


def rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """Lay the results out, one row a cell."""
    laid: list[list[str]] = []
    for result in results:
        who, state, act = result["fault"].split("@")[0].split(":")
        seconds = [("-" if result[name] is None else f"{result[name]:.1f} s") for name in ("noticed_s", "recovered_s")]
        codes = result["returncodes"]
        became = "went on" if codes == [0] else f"ended with {codes[0]}; the same command: {codes[-1]}"
        if codes == [0] and result["noticed_s"] is None:
            became = "went on, without a loss"
        same = ["yes" if result[name] else "no" for name in ("same_tokens", "same_weights")]
        laid.append([who, state, act, *seconds, became, *same])
    return laid


def show(results: list[dict[str, Any]]) -> None:
    """Print one row a cell."""
    table = Table(*HEADINGS, title=f"Faults, cluster.deadlines.silence_s = {SILENCE_S:g}")
    for row in rows(results):
        table.add_row(*row)
    Console(width=160).print(table)


def markdown(results: list[dict[str, Any]]) -> str:
    """Lay the table out for a document."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows(results)]) + "\n"


if __name__ == "__main__":
    main()
