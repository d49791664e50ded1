"""The published vectors, for the learner's own tests."""

import json
from pathlib import Path
from typing import Any

import pytest

VECTORS = Path(__file__).parents[2] / "data" / "vectors.json"


@pytest.fixture(scope="session")
def vectors() -> dict[str, dict[str, Any]]:
    return json.loads(VECTORS.read_text())
