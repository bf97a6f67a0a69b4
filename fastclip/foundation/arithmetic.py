"""Norms by torch's operations, without overflow or underflow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

IN_FP32 = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.complex32: torch.complex64}
"""The dtype to multiply narrow gradients in. In their own dtype torch would round the coefficient first."""


def combine(norms: Sequence[Tensor], p: float) -> Tensor:
    """The p-norm of a vector, from the p-norms of its parts: 0-dim tensors on one device."""
    # The 0-norm of gradients counts tensors, and counts add up.
    return stable_norm(torch.stack(list(norms)), 1.0 if p == 0 else p)


def norm_of_norms(norms: Tensor, dtype: torch.dtype, dim: int | None = None) -> Tensor:
    """The 2-norm of a vector, from the 2-norms of its parts. `dtype` is that of the gradients they were taken of."""
    if dtype != torch.float64 and norms.dtype == torch.float64:  # their squares neither overflow nor underflow
        norm: Tensor = torch.linalg.vector_norm(norms, 2.0, dim)
        return norm
    return stable_norm(norms, 2.0, dim)


def stable_norm(x: Tensor, p: float, dim: int | None = None) -> Tensor:
    """``‖x‖_p`` of a nonempty tensor, p ≠ 0, in x's own precision. No power overflows or underflows."""
    axes = tuple(range(x.dim())) if dim is None else dim
    magnitudes = x.abs()
    leading = magnitudes.amax(axes, keepdim=True) if p > 0 else magnitudes.amin(axes, keepdim=True)  # the largest power
    if math.isinf(p):
        return leading.squeeze(axes)
    scale = torch.where(leading.isfinite() & (leading > 0), leading, torch.ones_like(leading))
    # `vector_norm` on the CPU takes the powers one by one: 2 to 30 times as slow.
    norm = magnitudes.div_(scale).pow_(p).sum(axes, keepdim=True).pow(1 / p) * scale
    return norm.squeeze(axes)
