"""The NCCL branch of a broadcast: one process a device, from a device's buffer into another's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a CUDA device for each of two ranks"),
]
RECEIVER = """
import sys
import torch
from protocol.broadcast import BroadcastError, join
from protocol.weights import Rendezvous

address, port, key, behaviour = sys.argv[1:]
torch.cuda.set_device(1)
rendezvous = Rendezvous(address=address, port=int(port), key=key)
group = join(rendezvous, receiver=0, address=address, device=torch.device("cuda", 1), timeout_s=60)
for number in (3, 250, 7):
    buffer = torch.zeros(1_000_003, dtype=torch.uint8, device="cuda:1")
    group.broadcast(buffer)
    assert bool((buffer == number).all()), number
    if behaviour == "leave":
        sys.exit(9)
group.finish()
"""
SENDER = """
import socket
import subprocess
import sys
import time
import torch
from protocol.broadcast import LOOPBACK, BroadcastError, Meeting

behaviour = sys.argv[2]
torch.cuda.set_device(0)
listener = socket.socket()
listener.bind((LOOPBACK, 0))
listener.listen()
meeting = Meeting(listener, timeout_s=60)
at = meeting.rendezvous
receiver = subprocess.Popen([sys.executable, "-c", sys.argv[1], at.address, str(at.port), at.key, behaviour])
started = time.monotonic()
group = meeting.assemble(receivers=1, device=torch.device("cuda", 0), timeout_s=60)
assert group is not None and group.size == 2
try:
    for number in (3, 250, 7):
        group.broadcast(torch.full((1_000_003,), number, dtype=torch.uint8, device="cuda:0"))
    group.finish()
    assert behaviour == "stay"
except BroadcastError:
    group.close()
    assert behaviour == "leave"
assert time.monotonic() - started < 90
assert receiver.wait(timeout=60) == {"stay": 0, "leave": 9}[behaviour]
# The process goes on: the device computes, and a new group can be made.
assert torch.ones(4, device="cuda:0").sum().item() == 4
"""


@pytest.mark.parametrize("behaviour", ["stay", "leave"])
def test_two_ranks_broadcast_and_a_lost_one_is_survived(behaviour: str) -> None:
    command = [sys.executable, "-c", SENDER, RECEIVER, behaviour]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
