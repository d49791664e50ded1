"""Other algorithms than the quickstart's, tiny, on the real stack: one run each, by changing their lines alone."""

import json
from pathlib import Path

import pytest

from tests.rondo_process import metrics_of, train_tiny

RLOO = ("algorithm.name=ppo", "algorithm.advantage=rloo")
pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "overrides", [("algorithm.name=awr",), ("algorithm.name=a2c",), RLOO], ids=["awr", "a2c", "rloo"]
)
def test_it_trains(overrides: tuple[str, ...], tmp_path: Path) -> None:
    run = train_tiny(tmp_path, *overrides)
    lines = metrics_of(run)
    assert len(lines) == 3
    with_critic = overrides is not RLOO
    for line in lines:
        assert line["policy/grad_norm"] > 0
        assert line["policy/first_minibatch_ratio_gap_max"] < 1e-5
        assert line["sync/k3_at_lag_0"] < 1e-6
        assert line["sync/tokens_at_lag_0"] == line["counter/response_tokens"]
        assert any(name.startswith("value/") for name in line) == with_critic
        if overrides == ("algorithm.name=awr",):
            assert 0 < line["policy/weight_ess_fraction"] <= 1
    kept = {path.name for path in (run / "checkpoints").rglob("*") if path.is_dir()}
    assert "policy" in kept
    assert ("critic" in kept) == with_critic
    assert not list((run / "incidents").glob("mismatch-*"))
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert "gold_mean" in json.dumps(evaluation)
