"""The DeepSpeed adapter: a training engine over ZeRO 0 to 3, and the only module that knows DeepSpeed."""

import os
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn

from configs.learner import LearnerConfig, OptimizerConfig
from learner.training import (
    RankContext,
    StepResult,
    learning_rate,
    parameter_groups,
    refusal,
    squared_norm,
)
from protocol.errors import NonFiniteError
from protocol.files import storage_failure

# DeepSpeed would compile its shared-memory collectives with g++ at the first start. They serve inference only.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

_CHECKPOINT_TAG = "state"
# Elements of one reduction; larger models reduce in several. DeepSpeed allocates the bucket in full.
_MAX_BUCKET_ELEMENTS = 100_000_000
# Norms and biases stay whole on every rank under ZeRO 3; gathering them would cost a message each.
_PERSISTENT_ELEMENTS = 10_000


class DeepSpeedEngine:
    """A network under DeepSpeed, as the TrainingEngine Protocol describes it.

    Args:
        module: The network, in the precision of `settings`; its parameters move to the device.
        optimizer: AdamW and its schedule.
        settings: ZeRO stage, precision, clipping and what to do about numbers that are not finite.
        context: This rank's place.
        name: For messages, such as "policy".
        total_steps: Length of the learning-rate schedule.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: OptimizerConfig,
        settings: LearnerConfig,
        context: RankContext,
        name: str,
        total_steps: int | None = None,
    ) -> None:
        self.context = context
        self.num_steps = 0
        self._name = name
        self._optimizer_config = optimizer
        self._settings = settings
        self._total_steps = total_steps
        self._skips_in_a_row = 0
        self._num_skips = 0
        self._loss_sum = torch.zeros((), device=context.device)
        self._stage = settings.zero_stage
        if settings.precision == "bf16" and self._stage == 0:
            # DeepSpeed has fp32 master weights only with a ZeRO optimiser; stage 1 computes the same.
            self._stage = 1
        if settings.gradient_checkpointing:
            network: Any = module
            network.enable_gradient_checkpointing()
        module.train()
        self._shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
        # By every name that tied parameters have: a state dict has them all.
        self._frozen = {n for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
        adamw = torch.optim.AdamW(
            parameter_groups(module, weight_decay=optimizer.weight_decay),
            lr=optimizer.learning_rate,
            betas=optimizer.betas,
            eps=optimizer.eps,
            fused=True,
        )
        num_elements = sum(p.numel() for p in module.parameters() if p.requires_grad)
        config = _deepspeed_config(settings, stage=self._stage, context=context, num_elements=num_elements)
        # Typed as Any: what the optimizer is, and what it is called, depends on the stage.
        self._engine: Any = deepspeed.initialize(model=module, optimizer=adamw, config=config)[0]
        self._parameters = dict(self._engine.module.named_parameters())
        self._files = _ShardFiles(frozen=self._frozen)
        self._engine.checkpoint_engine = self._files
        # A script that reads the shards without DeepSpeed is put beside them; rank 0 alone writes it.
        self._engine._copy_recovery_script = self._files.guarded(self._engine._copy_recovery_script)

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self._engine.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network and keep what the backward pass needs."""
        return self._engine(*args, **kwargs)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network without gradient."""
        return self._engine.module(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradient to the step's; the ranks' gradients are added, not averaged."""
        self._loss_sum += loss.detach()
        self._engine.set_gradient_accumulation_boundary(last)
        # DeepSpeed divides by the number of ranks.
        self._engine.backward(loss * self.context.world_size, scale_wrt_gas=False)

    def step(self) -> StepResult:
        """Clip the gradient, apply it and clear it."""
        rate = learning_rate(self._optimizer_config, step=self.num_steps, total_steps=self._total_steps)
        finite, what, norm = self._inspect()
        if not finite:
            return self._refuse(what, norm=norm, rate=rate)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        self._engine.step()
        if not self._engine.was_step_applied():
            raise RuntimeError(f"DeepSpeed skipped step {self.num_steps} of the {self._name}, whose gradient is finite")
        self.num_steps += 1
        self._skips_in_a_row = 0
        return StepResult(grad_norm=norm, learning_rate=rate, applied=True)

    def require_finite_parameters(self) -> None:
        """Check all parameters, each rank its part of them."""
        own = [p.ds_tensor if self._stage == 3 else p.detach() for p in self._parameters.values()]
        if not self.all_reduce_sum(squared_norm(own, device=self.context.device)).isfinite():
            raise NonFiniteError(f"parameter of the {self._name}", f"the end of step {self.num_steps - 1}")

    def measure(self) -> float:
        """Give the gradient's norm and clear it, without a step."""
        norm = self._inspect()[2]
        self._discard_gradient()
        return norm

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks; the argument may be overwritten."""
        if self.context.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def parameter_shapes(self) -> Mapping[str, torch.Size]:
        """Give the full shape of every parameter, by name; tied ones once."""
        return self._shapes

    @torch.no_grad()
    def gather(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Collect full parameters on every rank."""
        parameters = [self._parameters[name] for name in names]
        if self._stage < 3:
            return {name: p.detach() for name, p in zip(names, parameters, strict=True)}
        with deepspeed.zero.GatheredParameters(parameters):
            return {name: p.detach().clone() for name, p in zip(names, parameters, strict=True)}

    def full_gradient(self) -> Mapping[str, Tensor]:
        """Collect the full gradient between the last `backward` and `step`."""
        read: Any = safe_get_full_grad if self._stage > 0 else lambda parameter: parameter.grad
        return {name: read(p).detach().clone() for name, p in self._parameters.items() if name not in self._frozen}

    def save(self, directory: Path) -> None:
        """Write this rank's part of the state, without what is frozen.

        Raises:
            OSError: On every rank, if the disk did not take the part of any.
        """
        counters = {
            "num_steps": self.num_steps,
            "num_skips": self._num_skips,
            "skips_in_a_row": self._skips_in_a_row,
        }
        self._engine.save_checkpoint(
            str(directory),
            tag=_CHECKPOINT_TAG,
            client_state=counters,
            save_latest=False,
            exclude_frozen_parameters=True,
        )
        codes = torch.zeros(self.context.world_size, device=self.context.device)
        codes[self.context.rank] = self._files.take_errno()
        for rank, code in enumerate(map(int, self.all_reduce_sum(codes).tolist())):
            if code:
                raise OSError(code, f"{os.strerror(code)} (learner rank {rank})", str(directory))

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote. The files are pickles: verify them first."""
        if not (directory / _CHECKPOINT_TAG).is_dir():
            raise ValueError(f"no checkpoint of the {self._name} in {directory}")
        path, state = self._engine.load_checkpoint(
            str(directory), tag=_CHECKPOINT_TAG, load_lr_scheduler_states=False, custom_load_fn=self._load_trained
        )
        if path is None:
            raise ValueError(f"DeepSpeed cannot read the checkpoint of the {self._name} in {directory}")
        self.num_steps = state["num_steps"]
        # A checkpoint may be older than these counters.
        self._num_skips, self._skips_in_a_row = state.get("num_skips", 0), state.get("skips_in_a_row", 0)

    def close(self) -> None:
        """Give the memory back."""
        self._engine.destroy()
        self._parameters.clear()
        del self._engine

    def _load_trained(self, src: Mapping[str, Tensor], dst: nn.Module) -> None:
        """Restore the trained parameters; nothing but frozen ones may be missing."""
        found = dst.load_state_dict(src, strict=False)
        missing = set(found.missing_keys) - self._frozen
        if missing or found.unexpected_keys:
            strange = sorted(missing) or sorted(found.unexpected_keys)
            raise ValueError(f"the checkpoint of the {self._name} is of another network: {strange[0]} does not match")

    def _inspect(self) -> tuple[bool, str, float]:
        """Check loss and gradient on all ranks, and measure the gradient: one reduction and one read-back.

        DeepSpeed's own norm is not enough: under ZeRO 3 in bf16 older releases turned a NaN into a plausible norm,
        and under ZeRO 1 and 2 a bad step is skipped without a word.
        """
        total = squared_norm(self._local_gradients(), device=self.context.device)
        if self._stage == 0:
            # Every rank holds the whole, reduced gradient.
            total = total / self.context.world_size
        loss, total = self.all_reduce_sum(torch.stack([self._loss_sum, total])).unbind()
        self._loss_sum.zero_()
        finite_loss, finite, norm = torch.stack([loss.isfinite(), total.isfinite(), total.sqrt()]).tolist()
        return bool(finite_loss and finite), "gradient" if finite_loss else "loss", norm

    def _refuse(self, what: str, *, norm: float, rate: float) -> StepResult:
        self._skips_in_a_row += 1
        self._num_skips += 1
        reason = refusal(self._settings, in_a_row=self._skips_in_a_row, in_all=self._num_skips)
        if reason is not None:
            raise NonFiniteError(f"{what} of the {self._name}", f"step {self.num_steps}{reason}")
        self._discard_gradient()
        return StepResult(grad_norm=norm, learning_rate=rate, applied=False)

    def _local_gradients(self) -> list[Tensor]:
        """This rank's part of the reduced gradient, where each stage keeps it."""
        optimizer = self._engine.optimizer
        if self._stage == 0:
            return [p.grad for p in self._parameters.values() if p.grad is not None]
        if hasattr(optimizer, "fp32_groups_gradient_flat_partition"):  # stage 1 in bf16
            return list(optimizer.fp32_groups_gradient_flat_partition)
        if self._settings.offload_optimizer:
            flat = (
                optimizer.fp32_partitioned_groups_flat
                if self._stage == 3
                else optimizer.single_partition_of_fp32_groups
            )
            return [partition.grad for partition in flat if partition.grad is not None]
        return [grad for group in optimizer.averaged_gradients.values() for grad in group or () if grad is not None]

    def _discard_gradient(self) -> None:
        if self._stage == 0:
            self._engine.zero_grad()
            return
        # The ZeRO optimisers clear all their buffers when they meet a gradient that is not finite; there is no other
        # public way. A loss alone that is not finite leaves no such gradient, so one is made.
        gradients = self._local_gradients()
        if gradients:
            gradients[0].view(-1)[0] = torch.nan
        self._engine.step()
        if self._engine.was_step_applied():
            raise RuntimeError(f"DeepSpeed applied a step of the {self._name} whose gradient is not finite")


