"""What curves say of a claim, by rules that are fixed before anything is run."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Curve = dict[str, NDArray[np.float64]]
Verdict = Literal["reproduced", "not reproduced", "only in the arm that copies the released code"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A claim, the seeds that bear it out, and the verdict."""

    name: str
    statement: str
    holds: dict[int, bool]
    """By seed."""
    verdict: Verdict
    figures: str = ""
    """What was measured, in one sentence."""

    @property
    def sentence(self) -> str:
        """Say it in one line."""
        seeds = f"{sum(self.holds.values())} of {len(self.holds)} seeds"
        return f"{self.name}: {self.statement}: {self.verdict} ({seeds}). {self.figures}".rstrip()


def judge(
    name: str, statement: str, holds: dict[int, bool], *, in_released: dict[int, bool] | None = None, figures: str = ""
) -> Claim:
    """Judge a claim: reproduced where it holds in every seed, and never otherwise.

    Args:
        name: Of the claim, such as E1.
        statement: What is claimed.
        holds: By seed, whether it does in the arms that follow the papers.
        in_released: By seed, whether it does in the arms that copy the released code; None where there are none.
        figures: What was measured.

    Returns:
        The claim with its verdict.

    Raises:
        ValueError: If there are no seeds.
    """
    if not holds:
        raise ValueError(f"no seed says anything of {name}")
    verdict: Verdict = "not reproduced"
    if all(holds.values()):
        verdict = "reproduced"
    elif in_released and all(in_released.values()):
        verdict = "only in the arm that copies the released code"
    return Claim(name=name, statement=statement, holds=holds, verdict=verdict, figures=figures)


def read_curve(path: Path) -> Curve:
    """Read an arm's curve: column -> one number an evaluation."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}


FAR_APART = 0.75
"""In the square root of nats: between evaluations further apart nothing is read."""


def at_kl(curve: Curve, nats: float, *, column: str) -> float:
    """Read a column where the exact KL first reaches a value, interpolated between evaluations that are not far apart.

    Gold bends over the square root of KL. A line between evaluations at 0 and at 3 nats would say less of a policy that
    went there in between than of one that was watched on its way.

    Args:
        curve: An arm's.
        nats: The KL.
        column: What to read.

    Returns:
        The column's value; NaN where the KL is never reached, or between evaluations further apart than FAR_APART.
    """
    distance, values = curve["kl_exact_nats"], curve[column]
    reached = np.flatnonzero(distance >= nats)
    if not len(reached):
        return float("nan")
    after = int(reached[0])
    if after == 0:
        return float(values[0])
    if np.sqrt(distance[after]) - np.sqrt(max(0.0, distance[after - 1])) > FAR_APART:
        return float("nan")
    share = (nats - distance[after - 1]) / (distance[after] - distance[after - 1])
    return float(values[after - 1] + share * (values[after] - values[after - 1]))


def last(curve: Curve, column: str, *, over: int = 3) -> float:
    """Average a column over the last evaluations."""
    return float(curve[column][-over:].mean())


def paired(first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float, float]:
    """Compare two arms seed by seed.

    Args:
        first: [S] one number a seed.
        second: [S] the same seeds'.
        confidence: Of the two-sided t interval over seeds.

    Returns:
        The mean of first minus second, and the interval's ends; NaN ends for a single seed.
    """
    gains = np.asarray(first, np.float64) - np.asarray(second, np.float64)
    if len(gains) < 2:
        return float(gains.mean()), float("nan"), float("nan")
    quantile = stats.t.ppf((1 + confidence) / 2, len(gains) - 1)
    half = float(quantile * gains.std(ddof=1) / np.sqrt(len(gains)))
    return float(gains.mean()), float(gains.mean() - half), float(gains.mean() + half)


def falling(values: Sequence[float]) -> bool:
    """Say whether each value is below the one before."""
    return all(after < before for before, after in pairwise(values))


def turns(curve: Curve, *, drop: float = 0.5, column: str = "gold") -> bool:
    """Say whether a column ends at least so much below its peak, in standard deviations of the supervised policy.

    The noise of one evaluation is about 0.05, and the peak is the largest of some twenty, so that half a standard
    deviation is far outside it. Both ends are means of three evaluations.
    """
    smooth = np.convolve(curve[column], np.full(3, 1 / 3), mode="valid")
    return bool(smooth.max() - smooth[-1] >= drop)


def choose_learning_rate(curves: dict[float, Curve], *, nats: float) -> float:
    """Choose the learning rate with the highest proxy at a fixed KL; gold has no say.

    Args:
        curves: By learning rate, of one seed.
        nats: The KL, which a curve must reach to be chosen.

    Returns:
        The learning rate; where none reaches the KL, the one that comes nearest.
    """
    proxies = {rate: at_kl(curve, nats, column="proxy") for rate, curve in curves.items()}
    able = {rate: proxy for rate, proxy in proxies.items() if not np.isnan(proxy)}
    if able:
        return max(able, key=lambda rate: able[rate])
    return max(curves, key=lambda rate: float(curves[rate]["kl_exact_nats"].max()))
