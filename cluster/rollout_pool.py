"""The rollout workers as one role: requests dealt out by position, responses streamed back, versions proven."""

import logging
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any

import ray
from ray.exceptions import RayTaskError

from cluster import schedule
from cluster.deadlines import Deadlines
from cluster.elastic import Elastic
from cluster.generation import Generation
from cluster.pool import Anywhere, Member, Places, Pool, Report
from cluster.supervision import (
    FAILURES,
    GONE,
    LATE,
    DeadlineError,
    Handle,
    UnprovenWorkerError,
    Watch,
    cause_of,
    first_line,
    wait,
)
from configs.cluster import DeadlinesConfig
from configs.rollout import RolloutConfig
from protocol.errors import LearnerLostError, LostDataError
from protocol.incidents import Incident
from protocol.messages import Rollout, RolloutMeta, RolloutRequest
from protocol.roles import Broadcast, Finished, Publication, RolloutRef, resolve
from protocol.weights import VersionProof, WeightManifest

_LOG = logging.getLogger(__name__)


class RolloutPool:
    """Rollout workers behind the RolloutPool role."""

    def __init__(
        self,
        config: RolloutConfig,
        deadlines: DeadlinesConfig,
        *,
        make: Callable[[int, str], Handle],
        replacements: int,
        report: Report,
        places: Places | None = None,
        follow: Callable[[Pool], Elastic] | None = None,
    ) -> None:
        self._config = config
        self._deadlines = deadlines
        self._measured = Deadlines(deadlines)
        self._watch = Watch(silence_s=deadlines.silence_s)
        self._pool = Pool(
            role="rollout",
            places=places or Anywhere(range(config.workers)),
            make=make,
            deadlines=deadlines,
            replacements=replacements,
            minimum=config.min_workers,
            report=report,
        )
        self._elastic = None if follow is None else follow(self._pool)
        self._report = report
        self._publication: Publication | None = None

    @property
    def members(self) -> list[Member]:
        """The workers that fill the pool's places now."""
        return self._pool.members

    def started(self) -> dict[str, str]:
        """Wait until every engine is ready, and say on which node each worker is."""
        return self._pool.started()

    def generate(self, requests: Sequence[RolloutRequest], *, policy_version: int) -> Iterator[Finished]:
        """Yield each response as it is finished; what a lost worker owed is asked of its replacement."""
        members = self._pool.members
        parts = schedule.dealt(requests, workers=len(members))
        owed = {member.index: part for member, part in zip(members, parts, strict=True)}
        batch = Generation(self, self._watch, owed, policy_version=policy_version)
        with self._measured.measuring("generate", size=len(requests)):
            yield from batch.responses(bound=lambda: self._measured.bound("generate", size=len(requests)))

    def load(self, publication: Publication) -> tuple[VersionProof, ...]:
        """Bring every worker to the published version and have each prove it; before that, let workers come and go."""
        if self._elastic is not None and self._elastic.renew():
            self._measured.forget()  # another number of workers takes another time
        self._publication = publication
        with self._measured.measuring("publish"):
            if publication.broadcast is None:
                refs = [self._load(member.handle, publication) for member in self._pool.members]
            else:
                refs = self._received(publication.manifest, publication.broadcast)
            members = self._pool.members
            proofs = [self._brought(member, ref, publication) for member, ref in zip(members, refs, strict=True)]
            return tuple(proof for proof in proofs if proof is not None)

    def fetch(self, finished: Sequence[Finished]) -> list[Rollout]:
        """Bring responses to this process, for people to read or for a file.

        Raises:
            LostDataError: If some are gone with the node or the worker that sampled them.
        """
        timeout_s = self._deadlines.generate_s
        try:
            return resolve([f.payload for f in finished], lambda steps: ray.get(steps, timeout=timeout_s))
        except GONE as error:
            raise LostDataError(f"sampled responses are gone: {first_line(error)}") from error

    def stop(self) -> None:
        """Stop every worker."""
        if self._elastic is not None:
            self._elastic.stop()
        self._pool.stop()

    def replace(self, member: Member, error: BaseException) -> tuple[Member, Any]:
        """Put a new worker in a lost one's place, and have it load the current version as soon as it has started.

        Returns:
            The worker, and a reference that is ready when it may be admitted.
        """
        fresh = self._pool.replace(member, cause=error)
        self._measured.forget()
        return fresh, self._ready(fresh)

    def _ready(self, fresh: Member) -> Any:
        """Have a new worker load the current version; the reference is ready when it may be admitted."""
        if self._publication is None:  # it loads version 0 from the same directory as the others
            return fresh.handle.status.remote()
        return self._load(fresh.handle, self._publication)

    def admit(self, fresh: Member, ref: Any) -> VersionProof | None:
        """Let a replacement serve, once it has proven the current version.

        Args:
            fresh: The worker.
            ref: What `replace` gave.

        Returns:
            Its proof; None if nothing has been published yet.

        Raises:
            NoPlaceError: If the cluster has no room for it.
            UnprovenWorkerError: If it cannot prove that version, or is lost otherwise: it must be replaced in turn.
            LearnerLostError: If the published weights are gone, which lay with the learner.
        """
        self._pool.admit(fresh)
        try:
            return None if self._publication is None else self._proven(fresh, ref, self._publication)
        except LostDataError as error:
            raise LearnerLostError(f"the weights for {fresh.name} are gone with the learner's node") from error

    def without_place(self, member: Member) -> bool:
        """Say whether the cluster has had no room for a replacement for too long."""
        return self._pool.without_place(member)

    def overdue(self, member: Member) -> DeadlineError | None:
        """Say whether a replacement takes too long to start, and to load what was published."""
        return self._pool.overdue(member, loading_s=0.0 if self._publication is None else self._deadlines.publish_s)

    def leave(self, member: Member) -> None:
        """Go on without a worker that has no place."""
        self._pool.leave(member)

    def _load(self, handle: Handle, publication: Publication) -> Any:
        timeout_s = self._deadlines.publish_s
        return handle.load.remote(publication.manifest, list(publication.stored()), timeout_s=timeout_s)

    def _received(self, manifest: WeightManifest, broadcast: Broadcast) -> list[Any]:
        """Have every worker join a broadcast and the learner send; wait until all are through or late.

        Every rank of an engine is a receiver of its own. What became of a worker is judged from its reference, like
        any other load. The bound is the configured one: a broadcast has half of that, and who misses it loads from the
        object store.
        """
        deadline = monotonic() + self._deadlines.publish_s
        size = self._config.tensor_parallel
        refs = {
            member.handle.join.remote(
                manifest, broadcast.rendezvous, first_receiver=place * size, timeout_s=broadcast.timeout_s
            ): range(place * size, (place + 1) * size)
            for place, member in enumerate(self._pool.members)
        }
        broadcast.send(receivers=len(refs) * size)
        pending = list(refs)
        while pending:
            done, pending = ray.wait(pending, timeout=max(0.0, deadline - monotonic()))
            if not done:
                break
            if lost := [receiver for ref in done if _is_lost(ref) for receiver in refs[ref]]:
                broadcast.excuse(lost)  # the others need not wait for a worker that died before it joined
        broadcast.finish()
        return list(refs)

    def _brought(self, member: Member, ref: Any, publication: Publication) -> VersionProof | None:
        """Wait for a worker's proof, or for its replacement's.

        Returns:
            The proof; None if the worker was lost and the cluster has no room for another.
        """
        try:
            return self._proven(member, ref, publication)
        except (*LATE, LostDataError) as error:
            self._measured.forget()
            return self._pool.refill(member, cause=error, admit=lambda fresh: self.admit(fresh, self._ready(fresh)))

    def _proven(self, member: Member, ref: Any, publication: Publication) -> VersionProof:
        """Judge a worker's proof; without a good one it is fenced, and loads the version once more.

        Raises:
            UnprovenWorkerError: If it fails again. Whoever is lost raises what it was lost of.
            LostDataError: If the weights did not come, twice.
        """
        try:
            return self._judged(member, ref, publication.manifest)
        except LATE:
            raise
        except Exception as error:  # noqa: BLE001 - the supervision boundary: whatever it was, it is no proof
            proving = f"could not prove version {publication.manifest.policy_version}"
            _LOG.warning("%s is fenced, it %s: %s", member.name, proving, first_line(error))
            self._report(
                Incident(
                    kind="worker_fenced",
                    what=f"{member.name} {proving}: {first_line(error)}",
                    where=member.name,
                    cause=str(error),
                    action="it loads the version once more, and is replaced if that fails too",
                )
            )
        ref = self._load(member.handle, publication)  # what the learner fails at is not this worker's fault
        try:
            return self._judged(member, ref, publication.manifest)
        except (*LATE, LostDataError):
            raise
        except Exception as error:
            raise UnprovenWorkerError(f"{member.name} {proving}, twice: {first_line(error)}") from error

    def _judged(self, member: Member, ref: Any, manifest: WeightManifest) -> VersionProof:
        what = f"{member.name} loading version {manifest.policy_version}"
        seconds, key = self._measured.bound("publish")
        [proof] = wait([ref], deadline_s=seconds, what=what, key=key, watch=self._watch, workers=[member])
        check_proof(proof, manifest, bound=self._config.logprob_gap_bound)
        return proof


