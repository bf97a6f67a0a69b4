"""The Triton backend: tables on the device, and kernels launched over them.

One table has the gradients' addresses: if gradients move, 16 bytes a tensor are uploaded. The other tables depend on
sizes and dtypes only, and stay.
"""

from __future__ import annotations

import copy
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cache, cached_property, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastclip.backends.interface import ELEMENT_TYPES, Adaptation, Bounds, Plan, Reduction, Unscaling, one_each
from fastclip.foundation.devices import Scalar, for_graphs, on, stream_of, upload
from fastclip.foundation.memory import overlapping

PROGRAMS_PER_SM = {
    "reduce_kernel": 4,
    "tensor_norms_kernel": 4,
    "apply_kernel": 5,
    "clamp_kernel": 4,
    "clip_units_kernel": 2,
    "adapt_kernel": 2,  # with windows of up to 4096
}
"""The number of programs that an SM has registers for, in every variant of the kernel."""
PROGRAMS_ON_CPU = 5  # without a GPU: odd and small, so that programs take several chunks and unequal shares
NUMBERS = 8  # the settings that `adapt_kernel` takes
CACHED_TABLES = 512  # in each thread: some programs clip each parameter by itself
CACHED_ROWS = 2048  # gradients whose addresses stay on the device, in each table: for several models of equal sizes


def obstacle(device: torch.device) -> str | None:
    """Why Triton cannot serve a device: it is not installed, or has no driver for it."""
    if find_spec("triton") is None:
        return "Triton is not installed (`pip install triton` on Linux; a CUDA build of torch brings it)"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return _driver_obstacle(device.type)


def _driver_obstacle(device_type: str) -> str | None:
    from triton.runtime import driver

    try:
        target = driver.active.get_active_torch_device().type
    except Exception as error:  # noqa: BLE001 - Triton compiles and loads a driver, which fails in many ways
        reason = f"{type(error).__name__}: {error}"
        return f"Triton has no active driver ({reason}); TRITON_INTERPRET=1 runs its kernels on the CPU, slowly"
    return None if target == device_type else f"Triton's active driver serves {target}"


def plan(tensors: list[Tensor]) -> TritonPlan:
    """Prepare plain tensors of one device that do not overlap."""
    return TritonPlan(tensors)


