"""The Triton backend: plans that keep the chunk table of their gradients on the device, and launch the kernels.

A plan depends on sizes and element types only and is kept for the next call; when gradients have moved since, their
addresses alone are uploaded again. Plans belong to a thread and a stream, so that two of them never share a table.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from functools import cache, cached_property
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from fastclip.backends.interface import Reduction, reduction

SEGMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""The position of each dtype in `fastclip.kernels.table.ELEMENT_SIZES`."""

PROGRAMS_PER_SM = 4  # as many as fit at the reduction's 64 registers a thread
PROGRAMS_ON_CPU = 5  # without a GPU: odd and small, so that programs take several chunks and unequal shares
PLANS_KEPT = 16  # a thread: models that are trained in turns, each with its own set of gradients


def obstacle(device: torch.device) -> str | None:
    """Why Triton cannot run on the device: it is not installed, or has no driver for it."""
    if find_spec("triton") is None:
        return "Triton is not installed (`pip install triton` on Linux; a CUDA build of torch brings it)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return _driver_obstacle(device.type)


def _driver_obstacle(device_type: str) -> str | None:
    from triton.runtime import driver

    try:
        target = driver.active.get_active_torch_device().type
    except RuntimeError as error:
        return f"Triton has no active driver ({error}); TRITON_INTERPRET=1 runs its kernels on the CPU, slowly"
    return None if target == device_type else f"Triton's active driver serves {target}"


def plan(tensors: list[Tensor]) -> TritonPlan:
    """Prepare plain tensors of one device that do not overlap."""
    device = tensors[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    numels = tuple(map(Tensor.numel, tensors))
    dtypes = tuple(tensor.dtype for tensor in tensors)
    key = (device, stream, numels, dtypes)
    plans = _plans_of_this_thread()
    found = plans.get(key)
    if found is None:
        found = plans[key] = TritonPlan(device, numels, dtypes)
        while len(plans) > PLANS_KEPT:
            plans.popitem(last=False)
    plans.move_to_end(key)
    found.locate(list(map(Tensor.data_ptr, tensors)))
    return found


class _Plans(threading.local):
    def __init__(self) -> None:
        self.kept: OrderedDict[object, TritonPlan] = OrderedDict()


_plans = _Plans()


def _plans_of_this_thread() -> OrderedDict[object, TritonPlan]:
    return _plans.kept


class TritonPlan:
    """See `fastclip.backends.interface.Plan`. It holds addresses, and so keeps no gradient alive."""

    def __init__(self, device: torch.device, numels: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        from fastclip.kernels import table

        segments = np.array([SEGMENTS[dtype] for dtype in dtypes])
        layout = table.lay_out(np.array(numels), segments)
        self.device = device
        self.numels = numels
        self.ends = layout.ends
        self.addresses: list[int] = []
        self.rows = torch.empty((len(numels), 2), dtype=torch.int64, device=device)
        self.chunks = _upload(layout.chunks, device)
        self.slices = layout.slices
        self.partials = torch.empty(len(layout.chunks), dtype=torch.float64, device=device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self.state = torch.empty(2, dtype=torch.float64, device=device)
        self.total, self.coefficient = self.state.unbind()
        self.grid = (min(_programs(device), len(layout.chunks)),)
        self.options = {"num_warps": table.NUM_WARPS}

    def locate(self, addresses: list[int]) -> None:
        """Take note of where the gradients are; upload it if they have moved."""
        if addresses != self.addresses:
            self.rows.copy_(_upload(np.array([addresses, self.numels]).T, self.device), non_blocking=True)
            self.addresses = addresses

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype) -> Reduction:
        from fastclip.kernels.reduce import reduce_kernel

        kind = _kind(p)
        norm = torch.empty((), dtype=dtype, device=self.device)
        table = (self.chunks, self.rows, self.partials, self.ticket, self.state, norm)
        with _current(self.device):
            reduce_kernel[self.grid](*table, *self.ends, p, max_norm, KIND=kind, **self.options)
        if p == 0:
            return reduction(self.norms(p).count_nonzero().double(), max_norm, dtype)
        return Reduction(norm, self.total, self.coefficient)

    def norms(self, p: float) -> Tensor:
        """The norm of each tensor, in fp64, from what the last `reduce` left: one more launch."""
        from fastclip.kernels.reduce import tensor_norms_kernel

        # A chunk's 0-norm counts its nonzero elements, and counts add up.
        kind = "one" if p == 0 else _kind(p)
        norms = torch.empty(len(self.numels), dtype=torch.float64, device=self.device)
        with _current(self.device):
            grid = (min(_programs(self.device), len(self.numels)),)
            tensor_norms_kernel[grid](
                self.partials, self._slices_on_device, norms, len(self.numels), p, KIND=kind, **self.options
            )
        return norms

    @cached_property
    def _slices_on_device(self) -> Tensor:
        return _upload(self.slices, self.device)

    def scale_(self, coefficient: Tensor) -> None:
        from fastclip.kernels.apply import apply_kernel

        with _current(self.device):
            apply_kernel[self.grid](self.chunks, self.rows, coefficient, 0, *self.ends, **self.options)

    def clamp_(self, minimum: float, maximum: float) -> None:
        from fastclip.kernels.clamp import clamp_kernel

        with _current(self.device):
            clamp_kernel[self.grid](self.chunks, self.rows, *self.ends, minimum, maximum, **self.options)


def _kind(p: float) -> str:
    named = {2.0: "two", 1.0: "one", 0.0: "zero", float("inf"): "max", float("-inf"): "min"}
    return named.get(p, "power" if p > 0 else "inverse")


def _upload(array: np.ndarray[tuple[int, ...], np.dtype[np.int64]], device: torch.device) -> Tensor:
    """Copy to the device through pinned memory, which torch does not reuse before the copy is complete."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@cache
def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return PROGRAMS_ON_CPU
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def _current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the gradients'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
