"""A training engine without DeepSpeed, one process of plain PyTorch: the yardstick of the real engine."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.learner import LearnerConfig, OptimizerConfig
from learner.training import RankContext, StepResult, learning_rate, parameter_groups, refusal
from protocol.errors import NonFiniteError


class PlainEngine:
    """The TrainingEngine Protocol for one rank, in fp32 or bf16 without master weights."""

    def __init__(
        self,
        module: nn.Module,
        *,
        optimizer: OptimizerConfig,
        settings: LearnerConfig,
        context: RankContext | None = None,
        name: str = "network",
        total_steps: int | None = None,
    ) -> None:
        self.context = context or RankContext(rank=0, world_size=1, device=torch.device("cpu"))
        self.module = module.to(self.context.device).train()
        self.num_steps = 0
        self.num_forward = 0
        self._config, self._settings, self._name, self._total_steps = optimizer, settings, name, total_steps
        self._skips = self._num_skips = 0
        self._losses: list[Tensor] = []
        self._adamw = torch.optim.AdamW(
            parameter_groups(module, weight_decay=optimizer.weight_decay), betas=optimizer.betas, eps=optimizer.eps
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.num_forward += 1
        return self.module(*args, **kwargs)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        self.num_forward += 1
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self._losses.append(loss.detach())
        loss.backward()

    def step(self) -> StepResult:
        rate = learning_rate(self._config, step=self.num_steps, total_steps=self._total_steps)
        for group in self._adamw.param_groups:
            group["lr"] = rate
        loss = float(torch.stack(self._losses).sum())
        self._losses.clear()
        norm = nn.utils.get_total_norm(self._gradients()).item()
        for what, value in (("loss", loss), ("gradient", norm)):
            if not abs(value) < float("inf"):
                self._skips += 1
                self._num_skips += 1
                reason = refusal(self._settings, in_a_row=self._skips, in_all=self._num_skips)
                if reason is not None:
                    raise NonFiniteError(f"{what} of the {self._name}", f"step {self.num_steps}{reason}")
                self._adamw.zero_grad()
                return StepResult(grad_norm=norm, learning_rate=rate, applied=False)
        nn.utils.clip_grads_with_norm_(self.module.parameters(), self._settings.max_grad_norm, torch.tensor(norm))
        self._adamw.step()
        self._adamw.zero_grad()
        self.num_steps += 1
        self._skips = 0
        return StepResult(grad_norm=norm, learning_rate=rate, applied=True)

    def require_finite_parameters(self) -> None:
        if not all(p.isfinite().all() for p in self.module.parameters()):
            raise NonFiniteError(f"parameter of the {self._name}", f"the end of step {self.num_steps - 1}")

    def measure(self) -> float:
        norm = nn.utils.get_total_norm(self._gradients()).item()
        self._losses.clear()
        self._adamw.zero_grad()
        return norm

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def parameter_shapes(self) -> Mapping[str, torch.Size]:
        return {name: p.shape for name, p in self.module.named_parameters()}

    def gather(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        parameters = dict(self.module.named_parameters())
        return {name: parameters[name].detach() for name in names}

    def full_gradient(self) -> Mapping[str, Tensor]:
        return {name: p.grad.detach().clone() for name, p in self.module.named_parameters() if p.requires_grad}

    def save(self, directory: Path) -> None:
        state = {"module": self.module.state_dict(), "adamw": self._adamw.state_dict(), "num_steps": self.num_steps}
        state["skips"] = (self._skips, self._num_skips)
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(state, directory / "plain.pt")

    def load(self, directory: Path) -> None:
        if not (directory / "plain.pt").exists():
            raise ValueError(f"no checkpoint in {directory}")
        state = torch.load(directory / "plain.pt", weights_only=True)
        self.module.load_state_dict(state["module"])
        self._adamw.load_state_dict(state["adamw"])
        self.num_steps = state["num_steps"]
        self._skips, self._num_skips = state["skips"]

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self.module.parameters() if p.grad is not None]

    def close(self) -> None:
        self._adamw.zero_grad()


class RecordingEngine(PlainEngine):
    """Keeps the gradient of every step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gradients: list[Tensor] = []

    def step(self) -> StepResult:
        self.gradients.append(torch.cat([g.flatten() for g in self.full_gradient().values()]))
        return super().step()
