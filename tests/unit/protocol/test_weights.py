"""Bucket plans and checksums."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.weights import TensorSpec, bucket_sizes, checksum, plan_buckets


def spec(name: str, count: int) -> TensorSpec:
    return TensorSpec(name=name, shape=(count,), dtype="float32", itemsize=4)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20), st.integers(16, 2000))
def test_every_tensor_has_a_place_of_its_own(counts: list[int], bound: int) -> None:
    slots = plan_buckets([spec(str(i), n) for i, n in enumerate(counts)], bucket_bytes=bound)
    sizes = bucket_sizes(slots)
    assert [slot.spec.name for slot in slots] == [str(i) for i in range(len(counts))]
    for bucket, size in enumerate(sizes):
        inside = [slot for slot in slots if slot.bucket == bucket]
        assert len(inside) == 1 or inside[-1].offset + inside[-1].spec.num_bytes <= bound
        end = 0
        for slot in inside:
            assert slot.offset >= end
            assert slot.offset % 16 == 0
            end = slot.offset + slot.spec.num_bytes
        assert end <= size


def test_two_tensors_of_one_name_and_empty_buckets_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        plan_buckets([spec("a", 1), spec("a", 1)], bucket_bytes=64)
    with pytest.raises(ValueError, match="positive"):
        plan_buckets([spec("a", 1)], bucket_bytes=0)


def as_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)


def test_concatenation_keeps_the_checksum_and_any_bit_changes_it() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=64).astype(np.float32), rng.normal(size=32).astype(np.float32)
    apart = checksum([(as_bytes(q), 4), (as_bytes(k), 4)])
    assert checksum([(as_bytes(np.concatenate([q, k])), 4)]) == apart
    assert apart == sum(int(word) for word in np.concatenate([q, k]).view(np.uint32)) % 2**64
    changed = q.copy()
    changed[3] = np.nextafter(changed[3], np.float32(9))
    assert checksum([(as_bytes(changed), 4), (as_bytes(k), 4)]) != apart


def test_a_padded_vocabulary_adds_nothing() -> None:
    weight = np.ones(10, dtype=np.float32)
    padded = np.concatenate([weight, np.zeros(6, dtype=np.float32)])
    assert checksum([(as_bytes(weight), 4)]) == checksum([(as_bytes(padded), 4)])
