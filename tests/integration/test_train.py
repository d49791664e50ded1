"""The whole chain on the real stack, tiny: Ray, vLLM, DeepSpeed, every stage, through the command line."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rondo_process import ROOT, metrics_of, rondo
from tests.tiny_run import tiny_overrides


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One tiny run from nothing to its evaluation."""
    directory = tmp_path_factory.mktemp("runs")
    done = rondo("train", "quickstart", *tiny_overrides(directory, "rounds.iterations=4"))
    assert done.returncode == 0, done.stderr + done.stdout
    return directory / "tiny", done.stdout


def test_it_leaves_everything_that_a_run_promises(trained: tuple[Path, str]) -> None:
    run, output = trained
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "evaluation.json",
        "rounds/r001/calibrations.json",
        "ladder.json",
        "tensorboard",
        "rollouts",
        "policies/v000",
        "policies/v004",
        "reward_models/v000",
    ):
        assert (run / name).exists(), name
    assert len(list((run / "rollouts").glob("*.parquet"))) == 4
    assert "Before and after, on 16 held-out prompts" in output
    assert "iteration 4/4" in output


def test_every_iteration_is_a_flat_line_with_the_promised_names(trained: tuple[Path, str]) -> None:
    lines = metrics_of(trained[0])
    assert [line["counter/policy_version"] for line in lines] == [1, 2, 3, 4]
    promised = {
        "objective/score", "objective/reward", "objective/kl_k1_per_sequence", "policy/loss", "policy/entropy",
        "policy/approx_kl", "policy/lr", "policy/grad_norm", "value/loss", "value/explained_variance",
        "rollout/response_tokens_mean", "rollout/truncated_fraction", "rollout/tokens_per_s", "sync/seconds",
        "sync/bytes", "sync/logprob_gap_max", "time/generate", "time/score", "time/learn", "time/publish",
        "time/iteration", "busy/reward", "busy/reference", "counter/round", "counter/iteration", "counter/prompts",
        "counter/response_tokens", "gold/gold", "gold/helpfulness", "gold/harmlessness",
    }  # fmt: skip
    for line in lines:
        assert promised <= line.keys()
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in line.values())


def test_engine_and_learner_agree_and_the_first_minibatch_is_on_policy(trained: tuple[Path, str]) -> None:
    for line in metrics_of(trained[0]):
        assert line["sync/logprob_gap_max"] < 1e-4
        assert line["sync/canary_gap_max"] < 1e-4
        assert line["policy/first_minibatch_ratio_gap_max"] < 1e-5
        assert line.get("policy/first_minibatch_clip_fraction", 0) == 0  # APA has no clip


def test_the_stages_sum_to_the_iteration(trained: tuple[Path, str]) -> None:
    for line in metrics_of(trained[0]):
        stages = sum(line[f"time/{name}"] for name in ("generate", "score", "learn", "publish"))
        assert stages == pytest.approx(line["time/iteration"], rel=0.05)


def test_a_finished_run_is_shown_not_repeated(trained: tuple[Path, str]) -> None:
    run, _ = trained
    before = (run / "metrics.jsonl").read_bytes()
    done = rondo("resume", str(run))
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    assert (run / "metrics.jsonl").read_bytes() == before
    shown = rondo("status", str(run))
    assert "policies/v004" in shown.stdout
    assert rondo("ckpt", "verify", str(run)).returncode == 0


def test_the_exports_load_in_transformers_and_score_as_in_the_pool(trained: tuple[Path, str]) -> None:
    import pyarrow.parquet as parquet
    import torch
    from transformers import AutoModelForSequenceClassification

    run, _ = trained
    table = parquet.read_table(run / "rollouts" / "v00000.parquet").to_pylist()
    calibration = json.loads((run / "rounds/r001/calibrations.json").read_text())["reward_model"]
    model = AutoModelForSequenceClassification.from_pretrained(run / "reward_models" / "v000").eval()
    for row in table[:8]:
        ids = torch.tensor([[*row["prompt_ids"], *row["response_ids"]]])
        with torch.no_grad():
            logit = model(input_ids=ids).logits[0, 0].item()
        expected = logit * calibration["gain"] + calibration["bias"]
        assert row["component/reward_model"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_two_runs_end_in_the_same_parameters_bit_for_bit(trained: tuple[Path, str], tmp_path: Path) -> None:
    again = rondo("train", "quickstart", *tiny_overrides(tmp_path, "rounds.iterations=4"))
    assert again.returncode == 0, again.stderr
    for part in ("policies/v000", "policies/v004", "reward_models/v000"):
        one, two = (root / part / "model.safetensors" for root in (trained[0], tmp_path / "tiny"))
        assert one.read_bytes() == two.read_bytes(), part


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_was_stopped_goes_on_where_it_stood(
    trained: tuple[Path, str], tmp_path: Path, number: signal.Signals
) -> None:
    """Stopped between two checkpoints, it commits one, and the rest gives the same metrics as in one go."""
    overrides = tiny_overrides(tmp_path, "rounds.iterations=4")
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "train", "quickstart", *overrides],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if "iteration 3/4" in line:
            process.send_signal(number)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=120) == 75, rest
    checkpoints = sorted(path.name for path in (tmp_path / "tiny" / "checkpoints").iterdir())
    assert checkpoints[-1] in ("r001-i000003", "r001-i000004")  # whichever iteration was in hand
    done = rondo("resume", str(tmp_path / "tiny"))
    assert done.returncode == 0, done.stderr
    timed = ("time/", "busy/", "sync/seconds", "rollout/tokens_per_s")
    for one, two in zip(metrics_of(trained[0]), metrics_of(tmp_path / "tiny"), strict=True):
        for name in one:
            if not name.startswith(timed):
                assert one[name] == two[name], name
