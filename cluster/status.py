"""How far a run is, read from its files alone: no Ray, no model."""

import json
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text
from rich.tree import Tree

from cluster import lineage
from cluster.checkpoint import committed
from cluster.lineage import Artefact
from cluster.run_directory import RunDirectory, state_of
from cluster.tracking import evaluation_table, ladder_table, read_lines
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
        number = int(last[names.COUNTER_ROUND])
        parts.append(
            Text(
                f"last iteration: round {number}, {int(last[names.COUNTER_ITERATION]) + 1} of "
                f"{config.rounds.of(number).iterations}, "
                f"score {last[names.OBJECTIVE_SCORE]:+.3f}, "
                + (f"KL {last[names.OBJECTIVE_KL]:.2f}, " if names.OBJECTIVE_KL in last else "")
                + f"{last[names.TIME_ITERATION]:.2f} s"
            )
        )
    checkpoints = committed(directory.checkpoints)
    parts.append(Text(f"checkpoints: {', '.join(path.name for path in checkpoints) or 'none yet'}"))
    if directory.evaluation.exists():
        parts.append(evaluation_table(json.loads(directory.evaluation.read_text())))
    if directory.ladder.exists():
        parts.append(ladder_table(json.loads(directory.ladder.read_text())))
    done = directory.finished.exists()
    if not done and directory.state.exists():
        state = state_of(directory)
        parts.append(Text(f"phase: round {state.round}, {state.phase.value}"))
    parts.append(Text("finished" if done else f"not finished; go on with: rondo resume {run}"))
    return Group(*parts)


def last_metrics(path: Path) -> dict[str, Any] | None:
    """Read the last whole line of metrics.jsonl."""
    lines = read_lines(path)
    return lines[-1] if lines else None


def _lineage(directory: RunDirectory, config: RunConfig) -> Tree:
    """Draw what was made from what: every artefact under the first thing it was made from."""
    tree = Tree(f"{directory.root.name} (config {config_hash(config)}, algorithm {config.algorithm.name})")
    artefacts = lineage.read(directory.lineage)
    if not artefacts:
        tree.add("nothing has been made yet")
    best = state_of(directory).best_version
    branches: dict[str, Tree] = {}
    for artefact in artefacts:
        parent = artefact.parents[0] if artefact.parents else None
        branch = tree if parent is None else branches.get(parent, tree)
        star = "  * best" if artefact.name == f"policies/v{best:03d}" else ""
        branches[artefact.name] = branch.add(Text(_describe(artefact) + star))
    return tree


def _describe(artefact: Artefact) -> str:
    """Put an artefact into a line: its name, its round, and what else it was made from."""
    others = artefact.parents[1:]
    made_with = f" with {', '.join(others)}" if others else ""
    data = artefact.data
    figures = {
        "policy": [f"{data['iterations']} iterations"] if "iterations" in data else ["supervised"],
        "reward_model": [f"held-out accuracy {data['held-out accuracy']:.3f}"] if "held-out accuracy" in data else [],
        "comparisons": [held] if (held := lineage.compared(artefact)) else [],
    }[artefact.kind]
    if "stopped" in data:
        figures.append(f"stopped: {data['stopped']}")
    when = f"round {artefact.round}: " if artefact.round else ""
    return f"{artefact.name} ({when}{', '.join(figures)}){made_with}"
