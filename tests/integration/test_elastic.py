"""Rollout workers that join and leave while a run goes on: real actors, and a real run on a cluster that changes."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.elastic import Elastic, Surroundings, ask_to_leave, leaving
from cluster.pool import Anywhere, Pool
from cluster.run_directory import RunDirectory
from configs.cluster import DeadlinesConfig
from protocol.errors import UserError
from tests.integration.cluster_run import run_on_cluster
from tests.integration.test_faults import incidents_of, responses_of
from tests.rondo_process import rondo, untimed
from tests.tiny_run import tiny_config, tiny_overrides


@ray.remote(num_cpus=0)
class Worker:
    """Somebody who is there."""

    def __init__(self, name: str) -> None:
        if name == "rollout-3":
            raise RuntimeError("no engine")

    def status(self) -> dict[str, Any]:
        return {"state": "idle", "pid": 0, "node_id": ray.get_runtime_context().get_node_id()}


class Room(Anywhere):
    """Places that are granted when the test says so."""

    def __init__(self, num: int) -> None:
        super().__init__(range(num))
        self.known = num
        self.asked = False
        self.open = False

    def another(self) -> int | None:
        self.asked = True
        if not self.open:
            return None
        self.known += 1
        self.asked = False
        self.indices = [*self.indices, self.known - 1]
        return self.known - 1

    def enough(self) -> None:
        self.asked = False


class Setting:
    """A pool of two and what it follows."""

    def __init__(self, directory: Path) -> None:
        config = tiny_config(directory, "rollout.workers=2", "rollout.max_workers=3", "cluster.worker_replacements=1")
        self.room = Room(2)
        self.draining: set[str] = set()
        self.noted: list[str] = []
        self.leaving = directory / "leaving"
        self.pool = Pool(
            role="rollout",
            places=self.room,
            make=lambda index, name: Worker.remote(name),
            deadlines=DeadlinesConfig(),
            replacements=1,
            report=lambda incident: None,
        )
        self.pool.started()
        surroundings = Surroundings(
            leaving=self.leaving,
            draining=lambda: self.draining,
            note=lambda nodes: self.noted.__setitem__(slice(None), list(nodes)),
        )
        self.elastic = Elastic(self.pool, self.room, config, surroundings)

    def wish(self, name: str) -> None:
        """Ask a worker to leave, as the command does."""
        self.leaving.mkdir(exist_ok=True)
        (self.leaving / name).touch()

    @property
    def names(self) -> list[str]:
        return [member.name for member in self.pool.members]

    def renew_until(self, names: list[str]) -> None:
        deadline = time.monotonic() + 60
        while self.names != names:
            assert time.monotonic() < deadline, self.names
            time.sleep(0.1)
            self.elastic.renew()


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def setting(cluster: None, tmp_path: Path) -> Iterator[Setting]:
    made = Setting(tmp_path)
    yield made
    made.elastic.stop()
    made.pool.stop()


def test_a_worker_joins_when_there_is_room_and_not_before(setting: Setting) -> None:
    for _ in range(3):
        setting.elastic.renew()
    assert setting.names == setting.noted == ["rollout-0", "rollout-1"]
    assert setting.room.asked
    setting.room.open = True
    setting.renew_until(["rollout-0", "rollout-1", "rollout-2"])
    assert setting.noted == setting.names
    for _ in range(3):
        setting.elastic.renew()
    assert setting.room.known == 3  # there are as many as there may be
    assert not setting.room.asked


def test_who_is_asked_to_leave_leaves_for_good_down_to_the_minimum(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    setting.room.open = True
    setting.renew_until(["rollout-0", "rollout-1", "rollout-2"])
    setting.wish("rollout-1")
    setting.wish("rollout-7")
    with caplog.at_level(logging.INFO):
        setting.elastic.renew()
    assert setting.names == ["rollout-0", "rollout-2"]
    assert setting.room.indices == [0, 2]  # its place is given back
    assert "rollout-1 leaves: as asked for" in caplog.text
    assert "rollout-7 shall leave, but there is no such worker" in caplog.text
    assert leaving(setting.leaving) == set()
    for _ in range(3):
        setting.elastic.renew()
    assert setting.room.known == 3  # nobody is sought in its place
    for name in ("rollout-0", "rollout-2"):
        setting.wish(name)
    setting.elastic.renew()
    assert setting.names == ["rollout-2"]
    assert "rollout-2 stays: the run needs rollout.min_workers" in caplog.text


def test_a_node_that_is_drained_is_left_when_another_worker_has_come(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    setting.draining = {str(setting.pool.members[0].node_id)}  # all are on it, so that one must stay
    setting.elastic.renew()
    setting.elastic.renew()
    assert setting.names == ["rollout-1"]
    assert caplog.text.count("rollout-1 stays") == 1
    assert setting.room.asked  # elsewhere
    setting.room.open = True
    setting.draining = set()
    setting.renew_until(["rollout-1", "rollout-2"])


def test_who_does_not_start_is_given_up_and_tried_as_often_as_configured(
    setting: Setting, caplog: pytest.LogCaptureFixture
) -> None:
    setting.room.open = True
    setting.room.another()  # so that the next one is the one that fails
    deadline = time.monotonic() + 60
    while "rollout-3 did not start" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        setting.elastic.renew()
    setting.elastic.renew()
    assert setting.names == ["rollout-0", "rollout-1"]
    assert setting.room.known == 4
    assert 3 not in setting.room.indices


@pytest.mark.parametrize("name", ["learner-0", "../config.yaml", "rollout-", "rollout-1/x", ""])
def test_nobody_else_may_be_asked_to_leave(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="is no rollout worker"):
        ask_to_leave(RunDirectory(tmp_path), name)
    assert not (tmp_path / "leaving").exists()


MEANWHILE = """
import pathlib, time
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
root = pathlib.Path(config.run.dir) / config.run.name

