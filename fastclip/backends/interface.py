"""What a backend must offer, and the rule of the global norm that all of them share.

A backend is a module with two functions: ``obstacle(device)`` tells why it cannot serve a device, or None, and
``plan(tensors)`` takes tensors of one device that do not overlap and returns a `Plan` for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Scalar: TypeAlias = Tensor | float
"""One number in fp64: 0-dim on a device, or a Python float where it is on the host anyway."""

_WITHOUT_FP64 = frozenset({"mps"})

EPS = 1e-6
"""Added to the norm before the division, as torch does: it keeps the coefficient finite where the norm is 0."""


@dataclass(frozen=True)
class Reduction:
    """What one pass over gradients leaves.

    Attributes:
        norm: The norm as it is returned: 0-dim, on the gradients' device, in the dtype asked for.
        total: The same norm before it was rounded to that dtype.
        coefficient: ``min(max_norm / (total + 1e-6), 1)``; NaN where the norm is.
    """

    norm: Tensor
    total: Scalar
    coefficient: Scalar


class Plan(Protocol):
    """Gradients of one device, ready to be reduced, scaled and clamped together."""

    device: torch.device

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype) -> Reduction:
        """Read every gradient once for the p-norm of all of them. For p = 0 that is the number of nonzero tensors."""

    def scale_(self, coefficient: Scalar) -> None:
        """Multiply the gradients by a coefficient, on whatever device it is; write nothing where it is 1."""

    def clamp_(self, minimum: float, maximum: float) -> None:
        """Clamp the gradients to [minimum, maximum]; write nothing where nothing is outside."""


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of norms and coefficients on a device: fp64 where it has that."""
    return torch.float32 if device.type in _WITHOUT_FP64 else torch.float64


def on(device: torch.device, scalar: Scalar) -> Tensor:
    """Bring a number to a device. To the CPU it waits, for what is read there must have arrived."""
    if isinstance(scalar, Tensor):
        return scalar.to(device, wide_dtype(device), non_blocking=device.type != "cpu")
    return torch.tensor(scalar, dtype=wide_dtype(device), device=device)


def reduction(total: Tensor, max_norm: float, dtype: torch.dtype) -> Reduction:
    """Apply the rule of the global norm to a total, by torch operations and so without a sync."""
    return Reduction(total.to(dtype), total, clip_coefficient(total, max_norm))


def clip_coefficient(total: Scalar, max_norm: float) -> Scalar:
    """``min(max_norm / (total + 1e-6), 1)``, in fp64 where the device has it; a NaN stays one."""
    coefficient = max_norm / (total + EPS)
    if isinstance(coefficient, Tensor):
        return torch.clamp(coefficient, max=1.0)
    return 1.0 if coefficient > 1 else coefficient


def combine(norms: Sequence[Tensor], p: float) -> Tensor:
    """The p-norm of norms, 0-dim tensors on one device: of all their elements, had they been one vector."""
    # The 0-norms of groups are counts of tensors, and counts add up.
    return stable_norm(torch.stack(list(norms)), 1.0 if p == 0 else p)


def stable_norm(x: Tensor, p: float) -> Tensor:
    """``‖x‖_p`` of a nonempty tensor in x's own precision, without overflow or underflow of the powers (p ≠ 0)."""
    leading = x.abs().amax() if p > 0 else x.abs().amin()  # of which the power is the largest
    scale = torch.where(leading.isfinite() & (leading > 0), leading, 1.0)
    norm: Tensor = torch.linalg.vector_norm(x / scale, p) * scale
    return norm
