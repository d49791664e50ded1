"""Several nodes, jobs and tokens: real raylets, a real head, a real job."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_run import tiny_overrides

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))
TOKEN = "a-token-for-this-test-alone-0123456789abcdef"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_roles_run_on_their_own_nodes_of_a_three_node_cluster(tmp_path: Path) -> None:
    """Three rollout workers, two reward workers, two learner ranks, each role pinned to a node by a custom resource."""
    code = f"""
from pathlib import Path
from ray.cluster_utils import Cluster
from rich.console import Console
from cluster import launch
from tests.tiny_run import tiny_config

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": 4, "resources": {{"rollout_node": 10}}}})
cluster.add_node(num_cpus=4, resources={{"scoring_node": 10}})
cluster.add_node(num_cpus=4, resources={{"learner_node": 10}})
config = tiny_config(
    Path({str(tmp_path)!r}), f"cluster.address={{cluster.address}}", "rollout.workers=3", "scoring.workers=2",
    "learner.workers=2", "learner.zero_stage=2", "rounds.iterations=2",
    "cluster.placement.rollout.resources.rollout_node=1", "cluster.placement.scoring.resources.scoring_node=1",
    "cluster.placement.learner.resources.learner_node=1",
)
launch.train(config, Console())
cluster.shutdown()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    assert "iteration 2/2" in done.stdout
    nodes: dict[str, str] = json.loads((tmp_path / "tiny" / "workers.json").read_text())
    assert sorted(nodes) == [
        "learner-0", "learner-1", "reference-0", "reward-0", "reward-1", "rollout-0", "rollout-1", "rollout-2",
    ]  # fmt: skip
    by_role: dict[str, set[str]] = {"rollout": set(), "re": set(), "learner": set()}
    for name, node in nodes.items():
        by_role["re" if name.startswith("re") else name.split("-")[0]].add(node)
    assert [len(found) for found in by_role.values()] == [1, 1, 1]
    assert len(set.union(*by_role.values())) == 3


@pytest.fixture
def head() -> Iterator[dict[str, str]]:
    """A real local head with token authentication, on ports of its own."""
    port, dashboard = free_port(), free_port()
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [RAY, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}", "--num-cpus=4",
               "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
               # Another Ray on this machine would hold the default one, and then no agent starts jobs.
               f"--dashboard-agent-listen-port={free_port()}", "--block"]  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", dashboard)) == 0:
                break
        time.sleep(0.3)
    yield {"address": address, **{name: environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}}
    process.terminate()
    process.wait(timeout=60)


def submit(head: dict[str, str], token: str | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "RAY_AUTH_MODE": "token"}
    environment.pop("RAY_AUTH_TOKEN", None)
    environment["RAY_AUTH_TOKEN_PATH"] = "/nonexistent"
    if token is not None:
        environment["RAY_AUTH_TOKEN"] = token
    command = [RAY, "job", "submit", "--address", head["address"], "--working-dir", ".", "--",
               sys.executable, "-m", "cluster.cli", *arguments]  # fmt: skip
    deadline = time.monotonic() + 180
    while True:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False
        )
        # The dashboard answers before the agent that starts jobs does.
        if "No available agent" not in done.stdout + done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(1)


@pytest.mark.slow
def test_a_job_trains_with_the_token_and_is_refused_without(head: dict[str, str], tmp_path: Path) -> None:
    arguments = ("train", "quickstart", *tiny_overrides(tmp_path, "rounds.iterations=1"))
    refused = submit(head, "the-wrong-token-0123456789abcdef0123456789", *arguments)
    assert refused.returncode != 0
    assert not (tmp_path / "tiny").exists()
    without = submit(head, None, *arguments)
    assert without.returncode != 0
    assert not (tmp_path / "tiny").exists()

    done = submit(head, TOKEN, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "iteration 1/1" in done.stdout
    assert (tmp_path / "tiny" / "evaluation.json").exists()
    assert TOKEN not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_job_that_would_lose_its_results_is_refused(head: dict[str, str]) -> None:
    done = submit(head, TOKEN, "train", "quickstart")
    assert done.returncode != 0
    assert "would be lost" in done.stdout
