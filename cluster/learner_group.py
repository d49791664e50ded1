"""The learner's ranks as one role: they start, learn, publish, save and stop together."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.pool import DeadlineError, Handle, node_of, wait
from configs.run import RunConfig
from protocol.messages import RolloutKey, SampleText, UpdateReport
from protocol.roles import Payload, Publication, ScoredReferences
from protocol.weights import Rendezvous, WeightManifest

_LOG = logging.getLogger(__name__)

if TYPE_CHECKING:
    from learner.comparisons import RewardModelJob

Progress = Callable[[str, dict[str, Any]], None]
_POLL_S = 1.0


class LearnerGroup:
    """All ranks behind the Learner role. One rank's failure is the group's."""

    def __init__(self, config: RunConfig, *, make: Callable[[int, str], Handle]) -> None:
        self._deadlines = config.cluster.deadlines
        self._transfer = config.rollout.weight_transfer
        self._ranks = [make(rank, f"learner-{rank}") for rank in range(config.learner.workers)]

    def started(self) -> dict[str, str]:
        """Connect the ranks to each other, wait until they are, and say on which node each rank is."""
        [(address, port)] = self._on([self._ranks[0]], "start", "address")
        self._on(self._ranks, "start", "connect", address, port)
        states = self._on(self._ranks, "start", "status")
        return {f"learner-{rank}": node_of(state) for rank, state in enumerate(states)}

    def train_sft(self, output: Path, *, progress: Progress) -> dict[str, Any]:
        """Fine-tune the policy on demonstrations; rank 0 writes it to `output`."""
        return self._watched("sft", progress, "train_sft", output)

    def train_reward_model(self, job: "RewardModelJob", *, progress: Progress) -> dict[str, Any]:
        """Train a reward model on comparisons; rank 0 writes it."""
        what = "held-out reward model" if job.half == "heldout" else "reward model"
        return self._watched(what, progress, "train_reward_model", job)

    def start_rl(self, *, policy: Path, reward_model: Path | None, iterations: int) -> None:
        """Build the policy's and the critic's engines."""
        self._on(self._ranks, "start", "start_rl", policy=policy, reward_model=reward_model, iterations=iterations)

    def finish_rl(self) -> None:
        """Give up the policy's and the critic's engines."""
        self._on(self._ranks, "start", "finish_rl")

    def update(self, batch: ScoredReferences, *, round: int, iteration: int) -> UpdateReport:
        """Learn from a batch."""
        groups = [(list(group.rollouts), group.rewards, group.reference) for group in batch.groups]
        return self._on(self._ranks, "learn", "update", groups, round=round, iteration=iteration)[0]

    def publish(self, *, policy_version: int) -> Publication:
        """Make a new version: collect references to its buckets as rank 0 gathers them, or announce a broadcast."""
        if self._transfer == "collective":
            # A member that hangs must leave the others time to come back through the object store; and the ranks that
            # gather with rank 0 wait for it in a collective of their own, which learn_s bounds.
            timeout_s = min(self._deadlines.publish_s, self._deadlines.learn_s) / 2
            manifest, rendezvous = self._on(self._ranks, "publish", "announce", policy_version, timeout_s=timeout_s)[0]
            broadcast = LearnerBroadcast(
                self._ranks,
                policy_version=policy_version,
                rendezvous=rendezvous,
                timeout_s=timeout_s,
                publish_s=self._deadlines.publish_s,
            )
            return Publication(manifest=manifest, broadcast=broadcast)
        refs = _streamed(self._ranks, "publish", policy_version, deadline_s=self._deadlines.publish_s)
        manifest: WeightManifest = _closing(refs, deadline_s=self._deadlines.publish_s)
        return Publication(manifest=manifest, buckets=tuple(refs[:-1]))

    def publish_stored(self, directory: Path, *, policy_version: int) -> Publication:
        """Collect references to the buckets of a policy that was exported before; rank 0 reads it alone."""
        seconds = self._deadlines.publish_s
        refs = _streamed(self._ranks[:1], "publish_stored", policy_version, directory, deadline_s=seconds)
        manifest: WeightManifest = _closing(refs, deadline_s=seconds)
        return Publication(manifest=manifest, buckets=tuple(refs[:-1]))

    def samples(
        self, batch: ScoredReferences, *, keys: Sequence[RolloutKey], report: UpdateReport
    ) -> tuple[SampleText, ...]:
        """Decode a few responses of the last batch."""
        return self._on(self._ranks[:1], "learn", "samples", list(keys))[0] if keys else ()

    def write_rollouts(self, path: Path) -> None:
        """Write the last batch as Parquet."""
        self._on(self._ranks[:1], "learn", "write_rollouts", path)

    def save(self, directory: Path) -> None:
        """Have every rank write its part of the state."""
        self._on(self._ranks, "checkpoint", "save", directory)

    def load(self, directory: Path) -> None:
        """Have every rank restore its part of the state."""
        self._on(self._ranks, "checkpoint", "load", directory)

    def export(self, directory: Path, *, card: dict[str, Any]) -> None:
        """Write the policy as a plain Hugging Face directory."""
        self._on(self._ranks, "checkpoint", "export", directory, card=card)

    def stop(self) -> None:
        """Stop all ranks."""
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)

    def _on(self, ranks: Sequence[Handle], deadline: str, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        refs = [getattr(rank, method).remote(*args, **kwargs) for rank in ranks]
        key = f"{deadline}_s"
        what = f"learner.{method} on {len(refs)} rank{'s' if len(refs) > 1 else ''}"
        return wait(refs, deadline_s=getattr(self._deadlines, key), what=what, key=f"cluster.deadlines.{key}")

    def _watched(self, what: str, progress: Progress, method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run a long stage on all ranks and pass rank 0's progress on."""
        refs = [getattr(rank, method).remote(*args, **kwargs) for rank in self._ranks]
        deadline = monotonic() + self._deadlines.stage_s
        pending, failed = list(refs), False
        while pending and not failed:
            if monotonic() > deadline:
                raise DeadlineError(f"{what}: not finished within cluster.deadlines.stage_s")
            done, pending = ray.wait(pending, num_returns=len(pending), timeout=_POLL_S)
            failed = any(_has_failed(ref) for ref in done)  # the others may wait for a dead rank for ever
            if pending and not failed:
                progress(what, ray.get(self._ranks[0].status.remote(), timeout=self._deadlines.start_s))
        return wait(refs if not failed else done, deadline_s=_POLL_S, what=what, key="cluster.deadlines.stage_s")[0]


