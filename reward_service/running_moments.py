"""Mean and standard deviation of everything scored so far: the unit that some published runs give their rewards.

A unit that moves while the policy learns makes the reward non-stationary, so a run keeps the one that calibration has
fixed. This is for experiments that repeat what released code does.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningMoments:
    """The moments of all values seen.

    Source: Chan, Golub and LeVeque (1979); `RunningMoments` of CarperAI/trlx, utils/modeling.py:275-307.
    """

    count: int = 0
    mean: float = 0.0
    sum_of_squares: float = 0.0
    """About the mean."""

    def seen(self, values: NDArray[np.float64] | NDArray[np.float32]) -> "RunningMoments":
        """Take more values in, without losing digits to the difference of two large sums.

            mean = mean_a + delta n_b / n,   M2 = M2_a + M2_b + delta^2 n_a n_b / n,   delta = mean_b - mean_a

        Args:
            values: Any shape, finite; none at all changes nothing.

        Returns:
            The moments of all values together; neither the order of batches nor their sizes matter.

        Raises:
            ValueError: If a value is not finite.
        """
        precise = np.asarray(values, np.float64)
        if not np.isfinite(precise).all():
            raise ValueError("moments need finite values: a failed score is a failure, not a number")
        if not precise.size:
            return self
        count = self.count + precise.size
        mean = float(precise.mean())
        delta = mean - self.mean
        squares = float(np.square(precise - mean).sum())
        return RunningMoments(
            count=count,
            mean=self.mean + delta * precise.size / count,
            sum_of_squares=self.sum_of_squares + squares + delta * delta * self.count * precise.size / count,
        )

    @property
    def std(self) -> float:
        """The standard deviation, unbiased as in the source.

        Raises:
            ValueError: If fewer than two values have been seen.
        """
        if self.count < 2:
            raise ValueError(f"a standard deviation needs two values, seen were {self.count}")
        return float(np.sqrt(self.sum_of_squares / (self.count - 1)))
