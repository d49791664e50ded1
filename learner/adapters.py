"""What is trained of a network: all of it, its last blocks, or a low-rank adapter. The only module that knows PEFT.

    with an adapter:  y = W x + s B A x,   s = alpha / rank,   W frozen, B = 0 at the start

Whoever loads a policy without knowing of adapters gets merged weights, W + s B A. They are computed from what is
gathered, never in place, so that the trained tensors stay as they are and the same ones always give the same bits.
An engine that holds the base and knows of adapters gets A and s B alone.
"""

import os
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.models import LoraConfig, TrainedPartConfig
from learner.models import PolicyModel, Precision, ScalarModel, TrainedModel, load_policy
from learner.training import GatherableNetwork, RankContext
from protocol.errors import UserError
from protocol.weights import checksum

DIRECTORY = "adapter"
"""Where an exported model keeps its adapter, beside the merged weights."""
_WEIGHTS = "adapter_model.safetensors"
_NAME = "default"
_NETWORK_PREFIX = "network."
_PEFT_PREFIX = "base_model.model."
_LINEAR = ("Linear", "Conv1D")


def choose(model: TrainedModel, train: TrainedPartConfig, *, seed: int, where: str) -> None:
    """Freeze what is not trained, and put an adapter in where one is.

    Args:
        model: Changed in place.
        train: What to train.
        seed: Of the adapter's A; B is zero.
        where: The configuration's key, for messages.

    Raises:
        UserError: If the network has not the blocks or layers that the configuration names.
    """
    if train.last_blocks is not None:
        _freeze_blocks(model, keep=train.last_blocks, where=where)
    elif train.lora is not None:
        _add_adapter(model, train.lora, seed=seed, where=where)


def open_policy(directory: Path, train: TrainedPartConfig, *, precision: Precision, seed: int) -> PolicyModel:
    """Load the policy that a round starts from, and choose what is trained of it.

    Where it was trained with an adapter and shall be again, that adapter is put on the same base as before, so that
    the adapter switched off is the policy that the first round started from.

    Args:
        directory: The policy's, with or without an adapter.
        train: What to train.
        precision: Of the parameters.
        seed: Of an adapter that begins.

    Returns:
        The policy.

    Raises:
        UserError: If it cannot be loaded, or if its adapter is of another shape than the configuration's.
    """
    stored = directory / DIRECTORY
    continues = train.lora is not None and stored.is_dir()
    policy = load_policy(_base_of(stored) if continues else directory, precision=precision)
    choose(policy, train, seed=seed, where="models.policy.train")
    if continues:
        _load(policy, stored)
    return policy


@contextmanager
def switched_off(model: TrainedModel) -> Generator[None]:
    """Compute without the adapter: with the base, which is the reference of the KL penalty."""
    layers = _layers(model).values()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def merged(engine: GatherableNetwork) -> GatherableNetwork:
    """See a network as one without an adapter.

    Args:
        engine: Over a TrainedModel.

    Returns:
        The same network with the names and shapes of its base; where there is no adapter, the engine itself.
    """
    return Merged(engine) if _layers(engine.module) else engine


class _View:
    """A network with an adapter, seen as another one."""

    def __init__(self, engine: GatherableNetwork, gathered_as: Mapping[str, str]) -> None:
        self._engine = engine
        self._layers = _layers(engine.module)
        self._gathered_as = gathered_as

    @property
    def context(self) -> RankContext:
        """This rank's place."""
        return self._engine.context

    @property
    def module(self) -> nn.Module:
        """The network, adapter included."""
        return self._engine.module

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network without gradient."""
        return self._engine.evaluate(*args, **kwargs)

    def parameter_shapes(self) -> Mapping[str, torch.Size]:
        """Give the shape of every parameter that is seen, by its name there."""
        shapes = self._engine.parameter_shapes()
        return {name: shapes[source] for name, source in self._gathered_as.items()}


class Merged(_View):
    """A network with an adapter, whose parameters are gathered as W + s B A, by the names of its base.

    Args:
        engine: Over a TrainedModel.
    """

    def __init__(self, engine: GatherableNetwork) -> None:
        super().__init__(engine, {name.replace(".base_layer.", "."): name for name in _base_names(engine)})

    @torch.no_grad()
    def gather(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Collect merged parameters on every rank; only these are gathered."""
        return {name: self._merge(name) for name in names}

    def _merge(self, name: str) -> Tensor:
        source = self._gathered_as[name]
        layer = self._layers.get(name.removesuffix(".weight"))
        if layer is None or source == name:
            return self._engine.gather([source])[source]
        a, b = (name.removesuffix("weight") + f"lora_{part}.{_NAME}.weight" for part in "AB")
        found = self._engine.gather([source, a, b])
        # In fp32 whatever the precision: it is rounded once.
        update = layer.scaling[_NAME] * (found[b].float() @ found[a].float())
        weight = found[source]
        return (weight.float() + (update.T if layer.fan_in_fan_out else update)).to(weight.dtype)


