"""The NumPy backend: zero-copy views of the gradients, in pieces.

The same three steps as on the GPU: each piece is reduced to sums of squares, these are added in fp64, and only where
the coefficient is not 1 (where a value is out of bounds) is anything written. A piece is one tensor, or several of
16-bit floats, or many small ones of one size, which NumPy's indexing gathers from all of memory at once, and scatters
back if they change.

NumPy does what is small; it computes in the thread that asks. What is long enough for several threads, torch goes
through with its own: they obey `torch.set_num_threads`, and no thread of ours competes with them for cores or the GIL.
So do 16-bit floats, since NumPy has no bfloat16, and is slow with its float16.

Squares are summed in fp32 over at most ROW elements, in so many lanes that none passes through more than 64 additions,
and from there on in fp64. A norm that fp32 could not get right to rounding, because squares left its range, is taken
again in fp64.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
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
    norm_of_magnitudes_,
    on,
    reduction,
    stable_norm,
)

Array: TypeAlias = npt.NDArray[Any]

ROW = 2048  # elements whose squares BLAS sums in fp32, in 32 lanes or more
SHORT_ROW = 256  # the same for torch, which has 8 or 16
TRIES = 4  # numbers of rows that are looked at for one that divides the number of elements
SMALL = 1024  # elements: up to here a tensor is gathered with others of its size
FEW = 4  # tensors: fewer are done one by one, in less time than gathering takes
CHUNK = 1 << 15  # elements: the most that torch does in the thread that asks
GATHERED = CHUNK  # elements that are gathered at once
BY_TORCH = 1 << 20  # bytes: for more, several threads save more time than it takes to wake them
LOOKED_AT_TWICE = 1 << 20  # elements that are read, and perhaps written: 4 MB, which the cache still has by then
WRITTEN = 1 << 22  # elements that are written at once; the last of them come first
LONG = 1 << 22  # elements whose norms by row are added at once: 16,384 of them, by one thread
BLOCK = 3 << 18  # elements of 16 bits that are converted at once, to 3 MB of fp32
WIDE_BLOCK = BLOCK // 2  # elements that are converted to fp64 at once, in the same memory

# A sum of squares above this lost less than 2**-24 of itself to fp32's subnormal numbers, for up to 2**45 elements.
TINY = 2.0**-80

_STORAGE = {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.int16, torch.float16: np.int16}
"""The dtype by which NumPy sees the elements; 16-bit floats are opaque to it."""


def obstacle(device: torch.device) -> str | None:
    """Why NumPy cannot serve the device: it sees the CPU's memory only."""
    return None if device.type == "cpu" else "NumPy works on the CPU's memory only"


def plan(tensors: list[Tensor]) -> NumpyPlan:
    """Prepare plain CPU tensors that do not overlap."""
    itemsizes = np.array([tensor.dtype.itemsize for tensor in tensors])
    places = _places(np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors)), itemsizes)
    alike: dict[tuple[torch.dtype, int], list[int]] = {}
    for position, tensor in enumerate(tensors):
        alike.setdefault((tensor.dtype, tensor.numel()), []).append(position)
    pieces = list(_batched(chain.from_iterable(_pieces(*kind, np.array(own), places) for kind, own in alike.items())))
    owners = np.concatenate([piece.owners for piece in pieces])
    return NumpyPlan(tensors[0].device, {tensor.dtype for tensor in tensors}, itemsizes, owners, pieces)


