"""Workers that die or stop in the middle of a run: it goes on, and ends where the undisturbed run ends."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from tests.rondo_process import metrics_of, rondo, untimed
from tests.tiny_run import tiny_overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SETTINGS = ("rounds.iterations=5", "cluster.checkpoint_period_iterations=2", "cluster.deadlines.silence_s=20.0")


def run(directory: Path, *faults: str, never: Sequence[str] = ()) -> tuple[Path, str]:
    options = [part for fault in (*faults, *never) for part in ("--fault", fault)]
    done = rondo("train", "quickstart", *options, *tiny_overrides(directory, *SETTINGS), timeout_s=500)
    assert done.returncode == 0, done.stderr + done.stdout
    for fault in faults:
        assert f"fault: {fault} (process " in done.stdout  # it did happen
    for fault in never:
        assert f"fault: {fault} NEVER HAPPENED" in done.stdout
    return directory / "tiny", done.stdout


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("undisturbed"))[0]


def incidents_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((directory / "incidents").glob("*.json"))]


def responses_of(directory: Path) -> dict[str, list[int]]:
    rows = [row for path in sorted((directory / "rollouts").iterdir()) for row in parquet.read_table(path).to_pylist()]
    return {f"{row['round']}/{row['iteration']}/{row['prompt_id']}/{row['sample']}": row["response"] for row in rows}


def test_a_run_survives_the_loss_of_every_kind_of_worker(undisturbed: Path, tmp_path: Path) -> None:
    directory, output = run(
        tmp_path,
        "rollout-0:serving:kill@1",
        "reward-0:scoring:kill@1",
        "reference-0:scoring:stop@2",
        "rollout-0:serving:stop@3",
    )
    found = incidents_of(directory)
    assert [(i["kind"], i["where"].split(".")[0]) for i in sorted(found, key=lambda i: i["at"])] == [
        ("worker_lost", "rollout-0"),
        ("worker_lost", "reward-0"),
        ("worker_silent", "reference-0"),
        ("worker_silent", "rollout-0"),
    ]
    assert all("replaces it" in incident["action"] for incident in found)
    assert all(incident["data"]["stacks"] for incident in found if incident["kind"] == "worker_silent")
    assert output.count("incident: ") == 4
    # A replacement samples what was owed in other batches than the lost worker would have: the tokens are the same, the
    # last bits of their log-probs need not be.
    assert responses_of(directory) == responses_of(undisturbed)
    for ours, theirs in zip(untimed(directory), untimed(undisturbed), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("fault", ["learner-0:update:kill@3", "learner-0:publish:stop@1", "learner-0:save:kill@4"])
def test_the_learner_goes_on_from_its_checkpoint_bit_for_bit(undisturbed: Path, tmp_path: Path, fault: str) -> None:
    directory, _ = run(tmp_path, fault)
    [incident] = incidents_of(directory)
    assert incident["kind"] == "learner_lost"
    assert "learner-0" in incident["what"]
    assert untimed(directory) == untimed(undisturbed)
    for path in sorted((undisturbed / "policies").rglob("*.safetensors")):
        assert (directory / path.relative_to(undisturbed)).read_bytes() == path.read_bytes()


def test_a_short_pause_is_no_loss(undisturbed: Path, tmp_path: Path) -> None:
    pauses = ("rollout-0:serving:pause=4@1", "learner-0:update:pause=4@2")
    directory, _ = run(tmp_path, *pauses, never=["rollout-7:serving:kill"])
    assert incidents_of(directory) == []
    assert untimed(directory) == untimed(undisturbed)


@pytest.mark.parametrize("who", ["reference-0:scoring", "learner-0:update", "driver-0:serving"])
def test_an_exception_ends_the_run_with_its_cause_and_the_same_command_goes_on(
    undisturbed: Path, tmp_path: Path, who: str
) -> None:
    """Another worker would meet the same error again: it is not tried."""
    arguments = tiny_overrides(tmp_path, *SETTINGS)
    done = rondo("train", "quickstart", "--fault", f"{who}:raise@3", *arguments)
    assert done.returncode == 1, done.stderr + done.stdout
    assert "an exception on purpose" in done.stderr
    again = rondo("train", "quickstart", *arguments)
    assert again.returncode == 0, again.stderr + again.stdout
    assert untimed(tmp_path / "tiny") == untimed(undisturbed)


def test_an_exception_in_a_rollout_worker_costs_its_engine_or_ends_the_run_with_the_cause(
    undisturbed: Path, tmp_path: Path
) -> None:
    """Inside an engine's step it breaks that engine, which is replaced; anywhere else another worker would meet it too.

    The fault strikes wherever the worker happens to be, nearly always in a step. Both ends are right, and both keep
    what was sampled.
    """
    arguments = tiny_overrides(tmp_path, *SETTINGS)
    done = rondo("train", "quickstart", "--fault", "rollout-0:serving:raise@3", *arguments)
    assert "an exception on purpose" in done.stderr
    if done.returncode == 0:
        [incident] = incidents_of(tmp_path / "tiny")
        assert incident["kind"] == "worker_lost"
        assert "InjectedError" in incident["what"]
    else:
        assert done.returncode == 1, done.stderr + done.stdout
        again = rondo("train", "quickstart", *arguments)
        assert again.returncode == 0, again.stderr + again.stdout
    assert responses_of(tmp_path / "tiny") == responses_of(undisturbed)
    for ours, theirs in zip(untimed(tmp_path / "tiny"), untimed(undisturbed), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_a_batch_that_is_refused_again_after_a_rollback_stops_the_run_with_the_cause(tmp_path: Path) -> None:
    """A bound that no engine keeps refuses the first batch: all ranks go back, meet the same batch, and it is said."""
    strict = ("learner.on_nonfinite=rollback", "learner.guards.logprob_gap_mean_nats=1e-12")
    done = rondo("train", "quickstart", *tiny_overrides(tmp_path, *SETTINGS, *strict))
    assert done.returncode == 1, done.stderr + done.stdout
    assert "learner.guards.logprob_gap_mean_nats" in done.stderr
    found = incidents_of(tmp_path / "tiny")
    assert {incident["kind"] for incident in found} == {"untrusted_batch", "rolled_back"}
    rollbacks = sorted((i for i in found if i["kind"] == "rolled_back"), key=lambda incident: incident["at"])
    assert len(rollbacks) == 2
    assert rollbacks[1]["action"] == "the run stops: after a rollback the learner refuses the same iteration again"
    assert metrics_of(tmp_path / "tiny") == []  # nothing was learned from it


def test_a_run_without_replacements_left_keeps_what_it_has_and_says_why(tmp_path: Path) -> None:
    settings = tiny_overrides(tmp_path, *SETTINGS, "cluster.worker_replacements=0")
    done = rondo("train", "quickstart", "--fault", "rollout-0:serving:kill@3", *settings)
    assert done.returncode == 1
    assert "cluster.worker_replacements is used up" in done.stderr
    directory = tmp_path / "tiny"
    assert sorted(path.name for path in (directory / "checkpoints").iterdir())[-1] == "r001-i000003"
    [incident] = incidents_of(directory)
    assert incident["action"].startswith("the run stops")
    assert (incident["round"], incident["iteration"]) == (1, 3)
