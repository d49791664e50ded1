"""At about 30 million parameters a learner with adapters grows by less than half of what full training takes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_peak_is_below_half_of_full_training() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.adapter_memory"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=1100)
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert 28e6 < found["parameters_each"] < 32e6
    # Weights, gradients and two moments of two networks in fp32: had training grown less, it would not be all of it.
    assert found["full"]["peak_mib"] > 2 * 16 * found["parameters_each"] / 2**20
    assert found["adapters"]["peak_mib"] < 0.5 * found["full"]["peak_mib"]
    assert found["adapters"]["checkpoint_mib"] < 0.1 * found["full"]["checkpoint_mib"]
