"""The process group of the ranks: where they meet, and over which interface."""

import datetime
import os
import socket

import torch
import torch.distributed

from learner.training import RankContext
from protocol.broadcast import LOOPBACK


def listen(address: str) -> socket.socket:
    """Reserve a port for the ranks' meeting place, by listening on it until the group is connected.

    Args:
        address: The interface to listen on; no other one accepts.

    Returns:
        The listening socket.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, 0))
    listener.listen()
    return listener


def init_distributed(
    *, rank: int, world_size: int, address: str, port: int, listener: socket.socket | None, timeout_s: float
) -> RankContext:
    """Connect this process to the other ranks: gloo on a CPU, NCCL on an accelerator.

    Args:
        rank: This process.
        world_size: All of them.
        address: Where rank 0 listens. The loopback address keeps all traffic on this machine.
        port: The listener's.
        listener: Rank 0's socket from `listen`; None elsewhere.
        timeout_s: How long a collective may take.

    Returns:
        This rank's context.
    """
    cuda = torch.cuda.is_available()
    if address == LOOPBACK:
        # gloo and NCCL would otherwise listen on the interface of the host's name.
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    # An accelerator's process sees only its own device, so it is the first.
    os.environ["LOCAL_RANK"] = "0"
    timeout = datetime.timedelta(seconds=timeout_s)
    store = torch.distributed.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
        address,
        port,
        world_size,
        is_master=listener is not None,
        timeout=timeout,
        wait_for_workers=False,
        # The store takes the descriptor over and closes it.
        master_listen_fd=None if listener is None else listener.detach(),
    )
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world_size, timeout=timeout
    )
    return RankContext(
        rank=rank, world_size=world_size, device=torch.device("cuda", 0) if cuda else torch.device("cpu")
    )
