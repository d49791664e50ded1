"""The rollout workers as one role: requests dealt out by position, responses streamed back, versions proven."""

import logging
from collections.abc import Callable, Iterator, Sequence
from time import monotonic
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayTaskError

from cluster import schedule
from cluster.pool import FAILURES, DeadlineError, Handle, Member, Pool, cause_of, wait
from configs.cluster import DeadlinesConfig
from configs.rollout import RolloutConfig
from protocol.messages import Rollout, RolloutMeta, RolloutRequest
from protocol.roles import Broadcast, Finished, Payload, Publication, RolloutRef, resolve
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
    ) -> None:
        self._config = config
        self._deadlines = deadlines
        self._pool = Pool(role="rollout", size=config.workers, make=make, replacements=replacements)
        self._publication: Publication | None = None

    @property
    def members(self) -> list[Member]:
        """The workers that fill the pool's places now."""
        return self._pool.members

    def started(self) -> dict[str, str]:
        """Wait until every engine is ready, and say on which node each worker is."""
        return self._pool.started(deadline_s=self._deadlines.start_s)

    def generate(self, requests: Sequence[RolloutRequest], *, policy_version: int) -> Iterator[Finished]:
        """Yield each response as it is finished; what a lost worker owed is asked of its replacement."""
        deadline = monotonic() + self._deadlines.generate_s
        shares = schedule.shares(len(requests), workers=len(self._pool.members))
        owed = {
            member.index: {requests[i].key: requests[i] for i in share}
            for member, share in zip(self._pool.members, shares, strict=True)
        }
        streams = {self._stream(m, owed[m.index], policy_version): m for m in self._pool.members if owed[m.index]}
        while streams:
            ready, _ = ray.wait(list(streams), timeout=max(0.0, deadline - monotonic()), fetch_local=False)
            if not ready:
                waiting = "; ".join(f"{m.name} owes {len(owed[m.index])} responses" for m in streams.values())
                raise DeadlineError(f"generating: not finished within cluster.deadlines.generate_s: {waiting}")
            stream: Any = ready[0]
            member = streams[stream]
            try:
                taken = _take(stream, deadline=deadline, worker=member.name)
            except FAILURES as error:
                del streams[stream]
                fresh = self._replace(member, error)
                streams[self._stream(fresh, owed[member.index], policy_version)] = fresh
                continue
            except RayTaskError as error:
                raise cause_of(error) from None
            if taken is None:
                del streams[stream]
                continue
            for place, meta in enumerate(taken.metas):
                del owed[member.index][meta.key]
                yield Finished(meta=meta, payload=RolloutRef(step=taken.payload, place=place))
        lost = [str(key) for share in owed.values() for key in share]
        if lost:
            raise RuntimeError(f"the rollout workers ended without {len(lost)} responses, the first: {lost[0]}")

    def load(self, publication: Publication) -> tuple[VersionProof, ...]:
        """Bring every worker to the published version and have each prove it."""
        self._publication = publication
        if publication.broadcast is None:
            refs = [self._load(member.handle, publication) for member in self._pool.members]
        else:
            refs = self._received(publication.manifest, publication.broadcast)
        return tuple(
            self._proven(member, ref, publication) for member, ref in zip(list(self._pool.members), refs, strict=True)
        )

    def fetch(self, finished: Sequence[Finished]) -> list[Rollout]:
        """Bring responses to this process, for people to read or for a file."""
        timeout_s = self._deadlines.generate_s
        return resolve([f.payload for f in finished], lambda steps: ray.get(steps, timeout=timeout_s))

    def stop(self) -> None:
        """Stop every worker."""
        self._pool.stop()

    def _stream(self, member: Member, owed: dict[Any, RolloutRequest], policy_version: int) -> Any:
        return member.handle.generate.remote(list(owed.values()), policy_version=policy_version)

    def _load(self, handle: Handle, publication: Publication) -> Any:
        timeout_s = self._deadlines.publish_s
        return handle.load.remote(publication.manifest, list(publication.stored()), timeout_s=timeout_s)

    def _received(self, manifest: WeightManifest, broadcast: Broadcast) -> list[Any]:
        """Have every worker join a broadcast and the learner send; wait until all are through or late.

        Every rank of an engine is a receiver of its own. What became of a worker is judged from its reference, like
        any other load.
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

    def _proven(self, member: Member, ref: Any, publication: Publication) -> VersionProof:
        """Judge a worker's proof; a worker without a good one is fenced, refreshed, and replaced if that fails."""
        try:
            return self._judged(member, ref, publication.manifest)
        except Exception as error:  # noqa: BLE001 - the supervision boundary: whatever it was, it is no proof
            _LOG.warning(
                "%s is fenced, it could not prove version %d: %s",
                member.name,
                publication.manifest.policy_version,
                _first_line(error),
            )
            return self._refreshed(member, publication, error)

    def _judged(self, member: Member, ref: Any, manifest: WeightManifest) -> VersionProof:
        what = f"{member.name} loading version {manifest.policy_version}"
        [proof] = wait([ref], deadline_s=self._deadlines.publish_s, what=what, key="cluster.deadlines.publish_s")
        check_proof(proof, manifest, bound=self._config.logprob_gap_bound)
        return proof

    def _refreshed(self, member: Member, publication: Publication, first: BaseException) -> VersionProof:
        """Load the version once more, and into a fresh process if it fails again."""
        if not isinstance(first, (*FAILURES, DeadlineError)):
            try:
                return self._judged(member, self._load(member.handle, publication), publication.manifest)
            except Exception as error:  # noqa: BLE001 - likewise
                first = error
        fresh = self._pool.replace(member, cause=first)
        return self._judged(fresh, self._load(fresh.handle, publication), publication.manifest)

    def _replace(self, member: Member, error: BaseException) -> Member:
        """Fill a lost worker's place and bring the new one to the current version before it serves."""
        _LOG.warning("%s is lost (%s); starting a replacement", member.name, _first_line(error))
        fresh = self._pool.replace(member, cause=error)
        if self._publication is None:
            return fresh  # it has loaded version 0 from the same directory as the others
        self._judged(fresh, self._load(fresh.handle, self._publication), self._publication.manifest)
        return fresh


