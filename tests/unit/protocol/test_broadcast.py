"""Who takes part in a broadcast, and that every wait in it ends: real stores and gloo groups between threads."""

import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from time import monotonic, sleep

import pytest
import torch

from protocol.broadcast import LOOPBACK, BroadcastError, Group, Meeting, join
from protocol.weights import Rendezvous

CPU = torch.device("cpu")
BUCKETS = [torch.full((100_003,), number, dtype=torch.uint8) for number in (3, 250, 7)]


def listen() -> socket.socket:
    listener = socket.socket()
    listener.bind((LOOPBACK, 0))
    listener.listen()
    return listener


@pytest.fixture
def meeting():
    made = Meeting(listen(), timeout_s=20)
    yield made
    made.close()


@pytest.fixture
def threads():
    with ThreadPoolExecutor(max_workers=4) as executor:
        yield executor


def receive(rendezvous: Rendezvous, receiver: int, *, timeout_s: float = 20) -> list[int]:
    group = join(rendezvous, receiver=receiver, address=LOOPBACK, device=CPU, timeout_s=timeout_s)
    found = []
    for sent in BUCKETS:
        buffer = torch.zeros_like(sent)
        group.broadcast(buffer)
        found.append(int(buffer[0]) if bool((buffer == buffer[0]).all()) else -1)
    group.finish()
    return found


def send(group: Group | None) -> int:
    assert group is not None
    for bucket in BUCKETS:
        group.broadcast(bucket)
    group.finish()
    return group.size


def test_everybody_who_joins_gets_every_bucket(meeting: Meeting, threads: ThreadPoolExecutor) -> None:
    before = torch.distributed.is_initialized()
    receiving = [threads.submit(receive, meeting.rendezvous, receiver) for receiver in (2, 0, 1)]
    assert send(meeting.assemble(receivers=3, device=CPU, timeout_s=20)) == 4
    assert [future.result() for future in receiving] == [[3, 250, 7]] * 3
    assert torch.distributed.is_initialized() == before  # the default group, DeepSpeed's, is not touched


def test_the_dead_are_excused_and_the_others_do_not_wait(meeting: Meeting, threads: ThreadPoolExecutor) -> None:
    receiving = [threads.submit(receive, meeting.rendezvous, receiver) for receiver in (0, 3)]
    started = monotonic()
    assembling = threads.submit(meeting.assemble, receivers=4, device=CPU, timeout_s=20)
    sleep(0.1)
    assert not assembling.done()
    meeting.excuse([1, 2])
    assert send(assembling.result()) == 3
    assert [future.result() for future in receiving] == [[3, 250, 7]] * 2
    assert monotonic() - started < 5


def test_who_hangs_is_left_behind_after_half_of_the_time(meeting: Meeting, threads: ThreadPoolExecutor) -> None:
    receiving = threads.submit(receive, meeting.rendezvous, 1)
    started = monotonic()
    assert send(meeting.assemble(receivers=2, device=CPU, timeout_s=2)) == 2
    assert 0.9 < monotonic() - started < 2
    assert receiving.result() == [3, 250, 7]
    with pytest.raises(BroadcastError, match="went on without receiver 0"):
        join(meeting.rendezvous, receiver=0, address=LOOPBACK, device=CPU, timeout_s=5)


def test_nobody_came(meeting: Meeting) -> None:
    meeting.excuse([0])
    assert meeting.assemble(receivers=1, device=CPU, timeout_s=20) is None


def test_a_receiver_without_a_meeting_gives_up(meeting: Meeting) -> None:
    started = monotonic()
    with pytest.raises(BroadcastError, match="receiver 0 could not join the broadcast"):
        join(meeting.rendezvous, receiver=0, address=LOOPBACK, device=CPU, timeout_s=0.5)
    with listen() as closed:
        port = closed.getsockname()[1]
    with pytest.raises(BroadcastError, match="receiver 0 could not join the broadcast"):
        join(replace(meeting.rendezvous, port=port), receiver=0, address=LOOPBACK, device=CPU, timeout_s=0.5)
    assert monotonic() - started < 5


def broken(meeting: Meeting, threads: ThreadPoolExecutor, *, leave: Callable[[Group], None]) -> list[float]:
    """Have receiver 0 take one bucket and then behave badly; return how long the others went on after that."""
    ends: list[float] = []

    def leaver() -> None:
        group = join(meeting.rendezvous, receiver=0, address=LOOPBACK, device=CPU, timeout_s=3)
        group.broadcast(torch.zeros_like(BUCKETS[0]))
        leave(group)

    def sender() -> None:
        group = meeting.assemble(receivers=2, device=CPU, timeout_s=3)
        assert group is not None
        try:
            for bucket in [*BUCKETS, *BUCKETS]:
                group.broadcast(bucket)
            group.finish()
        except BroadcastError:
            group.close()
            raise

    def follower() -> None:
        group = join(meeting.rendezvous, receiver=1, address=LOOPBACK, device=CPU, timeout_s=3)
        for bucket in [*BUCKETS, *BUCKETS]:
            group.broadcast(torch.zeros_like(bucket))
        group.finish()

    started = monotonic()
    futures: list[Future[None]] = [threads.submit(act) for act in (leaver, sender, follower)]
    for future in futures[1:]:
        with pytest.raises(BroadcastError, match="waited in vain"):
            future.result()
        ends.append(monotonic() - started)
    return ends


def test_a_member_that_leaves_breaks_the_broadcast_at_once(meeting: Meeting, threads: ThreadPoolExecutor) -> None:
    assert max(broken(meeting, threads, leave=Group.close)) < 2


def test_a_member_that_hangs_breaks_the_broadcast_at_the_deadline(
    meeting: Meeting, threads: ThreadPoolExecutor
) -> None:
    ends = broken(meeting, threads, leave=lambda group: sleep(5))
    assert 2.5 < max(ends) < 4.9


def test_a_default_group_of_the_process_is_left_as_it_is() -> None:
    # A function, so that nothing holds the group after it is destroyed: torch joins the group's threads with its last
    # reference, and a thread that is left when Python ends aborts the process.
    code = """
import torch, torch.distributed as dist
from threading import Thread
from tests.unit.protocol.test_broadcast import *

def broadcast_beside_the_default_group():
    before = dist.group.WORLD
    meeting = Meeting(listen(), timeout_s=20)
    thread = Thread(target=receive, args=(meeting.rendezvous, 0))
    thread.start()
    assert send(meeting.assemble(receivers=1, device=CPU, timeout_s=20)) == 2
    thread.join()
    meeting.close()
    assert dist.group.WORLD is before
    ones = torch.ones(2)
    dist.all_reduce(ones)
    assert ones.tolist() == [1, 1]

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
broadcast_beside_the_default_group()
dist.destroy_process_group()
"""
    environment = {"GLOO_SOCKET_IFNAME": "lo", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
