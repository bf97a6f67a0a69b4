"""The NumPy backend: zero-copy views of the gradients, in pieces, over as many threads as torch uses.

The same three steps as on the GPU: each piece is reduced to norms, these are combined in fp64, and only where the
coefficient is not 1 (where a value is out of bounds) is anything written. A piece is a part of one large tensor, or
many small ones of one dtype, which are copied together and reduced at once.

Squares of large tensors are summed in fp32 over rows of 1024 and from there on in fp64; those of small ones in fp64. A
sum that left the range in which fp32 is right to rounding is done again in fp64. NumPy has no bfloat16, and its float16
is slow: both are converted, scaled and clamped by torch, piece by piece.
"""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastclip.backends.interface import Bounds, Reduction, Scalar, Unscaling, clip_coefficient, on, reduction

Array: TypeAlias = npt.NDArray[Any]
Factors: TypeAlias = tuple[float, ...]
_T = TypeVar("_T")

PIECE = 1 << 20  # elements: long enough that threads seldom wait for each other's Python between two pieces
HALF_PIECE = 1 << 18  # elements: their fp32 copy, 1 MB, is still in the cache when it is summed
SMALL = 1024  # elements: up to here copying a tensor next to others costs less than a call for it alone
ROW = 1024  # elements summed in fp32: some 32 additions in each SIMD lane
THREADS_FROM = 1 << 22  # elements; below, handing work to another thread costs more than it saves

# An fp32 sum of squares above this lost less than 2**-24 of itself to subnormal rounding, for up to PIECE elements.
TINY = 2.0**-100
TINY_FP64 = 2.0**-900  # the same for sums in fp64

_STORAGE = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.int16, torch.float16: np.int16}
"""The dtype by which NumPy sees the elements; 16-bit floats are opaque to it."""


def obstacle(device: torch.device) -> str | None:
    """Why NumPy cannot serve the device: it sees the CPU's memory only."""
    return None if device.type == "cpu" else "NumPy works on the CPU's memory only"


def plan(tensors: list[Tensor]) -> NumpyPlan:
    """Prepare plain CPU tensors that do not overlap."""
    return NumpyPlan(tensors)


