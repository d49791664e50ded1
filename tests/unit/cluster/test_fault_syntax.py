"""What is written after --fault, and what it does to a process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster.faults import InjectedError, fail, parse
from protocol.errors import UserError
from tests.command_line import assert_refused, command


@pytest.mark.parametrize(
    ("text", "signals"),
    [
        ("rollout-0:serving:kill@3", ((signal.SIGKILL, 0.0),)),
        ("learner-1:update:stop", ((signal.SIGSTOP, 0.0),)),
        ("reward-0:scoring:pause=4", ((signal.SIGSTOP, 0.0), (signal.SIGCONT, 4.0))),
        ("driver-0:save:kill", ((signal.SIGKILL, 0.0),)),
        ("learner-0:update:raise", ()),
        ("reference-0:idle:slow=0.5", ((signal.SIGSTOP, 0.05), (signal.SIGCONT, 0.2)) * 2),
    ],
)
def test_each_act_is_signals_with_waits_before_them(text: str, signals: tuple[tuple[int, float], ...]) -> None:
    assert parse(text).signals == signals


def test_role_place_state_and_iteration_are_read() -> None:
    fault = parse("learner-1:reward model:slow=20@3")
    assert (fault.role, fault.index, fault.state, fault.iteration) == ("learner", 1, "reward model", 3)
    assert sum(wait_s for _, wait_s in fault.signals) == pytest.approx(20.0)


@pytest.mark.parametrize(
    "text",
    [
        "rollout-0:serving:slow",
        "rollout-0:serving:slow=-1",
        "kill",
        "judge-0:serving:kill",
        "rollout-0:servng:kill",
        "rollout-0:update:kill",
        "driver-1:serving:kill",
        "driver-0:serving:node",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no fault"):
        parse(text)


def test_a_dry_run_refuses_it_too() -> None:
    assert_refused(command("train", "quickstart", "--fault", "bogus", "--dry-run"), "'bogus' is no fault")


def test_a_slow_process_runs_on_and_uses_a_part_of_the_time() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        time.sleep(0.2)
        began, before = time.monotonic(), used_s(process.pid)
        for number, wait_s in parse("rollout-0:serving:slow=2").signals:
            time.sleep(wait_s)
            os.kill(process.pid, number)
        elapsed, used = time.monotonic() - began, used_s(process.pid) - before
        assert process.poll() is None
        process.kill()
    assert 0 < used < 0.5 * elapsed


class Busy:
    """Works until somebody makes it fail."""

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self.working = threading.Event()

    def work(self) -> None:
        try:
            self.working.set()
            while True:
                time.sleep(0.001)
        except InjectedError as error:
            self.failure = error


def test_an_exception_reaches_the_thread_that_works_and_no_other() -> None:
    one, other = Busy(), Busy()
    threads = [threading.Thread(target=busy.work, daemon=True) for busy in (one, other)]
    for thread in threads:
        thread.start()
    assert one.working.wait(10)
    assert fail(one)
    threads[0].join(timeout=10)
    assert "on purpose" in str(one.failure)
    assert threads[1].is_alive()
    assert not fail(one)  # which does nothing now


def used_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
