"""What a run has come to, in digests: runs that took different ways are compared by it."""

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pyarrow import parquet

from cluster import checkpoint

TIMED = ("time/", "busy/", "sync/seconds", "rollout/tokens_per_s")
"""Metrics that say how long something took."""


def outcome(run: Path) -> dict[str, str]:
    """Read what must not depend on what happened on the way.

    Args:
        run: A finished run's directory.

    Returns:
        A digest each of the weights of all policies and reward models, of the metrics but for times, of the sampled
        tokens by key, of the ladder, and of the newest checkpoint's parts (optimizers, random states).
    """
    ladder = run / "ladder.json"
    return {
        "weights": _digest(_files(run / "policies") | _files(run / "reward_models")),
        "metrics": _digest(_metrics(run)),
        "responses": _digest(_responses(run)),
        "ladder": _digest(json.loads(ladder.read_text())["ratings"] if ladder.exists() else None),
        "checkpoint": _digest(_parts(checkpoint.committed(run / "checkpoints")[-1])),
    }


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Name what is not the same in two runs."""
    return [name for name in one if one[name] != other[name]]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _files(folder: Path, pattern: str = "*.safetensors") -> dict[str, str]:
    found = sorted(path for path in folder.rglob(pattern) if path.is_file())
    return {str(path.relative_to(folder.parent)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def _parts(directory: Path) -> dict[str, str]:
    """Hash the learner's files of a checkpoint; its name and its times are its own.

    Of torch's files the values count: two that hold the same may differ in which tensors share a storage.
    """
    found = sorted(path for path in (directory / "learner").rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): _contents(path) for path in found}


def _contents(path: Path) -> str:
    digest = hashlib.sha256()
    if path.suffix != ".pt":
        digest.update(path.read_bytes())
        return digest.hexdigest()
    # Not only weights: DeepSpeed's files hold objects of its own. They are this benchmark's own files.
    for place, value in _leaves(torch.load(path, map_location="cpu", weights_only=False)):
        digest.update(place.encode())
        if isinstance(value, torch.Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(pickle.dumps(value))
    return digest.hexdigest()


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}/{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{place}/{index}")
    else:
        yield place, value


def _metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMED)} for line in lines]


def _responses(run: Path) -> dict[str, list[int]]:
    rows = [row for path in sorted((run / "rollouts").iterdir()) for row in parquet.read_table(path).to_pylist()]
    return {f"{row['round']}/{row['iteration']}/{row['prompt_id']}/{row['sample']}": row["response"] for row in rows}
