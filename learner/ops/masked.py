"""Sums, moments and whitening over the entries that a mask keeps, and the checks that every op starts with.

Entries outside the mask may hold anything, a NaN included: they are replaced before any arithmetic, so that
neither a value nor a gradient depends on them. Moments are built from sums that add over micro-batches and ranks,
in two passes (first the mean, then the squares about it), because the difference of two large sums loses digits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WHITEN_EPS = 1e-8
"""Added to the variance inside the square root, in squared units of the values."""


def check_alike(*, ranks: tuple[int, ...] = (1, 2), **tensors: Tensor) -> None:
    """Check that the tensors agree in shape, rank and precision.

    Args:
        ranks: The numbers of dimensions allowed; a batch is packed `[N]` or padded `[B, T]`.
        **tensors: The tensors by the name that the error message shall show.

    Raises:
        ValueError: If a tensor has another rank, if it is not float32 or float64 (log-probs and losses in half
            precision are silently wrong), or if shapes or dtypes differ.
    """
    reference_name, reference = next(iter(tensors.items()))
    for name, tensor in tensors.items():
        if tensor.ndim not in ranks:
            raise ValueError(f"{name} must have rank {' or '.join(map(str, ranks))}, got shape {tuple(tensor.shape)}")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} must be float32 or float64, got {tensor.dtype}")
        if tensor.shape != reference.shape or tensor.dtype != reference.dtype:
            raise ValueError(
                f"{name} must be like {reference_name}, {tuple(reference.shape)} of {reference.dtype}, "
                f"got {tuple(tensor.shape)} of {tensor.dtype}"
            )


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Check that a mask is boolean and has the given shape.

    Args:
        mask: True at the entries that count.
        shape: The shape of what it masks.

    Raises:
        ValueError: If it is not.
    """
    if mask.dtype != torch.bool or mask.shape != shape:
        raise ValueError(f"the mask must be bool of shape {tuple(shape)}, got {mask.dtype} of {tuple(mask.shape)}")


def masked_sum(values: Tensor, mask: Tensor, *, dim: int | None = None) -> Tensor:
    """Sum the values that the mask keeps.

        sum_i m_i x_i

    Args:
        values: Any shape.
        mask: Bool, the shape of `values`; True at the entries that count.
        dim: The dimension to sum over; all of them by default.

    Returns:
        A scalar, or `values` without dimension `dim`.

    Raises:
        ValueError: If the mask does not fit.
    """
    check_mask(mask, values.shape)
    return torch.where(mask, values, 0).sum(dim=dim)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Average the values that the mask keeps.

        sum_i m_i x_i / sum_i m_i

    Args:
        values: Any shape.
        mask: Bool, the shape of `values`; True at the entries that count.

    Returns:
        A scalar in the dtype of `values`.

    Raises:
        ValueError: If the mask does not fit or keeps nothing.
    """
    return moments(values, mask)[0]


def masked_var(values: Tensor, mask: Tensor) -> Tensor:
    """Compute the biased variance of the values that the mask keeps.

        sum_i m_i (x_i - mean)^2 / sum_i m_i

    Args:
        values: Any shape.
        mask: Bool, the shape of `values`; True at the entries that count.

    Returns:
        A scalar in the dtype of `values`.

    Raises:
        ValueError: If the mask does not fit or keeps nothing.
    """
    return moments(values, mask)[1]


def count_and_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Count and sum the values that the mask keeps: the first pass of `moments`.

    Args:
        values: Any shape.
        mask: Bool, the shape of `values`; True at the entries that count.

    Returns:
        `[2]`, float64: the count and the sum, to be added over micro-batches and ranks.
    """
    return torch.stack([mask.sum(dtype=torch.float64), masked_sum(values.double(), mask)])


def squares_about(values: Tensor, mask: Tensor, *, mean: Tensor) -> Tensor:
    """Sum the squared distances from a given mean: the second pass of `moments`.

        sum_i m_i (x_i - mean)^2

    Args:
        values: Any shape.
        mask: Bool, the shape of `values`; True at the entries that count.
        mean: Scalar; the mean over all micro-batches and ranks.

    Returns:
        A scalar, float64, to be added over micro-batches and ranks.
    """
    return masked_sum((values.double() - mean).square(), mask)


def moments(
    values: Tensor, mask: Tensor, *, all_reduce_sum: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Compute mean and biased variance of the values that the mask keeps.

    Args:
        values: Any shape.
        mask: Bool, the shape of `values`; True at the entries that count.
        all_reduce_sum: Returns the sum of its argument over the data-parallel ranks. It is called twice; a rank
            with nothing to count must take part. Without it the moments are those of `values` alone.

    Returns:
        The mean and the variance, two scalars in the dtype of `values`.

    Raises:
        ValueError: If the mask does not fit, or if it keeps nothing on any rank.
    """
    reduce = all_reduce_sum or (lambda partial: partial)
    count, total = reduce(count_and_sum(values, mask)).unbind()
    if count == 0:
        raise ValueError("the mask keeps no entry, so mean and variance are undefined")
    mean = total / count
    var = reduce(squares_about(values, mask, mean=mean)) / count
    return mean.to(values.dtype), var.to(values.dtype)


def whiten(
    values: Tensor, mask: Tensor, *, shift_mean: bool = True, mean: Tensor | None = None, var: Tensor | None = None
) -> Tensor:
    """Scale the values to variance one and, unless told otherwise, shift them to mean zero.

        w_i = m_i (x_i - mean) / sqrt(var + 1e-8)        with the mean added back if not shift_mean

    Source: `whiten` in openai/lm-human-preferences, core.py:336-341 (biased variance), with a mask.

    Args:
        values: Any shape.
        mask: Bool, the shape of `values`; True at the entries that count.
        shift_mean: False keeps the mean where it was, as rewards need.
        mean: Scalar from `moments`, over the global batch; by default that of these values.
        var: Scalar from `moments`, over the global batch; given exactly when `mean` is.

    Returns:
        The shape and dtype of `values`; zero where the mask is False.

    Raises:
        ValueError: If the mask does not fit or keeps nothing, or if only one of the moments is given.
    """
    check_mask(mask, values.shape)
    if (mean is None) != (var is None):
        raise ValueError("give both mean and var, or neither")
    if mean is None or var is None:
        mean, var = moments(values, mask)
    whitened = (values - mean) * torch.rsqrt(var + WHITEN_EPS)
    return torch.where(mask, whitened if shift_mean else whitened + mean, 0)
