"""What an iteration costs over its floors, at 0.7M, 6M and 30M parameters.

    python -m benchmarks.iteration --size 0.7M --iterations 8
    python -m benchmarks.iteration --size all --json results.json

Runs real iterations (Ray, vLLM, DeepSpeed) on the quickstart world, then measures each stage bare on the same sequences
with the same threads (`benchmarks.floors`), and prints samples/s, response tokens/s, CPU-seconds per 1,000 response
tokens, peak memory of all processes, and the ratio of an iteration's wall time to the sum of its floors.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from cluster import launch, run_directory, schedule
from cluster.driver import optimise
from cluster.progress import Progress
from cluster.rounds import carry_out
from cluster.schedule import Phase
from configs.load import load
from configs.run import RunConfig
from reward_service.preferences.store import PreferenceStore

SIZES = {
    "0.7M": {"hidden_size": 128, "mlp_size": 344, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2},
    "6M": {"hidden_size": 256, "mlp_size": 688, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4},
    "30M": {"hidden_size": 512, "mlp_size": 1376, "num_layers": 10, "num_heads": 8, "num_kv_heads": 4},
}
# Enough supervised steps that responses end by themselves; what they say does not matter here.
SFT_STEPS = {"0.7M": 150, "6M": 60, "30M": 30}
WARM_UP = 2
STAGES = ("generate", "score", "learn", "publish")


def main() -> None:
    """Measure the chosen sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "all"], default="0.7M")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--responses", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    for size in SIZES if options.size == "all" else [options.size]:
        if options.size == "all":
            # A process each, so that one size's memory and caches are not the next one's.
            command = [sys.executable, "-m", "benchmarks.iteration", "--size", size, "--json"]
            with tempfile.NamedTemporaryFile(suffix=".json") as file:
                subprocess.run([*command, file.name, "--iterations", str(options.iterations)], check=True)
                results += json.loads(Path(file.name).read_text())
        else:
            results.append(measure(size, iterations=options.iterations, responses=options.responses))
            show(results[-1])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2))


def configuration(size: str, *, directory: Path, iterations: int, responses: int) -> RunConfig:
    """Make the configuration of one size."""
    scratch = [f"models.policy.scratch.{key}={value}" for key, value in SIZES[size].items()]
    return load(
        "quickstart",
        [
            *scratch, f"run.dir={directory}", "run.name=benchmark", f"rounds.iterations={iterations + WARM_UP}",
            f"learner.sft.num_steps={SFT_STEPS[size]}", "data.preferences.count=200", "data.demonstrations.count=4000",
            "learner.reward_model.num_epochs=1", "scoring.calibration_responses=64",
            "rounds.count=1", "rounds.overrides={}", "rounds.collect.comparisons=0", "rounds.heldout_share=0",
            f"rollout.responses_per_iteration={responses}", "algorithm.critic_warmup_iterations=0",
            "learner.policy_optimizer.learning_rate=1e-5", "cluster.checkpoint_period_iterations=1000000",
        ],
    )  # fmt: skip


def measure(size: str, *, iterations: int, responses: int) -> dict[str, Any]:
    """Run and time real iterations, then the floors on what they sampled."""
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(size, directory=Path(folder), iterations=iterations, responses=responses)
        directory = run_directory.claim(config)
        launch.connect(config, verbose=False)
        store = PreferenceStore.open(run_directory.store_url(config, directory))
        console = Console(stderr=True)
        progress = Progress(console, collects=lambda number: False)
        stages = launch.make_stages(config, directory, store, console, progress)
        state = stages.resume()
        while state.phase is not Phase.OPTIMISE:
            state = schedule.after(carry_out(stages, state), config)
            stages.reached(state)
        roles = stages.roles(state)
        lines, used = [], []
        with PeakMemory() as memory:
            for report, reached in optimise(roles, config, state):
                lines.append(report.metrics)
                used.append(cpu_seconds())
                stages.iterated(report, reached)
        stages.close()
        store.close()
        launch.ray.shutdown()
        floors = {**floor(directory.root, "generate", iterations), **floor(directory.root, "passes", iterations)}
        parameters = count_parameters(directory.policy(0))
    kept = lines[WARM_UP:]
    wall = statistics.mean(line["time/iteration"] for line in kept)
    tokens = statistics.mean(line["counter/response_tokens"] for line in kept)
    # From the end of one iteration to the end of the next: logging and Parquet are in it, set-up is not.
    cpu = (used[-1] - used[WARM_UP - 1]) / len(kept)
    return {
        "size": size,
        "parameters": parameters,
        "responses": responses,
        "iteration_s": wall,
        "stages_s": {name: statistics.mean(line[f"time/{name}"] for line in kept) for name in STAGES},
        "floors_s": floors,
        "ratio": wall / sum(floors.values()),
        "publish_share": statistics.mean(line["time/publish"] / line["time/iteration"] for line in kept),
        "samples_per_s": responses / wall,
        "response_tokens_per_s": tokens / wall,
        "cpu_s_per_1000_response_tokens": 1000 * cpu / tokens,
        "peak_memory_gib": memory.peak_bytes / 2**30,
        "logprob_gap_max": max(line["sync/logprob_gap_max"] for line in kept),
    }


def floor(run: Path, stage: str, iterations: int) -> dict[str, float]:
    """Measure floors in a process that has the machine to itself."""
    command = [sys.executable, "-m", "benchmarks.floors", str(run), "--stage", stage, "--last", str(iterations)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def count_parameters(directory: Path) -> int:
    """Count the elements of an exported model."""
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", framework="numpy") as file:
        return sum(file.get_tensor(name).size for name in file.keys())  # noqa: SIM118


def processes() -> list[psutil.Process]:
    """List this process and everything below it; Ray's workers are below its raylet, which is below this one."""
    me = psutil.Process()
    return [me, *me.children(recursive=True)]


def cpu_seconds() -> float:
    """Add up the CPU time of all processes."""
    total = 0.0
    for process in processes():
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


class PeakMemory:
    """Samples the summed resident memory (unique pages and this share of shared ones) of all processes."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(1.0):
            total = 0
            for process in processes():
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.peak_bytes = max(self.peak_bytes, total)


def show(result: dict[str, Any]) -> None:
    """Print one size's result."""
    table = Table(title=f"{result['size']} ({result['parameters']:,} parameters), {result['responses']} responses")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in result.items():
        if isinstance(value, dict):
            for key, number in value.items():
                table.add_row(f"{name.removesuffix('_s')} {key} (s)", f"{number:.3f}")
        elif isinstance(value, float):
            table.add_row(name.replace("_", " "), f"{value:.3g}" if value < 0.01 else f"{value:.3f}")
    table.add_row("sum of floors (s)", f"{sum(result['floors_s'].values()):.3f}")
    Console().print(table)


if __name__ == "__main__":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    main()
