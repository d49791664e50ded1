"""What is published is the policy, bucket by bucket, and its manifest proves it."""

import numpy as np
import pytest
import torch

from configs.learner import LearnerConfig, OptimizerConfig
from learner import weight_sender
from protocol.weights import WeightManifest, digest
from tests.learner_batches import tiny_policy
from tests.plain_engine import PlainEngine


def published(*, tied: bool = False, dtype: str = "float32", bucket_bytes: int = 5_000):
    policy = tiny_policy(tied=tied)
    engine = PlainEngine(policy, optimizer=OptimizerConfig(), settings=LearnerConfig())
    stream = weight_sender.publish(engine, policy_version=7, bucket_bytes=bucket_bytes, dtype=dtype)
    *buckets, manifest = stream
    assert isinstance(manifest, WeightManifest)
    return policy, buckets, manifest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_buckets_hold_every_parameter_once(tied: bool, dtype: str) -> None:
    policy, buckets, manifest = published(tied=tied, dtype=dtype)
    expected = dict(policy.network.named_parameters())
    assert [slot.spec.name for slot in manifest.slots] == list(expected)
    assert ("lm_head.weight" in expected) == (not tied)
    assert len(buckets) > 3
    total = 0
    for slot in manifest.slots:
        raw = buckets[slot.bucket][slot.offset : slot.offset + slot.spec.num_bytes]
        found = torch.frombuffer(raw.copy(), dtype=getattr(torch, dtype)).reshape(slot.spec.shape)
        assert torch.equal(found, expected[slot.spec.name].to(found.dtype))
        words = raw.view(np.uint32 if dtype == "float32" else np.uint16)
        total += sum(int(word) for word in words)
    assert manifest.loaded_checksum == total % 2**64


def test_the_manifest_describes_the_buckets() -> None:
    _, buckets, manifest = published()
    assert manifest.policy_version == 7
    assert manifest.bucket_bytes == tuple(len(bucket) for bucket in buckets)
    assert manifest.bucket_digests == tuple(digest(bucket) for bucket in buckets)


def test_the_canary_sings_what_the_policy_computes() -> None:
    policy, _, manifest = published()
    ids = torch.tensor(manifest.canary.token_ids)
    logits = policy.network(input_ids=ids[None]).logits[0].double()
    expected = torch.log_softmax(logits, dim=-1)[:-1].gather(-1, ids[1:, None])[:, 0]
    assert len(ids) == 16
    assert manifest.canary.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    assert published()[2] == manifest
