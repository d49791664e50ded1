"""How a gold score rises and falls while a proxy is optimised: the forms of Gao et al., fitted and extrapolated.

With d = sqrt(KL(policy || initial policy)) and a score that is 0 at d = 0:

    best of n   R(d) = d (a - b d)
    rl          R(d) = d (a - b log d)

Source: Gao, Schulman and Hilton, "Scaling Laws for Reward Model Overoptimization" (2022), section 3.1. Both forms are
linear in a and b, so that the fit is ordinary least squares.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Form = Literal["best_of_n", "rl"]

LEAST_D = 0.3
"""Below this distance, in square roots of nats, noise outweighs what the forms differ in, and log d runs away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One form with its coefficients."""

    form: Form
    a: float
    """Score per square root of a nat at the start (for `rl`, at d = 1)."""
    b: float
    """How fast optimisation turns against the gold score; without a positive one it never does."""

    def at(self, d: Floats) -> Floats:
        """Compute the score at some distances."""
        return features(d, form=self.form) @ np.array([self.a, self.b])

    @property
    def peak(self) -> tuple[float, float] | None:
        """Where the score is highest, and how high; None where the form has no turning point beyond the start.

        best of n: d = a / 2b, R = a^2 / 4b;  rl: d = exp(a / b - 1), R = b d
        """
        if self.b <= 0 or (self.form == "best_of_n" and self.a <= 0):
            return None
        if self.form == "best_of_n":
            return self.a / (2 * self.b), self.a**2 / (4 * self.b)
        d = math.exp(self.a / self.b - 1)
        return d, self.b * d

    @property
    def zero(self) -> float | None:
        """Where the score is back where it began; None where it never is."""
        if self.peak is None:
            return None
        return self.a / self.b if self.form == "best_of_n" else math.exp(self.a / self.b)


@dataclass(frozen=True, slots=True, kw_only=True)
class Extrapolation:
    """What a fit to the first part of a curve says of the rest."""

    curve: Curve
    fitted_up_to: float
    """The largest distance that the fit has seen."""
    num_predicted: int
    rmse: float
    """Root mean square error of what it has not seen, in units of the score."""
    rmse_of_last_value: float
    """The same error of a guess that the score stays where it was."""


def features(d: Floats, *, form: Form) -> Floats:
    """Compute what a and b are multiplied by.

    Args:
        d: [N] distances, positive.
        form: Which.

    Returns:
        [N, 2].
    """
    bend = d * d if form == "best_of_n" else d * np.log(d)
    return np.stack([d, -bend], axis=1)


def fit(d: Floats, scores: Floats, *, form: Form, least_d: float = LEAST_D) -> Curve:
    """Fit a form by least squares.

    Args:
        d: [N] distances from the initial policy, in square roots of nats.
        scores: [N] scores less that of the initial policy.
        form: Which.
        least_d: What is nearer is left out.

    Returns:
        The curve.

    Raises:
        ValueError: If fewer than two different distances are left.
    """
    far = d > least_d
    if len(np.unique(d[far])) < 2:
        raise ValueError(f"two coefficients need two different distances beyond {least_d}, got {d[far].tolist()[:8]}")
    (a, b), *_ = np.linalg.lstsq(features(d[far], form=form), scores[far], rcond=None)
    return Curve(form=form, a=float(a), b=float(b))


def extrapolate(d: Floats, scores: Floats, *, form: Form, share: float = 0.5) -> Extrapolation:
    """Fit the first part of the range of distances, and predict the rest.

    Args:
        d: [N] distances.
        scores: [N] scores less that of the initial policy.
        form: Which.
        share: Share of the range, from 0 to the largest distance, that the fit sees.

    Returns:
        The fit and its errors.

    Raises:
        ValueError: If one of the two parts is too small.
    """
    bound = share * float(d.max())
    seen = d <= bound
    if seen.all():
        raise ValueError(f"nothing is left to predict beyond d = {bound:g}")
    curve = fit(d[seen], scores[seen], form=form)
    last = scores[seen][np.argmax(d[seen])]

    def rmse(predicted: Floats) -> float:
        return float(np.sqrt(np.mean((scores[~seen] - predicted) ** 2)))

    return Extrapolation(
        curve=curve,
        fitted_up_to=float(d[seen].max()),
        num_predicted=int((~seen).sum()),
        rmse=rmse(curve.at(d[~seen])),
        rmse_of_last_value=rmse(np.full((~seen).sum(), last)),
    )


def bootstrap(
    curves: Sequence[tuple[Floats, Floats]], *, form: Form, resamples: int, confidence: float, seed: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Find intervals for both coefficients by drawing whole seeds with replacement.

    Args:
        curves: The distances and scores of each seed.
        form: Which.
        resamples: How often the seeds are drawn.
        confidence: Of the two-sided intervals.
        seed: Of the draws.

    Returns:
        The intervals of a and of b.
    """
    rng = np.random.default_rng(seed)
    found: list[tuple[float, float]] = []
    for _ in range(resamples):
        drawn = [curves[place] for place in rng.integers(0, len(curves), size=len(curves))]
        curve = fit(np.concatenate([d for d, _ in drawn]), np.concatenate([r for _, r in drawn]), form=form)
        found.append((curve.a, curve.b))
    low, high = np.quantile(np.array(found), [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
    return (float(low[0]), float(high[0])), (float(low[1]), float(high[1]))


def regressional_slope(*, gold_variance: float, noise_variance: float) -> float:
    """Compute how much gold a unit of proxy is worth if the proxy is gold with independent Gaussian noise.

        E[gold | proxy] = Var gold / (Var gold + Var noise) proxy

    Such a proxy overstates, but its gold never falls: a turnover needs errors that grow where the proxy is high.

    Source: Gao et al. (2022), section 4.3.1 (regressional Goodhart).
    """
    return gold_variance / (gold_variance + noise_variance)
