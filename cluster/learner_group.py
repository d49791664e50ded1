"""The learner's ranks as one role: they start, learn, publish, save and stop together."""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import ray

from cluster.deadlines import Deadlines, Kind
from cluster.pool import Member
from cluster.stacks import stacks_of
from cluster.supervision import DeadlineError, Handle, PlaceWatch, Watch, first_line, wait
from configs.cluster import DeadlinesConfig
from configs.run import RunConfig
from protocol.errors import BatchRefusedError, LearnerLostError, NoPlaceError, RollbackError, UserError
from protocol.messages import RolloutKey, SampleText, UpdateReport
from protocol.roles import Payload, Publication, ScoredReferences
from protocol.weights import Rendezvous, WeightManifest

_LOG = logging.getLogger(__name__)

if TYPE_CHECKING:
    from learner.comparisons import RewardModelJob

Progress = Callable[[str, dict[str, Any]], None]
_POLL_S = 1.0


class LearnerGroup:
    """All ranks behind the Learner role. One rank's failure is the group's: every method may raise LearnerLostError."""

    def __init__(self, config: RunConfig, *, make: Callable[[int, str], Handle]) -> None:
        self._deadlines = config.cluster.deadlines
        self._measured = Deadlines(self._deadlines)
        self._starting: PlaceWatch | None = None
        self._transfer = config.rollout.weight_transfer
        self._rolls_back = config.learner.on_nonfinite == "rollback"
        self._watch = Watch(silence_s=self._deadlines.silence_s)
        names = [f"learner-{rank}" for rank in range(config.learner.workers)]
        self.members = [Member(index=rank, name=name, handle=make(rank, name)) for rank, name in enumerate(names)]
        self._ranks = [member.handle for member in self.members]
        self.updates = 0
        """Batches that the ranks have been given to learn from."""

    def started(self, *, granted: Callable[[int], bool] = lambda rank: True) -> dict[str, str]:
        """Connect the ranks to each other, wait until they are, and say on which node each rank is.

        Args:
            granted: Says whether a rank has a place.

        Raises:
            NoPlaceError: If the cluster has no room for a rank.
        """
        self._starting = PlaceWatch(granted, placement_s=self._deadlines.placement_s)
        self._on(self._ranks, "start", "status")
        [(address, port)] = self._on([self._ranks[0]], "start", "address")
        self._on(self._ranks, "start", "connect", address, port)
        states = self._on(self._ranks, "start", "status")
        for member, state in zip(self.members, states, strict=True):
            member.met(state)
        self._starting = None  # whoever is lost from now on had a place
        return {member.name: str(member.node_id) for member in self.members}

    def train_sft(self, output: Path, *, progress: Progress) -> dict[str, Any]:
        """Fine-tune the policy on demonstrations; rank 0 writes it to `output`."""
        return self._watched("sft", progress, "train_sft", output)

    def train_reward_model(self, job: "RewardModelJob", *, progress: Progress) -> dict[str, Any]:
        """Train a reward model on comparisons; rank 0 writes it."""
        what = "held-out reward model" if job.half == "heldout" else "reward model"
        return self._watched(what, progress, "train_reward_model", job)

    def start_rl(self, *, policy: Path, reward_model: Path | None, iterations: int) -> None:
        """Build the policy's and the critic's engines; what was measured of those before does not count for them."""
        self._measured.forget()
        self._on(self._ranks, "start", "start_rl", policy=policy, reward_model=reward_model, iterations=iterations)

    def finish_rl(self) -> None:
        """Give up the policy's and the critic's engines."""
        self._on(self._ranks, "start", "finish_rl")

    def update(self, batch: ScoredReferences, *, round: int, iteration: int) -> UpdateReport:
        """Learn from a batch.

        Raises:
            LostDataError: If some of it is gone; the ranks are where they were.
            RollbackError: If the ranks refuse the batch and shall go back to the last checkpoint.
            BatchRefusedError: If they refuse it and the run shall stop.
        """
        groups = [(list(group.rollouts), group.rewards, group.reference) for group in batch.groups]
        tokens = sum(meta.response_tokens for meta in batch.metas)
        # All ranks have the batch before one begins: if any of it is gone, nothing has been learned.
        self._on(self._ranks, "learn", "receive", groups, size=tokens)
        self.updates += 1  # whatever becomes of it, the ranks are not where they were
        place = {"round": round, "iteration": iteration}
        try:
            return self._on(self._ranks, "learn", "update", size=tokens, **place)[0]
        except BatchRefusedError as error:
            if self._rolls_back:
                raise RollbackError(str(error), **place) from error
            raise

    def publish(self, *, policy_version: int) -> Publication:
        """Make a new version: collect references to its buckets as rank 0 gathers them, or announce a broadcast."""
        if self._transfer == "collective":
            # A member that hangs must leave the others time to come back through the object store; and the ranks that
            # gather with rank 0 wait for it in a collective of their own, which learn_s bounds.
            timeout_s = min(self._deadlines.publish_s, self._deadlines.learn_s) / 2
            manifest, rendezvous = self._on(self._ranks, "publish", "announce", policy_version, timeout_s=timeout_s)[0]
            broadcast = LearnerBroadcast(
                self, policy_version=policy_version, rendezvous=rendezvous, timeout_s=timeout_s
            )
            return Publication(manifest=manifest, broadcast=broadcast)
        with self.one_fate("publishing"), self._measured.measuring("publish", "publish"):
            refs = self.streamed(self._ranks, "publish", policy_version)
            manifest: WeightManifest = self.closing(refs)
        return Publication(manifest=manifest, buckets=tuple(refs[:-1]))

    def publish_stored(self, directory: Path, *, policy_version: int) -> Publication:
        """Collect references to the buckets of a policy that was exported before; rank 0 reads it alone."""
        with self.one_fate("publishing"):
            refs = self.streamed(self._ranks[:1], "publish_stored", policy_version, directory)
            manifest: WeightManifest = self.closing(refs)
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

    def carry_over(self, directory: Path) -> None:
        """Have every rank restore of an earlier round's state what outlives a round."""
        self._on(self._ranks, "checkpoint", "carry_over", directory)

    def export(self, directory: Path, *, card: dict[str, Any]) -> None:
        """Write the policy as a plain Hugging Face directory."""
        self._on(self._ranks, "checkpoint", "export", directory, card=card)

    def stop(self) -> None:
        """Stop all ranks."""
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)

    def streamed(self, ranks: Sequence[Handle], method: str, version: int, *args: Any) -> list[Any]:
        """Call a streaming method on ranks and collect the references that rank 0 yields."""
        bound = self._measured.bound("publish", method)
        deadline = monotonic() + bound.seconds
        streams = [getattr(rank, method).remote(version, *args) for rank in ranks]
        found: list[Any] = []
        for rank, stream in enumerate(streams):
            late = (
                f"publishing version {version}: learner-{rank} is not through after {bound.key} = {bound.seconds:.4g} s"
            )
            found += self._drained(stream, deadline=deadline, late=late)
        return found

    @contextmanager
    def one_fate(self, what: str) -> Generator[None]:
        """Tell a group that has lost a rank from a rank that raised an error of its own.

        A rank whose peer died may be the first to complain, of a closed connection; so the others are looked at.
        """
        try:
            yield
        except (UserError, NoPlaceError):
            raise
        except Exception as error:
            lost = self._watch.lost(self.members)
            if lost:
                names = ", ".join(f"{member.name} ({first_line(cause)})" for member, cause in lost)
                raise LearnerLostError(f"{what}: lost {names}", stacks=self._stacks()) from error
            if isinstance(error, DeadlineError):
                raise LearnerLostError(str(error), stacks=self._stacks()) from error
            raise

    def closing(self, refs: Sequence[Any]) -> Any:
        """Fetch the last item of a publish: the small one that says that all is there, or why not."""
        return self._waited(refs[-1:], "publish", what="the end of a publish")[0]

    def finished(self, refs: Sequence[Any], *, what: str) -> Any:
        """Wait for all ranks' part of a publish, and return rank 0's result."""
        with self.one_fate(what):
            return self._waited(refs, "publish", what=what)[0]

    def _stacks(self) -> dict[str, str]:
        """See what every rank is doing: the one that hangs, and what the others wait for."""
        found = {member.name: stacks_of(pid=member.pid, node_id=member.node_id) for member in self.members}
        return {name: stacks for name, stacks in found.items() if stacks is not None}

    def _drained(self, stream: Any, *, deadline: float, late: str) -> list[Any]:
        """Collect the references that a rank's publish yields (none from ranks other than 0)."""
        refs: list[Any] = []
        while True:
            left = max(0.0, deadline - monotonic())
            ready, _ = ray.wait([stream], timeout=min(left, self._watch.quiet_s), fetch_local=False)
            if not ready and monotonic() >= deadline:
                raise DeadlineError(late)
            if not ready:
                self._watch.require_answers(self.members)
                continue
            try:
                refs.append(next(stream))
            except StopIteration:
                return refs

    def _on(
        self, ranks: Sequence[Handle], kind: Kind, method: str, *args: Any, size: int = 1, **kwargs: Any
    ) -> list[Any]:
        """Call a method on ranks, under the bound of its kind or a measured one."""
        what = f"learner.{method} on {len(ranks)} rank{'s' if len(ranks) > 1 else ''}"
        with self.one_fate(what), self._measured.measuring(kind, method, size=size):
            refs = [getattr(rank, method).remote(*args, **kwargs) for rank in ranks]
            return self._waited(refs, kind, method, size=size, what=what)

    def _waited(self, refs: Sequence[Any], kind: Kind, work: str = "", *, size: int = 1, what: str) -> list[Any]:
        seconds, key = self._measured.bound(kind, work, size=size)
        watch = self._starting if kind == "start" else self._watch
        return wait(refs, deadline_s=seconds, what=what, key=key, watch=watch, workers=self.members)

    def _watched(self, what: str, progress: Progress, method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run a long stage on all ranks and pass rank 0's progress on."""
        deadline = monotonic() + self._deadlines.stage_s
        standstill = Standstill(self._deadlines, what)
        silence: dict[str, Any] = {"deadline_s": self._deadlines.silence_s, "key": "cluster.deadlines.silence_s"}
        with self.one_fate(what):
            refs = [getattr(rank, method).remote(*args, **kwargs) for rank in self._ranks]
            pending = list(refs)
            while pending:
                if monotonic() > deadline:
                    raise DeadlineError(f"{what}: not finished within cluster.deadlines.stage_s")
                done, pending = ray.wait(pending, num_returns=len(pending), timeout=_POLL_S)
                wait(done, what=what, **silence)
                if pending:
                    states = wait([rank.status.remote() for rank in self._ranks], what=f"{what}: status", **silence)
                    progress(what, states[0])
                    standstill.look(states)
            return wait(refs[:1], what=what, **silence)[0]


class Standstill:
    """Finds a stage whose ranks answer and get nowhere.

    Between its first report and its last a stage takes steps, whose gaps are measured like any other work. Before and
    after, it may load, read, compile and write for long: the configured bound holds, which is that of the ranks' own
    waits for each other.

    Args:
        deadlines: The bounds.
        what: The stage.
    """

    def __init__(self, deadlines: DeadlinesConfig, what: str) -> None:
        self._measured = Deadlines(deadlines)
        self._unmeasured = Deadlines(deadlines)
        self._what = what
        self._seen: list[Any] = []
        self._since = monotonic()
        self._stepping = False

    def look(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Compare what the ranks say with what they said before.

        Raises:
            DeadlineError: If nothing has changed for too long.
        """
        seen = [(state["state"], state["progress"].get("step"), state["beats"]) for state in states]
        if seen != self._seen:
            reports = [state["progress"] for state in states]
            stepping = all(report and 0 < report.get("step", 0) < report["steps"] for report in reports)
            if stepping and self._stepping:
                self._measured.measured("learn", self._what, seconds=monotonic() - self._since)
            self._seen, self._since, self._stepping = seen, monotonic(), stepping
            return
        seconds, key = (self._measured if self._stepping else self._unmeasured).bound("learn", self._what)
        if monotonic() - self._since > seconds:
            where = ", ".join(f"{state} at step {step}" for state, step, _ in seen)
            raise DeadlineError(f"{self._what}: no rank has got on ({where}) within {key} = {seconds:.4g} s")


class LearnerBroadcast:
    """The Broadcast of one version, over the ranks that announced it."""

    def __init__(
        self,
        group: LearnerGroup,
        *,
        policy_version: int,
        rendezvous: Rendezvous,
        timeout_s: float,
    ) -> None:
        self.rendezvous = rendezvous
        self.timeout_s = timeout_s
        self._group = group
        self._version = policy_version
        self._sending: list[Any] = []
        self._stored: tuple[Payload, ...] = ()

    def send(self, *, receivers: int) -> None:
        """Have all ranks gather, and rank 0 send to those that join."""
        self._sending = [
            member.handle.broadcast.remote(self._version, receivers=receivers, timeout_s=self.timeout_s)
            for member in self._group.members
        ]

    def excuse(self, receivers: Sequence[int]) -> None:
        """Tell rank 0 to go on without these."""
        self._group.members[0].handle.excuse.remote(list(receivers))

    def finish(self) -> None:
        """Wait until all ranks are through."""
        failure = self._group.finished(self._sending, what=f"the broadcast of version {self._version}")
        if failure is not None:
            _LOG.warning("the broadcast of version %d did not reach everybody: %s", self._version, failure)

    def stored(self) -> tuple[Payload, ...]:
        """Gather the buckets once more, into the object store."""
        if not self._stored:
            ranks = [member.handle for member in self._group.members]
            with self._group.one_fate(f"publishing version {self._version} once more"):
                refs = self._group.streamed(ranks, "buckets", self._version)
                self._group.closing(refs)
            self._stored = tuple(refs[:-1])
        return self._stored
