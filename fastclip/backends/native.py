"""The native backend: kernels in C over a table of the gradients' sizes and dtypes.

The table is made once. Addresses are arguments of each call, so gradients that moved cost nothing.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastclip.backends.coefficient import clip_coefficient
from fastclip.backends.interface import ELEMENT_TYPES, Adaptation, Bounds, Plan, Reduction, Unscaling, one_each
from fastclip.foundation.devices import Scalar, on
from fastclip.foundation.memory import Int64s, address_of

try:
    from fastclip.kernels import native
except ImportError as error:
    native: Any = None  # type: ignore[no-redef]
    _missing = "they were not built" if find_spec("fastclip.kernels.native") is None else str(error)

KINDS = ("quantile", "z_score", "ema")
"""The kinds of adaptive rules, in the order of `kernels/adapt.h`."""

CHUNK = 16_384  # elements, as in `kernels/cpu.h`
TASK = 1 << 18  # bytes that a thread takes at a time
ALONE = 200_000  # elements: below this, waking another thread takes longer than it saves

_CPU = torch.device("cpu")


def obstacle(device: torch.device) -> str | None:
    """Why the native kernels cannot serve a device: they were not built, or it is not the CPU."""
    if native is None:
        return (
            f"its kernels are not there ({_missing}): install fastclip from its sources where there is a C compiler "
            "(gcc or clang) and Python's headers"
        )
    return None if device.type == "cpu" else "the native kernels work on the CPU's memory only"


def _entry_of_openmp() -> int:
    """The address of `GOMP_parallel` in the OpenMP library that torch calls; 0 if torch's OpenMP is not GNU's.

    So there is a single thread pool, torch's, and `torch.set_num_threads` is obeyed. The search order is the linker's:
    libraries loaded globally (a preloaded OpenMP comes first), then the library that torch ships.
    """
    for library in (None, os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")):
        try:
            entry = ctypes.CDLL(library).GOMP_parallel
        except (OSError, AttributeError, TypeError):  # Windows cannot search what is loaded globally
            continue
        return ctypes.cast(entry, ctypes.c_void_p).value or 0
    return 0


if native is not None:
    _entry = _entry_of_openmp()
    native.use_threads(_entry)
    _whose = "torch's threads" if _entry else "one thread, for torch's OpenMP is not GNU's"
    HERE = f"kernels in C ({native.levels()[0]}) over a table of gradients, by {_whose}"


def plan(tensors: list[Tensor]) -> NativePlan:
    """Prepare plain CPU tensors that do not overlap."""
    counts = np.fromiter(map(Tensor.numel, tensors), np.int64, len(tensors))
    table = lay_out(counts, np.array([ELEMENT_TYPES[tensor.dtype] for tensor in tensors], np.int64))
    return NativePlan(table, bool(counts.sum() > ALONE), list(map(Tensor.data_ptr, tensors)))


def lay_out(counts: Int64s, types: Int64s, lengths: int | Int64s = CHUNK) -> bytes:
    """Lay out a table: the numbers of rows, chunks, tasks and elements, then the rows, the chunks and the tasks.

    See `Table` in `kernels/cpu.h`.

    Args:
        counts: The number of elements of each gradient, [gradients].
        types: The index of each gradient's dtype in `ELEMENT_TYPES`, [gradients].
        lengths: The number of elements of a chunk, one for all gradients or [gradients].
    """
    chunks = -(-counts // lengths)
    row = np.repeat(np.arange(len(counts)), chunks)
    length = np.broadcast_to(lengths, counts.shape)[row]
    start = (np.arange(len(row)) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * length
    itemsize = np.array([4, 2, 2, 8])[types[row]]
    ends = np.cumsum(np.minimum(length, counts[row] - start) * itemsize)
    # A task ends with the chunk that reaches its size.
    firsts = np.flatnonzero(np.diff(ends // TASK, prepend=-1, append=np.iinfo(np.int64).max))
    head = [len(counts), len(row), len(firsts) - 1, counts.sum()]
    parts = (head, np.stack([counts, types], 1), np.stack([row, start], 1), firsts)
    return np.concatenate([np.asarray(part, np.int64).reshape(-1) for part in parts]).tobytes()


class NativePlan(Plan):
    """See `fastclip.backends.interface.Plan`. It holds addresses, so it keeps no gradient alive.

    Attributes:
        table: See `lay_out`.
        is_long: Whether several threads save time.
        addresses: The address of each gradient.
    """

    device = _CPU

    def __init__(self, table: bytes, is_long: bool, addresses: list[int]) -> None:
        self.table = table
        self.is_long = is_long
        self.addresses = addresses

    def moved(self, addresses: list[int]) -> NativePlan | None:
        if not native.are_apart(self.table, addresses):
            return None
        return NativePlan(self.table, self.is_long, addresses)

    def captured(self) -> NativePlan:
        raise RuntimeError("a CUDA graph cannot clip gradients on the CPU: clip them outside of the graph")

    @property
    def _threads(self) -> int:
        return torch.get_num_threads() if self.is_long else 1

    def clip_(self, p: float, max_norm: float, dtype: torch.dtype) -> Tensor:
        if dtype not in ELEMENT_TYPES:
            return self.clip_(p, max_norm, torch.float64).to(dtype)
        norm, address = _empty(dtype)
        threads = torch.get_num_threads() if self.is_long else 1
        native.clip(self.table, self.addresses, p, max_norm, address, ELEMENT_TYPES[dtype], threads)
        return norm

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
        total = native.reduce(self.table, self.addresses, p, 0, self._threads)
        inverse = 1.0
        if unscaling is not None:
            inverse = unscaling.inv_scale.item()
            # Exactly if a gradient is not finite: the norm of finite ones does not overflow.
            if not math.isfinite(total):
                unscaling.found_inf.fill_(1.0)
        total *= inverse
        return Reduction(on(_CPU, total).to(dtype), total, clip_coefficient(total, max_norm) * inverse)

    def norms(self) -> Tensor:
        norms = torch.zeros(len(self.addresses), dtype=torch.float64, device=_CPU)
        native.reduce(self.table, self.addresses, 2.0, address_of(norms), self._threads)
        return norms

    def scale_(self, coefficient: Scalar) -> None:
        if isinstance(coefficient, Tensor):
            if coefficient.dim():
                own = on(_CPU, coefficient).contiguous()
                native.apply(self.table, self.addresses, own.data_ptr(), self._threads)
                return
            coefficient = coefficient.item()
        if coefficient != 1:
            native.apply(self.table, self.addresses, coefficient, self._threads)

    def clamp_(self, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> Tensor | None:
        if isinstance(minimum, float) and isinstance(maximum, float):
            changed = native.clamp(self.table, self.addresses, minimum, maximum, self._threads)
        else:
            bounds = np.array([one_each(bound, len(self.addresses)) for bound in (minimum, maximum)])
            low, high = (int(bound.ctypes.data) for bound in bounds)
            changed = native.clamp(self.table, self.addresses, low, high, self._threads)
        return torch.tensor([changed], device=_CPU) if watch else None

    def clip_units_(self, weights: Plan, counts: Sequence[int], ratios: Tensor, eps: float) -> Tensor:
        table = _lay_out_units(self.table, tuple(counts))
        of_weights = np.array(weights.addresses)  # type: ignore[attr-defined]  # it is a NativePlan, too
        own = on(_CPU, ratios).contiguous()
        weights_at, ratios_at = int(of_weights.ctypes.data), own.data_ptr()
        changed = native.clip_units(table, self.addresses, weights_at, ratios_at, eps, self._threads)
        return torch.tensor([changed], device=_CPU)


@lru_cache(maxsize=64)
def _lay_out_units(table: bytes, counts: tuple[int, ...]) -> bytes:
    """A table whose chunks are units of equal length: ``counts[i]`` of gradient i of another table."""
    rows = np.frombuffer(table, np.int64)[4 : 4 + 2 * len(counts)].reshape(-1, 2)
    return lay_out(rows[:, 0], rows[:, 1], rows[:, 0] // np.array(counts))


def adapt(adaptation: Adaptation, state: Tensor, norms: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """See `fastclip.backends.interface`."""
    groups, width = state.shape
    norms = norms.contiguous()
    results = torch.empty(2, groups, dtype=torch.float64, device=_CPU)
    state_at, norms_at, results_at = map(address_of, (state, norms, results))
    kind, numbers = KINDS.index(adaptation.kind), adaptation.numbers
    native.adapt(kind, state_at, width, norms_at, groups, total.item(), numbers, results_at)
    return results[0], results[1]


_templates: dict[torch.dtype, Tensor] = {}


def _empty(dtype: torch.dtype) -> tuple[Tensor, int]:
    """A 0-dim tensor to be written by its address. `empty_like` of a template is faster than `empty`."""
    template = _templates.get(dtype)
    made = torch.empty((), dtype=dtype, device=_CPU) if template is None else torch.empty_like(template)
    address = address_of(made)
    if template is None:
        _templates[dtype] = torch.empty_like(made)
    return made, address
