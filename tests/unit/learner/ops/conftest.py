"""What all tests of the ops share: one thread for speed on small tensors, and the same examples every time."""

import pytest
import torch
from hypothesis import settings

# No deadline: the machine may be busy. The same examples every time: a failure is then the change's, not the dice's.
settings.register_profile("rondo", deadline=None, derandomize=True)
settings.load_profile("rondo")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
