"""Published weights: versions, bucket plans, manifests and fingerprints.

A publish splits the policy, or an adapter that engines add to a base, into buckets of bounded size, in the order of its
tensors. The manifest names every tensor and where it lies. Two checks travel with it:

- `bucket_digests`: XXH3-128 of each bucket's bytes. A receiver proves with it that it got what was sent. It guards
  against damage, not against an adversary (who could write to the object store could send other weights anyway), and
  keeps up with memory where SHA-256 would take 25 s for an 8B model.
- `loaded_checksum`: the sum, modulo 2^64, of the unsigned bit patterns of all elements, each storage counted once. It
  does not change when an engine concatenates tensors (query, key and value, say), so a receiver proves with it that
  what it now computes with is what the learner has. It cannot tell two swapped tensors apart; the canary can. With an
  adapter it is of all that is computed with: the base, which is not sent, and the adapter, which is.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

ByteArray = NDArray[np.uint8]
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor's name, shape and dtype (as torch spells it, without `torch.`)."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlot:
    """Where a tensor lies: which bucket, and at which byte."""

    spec: TensorSpec
    bucket: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Canary:
    """A fixed token sequence and the learner's log-probs of its tokens after the first."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightManifest:
    """Everything a receiver needs to load a version and to prove that it did."""

    policy_version: int
    slots: tuple[TensorSlot, ...]
    bucket_bytes: tuple[int, ...]
    bucket_digests: tuple[str, ...]
    loaded_checksum: int
    canary: Canary

    @property
    def fingerprint(self) -> str:
        """One short name for the content: equal exactly when all buckets are."""
        return hashlib.blake2b("".join(self.bucket_digests).encode(), digest_size=8).hexdigest()

    @property
    def num_bytes(self) -> int:
        """Bytes of all buckets."""
        return sum(self.bucket_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionProof:
    """A rollout worker's proof of the weights that it holds."""

    worker: str
    policy_version: int
    fingerprint: str
    loaded_checksum: int
    canary_gap_max: float
    """Largest gap in nats between the engine's and the learner's log-prob of the canary's tokens."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the members of one broadcast meet: a store of the learner's first rank."""

    address: str
    port: int
    key: str
    """Drawn for this broadcast; its names in the store start with it."""


def plan_buckets(specs: Sequence[TensorSpec], *, bucket_bytes: int) -> tuple[TensorSlot, ...]:
    """Lay tensors into buckets, in order.

    A bucket is closed when the next tensor would take it over `bucket_bytes`; a tensor that is larger than that gets a
    bucket of its own. Offsets are multiples of 16, so that every element is aligned.

    Args:
        specs: The tensors in the order in which they are gathered.
        bucket_bytes: The bound on a bucket.

    Returns:
        One slot a tensor.

    Raises:
        ValueError: If the bound is not positive or a name comes twice.
    """
    if bucket_bytes <= 0:
        raise ValueError(f"bucket_bytes must be positive, not {bucket_bytes}")
    if len({spec.name for spec in specs}) != len(specs):
        raise ValueError("a tensor name comes twice")
    slots: list[TensorSlot] = []
    bucket, offset = 0, 0
    for spec in specs:
        if offset and offset + spec.num_bytes > bucket_bytes:
            bucket, offset = bucket + 1, 0
        slots.append(TensorSlot(spec=spec, bucket=bucket, offset=offset))
        offset += -(-spec.num_bytes // 16) * 16
    return tuple(slots)


def bucket_sizes(slots: Sequence[TensorSlot]) -> tuple[int, ...]:
    """Count the bytes of each bucket of a plan."""
    sizes: list[int] = []
    for slot in slots:
        if slot.bucket == len(sizes):
            sizes.append(0)
        sizes[slot.bucket] = slot.offset + -(-slot.spec.num_bytes // 16) * 16
    return tuple(sizes)


def digest(buffer: ByteArray) -> str:
    """Hash a bucket's bytes."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(buffer).data)


def checksum(buffers: Iterable[tuple[ByteArray, int]]) -> int:
    """Sum the unsigned bit patterns of all elements, modulo 2^64.

    Args:
        buffers: Pairs of a tensor's bytes and its element size; each storage once.

    Returns:
        The checksum. It depends on the multiset of elements only: concatenating or splitting tensors keeps it.
    """
    total = 0
    for buffer, itemsize in buffers:
        total += int(buffer.reshape(-1).view(_WORDS[itemsize]).sum(dtype=np.uint64))
    return total % 2**64
