"""The reference vectors, and how hypothesis searches."""

from typing import Any

import pytest
from hypothesis import settings

from tests.reference_vectors import VECTORS

# How long an example takes says something about the machine; pytest-timeout bounds a test as a whole.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def vectors() -> dict[str, dict[str, Any]]:
    return VECTORS
