"""The Ray process of one learner rank.

Learning, publishing and saving share one thread; `status` has a concurrency group of its own and answers meanwhile. A
rank never restarts alone: when one fails the whole group is started again from the last checkpoint.
"""

import os
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import ray

from configs.run import RunConfig
from protocol.messages import RolloutKey, SampleText, UpdateReport
from protocol.roles import RolloutRef, resolve
from protocol.weights import ByteArray, Rendezvous, WeightManifest

if TYPE_CHECKING:
    import socket

    from learner.comparisons import RewardModelJob
    from learner.rank import Group, Rank
    from protocol.broadcast import Meeting

CONTROL_GROUP = "control"

GroupReferences = tuple[Sequence[RolloutRef], Any, Any]
"""Where a group's rollouts lie, and references to its RewardScores and ReferenceLogprobs."""


class LearnerRank:
    """One rank behind Ray: fetches what is passed by reference and hands it to the rank."""

    def __init__(self, *, rank: int, world_size: int, config: RunConfig, run_directory: Path) -> None:
        """Take a place among the ranks.

        Args:
            rank: This one.
            world_size: All of them.
            config: The run's configuration.
            run_directory: Of the run.
        """
        self._number = rank
        self._world_size = world_size
        self._config = config
        self._run_directory = Path(run_directory)
        self._listener: socket.socket | None = None
        self._meeting: Meeting | None = None
        self._rank: Rank | None = None
        self._received: list[Group] = []
        self._doing = "starting"

    def address(self) -> tuple[str, int]:
        """Open the meeting place of the ranks (rank 0 only).

        Returns:
            Address and port; the loopback address where all nodes are this machine.
        """
        self._listener = _listen()
        address, port = self._listener.getsockname()
        return address, port

    def connect(self, address: str, port: int) -> None:
        """Join the other ranks.

        Args:
            address: What rank 0's `address` returned.
            port: Likewise.
        """
        # The driver imports this module to describe the actor; torch and DeepSpeed take seconds.
        from learner.distributed import init_distributed
        from learner.rank import Rank

        context = init_distributed(
            rank=self._number,
            world_size=self._world_size,
            address=address,
            port=port,
            listener=self._listener,
            timeout_s=self._config.cluster.deadlines.learn_s,
        )
        self._rank = Rank(context, config=self._config, run_directory=self._run_directory)
        self._doing = "idle"

    def train_sft(self, output: Path) -> dict[str, Any]:
        """Fine-tune the policy on demonstrations; rank 0 writes it to `output`."""
        with self._does("sft") as rank:
            return rank.train_sft(output=output)

    def train_reward_model(self, job: "RewardModelJob") -> dict[str, Any]:
        """Train a reward model on comparisons; rank 0 writes it."""
        with self._does("reward model") as rank:
            return rank.train_reward_model(job)

    def start_rl(self, *, policy: Path, reward_model: Path | None, iterations: int) -> None:
        """Build the engines of policy and critic."""
        with self._does("start") as rank:
            rank.start_rl(policy=policy, reward_model=reward_model, iterations=iterations)

    def finish_rl(self) -> None:
        """Give up the engines of policy and critic."""
        with self._does("finish") as rank:
            rank.finish_rl()

    def receive(self, groups: Sequence[GroupReferences]) -> None:
        """Fetch scored groups, in key order, for the next `update`.

        Raises:
            ray.exceptions.GetTimeoutError: If a reference does not come within `cluster.deadlines.score_s`.
            ray.exceptions.RayError: If what it refers to is gone.
        """
        timeout_s = self._config.cluster.deadlines.score_s
        with self._does("receive"):
            # One call fetches everything; rollouts that one engine step finished lie in one object.
            steps = dict.fromkeys(ref.step for rollouts, _, _ in groups for ref in rollouts)
            scores = [ref for _, rewards, reference in groups for ref in (rewards, reference)]
            found = dict(zip([*steps, *scores], ray.get([*steps, *scores], timeout=timeout_s), strict=True))
            self._received = [
                (resolve(rollouts, lambda refs: [found[ref] for ref in refs]), found[rewards], found[reference])
                for rollouts, rewards, reference in groups
            ]

    def update(self, *, round: int, iteration: int) -> UpdateReport:
        """Learn from the groups that were received.

        Raises:
            BatchRefusedError: If the batch must not be learned from.
        """
        with self._does("update") as rank:
            groups, self._received = self._received, []
            return rank.update(groups, round=round, iteration=iteration)

    def publish(self, policy_version: int) -> Iterator[ByteArray | WeightManifest]:
        """Yield the buckets of a new version and then its manifest, on rank 0; nothing elsewhere."""
        with self._does("publish") as rank:
            yield from rank.publish(policy_version)

    def publish_stored(self, policy_version: int, directory: Path) -> Iterator[ByteArray | WeightManifest]:
        """Yield the buckets and the manifest of an exported policy, on rank 0; nothing elsewhere."""
        with self._does("publish") as rank:
            yield from rank.publish_stored(policy_version, directory)

    def announce(self, policy_version: int, *, timeout_s: float) -> tuple[WeightManifest, Rendezvous] | None:
        """Publish a new version that will be broadcast.

        Args:
            policy_version: The number of the new version.
            timeout_s: The bound on every wait at the meeting.

        Returns:
            The manifest, and where receivers join, on rank 0; None elsewhere.
        """
        with self._does("publish") as rank:
            manifest = rank.announce(policy_version)
        if manifest is None:
            return None
        # The driver imports this module to describe the actor; torch takes seconds.
        from protocol.broadcast import Meeting

        self._meeting = Meeting(_listen(), timeout_s=timeout_s)
        return manifest, self._meeting.rendezvous

    def broadcast(self, policy_version: int, *, receivers: int, timeout_s: float) -> str | None:
        """Send an announced version to those that join, once.

        Args:
            policy_version: The version.
            receivers: How many are invited.
            timeout_s: How long the broadcast may take.

        Returns:
            Why not everybody who joined got everything; None if they did.
        """
        meeting = self._meeting
        try:
            with self._does("broadcast") as rank:
                return rank.broadcast(policy_version, meeting, receivers=receivers, timeout_s=timeout_s)
        finally:
            self._meeting = None
            if meeting is not None:
                meeting.close()

    @ray.method(concurrency_group=CONTROL_GROUP)
    def excuse(self, receivers: Sequence[int]) -> None:
        """Go on without receivers that are dead, also while this rank waits for them (rank 0 only)."""
        meeting = self._meeting
        if meeting is not None:
            meeting.excuse(receivers)

    def buckets(self, policy_version: int) -> Iterator[ByteArray | int]:
        """Yield the buckets of an announced version and then how many they were, on rank 0; nothing elsewhere."""
        count = 0
        with self._does("publish") as rank:
            for bucket in rank.buckets(policy_version):
                yield bucket
                count += 1
        if count:
            yield count

    def samples(self, keys: Sequence[RolloutKey]) -> tuple[SampleText, ...]:
        """Decode a few responses of the last batch."""
        with self._does("samples") as rank:
            return rank.samples(keys)

    def write_rollouts(self, path: Path) -> None:
        """Write the last batch as Parquet."""
        with self._does("rollouts") as rank:
            rank.write_rollouts(path)

    def save(self, directory: Path) -> None:
        """Write this rank's part of the state."""
        with self._does("save") as rank:
            rank.save(directory)

    def load(self, directory: Path) -> None:
        """Restore this rank's part of the state; the files must have been verified."""
        with self._does("load") as rank:
            rank.load(directory)

    def carry_over(self, directory: Path) -> None:
        """Restore what outlives a round; the files must have been verified."""
        with self._does("load") as rank:
            rank.carry_over(directory)

    def export(self, directory: Path, *, card: dict[str, Any]) -> None:
        """Write the policy as a plain Hugging Face directory."""
        with self._does("export") as rank:
            rank.export(directory, card=card)

    @ray.method(concurrency_group=CONTROL_GROUP)
    def status(self) -> dict[str, Any]:
        """Say what this rank is doing, and how far it is."""
        return {
            "rank": self._number,
            "state": self._doing,
            "progress": {} if self._rank is None else self._rank.progress,
            "beats": 0 if self._rank is None else self._rank.beats,
            "policy_version": None if self._rank is None else self._rank.policy_version,
            "pid": os.getpid(),
            "node_id": ray.get_runtime_context().get_node_id(),
            "resident_bytes": psutil.Process().memory_info().rss,
        }

    @contextmanager
    def _does(self, what: str) -> Generator["Rank"]:
        if self._rank is None:
            raise RuntimeError("connect comes first")
        self._doing = what
        try:
            yield self._rank
        finally:
            self._doing = "idle"


