"""The figures that experiments share: bands over seeds, and one line a seed where distances differ."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt

from benchmarks.experiments.laboratory.verdicts import Curve

LABELS = {
    "iteration": "iteration",
    "gold": "gold (std of the supervised policy)",
    "proxy": "proxy (std of the supervised policy)",
    "kl_exact_nats": "exact KL (nats per sequence)",
    "kl_beta": "KL coefficient",
    "helpful_sensitive": "helpful gold where harm is at stake",
    "helpful_other": "helpful gold elsewhere",
    "harmless_sensitive": "harmless gold where harm is at stake",
    "beta_eff": "effective KL coefficient, lambda sigma_A",
    "entropy_nats_per_token": "entropy (nats per token)",
    "response_tokens": "response length (tokens)",
}
Draw = Callable[[Any, Mapping[str, Sequence[Curve]], Mapping[str, Any]], None]


def against_steps(column: str) -> Draw:
    """Draw a column over iterations: the mean over seeds in a band from the least to the greatest."""

    def draw(axis: Any, curves: Mapping[str, Sequence[Curve]], colors: Mapping[str, Any]) -> None:
        for name, of_seeds in curves.items():
            values = np.array([curve[column] for curve in of_seeds])
            steps = of_seeds[0]["iteration"]
            axis.fill_between(steps, values.min(0), values.max(0), color=colors[name], alpha=0.15, linewidth=0)
            axis.plot(steps, values.mean(0), color=colors[name], label=name)
        axis.set(xlabel="iteration", ylabel=LABELS[column])

    return draw


def against_distance(column: str) -> Draw:
    """Draw a column over the square root of the exact KL, one line a seed."""

    def draw(axis: Any, curves: Mapping[str, Sequence[Curve]], colors: Mapping[str, Any]) -> None:
        for name, of_seeds in curves.items():
            for number, curve in enumerate(of_seeds):
                root = np.sqrt(np.maximum(curve["kl_exact_nats"], 0))
                label = name if number == 0 else None
                axis.plot(root, curve[column], color=colors[name], alpha=0.6, linewidth=1, label=label)
        axis.set(xlabel="square root of the exact KL (nats)", ylabel=LABELS[column])

    return draw


def save(path: Path, curves: Mapping[str, Sequence[Curve]], panels: Sequence[Draw], *, columns: int = 3) -> None:
    """Write a figure of several panels.

    Args:
        path: A PNG.
        curves: Arm -> its curves, one a seed.
        panels: What to draw, row by row.
        columns: Panels in a row.
    """
    mpl.use("agg")
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.6 * rows), layout="constrained", squeeze=False)
    colors = dict(zip(curves, plt.get_cmap("tab10").colors * 2, strict=False))  # pyright: ignore
    for axis, draw in zip(axes.flat, panels, strict=False):
        draw(axis, curves, colors)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
