"""Stopping at a signal: unwound at once, or when what is in hand is over; never later than the grace time."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

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
