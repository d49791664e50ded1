"""AWR on a fixed set of responses, on the real stack: none is sampled to learn from, and a resume changes nothing."""

import json
import signal
from pathlib import Path

import pyarrow.parquet
import pytest

from examples.quickstart.data import preferences
from tests.rondo_process import rondo, signalled_when, untimed
from tests.tiny_run import tiny_overrides

PAIRS = 20
pytestmark = pytest.mark.slow


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
    done = rondo("train", "quickstart", *tiny_overrides(tmp_path, *overrides), timeout_s=590)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "1 dropped: response longer than rollout.max_response_tokens = 56, its end included" in " ".join(
        (done.stderr + done.stdout).split()
    )
    lines = untimed(tmp_path / "tiny")
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
    code, output = signalled_when("iteration 1/4", ["train", "quickstart", *again], signal.SIGTERM)
    assert code == 75, output
    stopped = tmp_path / "again" / "tiny"
    assert len(untimed(stopped)) < 4
    resumed = rondo("resume", str(stopped), timeout_s=590)
    assert resumed.returncode == 0, resumed.stderr + resumed.stdout
    assert untimed(stopped) == lines
