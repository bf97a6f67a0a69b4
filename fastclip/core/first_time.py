"""The first call with some gradients: check them, dispatch them to backends, make the plans.

A gradient is *plain* if it is dense in memory (no gaps, no overlaps) and holds real floating-point numbers. Then an
address and a number of elements is all that a kernel needs. Torch's own operations serve everything else: complex
gradients, strided views with gaps, tensor subclasses, meta tensors. A sparse gradient takes part by its values. While
torch's operations are traced, torch serves every gradient. One norm is taken over all of them in any case.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastclip.backends import GENERAL, Backend, for_device
from fastclip.backends.interface import ELEMENT_TYPES
from fastclip.core.checks import check_dtypes, check_writable
from fastclip.core.gradients import PLAIN_TYPES, Gradients
from fastclip.core.planned import Dispatch, Planned
from fastclip.foundation.memory import overlapping
from fastclip.foundation.tracing import is_traced


def plan(grads: Gradients, *, in_place: bool) -> Planned:
    """Check gradients, dispatch them to backends and make the plans.

    Raises:
        RuntimeError: As `fastclip.core.prepare.prepare`.
    """
    check_dtypes(grads)
    if in_place:
        check_writable(grads)
    tensors = grads.tensors
    values = [_values(t, in_place=in_place) if t.layout is torch.sparse_coo else t for t in tensors]
    groups = _dispatched(values)
    plans = [backend.plan([values[i] for i in members]) for (backend, _), members in groups.items()]
    temporaries = [value for value, tensor in zip(values, tensors, strict=True) if value is not tensor]
    return Planned(Dispatch(tensors, groups), plans, temporaries)


def _dispatched(values: Sequence[Tensor]) -> dict[tuple[Backend, torch.device], list[int]]:
    """The indices of the tensors that each backend serves on each device.

    Tensors without elements are left out. Of plain tensors that share memory (listed twice, or overlapping views) all
    but the first go to torch's operations, one after another. So they are counted and scaled once more, as torch does,
    and two threads never race for an address.
    """
    groups: dict[tuple[Backend, torch.device], list[int]] = {}
    plain: dict[torch.device, list[int]] = {}
    by_kernels = not is_traced()
    for position, tensor in enumerate(values):
        if tensor.numel() == 0:
            continue
        if by_kernels and _is_plain(tensor):
            plain.setdefault(tensor.device, []).append(position)
        else:
            groups.setdefault((GENERAL, tensor.device), []).append(position)
    for device, members in plain.items():
        backend = for_device(device)
        tensors = [values[position] for position in members]
        starts = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
        shared = overlapping(starts, np.array([tensor.nbytes for tensor in tensors]))
        for i, position in enumerate(members):
            groups.setdefault((GENERAL if i in shared else backend, device), []).append(position)
    return groups


def _values(grad: Tensor, *, in_place: bool) -> Tensor:
    """The values of a sparse COO gradient, its duplicate indices summed: in the gradient itself if `in_place`."""
    with torch.no_grad():
        coalesced = grad.coalesce()
        if in_place and not grad.is_coalesced():
            grad.copy_(coalesced)
            coalesced = grad
        return coalesced.values()


def _is_plain(grad: Tensor) -> bool:
    return (
        type(grad) in PLAIN_TYPES
        and grad.layout is torch.strided
        and grad.dtype in ELEMENT_TYPES
        and grad.device.type != "meta"
        and not grad.is_neg()
        and (grad.is_contiguous() or _is_dense(grad))
        and _has_aligned_memory(grad)
    )


def _has_aligned_memory(grad: Tensor) -> bool:
    try:
        address = grad.data_ptr()
    except RuntimeError:  # inside of a function transform (`torch.func`)
        return False
    return address > 0 and address % grad.element_size() == 0  # torch's "efficient zeros" have no memory


def _is_dense(grad: Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order (transposed, channels last)."""
    expected = 1
    for stride, size in sorted(zip(grad.stride(), grad.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
