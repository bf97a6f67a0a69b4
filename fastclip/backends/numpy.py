"""The NumPy backend: the fallback without the native kernels. It needs no compiler.

Each gradient is a zero-copy view of its memory, processed in blocks. Squares are summed in fp32 over rows of at most
ROW elements (in the lanes of BLAS), then in fp64. If the squares of a block leave the range of fp32, the block is
summed again in fp64. Torch converts 16-bit floats block by block: NumPy lacks bf16, and is slow with fp16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastclip.backends.coefficient import clip_coefficient, reduction
from fastclip.backends.interface import Bounds, Plan, Reduction, Unscaling, one_each
from fastclip.backends.thresholds import adapt
from fastclip.backends.units import clip_units_
from fastclip.foundation.arithmetic import stable_norm
from fastclip.foundation.devices import Scalar, on
from fastclip.foundation.memory import address_of

__all__ = ["adapt", "obstacle", "plan"]

Array: TypeAlias = npt.NDArray[Any]

ROW = 2048  # elements whose squares are added in fp32
BLOCK = 1 << 17  # elements that are copied at a time: 1 MB in fp64

# A sum of squares above this has lost less than 2**-24 of itself to the subnormal numbers of fp32.
TINY = 2.0**-80


def obstacle(device: torch.device) -> str | None:
    """Why NumPy cannot serve a device: it sees the CPU's memory only."""
    return None if device.type == "cpu" else "NumPy works on the CPU's memory only"


def plan(tensors: list[Tensor]) -> NumpyPlan:
    """Prepare plain CPU tensors that do not overlap.

    Raises:
        RuntimeError: Tensors have no memory here, because a mode or function transform replaces them.
    """
    address_of(torch.ones(1, device="cpu"))
    return NumpyPlan([View(tensor) for tensor in tensors])


class View:
    """All elements of one gradient, in the order of their memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.is_wide = tensor.dtype == torch.float64
        self.flat = tensor.detach().as_strided((tensor.numel(),), (1,))
        self._memory: Array = (self.flat.view(torch.int16) if self.dtype.itemsize == 2 else self.flat).numpy()

    def blocks(self) -> Iterator[slice]:
        """The blocks, as slices of the elements."""
        return (slice(begin, begin + BLOCK) for begin in range(0, len(self._memory), BLOCK))

    def load(self, block: slice) -> Array:
        """The elements of a block: a copy in fp32 of 16-bit floats, else a view."""
        x = self._memory[block]
        return torch.from_numpy(x).view(self.dtype).float().numpy() if self.dtype.itemsize == 2 else x

    def store(self, block: slice, x: Array) -> None:
        """Write a block, rounded to the gradient's own dtype."""
        if self.dtype.itemsize == 2:
            x = torch.from_numpy(x).to(self.dtype).view(torch.int16).numpy()
        self._memory[block] = x

    def rounded(self, value: float) -> Any:
        """A number rounded to the gradient's dtype, in the dtype that `load` returns."""
        number = torch.tensor(value, dtype=torch.float64, device="cpu").to(self.dtype)
        return number.to(torch.float64 if self.is_wide else torch.float32).numpy()[()]


