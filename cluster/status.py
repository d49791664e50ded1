"""How far a run is, read from its files alone: no Ray, no model."""

import json
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from cluster.checkpoint import committed
from cluster.run_directory import RunDirectory
from cluster.tracking import evaluation_table
from configs.load import config_hash
from configs.run import RunConfig
from protocol import metrics as names


def policies(run: Path) -> dict[int, Path]:
    """Find a run's exported policy versions."""
    return _versions(run / "policies")


def _versions(root: Path) -> dict[int, Path]:
    return {int(path.name[1:]): path for path in sorted(root.glob("v[0-9]*")) if path.name[1:].isdigit()}


def describe(run: Path, config: RunConfig) -> RenderableType:
    """Lay out a run's lineage, its last iteration and its evaluation."""
    directory = RunDirectory(run.absolute())
    parts: list[RenderableType] = [_lineage(directory, config)]
    last = last_metrics(directory.metrics)
    if last is not None:
        parts.append(
            Text(
                f"last iteration: {int(last[names.COUNTER_ITERATION]) + 1} of {config.rounds.iterations}, "
                f"score {last[names.OBJECTIVE_SCORE]:+.3f}, KL {last[names.OBJECTIVE_KL]:.2f}, "
                f"{last[names.TIME_ITERATION]:.2f} s"
            )
        )
    checkpoints = committed(directory.checkpoints)
    parts.append(Text(f"checkpoints: {', '.join(path.name for path in checkpoints) or 'none yet'}"))
    if directory.evaluation.exists():
        parts.append(evaluation_table(json.loads(directory.evaluation.read_text())))
    done = directory.finished.exists()
    parts.append(Text("finished" if done else f"not finished; go on with: rondo resume {run}"))
    return Group(*parts)


def last_metrics(path: Path) -> dict[str, Any] | None:
    """Read the last line of metrics.jsonl."""
    if not path.exists():
        return None
    lines = path.read_text().splitlines()
    return json.loads(lines[-1]) if lines else None


def _lineage(directory: RunDirectory, config: RunConfig) -> Tree:
    tree = Tree(f"{directory.root.name} (config {config_hash(config)}, algorithm {config.algorithm.name})")
    versions = policies(directory.root)
    base = tree.add("policy v000 (SFT)" if 0 in versions else "no supervised policy yet")
    for version in _versions(directory.root / "reward_models"):
        base.add(f"reward model v{version:03d}")
    for version in versions:
        if version:
            base.add(f"policy v{version:03d}")
    return tree
