"""AWR on a fixed set of responses, on the real stack: none is sampled to learn from, and a resume changes nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from examples.quickstart.data import preferences
from tests.tiny_run import tiny_overrides

ROOT = Path(__file__).parents[2]
TIMED = ("time/", "busy/", "sync/seconds", "rollout/tokens_per_s")
PAIRS = 20
pytestmark = pytest.mark.slow


def rondo(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stderr + done.stdout


def untimed(directory: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (directory / "tiny" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith(TIMED)} for line in lines]


@pytest.mark.timeout(1500)
def test_awr_learns_from_a_fixed_set_and_goes_on_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    pairs = list(preferences(seed=5, count=PAIRS))
    rows = [*pairs, {**pairs[0], "chosen": [{"role": "assistant", "content": "cup " * 99}]}]
    data = tmp_path / "responses.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    overrides = (
        f"data.responses={{source: {data}}}",
        "rollout.source=data",
        "rollout.max_response_tokens=56",
        "scoring.calibration_anchor=responses",
        "scoring.calibration_responses=64",
        "algorithm={name: awr, minibatch_responses: 8}",
        "rounds.iterations=4",
    )
    said = rondo("train", "quickstart", *tiny_overrides(tmp_path, *overrides))
    assert "1 dropped: response longer than rollout.max_response_tokens = 56, its end included" in " ".join(
        said.split()
    )
    lines = untimed(tmp_path)
    assert len(lines) == 4
    for line in lines:
        assert line["policy/grad_norm"] > 0
        assert line["policy/first_minibatch_ratio_gap_max"] < 1e-5
        assert 0 < line["policy/weight_ess_fraction"] <= 1
        assert line["rollout/truncated_fraction"] == 0
        assert "objective/log_ratio_per_sequence" in line
        assert "objective/kl_k1_per_sequence" not in line
        # What was published is compared with the learner; what was read cannot be.
        assert {name for name in line if name.startswith("sync/")} == {"sync/bytes", "sync/canary_gap_max"}
        assert line["sync/canary_gap_max"] < 1e-4
    assert lines[-1]["counter/policy_version"] == 4

    run = tmp_path / "tiny"
    batches = [pyarrow.parquet.read_table(run / "rollouts" / f"v{n:05d}.parquet").to_pylist() for n in range(4)]
    taken = [row["prompt_id"] for batch in batches for row in batch]
    # The forty of the pairs, and the one beside the response that is too long; the third batch ends the first epoch.
    assert len(set(taken[:32])) == 32
    assert len(set(taken[:48])) == len(set(taken)) == 41
    assert all(row["behavior_logprobs"] is None for batch in batches for row in batch)
    said_in_data = {
        (p["prompt"][0]["content"], p[side][0]["content"]) for p in pairs for side in ("chosen", "rejected")
    }
    assert {(row["prompt"], row["response"]) for batch in batches for row in batch} == said_in_data

    calibration = json.loads((run / "rounds" / "r001" / "calibrations.json").read_text())["reward_model"]
    assert (calibration["anchor"], calibration["num_responses"]) == ("responses", 41)
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert evaluation["after"]["kl_k1_per_sequence"] != 0  # of the policy's own samples
    assert "gold_mean" in evaluation["after"]

    # The same run, stopped in the middle of an epoch over the 41 responses.
    again = tiny_overrides(tmp_path / "again", *overrides)
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "train", "quickstart", *again],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "iteration 1/4" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=300) == 75, rest
    assert len(untimed(tmp_path / "again")) < 4
    rondo("resume", str(tmp_path / "again" / "tiny"))
    assert untimed(tmp_path / "again") == lines
