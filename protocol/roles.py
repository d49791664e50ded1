"""The roles that the driver sees. It knows these and no machine.

    for finished in rollouts.generate(requests):          # one by one, as the engines finish them
        scoring.add(finished)                             # groups are formed by key and scored meanwhile
    scored = scoring.collect()                            # references, in key order
    report = learner.update(scored, iteration=i)          # advantages, epochs, minibatches
    publication = learner.publish(policy_version=v + 1)   # a manifest, and its buckets
    proofs = rollouts.load(publication)                   # every worker proves what it holds

Payloads are opaque references: the driver passes them on and never looks inside.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from protocol.messages import Rollout, RolloutKey, RolloutMeta, RolloutRequest, SampleText, UpdateReport
from protocol.weights import Rendezvous, VersionProof, WeightManifest

Payload = Any
"""A reference to data that stays with the workers (a Ray object reference in a real run)."""


class RolloutRef(NamedTuple):
    """Where a rollout lies: among those that one step of an engine finished."""

    step: Payload
    """A reference to a tuple of Rollouts."""
    place: int


def resolve(refs: Sequence[RolloutRef], get: Callable[[list[Payload]], Sequence[Sequence[Rollout]]]) -> list[Rollout]:
    """Fetch rollouts, each object once.

    Args:
        refs: Where they lie.
        get: Fetches a list of references, in order.

    Returns:
        The rollouts, in the order of `refs`.
    """
    steps = list(dict.fromkeys(ref.step for ref in refs))
    found = dict(zip(steps, get(steps), strict=True))
    return [found[ref.step][ref.place] for ref in refs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """One finished response: what the driver may know, and where the Rollout lies."""

    meta: RolloutMeta
    payload: RolloutRef


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredGroup:
    """References to one group's rollouts, RewardScores and ReferenceLogprobs."""

    metas: tuple[RolloutMeta, ...]
    rollouts: tuple[RolloutRef, ...]
    rewards: Payload
    reference: Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoringSummary:
    """What the driver may know about the scores of a batch."""

    means: Mapping[str, float]
    """Component and gold means, and the combined score's, by metric name."""
    scores: Mapping[RolloutKey, float]
    components: Mapping[str, Mapping[RolloutKey, float]]
    """Reward -> its calibrated score of each response, before combination and truncation."""
    gold: Mapping[str, Mapping[RolloutKey, float]]
    """`gold` and its components; empty without a gold scorer."""
    kl_nats: Mapping[RolloutKey, float]
    """The k1 estimate of each sequence, under the policy that sampled it; none of responses that were read."""
    busy_s: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredReferences:
    """A whole scored batch, by reference, groups in key order."""

    groups: tuple[ScoredGroup, ...]
    summary: ScoringSummary

    @property
    def metas(self) -> tuple[RolloutMeta, ...]:
        """Every rollout's description, in key order."""
        return tuple(meta for group in self.groups for meta in group.metas)


class Broadcast(Protocol):
    """A version that the learner has announced and can send to those who join, while its policy stays as it is."""

    @property
    def rendezvous(self) -> Rendezvous:
        """Where receivers join."""
        ...

    @property
    def timeout_s(self) -> float:
        """How long all of it may take."""
        ...

    def send(self, *, receivers: int) -> None:
        """Start to wait for so many receivers, and to send to those that come."""
        ...

    def excuse(self, receivers: Sequence[int]) -> None:
        """Stop waiting for receivers that are dead."""
        ...

    def finish(self) -> None:
        """Wait until the learner is through, whether or not everybody got everything."""
        ...

    def stored(self) -> tuple[Payload, ...]:
        """Put the buckets into the object store, once, for those that missed them."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """One published policy version: its manifest, and its buckets by reference or by broadcast."""

    manifest: WeightManifest
    buckets: tuple[Payload, ...] = ()
    broadcast: Broadcast | None = None

    def stored(self) -> tuple[Payload, ...]:
        """Refer to the buckets in the object store, where a worker can load them at any time."""
        return self.buckets if self.broadcast is None else self.broadcast.stored()


class RolloutPool(Protocol):
    """Workers that sample responses with the policy version they can prove."""

    def generate(self, requests: Sequence[RolloutRequest], *, policy_version: int) -> Iterator[Finished]:
        """Yield each response as it is finished. Every key comes exactly once."""
        ...

    def load(self, publication: Publication) -> tuple[VersionProof, ...]:
        """Bring every worker to the published version; fence those that cannot prove it."""
        ...


class ScoringPool(Protocol):
    """Workers that score responses with reward models and with the frozen reference."""

    def begin(self, keys: Sequence[RolloutKey]) -> None:
        """Announce the keys of a batch, in key order; this fixes the groups."""
        ...

    def add(self, finished: Finished) -> None:
        """Hand over a response; its group is scored as soon as it is complete."""
        ...

    def collect(self) -> ScoredReferences:
        """Wait for the whole batch."""
        ...


class Learner(Protocol):
    """A group of ranks that move together."""

    def update(self, batch: ScoredReferences, *, round: int, iteration: int) -> UpdateReport:
        """Learn from a batch."""
        ...

    def publish(self, *, policy_version: int) -> Publication:
        """Gather the policy, bucket by bucket, as a new version."""
        ...

    def samples(
        self, batch: ScoredReferences, *, keys: Sequence[RolloutKey], report: UpdateReport
    ) -> tuple[SampleText, ...]:
        """Decode a few responses for people."""
        ...

    def save(self, directory: Path) -> None:
        """Write all of the learner's state into an empty directory."""
        ...

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote."""
        ...