@dataclass
class NumpyPlan:
    """See `fastclip.backends.interface.Plan`. It holds addresses, and so keeps no gradient alive.

    Attributes:
        device: The CPU.
        dtypes: Those of the tensors.
        itemsizes: Bytes an element of each tensor, [tensors].
        owners: The positions of the tensors in the order of the pieces, [tensors].
        pieces: All elements of all tensors.
    """

    device: torch.device
    dtypes: set[torch.dtype]
    itemsizes: Int64s
    owners: Int64s
    pieces: list[Piece]

    def moved(self, addresses: Int64s) -> NumpyPlan:
        places = _places(addresses, self.itemsizes)
        pieces = [piece.moved(places) for piece in self.pieces]
        return NumpyPlan(self.device, self.dtypes, self.itemsizes, self.owners, pieces)

    def captured(self) -> NumpyPlan:
        raise RuntimeError("a CUDA graph cannot clip gradients on the CPU: clip them outside of the graph")

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
        with _quiet():
            total = self._total(p)
            if unscaling is not None:
                return reduction(on(self.device, total), max_norm, dtype, unscaling)
            # By way of NumPy, because torch refuses to make a number of a dtype that it would overflow.
            norm = torch.from_numpy(np.array(total, np.float64 if dtype == torch.float64 else np.float32))
        # `to` takes 1 us to find that there is nothing to do, a tenth of a call on one small gradient.
        return Reduction(norm if norm.dtype == dtype else norm.to(dtype), total, clip_coefficient(total, max_norm))

    def norms(self) -> Tensor:
        norms = np.empty(len(self.itemsizes))
        with _quiet():
            norms[self.owners] = self._norms(2.0)
        return torch.from_numpy(norms)

    def _total(self, p: float) -> float:
        if p == 2:
            squares = sum([piece.sum_of_squares() for piece in self.pieces])
            if _is_in_range(squares):
                return math.sqrt(squares)
        norms = self._norms(p)
        if p == 0:  # a tensor's 0-norm counts nonzero elements; the set's counts the tensors that have any
            return float(np.count_nonzero(norms))
        return stable_norm(torch.from_numpy(norms), p).item()

    def _norms(self, p: float) -> Array:
        """The p-norm of each tensor, in the order of `owners`; for p = 0 the number of its nonzero elements."""
        return np.concatenate([piece.norms(p) for piece in self.pieces])

    def scale_(self, coefficient: Scalar) -> None:
        if isinstance(coefficient, Tensor) and not coefficient.dim():
            coefficient = coefficient.item()
        if isinstance(coefficient, float) and coefficient == 1:
            return
        with _quiet():
            factors = {dtype: _factors(coefficient, dtype) for dtype in self.dtypes}
            # Backwards, so that what the reduction read last, and the cache still holds, is read first.
            for piece in reversed(self.pieces):
                for own in factors[piece.dtype]:
                    piece.scale_(own)

    def clamp_(self, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> Tensor | None:
        bounds = {dtype: (_rounded(dtype, minimum), _rounded(dtype, maximum)) for dtype in self.dtypes}
        with _quiet():
            changed = [piece.clamp_(*bounds[piece.dtype]) for piece in self.pieces]
        return torch.tensor([any(changed)], device=self.device) if watch else None


class Piece(Protocol):
    """Elements that are read together: of one tensor, or of several.

    Attributes:
        dtype: The dtype of the elements.
        owners: The positions in the plan of the tensors that they are of.
    """

    dtype: torch.dtype
    owners: Int64s

    def moved(self, places: Int64s) -> Piece:
        """The same of tensors like these, at other `_places`, [tensors of the plan]."""

    def sum_of_squares(self) -> float:
        """The sum of the squares of all elements; of use if `_is_in_range`."""

    def norms(self, p: float) -> Array:
        """The p-norm of each tensor, in fp64; for p = 0 the number of its nonzero elements."""

    def scale_(self, factors: Array) -> None:
        """Multiply the elements by a factor: one for all, 0-dim, or one for each tensor, of which 1 writes nothing."""

    def clamp_(self, minimums: Array, maximums: Array) -> bool:
        """Clamp the elements of tensors that have any out of bounds; tell whether one was. Bounds are as factors."""


@dataclass
class Single:
    """One tensor, in its own memory."""

    dtype: torch.dtype
    owners: Int64s
    view: Array

    @classmethod
    def at(cls, dtype: torch.dtype, owners: Int64s, size: int, places: Int64s) -> Single:
        """The tensor of `size` elements that is at its owner's place."""
        place = places[owners[0]]
        return cls(dtype, owners, _all_memory(dtype)[place : place + size])

    def moved(self, places: Int64s) -> Single:
        return Single.at(self.dtype, self.owners, len(self.view), places)

    def sum_of_squares(self) -> float:
        if not self._is_long:
            return _sum_of_squares(*(self._rows if self.dtype.itemsize > 2 else _Conversion([self._tensor()]).rows()))
        rows, rest = self._rows
        squares = _square(_widened(rest, self.dtype)) if len(rest) else 0.0
        for part in _parts(torch.from_numpy(rows).view(self.dtype), LONG // ROW):
            squares += _norms_of_short_rows(part).double().square_().sum().item()
        return squares

    def norms(self, p: float) -> Array:
        return np.array([self._norm(p)])

    def _norm(self, p: float) -> float:
        x = self._tensor()
        if p == 0:
            return float(torch.count_nonzero(x))
        if p == 2:
            squares = self.sum_of_squares()
            if _is_in_range(squares):
                return math.sqrt(squares)
        if p in (2, math.inf):
            smallest, largest = _extremes(x)
            largest = abs(max(largest, -smallest))  # of zeros -0.0 otherwise
            if p == math.inf or not 0 < largest < math.inf:
                return largest
        rows, rest = (torch.from_numpy(each).view(self.dtype) for each in self._rows)
        blocks = chain(_parts(rows, WIDE_BLOCK // ROW), [rest[np.newaxis]] if len(rest) else ())
        norms = [_power_norm(block, p) for block in blocks]
        return stable_norm(torch.tensor(norms, dtype=torch.float64, device="cpu"), p).item()

    def scale_(self, factors: Array) -> None:
        factor = self._own(factors)
        if factors.ndim and factor == 1:
            return
        if self._is_long:
            # A tensor without dimensions takes part in fp32 at least, and the product is rounded once.
            own = torch.from_numpy(np.asarray(factor))
            for part in reversed(list(_parts(self._tensor(), WRITTEN))):
                part.mul_(own)
        else:
            np.multiply(self.view, factor, out=self.view)

    def clamp_(self, minimums: Array, maximums: Array) -> bool:
        # By torch, which takes both extremes in one pass, and both bounds in another.
        low, high = float(self._own(minimums)), float(self._own(maximums))
        changed = False
        for part in _parts(self._tensor(), LOOKED_AT_TWICE):
            smallest, largest = _extremes(part)
            if smallest >= low and largest <= high:
                continue
            # A NaN makes NaN of both extremes, and hides whether anything else is outside.
            changed |= not math.isnan(smallest) or bool(((part < low) | (part > high)).any())
            part.clamp_(low, high)
        return changed

    @property
    def _is_long(self) -> bool:
        return self.view.nbytes > BY_TORCH

    @cached_property
    def _rows(self) -> tuple[Array, Array]:
        return _rows(self.view)

    def _tensor(self) -> Tensor:
        return torch.from_numpy(self.view).view(self.dtype)

    def _own(self, values: Array) -> Any:
        return values[self.owners[0]] if values.ndim else values


@dataclass
class Batch:
    """Tensors of 16-bit floats of one dtype, up to a BLOCK together, which torch goes through by one call for all."""

    dtype: torch.dtype
    owners: Int64s
    singles: list[Single]

    def moved(self, places: Int64s) -> Batch:
        return Batch(self.dtype, self.owners, [single.moved(places) for single in self.singles])

    def sum_of_squares(self) -> float:
        return _sum_of_squares(*self._conversion.rows())

    def norms(self, p: float) -> Array:
        return np.concatenate([single.norms(p) for single in self.singles])

    def scale_(self, factors: Array) -> None:
        # Tensors without dimensions take part in fp32, and the product is rounded once.
        if not factors.ndim:
            torch._foreach_mul_(self._conversion.tensors[::-1], torch.from_numpy(factors))
            return
        own = factors[self.owners]
        changes = np.flatnonzero(own != 1)[::-1]
        if len(changes):
            tensors = [self._conversion.tensors[i] for i in changes.tolist()]
            torch._foreach_mul_(tensors, list(torch.from_numpy(own[changes]).unbind()))

    def clamp_(self, minimums: Array, maximums: Array) -> bool:
        changed = [single.clamp_(minimums, maximums) for single in self.singles]
        return any(changed)

    @cached_property
    def _conversion(self) -> _Conversion:
        return _Conversion([single._tensor() for single in self.singles])


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

    def moved(self, places: Int64s) -> Gathered:
        return Gathered(self.dtype, self.owners, self.memory, places[self.owners], self.size)

    def sum_of_squares(self) -> float:
        return _sum_of_squares(*_rows(self._load(self.places).reshape(-1)))

    def norms(self, p: float) -> Array:
        return _norms_of_rows(self._load(self.places), p)

    def scale_(self, factors: Array) -> None:
        own = factors[self.owners, np.newaxis] if factors.ndim else factors
        changes = np.broadcast_to(own != 1, (len(self.places), 1))[:, 0]
        if changes.all():
            self._store(self.places, self._load(self.places) * own)
        elif changes.any():
            places = self.places[changes]
            self._store(places, self._load(places) * own[changes])

    def clamp_(self, minimums: Array, maximums: Array) -> bool:
        low, high = (each[self.owners, np.newaxis] if each.ndim else each for each in (minimums, maximums))
        x = self._load(self.places)
        changes = ~((x >= low) & (x <= high)).all(axis=1)
        if not changes.any():
            return False
        outside = bool(((x < low) | (x > high)).any())  # not so where all that there is is NaN
        self._store(self.places[changes], np.minimum(np.maximum(x, low), high)[changes])
        return outside

    def _load(self, places: Int64s) -> Array:
        """The elements, [tensors, size], as NumPy can compute with them."""
        return _widened(self.memory[places].view(_STORAGE[self.dtype]), self.dtype).reshape(-1, self.size)

    def _store(self, places: Int64s, x: Array) -> None:
        self.memory[places] = _narrowed(x.reshape(-1), self.dtype).view(self.memory.dtype)


class _Thread(threading.local):
    """Memory for conversions, 3 MB a thread: kept, since memory that is new to the process takes as long again."""

    def __init__(self) -> None:
        with torch.inference_mode(False):  # which would mark it for good
            self.rows = torch.zeros(BLOCK // ROW, ROW, dtype=torch.float32, device="cpu")
            self.flat = self.rows.view(-1)
            self.wide = self.flat.view(torch.float64)
            block = self.flat.numpy()
            self.flat[:1] = 1.0
        if block[0] != 1:  # ahead of keeping it
            raise RuntimeError(
                "16-bit gradients and general norms need tensors that NumPy sees, but a function transform makes "
                "something else of tensors here: clip outside of it"
            )


_thread = _Thread()


class _Conversion:
    """Of 16-bit tensors, of up to a BLOCK of elements, to fp32 in this thread's memory.

    In chunks that torch does in this thread: it takes long to read what another core has just written.

    Attributes:
        tensors: The 16-bit tensors, in their own memory.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors
        sizes = [tensor.numel() for tensor in tensors]
        block = _thread.flat[: sum(sizes)]
        self._converted = torch.split(block, sizes)
        # Under a mode that makes something else of tensors this raises, ahead of keeping them.
        self._rows = _rows(block.numpy())

    def rows(self) -> tuple[Array, Array]:
        """The elements as they are now, as `_rows`, until the next conversion."""
        torch._foreach_copy_(_chunks(self._converted), _chunks(self.tensors))
        return self._rows


def _chunks(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list(chain.from_iterable(torch.split(x, CHUNK) if x.numel() > CHUNK else (x,) for x in tensors))


def _places(addresses: Int64s, itemsizes: Int64s) -> Int64s:
    """Where in `_all_memory` of a tensor's dtype it begins."""
    return (addresses - _LOWEST_ADDRESS) // itemsizes


def _pieces(dtype: torch.dtype, size: int, owners: Int64s, places: Int64s) -> Iterator[Single | Gathered]:
    """Make pieces of tensors of one dtype and size."""
    if size <= SMALL and len(owners) >= FEW:
        memory = _all_memory(dtype, size)
        step = max(1, GATHERED // size)
        for own in (owners[i : i + step] for i in range(0, len(owners), step)):
            yield Gathered(dtype, own, memory, places[own], size)
    else:
        for i in range(len(owners)):
            yield Single.at(dtype, owners[i : i + 1], size, places)


def _batched(pieces: Iterable[Single | Gathered]) -> Iterator[Piece]:
    """Pieces, with tensors of 16-bit floats that are neither gathered nor long in batches."""
    middling: dict[torch.dtype, list[Single]] = {}
    for piece in pieces:
        if isinstance(piece, Gathered) or piece._is_long or piece.dtype.itemsize > 2:
            yield piece
        else:
            middling.setdefault(piece.dtype, []).append(piece)
    for singles in middling.values():
        batch: list[Single] = []
        elements = 0
        for single in singles:
            if elements + len(single.view) > BLOCK:
                yield _batch(batch)
                batch, elements = [], 0
            batch.append(single)
            elements += len(single.view)
        yield _batch(batch)


def _batch(singles: list[Single]) -> Batch:
    return Batch(singles[0].dtype, np.concatenate([single.owners for single in singles]), singles)


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


def _widened(x: Array, dtype: torch.dtype) -> Array:
    """Elements of a dtype as NumPy can compute with them: 16-bit floats in fp32, others as they are."""
    return torch.from_numpy(x).view(dtype).float().numpy() if dtype.itemsize == 2 else x


def _narrowed(x: Array, dtype: torch.dtype) -> Array:
    """The other way round."""
    return torch.from_numpy(x).to(dtype).view(torch.int16).numpy() if dtype.itemsize == 2 else x


def _rows(x: Array) -> tuple[Array, Array]:
    """A 1-d array as rows of equal length, and what is left of it."""
    if len(x) < ROW:  # in less time
        return x[:0], x
    length = _row_length(x)
    whole = len(x) // length * length
    return x[:whole].reshape(-1, length), x[whole:]


def _row_length(x: Array) -> int:
    """ROW, or for what is neither short nor long a bit less where nothing is left over then, which saves a call."""
    size = len(x)
    if size <= ROW or x.nbytes > BY_TORCH:
        return ROW
    rows = -(-size // ROW)
    return next((size // count for count in range(rows, rows + TRIES) if size % count == 0), ROW)


def _sum_of_squares(rows: Array, rest: Array) -> float:
    """The sum of all squares: in the elements' own precision up to ROW of them, and from there on in fp64."""
    squares = sum(np.vecdot(rows, rows).tolist()) if len(rows) else 0.0
    return squares + _square(rest) if len(rest) else squares


def _is_in_range(squares: float) -> bool:
    """Whether a sum of squares is right: no square overflowed, or underflowed where it mattered. A NaN comes of one."""
    return not (squares <= TINY or squares == math.inf)


def _square(x: Array) -> float:
    return float(np.dot(x, x))


def _extremes(x: Tensor) -> tuple[float, float]:
    """The smallest and the largest element; NaN both, where there is one."""
    smallest, largest = torch.aminmax(x)
    return smallest.item(), largest.item()


def _parts(x: Tensor, length: int) -> Iterator[Tensor]:
    """A tensor in parts of up to so many of its first dimension."""
    return (x[begin : begin + length] for begin in range(0, len(x), length))


def _norms_of_short_rows(rows: Tensor) -> Tensor:
    """The 2-norm of each SHORT_ROW of rows of ROW elements, in fp32 or fp64, by torch's threads."""
    if rows.dtype.itemsize > 2:
        norms: Tensor = torch.linalg.vector_norm(rows.view(-1, SHORT_ROW), 2, 1)
        return norms
    blocks = (_thread.rows[: len(part)].copy_(part) for part in _parts(rows, BLOCK // ROW))
    return torch.cat([torch.linalg.vector_norm(block.view(-1, SHORT_ROW), 2, 1) for block in blocks])


def _power_norm(x: Tensor, p: float) -> float:
    """The p-norm of a block of rows in fp64; the same whatever the number of threads, which share out the rows."""
    magnitudes = _thread.wide[: x.numel()].view(x.shape).copy_(x).abs_()
    return stable_norm(norm_of_magnitudes_(magnitudes, p, 1), p).item()


def _norms_of_rows(x: Array, p: float) -> Array:
    """The p-norm of each row of a 2-d array, in fp64; for p = 0 the number of its nonzero elements."""
    if p == 0:
        counts: Array = np.count_nonzero(x, axis=1).astype(np.float64)
        return counts
    if p != 2:
        return stable_norm(torch.from_numpy(x).double(), p, 1).numpy()
    squares = np.vecdot(x, x).astype(np.float64)
    norms: Array = np.sqrt(squares)
    is_out_of_range = ~((squares > TINY) & (squares < np.inf))
    if is_out_of_range.any():
        norms[is_out_of_range] = stable_norm(torch.from_numpy(x[is_out_of_range]).double(), p, 1).numpy()
    return norms


def _factors(coefficient: Scalar, dtype: torch.dtype) -> list[Array]:
    """What to multiply values of a dtype by, one after another, in the precision of the multiplication.

    A coefficient too small for a normal number is split in two: the norm of finite gradients reaches beyond 2**126.
    """
    wide = np.float64 if dtype == torch.float64 else np.float32
    small = 2.0**-900 if dtype == torch.float64 else 2.0**-100
    coefficients = np.asarray(coefficient, np.float64)
    if isinstance(coefficient, float) and (coefficient == 0 or not abs(coefficient) < small):  # in less time
        return [coefficients.astype(wide)]
    is_small = (coefficients != 0) & (np.abs(coefficients) < small)
    if not is_small.any():
        return [coefficients.astype(wide)]
    return [np.where(is_small, coefficients / small, coefficients).astype(wide), np.where(is_small, wide(small), 1)]


def _rounded(dtype: torch.dtype, bound: Bounds) -> Array:
    """Bounds as a dtype has them, in one that NumPy has."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rounded: Array = torch.tensor(bound, dtype=torch.float64, device="cpu").to(dtype).to(wide).numpy()
    return rounded


def _quiet() -> np.errstate:
    # Overflow and NaN are answers here, not accidents.
    return np.errstate(all="ignore")
