"""What a backend must offer, and the rule of the global norm that all of them share.

A backend is a module with two functions: ``obstacle(device)`` tells why it cannot serve a device, or None, and
``plan(tensors)`` takes tensors of one device that do not overlap and returns a `Plan` for them. It may tell in ``HERE``
how it works on this machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")

Scalar: TypeAlias = Tensor | float
"""One number in fp64: 0-dim on a device, or a Python float where it is on the host anyway."""

Bounds: TypeAlias = float | Sequence[float]
"""A bound of values: one for all gradients, or one for each."""

Int64s: TypeAlias = npt.NDArray[np.int64]

IN_FP32 = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.complex32: torch.complex64}
"""What dtypes narrower than fp32 are multiplied in, for the coefficient would be rounded to them."""

_WITHOUT_FP64 = frozenset({"mps"})

EPS = 1e-6
"""Added to the norm before the division, as torch does: it keeps the coefficient finite where the norm is 0."""


class Reduction(NamedTuple):
    """What one pass over gradients leaves.

    Attributes:
        norm: The norm as it is returned: 0-dim, on the gradients' device, in the dtype asked for.
        total: The same norm before it was rounded to that dtype.
        coefficient: ``min(max_norm / (total + 1e-6), 1)``; NaN where the norm is, but 1 where max_norm is infinite.
    """

    norm: Tensor
    total: Scalar
    coefficient: Scalar


class Unscaling(NamedTuple):
    """How gradients that carry a loss scale get rid of it, and who is to know that one of them is not finite.

    Attributes:
        inv_scale: What they are to be multiplied by: 0-dim, fp32, on the gradients' device.
        found_inf: Becomes 1 where a gradient is not finite, and else stays as it is: 0-dim, fp32, on the same device.
    """

    inv_scale: Tensor
    found_inf: Tensor


class Plan(Protocol):
    """Gradients of one device, ready to be reduced, scaled and clamped together."""

    device: torch.device

    def moved(self, addresses: list[int]) -> Plan | None:
        """Return a plan for gradients that differ from this one's in their addresses only, [gradients].

        Of addresses it is None where gradients there have no memory, or share it, or are not aligned to their elements.
        """

    def captured(self) -> Plan:
        """Return a plan for the same gradients that a CUDA graph may replay: nobody else works in its memory."""

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
        """Read every gradient once for the p-norm of all of them. For p = 0 that is the number of nonzero tensors.

        With `unscaling`, for p at least 1, it is the norm without the loss scale, which the coefficient takes off, too.
        """

    def clip_(self, p: float, max_norm: float, dtype: torch.dtype) -> Tensor:
        """Reduce, scale by the coefficient of the global norm, and return the norm."""
        reduced = self.reduce(p, max_norm, dtype)
        self.scale_(reduced.coefficient)
        return reduced.norm

    def norms(self) -> Tensor:
        """Read every gradient once for the 2-norm of each: fp64 where the device has it, in memory that stays as it is.

        On a GPU that is one launch more than `reduce`.
        """

    def scale_(self, coefficient: Scalar) -> None:
        """Multiply the gradients by a coefficient, on whatever device it is; write nothing where it is 1.

        A tensor with one dimension holds a coefficient for each gradient.
        """

    def clamp_(self, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> Tensor | None:
        """Clamp the gradients to [minimum, maximum]; write nothing where nothing is outside.

        If `watch`, return flags on the device, of which one is set if any element was outside; valid until the next
        call.
        """


def address_of(made: Tensor) -> int:
    """Where a tensor that was just made lies.

    Raises:
        RuntimeError: It has no memory: a mode or transform has made something else of it.
    """
    try:
        address = made.data_ptr() if type(made) is Tensor else 0
    except RuntimeError:
        address = 0
    if not address:
        raise RuntimeError(
            "clipping needs tensors with memory, but a mode or function transform makes something else of tensors "
            "here: clip outside of it"
        )
    return address


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of norms and coefficients on a device: fp64 where it has that."""
    return torch.float32 if device.type in _WITHOUT_FP64 else torch.float64


def on(device: torch.device, scalar: Scalar) -> Tensor:
    """Bring a number to a device. To the CPU it waits, for what is read there must have arrived."""
    if isinstance(scalar, Tensor):
        if scalar.device == device and scalar.dtype == wide_dtype(device):
            return scalar  # as `to` would, but sooner
        return scalar.to(device, wide_dtype(device), non_blocking=device.type != "cpu")
    return torch.tensor(scalar, dtype=wide_dtype(device), device=device)


