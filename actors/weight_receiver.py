"""How published weights get into a running vLLM engine, and how it can be proved that they did.

`BucketReceiver` takes one bucket of bytes at a time, as the manifest's slots describe it, and hands the tensors to the
model's own loader, which concatenates, pads and shards them. A bucket is handed over by whoever fetched it from the
object store, or comes over a broadcast group that every rank of the engine has joined. It is registered with vLLM under
the name `rondo_buckets`.

An engine that was built for an adapter holds the base for good, and each bucket brings tensors of the adapter. They are
kept until all are there; `put_on_adapter` then gives them to vLLM's LoRA layers, which hold nothing else.

On a CPU vLLM repacks the weights of linear layers for oneDNN and drops the originals. What is then computed with can
neither be summed nor be told apart from stale copies: a tied head that was not sent by name keeps its old packed copy
without any error. `VISIBLE_WEIGHTS` is a "quantisation" that changes and packs nothing: the parameter is what the layer
computes with. It is as fast (0.7M parameters, 128 sequences: 10.5k tokens/s with either).
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.lora.layers import BaseLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from actors.errors import WeightMismatchError
from protocol import broadcast
from protocol.weights import ByteArray, Rendezvous, TensorSlot, checksum, digest

BUCKETS = "rondo_buckets"
VISIBLE_WEIGHTS = "rondo_visible_weights"
ADAPTER_ID = 1
"""Of the one adapter that an engine holds."""


@dataclass
class Invitation(WeightTransferInitInfo):
    """One broadcast that all ranks of an engine join."""

    rendezvous: Rendezvous
    first_receiver: int
    """The number of the engine's first rank among all receivers; the others follow."""
    address: str
    """Of the engine's node."""
    timeout_s: float


@dataclass
class BucketUpdate(WeightTransferUpdateInfo):
    """One bucket: what lies where in it, the digest that it must have, and its bytes."""

    slots: Sequence[TensorSlot]
    digest: str
    num_bytes: int
    buffer: ByteArray | None = None
    """None if they are the next ones of the broadcast."""


