"""Rounds on the real stack, tiny: two of them, guards, people, and a driver that is killed in every phase."""

import json
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from protocol.records import text_of
from reward_service.preferences.records import Label, Outcome, stable_id
from reward_service.preferences.store import PreferenceStore
from tests.rondo_process import metrics_of, rondo, signalled_when, untimed
from tests.tiny_run import TINY, WITHOUT_WARMUP

ROOT = Path(__file__).parents[2]
ROUNDS = (
    *(setting for setting in TINY if not setting.startswith("rounds.")),
    WITHOUT_WARMUP,
    "learner.sft.num_steps=60",
    "rollout.max_response_tokens=40",
    "learner.reward_model.heldout_fraction=0.3",
    "rounds.iterations=2",
    "rounds.collect.comparisons=30",
    "rounds.collect.responses_per_task=2",
    "rounds.collect.samples_per_prompt=2",
    "rounds.gate.min_prompts=2",
    "rounds.evaluation.num_prompts=16",
    "rounds.evaluation.bootstrap_resamples=200",
    "run.name=rounds",
)


def overrides(directory: Path, *more: str) -> list[str]:
    return [*ROUNDS, f"run.dir={directory}", *more]


def store(run: Path) -> Any:
    return closing(PreferenceStore.open(f"sqlite:///{run / 'preferences.db'}", create=False))


