"""Which checkpoints are kept, as tables."""

from pathlib import Path
from typing import Any

import pytest

from cluster import retention
from cluster.checkpoint import Checkpoint, name_of
from cluster.schedule import Phase, RunState
from configs.cluster import ClusterConfig
from configs.load import ConfigError, load

ITERATIONS = 8


def run(rounds: int, *, last: int = ITERATIONS) -> list[Checkpoint]:
    """The checkpoints of every second iteration, until iteration `last` of the last round."""
    found: list[Checkpoint] = []
    for round in range(1, rounds + 1):
        for iteration in range(2, (last if round == rounds else ITERATIONS) + 1, 2):
            phase = Phase.EVALUATE if iteration == ITERATIONS else Phase.OPTIMISE
            version = 100 * round + iteration
            state = RunState(phase=phase, round=round, iteration=iteration, policy_version=version)
            directory = Path(name_of(round=round, iteration=iteration))
            driver = {"state": state.to_json()}
            found.append(Checkpoint(directory=directory, driver=driver, config_hash="abc", num_bytes=7))
    return found


def kept(found: list[Checkpoint], *, best: int = 0, referred: tuple[str, ...] = (), **settings: Any) -> list[str]:
    config = ClusterConfig(checkpoint_period_iterations=2, **settings)
    names = retention.kept(found, config, best_version=best, referred=referred)
    return [name.removeprefix("r00").replace("i00000", "") for name in sorted(names)]


def test_by_default_the_last_two_and_the_newest_end_of_a_round_stay() -> None:
    assert kept(run(1, last=2)) == ["1-2"]
    assert kept(run(1, last=6)) == ["1-4", "1-6"]
    assert kept(run(1)) == ["1-6", "1-8"]
    assert kept(run(3, last=2)) == ["2-8", "3-2"]
    assert kept(run(3, last=6)) == ["2-8", "3-4", "3-6"]


def test_more_or_no_ends_of_rounds_can_be_kept() -> None:
    assert kept(run(4, last=4), round_end_checkpoints_kept=2) == ["2-8", "3-8", "4-2", "4-4"]
    assert kept(run(4, last=4), round_end_checkpoints_kept=0) == ["4-2", "4-4"]


def test_the_best_policys_end_of_a_round_can_be_kept() -> None:
    assert kept(run(4, last=4), best=108, best_policy_checkpoint_kept=True) == ["1-8", "3-8", "4-2", "4-4"]
    assert kept(run(4, last=4), best=0, best_policy_checkpoint_kept=True) == ["3-8", "4-2", "4-4"]


def test_every_nth_of_a_round_can_be_kept() -> None:
    expected = ["1-4", "1-8", "2-4", "2-6", "2-8"]
    assert kept(run(2), every_nth_checkpoint_kept=2, checkpoints_kept=2) == expected


def test_what_the_lineage_refers_to_is_kept() -> None:
    assert kept(run(1), referred=("r001-i000002",)) == ["1-2", "1-6", "1-8"]


@pytest.mark.parametrize(
    "setting",
    [
        "checkpoints_kept=0",
        "round_end_checkpoints_kept=-1",
        "every_nth_checkpoint_kept=0",
        "best_policy_checkpoint_kept=1",
    ],
)
def test_settings_that_mean_nothing_are_refused(setting: str) -> None:
    with pytest.raises(ConfigError, match=setting.split("=")[0]):
        load("quickstart", [f"cluster.{setting}"])