def _listen() -> "socket.socket":
    """Listen where the others can connect: on the loopback device where all nodes are this machine."""
    from learner.distributed import LOOPBACK, listen

    hosts = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    return listen(LOOPBACK if len(hosts) == 1 else ray.util.get_node_ip_address())


def environment(config: RunConfig) -> dict[str, str]:
    """List the variables that a learner process needs before it imports torch.

    Args:
        config: The run's configuration.

    Returns:
        Names and values, for a Ray `runtime_env` or a subprocess.
    """
    threads = str(config.learner.threads_per_worker)
    variables = {
        "DS_ACCELERATOR": config.cluster.backend,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        # Threads that spin while they wait for each other stand still for milliseconds when a core is shared.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        # torch says at every collective of DeepSpeed's that its name will change.
        "PYTHONWARNINGS": "ignore::FutureWarning",
    }
    if config.cluster.backend == "cpu":
        # gloo looks the host's name up otherwise, and listens where that leads.
        variables["CUDA_VISIBLE_DEVICES"] = ""
    return variables


def remote_class() -> Any:
    """Wrap the rank for Ray; it is the group that decides what happens after a failure."""
    options: dict[str, Any] = {"concurrency_groups": {CONTROL_GROUP: 1}, "max_restarts": 0, "max_task_retries": 0}
    wrap: Any = ray.remote(**options)
    return wrap(LearnerRank)
