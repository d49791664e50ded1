"""DPO and rejection-sampling fine-tuning on the real stack, tiny: by one line, through rounds, stopped and resumed."""

import json
import math
import signal
from pathlib import Path

import pytest

from tests.rondo_process import rondo, signalled_when, train_tiny, untimed
from tests.tiny_run import tiny_overrides

BATCH = "rollout.responses_per_iteration=32"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def train(directory: Path, *overrides: str) -> Path:
    return train_tiny(directory, *overrides, BATCH)


def stopped_when(directory: Path, said: str, *overrides: str) -> None:
    arguments = ["train", "quickstart", *tiny_overrides(directory, *overrides, BATCH)]
    code, output = signalled_when(said, arguments, signal.SIGTERM)
    assert code == 75, output


def test_dpo_trains_and_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    run = train(tmp_path / "whole", "algorithm.name=dpo")
    lines = untimed(run)
    assert len(lines) == 3
    for line in lines:
        assert line["policy/grad_norm"] > 0
        assert line["policy/first_minibatch_ratio_gap_max"] < 1e-5
        assert line["sync/k3_at_lag_0"] < 1e-6
        assert line["dpo/pairs"] + line["dpo/tied_prompts"] + line["dpo/identical_prompts"] == 8
        margin = line["dpo/chosen_log_ratio_per_sequence"] - line["dpo/rejected_log_ratio_per_sequence"]
        assert line["dpo/margin_nats"] == pytest.approx(margin)
        assert not [name for name in line if name.startswith("value/") or name == "objective/kl_beta"]
        assert all(math.isfinite(value) for value in line.values())
    # The first iteration starts at the reference; there is a step before most of its pairs are learned.
    assert lines[0]["policy/loss"] == pytest.approx(math.log(2), abs=0.05)
    assert lines[0]["objective/kl_k1_per_sequence"] == pytest.approx(0, abs=1e-4)
    assert {path.name for path in (run / "checkpoints").glob("*/learner/*")} == {"policy", "learner.json"}
    assert "gold_mean" in (run / "evaluation.json").read_text()
    assert "dpo/margin_nats" in rondo_report(run)

    stopped_when(tmp_path / "stopped", "iteration 1/3", "algorithm.name=dpo")
    assert untimed(train(tmp_path / "stopped", "algorithm.name=dpo")) == lines


def test_rft_remembers_through_rounds_and_processes(tmp_path: Path) -> None:
    rounds = ("algorithm.name=rft", "algorithm.memory_responses=4", "rounds.count=2", "rounds.iterations=2")
    run = train(tmp_path / "whole", *rounds)
    lines = untimed(run)
    assert [(line["counter/round"], line["counter/iteration"]) for line in lines] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    # The second round starts again from the supervised policy, and remembers what the first has chosen.
    assert [line["rft/recalled_responses"] for line in lines] == [0, 4, 4, 4]
    remembered = [line["rft/memory_responses"] for line in lines]
    assert remembered == sorted(remembered)
    assert remembered[0] == lines[0]["rft/chosen_responses"] == 8
    assert remembered[2] > remembered[1] > remembered[0]
    assert lines[2]["objective/kl_k1_per_sequence"] == pytest.approx(0, abs=1e-4)
    for line in lines:
        assert line["policy/grad_norm"] > 0
        assert line["rft/chosen_score"] > line["objective/score"]
        assert line["rft/nll_per_token"] == pytest.approx(line["policy/loss"])
    assert all((path / "memory.npz").exists() for path in (run / "checkpoints").glob("*/learner"))
    assert json.loads((run / "rounds/r002/round.json").read_text())["iterations"] == 2

    # A new process begins the second round, another goes on within it: the same numbers, bit for bit.
    stopped_when(tmp_path / "stopped", "Round 2: Optimising the policy", *rounds)
    stopped_when(tmp_path / "stopped", "iteration 1/2", *rounds)
    assert untimed(train(tmp_path / "stopped", *rounds)) == lines


def rondo_report(run: Path) -> str:
    assert rondo("report", str(run)).returncode == 0
    return (run / "report.html").read_text()