class _Step(NamedTuple):
    """What one engine step finished."""

    payload: Payload
    metas: Sequence[RolloutMeta]


def _take(stream: Any, *, deadline: float, worker: str) -> _Step | None:
    """Read one step from a worker's stream: a payload, which is only passed on, and what the driver may know of it.

    Returns:
        The step, or None at the end of the stream.

    Raises:
        DeadlineError: If the worker stops between a payload and its description.
        Exception: What the worker raised or died of; it comes in the place of an item and ends the stream.
    """
    try:
        payload = next(stream)
    except StopIteration:
        return None
    ready, _ = ray.wait([stream], timeout=max(0.0, deadline - monotonic()), fetch_local=False)
    if not ready:
        raise DeadlineError(f"generating: {worker} stopped in a step; cluster.deadlines.generate_s is over")
    left_s = max(0.0, deadline - monotonic())
    try:
        return _Step(payload, ray.get(next(stream), timeout=left_s))
    except StopIteration:
        ray.get(payload, timeout=left_s)
        raise RuntimeError(f"{worker}'s stream ended between a payload and its description") from None


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
    except FAILURES:
        return True
    except RayTaskError:
        return False  # it is alive, and has left the broadcast by itself
    return False


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def put(rollouts: Sequence[Rollout]) -> list[Finished]:
    """Bring responses that were kept in a file back to where the workers can read them."""
    step = ray.put(tuple(rollouts))
    return [
        Finished(meta=RolloutMeta.of(rollout), payload=RolloutRef(step=step, place=place))
        for place, rollout in enumerate(rollouts)
    ]
