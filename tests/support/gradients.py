"""Gradients for the tests: any layout and address, surrounded by NaN, also in the gaps between elements.

So a read outside a gradient makes the norm NaN, and tests can detect a write outside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from oracle import assert_same_bits
from torch import Tensor, nn

GUARD = 64  # elements of NaN before and after a gradient


def embedded(
    values: Tensor,
    offset: int = 0,
    *,
    strides: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A copy of `values` that starts `offset` elements after a 64-byte boundary, surrounded by NaN."""
    strides = tuple(strides if strides is not None else values.contiguous().stride())
    extent = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True) if size)
    memory = torch.full((GUARD + offset + extent + GUARD,), math.nan, dtype=values.dtype, device=device)
    view = memory.as_strided(values.shape, strides, GUARD + offset)
    return view.copy_(values)


def twin(tensor: Tensor) -> Tensor:
    """A copy of a strided tensor together with the memory around it."""
    copy = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    storage = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
    return copy.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())


def addresses(*memory: Tensor | None) -> list[int | None]:
    """The addresses of tensors, as arguments of a kernel."""
    return [None if tensor is None else tensor.data_ptr() for tensor in memory]


def grad_of(parameter: Tensor) -> Tensor:
    """The gradient, which is not None."""
    assert parameter.grad is not None
    return parameter.grad


def grads_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The gradients that are not None."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


class GradHolder:
    """An object that has a gradient, but is no tensor: torch requires nothing else."""

    def __init__(self, grad: Tensor | None) -> None:
        self.grad = grad


def parameters(gradients: Sequence[Tensor]) -> list[nn.Parameter]:
    """Parameters that have these gradients as `.grad`."""
    made = []
    for gradient in gradients:
        parameter = nn.Parameter(torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device))
        parameter.grad = gradient
        made.append(parameter)
    return made


def assert_untouched_around(tensor: Tensor, original: Tensor) -> None:
    """The memory of a strided tensor is the same as its `twin`'s, except for the tensor's own elements."""
    memory, before = (
        t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0) for t in (tensor, original)
    )
    outside = torch.ones(memory.shape, dtype=torch.bool, device=tensor.device)
    outside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(False)
    assert_same_bits(memory[outside], before[outside])


def random_values(rng: np.random.Generator, shape: Sequence[int], dtype: torch.dtype, *, zeros: bool = True) -> Tensor:
    """Normal values, with a few zeros of both signs if `zeros`."""
    values = np.asarray(rng.standard_normal(tuple(shape)))
    if zeros:
        values[rng.random(values.shape) < 0.01] = 0.0
        values[rng.random(values.shape) < 0.01] = -0.0
    if dtype.is_complex:
        values = values + 1j * rng.standard_normal(values.shape)
    return torch.from_numpy(values).to(dtype)
