"""Which reward model scores: a new one only where it is better on held-out pairs."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from cluster.refresh import REPORT, Refresh
from cluster.run_directory import RunDirectory
from cluster.schedule import Phase, RunState
from configs.load import load
from configs.run import RunConfig

GATE = {
    "metric": "log-likelihood",
    "incumbent": "v000",
    "num_pairs": 40,
    "gain": 0.05,
    "ci_low": 0.01,
    "ci_high": 0.09,
    "old": {"accuracy": 0.7},
    "new": {"accuracy": 0.75},
}


class Workers:
    """A crew that has trained already: it may be asked to give up the policy's engines, and nothing else."""

    def finish_rl(self) -> None:
        """Give up what is not there."""


class Rounds:
    """Knows which rounds have comparisons."""

    def __init__(self, directory: RunDirectory, rounds: set[int]) -> None:
        self._directory = directory
        self._rounds = rounds

    def comparisons(self, number: int) -> Path | None:
        """Name the file of a round."""
        return self._directory.comparisons(number) if number in self._rounds else None


def refreshed(
    root: Path, *, gate: dict[str, Any] | None, incumbent: int | None = 0, fresh: bool = True, config: RunConfig
) -> tuple[int | None, list[str]]:
    directory = RunDirectory(root)
    report = {"sources": {}, "trained_on": "all", "heldout": {"accuracy": 0.75}} | ({"gate": gate} if gate else {})
    output = directory.reward_model(1)
    output.mkdir(parents=True)
    (output / REPORT).write_text(json.dumps(report))
    said: list[str] = []
    made: Any = Refresh(
        config,
        directory,
        crew=Workers(),  # pyright: ignore[reportArgumentType]
        collection=Rounds(directory, {2} if fresh else set()),  # pyright: ignore[reportArgumentType]
        progress=lambda stage, status: None,
        say=said.append,
    )
    return made.refresh(RunState(phase=Phase.REFRESH, round=2, reward_version=incumbent)), said


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load("quickstart", ["rounds.heldout_share=0"])


def test_a_model_that_passes_the_gate_scores(tmp_path: Path, config: RunConfig) -> None:
    version, said = refreshed(tmp_path, gate={"passed": True, **GATE}, config=config)
    assert version == 1
    assert "reward model v001 scores: gain in log-likelihood over v000" in said[0]


def test_a_model_that_fails_it_does_not_and_that_is_said(
    tmp_path: Path, config: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        version, said = refreshed(tmp_path, gate={"passed": False, **GATE}, config=config)
    assert version == 0
    assert "the old reward model stays" in said[0]
    assert "the new reward model is NOT used" in caplog.text


def test_what_was_decided_stays_decided(tmp_path: Path, config: RunConfig) -> None:
    refreshed(tmp_path, gate={"passed": False, **GATE}, config=config)
    decision = RunDirectory(tmp_path).refreshed(2)
    assert json.loads(decision.read_text())["reward_version"] == 0
    decision.write_text(json.dumps({"reward_version": 7, "why": "before the crash"}))
    directory: Any = RunDirectory(tmp_path)
    nobody: Any = None
    again = Refresh(config, directory, crew=nobody, collection=nobody, progress=nobody, say=nobody)
    assert again.refresh(RunState(phase=Phase.REFRESH, round=2, reward_version=0)) == 7


def test_the_first_model_needs_no_gate(tmp_path: Path, config: RunConfig) -> None:
    version, said = refreshed(tmp_path, gate=None, incumbent=None, config=config)
    assert version == 1
    assert "the first reward model" in said[0]


def test_without_new_comparisons_the_old_model_stays(tmp_path: Path, config: RunConfig) -> None:
    version, said = refreshed(tmp_path, gate={"passed": True, **GATE}, fresh=False, config=config)
    assert version == 0
    assert "nothing new to learn from" in said[0]
