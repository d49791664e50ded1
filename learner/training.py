"""What the learner's loops need of a training engine, and what every engine has in common.

The loops know this Protocol; `learner.engine` fulfils it with DeepSpeed. One optimiser step is

    for each micro-batch: loss = ...; engine.backward(loss, last=...)
    result = engine.step()

where the losses of all micro-batches *and all ranks* add up to the step's loss: they are already divided by the
global normaliser, and the engine adds gradients and never averages them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from configs.learner import LearnerConfig, OptimizerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """One rank's place among the ranks."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimiser step did."""

    grad_norm: float
    """Of the whole gradient, over all ranks, before clipping."""
    learning_rate: float
    applied: bool
    """False where a loss or gradient was not finite and `learner.on_nonfinite` is `skip`."""


class GatherableNetwork(Protocol):
    """A network whose parameters can be collected: what publishing needs."""

    @property
    def context(self) -> RankContext:
        """This rank's place."""
        ...

    @property
    def module(self) -> nn.Module:
        """The network, for its attributes; call `forward` or `evaluate` rather than it."""
        ...

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network without gradient."""
        ...

    def parameter_shapes(self) -> Mapping[str, torch.Size]:
        """Give the full shape of every parameter, by name, in a fixed order; tied ones once."""
        ...

    def gather(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Collect full parameters on every rank.

        Args:
            names: Of `parameter_shapes`; only these are gathered, so a caller bounds the memory.

        Returns:
            The parameters, detached. They may share memory with the network: copy them before the next step.
        """
        ...


class TrainingEngine(GatherableNetwork, Protocol):
    """A network with its optimiser, spread over ranks.

    All ranks call the same methods in the same order; `evaluate`, `forward` and `backward` equally often.
    """

    @property
    def num_steps(self) -> int:
        """Optimiser steps applied so far."""
        ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network and keep what the backward pass needs."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add this micro-batch's gradient to the step's.

        Args:
            loss: Scalar; this micro-batch's share of the step's loss.
            last: Whether the step has no further micro-batch.
        """
        ...

    def step(self) -> StepResult:
        """Clip the gradient, apply it and clear it; the same result on all ranks.

        Raises:
            NonFiniteError: If a loss or gradient is not finite on any rank and `learner.on_nonfinite` is `stop`, or
                after more skipped steps than `learner.max_consecutive_skips` in a row or `learner.max_skips_per_round`
                in all. On all ranks at once, and with parameters and optimiser as they were.
        """
        ...

    def require_finite_parameters(self) -> None:
        """Check all parameters, on all ranks.

        Raises:
            NonFiniteError: If one is not finite on any rank. On all ranks at once.
        """
        ...

    def measure(self) -> float:
        """Give the gradient's norm and clear it, without a step; the same result on all ranks."""
        ...

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over the ranks; the argument may be overwritten."""
        ...

    def full_gradient(self) -> Mapping[str, Tensor]:
        """Collect the full gradient between the last `backward` and `step`, for tests."""
        ...

    def save(self, directory: Path) -> None:
        """Write this rank's part of parameters, optimiser and step count into a directory that all ranks share.

        It is made if it is not there.
        """
        ...

    def load(self, directory: Path) -> None:
        """Restore what `save` wrote.

        Raises:
            ValueError: If the directory holds no checkpoint.
        """
        ...

    def close(self) -> None:
        """Give the memory back; the engine is of no use afterwards."""
        ...


def learning_rate(config: OptimizerConfig, *, step: int, total_steps: int | None) -> float:
    """Compute the learning rate of a step.

        warm-up:  lr (step + 1) / warmup_steps
        linear:   lr (1 - (1 - f) p)
        cosine:   lr (f + (1 - f) (1 + cos(pi p)) / 2),   p = (step - warmup) / (total - warmup), f = final_fraction

    Args:
        config: The optimiser's settings.
        step: Steps applied before this one.
        total_steps: When a schedule arrives at its final learning rate, which it keeps; not needed by a constant one.

    Returns:
        The learning rate.

    Raises:
        ValueError: If the schedule needs `total_steps` and there are none.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    if total_steps is None:
        raise ValueError(f"the {config.schedule} schedule needs the total number of steps")
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    left = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.learning_rate * (config.final_fraction + (1 - config.final_fraction) * left)


def refusal(settings: LearnerConfig, *, in_a_row: int, in_all: int) -> str | None:
    """Say why a step whose loss or gradient is not finite may not be skipped.

    Args:
        settings: The policy and its bounds.
        in_a_row: Skips up to this one since the last step that was applied.
        in_all: Skips up to this one in this round.

    Returns:
        The reason, to follow the step's number; None if it may be skipped.
    """
    if settings.on_nonfinite != "skip":
        return ""
    if in_a_row > settings.max_consecutive_skips:
        return f", skip {in_a_row} in a row: learner.max_consecutive_skips = {settings.max_consecutive_skips}"
    if in_all > settings.max_skips_per_round:
        return f", skip {in_all} of this round: learner.max_skips_per_round = {settings.max_skips_per_round}"
    return None


def parameter_groups(module: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters into those that decay (matrices) and those that do not (norms and biases).

    Args:
        module: The network.
        weight_decay: Of the matrices.

    Returns:
        Groups for AdamW; a single one where nothing decays.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if weight_decay == 0:
        return [{"params": parameters, "weight_decay": 0.0}]
    groups = (
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def squared_norm(tensors: Iterator[Tensor] | Sequence[Tensor], *, device: torch.device) -> Tensor:
    """Sum the squares of all elements in one fused pass, in fp32.

    Args:
        tensors: Of any shapes; there may be none.
        device: Where the result is wanted if there are none.

    Returns:
        A scalar; not finite exactly when an element is not (or when the sum overflows, beyond a norm of 1e19).
    """
    tensors = list(tensors)
    if not tensors:
        return torch.zeros((), device=device)
    # Private in name only: it is what torch.nn.utils.clip_grad_norm_ is made of.
    norms = torch._foreach_norm(tensors, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
    return torch.stack(norms).to(device).square().sum()