class TritonPlan(Plan):
    """See `fastclip.backends.interface.Plan`. It holds addresses, so it keeps no gradient alive."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.device = tensors[0].device
        self.tables = _tables(self.device, tuple(map(Tensor.numel, tensors)), tuple(tensor.dtype for tensor in tensors))
        self.rows = self.tables.upload_rows(list(map(Tensor.data_ptr, tensors)))

    def moved(self, addresses: list[int]) -> TritonPlan | None:
        rows = self.tables.rows_at(addresses)
        if rows is None:
            return None
        plan = copy.copy(self)
        plan.rows = rows
        return plan

    def captured(self) -> TritonPlan:
        plan = copy.copy(self)
        plan.tables = self.tables.with_own_workspace()
        return plan

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
        tables = self.tables
        norm = torch.empty((), dtype=dtype, device=self.device)
        kind = _kind(p)
        partials = tables.counts if p == 0 else tables.partials
        memory = _addresses(tables.chunks, self.rows, partials, tables.ticket, tables.state, norm)
        scaling = _addresses(*(unscaling or (None, None)))
        arguments = (*memory, *tables.ends, p, max_norm, kind, tables.types[ELEMENT_TYPES[dtype]], *scaling)
        self._launch("reduce_kernel", (kind, dtype, unscaling is None), len(tables.chunks), arguments)
        return Reduction(norm, tables.total, tables.coefficient)

    def norms(self) -> Tensor:
        self.reduce(2.0, math.inf, torch.float64)
        tables = self.tables
        tensors = len(self.rows)
        norms = torch.empty(tensors, dtype=torch.float64, device=self.device)
        arguments = (*_addresses(tables.partials, tables.slices, norms), tensors)
        self._launch("tensor_norms_kernel", (), tensors, arguments)
        return norms

    def scale_(self, coefficient: Scalar) -> None:
        tables = self.tables
        own = tables.coefficient  # written by `reduce`: its device and dtype need no check
        coefficients = own if coefficient is own else on(self.device, coefficient)
        stride = coefficients.stride(0) if coefficients.dim() else 0
        arguments = (*_addresses(tables.chunks, self.rows, coefficients), stride, *tables.ends)
        self._launch("apply_kernel", (), len(tables.chunks), arguments)

    def clamp_(self, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> Tensor | None:
        tables = self.tables
        shared = isinstance(minimum, float) and isinstance(maximum, float)
        limits = (minimum, maximum) if shared else (-math.inf, math.inf)
        bounds = None
        if not shared:
            each = (tuple(one_each(bound, len(self.rows))) for bound in (minimum, maximum))
            bounds = for_graphs(_bounds(self.device, *each))
        changed = tables.changed if watch else None
        arguments = (*_addresses(tables.chunks, self.rows, bounds, changed), *tables.ends, *limits)
        self._launch("clamp_kernel", (shared, watch), len(tables.chunks), arguments)
        return changed

    def clip_units_(self, weights: Plan, counts: Sequence[int], ratios: Tensor, eps: float) -> Tensor:
        tables = self.tables
        units = tables.units(tuple(counts))
        own = on(self.device, ratios).contiguous()
        of_weights = weights.rows  # type: ignore[attr-defined]  # it is a TritonPlan
        memory = _addresses(units.map, self.rows, of_weights, units.counts, own, tables.flags)
        arguments = (*memory, *units.ends, eps)
        self._launch("clip_units_kernel", (), len(units.map), arguments)
        return tables.flags[: len(units.map)]  # the flags of the programs that were launched

    def _launch(self, kernel: str, variant: tuple[object, ...], most: int, arguments: tuple[Any, ...]) -> None:
        tables = self.tables
        try:
            tables.launcher.launch(kernel, variant, most, arguments, tables.stream)
        except BaseException:  # an interrupted interpreter may leave the workspace in any state
            tables.allocate()
            raise


class Launcher:
    """Launches kernels on one device.

    Triton inspects all arguments to find the compiled variant of a kernel, which takes longer than the launch. Here the
    variant follows from names and numbers that the caller gives: all other arguments are numbers of fixed types that
    Triton does not specialise on. So the compiled kernel is cached by the variant and launched directly.
    """

    def __init__(self, device: torch.device) -> None:
        from triton.runtime import driver

        from fastclip.kernels.table import LAUNCH_OPTIONS

        self.device = device
        self._driver = None if os.environ.get("TRITON_INTERPRET") == "1" else driver
        self._options = LAUNCH_OPTIONS
        self._launches: dict[tuple[object, ...], Callable[..., object]] = {}

    def launch(
        self, kernel: str, variant: tuple[object, ...], most: int, arguments: tuple[Any, ...], stream: int
    ) -> None:
        """Launch a kernel on a stream with at most `most` programs."""
        if self.device.type == "cuda" and self.device.index != torch.cuda.current_device():
            with torch.cuda.device(self.device):  # Triton launches on the current device
                self.launch(kernel, variant, most, arguments, stream)
            return
        key = (kernel, variant, most, self._driver and self._driver.active)
        launch = self._launches.get(key)
        if launch is not None:
            launch(*arguments, stream=stream)
            return
        programs = min(most, _programs(self.device, kernel))
        compiled = _kernel(kernel)[programs, 1, 1](*arguments, **self._options)
        if self._driver:
            self._launches[key] = compiled[programs, 1, 1]


_launcher = lru_cache(maxsize=64)(Launcher)


def adapt(adaptation: Adaptation, state: Tensor, norms: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """See `fastclip.backends.interface`."""
    from fastclip.kernels.adapt import GROUPS

    groups, width = state.shape
    norms = norms.contiguous()
    results = torch.empty(2, groups, dtype=torch.float64, device=state.device)
    least = GROUPS.value
    is_quantile = adaptation.kind == "quantile"
    lanes = max(least, 1 << (int(adaptation.numbers[0]) - 1).bit_length()) if is_quantile else least
    most = min(groups if is_quantile else -(-groups // least), _programs(state.device, "adapt_kernel"))
    numbers = (*adaptation.numbers, *(0.0,) * (NUMBERS - len(adaptation.numbers)))
    arguments = (*_addresses(state, norms, total, results), groups, width, *numbers, adaptation.kind, lanes)
    _launcher(state.device).launch("adapt_kernel", (adaptation.kind, lanes), most, arguments, stream_of(state.device))
    return results[0], results[1]


def _addresses(*memory: Tensor | None) -> list[int | None]:
    """Addresses as the kernels take them: see `fastclip.kernels.table`."""
    return [None if tensor is None else tensor.data_ptr() for tensor in memory]


class Units(NamedTuple):
    """The units of some gradients; see `fastclip.kernels.table.lay_out_units`. Both tensors are on the device."""

    map: Tensor
    ends: tuple[int, ...]
    counts: Tensor


class Tables:
    """What depends on sizes and dtypes only: the chunk map, and the kernels' workspace.

    Attributes:
        chunks, ends: See `fastclip.kernels.table.Layout`; `chunks` is on the device.
        partials: Workspace: the norm of each chunk, fp64.
        ticket: Workspace: the number of programs that have finished; 0 between launches.
        state: Workspace: the last norm and its coefficient, fp64. `total` and `coefficient` are views of it.
        launcher: Launches kernels, with the variants that were launched before.
        stream: The handle of the stream that they are used on; 0 if the device has no streams.
        types: Triton's name of each dtype, by its segment.
    """

    def __init__(self, device: torch.device, stream: int, numels: Sequence[int], dtypes: Sequence[torch.dtype]) -> None:
        from fastclip.kernels import table

        segments = np.array([ELEMENT_TYPES[dtype] for dtype in dtypes])
        layout = table.lay_out(np.array(numels), segments)
        self.chunks = upload(layout.chunks, device)
        self.ends = layout.ends
        self.allocate()
        self.stream = stream
        self.launcher = Launcher(device)
        self.types = table.TYPES
        self._layout = layout
        self._segments = segments
        self._units: dict[tuple[int, ...], Units] = {}
        self._numels = np.array(numels)
        self._itemsizes = np.asarray(table.ELEMENT_SIZES)[segments]
        self._rows: OrderedDict[tuple[int, int], tuple[list[int], Tensor]] = OrderedDict()

    def allocate(self) -> None:
        """Allocate the workspace, in the state that every launch expects and leaves behind."""
        for scratch in ("changed", "counts", "flags"):
            self.__dict__.pop(scratch, None)
        device, chunks = self.chunks.device, len(self.chunks)
        self.partials = torch.empty(chunks, dtype=torch.float64, device=device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self.state = torch.empty(2, dtype=torch.float64, device=device)
        self.total, self.coefficient = self.state.unbind()

    def rows_at(self, addresses: list[int]) -> Tensor | None:
        """The table's rows for gradients at these addresses; None if they are unaligned, overlap or have no memory."""
        place = (addresses[0], addresses[-1])
        known = self._rows.get(place)
        if known is not None and known[0] == addresses:
            return known[1]
        starts = np.array(addresses)
        are_aligned = not np.count_nonzero((starts <= 0) | (starts % self._itemsizes != 0))
        if are_aligned and not overlapping(starts, self._numels * self._itemsizes):
            return self.upload_rows(addresses)
        return None

    def upload_rows(self, addresses: list[int]) -> Tensor:
        """The table's rows for valid addresses; cached for the next time that gradients have these addresses."""
        rows = upload(np.stack([np.array(addresses), self._numels], axis=1), self.chunks.device)
        self._rows[addresses[0], addresses[-1]] = addresses, rows
        while len(self._rows) * len(addresses) > CACHED_ROWS and len(self._rows) > 1:
            self._rows.popitem(last=False)
        return rows

    def with_own_workspace(self) -> Tables:
        """Return tables for the current stream that share only what the kernels do not write."""
        tables = copy.copy(self)
        tables.stream = stream_of(self.chunks.device)
        tables.allocate()
        return tables

    @cached_property
    def counts(self) -> Tensor:
        """Workspace of the 0-norm: one fp64 a chunk, all 0 between launches."""
        return torch.zeros_like(self.partials)

    @cached_property
    def slices(self) -> Tensor:
        """The first chunk and the number of chunks of each tensor, on the device."""
        return upload(self._layout.slices, self.chunks.device)

    def units(self, counts: tuple[int, ...]) -> Units:
        """The units of the gradients, given how many each has; cached."""
        if counts not in self._units:
            from fastclip.kernels.table import lay_out_units

            own, device = np.array(counts), self.chunks.device
            units, ends = lay_out_units(own, self._segments)
            self._units[counts] = Units(upload(units, device), ends, upload(own, device))
        return self._units[counts]

    @cached_property
    def changed(self) -> Tensor:
        """One flag for each program: whether it clamped an element."""
        return self._flags("clamp_kernel")

    @cached_property
    def flags(self) -> Tensor:
        """One flag for each program: whether it scaled a unit."""
        return self._flags("clip_units_kernel")

    def _flags(self, kernel: str) -> Tensor:
        # Those of programs that are not launched stay 0.
        programs = _programs(self.chunks.device, kernel)
        return torch.zeros(programs, dtype=torch.int32, device=self.chunks.device)


