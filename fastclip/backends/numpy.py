"""The NumPy backend: zero-copy views of the gradients, in pieces, over as many threads as torch uses.

The same three steps as on the GPU: each piece is reduced to norms, these are combined in fp64, and only where the
coefficient is not 1 (where a value is out of bounds) is anything written. A piece is a part of one tensor, or many
small tensors of one size, which NumPy's indexing gathers from all of memory at once, and scatters back if they change.

Squares are summed in fp32 over at most 1024 elements and from there on in fp64. A sum that left the range in which fp32
is right to rounding is done again in fp64. NumPy has no bfloat16, and its float16 is slow: both are converted and
scaled by torch. It does up to CHUNK elements in the thread that asks, and beyond would wake a team of its own for each
of our threads; so it is given lists of chunks, a piece in one call.

Long parts are clamped by torch, and by its own threads: what takes NumPy two passes over the memory takes it one.

What is worth knowing of the GIL: NumPy lets go of it for the time of one call, and a thread that wants it back while
another has it waits for some 10 us. So a piece is long enough that this is little, and short enough for the cache (L2)
to still have it when it is looked at again.
"""

from __future__ import annotations

import copy
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastclip.backends.interface import (
    Bounds,
    Int64s,
    Reduction,
    Scalar,
    Unscaling,
    clip_coefficient,
    on,
    reduction,
)

Array: TypeAlias = npt.NDArray[Any]

PIECE = 1 << 19  # elements: 2 MB in fp32
HALF_PIECE = 1 << 18  # elements of 16 bits: 1 MB when converted
CHUNK = 1 << 15  # elements: the most that torch does in the thread that asks
SMALL = 1024  # elements: up to here a tensor is gathered with others of its size
FEW = 4  # tensors: fewer are done one by one, in less time than gathering takes
ROWS = 512  # what long pieces are cut into for their sums; NumPy keeps the GIL for 500 or fewer
ROW = 1024  # elements: a PIECE has ROWS of them
THREADS_FROM = 1 << 22  # elements; below, handing work to another thread costs more than it saves

