"""Waiting for people: enough is enough, time is counted over restarts, and the end is what the configuration says."""

from pathlib import Path

import pytest

from cluster.waiting import NotLabelledYetError, wait_for_people
from configs.labels import PeopleConfig
from reward_service.preferences.records import Progress


def progress(done: int, *, tasks: int = 10) -> Progress:
    return Progress(tasks=tasks, done=done, judgements=done, preferences=done, ties=0, both_bad=0, skips=0, invalid=0)


class World:
    """A clock that runs while somebody sleeps, and labels that come with time."""

    def __init__(self, *, per_second: float = 1.0, at: float = 1000.0) -> None:
        self.time = self.begun = at
        self.per_second = per_second
        self.said: list[str] = []
        self.takeable = 1

    def sleep(self, seconds: float) -> None:
        self.time += seconds

    def progress(self) -> Progress:
        return progress(min(10, int((self.time - self.begun) * self.per_second)))

    def wait(self, people: PeopleConfig, begun: Path) -> Progress:
        return wait_for_people(
            self.progress, people, takeable=lambda: self.takeable, what="round 2", begun=begun, say=self.said.append,
            sleep=self.sleep, now=lambda: self.time,
        )  # fmt: skip


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    return tmp_path / "waiting.json"


def test_all_tasks_are_waited_for(begun: Path) -> None:
    world = World()
    assert world.wait(PeopleConfig(poll_s=2.0), begun).done == 10
    assert world.time == 1010.0
    assert "0 of 10" in world.said[0]


def test_a_minimum_is_enough(begun: Path) -> None:
    world = World()
    assert world.wait(PeopleConfig(poll_s=1.0, min_labels=4), begun).done == 4
    assert world.wait(PeopleConfig(min_labels=400), begun).done == 10


def test_the_time_is_counted_over_restarts(begun: Path) -> None:
    with pytest.raises(NotLabelledYetError, match="5 of 10 tasks are done, and 5 s are over"):
        World().wait(PeopleConfig(poll_s=1.0, max_wait_s=5.0), begun)
    begun.write_text('{"since": 1097.0}')  # a driver that was killed while it waited
    again = World(per_second=0.0, at=1100.0)
    with pytest.raises(NotLabelledYetError):
        again.wait(PeopleConfig(poll_s=1.0, max_wait_s=5.0), begun)
    assert again.time == 1102.0
    later = World(per_second=0.0, at=1200.0)  # a wait that ran out is over; the next start waits anew
    with pytest.raises(NotLabelledYetError):
        later.wait(PeopleConfig(poll_s=1.0, max_wait_s=5.0), begun)
    assert later.time == 1205.0


def test_tasks_that_nobody_can_take_are_not_waited_for(begun: Path) -> None:
    world = World(per_second=0.0)
    world.takeable = 0
    with pytest.raises(NotLabelledYetError, match="nobody is left"):
        world.wait(PeopleConfig(poll_s=1.0), begun)
    assert world.time == 1000.0


def test_a_run_goes_on_with_what_is_there_if_it_may(begun: Path) -> None:
    people = PeopleConfig(poll_s=1.0, max_wait_s=5.0, on_timeout="continue")
    assert World().wait(people, begun).done == 5
    with pytest.raises(NotLabelledYetError):  # with nothing at all there is nothing to go on with
        World(per_second=0.0).wait(people, begun)