def what_matters(run: Path) -> dict[str, Any]:
    """Everything that must not depend on where a run was interrupted."""
    with store(run) as preferences:
        labels = preferences.labels(standing_only=False)
        said = sorted((label.label_id, label.presented, label.outcome) for label in labels)
        tasks = preferences.tasks()
    ladder = json.loads((run / "ladder.json").read_text())
    return {
        "lineage": json.loads((run / "lineage.json").read_text()),
        "metrics": untimed(run),
        "tasks": tasks,
        "labels": said,
        "ladder": (ladder["comparisons_sha256"], ladder["ratings"], ladder["best"]),
        "comparisons": (run / "rounds" / "r002" / "comparisons.jsonl").read_bytes(),
        "weights": {
            str(path.relative_to(run)): path.read_bytes()
            for part in ("policies", "reward_models")
            for path in sorted((run / part).rglob("*.safetensors"))
        },
    }


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Two rounds in one go."""
    directory = tmp_path_factory.mktemp("runs")
    done = rondo("train", "quickstart", *overrides(directory))
    assert done.returncode == 0, done.stderr + done.stdout
    return directory / "rounds", done.stdout


def test_two_rounds_leave_what_they_made_and_where_it_came_from(played: tuple[Path, str]) -> None:
    run, output = played
    lines = metrics_of(run)
    assert [(line["counter/round"], line["counter/iteration"]) for line in lines] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert [line["counter/policy_version"] for line in lines] == [1, 2, 4, 5]  # 3 is what round 2 started from
    artefacts = json.loads((run / "lineage.json").read_text())
    assert set(artefacts) == {
        "policies/v000", "policies/v002", "policies/v005", "reward_models/v000", "reward_models/v000_heldout",
        "reward_models/v001", "reward_models/v001_heldout", "rounds/r002/comparisons.jsonl",
    }  # fmt: skip
    assert artefacts["rounds/r002/comparisons.jsonl"]["parents"] == ["policies/v002"]
    assert artefacts["reward_models/v001"]["parents"] == ["policies/v000", "rounds/r002/comparisons.jsonl"]
    for name in artefacts:
        assert (run / name).exists()
    ladder = json.loads((run / "ladder.json").read_text())
    assert {rating["version"] for rating in ladder["ratings"]} == {"v000", "v002", "v005"}
    assert "Ladder" in output
    status = rondo("status", str(run)).stdout
    assert "policies/v005 (round 2: 2 iterations)" in status


def test_the_held_out_reward_model_watches_and_rewards_nothing(played: tuple[Path, str]) -> None:
    run, _ = played
    for line in metrics_of(run):
        gap = line["score/reward_model"] - line["score/heldout"]
        assert line["score/heldout_gap"] == pytest.approx(gap, abs=1e-6)
    reports = [
        json.loads((run / "reward_models" / name / "reward_model_report.json").read_text())
        for name in ("v001", "v001_heldout")
    ]
    assert [report["trained_on"] for report in reports] == ["train", "heldout"]
    assert reports[0]["heldout"]["num_pairs"] == reports[1]["heldout"]["num_pairs"]
    assert set(reports[0]["sources"]) == {"base", "round 2"}


def test_the_gate_decides_aloud(played: tuple[Path, str]) -> None:
    run, output = played
    report = json.loads((run / "reward_models" / "v001" / "reward_model_report.json").read_text())
    decision = json.loads((run / "rounds" / "r002" / "refresh.json").read_text())
    assert decision["reward_version"] == (1 if report["gate"]["passed"] else 0)
    assert decision["why"] in " ".join(output.split())


def test_labels_come_from_the_simulated_labeler_once(played: tuple[Path, str]) -> None:
    run, _ = played
    with store(run) as preferences:
        tasks = preferences.tasks()
        labels = preferences.labels(standing_only=False)
    assert sorted(label.task_id for label in labels) == sorted(task.task_id for task in tasks)
    assert {label.labeler_kind for label in labels} == {"simulated"}
    training = [task for task in tasks if task.purpose == "training"]
    assert {candidate.policy for task in training for candidate in task.candidates} == {"v002"}
    assert all(text_of(task.prompt) for task in tasks)


def test_labels_can_be_taken_out(played: tuple[Path, str], tmp_path: Path) -> None:
    run, _ = played
    path = tmp_path / "preferences.jsonl"
    assert rondo("label", "export", str(run), str(path), "--format", "trl-preference").returncode == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {"prompt", "chosen", "rejected"} <= rows[0].keys()
    assert "Tasks" in rondo("label", "stats", str(run)).stdout
    assert rondo("ladder", str(run)).returncode == 0


@pytest.mark.slow
def test_a_guard_ends_a_round_and_says_why(tmp_path: Path) -> None:
    done = rondo(
        "train",
        "quickstart",
        *overrides(tmp_path, "rounds.count=1", "rounds.overrides={}", "rounds.collect.comparisons=0"),
        "rounds.guards.response_tokens_factor=0.5",
        "rounds.guards.window_iterations=1",
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "rounds"
    report = json.loads((run / "rounds" / "r001" / "round.json").read_text())
    assert report["iterations"] == 1
    assert "response length" in report["alarm"]
    assert "round 1 ends after iteration 1" in done.stderr
    assert (run / "policies" / "v001").is_dir()


@pytest.mark.slow
def test_a_run_waits_for_people_without_workers_and_goes_on_with_their_labels(tmp_path: Path) -> None:
    people = "{kind: people, max_wait_s: 2.0, poll_s: 0.5}"
    arguments = (
        "train",
        "quickstart",
        *overrides(tmp_path, "rounds.count=1", 'rounds.overrides={"1": {}}', f"rounds.labeler={people}"),
        "rounds.evaluation.labeler={kind: simulated, score: 'examples.quickstart.gold:score'}",
        "models.critic.init=policy",
    )
    waiting = rondo(*arguments)
    assert waiting.returncode == 75, waiting.stderr + waiting.stdout
    assert "waiting for people" in waiting.stdout
    assert "the same command waits again" in waiting.stdout
    run = tmp_path / "rounds"
    with store(run) as preferences:
        labelled = [label_next(preferences, labeler=f"person {number % 2}") for number in range(40)]
    assert 5 <= sum(labelled) < 40  # every task there is
    done = rondo(*arguments)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = (run / "rounds" / "r001" / "comparisons.jsonl").read_text().splitlines()
    assert 3 <= len(rows) <= sum(labelled)  # a pair with an empty side gives no row
    report = json.loads((run / "reward_models" / "v000" / "reward_model_report.json").read_text())
    assert set(report["sources"]) == {"base", "round 1"}


def label_next(preferences: PreferenceStore, *, labeler: str) -> bool:
    """Judge the next task, if there is one, as the page would record it: the longer answer wins."""
    now = time.time()
    lease = preferences.next_task(labeler, now=now, lease_s=60)
    if lease is None:
        return False
    winner = max(lease.task.candidates, key=lambda candidate: (len(candidate.text), candidate.text))
    label = Label(
        label_id=stable_id(lease.task.task_id, labeler),
        task_id=lease.task.task_id,
        labeler_id=labeler,
        labeler_kind="person",
        presented=lease.presented,
        outcome=Outcome(verdict="preference", winner=winner.candidate_id),
        shown_at=now,
        submitted_at=now,
    )
    return preferences.record(label, now=now, lease_required=True)


PHASES = (
    "Supervised fine-tuning", "Round 1: Reward model", "zero and unit", "responses to the held-out prompts",
    "iteration 2/2", "Round 1: Evaluation", "Round 1: Its place", "Round 2: Collecting", "Round 2: Labelling",
    "Round 2: Reward model", "Round 2: Rollout", "Round 2: Optimising", "Round 2: Evaluation", "Round 2: Its place",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_driver_killed_in_every_phase_makes_the_same_run(played: tuple[Path, str], tmp_path: Path) -> None:
    for phase in PHASES:
        signalled_when(phase, ["train", "quickstart", *overrides(tmp_path)], signal.SIGKILL)
    done = rondo("train", "quickstart", *overrides(tmp_path))
    assert done.returncode == 0, done.stderr + done.stdout
    ours, theirs = what_matters(tmp_path / "rounds"), what_matters(played[0])
    for what in theirs:
        assert ours[what] == theirs[what], what
