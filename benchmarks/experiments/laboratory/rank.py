"""A group of one rank, which DeepSpeed wants; apart, because tests want it without the laboratory."""

import os
from functools import cache

import torch

from learner.distributed import LOOPBACK, init_distributed, listen
from learner.training import RankContext

# The tensors are tiny: several threads would only wait for each other.
torch.set_num_threads(1)


@cache
def single_rank() -> RankContext:
    """Make this process a group of one; once a process."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    listener = listen(LOOPBACK)
    port = listener.getsockname()[1]
    return init_distributed(rank=0, world_size=1, address=LOOPBACK, port=port, listener=listener, timeout_s=60)
