"""Publishing a policy: bounded buckets of bytes, the manifest that proves them, and the sending end of a broadcast.

Only one bucket's tensors are gathered at a time, so a publish never holds a second copy of the policy. Tied parameters
are sent once, under the first of their names: an engine that ties them computes with that storage. What an adapter adds
is sent as part of the weights that it is added to; or by itself (`adapters.Alone`), to engines that hold its base.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from learner.adapters import Alone, merged
from learner.training import GatherableNetwork
from protocol.broadcast import BroadcastError, Group, Meeting
from protocol.weights import (
    ByteArray,
    Canary,
    TensorSlot,
    TensorSpec,
    WeightManifest,
    bucket_sizes,
    checksum,
    digest,
    plan_buckets,
)

_NETWORK_PREFIX = "network."
_CANARY_TOKENS = 16
_CANARY_SEED = 20_260_101


def specs(engine: GatherableNetwork, *, dtype: str) -> tuple[TensorSpec, ...]:
    """Describe what is published, by the network's own names.

    Args:
        engine: Over a PolicyModel.
        dtype: What the rollout engines compute with, as torch spells it: the bits that are sent are those that are
            loaded.

    Returns:
        One description a parameter, tied ones once.
    """
    itemsize = getattr(torch, dtype).itemsize
    return tuple(
        TensorSpec(name=name.removeprefix(_NETWORK_PREFIX), shape=tuple(shape), dtype=dtype, itemsize=itemsize)
        for name, shape in _as_sent(engine).parameter_shapes().items()
    )


def plan(engine: GatherableNetwork, *, bucket_bytes: int, dtype: str) -> tuple[TensorSlot, ...]:
    """Lay the policy out in buckets; the same for every version of it.

    Args:
        engine: Over a PolicyModel.
        bucket_bytes: The bound on a bucket.
        dtype: As in `specs`.

    Returns:
        One slot a parameter.
    """
    return plan_buckets(specs(engine, dtype=dtype), bucket_bytes=bucket_bytes)


def gathered(engine: GatherableNetwork, slots: Sequence[TensorSlot]) -> Iterator[Tensor]:
    """Gather the policy bucket by bucket, on the device; all ranks must iterate to the end.

    Args:
        engine: Over a PolicyModel.
        slots: The plan.

    Yields:
        Each bucket's bytes: on rank 0 in full, elsewhere empty.
    """
    network = _as_sent(engine)
    for number, size in enumerate(bucket_sizes(slots)):
        own = [slot for slot in slots if slot.bucket == number]
        tensors = network.gather([_NETWORK_PREFIX + slot.spec.name for slot in own])
        if engine.context.rank != 0:
            yield torch.zeros(0, dtype=torch.uint8)
            continue
        # Filled on the device, so that an accelerator hands a whole bucket over at once.
        flat = torch.zeros(size, dtype=torch.uint8, device=engine.context.device)
        for slot, tensor in zip(own, tensors.values(), strict=True):
            part = flat[slot.offset : slot.offset + slot.spec.num_bytes]
            part.view(getattr(torch, slot.spec.dtype)).copy_(tensor.reshape(-1))
        yield flat


def buckets(engine: GatherableNetwork, slots: Sequence[TensorSlot]) -> Iterator[ByteArray]:
    """Gather as `gathered`, into the memory of the host."""
    for flat in gathered(engine, slots):
        yield flat.cpu().numpy()


def broadcast(
    engine: GatherableNetwork, slots: Sequence[TensorSlot], meeting: Meeting | None, *, receivers: int, timeout_s: float
) -> str | None:
    """Gather the policy and send each bucket to those that join the meeting; on all ranks.

    The other ranks gather with this one, so a broadcast that fails is gathered to the end without being sent.

    Args:
        engine: Over a PolicyModel.
        slots: The plan.
        meeting: Where receivers join (rank 0); None elsewhere.
        receivers: How many are invited.
        timeout_s: How long the broadcast may take.

    Returns:
        Why not everybody who joined got everything; None if they did.
    """
    group: Group | None = None
    failure: str | None = None
    try:
        if meeting is not None:
            group = meeting.assemble(receivers=receivers, device=engine.context.device, timeout_s=timeout_s)
    except RuntimeError as error:  # the store's own errors too: the other ranks already gather
        failure = str(error)
    for flat in gathered(engine, slots):
        if group is None:
            continue
        try:
            group.broadcast(flat)
        except BroadcastError as error:
            group.close()
            group, failure = None, str(error)
    try:
        if group is not None:
            group.finish()
    except BroadcastError as error:
        failure = str(error)
    return failure


def publish(
    engine: GatherableNetwork, *, policy_version: int, bucket_bytes: int, dtype: str
) -> Iterator[ByteArray | WeightManifest]:
    """Publish the policy; all ranks must iterate to the end.

    Args:
        engine: Over a PolicyModel; `adapters.Alone` of it if engines hold the base.
        policy_version: The number of the new version.
        bucket_bytes: The bound on a bucket.
        dtype: As in `specs`.

    Yields:
        On rank 0 the buckets in order, then the manifest; elsewhere nothing.
    """
    slots = plan(engine, bucket_bytes=bucket_bytes, dtype=dtype)
    digests: list[str] = []
    total = engine.base_checksum(getattr(torch, dtype)) if isinstance(engine, Alone) else 0
    first = engine.context.rank == 0
    for number, bucket in enumerate(buckets(engine, slots)):
        if first:
            digests.append(digest(bucket))
            total += checksum(_parts(bucket, [slot for slot in slots if slot.bucket == number]))
            yield bucket
    canary = sing(engine)
    if first:
        yield WeightManifest(
            policy_version=policy_version,
            slots=slots,
            bucket_bytes=bucket_sizes(slots),
            bucket_digests=tuple(digests),
            loaded_checksum=total % 2**64,
            canary=canary,
        )


def sing(engine: GatherableNetwork) -> Canary:
    """Compute the canary: the policy's log-probs, at temperature 1, of a fixed sequence of tokens; on all ranks.

    Args:
        engine: Over a PolicyModel.

    Returns:
        The tokens, drawn once from the vocabulary, and the log-probs of all but the first.
    """
    policy: Any = engine.module
    vocabulary = policy.network.config.get_text_config().vocab_size
    token_ids = np.random.default_rng(_CANARY_SEED).integers(0, vocabulary, size=_CANARY_TOKENS).tolist()
    input_ids = torch.tensor([token_ids], device=engine.context.device)
    positions = torch.arange(_CANARY_TOKENS, device=engine.context.device)
    logprobs, _ = engine.evaluate(input_ids, positions[None], positions[:-1], input_ids[0, 1:], temperature=1.0)
    return Canary(token_ids=tuple(token_ids), logprobs=tuple(logprobs.tolist()))


def _as_sent(engine: GatherableNetwork) -> GatherableNetwork:
    return engine if isinstance(engine, Alone) else merged(engine)


def _parts(bucket: ByteArray, slots: Sequence[TensorSlot]) -> Iterator[tuple[ByteArray, int]]:
    for slot in slots:
        yield bucket[slot.offset : slot.offset + slot.spec.num_bytes], slot.spec.itemsize
