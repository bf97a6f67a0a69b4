"""Norms by torch's operations, without overflow or underflow, and what dtypes are multiplied in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

IN_FP32 = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.complex32: torch.complex64}
"""What dtypes narrower than fp32 are multiplied in, for the coefficient would be rounded to them."""


def combine(norms: Sequence[Tensor], p: float) -> Tensor:
    """The p-norm of norms, 0-dim tensors on one device: of all their elements, had they been one vector."""
    # The 0-norms of groups are counts of tensors, and counts add up.
    return stable_norm(torch.stack(list(norms)), 1.0 if p == 0 else p)


def norm_of_norms(norms: Tensor, dtype: torch.dtype, dim: int | None = None) -> Tensor:
    """Return the 2-norm of 2-norms, as `wide_dtype` has them, of gradients of a dtype: of all their elements."""
    if dtype != torch.float64 and norms.dtype == torch.float64:  # whose squares neither overflow nor underflow
        norm: Tensor = torch.linalg.vector_norm(norms, 2.0, dim)
        return norm
    return stable_norm(norms, 2.0, dim)


def stable_norm(x: Tensor, p: float, dim: int | None = None) -> Tensor:
    """``‖x‖_p`` of a nonempty tensor in x's own precision, without overflow or underflow of the powers (p ≠ 0)."""
    return norm_of_magnitudes_(x.abs(), p, dim)


def norm_of_magnitudes_(magnitudes: Tensor, p: float, dim: int | None = None) -> Tensor:
    """The same of absolute values, which it overwrites."""
    axes = tuple(range(magnitudes.dim())) if dim is None else dim
    leading = magnitudes.amax(axes, keepdim=True) if p > 0 else magnitudes.amin(axes, keepdim=True)  # the largest power
    if math.isinf(p):
        return leading.squeeze(axes)
    scale = torch.where(leading.isfinite() & (leading > 0), leading, torch.ones_like(leading))
    # On the CPU `vector_norm` takes powers one by one, 2 to 30 times as slowly.
    norm = magnitudes.div_(scale).pow_(p).sum(axes, keepdim=True).pow(1 / p) * scale
    return norm.squeeze(axes)
