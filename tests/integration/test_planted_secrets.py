"""Secrets planted in the environment, and everything a run writes, prints, logs, submits or shows searched for them."""

import json
import logging
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors import worker as rollout_worker
from cluster import preflight, submit
from cluster.report import write_report
from cluster.run_directory import store_url
from configs.labels import JudgeConfig
from configs.load import config_hash, load
from configs.run import RunConfig
from learner import worker as learner_worker
from protocol.errors import UserError
from reward_service import worker as scoring_worker
from reward_service.functions import text_rewards
from reward_service.preferences.judge import Judge
from reward_service.preferences.labelers import make_labeler
from reward_service.preferences.store import PreferenceStore
from reward_service.scoring import RewardError
from tests.command_line import command
from tests.integration.labeling_site import running_site
from tests.integration.labeling_site import task as page_task
from tests.json_server import Reply, serving
from tests.label_tasks import task
from tests.reward_batches import batch
from tests.written_run import write_run

PLANTED = {
    "REWARD_TOKEN": "planted-reward-token-1f9",
    "JUDGE_TOKEN": "planted-judge-token-2e8",
    "LABELS_URL": "postgresql+psycopg://rondo:planted-database-password-3d7@127.0.0.1:1/labels",
    "HF_TOKEN": "planted-hub-token-4c6",
    "WANDB_API_KEY": "planted-tracker-key-5b5",
    "RAY_AUTH_TOKEN": "planted-cluster-token-6a4",
    "AWS_SECRET_ACCESS_KEY": "planted-cloud-key-793",
}
NEEDLE = "planted-"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The secrets in the environment, and every logger at its most talkative."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    caplog.set_level(logging.DEBUG)
    return caplog


@contextmanager
def talkative_server() -> Iterator[str]:
    """An endpoint that refuses, and says which token it was sent."""

    def refuse(number: int, body: dict) -> Reply:
        sent = server.headers[-1]["Authorization"]
        return Reply({"error": {"message": f"no entry with {sent}"}}, 403 if number % 2 else 503)

    with serving(refuse) as server:
        yield server.url


def overrides(url: str, root: Path) -> list[str]:
    reward = f"{{kind: http, name: tone, url: '{url}', token_env: REWARD_TOKEN, attempts: 2, timeout_s: 5.0}}"
    return [
        f"run.dir={root}",
        "run.name=tides",
        f"scoring.rewards=[{reward}]",
        "models.critic.init=policy",
        "rounds.collect.comparisons=0",
        "rounds.overrides={}",
        f"rounds.evaluation.labeler={{kind: judge, model: wise, url: '{url}', token_env: JUDGE_TOKEN, attempts: 1}}",
        "rounds.store_env=LABELS_URL",
        "data.prompts.count=8",
        "data.eval_prompts.count=4",
        "data.demonstrations.count=60",
        "data.preferences.count=20",
    ]


def searched(root: Path) -> list[str]:
    """Name the files below a directory that hold a planted secret, in any part."""
    files = [path for path in root.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if NEEDLE.encode() in path.read_bytes()]


def test_nothing_of_a_run_holds_a_secret(tmp_path: Path, planted: pytest.LogCaptureFixture) -> None:
    shown: list[str] = []
    with talkative_server() as url:
        chosen = overrides(url, tmp_path / "runs")
        for arguments in (
            ("train", "quickstart", *chosen, "--dry-run"),
            ("plan", "quickstart", *chosen),
            ("train", "quickstart", *chosen, "rollout.worker=2", "--dry-run"),
            ("init", str(tmp_path / "mine.yaml")),
        ):
            ended = command(*arguments)
            assert ended.code == (2 if "rollout.worker=2" in arguments else 0), ended
            shown += [ended.out, ended.err]
        config = load("quickstart", chosen)
        preflight.check(config)
        directory = write_run(config)
        incident = _failing_reward(config, directory.incidents, shown)
        _failing_judge(config, shown)
        write_report(directory, config, None)
        run = str(directory.root)
        for arguments in (
            ("status", run),
            ("ckpt", "ls", run),
            ("ladder", run),
            ("report", run),  # the database that LABELS_URL names is not there
            ("label", "stats", run),
            ("label", "export", run, str(tmp_path / "labels.jsonl")),
            ("incident", "show", incident),
            ("resume", str(tmp_path / "nowhere")),
            ("--traceback", "report", run),
            ("data", "inspect", "examples.quickstart.data:preferences", "--limit", "3"),
        ):
            ended = command(*arguments)
            assert ended.code in (0, 2), ended
            shown += [ended.out, ended.err]
    shown.append(repr(config) + str(store_url) + config_hash(config))
    assert NEEDLE not in "".join(shown)
    assert NEEDLE not in planted.text
    assert searched(tmp_path) == []
    assert (directory.root / "incidents" / "dead-letters-tone.jsonl").exists()
    assert "127.0.0.1:1" in "".join(shown), "the database's address, without its password, is what helps"
    assert "REWARD_TOKEN" in directory.config.read_text()


