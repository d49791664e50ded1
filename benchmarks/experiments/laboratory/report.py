"""From arms to what is published: tables of the ends, verdicts, and the same on a terminal."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.experiments.laboratory.arm_queue import run_all
from benchmarks.experiments.laboratory.arms import Arm
from benchmarks.experiments.laboratory.plan import EARLY, Command, write_table
from benchmarks.experiments.laboratory.verdicts import Claim, Curve, at_kl, last, read_curve

BySeed = dict[int, Curve]
MATCHED_NATS = (1.0, 2.0, 4.0, 6.0)
ENDS = ("gold", "proxy", "kl_exact_nats", "kl_k1_nats", "kl_released_code", "entropy_nats_per_token", "kl_beta")


def run(arms: Sequence[Arm], command: Command) -> dict[str, BySeed]:
    """Run arms, and read their curves: name -> seed -> curve."""
    run_all(arms, command.places, processes=command.processes)
    curves: dict[str, BySeed] = {}
    for arm in arms:
        curves.setdefault(arm.name, {})[arm.seed] = read_curve(command.places.results / arm.file)
    return curves


def whole_runs(curves: Mapping[str, BySeed]) -> dict[str, list[Curve]]:
    """List what figures show of each arm: all seeds, and no beginning that was run once more."""
    return {name: list(by_seed.values()) for name, by_seed in curves.items() if not name.endswith(EARLY)}


def summary(curves: Mapping[str, BySeed]) -> list[dict[str, Any]]:
    """Describe every arm of every seed: its peak, its end, and gold at fixed distances."""
    rows: list[dict[str, Any]] = []
    for name, by_seed in curves.items():
        for seed, curve in by_seed.items():
            peak = int(np.argmax(curve["gold"]))
            row: dict[str, Any] = {"arm": name, "seed": seed} | {f"end_{c}": last(curve, c) for c in ENDS}
            row["beta_eff_end"] = last(curve, "beta_eff")
            row["peak_gold"] = float(curve["gold"][peak])
            row["peak_kl_exact_nats"] = float(curve["kl_exact_nats"][peak])
            rows.append(row | {f"gold_at_{k:g}_nats": at_kl(curve, k, column="gold") for k in MATCHED_NATS})
    return rows


def frontier(curves: Mapping[str, BySeed], columns: Sequence[str]) -> list[dict[str, Any]]:
    """Read columns of every arm and seed where the exact KL first reaches each of some distances; NaN beyond."""
    return [
        {"arm": name, "seed": seed, "kl_exact_nats": nats} | {c: at_kl(curve, nats, column=c) for c in columns}
        for name, by_seed in curves.items()
        for seed, curve in by_seed.items()
        for nats in MATCHED_NATS
    ]


def publish(directory: Path, curves: Mapping[str, BySeed], claims: Sequence[Claim]) -> None:
    """Write summary.csv and verdicts.json, and print both: min, mean and max over seeds, and each claim's sentence."""
    rows = summary(curves)
    write_table(directory / "summary.csv", rows)
    stored = [asdict(claim) | {"sentence": claim.sentence} for claim in claims]
    (directory / "verdicts.json").write_text(json.dumps(stored, indent=1) + "\n")
    console = Console(width=140)
    shown = ("end_gold", "end_proxy", "end_kl_exact_nats", "peak_gold", "peak_kl_exact_nats", "gold_at_4_nats")
    table = Table("arm", *(name.replace("_", " ") for name in shown), title="mean over seeds (least .. greatest)")
    for name in curves:
        cells: list[str] = []
        for column in shown:
            values = np.array([row[column] for row in rows if row["arm"] == name], np.float64)
            cells.append(
                "-" if np.isnan(values).any() else f"{values.mean():.2f} ({values.min():.2f}..{values.max():.2f})"
            )
        table.add_row(name, *cells)
    console.print(table)
    for claim in claims:
        console.print(claim.sentence, soft_wrap=True)
