"""Other algorithms than the quickstart's, tiny, on the real stack: one run each, by changing their lines alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_run import tiny_overrides

ROOT = Path(__file__).parents[2]
RLOO = ("algorithm.name=ppo", "algorithm.advantage=rloo", "rollout.samples_per_prompt=2")
pytestmark = pytest.mark.slow


def train(directory: Path, *overrides: str) -> list[dict[str, float]]:
    """Run three iterations as a user would; return their metrics."""
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "train", "quickstart", *tiny_overrides(directory, *overrides)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    lines = (directory / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    return [json.loads(line) for line in lines]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "overrides", [("algorithm.name=awr",), ("algorithm.name=a2c",), RLOO], ids=["awr", "a2c", "rloo"]
)
def test_it_trains(overrides: tuple[str, ...], tmp_path: Path) -> None:
    lines = train(tmp_path, *overrides)
    with_critic = overrides is not RLOO
    for line in lines:
        assert line["policy/grad_norm"] > 0
        assert line["policy/first_minibatch_ratio_gap_max"] < 1e-5
        assert line["sync/k3_at_lag_0"] < 1e-6
        assert line["sync/tokens_at_lag_0"] == line["counter/response_tokens"]
        assert any(name.startswith("value/") for name in line) == with_critic
        if overrides == ("algorithm.name=awr",):
            assert 0 < line["policy/weight_ess_fraction"] <= 1
    kept = {path.name for path in (tmp_path / "tiny" / "checkpoints").rglob("*") if path.is_dir()}
    assert "policy" in kept
    assert ("critic" in kept) == with_critic
    assert not list((tmp_path / "tiny" / "incidents").glob("mismatch-*"))
    evaluation = json.loads((tmp_path / "tiny" / "evaluation.json").read_text())
    assert "gold_mean" in json.dumps(evaluation)
