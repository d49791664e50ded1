"""Every method learns in the quickstart's world by the line that names it, on the real stack."""

from pathlib import Path

import pytest

from benchmarks.methods import METHODS, figures, trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that trains the supervised policy and the reward model for all methods, and APA's own."""
    return trained("apa", directory=tmp_path_factory.mktemp("methods"), base=None)


@pytest.mark.parametrize("method", METHODS)
def test_gold_rises(base: Path, method: str) -> None:
    found = figures(trained(method, directory=base.parent, base=base))
    assert found["gold"] > found["gold_before"] + 0.1