class NumpyPlan(Plan):
    """See `fastclip.backends.interface.Plan`. It holds views of the gradients, so it is used in one call only."""

    device = torch.device("cpu")

    def __init__(self, views: list[View]) -> None:
        self.views = views

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
        norms = self._norms(p)
        # The 0-norm of a gradient counts its nonzero elements. That of all gradients counts those with any.
        total = float(np.count_nonzero(norms)) if p == 0 else stable_norm(norms, p).item()
        if unscaling is not None:
            return reduction(on(self.device, total), max_norm, dtype, unscaling)
        return Reduction(on(self.device, total).to(dtype), total, clip_coefficient(total, max_norm))

    def norms(self) -> Tensor:
        return self._norms(2.0)

    def _norms(self, p: float) -> Tensor:
        """The p-norm of each gradient in fp64; for p = 0 the number of its nonzero elements."""
        with _quiet():
            norms = [_combined([_norm(view.load(block), p) for block in view.blocks()], p) for view in self.views]
        return torch.tensor(norms, dtype=torch.float64, device=self.device)

    def scale_(self, coefficient: Scalar) -> None:
        each = isinstance(coefficient, Tensor) and coefficient.dim() > 0
        coefficients = on(self.device, coefficient).tolist() if each else [float(coefficient)] * len(self.views)
        with _quiet():
            for view, own in zip(self.views, coefficients, strict=True):
                factor, power = _factors(own, np.float64 if view.is_wide else np.float32)
                for block in view.blocks() if factor * power != 1 else ():
                    view.store(block, view.load(block) * factor * power)

    def clamp_(self, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> Tensor | None:
        changed = False
        lows, highs = (one_each(bound, len(self.views)) for bound in (minimum, maximum))
        with _quiet():
            for view, low, high in zip(self.views, map(View.rounded, self.views, lows), highs, strict=True):
                bounds = low, view.rounded(high)
                for block in view.blocks():
                    changed |= _clamp(view, block, *bounds)
        return torch.tensor([changed], device=self.device) if watch else None

    @torch.no_grad()
    def clip_units_(self, weights: Plan, counts: Sequence[int], ratios: Tensor, eps: float) -> Tensor:
        own = on(self.device, ratios).unbind()
        places = zip(self.views, weights.views, counts, strict=True)  # type: ignore[attr-defined]  # it is a NumpyPlan
        rows = [(view.flat.view(count, -1), weight.flat.view(count, -1)) for view, weight, count in places]
        return torch.stack([clip_units_(*pair, ratio, eps) for pair, ratio in zip(rows, own, strict=True)])


def _norm(x: Array, p: float) -> float:
    """The p-norm of a block in fp64; for p = 0 the number of its nonzero elements."""
    if p == 0:
        return float(np.count_nonzero(x))
    if p == 2:
        whole = len(x) // ROW * ROW
        rows, rest = x[:whole].reshape(-1, ROW), x[whole:]
        squares = float(np.vecdot(rows, rows).sum(dtype=np.float64)) + float(np.dot(rest, rest))
        if math.isnan(squares) or TINY < squares < math.inf:
            return math.sqrt(squares)
    # By NumPy: its sums do not depend on the number of threads.
    magnitudes = x.astype(np.float64)  # a copy that is changed in place: 1.5 MB for a block instead of 3.5
    np.abs(magnitudes, out=magnitudes)
    leading = float(magnitudes.max() if p > 0 else magnitudes.min())  # it has the largest power
    if math.isinf(p):
        return leading
    scale = leading if 0 < leading < math.inf else 1.0
    magnitudes /= scale
    return float(np.power(np.power(magnitudes, p, out=magnitudes).sum(), 1 / p)) * scale


def _combined(norms: list[float], p: float) -> float:
    """The norm of a gradient from those of its blocks."""
    if len(norms) == 1:
        return norms[0]
    return sum(norms) if p == 0 else stable_norm(torch.tensor(norms, dtype=torch.float64, device="cpu"), p).item()


def _factors(coefficient: float, wide: type[Any]) -> tuple[Any, Any]:
    """Two factors of a coefficient, neither of them subnormal: the norm of finite gradients can exceed 2**126."""
    small = 2.0**-900 if wide is np.float64 else 2.0**-100
    power = small if abs(coefficient) < small else 1.0
    return wide(coefficient / power), wide(power)


def _clamp(view: View, block: slice, low: Any, high: Any) -> bool:
    """Clamp a block if an element is out of bounds, and return whether one was. NaN stays NaN."""
    x = view.load(block)
    smallest, largest = np.fmin.reduce(x), np.fmax.reduce(x)  # ignoring NaN
    is_outside = bool(smallest < low or largest > high)
    if is_outside or np.isnan(low) or np.isnan(high):  # a NaN bound makes everything NaN
        view.store(block, np.minimum(np.maximum(x, low), high))
    return is_outside


def _quiet() -> np.errstate:
    # Overflow and NaN are valid results here.
    return np.errstate(all="ignore")
