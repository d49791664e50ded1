"""A stage that answers and gets nowhere: noticed by what was measured of its steps, and patiently elsewhere."""

from typing import Any

import pytest

from cluster import learner_group
from cluster.learner_group import Standstill
from cluster.supervision import DeadlineError
from configs.cluster import DeadlinesConfig


class Stage:
    """Two ranks that are looked at every second of a clock that the test turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(learner_group, "monotonic", lambda: self.now)
        self.standstill = Standstill(DeadlinesConfig(learn_s=3600.0, floor_s=120.0, multiple=10.0), "sft")
        self.beats = 0

    def goes_on(self, *, step: int | None, every_s: int = 1, times: int = 1) -> None:
        for _ in range(times):
            self.beats += 1
            self.stands(every_s, step=step)

    def stands(self, seconds: int, *, step: int | None) -> None:
        progress = {} if step is None else {"step": step, "steps": 100, "loss": 1.0}
        state: dict[str, Any] = {"state": "sft", "progress": progress, "beats": self.beats}
        for _ in range(seconds):
            self.standstill.look([state, state])
            self.now += 1.0


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def test_between_steps_a_multiple_of_the_longest_gap_is_enough(stage: Stage) -> None:
    stage.goes_on(step=10, every_s=30, times=5)
    stage.goes_on(step=10, every_s=300)
    with pytest.raises(DeadlineError, match=r"sft: no rank has got on \(sft at step 10, sft at step 10\) within .* 300 s"):  # fmt: skip  # noqa: E501
        stage.stands(3, step=10)


def test_quick_steps_are_given_the_floor(stage: Stage) -> None:
    stage.goes_on(step=10, times=5)
    stage.goes_on(step=10, every_s=120)
    with pytest.raises(DeadlineError, match=r"cluster\.deadlines\.floor_s"):
        stage.stands(3, step=10)


def test_a_micro_batch_is_a_sign_of_life_where_no_step_is_reported(stage: Stage) -> None:
    stage.goes_on(step=10, times=5)
    stage.goes_on(step=10, every_s=100, times=20)
    assert stage.now > 1000.0 + 10 * 120.0  # many times the bound, without a step


@pytest.mark.parametrize("step", [None, 100])
def test_before_the_first_report_and_after_the_last_step_the_configured_bound_holds(
    stage: Stage, step: int | None
) -> None:
    stage.goes_on(step=step and 10, times=50)
    stage.goes_on(step=step, every_s=3600)
    with pytest.raises(DeadlineError, match=r"cluster\.deadlines\.learn_s = 3600 s"):
        stage.stands(3, step=step)