class NumpyPlan:
    """See `fastclip.backends.interface.Plan`. It holds addresses, and so keeps no gradient alive."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.device = tensors[0].device
        self._shapes = [(tensor.numel(), tensor.dtype) for tensor in tensors]
        self.pieces = _cut(map(Tensor.data_ptr, tensors), self._shapes)
        self.owners = np.array([owner for piece in self.pieces for owner in piece.owners])
        self.elements = np.cumsum([piece.elements for piece in self.pieces])
        self.dtypes = {tensor.dtype for tensor in tensors}
        self.members = len(tensors)

    def moved(self, addresses: Array) -> NumpyPlan:
        plan = copy.copy(self)
        plan.pieces = _cut(addresses.tolist(), self._shapes)
        return plan

    def captured(self) -> NumpyPlan:
        raise RuntimeError("a CUDA graph cannot clip gradients on the CPU: clip them outside of the graph")

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
        norms = self._norms(p)
        # A piece's 0-norm counts its nonzero elements; the set's counts the tensors that have any.
        parts = np.bincount(self.owners, weights=norms) if p == 0 else np.array(norms)
        with _quiet():
            total = norms[0] if len(norms) == 1 and p else _norm(parts, p)
        if unscaling is not None:
            return reduction(on(self.device, total), max_norm, dtype, unscaling)
        # In two steps, because torch refuses to make a number of a dtype that it would overflow.
        norm = torch.scalar_tensor(total, dtype=torch.float64, device=self.device).to(dtype)
        return Reduction(norm, total, clip_coefficient(total, max_norm))

    def norms(self) -> Tensor:
        parts = np.array(self._norms(2.0))
        if len(parts) == self.members:  # the pieces are in the tensors' order, unless some are gathered
            norms = np.empty(self.members)
            norms[self.owners] = parts
            return torch.from_numpy(norms)
        with _quiet():
            # Pieces are scaled by the largest of their tensor, so that no square overflows.
            scales = np.zeros(self.members)
            np.maximum.at(scales, self.owners, parts)
            divisors = np.where(np.isfinite(scales) & (scales > 0), scales, 1.0)
            squares = np.bincount(self.owners, weights=np.square(parts / divisors[self.owners]))
            return torch.from_numpy(np.sqrt(squares) * divisors)

    def _norms(self, p: float) -> list[float]:
        """The p-norm of each piece, or of each tensor of one that was gathered: that of `owners`."""
        norms: list[float] = []
        for share in self._run(lambda pieces: [norm for piece in pieces for norm in piece.norms(p)]):
            norms += share
        return norms

    def scale_(self, coefficient: Scalar) -> None:
        coefficients = np.atleast_1d(np.asarray(coefficient, dtype=np.float64))
        factors = {dtype: _factors(coefficients, dtype) for dtype in self.dtypes}

        def scale(pieces: Sequence[Piece]) -> None:
            # Backwards, so that what the reduction read last, and the cache still holds, is read first.
            for piece in reversed(pieces):
                piece.scale_(factors[piece.dtype])

        if any(map(any, factors.values())):
            self._run(scale)

    def clamp_(self, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> Tensor | None:
        minimums, maximums = (bound if isinstance(bound, Sequence) else (bound,) for bound in (minimum, maximum))

        def clamp(pieces: Sequence[Piece]) -> list[bool]:
            return [piece.clamp_(minimums, maximums) for piece in pieces]

        changed = self._run(clamp)
        return torch.tensor([any(share) for share in changed]) if watch else None

    def _run(self, work: Callable[[Sequence[Piece]], Any]) -> list[Any]:
        """Do `work` on shares of the pieces, of about as many elements each, one share a thread."""
        total = int(self.elements[-1])
        threads = torch.get_num_threads() if total >= THREADS_FROM else 1
        if threads == 1:
            return [_quietly(work, self.pieces)]
        ends = np.searchsorted(self.elements, [total * (i + 1) // threads for i in range(threads)]) + 1
        mine, *others = (self.pieces[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True))
        pending = [_start(work, share, threads - 1) for share in others]
        return [_quietly(work, mine), *(result() for result in pending)]


@dataclass
class Piece:
    """A part of one tensor, or several small tensors of one dtype: fp32 or fp64.

    Attributes:
        dtype: The dtype of the elements.
        views: Arrays over the elements' memory; they do not own it.
        owners: The position of each view's tensor in the plan.
        elements: The number of elements.
    """

    dtype: torch.dtype
    views: list[Array]
    owners: list[int]
    elements: int

    def norms(self, p: float) -> Sequence[float]:
        """The p-norm of each view; for p = 0 the number of its nonzero elements."""
        x = self._load()
        if len(self.views) == 1:
            return (_norm(x, p),)
        return _norms_of_segments(x, self._starts, p)

    def scale_(self, factors: Sequence[Factors]) -> None:
        """Multiply the elements of each tensor by each of its factors in turn."""
        for target, own in zip(self._targets, self._own(factors), strict=True):
            for factor in own:
                self._multiply(target, factor)

    def clamp_(self, minimums: Sequence[float], maximums: Sequence[float]) -> bool:
        """Clamp the elements if any is outside of its tensor's bounds, and tell whether one was."""
        bounds = {(minimums[0], maximums[0])}
        if len(minimums) > 1 or len(maximums) > 1:
            bounds = set(zip(self._own(minimums), self._own(maximums), strict=True))
        if len(bounds) > 1:
            parts = [type(self)(self.dtype, [v], [o], len(v)) for v, o in zip(self.views, self.owners, strict=True)]
            changed = [part.clamp_(minimums, maximums) for part in parts]
            return any(changed)
        minimum, maximum = self._rounded(*bounds.pop())
        x = self._load()
        smallest, largest = x.min(), x.max()
        if smallest >= minimum and largest <= maximum:
            return False
        outside = bool(((x < minimum) | (x > maximum)).any()) if math.isnan(smallest) else True
        for target in self._targets:
            self._clip(target, minimum, maximum)
        return outside

    @property
    def _targets(self) -> Sequence[Any]:
        """What to write to, for each tensor."""
        return self.views

    @staticmethod
    def _multiply(target: Any, factor: float) -> None:
        np.multiply(target, factor, out=target)

    @staticmethod
    def _clip(target: Any, minimum: float, maximum: float) -> None:
        np.clip(target, minimum, maximum, out=target)

    def _rounded(self, *bounds: float) -> Sequence[float]:
        """The bounds as the elements' dtype has them: NumPy rounds them itself where it knows that."""
        return bounds

    def _own(self, values: Sequence[_T]) -> Sequence[_T]:
        """Of values for each tensor of the plan, or of one for all, those of this piece's tensors."""
        return [values[0]] * len(self.owners) if len(values) == 1 else [values[owner] for owner in self.owners]

    def _load(self) -> Array:
        """The elements as one array: a view where there is one, a copy of several."""
        return self.views[0] if len(self.views) == 1 else np.concatenate(self.views)

    @cached_property
    def _starts(self) -> Array:
        sizes = [len(view) for view in self.views]
        return np.cumsum([0, *sizes[:-1]])


