"""The reference vectors, and how hypothesis searches."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

VECTORS = Path(__file__).parents[1] / "data" / "vectors.json"

# How long an example takes says something about the machine; pytest-timeout bounds a test as a whole.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def vectors() -> dict[str, dict[str, Any]]:
    return json.loads(VECTORS.read_text())
