"""The circuit breaker, on a clock that the test turns."""

from reward_service.breaker import Breaker


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def breaker(clock: Clock) -> Breaker:
    return Breaker(failures=3, cooldown_s=10.0, clock=clock)


def test_it_opens_after_so_many_failures_in_a_row_and_not_before() -> None:
    tried = breaker(Clock())
    for _ in range(2):
        tried.failed()
        assert tried.refusal_s() == 0
    tried.succeeded()
    for _ in range(2):
        tried.failed()
        assert tried.refusal_s() == 0
    tried.failed()
    assert tried.refusal_s() == 10


def test_after_the_cooldown_one_call_goes_through_and_decides() -> None:
    clock = Clock()
    tried = breaker(clock)
    for _ in range(3):
        tried.failed()
    clock.now += 9
    assert tried.refusal_s() == 1
    clock.now += 1
    assert tried.refusal_s() == 0  # the probe
    assert tried.refusal_s() == 10  # nobody else meanwhile
    clock.now += 4
    tried.failed()
    assert tried.refusal_s() == 10
    clock.now += 10
    assert tried.refusal_s() == 0
    tried.succeeded()
    assert tried.refusal_s() == 0
    tried.failed()
    assert tried.refusal_s() == 0  # counted from the beginning


def test_a_probe_of_which_nothing_is_heard_does_not_close_it_for_ever() -> None:
    clock = Clock()
    tried = breaker(clock)
    for _ in range(3):
        tried.failed()
    clock.now += 10
    assert tried.refusal_s() == 0
    clock.now += 10
    assert tried.refusal_s() == 0
