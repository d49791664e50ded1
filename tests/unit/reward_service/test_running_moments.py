"""Running moments: the published numbers, and the moments of everything at once."""

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward_service.running_moments import RunningMoments
from tests.reference_vectors import VECTORS

VECTOR = VECTORS["V12b_running_moments"]
VALUES = st.lists(st.floats(-50, 50), min_size=2, max_size=12)


def test_v12b_two_batches() -> None:
    # The vector names no inputs; these are the batches that give its four numbers.
    first = RunningMoments().seen(np.array([1.0, 2.0, 3.0, 4.0]))
    assert (first.mean, first.std) == pytest.approx(VECTOR["after_1"], abs=1e-8)
    second = first.seen(np.array([5.0, 7.0]))
    assert (second.mean, second.std) == pytest.approx(VECTOR["after_2"], abs=1e-8)
    assert second.count == 6
    assert VECTOR["numpy_check"] == VECTOR["after_2"]
    once = RunningMoments().seen(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 7.0]))
    assert (once.mean, once.std) == pytest.approx(VECTOR["numpy_check"], abs=1e-8)


@settings(deadline=None, derandomize=True)
@given(values=VALUES, data=st.data())
def test_neither_order_nor_batches_matter(values: list[float], data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(values))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=3)))
    moments = RunningMoments()
    for start, end in zip([0, *cuts], [*cuts, len(values)], strict=True):
        moments = moments.seen(np.array(shuffled[start:end]))
    assert moments.count == len(values)
    assert moments.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert moments.std == pytest.approx(statistics.stdev(values), abs=1e-7)


def test_a_large_mean_loses_no_digits() -> None:
    moments = RunningMoments()
    for value in (1e9, 1e9 + 1, 1e9 + 2):
        moments = moments.seen(np.array([value]))
    assert moments.std == pytest.approx(1.0, rel=1e-9)


def test_what_has_no_moments_is_refused() -> None:
    with pytest.raises(ValueError, match="needs two values, seen were 1"):
        _ = RunningMoments().seen(np.ones(1)).std
    with pytest.raises(ValueError, match="finite"):
        RunningMoments().seen(np.array([0.0, np.nan]))