class BucketReceiver(WeightTransferEngine[Invitation, BucketUpdate]):
    """Loads buckets, layer by layer, into the storage the model computes with."""

    init_info_cls = Invitation
    update_info_cls = BucketUpdate
    _group: broadcast.Group | None = None
    _adapter: dict[str, Tensor] | None = None
    """What has come of an adapter; None in an engine that takes whole checkpoints."""

    def init_transfer_engine(self, init_info: Invitation) -> None:
        """Join a broadcast; buckets that are handed over need no connection.

        Raises:
            BroadcastError: If it goes on without this rank, or does not begin in time.
        """
        self.shutdown()
        self._group = broadcast.join(
            init_info.rendezvous,
            receiver=init_info.first_receiver + get_tensor_model_parallel_rank(),
            address=init_info.address,
            device=self.device,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        """Make the model expect a whole checkpoint, or begin an adapter."""
        if self.vllm_config.lora_config is None:
            initialize_layerwise_reload(self.model)
        else:
            self._adapter = {}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket (the base class would wait for an accelerator even on a CPU)."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: BucketUpdate) -> None:
        """Check a bucket's bytes and load its tensors.

        Raises:
            WeightMismatchError: If the bytes are not those that were published; nothing of them is loaded.
            BroadcastError: If they do not come.
        """
        flat = self._next(update_info.num_bytes) if update_info.buffer is None else _tensor_of(update_info.buffer)
        actual = digest(flat.cpu().numpy())
        if actual != update_info.digest:
            raise WeightMismatchError(f"a bucket has the digest {actual}, the manifest says {update_info.digest}")
        tensors = _tensors(flat, update_info.slots)
        if self._adapter is None:
            cast(Any, self.model).load_weights(tensors)
        else:  # the bucket is not kept
            self._adapter |= {name: tensor.to("cpu", copy=True) for name, tensor in tensors}

    def finish_weight_update(self) -> None:
        """Leave the broadcast together with the others, and put the model back into its running form.

        Raises:
            BroadcastError: If another member was lost meanwhile.
        """
        group, self._group = self._group, None
        if group is not None:
            group.finish()
        if self._adapter is None:
            finalize_layerwise_reload(self.model, self.model_config)

    def take_adapter(self) -> dict[str, Tensor]:
        """Hand out the adapter that has come; an update that fails leaves nothing behind."""
        adapter, self._adapter = self._adapter or {}, {}
        return adapter

    def shutdown(self) -> None:
        """Leave the broadcast, if there is one, without waiting for the others."""
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _next(self, num_bytes: int) -> Tensor:
        if self._group is None:
            raise broadcast.BroadcastError("this engine has joined no broadcast")
        flat = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        self._group.broadcast(flat)
        return flat


class _VisibleLinear(UnquantizedLinearMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        layer.cpu_linear = torch.nn.functional.linear


class _VisibleEmbedding(UnquantizedEmbeddingMethod):
    def process_weights_after_loading(self, layer: Any) -> None:
        layer.cpu_linear = torch.nn.functional.linear


class VisibleWeights(QuantizationConfig):
    """Leaves every weight as it is, where it is."""

    def get_name(self) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Name the method."""
        return VISIBLE_WEIGHTS

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Allow the types a policy may have."""
        return [torch.float32, torch.bfloat16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Require no accelerator."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Read no files."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VisibleWeights":
        """Build it; it has no settings."""
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Choose the method of a layer."""
        if isinstance(layer, LinearBase):
            return _VisibleLinear()
        if isinstance(layer, VocabParallelEmbedding):
            return _VisibleEmbedding()
        return None


class WorkerExtension:
    """Makes vLLM import this module in the processes of an engine's ranks, where its names must be known too."""


def register() -> None:
    """Make vLLM know this module's names; once a process, when this module is imported there."""
    if BUCKETS not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BUCKETS, BucketReceiver)
        register_quantization_config(VISIBLE_WEIGHTS)(VisibleWeights)


def abandon_update(worker: Any) -> None:
    """Bring a worker out of an update that failed half-way: structurally sound, with weights of no version."""
    # vLLM has no call for this: once update_weights() has raised, finish_weight_update() refuses to clean up.
    # A call over all workers gets vLLM's wrapper; the flag is the worker's own.
    worker.worker.weight_transfer_engine.shutdown()
    worker.worker._weight_update_active = True
    worker.worker.finish_weight_update()


def put_on_adapter(worker: Any) -> None:
    """Compute with the adapter that has come from now on, and with nothing of the one before.

    vLLM takes every adapter off when a weight update is finished, so this comes after it.

    Raises:
        WeightMismatchError: If half of a layer's pair did not come, or vLLM would leave a layer out.
    """
    tensors = worker.worker.weight_transfer_engine.take_adapter()
    layers = {name.removesuffix(".lora_A.weight"): t.shape[0] for name, t in tensors.items() if ".lora_A." in name}
    if set(tensors) != {f"{layer}.lora_{part}.weight" for layer in layers for part in "AB"} or not layers:
        raise WeightMismatchError(f"{len(tensors)} tensors came that are not the A and B of {len(layers)} layers")
    rank = max(layers.values())
    manager = worker.worker.model_runner.lora_manager._adapter_manager
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        ADAPTER_ID,
        tensors,
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),  # a factor of one: B is sent multiplied
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
    )
    manager.add_adapter(adapter)
    if unknown := sorted(adapter.loras.keys() - manager.modules.keys()):
        raise WeightMismatchError(
            f"vLLM adapts no layer {', '.join(unknown)}: rollout.publish = merged is what is left"
        )
    manager.activate_adapter(ADAPTER_ID)


def parameter_checksum(worker: Any) -> int:
    """Sum the bit patterns of a rank's parameters and adapter, each storage once (protocol.weights.checksum).

    Padded rows of a vocabulary and ranks of an adapter are zeros and add nothing; rotary caches are buffers and are
    left out. With tensor parallelism the ranks' sums add up to the whole: what every rank holds in full counts on the
    first one.
    """
    return checksum(_parameter_bytes(worker.get_model(), rank=worker.rank))


register()


def _tensor_of(buffer: ByteArray) -> Tensor:
    with warnings.catch_warnings():
        # The bucket may lie read-only in the object store. The loader only reads it.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(buffer, dtype=torch.uint8)


def _tensors(flat: Tensor, slots: Sequence[TensorSlot]) -> Iterator[tuple[str, Tensor]]:
    for slot in slots:
        part = flat[slot.offset : slot.offset + slot.spec.num_bytes]
        yield slot.spec.name, part.view(getattr(torch, slot.spec.dtype)).reshape(slot.spec.shape)


def _parameter_bytes(model: torch.nn.Module, *, rank: int) -> Iterator[tuple[ByteArray, int]]:
    seen: set[int] = set()
    for parameter in model.parameters():
        pointer = parameter.untyped_storage().data_ptr()
        sharded = hasattr(parameter, "output_dim") or hasattr(parameter, "input_dim")
        if pointer in seen or (rank > 0 and not sharded):
            continue
        seen.add(pointer)
        yield _bytes_of(parameter)
    for layer in model.modules():
        if isinstance(layer, BaseLayerWithLoRA):
            # All there is in the layer's one place, whatever came: what an adapter before left behind would count too.
            for stacked in (*layer.lora_a_stacked, *layer.lora_b_stacked):
                yield _bytes_of(stacked)


def _bytes_of(tensor: Tensor) -> tuple[ByteArray, int]:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().astype(np.uint8, copy=False), tensor.element_size()