# An fp32 sum of squares above this lost less than 2**-24 of itself to subnormal rounding, for up to PIECE elements.
TINY = 2.0**-100

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
        self.members = len(tensors)
        self.dtypes = {tensor.dtype for tensor in tensors}
        alike: dict[tuple[torch.dtype, int], list[int]] = {}
        for position, tensor in enumerate(tensors):
            alike.setdefault((tensor.dtype, tensor.numel()), []).append(position)
        self._alike = {kind: np.array(positions) for kind, positions in alike.items()}
        self._place(np.fromiter(map(Tensor.data_ptr, tensors), np.int64, self.members))
        self.owners = np.concatenate([piece.owners for piece in self.pieces])
        self.elements = np.cumsum([piece.elements for piece in self.pieces])

    def _place(self, addresses: Int64s) -> None:
        self.pieces: list[Piece] = []
        for (dtype, size), owners in self._alike.items():
            self.pieces += _cut(dtype, size, owners, addresses[owners])

    def moved(self, addresses: Int64s) -> NumpyPlan:
        plan = copy.copy(self)
        plan._place(addresses)
        return plan

    def captured(self) -> NumpyPlan:
        raise RuntimeError("a CUDA graph cannot clip gradients on the CPU: clip them outside of the graph")

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
        parts = self._norms(p)
        if p == 0:  # a piece's 0-norm counts nonzero elements; the set's counts the tensors that have any
            parts = np.bincount(self.owners, weights=parts)
        with _quiet():
            total = float(parts[0]) if len(parts) == 1 and p else _norm(parts, p)
            if unscaling is not None:
                return reduction(on(self.device, total), max_norm, dtype, unscaling)
            # By way of NumPy, because torch refuses to make a number of a dtype that it would overflow.
            rounded = np.array(total, np.float64 if dtype == torch.float64 else np.float32)
        norm = torch.from_numpy(rounded).to(dtype)
        return Reduction(norm, total, clip_coefficient(total, max_norm))

    def norms(self) -> Tensor:
        parts = self._norms(2.0)
        norms = np.zeros(self.members)
        if len(parts) == self.members:  # a part each
            norms[self.owners] = parts
            return torch.from_numpy(norms)
        with _quiet():
            # Parts are scaled by the largest of their tensor, so that no square overflows.
            np.maximum.at(norms, self.owners, parts)
            scales = np.where(np.isfinite(norms) & (norms > 0), norms, 1.0)
            squares = np.bincount(self.owners, weights=np.square(parts / scales[self.owners]))
            return torch.from_numpy(np.sqrt(squares) * scales)

    def _norms(self, p: float) -> Array:
        """The p-norm of each part of a tensor: that of `owners`. For p = 0 the number of its nonzero elements."""
        shares = self._run(lambda pieces: [piece.norms(p) for piece in pieces])
        norms = [own for share in shares for own in share]
        return norms[0] if len(norms) == 1 else np.concatenate(norms)

    def scale_(self, coefficient: Scalar) -> None:
        if isinstance(coefficient, float) and coefficient == 1:
            return
        coefficients = np.atleast_1d(np.asarray(coefficient, dtype=np.float64))
        factors = {dtype: _factors(coefficients, dtype) for dtype in self.dtypes}

        def scale(pieces: Sequence[Piece]) -> None:
            # Backwards, so that what the reduction read last, and the cache still holds, is read first.
            for piece in reversed(pieces):
                for own in factors[piece.dtype]:
                    piece.scale_(own)

        if any((own != 1).any() for each in factors.values() for own in each):
            self._run(scale)

    def clamp_(self, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> Tensor | None:
        bounds = {dtype: (_rounded(dtype, minimum), _rounded(dtype, maximum)) for dtype in self.dtypes}
        # In this thread: what is long, torch shares out among its own.
        with _quiet():
            changed = [piece.clamp_(*bounds[piece.dtype]) for piece in self.pieces]
        return torch.tensor([any(changed)], device=self.device) if watch else None

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


class Piece(Protocol):
    """Elements that are read together: of one tensor, or of several.

    Attributes:
        dtype: The dtype of the elements.
        owners: The positions in the plan of the tensors that they are of.
    """

    dtype: torch.dtype
    owners: Int64s

    @property
    def elements(self) -> int:
        """The number of elements."""

    def norms(self, p: float) -> Array:
        """The p-norm of each tensor's part, in fp64; for p = 0 the number of its nonzero elements."""

    def scale_(self, factors: Array) -> None:
        """Multiply the elements by a factor: one for all, or one for each tensor of the plan; not by 1."""

    def clamp_(self, minimums: Array, maximums: Array) -> bool:
        """Clamp the elements of tensors that have any out of bounds; tell whether one was. Bounds are as factors."""


@dataclass
class Part:
    """A part of one tensor, or all of it: fp32 or fp64, in its own memory."""

    dtype: torch.dtype
    owners: Int64s
    view: Array

    @property
    def elements(self) -> int:
        return len(self.view)

    def norms(self, p: float) -> Array:
        return np.array([_norm(self._load(), p)])

    def scale_(self, factors: Array) -> None:
        factor = self._own(factors)
        if factor != 1:
            self._multiply(factor)

    def clamp_(self, minimums: Array, maximums: Array) -> bool:
        # By torch, which takes both extremes in one pass, and both bounds in another.
        low, high = float(self._own(minimums)), float(self._own(maximums))
        tensor = torch.from_numpy(self.view).view(self.dtype)
        smallest, largest = (extreme.item() for extreme in torch.aminmax(tensor))
        if smallest >= low and largest <= high:
            return False
        outside = bool(((tensor < low) | (tensor > high)).any()) if math.isnan(smallest) else True
        tensor.clamp_(low, high)
        return outside

    def _own(self, values: Array) -> Any:
        return values[self.owners[0] if len(values) > 1 else 0]

    def _load(self) -> Array:
        """The elements as NumPy can compute with them."""
        return self.view

    def _multiply(self, factor: Any) -> None:
        np.multiply(self.view, factor, out=self.view)


class HalfPart(Part):
    """A part of a tensor of bfloat16 or float16, which torch converts and multiplies."""

    @cached_property
    def _chunks(self) -> tuple[Tensor, ...]:
        with torch.inference_mode(False):  # which would mark them for good
            return torch.split(torch.from_numpy(self.view).view(self.dtype), CHUNK)

    def _load(self) -> Array:
        chunks, converted = _thread.part(self.elements)
        torch._foreach_copy_(chunks, self._chunks)
        return converted

    def _multiply(self, factor: Any) -> None:
        # A tensor without dimensions takes part in fp32, and the product is rounded once.
        torch._foreach_mul_(self._chunks, torch.from_numpy(np.asarray(factor)))


@dataclass
class Gathered:
    """Small tensors of one size and dtype, which are copied next to one another, and back where they change.

    Attributes:
        dtype: The dtype of the elements.
        owners: The positions of the tensors in the plan.
        memory: All of memory, as tensors of this size, of which the next begins an element later.
        places: Where in it the tensors are.
        size: Elements a tensor.
    """

    dtype: torch.dtype
    owners: Int64s
    memory: Array
    places: Int64s
    size: int

    @property
    def elements(self) -> int:
        return len(self.owners) * self.size

    def norms(self, p: float) -> Array:
        return _norms_of_rows(self._load(self.places), p)

    def scale_(self, factors: Array) -> None:
        own = factors[self.owners] if len(factors) > 1 else factors
        changes = np.broadcast_to(own != 1, self.places.shape)
        places = self.places if changes.all() else self.places[changes]
        x = self._load(places)
        self._store(places, x * (own[changes, None] if len(own) > 1 else own))

    def clamp_(self, minimums: Array, maximums: Array) -> bool:
        low, high = (each[self.owners, None] if len(each) > 1 else each for each in (minimums, maximums))
        x = self._load(self.places)
        changes = ~((x >= low) & (x <= high)).all(axis=1)
        if not changes.any():
            return False
        outside = bool(((x < low) | (x > high)).any())  # not so where all that there is is NaN
        self._store(self.places[changes], np.minimum(np.maximum(x, low), high)[changes])
        return outside

    def _load(self, places: Int64s) -> Array:
        """The elements, [tensors, size], as NumPy can compute with them."""
        return self.memory[places].view(_STORAGE[self.dtype]).reshape(-1, self.size)

    def _store(self, places: Int64s, x: Array) -> None:
        self.memory[places] = x.reshape(-1).view(self.memory.dtype)


class GatheredHalf(Gathered):
    """Small tensors of bfloat16 or float16, which torch converts."""

    def _load(self, places: Int64s) -> Array:
        halves = torch.from_numpy(super()._load(places)).view(self.dtype)
        converted: Array = _thread.block[: halves.numel()].view(halves.shape).copy_(halves).numpy()
        return converted

    def _store(self, places: Int64s, x: Array) -> None:
        super()._store(places, torch.from_numpy(x).to(self.dtype).view(torch.int16).numpy())


class _Thread(threading.local):
    """Where a thread converts 16-bit pieces to: memory that is in its cache already, 1 MB."""

    def __init__(self) -> None:
        with torch.inference_mode(False):
            self.block = torch.empty(HALF_PIECE, dtype=torch.float32, device="cpu")
        self.part = lru_cache(maxsize=16)(self._part)  # making the views takes long enough to be in others' way

    def _part(self, elements: int) -> tuple[tuple[Tensor, ...], Array]:
        """So many elements of the memory: as chunks, and all together."""
        part = self.block[:elements]
        return torch.split(part, CHUNK), part.numpy()


_thread = _Thread()


def _cut(dtype: torch.dtype, size: int, owners: Int64s, addresses: Int64s) -> Iterator[Piece]:
    """Cut tensors of one dtype and size into parts, or gather them."""
    is_half = dtype.itemsize == 2
    part, gathered, limit = (HalfPart, GatheredHalf, HALF_PIECE) if is_half else (Part, Gathered, PIECE)
    places = (addresses - _LOWEST_ADDRESS) // dtype.itemsize
    if size <= SMALL and len(owners) >= FEW:
        memory = _all_memory(dtype, size)
        step = max(1, CHUNK // size)
        for i in range(0, len(owners), step):
            yield gathered(dtype, owners[i : i + step], memory, places[i : i + step], size)
        return
    memory = _all_memory(dtype)
    for i, place in enumerate(places.tolist()):
        for begin in range(0, size, limit):
            yield part(dtype, owners[i : i + 1], memory[place + begin : place + min(begin + limit, size)])


_LOWEST_ADDRESS = 64  # nothing is ever mapped there, and it is a multiple of every element's size


@lru_cache(maxsize=256)
def _all_memory(dtype: torch.dtype, size: int | None = None) -> Array:
    """The whole address space as one array of elements, or of rows of `size` elements, one beginning at each element.

    What is taken from it is memory that it does not own: only memory whose tensor is at hand may be touched.
    """
    storage = np.dtype(_STORAGE[dtype])
    kind = storage.str if size is None else f"|V{size * storage.itemsize}"
    length = (2**63 - 1 - _LOWEST_ADDRESS) // np.dtype(kind).itemsize

    class AllMemory:
        __array_interface__ = {  # noqa: RUF012 - NumPy's protocol
            "version": 3,
            "typestr": kind,
            "data": (_LOWEST_ADDRESS, False),
            "shape": (length,),
            "strides": (storage.itemsize,),
        }

    return np.asarray(AllMemory())


def _norm(x: Array, p: float) -> float:
    """``‖x‖_p`` of a 1-d array of fp32 or fp64; for p = 0 the number of nonzero elements."""
    if p == 0:
        return float(np.count_nonzero(x))
    if p == math.inf:
        return abs(float(np.maximum(x.max(), -x.min())))  # -0.0 otherwise, of zeros
    if p == 2:
        squares = _sum_of_squares(x)
        if TINY < squares < math.inf:
            return math.sqrt(squares)
        largest = _norm(x, math.inf)
        if not 0 < largest < math.inf:  # zeros (of an expert that had nothing to do), infinities, NaN
            return largest
    if len(x) <= CHUNK:
        return float(_norms_of_rows(x[np.newaxis], p)[0])
    return _norm(np.array([_norm(x[i : i + CHUNK], p) for i in range(0, len(x), CHUNK)]), p)


def _sum_of_squares(x: Array) -> float:
    length = ROW if len(x) < ROW * ROWS // 8 else len(x) // ROWS
    whole = len(x) // length * length
    squares = float(np.dot(x[whole:], x[whole:]))
    if whole:
        rows = x[:whole].reshape(-1, length)
        squares += float(np.vecdot(rows, rows).sum(dtype=np.float64))
    return squares


def _norms_of_rows(x: Array, p: float) -> Array:
    """The p-norm of each row of a 2-d array, in fp64."""
    if p == 0:
        counts: Array = np.count_nonzero(x, axis=1).astype(np.float64)
        return counts
    if p != 2:
        return _power_norms_of_rows(x, p)
    squares = np.vecdot(x, x).astype(np.float64)
    norms: Array = np.sqrt(squares)
    is_out_of_range = ~((squares > TINY) & (squares < np.inf))
    if is_out_of_range.any():
        norms[is_out_of_range] = _power_norms_of_rows(x[is_out_of_range], p)
    return norms


def _power_norms_of_rows(x: Array, p: float) -> Array:
    """The same in fp64, of values divided by the one whose power is the largest, so that no power overflows."""
    magnitudes = np.abs(x, dtype=np.float64)
    leading: Array = magnitudes.max(axis=1) if p > 0 else magnitudes.min(axis=1)
    if np.isinf(p):
        return leading
    scales = np.where((leading > 0) & (leading < np.inf), leading, 1.0)
    magnitudes /= scales[:, np.newaxis]
    norms: Array = np.power(np.power(magnitudes, p, out=magnitudes).sum(axis=1), 1 / p) * scales
    return norms


def _factors(coefficients: Array, dtype: torch.dtype) -> list[Array]:
    """What to multiply values of a dtype by, one after another, in the precision of the multiplication.

    A coefficient too small for a normal number is split in two: the norm of finite gradients reaches beyond 2**126.
    """
    wide = np.float64 if dtype == torch.float64 else np.float32
    small = 2.0**-900 if dtype == torch.float64 else 2.0**-100
    with _quiet():
        is_small = np.abs(coefficients) < small
        if not is_small.any():
            return [coefficients.astype(wide)]
        return [np.where(is_small, coefficients / small, coefficients).astype(wide), np.where(is_small, wide(small), 1)]


def _rounded(dtype: torch.dtype, bound: Bounds) -> Array:
    """Bounds as a dtype has them, in one that NumPy has."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rounded: Array = torch.tensor(bound, dtype=torch.float64, device="cpu").to(dtype).to(wide).reshape(-1).numpy()
    return rounded


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