class HalfPiece(Piece):
    """A piece of bfloat16 or float16 elements: torch converts, multiplies and clamps them."""

    @cached_property
    def _targets(self) -> Sequence[Any]:
        return [torch.from_numpy(view).view(self.dtype) for view in self.views]

    @staticmethod
    def _multiply(target: Any, factor: float) -> None:
        target.mul_(factor)  # a Python float takes part in fp32, and the product is rounded once

    @staticmethod
    def _clip(target: Any, minimum: float, maximum: float) -> None:
        target.clamp_(minimum, maximum)

    def _rounded(self, *bounds: float) -> Sequence[float]:
        return _rounded(self.dtype, *bounds)

    def _load(self) -> Array:
        halves = self._targets[0] if len(self.views) == 1 else torch.from_numpy(super()._load()).view(self.dtype)
        array: Array = _thread.converted[: self.elements].copy_(halves).numpy()
        return array


@lru_cache(maxsize=64)
def _rounded(dtype: torch.dtype, *numbers: float) -> Sequence[float]:
    """Numbers as a dtype has them; kept, because every piece asks for the same."""
    rounded: list[float] = torch.tensor(numbers, dtype=dtype, device="cpu").tolist()
    return rounded


class _Thread(threading.local):
    """Where a thread converts 16-bit pieces to: memory that is in its cache already, 1 MB."""

    def __init__(self) -> None:
        self.converted = torch.empty(HALF_PIECE, dtype=torch.float32, device="cpu")


_thread = _Thread()


def _cut(addresses: Iterable[int], shapes: Sequence[tuple[int, torch.dtype]]) -> list[Piece]:
    """Cut large tensors into pieces, and gather small ones of the same dtype in pieces."""
    pieces: list[Piece] = []
    gathering: dict[torch.dtype, Piece] = {}
    for owner, (address, (elements, dtype)) in enumerate(zip(addresses, shapes, strict=True)):
        kind, limit = (HalfPiece, HALF_PIECE) if dtype.itemsize == 2 else (Piece, PIECE)
        memory = _address_space(dtype)
        start = (address - _LOWEST_ADDRESS) // dtype.itemsize
        if elements > SMALL:
            for begin in range(0, elements, limit):
                size = min(limit, elements - begin)
                pieces.append(kind(dtype, [memory[start + begin : start + begin + size]], [owner], size))
            continue
        open_piece = gathering.get(dtype)
        if open_piece is None or open_piece.elements + elements > limit:
            open_piece = gathering[dtype] = kind(dtype, [], [], 0)
            pieces.append(open_piece)
        open_piece.views.append(memory[start : start + elements])
        open_piece.owners.append(owner)
        open_piece.elements += elements
    return pieces


_LOWEST_ADDRESS = 64  # nothing is ever mapped there, and it is a multiple of every element's size