class _ShardFiles(TorchCheckpointEngine):
    """Writes the files of DeepSpeed's checkpoints, and keeps to itself what the disk says until all ranks are through.

    A rank that raised in the middle would leave the others waiting for it in a collective.

    Args:
        frozen: Names of parameters that are not written. DeepSpeed leaves out only one of each one's names.
    """

    def __init__(self, *, frozen: Set[str]) -> None:
        super().__init__()
        self._frozen = frozen
        self._errno = 0

    def take_errno(self) -> int:
        """Return the number of the first error since this was last asked, or 0."""
        code, self._errno = self._errno, 0
        return code

    def guarded(self, write: Callable[..., None]) -> Callable[..., None]:
        """Make a function that writes keep a failure of the disk to itself."""

        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except (OSError, RuntimeError) as error:
                # torch only says that it is not where it should be; what the file said is the context.
                failure = storage_failure(error) or storage_failure(error.__context__ or error)
                if failure is None or failure.errno is None:
                    raise
                self._errno = self._errno or failure.errno

        return attempt

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file. Through Python's file, which says why where torch's own does not."""
        if "module" in state_dict:
            module = {name: tensor for name, tensor in state_dict["module"].items() if name not in self._frozen}
            state_dict = {**state_dict, "module": module}
        self.guarded(_write_shard)(state_dict, path)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a directory."""
        self.guarded(os.makedirs)(path, exist_ok=exist_ok)


def _write_shard(state: Any, path: str) -> None:
    with Path(path).open("wb") as file:
        torch.save(state, file)


def _deepspeed_config(
    settings: LearnerConfig, *, stage: int, context: RankContext, num_elements: int
) -> dict[str, Any]:
    bucket = max(min(num_elements, _MAX_BUCKET_ELEMENTS), 1)
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "overlap_comm": context.device.type == "cuda",
        "stage3_param_persistence_threshold": _PERSISTENT_ELEMENTS,
    }
    if settings.offload_optimizer and stage > 0:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        # Sizes of batches are ours; DeepSpeed must only know that they are not empty.
        "train_batch_size": context.world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": settings.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }
