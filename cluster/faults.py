"""Faults on purpose, in a chosen worker in a chosen state: for tests, and for operators on a staging cluster.

    rondo train CONFIG --fault rollout-0:serving:kill@3 --fault learner-1:update:stop

The first kills the process of rollout worker 0 while it samples in the iteration after three are done. `stop` halts a
process as a hanging one would, `pause=SECONDS` halts it for a while only. `slow=SECONDS` gives it a fifth of the time
for so long, as a neighbour that takes the rest would.
"""

import os
import re
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import sleep

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.crew import Crew
from cluster.pool import status_fields
from cluster.schedule import RunState
from protocol.errors import UserError

_FAULT = re.compile(
    r"(?P<role>rollout|reward|reference|learner)-(?P<index>\d+):(?P<state>[a-z ]+)"
    r":(?P<act>kill|stop|(pause|slow)=(?P<seconds>\d+(\.\d+)?))(@(?P<iteration>\d+))?"
)
_POLL_S = 0.002
_ANSWER_S = 5.0
_RUNS_S, _HALTS_S = 0.05, 0.2
"""Of a slow worker, in turn."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is done to whom, and when."""

    text: str
    role: str
    index: int
    state: str
    """What the worker's status must say: idle, serving, publishing, scoring, update, save and so on."""
    signals: tuple[tuple[int, float], ...]
    """Signals, each with the seconds to wait before it."""
    iteration: int | None
    """Not before so many iterations of a round are done."""


def parse(text: str) -> Fault:
    """Read `ROLE-INDEX:STATE:ACT[@ITERATION]`.

    Raises:
        UserError: If it is something else.
    """
    found = _FAULT.fullmatch(text)
    if found is None:
        raise UserError(
            f"{text!r} is no fault",
            where="--fault",
            next_step="write ROLE-INDEX:STATE:ACT[@ITERATION], such as rollout-0:serving:kill@3; acts are kill, stop, "
            "pause=SECONDS and slow=SECONDS",
        )
    if found["act"] == "kill":
        signals: tuple[tuple[int, float], ...] = ((signal.SIGKILL, 0.0),)
    elif found["act"] == "stop":
        signals = ((signal.SIGSTOP, 0.0),)
    elif found["act"].startswith("slow"):
        halts = max(1, round(float(found["seconds"]) / (_RUNS_S + _HALTS_S)))
        signals = ((signal.SIGSTOP, _RUNS_S), (signal.SIGCONT, _HALTS_S)) * halts
    else:
        signals = ((signal.SIGSTOP, 0.0), (signal.SIGCONT, float(found["seconds"])))
    return Fault(
        text=text,
        role=found["role"],
        index=int(found["index"]),
        state=found["state"],
        signals=signals,
        iteration=None if found["iteration"] is None else int(found["iteration"]),
    )


class Injector:
    """Watches for the moments that faults name, and makes each happen once.

    Args:
        faults: What is to happen.
        crew: Knows the workers.
        state: Says where the run stands.
        say: Takes lines for people.
    """

    def __init__(
        self, faults: Sequence[Fault], *, crew: Crew, state: Callable[[], RunState], say: Callable[[str], None]
    ) -> None:
        self._left = list(faults)
        self._crew = crew
        self._state = state
        self._say = say
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        if self._left:
            self._thread.start()

    def stop(self) -> None:
        """Cease to watch."""
        self._ended.set()

    def _run(self) -> None:
        while self._left and not self._ended.wait(_POLL_S):
            for fault in list(self._left):
                if self._is_due(fault) and self._happens(fault):
                    self._left.remove(fault)

    def _is_due(self, fault: Fault) -> bool:
        return fault.iteration is None or self._state().iteration >= fault.iteration

    def _happens(self, fault: Fault) -> bool:
        workers = self._crew.workers(fault.role)
        if fault.index >= len(workers):
            return False
        try:
            status = ray.get(workers[fault.index].handle.status.remote(), timeout=_ANSWER_S)
        except RayError:  # it is starting, or gone already
            return False
        found = status_fields(status)
        if found["state"] != fault.state:
            return False
        there = NodeAffinitySchedulingStrategy(node_id=found["node_id"], soft=False)
        for number, wait_s in fault.signals:
            sleep(wait_s)
            # One machine needs no task, and a state may be over before one has started.
            if found["node_id"] == ray.get_runtime_context().get_node_id():
                _send(found["pid"], number)
            else:
                ray.get(_send_there.options(scheduling_strategy=there).remote(found["pid"], number), timeout=60)
        self._say(f"fault: {fault.text} (process {found['pid']})")
        return True


def _send(pid: int, number: int) -> None:
    os.kill(pid, number)


@ray.remote(num_cpus=0, max_retries=0)
def _send_there(pid: int, number: int) -> None:
    _send(pid, number)
