"""What is published is the policy, bucket by bucket, and its manifest proves it."""

from threading import Thread

import numpy as np
import pytest
import torch

from configs.learner import LearnerConfig, OptimizerConfig
from learner import weight_sender
from learner.distributed import listen
from protocol.broadcast import LOOPBACK, Meeting, join
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


class Receivers:
    """One receiver in a thread, that leaves before the bucket with the given number."""

    def __init__(self, meeting: Meeting, sizes: tuple[int, ...], *, leaves_before: int | None) -> None:
        self.found: list[torch.Tensor] = []
        self._meeting, self._sizes, self._leaves_before = meeting, sizes, leaves_before
        self.thread = Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        place = {"address": LOOPBACK, "device": torch.device("cpu"), "timeout_s": 20}
        group = join(self._meeting.rendezvous, receiver=0, **place)
        for number, size in enumerate(self._sizes):
            if number == self._leaves_before:
                return group.close()
            self.found.append(torch.zeros(size, dtype=torch.uint8))
            group.broadcast(self.found[-1])
        return group.finish()


@pytest.mark.parametrize("leaves_before", [None, 1])
def test_a_broadcast_sends_what_was_published_and_gathers_to_the_end(leaves_before: int | None) -> None:
    engine = PlainEngine(tiny_policy(), optimizer=OptimizerConfig(), settings=LearnerConfig())
    *buckets, manifest = weight_sender.publish(engine, policy_version=7, bucket_bytes=5_000, dtype="float32")
    gathered: list[int] = []
    gather = engine.gather
    engine.gather = lambda names: gathered.append(len(names)) or gather(names)
    meeting = Meeting(listen(LOOPBACK), timeout_s=20)
    receivers = Receivers(meeting, manifest.bucket_bytes, leaves_before=leaves_before)
    failure = weight_sender.broadcast(engine, manifest.slots, meeting, receivers=1, timeout_s=20)
    receivers.thread.join()
    meeting.close()
    # The other ranks of a group gather with this one, whatever became of the broadcast.
    assert len(gathered) == len(buckets) > 3
    assert sum(gathered) == len(manifest.slots)
    for sent, found in zip(buckets, receivers.found, strict=leaves_before is None):
        np.testing.assert_array_equal(found.numpy(), sent)
    if leaves_before is None:
        assert failure is None
    else:
        assert failure is not None
        assert "waited in vain" in failure
        assert len(receivers.found) == leaves_before


def test_a_broadcast_to_nobody_gathers_to_the_end() -> None:
    engine = PlainEngine(tiny_policy(), optimizer=OptimizerConfig(), settings=LearnerConfig())
    slots = weight_sender.plan(engine, bucket_bytes=5_000, dtype="float32")
    meeting = Meeting(listen(LOOPBACK), timeout_s=20)
    meeting.excuse([0, 1])
    assert weight_sender.broadcast(engine, slots, meeting, receivers=2, timeout_s=20) is None
    meeting.close()
