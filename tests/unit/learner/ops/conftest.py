"""What all tests of the ops share: the published vectors, and one thread for speed on small tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

# No deadline: the machine may be busy. The same examples every time: a failure is then the change's, not the dice's.
settings.register_profile("rondo", deadline=None, derandomize=True)
settings.load_profile("rondo")

VECTORS = Path(__file__).parents[3] / "data" / "vectors.json"


@pytest.fixture(scope="session")
def vectors() -> dict[str, dict[str, Any]]:
    return json.loads(VECTORS.read_text())


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