@cache
def _address_space(dtype: torch.dtype) -> Array:
    """The whole address space as one array of a dtype; a slice of it is a view of memory that it does not own.

    Only memory whose tensor is at hand may be touched through it.
    """
    storage = np.dtype(_STORAGE[dtype])

    class AddressSpace:
        __array_interface__ = {  # noqa: RUF012 - NumPy's protocol
            "version": 3,
            "typestr": storage.str,
            "data": (_LOWEST_ADDRESS, False),
            "shape": ((2**63 - 1 - _LOWEST_ADDRESS) // storage.itemsize,),
        }

    return np.asarray(AddressSpace())


def _norms_of_segments(x: Array, starts: Array, p: float) -> Sequence[float]:
    """The p-norm of each segment of x, that begins at each of `starts`."""
    if p == 0:
        counts: list[float] = np.add.reduceat(x != 0, starts, dtype=np.float64).tolist()
        return counts
    magnitudes = np.abs(x, dtype=np.float64)
    if np.isinf(p):
        extremes: list[float] = (np.maximum if p > 0 else np.minimum).reduceat(magnitudes, starts).tolist()
        return extremes
    sums = np.add.reduceat(magnitudes * magnitudes if p == 2 else magnitudes**p, starts)
    norms: list[float] = (np.sqrt(sums) if p == 2 else sums ** (1 / p)).tolist()
    out_of_range = np.flatnonzero(~((sums > TINY_FP64) & (sums < np.inf))).tolist()
    segments = np.split(x, starts[1:]) if out_of_range else []
    for i in out_of_range:
        norms[i] = _power_norm(segments[i], p)
    return norms


def _norm(x: Array, p: float) -> float:
    """``‖x‖_p`` of a 1-d array of fp32 or fp64; for p = 0 the number of nonzero elements."""
    if p == 2:
        return _euclidean_norm(x)
    if p == 0:
        return float(np.count_nonzero(x))
    if np.isinf(p):
        return float(np.abs(x).max() if p > 0 else np.abs(x).min())
    return _power_norm(x, p)


def _euclidean_norm(x: Array) -> float:
    whole = len(x) // ROW * ROW
    total = float(np.dot(x[whole:], x[whole:]))
    if whole:
        rows = x[:whole].reshape(-1, ROW)
        total += float(np.vecdot(rows, rows).sum(dtype=np.float64))
    return math.sqrt(total) if TINY < total < math.inf else _power_norm(x, 2.0)


def _power_norm(x: Array, p: float) -> float:
    """The norm in fp64, of values divided by the one whose power is the largest, so that no power overflows."""
    magnitudes = np.abs(x, dtype=np.float64)
    leading = float(magnitudes.max() if p > 0 else magnitudes.min())
    scale = leading if 0 < leading < math.inf else 1.0
    return float(np.power(np.power(magnitudes / scale, p).sum(), 1 / p) * scale)


def _factors(coefficients: Array, dtype: torch.dtype) -> list[Factors]:
    """What to multiply values of a dtype by, one after another: nothing for 1 in the precision of the multiplication.

    A coefficient too small for a normal number is split in two: the norm of finite gradients reaches beyond 2**126.
    """
    wide = np.float64 if dtype == torch.float64 else np.float32
    small = 2.0**-900 if dtype == torch.float64 else 2.0**-100
    with _quiet():
        is_small = np.abs(coefficients) < small
        firsts = np.where(is_small, coefficients / small, coefficients).astype(wide)
    return [
        (first, small) if split else () if first == 1 else (first,)
        for first, split in zip(firsts.tolist(), is_small.tolist(), strict=True)
    ]


def _quiet() -> np.errstate:
    # Overflow and NaN are answers here, not accidents.
    return np.errstate(all="ignore")


def _quietly(work: Callable[[Sequence[Piece]], Any], pieces: Sequence[Piece]) -> Any:
    with _quiet():
        return work(pieces)


def _start(work: Callable[[Sequence[Piece]], Any], pieces: Sequence[Piece], threads: int) -> Callable[[], Any]:
    """Start the work in another thread, and return what waits for its result."""
    try:
        return _pool(threads).submit(_quietly, work, pieces).result
    except RuntimeError:  # the interpreter is shutting down, and starts no thread any more
        return lambda: _quietly(work, pieces)


_pools: dict[int, ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that sleep while there is nothing to do, kept for the process's life."""
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="fastclip")
    return _pools[threads]


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    # Threads do not survive a fork: a child (a DataLoader's worker, say) makes its own.
    os.register_at_fork(after_in_child=_pools.clear)
