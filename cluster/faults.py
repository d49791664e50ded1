"""Faults on purpose, in a chosen worker in a chosen state: for tests, and for operators on a staging cluster.

    rondo train CONFIG --fault rollout-0:serving:kill@3 --fault learner-1:update:stop

The first kills the process of rollout worker 0 while it samples in the iteration after three are done. `stop` halts a
process as a hanging one would, `pause=SECONDS` halts it for a while only. `slow=SECONDS` gives it a fifth of the time
for so long, as a neighbour that takes the rest would. `raise` makes what it is doing fail with an exception. `node`
kills everything on the worker's node. `driver-0` is the process that the command itself runs in (kill, stop and raise
only); its states are those of the workers.
"""

import ctypes
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil
import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.crew import Crew
from cluster.pool import Member, status_fields
from cluster.schedule import RunState
from cluster.supervision import cause_of, first_line
from protocol.errors import UserError

_FAULT = re.compile(
    r"(?P<role>rollout|reward|reference|learner|driver)-(?P<index>\d+):(?P<state>[a-z ]+)"
    r":(?P<act>kill|stop|raise|node|(pause|slow)=(?P<seconds>\d+(\.\d+)?))(@(?P<iteration>\d+))?"
)
_OF_THE_DRIVER = ("kill", "stop", "raise")
_SCORING = ("idle", "scoring")
_LEARNING = (
    *("idle", "starting", "sft", "reward model", "start", "finish", "receive", "update", "publish", "broadcast"),
    *("samples", "rollouts", "save", "load", "export"),
)
_ROLLOUT = ("idle", "serving", "publishing")
STATES = {
    "rollout": _ROLLOUT,
    "reward": _SCORING,
    "reference": _SCORING,
    "learner": _LEARNING,
    "driver": tuple(dict.fromkeys((*_ROLLOUT, *_SCORING, *_LEARNING))),
}
"""What the `status` of each kind of worker may say that it does."""
_POLL_S = 0.002
_ANSWER_S = 5.0
_START_S = 60.0
_CONTROL_GROUP = "control"
"""The concurrency group of every worker's `status`."""
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
    act: str
    """kill, stop, raise, node, pause=SECONDS or slow=SECONDS."""
    signals: tuple[tuple[int, float], ...]
    """The signals that make the act, each with the seconds to wait before it; `raise` and `node` need none."""
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
            "raise, node, pause=SECONDS and slow=SECONDS",
        )
    act = found["act"]
    if found["role"] == "driver" and (act not in _OF_THE_DRIVER or found["index"] != "0"):
        raise UserError(
            f"{text!r} is no fault",
            where="--fault",
            next_step=f"there is one driver, driver-0, and its acts are {', '.join(_OF_THE_DRIVER)}",
        )
    states = STATES[found["role"]]
    if found["state"] not in states:
        raise UserError(
            f"{text!r} is no fault: a {found['role']} worker is never {found['state']!r}",
            where="--fault",
            next_step=f"its states are {', '.join(states)}",
        )
    signals: tuple[tuple[int, float], ...] = ()
    if act == "kill":
        signals = ((signal.SIGKILL, 0.0),)
    elif act == "stop":
        signals = ((signal.SIGSTOP, 0.0),)
    elif act.startswith("slow"):
        halts = max(1, round(float(found["seconds"]) / (_RUNS_S + _HALTS_S)))
        signals = ((signal.SIGSTOP, _RUNS_S), (signal.SIGCONT, _HALTS_S)) * halts
    elif act.startswith("pause"):
        signals = ((signal.SIGSTOP, 0.0), (signal.SIGCONT, float(found["seconds"])))
    return Fault(
        text=text,
        role=found["role"],
        index=int(found["index"]),
        state=found["state"],
        act=act,
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
        self._hands: dict[str, Any] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="faults", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        if self._left:
            self._thread.start()

    def stop(self) -> None:
        """Cease to watch, and name what has not happened."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(timeout=_ANSWER_S)
        for fault in self._left:
            self._say(f"fault: {fault.text} NEVER HAPPENED: there was no such worker, or it was never seen like that")

    def _run(self) -> None:
        while self._left and not self._ended.wait(_POLL_S):
            for fault in list(self._left):
                try:
                    if not self._is_due(fault) or not self._happens(fault):
                        continue
                except (RayError, OSError) as error:  # the supervision boundary: the other faults shall still happen
                    self._say(f"fault: {fault.text} COULD NOT BE MADE: {type(error).__name__}: {first_line(error)}")
                self._left.remove(fault)

    def _is_due(self, fault: Fault) -> bool:
        return fault.iteration is None or self._state().iteration >= fault.iteration

    def _happens(self, fault: Fault) -> bool:
        if fault.role == "driver":
            return self._happens_here(fault)
        workers = {member.index: member for member in self._crew.workers(fault.role)}
        if fault.index not in workers:
            return False
        found = _status(workers[fault.index])
        if found is None:
            return False
        hand = self._hand(found["node_id"])  # there before the state is: it may be over in an instant
        if found["state"] != fault.state:
            return False
        if fault.act == "raise":
            raising = workers[fault.index].handle.__ray_call__.options(concurrency_group=_CONTROL_GROUP)
            if not ray.get(raising.remote(fail), timeout=_ANSWER_S):
                return False  # it was done a moment before
        elif fault.act == "node" and hand is None:
            self._say(f"fault: {fault.text} is left out: the driver is on that node")
            return True
        elif fault.act == "node":
            hand.kill_node.remote()
        lasting = len(fault.signals) > 1
        if lasting:  # it is said when it begins: the run may end before it does
            self._say(f"fault: {fault.text} (process {found['pid']})")
        send = partial(os.kill, found["pid"]) if hand is None else partial(_send, hand, found["pid"])
        self._signal(fault, send)
        if not lasting:
            self._say(f"fault: {fault.text} (process {found['pid']})")
        return True

    def _signal(self, fault: Fault, send: Callable[[int], None]) -> None:
        """Send a fault's signals, as long as the run and the process live."""
        try:
            for number, wait_s in fault.signals:
                if self._ended.wait(wait_s) and number != signal.SIGCONT:
                    return
                send(number)
        except ProcessLookupError:
            if len(fault.signals) == 1:
                raise  # else it has ended, or has been replaced, in the meantime

    def _happens_here(self, fault: Fault) -> bool:
        members = [
            member for role in ("learner", "rollout", "reward", "reference") for member in self._crew.workers(role)
        ]
        if not any((found := _status(member)) and found["state"] == fault.state for member in members):
            return False
        self._say(f"fault: {fault.text} (process {os.getpid()})")  # while it can
        if fault.act == "raise":
            _raise_in(threading.main_thread().ident)
        for number, _ in fault.signals:
            os.kill(os.getpid(), number)
        return True

    def _hand(self, node_id: str) -> Any:
        """Have a process on a node that can send signals; None for this node, which needs none."""
        if node_id == ray.get_runtime_context().get_node_id():
            return None
        if node_id not in self._hands:
            there = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
            self._hands[node_id] = _Hand.options(scheduling_strategy=there).remote()
            ray.get(self._hands[node_id].__ray_ready__.remote(), timeout=_START_S)
        return self._hands[node_id]


def _send(hand: Any, pid: int, number: int) -> None:
    try:
        ray.get(hand.send.remote(pid, number), timeout=_ANSWER_S)
    except RayTaskError as error:
        raise cause_of(error) from None


def _status(member: Member) -> dict[str, Any] | None:
    """Ask a worker what it is doing; None if it is starting, or gone already."""
    try:
        return status_fields(ray.get(member.handle.status.remote(), timeout=_ANSWER_S))
    except RayError:
        return None


class InjectedError(RuntimeError):
    """An exception on purpose."""

    def __init__(self) -> None:
        super().__init__("an exception on purpose (--fault)")


def fail(worker: Any) -> bool:
    """Make what a worker is doing fail, from its thread for `status`; False if it is doing nothing."""
    for thread, frame in sys._current_frames().items():
        if thread == threading.get_ident():
            continue
        while frame is not None:
            if frame.f_locals.get("self") is worker:
                _raise_in(thread)
                return True
            frame = frame.f_back
    return False


def _raise_in(thread: int | None) -> None:
    """Raise an InjectedError in another thread, as soon as it is back in Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread or 0), ctypes.py_object(InjectedError))


@ray.remote(num_cpus=0, max_restarts=0)
class _Hand:
    """Sends signals on its node."""

    def send(self, pid: int, number: int) -> None:
        os.kill(pid, number)

    def kill_node(self) -> None:
        """Kill the raylet, whose child every worker is, and all workers, this one last."""
        raylet = psutil.Process(os.getppid())
        workers = [child for child in raylet.children() if child.pid != os.getpid()]
        for process in (raylet, *workers, psutil.Process()):
            process.kill()