def until(what, found):
    deadline = time.monotonic() + 400
    while not found():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    print("MEANWHILE", what, round(time.monotonic() - began, 1), flush=True)

def present():
    return json.loads((root / "workers.json").read_text())

began = time.monotonic()
until("an iteration", lambda: (root / "metrics.jsonl").exists() and (root / "metrics.jsonl").stat().st_size)
node = add(for_rollout=1)
until("rollout-1 is there", lambda: "rollout-1" in present())
assert present()["rollout-1"] == node.node_id
gcs = ray._private.worker.global_worker.gcs_client
reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
gcs.drain_node(node.node_id, reason, "test", int((time.time() + 600) * 1000))
until("rollout-1 is gone", lambda: "rollout-1" not in present())
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_that_comes_while_a_run_goes_on_is_used_until_it_is_drained(tmp_path: Path) -> None:
    """The scorer is paused again and again, so that a few iterations last as long as a worker takes to start."""
    settings = ("rollout.max_workers=2", "rounds.iterations=10", "cluster.deadlines.silence_s=60.0")
    undisturbed = rondo("train", "quickstart", *tiny_overrides(tmp_path / "undisturbed", *settings), timeout_s=600)
    assert undisturbed.returncode == 0, undisturbed.stderr
    done = run_on_cluster(
        tmp_path / "changing",
        *settings,
        "cluster.placement.rollout.resources.for_rollout=1",
        nodes=[{"for_rollout": 1.0}],
        faults=[f"reward-0:scoring:pause=15@{iteration}" for iteration in range(1, 9)],
        meanwhile=MEANWHILE,
        timeout_s=900,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert "MEANWHILE rollout-1 is gone" in done.stdout, done.stderr[-3000:] + done.stdout[-3000:]
    ours, theirs = tmp_path / "changing" / "tiny", tmp_path / "undisturbed" / "tiny"
    assert incidents_of(ours) == []
    assert responses_of(ours) == responses_of(theirs)
    for one, other in zip(untimed(ours), untimed(theirs), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