class Alone(_View):
    """The adapter of a network without its base, as an engine takes it that holds the base: A and s B.

    The factor is in what is sent, so that the bits which are sent are those which are computed with.

    Args:
        engine: Over a PolicyModel with an adapter.
    """

    def __init__(self, engine: GatherableNetwork) -> None:
        names = [name for name in engine.parameter_shapes() if ".lora_" in name]
        super().__init__(engine, {name.replace(f".{_NAME}.", "."): name for name in names})
        self._base_checksums: dict[torch.dtype, int] = {}

    @torch.no_grad()
    def gather(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Collect A and s B on every rank; s B is computed in fp32 and left so, to be rounded once."""
        sources = {name: self._gathered_as[name] for name in names}
        found = self._engine.gather(list(sources.values()))
        return {name: self._scaled(source, found[source]) for name, source in sources.items()}

    def base_checksum(self, dtype: torch.dtype) -> int:
        """Sum the base's bit patterns, each storage once; on all ranks. It is frozen, and gathered only once.

        Args:
            dtype: What engines hold it in.
        """
        if dtype not in self._base_checksums:
            gathered = (self._engine.gather([name])[name] for name in _base_names(self._engine))
            self._base_checksums[dtype] = checksum(
                (tensor.detach().to("cpu", dtype).contiguous().reshape(-1).view(torch.uint8).numpy(), dtype.itemsize)
                for tensor in gathered
            )
        return self._base_checksums[dtype]

    def _scaled(self, source: str, tensor: Tensor) -> Tensor:
        layer, _, part = source.removesuffix(f".{_NAME}.weight").rpartition(".")
        return tensor if part == "lora_A" else self._layers[layer].scaling[_NAME] * tensor.float()


def write(model: TrainedModel, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Write an adapter in PEFT's own format.

    Args:
        model: With an adapter.
        tensors: What is trained, by the engine's names.
        directory: The exported model's; `adapter/` is made in it. Its name stands for where it will lie.
    """
    target = directory / DIRECTORY
    target.mkdir()
    network = model.network
    config = next(iter(_trunk(network).peft_config.values()))
    scalar = isinstance(model, ScalarModel)
    saved = PeftLoraConfig(
        task_type="SEQ_CLS" if scalar else "CAUSAL_LM",
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=config.target_modules,
        fan_in_fan_out=config.fan_in_fan_out,
        modules_to_save=["score"] if scalar else None,
        base_model_name_or_path=_relative(network.name_or_path, target),
        inference_mode=True,
    )
    saved.save_pretrained(str(target))
    save_file(
        {
            _PEFT_PREFIX + name.removeprefix(_NETWORK_PREFIX).replace(f".{_NAME}.", "."): tensor.contiguous()
            for name, tensor in tensors.items()
        },
        target / _WEIGHTS,
        metadata={"format": "pt"},
    )


def trained_names(model: nn.Module) -> list[str]:
    """Name what an adapter's file holds, by the engine's names; nothing where there is no adapter."""
    if not _layers(model):
        return []
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _freeze_blocks(model: TrainedModel, *, keep: int, where: str) -> None:
    trunk = _trunk(model.network)
    count = model.network.config.get_text_config().num_hidden_layers
    blocks = [m for m in trunk.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if keep > count or len(blocks) != 1:
        raise UserError(
            f"{type(model.network).__name__} has {count} transformer blocks"
            + ("" if len(blocks) == 1 else ", which cannot be told from its other lists of modules"),
            where=f"{where}.last_blocks",
            next_step=f"name at most {count}" if len(blocks) == 1 else "train all of it, or an adapter",
        )
    for block in blocks[0][: count - keep]:
        block.requires_grad_(False)


def _add_adapter(model: TrainedModel, lora: LoraConfig, *, seed: int, where: str) -> None:
    network = model.network
    trunk = _trunk(network)
    # Of the trunk alone: the head runs apart from it, and may be tied to the embeddings.
    kinds = {name.rsplit(".", 1)[-1]: type(m).__name__ for name, m in trunk.named_modules()}
    linear = sorted(name for name, kind in kinds.items() if kind in _LINEAR)
    wanted = sorted(lora.target_modules or linear)
    unknown = [name for name in wanted if name not in linear]
    if unknown or not wanted:
        raise UserError(
            f"{', '.join(unknown) or 'nothing'} matches no linear layer in the blocks of {type(network).__name__}",
            where=f"{where}.lora.target_modules",
            next_step=f"choose from {', '.join(linear)}, or leave it out to adapt all of them",
        )
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=wanted,
        fan_in_fan_out=any(kinds[name] == "Conv1D" for name in wanted),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, trunk, adapter_name=_NAME)
    dtype = next(network.parameters()).dtype
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(True)
    if isinstance(model, ScalarModel):
        network.score.requires_grad_(True)


@torch.no_grad()
def _load(policy: PolicyModel, stored: Path) -> None:
    config: Any = next(iter(_trunk(policy.network).peft_config.values()))
    found: Any = PeftLoraConfig.from_pretrained(str(stored))
    ours, theirs = ((c.r, c.lora_alpha, sorted(c.target_modules or ())) for c in (config, found))
    own = {n: p for n, p in policy.network.named_parameters() if ".lora_" in n}
    tensors = load_file(stored / _WEIGHTS)
    names = {_PEFT_PREFIX + name.replace(f".{_NAME}.", "."): name for name in own}
    if ours != theirs or set(names) != set(tensors):
        raise UserError(
            f"the policy's adapter has rank {theirs[0]}, alpha {theirs[1]:g} and adapts {', '.join(theirs[2])}",
            where=str(stored),
            cause="models.policy.train.lora asks for another one",
            next_step="go back to these, or start a new run from the merged policy with models.policy.path",
        )
    for name, tensor in tensors.items():
        own[names[name]].copy_(tensor)


def _base_of(stored: Path) -> Path | str:
    """Find the base of a stored adapter, a hub id or a place relative to the adapter's."""
    base = str(PeftLoraConfig.from_pretrained(str(stored)).base_model_name_or_path)
    return Path(os.path.normpath(stored / base)) if base.startswith(os.pardir) else base


def _relative(base: str, target: Path) -> str:
    # So that a run directory may be moved. Anything that is no directory here is a hub id.
    return os.path.relpath(base, target) if Path(base).is_dir() else base


def _trunk(network: Any) -> Any:
    return network.base_model


def _base_names(engine: GatherableNetwork) -> list[str]:
    return [name for name in engine.parameter_shapes() if ".lora_" not in name]


def _layers(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
