"""Whole nodes that die in the middle of a run, with their workers and all objects on them."""

from pathlib import Path

import pytest

from tests.integration.cluster_run import run_on_cluster
from tests.integration.test_faults import incidents_of, responses_of
from tests.rondo_process import rondo, untimed
from tests.tiny_run import tiny_overrides

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SETTINGS = (
    "rollout.workers=2",
    "rounds.iterations=5",
    "cluster.checkpoint_period_iterations=2",
    "cluster.deadlines.silence_s=40.0",
)
PINNED = (
    "cluster.placement.rollout.resources.for_rollout=1",
    "cluster.placement.scoring.resources.for_scoring=1",
    "cluster.placement.learner.resources.for_learner=1",
)
HOME = {"for_scoring": 2.0, "for_learner": 1.0}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    done = rondo("train", "quickstart", *tiny_overrides(directory, *SETTINGS), timeout_s=600)
    assert done.returncode == 0, done.stderr + done.stdout
    return directory / "tiny"


def check_same(directory: Path, undisturbed: Path) -> None:
    assert responses_of(directory) == responses_of(undisturbed)
    for ours, theirs in zip(untimed(directory), untimed(undisturbed), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)


def test_the_node_of_all_rollout_workers_dies_and_another_takes_its_place(undisturbed: Path, tmp_path: Path) -> None:
    rollout_node = {"for_rollout": 2.0}
    done = run_on_cluster(
        tmp_path,
        *SETTINGS,
        *PINNED,
        nodes=[HOME, rollout_node, rollout_node],
        faults=["rollout-0:serving:node@1"],
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert "fault: rollout-0:serving:node@1" in done.stdout
    found = incidents_of(tmp_path / "tiny")
    lost = [incident["where"] for incident in found if incident["kind"] == "worker_lost"]
    assert {"rollout-0", "rollout-1"} <= set(lost), done.stdout
    assert {incident["kind"] for incident in found} <= {"worker_lost", "batch_lost"}
    check_same(tmp_path / "tiny", undisturbed)


def test_a_node_dies_and_there_is_no_room_for_its_rollout_worker(undisturbed: Path, tmp_path: Path) -> None:
    """The other worker's place is as good as before: it is replaced there, although that takes more than 5 s."""
    rollout_node = {"for_rollout": 1.0}
    done = run_on_cluster(
        tmp_path,
        *SETTINGS,
        *PINNED,
        "cluster.deadlines.placement_s=5",
        nodes=[HOME, rollout_node, rollout_node],
        faults=["rollout-0:serving:node@1", "rollout-1:serving:kill@3"],
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert "fault: rollout-1:serving:kill@3" in done.stdout
    [unplaced] = [i for i in incidents_of(tmp_path / "tiny") if i["kind"] == "worker_unplaced"]
    assert unplaced["action"] == "the run goes on with 1 rollout worker"
    check_same(tmp_path / "tiny", undisturbed)


def test_the_learner_goes_on_on_another_node(undisturbed: Path, tmp_path: Path) -> None:
    learner_node = {"for_learner": 1.0}
    done = run_on_cluster(
        tmp_path,
        *SETTINGS,
        *PINNED,
        nodes=[{"for_scoring": 2.0, "for_rollout": 2.0}, learner_node, learner_node],
        faults=["learner-0:update:node@3"],
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert [incident["kind"] for incident in incidents_of(tmp_path / "tiny")] == ["learner_lost"]
    check_same(tmp_path / "tiny", undisturbed)


def test_a_learner_without_room_stops_the_run_with_the_cause(tmp_path: Path) -> None:
    done = run_on_cluster(
        tmp_path,
        *SETTINGS,
        *PINNED,
        "cluster.deadlines.placement_s=5",
        nodes=[{"for_scoring": 2.0, "for_rollout": 2.0}, {"for_learner": 1.0}],
        faults=["learner-0:update:node@1"],
    )
    assert done.returncode == 1
    assert "the cluster had no room for learner-0" in done.stderr