class StaleProofError(RuntimeError):
    """A worker's proof does not match what was published."""


def check_proof(proof: VersionProof, manifest: WeightManifest, *, bound: float) -> None:
    """Compare a worker's proof with what the learner published.

    Raises:
        StaleProofError: If version, fingerprint or checksum differ, or the canary's gap is over the bound.
    """
    if proof.policy_version != manifest.policy_version or proof.fingerprint != manifest.fingerprint:
        raise StaleProofError(
            f"{proof.worker} holds version {proof.policy_version} ({proof.fingerprint}), the learner published "
            f"{manifest.policy_version} ({manifest.fingerprint})"
        )
    if proof.loaded_checksum != manifest.loaded_checksum:
        raise StaleProofError(f"{proof.worker} received version {proof.policy_version} but computes with other weights")
    if not proof.canary_gap_max <= bound:  # NaN fails too
        raise StaleProofError(
            f"{proof.worker}: engine and learner differ by {proof.canary_gap_max:.3g} nats on the canary, over "
            f"rollout.logprob_gap_bound = {bound:g}"
        )


def _is_lost(ref: Any) -> bool:
    try:
        ray.get(ref)
    except RayTaskError as error:  # first: it is an actor error too, where that is what the worker met
        return isinstance(cause_of(error), FAILURES)  # else it is alive, and has left the broadcast by itself
    except FAILURES:
        return True
    return False


def put(rollouts: Sequence[Rollout]) -> list[Finished]:
    """Bring responses that were kept in a file back to where the workers can read them."""
    step = ray.put(tuple(rollouts))
    return [
        Finished(meta=RolloutMeta.of(rollout), payload=RolloutRef(step=step, place=place))
        for place, rollout in enumerate(rollouts)
    ]