def _failing_reward(config: RunConfig, incidents: Path, shown: list[str]) -> str:
    made = text_rewards(config, incidents)["tone"]
    found = ""
    for _ in range(4):
        with pytest.raises(RewardError) as caught:
            made.raw_scores(batch())
        found = str(caught.value.incident)
        shown += [str(caught.value), repr(caught.value.__dict__), repr(made.__dict__)]
    assert "[token]" in "".join(shown)
    return found


def _failing_judge(config: RunConfig, shown: list[str]) -> None:
    labeler = config.rounds.evaluation.labeler
    assert isinstance(labeler, JudgeConfig)
    for _ in range(2):
        judge = make_labeler(labeler, run_seed=0)
        assert isinstance(judge, Judge)
        try:
            shown.append(repr(judge.label([task("t", "x 2", "y 1")], now=time.time)))
        except (UserError, RuntimeError) as error:
            shown += [str(error), repr(error.__dict__), repr(judge.__dict__)]


def test_the_doctor_says_nothing_secret(planted: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://ada:planted-address-password@127.0.0.1:10001")
    ended = command("doctor")
    assert "RAY_ADDRESS=ray://" in ended.out
    assert NEEDLE not in ended.out + ended.err + planted.text


def test_a_job_and_its_workers_are_described_without_the_environment(
    tmp_path: Path, planted: pytest.LogCaptureFixture
) -> None:
    chosen = overrides("http://127.0.0.1:9/score", tmp_path)
    described = submit.description("quickstart", chosen, grace_s=30.5)
    assert shlex.split(described["entrypoint"])[:6] == ["python", "-m", "cluster.cli", "train", "quickstart", chosen[0]]
    assert set(described["runtime_env"]) == {"working_dir", "excludes", "env_vars"}
    # Ray kills a job that is stopped after so many seconds; the run commits within its grace time.
    assert described["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "36"}
    config = load("quickstart", chosen)
    environments = (
        scoring_worker.environment(config),
        learner_worker.environment(config),
        rollout_worker.environment(config.rollout, config.cluster.backend),
    )
    assert NEEDLE not in json.dumps([described, environments]) + planted.text


@pytest.mark.parametrize(
    "secret",
    [
        "scoring.rewards=[{kind: http, name: a, url: 'http://h/', token: planted-x}]",
        "scoring.rewards=[{kind: http, name: a, url: 'http://h/', token_env: planted-x}]",
        "scoring.rewards=[{kind: http, name: a, url: 'http://h/', token_env: hf_planted-x}]",
        "scoring.rewards=[{kind: http, name: a, url: 'http://me:planted-x@h/'}]",
        "scoring.rewards=[{kind: http, name: a, url: 'http://planted-x@h/'}]",
        "scoring.rewards=[{kind: http, name: a, url: 'http://h/?token=planted-x'}]",
        "rounds.labeler={kind: judge, model: m, url: 'http://h/', api_key: planted-x}",
        "rounds.store_env=postgresql+psycopg://me:planted-x@h/d",
        "tracking.wandb_key=planted-x",
        "api_key=planted-x",
    ],
)
def test_a_secret_in_the_configuration_is_refused_and_not_repeated(
    secret: str, tmp_path: Path, planted: pytest.LogCaptureFixture
) -> None:
    ended = command("train", "quickstart", f"run.dir={tmp_path}", "models.critic.init=policy", secret)
    assert ended.code == 2
    assert NEEDLE not in ended.out + ended.err + planted.text
    assert list(tmp_path.iterdir()) == []


def test_the_labeling_page_shows_no_secret(tmp_path: Path, planted: pytest.LogCaptureFixture) -> None:
    pages: list[str] = []
    with running_site(tmp_path, [page_task(number) for number in range(3)]) as site:
        for somebody in (site.join("Ana"), site.join("Eve", admin=True)):
            for path in ("/", "/mine", "/guide", "/admin", "/admin/people", "/nothing-here", "/label/none"):
                response = somebody.http.get(path)
                pages += [response.text, repr(response.headers)]
            page = somebody.look("/")
            pages += [page.html, somebody.answer(page, json=True, verdict="planted").text]
    assert any("Question number" in page for page in pages)
    assert NEEDLE not in "".join(pages) + planted.text
    assert searched(tmp_path) == []


def test_what_a_store_says_holds_no_password(planted: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError) as caught:
        PreferenceStore.open(os.environ["LABELS_URL"])
    chain: BaseException | None = caught.value
    said = []
    while chain is not None:
        said.append(str(chain) + repr(chain))
        chain = chain.__cause__ or chain.__context__
    assert "127.0.0.1:1" in said[0]
    assert NEEDLE not in "".join(said) + planted.text
