"""A tiny run on a cluster of several nodes on this machine, each a real raylet with an object store of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.tiny_run import tiny_overrides

ROOT = Path(__file__).parents[2]
CODE = """
import json, socket, sys, threading
import ray
from ray.cluster_utils import Cluster
from rich.console import Console
from cluster import launch
from cluster.faults import parse
from configs.load import load

nodes, overrides, faults, meanwhile = json.loads(sys.argv[1])

def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]

def add(**resources):
    return cluster.add_node(num_cpus=4, resources=resources, dashboard_agent_listen_port=free_port())

# Ray would keep what is as small as in a tiny run with the driver, where no node's death reaches it.
head = {"num_cpus": 4, "resources": nodes[0], "include_dashboard": False,
        "dashboard_agent_listen_port": free_port(), "_system_config": {"max_direct_call_object_size": 0}}
cluster = Cluster(initialize_head=True, head_node_args=head)
added = [add(**resources) for resources in nodes[1:]]
# For a node that cleans up by itself Ray handles a signal, which it may not in a thread. Later ones end with the head.
cluster._shutdown_at_exit = False
config = load("quickstart", [*overrides, f"cluster.address={cluster.address}"])
if meanwhile:
    threading.Thread(target=lambda: exec(meanwhile, globals()), daemon=True).start()
try:
    launch.train(config, Console(width=200), faults=[parse(text) for text in faults])
finally:
    cluster.shutdown()
"""


def cluster_command(
    overrides: Sequence[str],
    *,
    nodes: Sequence[dict[str, float]],
    faults: Sequence[str] = (),
    meanwhile: str = "",
) -> list[str]:
    """Write down how the tiny run is trained on a cluster of its own.

    Args:
        overrides: Of its configuration.
        nodes: The custom resources of every node, the head's first.
        faults: What shall go wrong.
        meanwhile: Code that runs in a thread; it knows `cluster`, `added` (the nodes but the head), `add` and `config`.

    Returns:
        The command; it must run at the root of the sources.
    """
    return [sys.executable, "-c", CODE, json.dumps([list(nodes), list(overrides), list(faults), meanwhile])]


def run_on_cluster(
    directory: Path,
    *overrides: str,
    nodes: Sequence[dict[str, float]],
    faults: Sequence[str] = (),
    meanwhile: str = "",
    timeout_s: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Train the tiny run on a cluster of its own, as `cluster_command` says, in a directory of its own."""
    return subprocess.run(
        cluster_command(tiny_overrides(directory, *overrides), nodes=nodes, faults=faults, meanwhile=meanwhile),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        # Several nodes on one busy machine take longer to start than the 30 s that Ray allows one.
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_raylet_start_wait_time_s": "180"},
    )
