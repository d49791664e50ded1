"""What the steps of one update did, gathered without reading a number back before the end."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from learner.training import StepResult, TrainingEngine


class StepLog:
    """Sums losses and diagnostics over micro-batches and ranks, step by step.

    Args:
        engine: The engine whose steps these are; reduces over its ranks.
    """

    def __init__(self, engine: TrainingEngine) -> None:
        self._engine = engine
        self._names: tuple[str, ...] = ()
        self._sums: list[Tensor] = []
        self._open: Tensor | None = None
        self._results: list[StepResult] = []
        self._watched = torch.zeros((), device=engine.context.device)

    @property
    def num_steps(self) -> int:
        """Steps, applied or not."""
        return len(self._results)

    @property
    def num_applied(self) -> int:
        """Steps that were applied."""
        return sum(result.applied for result in self._results)

    @property
    def num_skipped(self) -> int:
        """Steps that were skipped because a number was not finite."""
        return len(self._results) - self.num_applied

    @torch.no_grad()
    def add(
        self, loss: Tensor, diagnostics: Mapping[str, Tensor], *, weights: Tensor, watched: Tensor | None = None
    ) -> None:
        """Take a micro-batch's numbers.

        Args:
            loss: Its share of the loss.
            diagnostics: Weighted sums, the same names every time.
            weights: [n] the weights of these sums.
            watched: [n] numbers whose maximum over the first step is wanted.
        """
        self._names = ("loss", *diagnostics)
        sums = torch.stack([weights.sum(), loss.detach(), *diagnostics.values()])
        self._open = sums if self._open is None else self._open + sums
        if watched is not None and not self._results and len(watched):
            self._watched = torch.maximum(self._watched, watched.max())

    def close_step(self, result: StepResult) -> None:
        """Finish a step.

        Args:
            result: What the engine says of it.
        """
        if self._open is None:
            raise ValueError("a step needs at least one micro-batch")
        self._sums.append(self._open)
        self._open = None
        self._results.append(result)

    def latest(self, name: str) -> float:
        """Read a diagnostic of the last step, over the ranks; every rank must call it."""
        row = self._engine.all_reduce_sum(self._sums[-1].clone())
        return self._means(row.double().tolist()).get(name, 0.0)

    def reduce(self) -> "StepSummary | None":
        """Sum over the ranks, once for all steps; every rank must call it.

        Returns:
            The summary, or None if there was no step.
        """
        if not self._sums:
            return None
        context = self._engine.context
        # Each rank's maximum has a place of its own, so that a sum over ranks keeps them all.
        maxima = torch.zeros(context.world_size, device=context.device)
        maxima[context.rank] = self._watched
        rows = torch.stack(self._sums)
        total = self._engine.all_reduce_sum(torch.cat([rows.flatten(), maxima])).double().cpu()
        rows, maxima = total[: rows.numel()].view(rows.shape), total[rows.numel() :]
        means = [self._means(row) for row in rows.tolist()]
        return StepSummary(means=means, results=self._results, first_watched_max=maxima.max().item())

    def _means(self, row: list[float]) -> dict[str, float]:
        """Turn a step's sums into means; the loss keeps its own normaliser."""
        weight, loss, *diagnostics = row
        if weight == 0:  # a correction has left no token of the step, so there is nothing to average
            return {"loss": loss}
        return {"loss": loss} | {n: d / weight for n, d in zip(self._names[1:], diagnostics, strict=True)}


class StepSummary:
    """The steps of an update, over all ranks.

    Args:
        means: Of each step: the loss, and the weighted means of the diagnostics.
        results: Of each step.
        first_watched_max: Maximum of the watched numbers over the first step.
    """

    def __init__(self, *, means: list[dict[str, float]], results: list[StepResult], first_watched_max: float) -> None:
        self.first = means[0]
        self.first_watched_max = first_watched_max
        self.last_learning_rate = results[-1].learning_rate
        self._applied = [(m, r.grad_norm) for m, r in zip(means, results, strict=True) if r.applied]

    def mean(self, name: str) -> float | None:
        """Average a diagnostic (or `loss` or `grad_norm`) over the applied steps; None if there is nothing."""
        found = [norm if name == "grad_norm" else means.get(name) for means, norm in self._applied]
        numbers = [number for number in found if number is not None]
        return math.fsum(numbers) / len(numbers) if numbers else None