class _TableCache(threading.local):
    """Tables belong to a thread and a stream: two launches that may run at once must not share a workspace."""

    def __init__(self) -> None:
        self.by_sizes: OrderedDict[object, Tables] = OrderedDict()


_cache = _TableCache()


def _tables(device: torch.device, numels: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tables:
    stream = stream_of(device)
    key = (device, stream, numels, dtypes)
    if key not in _cache.by_sizes:
        _cache.by_sizes[key] = Tables(device, stream, numels, dtypes)
        while len(_cache.by_sizes) > CACHED_TABLES:
            _cache.by_sizes.popitem(last=False)
    _cache.by_sizes.move_to_end(key)
    return _cache.by_sizes[key]


@lru_cache(maxsize=8)
def _bounds(device: torch.device, minimums: tuple[float, ...], maximums: tuple[float, ...]) -> Tensor:
    """The minimum and maximum of each tensor, [tensors, 2], on the device; cached."""
    return upload(np.stack([minimums, maximums], axis=1), device, for_every_stream=True)


_KINDS = {2.0: "two", 1.0: "one", 0.0: "zero", math.inf: "max", -math.inf: "min"}


def _kind(p: float) -> str:
    return _KINDS.get(p, "power")


def _kernel(name: str) -> Any:
    from fastclip.kernels import adapt, apply, clamp, reduce, units

    return next(getattr(module, name) for module in (reduce, apply, clamp, units, adapt) if hasattr(module, name))


@cache
def _programs(device: torch.device, kernel: str) -> int:
    """The number of programs that a device runs at once, or the largest prime below it.

    Chunks are distributed round-robin, and their sizes repeat with the layers of a model. If the period and the number
    of programs had a common factor, some programs would get all the full chunks.
    """
    if device.type != "cuda":
        return PROGRAMS_ON_CPU
    from fastclip.kernels.table import LAUNCH_OPTIONS

    gpu = torch.cuda.get_device_properties(device)
    fitting = gpu.max_threads_per_multi_processor // (LAUNCH_OPTIONS["num_warps"] * gpu.warp_size)
    return prime_below(gpu.multi_processor_count * min(PROGRAMS_PER_SM[kernel], fitting))


def prime_below(number: int) -> int:
    """The largest prime that is at most `number`, which is at least 2."""
    return next(n for n in range(number, 1, -1) if all(n % divisor for divisor in range(2, math.isqrt(n) + 1)))
