"""Random small batches for the tests of the ops, and the ways to rearrange them that must not matter."""

from dataclasses import dataclass, fields, replace

import torch
from hypothesis import strategies as st
from torch import Tensor


def t64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(actual: Tensor | float, expected: object, atol: float = 1e-8) -> None:
    """Compare with the eight decimals of the vectors."""
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=1e-7,
        atol=atol,
    )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Padded `[B, T]` tensors, float64; the padding of all but the mask holds garbage."""

    logprobs: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    old_values: Tensor
    advantages: Tensor
    mask: Tensor
    scores: Tensor

    def rows(self, indices: list[int]) -> "Batch":
        return Batch(**{field.name: getattr(self, field.name)[indices] for field in fields(self)})

    def padded(self, num_columns: int, garbage: float) -> "Batch":
        shape = (len(self.mask), num_columns)
        wider = {
            field.name: torch.cat([getattr(self, field.name), torch.full(shape, garbage, dtype=torch.float64)], dim=1)
            for field in fields(self)
            if field.name not in ("mask", "scores")
        }
        mask = torch.cat([self.mask, torch.zeros(shape, dtype=torch.bool)], dim=1)
        return replace(self, mask=mask, **wider)

    def requiring_grad(self) -> "Batch":
        return replace(self, **{name: getattr(self, name).clone().requires_grad_() for name in ("logprobs", "values")})


def make_batch(lengths: list[int], seed: int, garbage: float = 7.0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    num_rows, width = len(lengths), max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]

    def noise(scale: float, shift: float = 0.0) -> Tensor:
        drawn = shift + scale * torch.randn(num_rows, width, generator=generator, dtype=torch.float64)
        return torch.where(mask, drawn, garbage)

    old_logprobs = noise(0.5, -2.0)
    old_values = noise(1.0)
    return Batch(
        logprobs=torch.where(mask, old_logprobs + noise(0.3), garbage),
        old_logprobs=old_logprobs,
        ref_logprobs=torch.where(mask, old_logprobs + noise(0.3), garbage),
        values=torch.where(mask, old_values + noise(0.3), garbage),
        old_values=old_values,
        advantages=noise(1.0),
        mask=mask,
        scores=torch.randn(num_rows, generator=generator, dtype=torch.float64),
    )


garbage_values = st.sampled_from([0.0, 7.0, -1e30, float("inf"), float("nan")])


@st.composite
def batches(draw: st.DrawFn, min_rows: int = 1) -> Batch:
    lengths = draw(st.lists(st.integers(1, 5), min_size=min_rows, max_size=5))
    return make_batch(lengths, seed=draw(st.integers(0, 10_000)), garbage=draw(garbage_values))
