"""Which policy becomes the best: one that is ahead beyond doubt, and no other."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from cluster.evaluation import Evaluation
from cluster.ranking import Ranking
from cluster.run_directory import RunDirectory
from cluster.schedule import Phase, RunState
from configs.load import load

PROMPTS = [f"p{number}" for number in range(60)]
SCORES_ALONE = (
    "rounds.labeler=null",
    "rounds.collect.comparisons=0",
    "rounds.overrides={}",
    "rounds.evaluation.labeler=null",
    "rounds.evaluation.opponents=[sft, best]",
    "scoring.rewards=[{kind: function, name: gold, path: 'examples.quickstart.gold:helpfulness'}]",
    "models.critic.init=policy",
)


def evaluation(version: int, wins: int) -> Evaluation:
    """A version that beats one with no wins on so many prompts, and loses to it on the others."""
    return Evaluation(
        policy_version=version,
        summary={},
        judged={prompt: (1.0 if place < wins else -1.0) if wins else 0.0 for place, prompt in enumerate(PROMPTS)},
        judge="gold",
        components={},
        response_tokens=dict.fromkeys(PROMPTS, 3),
    )


def ranked(directory: Path, state: RunState, wins: dict[int, int]) -> tuple[int, dict[str, Any]]:
    run = RunDirectory(directory)
    run.round(state.round).mkdir(parents=True)
    unasked: Any = None  # where scores decide, nobody is asked
    ranking = Ranking(
        load("quickstart", list(SCORES_ALONE)),
        run,
        store=unasked,
        collection=unasked,
        evaluated=lambda version: evaluation(version, wins[version]),
        decode=str,
        say=lambda line: None,
    )
    return ranking.rank(state), json.loads(run.ladder.read_text())


def after_round(number: int, *, version: int, best: int, last: int = 0) -> RunState:
    return RunState(phase=Phase.RANK, round=number, policy_version=version, best_version=best, last_version=last)


def test_a_policy_that_wins_beyond_doubt_becomes_the_best(tmp_path: Path) -> None:
    best, found = ranked(tmp_path, after_round(1, version=20, best=0), {0: 0, 20: 50})
    assert best == 20
    assert found["best"] == "v020"
    assert [rating["version"] for rating in found["ratings"]] == ["v020", "v000"]


@pytest.mark.parametrize("wins", [35, 30, 10])
def test_a_policy_that_may_be_no_better_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture, wins: int) -> None:
    with caplog.at_level(logging.WARNING):
        best, found = ranked(tmp_path, after_round(1, version=20, best=0), {0: 0, 20: wins})
    assert best == 0
    assert found["best"] == "v000"
    assert "v020 is not promoted, v000 stays the best" in caplog.text


def test_a_later_policy_is_measured_against_the_best_and_not_against_the_first(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    ranked(directory, after_round(1, version=20, best=0), {0: 0, 20: 50})
    # It beats the supervised policy as clearly as the best one does, and ties with that on every prompt.
    best, found = ranked(directory, after_round(2, version=41, best=20, last=20), {0: 0, 20: 50, 41: 50})
    assert best == 20
    assert {rating["version"]: rating["elo"] > 100 for rating in found["ratings"]} == {
        "v000": False, "v020": True, "v041": True,
    }  # fmt: skip
