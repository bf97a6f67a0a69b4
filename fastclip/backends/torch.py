"""torch's own operations, tensor by tensor: for what is not plain memory, and for devices without a faster backend."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.backends.interface import Reduction, Scalar, combine, reduction, stable_norm

_LOW_PRECISION = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.complex32: torch.complex64}
_DOUBLES = (torch.float64, torch.complex128)
_WITHOUT_FP64 = frozenset({"mps"})


def obstacle(device: torch.device) -> str | None:  # noqa: ARG001 - the signature is the backends'
    """None: torch serves every device it has."""
    return None


def plan(tensors: list[Tensor]) -> TorchPlan:
    """Prepare tensors of any kind; they may overlap, and are then scaled one after another."""
    return TorchPlan(tensors)


class TorchPlan:
    """See `fastclip.backends.interface.Plan`."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        self.device = tensors[0].device

    @torch.no_grad()
    def reduce(self, p: float, max_norm: float, dtype: torch.dtype) -> Reduction:
        norms = [_norm(tensor, p) for tensor in self.tensors]
        total = torch.stack(norms).count_nonzero().to(norms[0].dtype) if p == 0 else combine(norms, p)
        return reduction(total, max_norm, dtype)

    @torch.no_grad()
    def scale_(self, coefficient: Scalar) -> None:
        for tensor in self.tensors:
            wide = _LOW_PRECISION.get(tensor.dtype)
            if wide is None:
                tensor.mul_(coefficient)
            else:  # `mul_` would round the coefficient to the tensor's own precision first
                tensor.copy_(tensor.to(wide).mul_(coefficient))

    @torch.no_grad()
    def clamp_(self, minimum: float, maximum: float) -> None:
        for tensor in self.tensors:
            tensor.clamp_(min=minimum, max=maximum)


def _norm(tensor: Tensor, p: float) -> Tensor:
    """The norm in fp64, in which squares of narrower types neither overflow nor underflow."""
    has_fp64 = tensor.device.type not in _WITHOUT_FP64
    if p == 0:  # not `vector_norm`, which warns that it casts complex numbers
        return tensor.count_nonzero().to(torch.float64 if has_fp64 else torch.float32)
    if not has_fp64:
        return stable_norm(tensor.to(torch.float32), p)
    if tensor.dtype in _DOUBLES:
        return stable_norm(tensor, p)
    wide = torch.complex128 if tensor.is_complex() else torch.float64
    norm: Tensor = torch.linalg.vector_norm(tensor, p, dtype=wide)
    return norm
