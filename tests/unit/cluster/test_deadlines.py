"""Bounds of waits: configured at first, then measured, and never tight where work may honestly be slow."""

import time

import pytest

from cluster.deadlines import Bound, Deadlines
from configs.cluster import DeadlinesConfig


def deadlines(**changes: float) -> Deadlines:
    return Deadlines(DeadlinesConfig(**{"learn_s": 3600.0, "floor_s": 120.0, "multiple": 10.0, **changes}))


def told(found: Deadlines, *seconds: float, size: int = 1) -> Deadlines:
    for number in seconds:
        found.measured("learn", seconds=number, size=size)
    return found


def test_the_configured_bound_holds_until_three_durations_are_known() -> None:
    configured = Bound(3600.0, "cluster.deadlines.learn_s")
    assert deadlines().bound("learn") == told(deadlines(), 30.0, 30.0).bound("learn") == configured
    assert told(deadlines(), 30.0, 30.0, 30.0).bound("learn").seconds == 300.0


def test_the_bound_is_a_multiple_of_the_longest_and_says_where_it_comes_from() -> None:
    bound = told(deadlines(), 30.0, 40.0, 20.0).bound("learn")
    assert bound.seconds == 400.0
    assert bound.key == (
        "cluster.deadlines.multiple = 10 (the longest of the last 3 took 40 s; cluster.deadlines.learn_s = 3600 s)"
    )


def test_a_bound_is_never_under_the_floor_nor_over_the_configured_one() -> None:
    low = told(deadlines(), 0.5, 0.5, 0.5).bound("learn")
    assert low.seconds == 120.0
    assert low.key.startswith("cluster.deadlines.floor_s (the longest of the last 3 took 0.5 s")
    assert told(deadlines(), 400.0, 1.0, 1.0).bound("learn") == Bound(3600.0, "cluster.deadlines.learn_s")
    assert told(deadlines(learn_s=60.0), 0.5, 0.5, 0.5).bound("learn").seconds == 60.0


def test_only_the_last_twenty_count_so_a_slow_first_one_does_not_loosen_the_bound_for_good() -> None:
    found = told(deadlines(), 200.0, *[30.0] * 19)
    assert found.bound("learn").seconds == 2000.0
    assert told(found, 30.0).bound("learn").seconds == 300.0


def test_a_larger_batch_is_given_in_proportion_more_and_a_smaller_one_no_less() -> None:
    found = told(deadlines(), 30.0, 30.0, 30.0, size=100)
    assert found.bound("learn", size=100).seconds == 300.0
    assert found.bound("learn", size=400).seconds == 1200.0
    assert found.bound("learn", size=5).seconds == 300.0


def test_every_kind_of_work_has_durations_of_its_own_and_a_start_has_none() -> None:
    found = deadlines(start_s=600.0)
    for _ in range(3):
        found.measured("learn", "update", seconds=30.0)
        found.measured("start", seconds=1.0)
    assert found.bound("learn", "update").seconds == 300.0
    assert found.bound("learn", "samples").seconds == 3600.0
    assert found.bound("start").seconds == 600.0


def test_a_replacement_begins_again_and_the_work_that_it_disturbed_is_not_counted() -> None:
    found = told(deadlines(), 30.0, 30.0, 30.0)
    with found.measuring("learn"):
        found.forget()
        assert found.bound("learn").seconds == 3600.0
    told(found, 30.0, 30.0)
    assert found.bound("learn").seconds == 3600.0
    assert told(found, 30.0).bound("learn").seconds == 300.0


def test_what_fails_is_not_measured_and_what_began_earlier_counts_from_there() -> None:
    found = told(deadlines(), 30.0, 30.0)
    with pytest.raises(RuntimeError), found.measuring("learn"):
        raise RuntimeError
    assert found.bound("learn").seconds == 3600.0
    with found.measuring("learn", since=time.monotonic() - 50):
        time.sleep(0.01)
    assert 500.0 < found.bound("learn").seconds < 520.0
