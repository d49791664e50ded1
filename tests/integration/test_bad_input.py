"""Bad input ends within seconds: the right exit code, one clear message, no traceback, nothing half written."""

import json
import re
import time
from pathlib import Path

import pytest

from cluster.checkpoint import verify
from tests.json_server import Reply, serving
from tests.reward_batches import lengths
from tests.rondo_process import metrics_of, rondo
from tests.tiny import tiny_llama
from tests.tiny_run import tiny_overrides


def refused(tmp_path: Path, *overrides: str, code: int = 2, within_s: float = 120, says: str = "") -> str:
    """Run a tiny configuration that must be refused, and return the message."""
    runs = tmp_path / "runs"
    started = time.monotonic()
    done = rondo("train", "quickstart", *tiny_overrides(runs, *overrides))
    assert time.monotonic() - started < within_s
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("error:") == 1
    assert says in done.stdout
    assert code == 1 or not (runs / "tiny").exists()
    return done.stderr


def test_configuration_mistakes_leave_no_directory(tmp_path: Path) -> None:
    assert "did you mean workers?" in refused(tmp_path, "rollout.worker=1", within_s=10)
    assert "valid integer" in refused(tmp_path, "rollout.workers=many", within_s=10)
    assert "does not divide" in refused(tmp_path, "algorithm.minibatch_responses=7", within_s=10)
    assert not (tmp_path / "runs").exists()


def test_more_workers_than_the_cluster_has(tmp_path: Path) -> None:
    message = refused(tmp_path, "rollout.workers=400", "rollout.cpus_per_worker=1")
    assert "needs 401 CPUs, the cluster has" in message
    assert "lower rollout.workers" in message


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "no data file"),
        ([], "empty"),
        ([{"question": "x"}], "column"),
        ([{"prompt": "x"}, {"prompt": ""}], "line 2"),
    ],
    ids=["missing", "empty", "unknown columns", "a row without a prompt"],
)
def test_bad_prompt_files(tmp_path: Path, rows: list[dict[str, str]] | None, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    if rows is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert message in refused(tmp_path, f"data.prompts.source={path}")


def test_prompts_longer_than_the_context(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "how do i clean a pot ? " * 40}) + "\n")
    message = refused(tmp_path, f"data.prompts.source={path}")
    assert "rollout.max_prompt_tokens" in message


def test_a_model_directory_without_tokenizer(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "model")
    for path in (tmp_path / "model").glob("token*"):
        path.unlink()
    message = refused(tmp_path, f"models.policy={{path: {tmp_path / 'model'}}}")
    assert "tokenizer" in message


@pytest.mark.parametrize("kind", ["raises", pytest.param("returns_nan", marks=pytest.mark.slow)])
def test_a_failing_reward_names_the_prompt_and_keeps_the_batch(tmp_path: Path, kind: str) -> None:
    tiny_llama(tmp_path / "model")
    message = refused(
        tmp_path,
        f"scoring.rewards=[{{kind: function, name: broken, path: 'tests.integration.broken_rewards:{kind}'}}]",
        f"models.policy={{path: {tmp_path / 'model'}}}",
        "models.critic.init=policy",
        "data.demonstrations=null",
        "data.preferences=null",
        code=1,
        within_s=240,
        says="incident: reward broken failed on r",
    )
    assert "reward broken" in message
    assert re.search(r"safe-\d+#0", message), "the prompt is not named"
    # The groups were scored side by side, so several may have failed; the message names one of the saved batches.
    [record] = [path for path in (tmp_path / "runs" / "tiny" / "incidents").glob("*.json") if path.name in message]
    assert json.loads(record.read_text())["kind"] == "reward_failed"
    assert "prompt" in record.with_suffix(".jsonl").read_text()


@pytest.mark.slow
def test_a_reward_that_stays_down_costs_no_finished_iteration(tmp_path: Path) -> None:
    """Checkpoints are due after every second iteration; the first is committed when the second's rewards fail."""
    tiny_llama(tmp_path / "model")
    with serving(lambda n, body: Reply(b"gone", 410) if "/i1/" in body["keys"][0] else lengths(n, body)) as server:
        message = refused(
            tmp_path,
            f"scoring.rewards=[{{kind: http, name: tone, url: '{server.url}'}}]",
            f"models.policy={{path: {tmp_path / 'model'}}}",
            "models.critic.init=policy",
            "data.demonstrations=null",
            "data.preferences=null",
            code=1,
            within_s=240,
        )
    assert "status 410" in message
    assert len(metrics_of(tmp_path / "runs" / "tiny")) == 1
    [kept] = (tmp_path / "runs" / "tiny" / "checkpoints").iterdir()
    assert verify(kept).driver["state"]["iteration"] == 1
