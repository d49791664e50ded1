"""Stopping at a signal: unwound at once, or when what is in hand is over; never later than the grace time."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli import _guarded
from cluster.launch import keeping_what_stands
from cluster.stopping import STOPPING, Stopped
from cluster.supervision import DeadlineError
from protocol.errors import LearnerLostError, StorageError, UserError

ROOT = Path(__file__).parents[3]
CODE = """
import sys, time
from cluster.stopping import EXIT_RESUMABLE, STOPPING, Stopped

STOPPING.listen()
STOPPING.grace_s = float(sys.argv[1])
STOPPING.waits = lambda: sys.argv[2] == "busy"
try:
    print("ready", flush=True)
    deadline = time.monotonic() + float(sys.argv[3])
    while time.monotonic() < deadline:
        time.sleep(0.01)
    print("asked" if STOPPING.asked else "not asked", flush=True)
except Stopped:
    print("stopped", flush=True)
    sys.exit(EXIT_RESUMABLE)
"""


def start(grace_s: float, what: str, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CODE, str(grace_s), what, str(seconds)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_an_idle_run_is_unwound_at_once(number: signal.Signals) -> None:
    process = start(30, "idle", 60)
    process.send_signal(number)
    assert process.communicate(timeout=20)[0] == "stopped\n"
    assert process.returncode == 75


def test_what_is_in_hand_is_finished_first() -> None:
    process = start(30, "busy", 1)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=20)[0] == "asked\n"
    assert process.returncode == 0


def test_the_grace_time_ends_what_takes_too_long() -> None:
    process = start(0.5, "busy", 60)
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=20)[0] == ""
    assert process.returncode == 75


def test_a_second_signal_ends_the_process_at_once_whichever_it_is() -> None:
    process = start(30, "busy", 60)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=20)[0] == ""
    assert process.returncode == -signal.SIGUSR1


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(STOPPING, "asked", True)


def system_error() -> None:
    """Raise what Cython makes of a signal handler's exception."""
    raise SystemError("wait returned a result with an exception set") from Stopped()


@pytest.mark.parametrize("error", [DeadlineError("late"), RuntimeError("a worker's"), UserError("wrong")])
def test_what_stands_is_kept_whatever_ends_a_run_and_the_cause_stays(error: Exception) -> None:
    saved: list[int] = []
    with pytest.raises(type(error)) as caught, keeping_what_stands(lambda: saved.append(1)):
        raise error
    assert (caught.value, saved) == (error, [1])


def test_a_commit_that_fails_does_not_hide_why_the_run_ended(caplog: pytest.LogCaptureFixture) -> None:
    def save() -> None:
        raise LearnerLostError("no rank answers")

    with pytest.raises(DeadlineError, match="late"), keeping_what_stands(save):
        raise DeadlineError("late")
    assert "could not be committed: no rank answers" in caplog.text


def test_a_full_disk_is_not_asked_to_take_a_checkpoint_and_a_run_that_ends_well_needs_none() -> None:
    saved: list[int] = []
    with keeping_what_stands(lambda: saved.append(1)):
        saved.clear()
    with pytest.raises(StorageError), keeping_what_stands(lambda: saved.append(1)):
        raise StorageError("full")
    assert saved == []


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize("error", [SystemError("from C"), Stopped(), UserError("wrong"), DeadlineError("late")])
def test_after_a_signal_every_end_is_a_stop(error: BaseException) -> None:
    saved: list[int] = []

    def run() -> None:
        with keeping_what_stands(lambda: saved.append(1)):
            raise error

    with pytest.raises(Stopped):
        run()
    assert _guarded(run, traceback=False) == 75
    assert saved == [1, 1]


@pytest.mark.usefixtures("asked")
def test_a_stop_tells_what_else_went_wrong_and_nothing_of_how_it_was_carried_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def late() -> None:
        raise DeadlineError("rollout-0 is late")

    assert _guarded(late, traceback=False) == 75
    assert "while it stopped: DeadlineError: rollout-0 is late" in capsys.readouterr().err
    assert _guarded(system_error, traceback=False) == 75
    assert capsys.readouterr().err == ""
    assert _guarded(lambda: 0, traceback=False) == 0  # it was done before


def test_without_a_signal_it_is_a_failure() -> None:
    assert _guarded(system_error, traceback=False) == 1
