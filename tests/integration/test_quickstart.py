"""The whole quickstart at its real size: what the README promises. More seeds with benchmarks/quickstart.py."""

from pathlib import Path

import pytest

from benchmarks.quickstart import MAX_MEMORY_GIB, run


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("algorithm", ["apa", "ppo"])
def test_the_quickstart_reaches_its_bounds(algorithm: str, tmp_path: Path) -> None:
    result = run(algorithm, 0, output=tmp_path, overrides=[])
    assert result["reached"], result
    assert result["peak_memory_gib"] < MAX_MEMORY_GIB
    assert result["stage_sum_error_max"] < 0.05
    assert result["first_clip_fraction_max"] == 0