class LearnerBroadcast:
    """The Broadcast of one version, over the ranks that announced it."""

    def __init__(
        self,
        ranks: Sequence[Handle],
        *,
        policy_version: int,
        rendezvous: Rendezvous,
        timeout_s: float,
        publish_s: float,
    ) -> None:
        self.rendezvous = rendezvous
        self.timeout_s = timeout_s
        self._ranks = ranks
        self._version = policy_version
        self._publish_s = publish_s
        self._sending: list[Any] = []
        self._stored: tuple[Payload, ...] = ()

    def send(self, *, receivers: int) -> None:
        """Have all ranks gather, and rank 0 send to those that join."""
        self._sending = [
            rank.broadcast.remote(self._version, receivers=receivers, timeout_s=self.timeout_s) for rank in self._ranks
        ]

    def excuse(self, receivers: Sequence[int]) -> None:
        """Tell rank 0 to go on without these."""
        self._ranks[0].excuse.remote(list(receivers))

    def finish(self) -> None:
        """Wait until all ranks are through."""
        what = f"learner.broadcast of version {self._version} on {len(self._ranks)} ranks"
        key = "cluster.deadlines.publish_s"
        failure = wait(self._sending, deadline_s=self._publish_s, what=what, key=key)[0]
        if failure is not None:
            _LOG.warning("the broadcast of version %d did not reach everybody: %s", self._version, failure)

    def stored(self) -> tuple[Payload, ...]:
        """Gather the buckets once more, into the object store."""
        if not self._stored:
            refs = _streamed(self._ranks, "buckets", self._version, deadline_s=self._publish_s)
            _closing(refs, deadline_s=self._publish_s)
            self._stored = tuple(refs[:-1])
        return self._stored


def _has_failed(ref: Any) -> bool:
    try:
        ray.get(ref)
    except (RayTaskError, RayActorError):
        return True
    return False


def _streamed(ranks: Sequence[Handle], method: str, version: int, *args: Any, deadline_s: float) -> list[Any]:
    """Call a streaming method on all ranks and collect the references that rank 0 yields."""
    deadline = monotonic() + deadline_s
    streams = [getattr(rank, method).remote(version, *args) for rank in ranks]
    return [ref for stream in streams for ref in _drain(stream, deadline=deadline, version=version)]


def _closing(refs: Sequence[Any], *, deadline_s: float) -> Any:
    """Fetch the last item of a stream: the small one that says that all is there, or why not."""
    [item] = wait(refs[-1:], deadline_s=deadline_s, what="the end of a publish", key="cluster.deadlines.publish_s")
    return item


def _drain(stream: Any, *, deadline: float, version: int) -> list[Any]:
    """Collect the references that a rank's publish yields (none from ranks other than 0)."""
    refs: list[Any] = []
    while True:
        ready, _ = ray.wait([stream], timeout=max(0.0, deadline - monotonic()), fetch_local=False)
        if not ready:
            raise DeadlineError(f"publishing version {version}: not finished within cluster.deadlines.publish_s")
        try:
            refs.append(next(stream))
        except StopIteration:
            return refs
