"""Torch's own operations, tensor by tensor: for tensors of any kind, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from fastclip.backends.coefficient import reduction
from fastclip.backends.interface import Bounds, Plan, Reduction, Unscaling, one_each
from fastclip.backends.thresholds import adapt
from fastclip.backends.units import clip_units_
from fastclip.foundation.arithmetic import IN_FP32, combine, stable_norm
from fastclip.foundation.devices import Scalar, on, wide_dtype
from fastclip.foundation.memory import pieces

__all__ = ["adapt", "obstacle", "plan"]

_OVERFLOW_PROOF = (1.0, 2.0, float("inf"), float("-inf"))
"""Orders whose powers neither overflow nor underflow in fp64, for elements of narrower dtypes."""


def obstacle(device: torch.device) -> str | None:  # noqa: ARG001 - the signature is the backends'
    """None: torch serves every device."""
    return None


def plan(tensors: list[Tensor]) -> TorchPlan:
    """Prepare tensors of any kind. They may overlap: they are scaled one after another."""
    return TorchPlan(tensors)


class TorchPlan(Plan):
    """See `fastclip.backends.interface.Plan`."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.device = tensors[0].device

    @torch.no_grad()
    def reduce(self, p: float, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
        norms = [_norm(tensor, p) for tensor in self.tensors]
        total = torch.stack(norms).count_nonzero().to(norms[0].dtype) if p == 0 else combine(norms, p)
        return reduction(total, max_norm, dtype, unscaling)

    @torch.no_grad()
    def norms(self) -> Tensor:
        return torch.stack([_norm(tensor, 2.0) for tensor in self.tensors])

    @torch.no_grad()
    def scale_(self, coefficient: Scalar) -> None:
        coefficients = on(self.device, coefficient).expand(len(self.tensors))
        for tensor, own in zip(map(_real, self.tensors), coefficients.unbind(), strict=True):
            # As on the other backends: two factors, if a single one would be subnormal.
            small = 2.0**-900 if tensor.dtype.to_real() == torch.float64 else 2.0**-100
            power = torch.where(own.abs() < small, torch.full_like(own, small), torch.ones_like(own))
            wide = IN_FP32.get(tensor.dtype)
            if wide is None:
                tensor.mul_(own / power).mul_(power)
                continue
            for piece in pieces(tensor):  # `mul_` would first round the coefficient to the tensor's own dtype
                piece.copy_(piece.to(wide).mul_(own / power).mul_(power))

    @torch.no_grad()
    def clamp_(self, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> Tensor | None:
        minimums, maximums = (one_each(bound, len(self.tensors)) for bound in (minimum, maximum))
        flags = []
        for tensor, low, high in zip(self.tensors, minimums, maximums, strict=True):
            if watch:
                outside = (((piece < low) | (piece > high)).any() for piece in pieces(tensor))
                flags.append(reduce(torch.logical_or, outside))
            tensor.clamp_(min=low, max=high)
        return torch.stack(flags) if watch else None

    @torch.no_grad()
    def clip_units_(self, weights: Plan, counts: Sequence[int], ratios: Tensor, eps: float) -> Tensor:  # noqa: ARG002
        own = on(self.device, ratios).unbind()
        pairs = zip(self.tensors, weights.tensors, own, strict=True)  # type: ignore[attr-defined]  # it is a TorchPlan
        return torch.stack([clip_units_(_real(grad), _real(weight), ratio, eps) for grad, weight, ratio in pairs])


def _real(tensor: Tensor) -> Tensor:
    """The real and imaginary parts of a complex tensor as a real view; any other tensor unchanged.

    The parts are what is scaled. A complex product by c + 0i spreads an infinity or NaN from one part to the other,
    even if c is 1.
    """
    if not tensor.is_complex():
        return tensor
    # To scale by a real number, the sign with which the imaginary part is stored does not matter.
    return torch.view_as_real(tensor.conj() if tensor.is_conj() else tensor)


def _norm(tensor: Tensor, p: float) -> Tensor:
    """The p-norm in fp64 if the device has it; for p = 0 the number of nonzero elements."""
    parts = list(pieces(tensor))
    if len(parts) == 1:
        return _norm_of_piece(tensor, p)
    # In one tensor: small results left between large temporaries would keep the heap from shrinking.
    norms = torch.empty(len(parts), dtype=wide_dtype(tensor.device), device=tensor.device)
    for i, piece in enumerate(parts):
        norms[i] = _norm_of_piece(piece, p)
    return combine(norms.unbind(), p)


def _norm_of_piece(tensor: Tensor, p: float) -> Tensor:
    wide = wide_dtype(tensor.device)
    if p == 0:  # `vector_norm` would warn that it casts complex numbers
        return tensor.count_nonzero().to(wide)
    if p not in _OVERFLOW_PROOF or tensor.dtype.to_real() == wide or wide != torch.float64:
        return stable_norm(tensor.to(wide.to_complex() if tensor.is_complex() else wide), p)
    norm: Tensor = torch.linalg.vector_norm(tensor, p, dtype=wide.to_complex() if tensor.is_complex() else wide)
    return norm
