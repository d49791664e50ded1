"""A broadcast for one publish: the learner's first rank sends, every rank of every rollout engine receives.

The group lives for one publish and holds who signed in for it, no more:

1. Rank 0 opens a `Meeting`, a TCP store on its own port. The address travels with the publication.
2. Each receiver signs in (`join`) and waits for the list of members.
3. `Meeting.assemble` closes the list when everybody has signed in, or been excused because the driver saw it die, or
   when half of the time is over. Who is not on the list comes back through the object store.
4. The members form a process group that no other code knows: gloo on a CPU, NCCL on CUDA.

Every wait ends at the deadline given at its start. A member that dies while buckets travel breaks the group for all,
at once where the connection closes and at the deadline where it does not; the next publish builds a new one.

Both sides import this: it is the one place that says how they meet.
"""

import json
import os
import secrets
import socket
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from time import monotonic, sleep
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from protocol.weights import Rendezvous

LOOPBACK = "127.0.0.1"
# Half of what is used here is missing in torch's own list of exports, and NCCL's part in builds for a CPU.
_DIST: Any = torch.distributed
_POLL_S = 0.002
# torch reads these when it makes a group: wait() must raise at the deadline, where NCCL's watchdog would end the
# process, and nobody asks the store for its orders after the meeting is closed.
_NCCL_WAITS = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ENABLE_MONITORING": "0"}


class BroadcastError(RuntimeError):
    """A broadcast that did not reach somebody in time; the message says who failed at what."""


class Group:
    """The members of one broadcast. Rank 0 sends; a buffer is filled on every other rank."""

    def __init__(self, store: Any, *, rank: int, size: int, device: torch.device, address: str, deadline: float):
        """Connect to the other members.

        Args:
            store: Where the members find each other.
            rank: This member; 0 sends.
            size: All of them.
            device: Of the buffers.
            address: Of this process, as the others reach it.
            deadline: When everything must be over, on the `monotonic` clock.

        Raises:
            BroadcastError: If they do not all connect in time.
        """
        self.rank = rank
        self.size = size
        self._deadline = deadline
        self._store = store
        try:
            self._group: Any = _process_group(store, rank, size, device=device, address=address, timeout=self._left())
        except RuntimeError as error:
            raise BroadcastError(f"rank {rank} of {size} could not connect to the others: {error}") from None

    def broadcast(self, buffer: Tensor) -> None:
        """Send a buffer from rank 0, or receive into it; it is complete when this returns.

        Raises:
            BroadcastError: If a member is gone or the time is over.
        """
        options = _DIST.BroadcastOptions()
        options.rootRank = 0
        options.timeout = self._left()
        self._wait("a bucket", lambda: self._group.broadcast([buffer], options))

    def finish(self) -> None:
        """Wait until every member has everything, and part.

        Raises:
            BroadcastError: As `broadcast`.
        """
        options = _DIST.BarrierOptions()
        options.timeout = self._left()
        try:
            self._wait("the end", lambda: self._group.barrier(options))
        finally:
            self.close()

    def close(self) -> None:
        """Part without waiting; members that still wait for this one get an error."""
        group, self._group, self._store = self._group, None, None
        if group is not None:
            group.abort()

    def _wait(self, what: str, start: Callable[[], Any]) -> None:
        try:
            start().wait()
        except RuntimeError as error:
            raise BroadcastError(f"rank {self.rank} of {self.size} waited in vain for {what}: {error}") from None

    def _left(self) -> timedelta:
        left_s = self._deadline - monotonic()
        if left_s <= 0:
            raise BroadcastError(f"rank {self.rank} of {self.size} has no time left")
        return timedelta(seconds=left_s)


