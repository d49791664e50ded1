"""DPO and RFT on one rank and on two, under ZeRO 0, 2 and 3, learn what plain PyTorch does (real DeepSpeed, gloo)."""

from typing import Any

import pytest
import torch

from configs.learner import LearnerConfig
from tests.integration.selection_ranks import ALGORITHMS, HIDDEN, RATE, STAGES, updates
from tests.learner_batches import tiny_policy
from tests.plain_engine import PlainEngine
from tests.rank_processes import Worlds

WORLDS = (pytest.param(1, marks=pytest.mark.slow), 2)
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """Run as many processes as are asked for through all stages, once."""
    return Worlds("tests.integration.selection_ranks", tmp_path_factory)


@pytest.fixture(scope="module")
def yardstick() -> dict[str, Any]:
    """Do the same with plain PyTorch on one rank."""
    return {
        name: updates(PlainEngine(tiny_policy(hidden=HIDDEN), optimizer=RATE, settings=LearnerConfig()), name)
        for name in ALGORITHMS
    }


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_ranks_and_stages_learn_the_same(findings: Any, yardstick: Any, name: str, stage: int, world_size: int) -> None:
    expected = yardstick[name]
    start = torch.cat([p.detach().flatten() for p in tiny_policy(hidden=HIDDEN).parameters()])
    moved = (expected["weights"] - start).norm()
    for rank in findings[world_size]:
        found = rank[name, stage]
        for metrics, plain in zip(found["metrics"], expected["metrics"], strict=True):
            assert set(metrics) == set(plain)
            for metric, value in plain.items():
                assert metrics[metric] == pytest.approx(value, rel=1e-3, abs=1e-4), metric
        assert (found["weights"] - expected["weights"]).norm() < 1e-2 * moved


def test_all_ranks_report_the_same(findings: Any, yardstick: Any) -> None:
    first, second = findings[2]
    assert all(first[case]["metrics"] == second[case]["metrics"] for case in first)
    assert [metrics["dpo/pairs"] for metrics in yardstick["dpo"]["metrics"]] == [5, 5, 5]
    assert [metrics["dpo/tied_prompts"] for metrics in yardstick["dpo"]["metrics"]] == [1, 1, 1]
    assert [metrics["rft/recalled_responses"] for metrics in yardstick["rft"]["metrics"]] == [0, 4, 4]
