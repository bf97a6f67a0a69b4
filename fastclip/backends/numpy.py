"""The NumPy backend: zero-copy views of the gradients, in cache-sized pieces, over as many threads as torch uses.

The same three steps as on the GPU: every piece is reduced to its norm, the norms are combined in fp64, and only where
the coefficient is not 1 (where a value is out of bounds) is anything written. Squares are summed in fp32 over rows of
1024 and from there on in fp64; a piece whose sum left the range in which fp32 is right to rounding is done again in
fp64. NumPy has no bfloat16, and its float16 is slow: those two are converted and clamped piece by piece by torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastclip.backends.interface import Reduction, reduction

Array: TypeAlias = npt.NDArray[Any]
T = TypeVar("T")

PIECE = 65_536  # elements: 256 KB of fp32, which stays in the L2 cache between NumPy's passes over it
HALF_PIECE = 32_768  # elements: torch runs an operation on no more than these in the calling thread
ROW = 1024  # elements summed in fp32: 32 additions in each of 32 SIMD lanes keep the sum within 2e-6
THREADS_FROM = 131_072  # elements; below, handing work to another thread costs more than it saves

# fp32 sums of squares above this lost less than 2**-24 of themselves to subnormal rounding, for up to PIECE elements.
TINY = 2.0**-100


def obstacle(device: torch.device) -> str | None:
    """Why NumPy cannot serve the device: it sees the CPU's memory only."""
    return None if device.type == "cpu" else "NumPy works on the CPU's memory only"


def plan(tensors: list[Tensor]) -> NumpyPlan:
    """Prepare plain CPU tensors that do not overlap."""
    return NumpyPlan(tensors)


class NumpyPlan:
    """See `fastclip.backends.interface.Plan`."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.device = tensors[0].device
        self.tensors = [tensor.detach().as_strided((tensor.numel(),), (1,)) for tensor in tensors]
        self.pieces = [piece for tensor in self.tensors for piece in _cut(tensor)]
        self.owners = np.repeat(np.arange(len(tensors)), [-(-len(t) // _piece_size(t)) for t in self.tensors])
        self.threads = torch.get_num_threads() if sum(map(len, self.tensors)) >= THREADS_FROM else 1

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype) -> Reduction:
        norms = np.fromiter(self._map(lambda piece: _norm(_as_array(piece), p), self.pieces), np.float64)
        # A piece's 0-norm counts its nonzero elements; the set's counts the tensors that have any.
        total = _norm(np.bincount(self.owners, weights=norms) if p == 0 else norms, p)
        return reduction(torch.tensor(total, dtype=torch.float64), max_norm, dtype)

    def scale_(self, coefficient: Tensor) -> None:
        factors = {dtype: _factors(float(coefficient), dtype) for dtype in {tensor.dtype for tensor in self.tensors}}
        pieces = [piece for piece in self.pieces if factors[piece.dtype]]
        # Backwards, so that what the reduction read last, and the cache still holds, is read first.
        self._run(lambda piece: _scale_(piece, factors[piece.dtype]), pieces[::-1])

    def clamp_(self, minimum: float, maximum: float) -> None:
        self._run(lambda piece: _clamp_(piece, minimum, maximum), self.pieces)

    def _map(self, work: Callable[[Tensor], T], pieces: Sequence[Tensor]) -> Iterator[T]:
        if self.threads == 1 or len(pieces) < 2:
            return map(work, pieces)
        share = -(-len(pieces) // self.threads)
        shares = [pieces[start : start + share] for start in range(0, len(pieces), share)]
        done = _pool(self.threads).map(lambda some: [work(piece) for piece in some], shares)
        return (result for results in done for result in results)

    def _run(self, work: Callable[[Tensor], None], pieces: Sequence[Tensor]) -> None:
        for _ in self._map(work, pieces):
            pass


def _piece_size(tensor: Tensor) -> int:
    return PIECE if tensor.dtype in (torch.float32, torch.float64) else HALF_PIECE


def _cut(flat: Tensor) -> Sequence[Tensor]:
    return torch.split(flat, _piece_size(flat)) if len(flat) > _piece_size(flat) else (flat,)


def _as_array(piece: Tensor) -> Array:
    array: Array = (piece.float() if piece.element_size() == 2 else piece).numpy()
    return array


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
    rows = x[:whole].reshape(-1, ROW)
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(np.vecdot(rows, rows).sum(dtype=np.float64)) + float(np.dot(x[whole:], x[whole:]))
    in_range = total > TINY and total < np.inf
    return float(np.sqrt(total)) if in_range else _power_norm(x, 2.0)


def _power_norm(x: Array, p: float) -> float:
    """The norm in fp64, of values scaled by a power of two so that no power overflows."""
    magnitudes = np.abs(x, dtype=np.float64)
    peak = magnitudes.max()
    exponent = int(np.frexp(peak)[1]) if 0 < peak < np.inf else 0
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        total = np.power(np.ldexp(magnitudes, -exponent), p).sum()
        return float(np.ldexp(np.power(total, 1 / p), exponent))


def _factors(coefficient: float, dtype: torch.dtype) -> tuple[float, ...]:
    """What to multiply values of a dtype by, one after another: nothing for 1 in the precision of the multiplication.

    A coefficient too small for a normal number is split in two: the norm of finite gradients reaches beyond 2**126.
    """
    wide = np.float64 if dtype == torch.float64 else np.float32
    small = 2.0**-900 if dtype == torch.float64 else 2.0**-100
    if wide(coefficient) == 1:
        return ()
    if abs(coefficient) < small:
        return (float(wide(coefficient / small)), small)
    return (float(wide(coefficient)),)


def _scale_(piece: Tensor, factors: tuple[float, ...]) -> None:
    if piece.element_size() == 2:
        wide = piece.float()
        _scale_(wide, factors)
        piece.copy_(wide)
        return
    array = piece.numpy()
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for factor in factors:
            np.multiply(array, factor, out=array)


def _clamp_(piece: Tensor, minimum: float, maximum: float) -> None:
    if piece.element_size() == 2:
        smallest, largest = torch.aminmax(piece)
        if not (smallest >= minimum and largest <= maximum):
            piece.clamp_(minimum, maximum)
        return
    array = piece.numpy()
    if not (array.min() >= minimum and array.max() <= maximum):
        np.clip(array, minimum, maximum, out=array)


_pools: dict[int, ThreadPoolExecutor] = {}


def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads that sleep while there is nothing to do, kept for the process's life."""
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="fastclip")
    return _pools[threads]


# Threads do not survive a fork: a child (a DataLoader's worker, say) makes its own.
os.register_at_fork(after_in_child=_pools.clear)