class Meeting:
    """Rank 0's side: a store at which receivers sign in, and the list of members."""

    def __init__(self, listener: socket.socket, *, timeout_s: float) -> None:
        """Open the store.

        Args:
            listener: A listening socket; the store takes it over.
            timeout_s: The bound on every wait of the store's.
        """
        address, port = listener.getsockname()
        self.rendezvous = Rendezvous(address=address, port=port, key=secrets.token_hex(8))
        self._excused: set[int] = set()
        self._store: Any = _store(self.rendezvous, timeout_s=timeout_s, listener=listener)

    def excuse(self, receivers: Iterable[int]) -> None:
        """Stop waiting for receivers that are known to be dead; from any thread."""
        self._excused |= set(receivers)

    def assemble(self, *, receivers: int, device: torch.device, timeout_s: float) -> Group | None:
        """Wait for the receivers and form a group with those that came.

        Args:
            receivers: How many were invited, numbered from zero.
            device: Of the buffers that will be sent.
            timeout_s: For the whole broadcast; half of it may pass in waiting for receivers.

        Returns:
            The group, or None if nobody came.

        Raises:
            BroadcastError: If those that came could not be connected.
        """
        started = monotonic()
        present: set[int] = set()
        while missing := set(range(receivers)) - present - self._excused:
            present |= {receiver for receiver in missing if self._store.check([_seat(self.rendezvous, receiver)])}
            if monotonic() > started + timeout_s / 2:
                break
            sleep(_POLL_S)
        members = sorted(present - self._excused)
        self._store.set(_list(self.rendezvous), json.dumps(members))
        if not members:
            return None
        return Group(
            _DIST.PrefixStore(self.rendezvous.key, self._store),
            rank=0,
            size=1 + len(members),
            device=device,
            address=self.rendezvous.address,
            deadline=started + timeout_s,
        )

    def close(self) -> None:
        """Close the store."""
        self._store = None


def join(rendezvous: Rendezvous, *, receiver: int, address: str, device: torch.device, timeout_s: float) -> Group:
    """Sign in at rank 0's meeting and connect to the other members.

    Args:
        rendezvous: Where the meeting is.
        receiver: This process, counted from zero over all ranks of all engines.
        address: Of this process's node; not used where the meeting is on the loopback device.
        device: Of the buffers that will be received.
        timeout_s: For the whole broadcast.

    Returns:
        The group.

    Raises:
        BroadcastError: If the meeting is over, goes on without this receiver, or does not begin in time.
    """
    deadline = monotonic() + timeout_s
    try:
        store = _store(rendezvous, timeout_s=timeout_s)
        store.set(_seat(rendezvous, receiver), "")
        store.wait([_list(rendezvous)], timedelta(seconds=max(_POLL_S, deadline - monotonic())))
        members: Sequence[int] = json.loads(store.get(_list(rendezvous)))
    except RuntimeError as error:
        raise BroadcastError(
            f"receiver {receiver} could not join the broadcast at {rendezvous.address}:{rendezvous.port}: {error}"
        ) from None
    if receiver not in members:
        raise BroadcastError(f"the broadcast went on without receiver {receiver}")
    return Group(
        _DIST.PrefixStore(rendezvous.key, store),
        rank=1 + members.index(receiver),
        size=1 + len(members),
        device=device,
        address=LOOPBACK if rendezvous.address == LOOPBACK else address,
        deadline=deadline,
    )


def _store(rendezvous: Rendezvous, *, timeout_s: float, listener: socket.socket | None = None) -> Any:
    return _DIST.TCPStore(
        rendezvous.address,
        rendezvous.port,
        is_master=listener is not None,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        # The store takes the descriptor over and closes it.
        master_listen_fd=None if listener is None else listener.detach(),
    )


def _seat(rendezvous: Rendezvous, receiver: int) -> str:
    return f"{rendezvous.key}/joined/{receiver}"


def _list(rendezvous: Rendezvous) -> str:
    return f"{rendezvous.key}/members"


def _process_group(store: Any, rank: int, size: int, *, device: torch.device, address: str, timeout: timedelta) -> Any:
    if device.type == "cpu":
        options = _DIST.ProcessGroupGloo._Options()
        options._timeout = timeout
        # Named, because gloo would look the host's name up and listen where that leads.
        options._devices = [_DIST.ProcessGroupGloo.create_device(hostname=address, lazy_init=False)]
        return _DIST.ProcessGroupGloo(store, rank, size, options)
    if address == LOOPBACK:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    options = _DIST.ProcessGroupNCCL.Options()
    options._timeout = timeout
    with _environment(_NCCL_WAITS):
        return _DIST.ProcessGroupNCCL(store, rank, size, options)


@contextmanager
def _environment(variables: dict[str, str]) -> Generator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