def reduction(total: Tensor, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
    """Apply the rule of the global norm to a total, by torch operations and so without a sync."""
    if unscaling is None:
        return Reduction(total.to(dtype), total, clip_coefficient(total, max_norm))
    # No norm of finite gradients overflows: it is not finite exactly where one of them is not.
    unscaling.found_inf.masked_fill_(~total.isfinite(), 1.0)
    total = total * unscaling.inv_scale
    return Reduction(total.to(dtype), total, clip_coefficient(total, max_norm) * unscaling.inv_scale)


def clip_coefficient(total: Scalar, max_norm: float) -> Scalar:
    """``min(max_norm / (total + 1e-6), 1)``, in fp64 where the device has it; NaN where the total is."""
    if max_norm == math.inf:  # nothing is clipped, whatever the norm; inf / inf would be NaN
        return torch.ones_like(total) if isinstance(total, Tensor) else 1.0
    coefficient = max_norm / (total + EPS)
    if isinstance(coefficient, Tensor):
        return torch.clamp(coefficient, max=1.0)
    return 1.0 if coefficient > 1 else coefficient


def one_each(bound: Bounds, count: int) -> Sequence[float]:
    """A bound for each of `count` gradients."""
    return bound if isinstance(bound, Sequence) else (bound,) * count


def stream_of(device: torch.device) -> int:
    """The handle of a GPU's current stream; 0 where there are no streams."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


is_watched: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many modes look at torch's operations, or count them. Not a function of ours, for whose call there is no time."""

_trace: Callable[[], object] = torch._C._get_tracing_state
_includes: Callable[[Any], bool] = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_RECORDING = [getattr(torch._C._TorchDispatchModeKey, name) for name in ("PROXY", "FAKE", "FUNCTIONAL")]


def is_traced() -> bool:
    """Whether torch records its operations (make_fx, jit.trace), or has other tensors in the place of real ones.

    What kernels do by address is not recorded: the graph would return the example's numbers for every input. A mode of
    anyone else, which looks at operations or counts them, is no reason to take other ones.
    """
    if is_watched() and any(torch._C._get_dispatch_mode(key) is not None for key in _RECORDING):
        return True
    return _trace() is not None or _includes(_PRE_DISPATCH)


def kept(most: int) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Have a function keep the tensors that it made last, but neither make nor use them where tensors are others.

    Those of a mode or a function transform (fake ones, say) must not be met outside of it, nor the other way round.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        keeping: Any = lru_cache(maxsize=most)(function)

        @wraps(function)
        def made(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            is_plain = not is_traced() and torch._C._functorch.peek_interpreter_stack() is None
            value: _R = (keeping if is_plain else function)(*args, **kwargs)
            return value

        return made

    return decorate


_read_by_graphs: list[Tensor] = []


def for_graphs(tensor: Tensor) -> Tensor:
    """Keep a tensor for good if a CUDA graph is being captured that is to read it: nobody tells when a graph ends."""
    if is_capturing(tensor.device):
        _read_by_graphs.append(tensor)
    return tensor


def upload(array: npt.NDArray[Any], device: torch.device, *, for_every_stream: bool = False) -> Tensor:
    """Copy to a device; to a GPU without a sync, by pinned memory that torch does not reuse before the copy is done.

    Args:
        array: What to copy.
        device: Where to.
        for_every_stream: Wait for the copy, so that any stream may read it; for what is kept whatever the stream.

    Raises:
        RuntimeError: A CUDA graph is being captured, which would replay from memory that is gone by then.
    """
    host = torch.from_numpy(np.ascontiguousarray(array))
    if is_capturing(device):
        raise RuntimeError(
            "fastclip cannot upload tables while a CUDA graph is captured. Make the same call once before the capture, "
            "with the same gradients"
        )
    if device.type != "cuda" or for_every_stream:
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def overlapping(starts: Int64s, sizes: Int64s) -> set[int]:
    """Positions of the tensors, of nonzero sizes in bytes, whose memory begins within that of another one."""
    order = starts.argsort(kind="stable")  # which is quick where they are nearly in order
    ends = np.maximum.accumulate((starts + sizes)[order])
    return set(order[1:][starts[order][1:] < ends[:-1]].tolist())


PIECE = 1 << 18
"""Elements of a gradient that torch's operations, which leave temporaries of that size, go through at a time."""


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views that make up a tensor, of at most `PIECE` elements each, cut where the strides are largest.

    A tensor of a class other than torch's own stays whole.
    """
    if tensor.numel() <= PIECE or type(tensor) not in (Tensor, torch.nn.Parameter):
        yield tensor
        return
    count = -(-tensor.numel() // PIECE)
    dim = max(range(tensor.dim()), key=lambda d: (tensor.shape[d] > 1, tensor.stride(d)))
    for part in torch.split(tensor.detach(), max(1, tensor.shape[dim] // count), dim):
        yield from pieces(part)


def combine(norms: Sequence[Tensor], p: float) -> Tensor:
    """The p-norm of norms, 0-dim tensors on one device: of all their elements, had they been one vector."""
    # The 0-norms of groups are counts of tensors, and counts add up.
    return stable_norm(torch.stack(list(norms)), 1.0 if p == 0 else p)


def norm_of_norms(norms: Tensor, dtype: torch.dtype, dim: int | None = None) -> Tensor:
    """Return the 2-norm of 2-norms, as `wide_dtype` has them, of gradients of a dtype: of all their elements."""
    if dtype != torch.float64 and norms.dtype == torch.float64:  # whose squares neither overflow nor underflow
        norm: Tensor = torch.linalg.vector_norm(norms, 2.0, dim)
        return norm
    return stable_norm(norms, 2.0, dim)


def stable_norm(x: Tensor, p: float, dim: int | None = None) -> Tensor:
    """``‖x‖_p`` of a nonempty tensor in x's own precision, without overflow or underflow of the powers (p ≠ 0)."""
    return norm_of_magnitudes_(x.abs(), p, dim)


def norm_of_magnitudes_(magnitudes: Tensor, p: float, dim: int | None = None) -> Tensor:
    """The same of absolute values, which it overwrites."""
    axes = tuple(range(magnitudes.dim())) if dim is None else dim
    leading = magnitudes.amax(axes, keepdim=True) if p > 0 else magnitudes.amin(axes, keepdim=True)  # the largest power
    if math.isinf(p):
        return leading.squeeze(axes)
    scale = torch.where(leading.isfinite() & (leading > 0), leading, torch.ones_like(leading))
    # On the CPU `vector_norm` takes powers one by one, 2 to 30 times as slowly.
    norm = magnitudes.div_(scale).pow_(p).sum(axes, keepdim=True).pow(1 / p) * scale
    return norm.squeeze(axes)
