"""Gradients, grouped by the backend that serves them and made ready: prepared once, and kept for the next call.

    Gradients --prepare--> Prepared: [Plan, Plan, ...]

A gradient is *plain* when it fills its memory without gaps or overlaps and holds real floating-point numbers: then it
is an address and a number of elements, which is all that the kernels need. Everything else (complex, strided views,
tensor subclasses, meta tensors) is left to torch's own operations; a sparse gradient takes part by its values. So is
every gradient while torch's operations are traced. Whatever the mixture, one norm is taken over all of it.

Training clips gradients that are alike again and again, and that lie elsewhere in each step
(`zero_grad(set_to_none=True)` frees them). So what does not depend on their addresses is kept, their `Arrangement`: who
serves which gradient, and the tables of sizes. With it is kept what it rests on: type, dtype, device, sizes and strides
of every gradient, and whatever else torch knows of it. All of that is compared on every call, and nothing is reused
unless all of it is as it was.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import cached_property, reduce
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from fastclip.backends import ENVIRONMENT_VARIABLE, TORCH, TRITON, Backend, for_device
from fastclip.backends.coefficient import reduction
from fastclip.backends.interface import Bounds, Plan, Reduction, Unscaling
from fastclip.core.gradients import PLAIN_TYPES, Gradients, check_dtypes, check_writable
from fastclip.foundation.arithmetic import combine
from fastclip.foundation.devices import Scalar, is_capturing, on, stream_of, upload, wide_dtype
from fastclip.foundation.memory import overlapping
from fastclip.foundation.tracing import is_traced, is_watched

# A part of torch that is torch's own affair: without it nothing is kept, and every call prepares anew.
TensorGuards: Any = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)

# Raw writes do not bump the version counters by which autograd knows that a saved tensor was changed. What is public is
# a function of Python around this one.
_increment_version: Any = getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version)

_PLAIN_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_Key: TypeAlias = tuple[object, ...]
_KEPT = 16_384  # gradients, a thread, of some 1 KB each: a few large models that are trained in turns
_LEAST = 8  # what a list of gradients counts as at least, so that 2048 parameters may be clipped each by itself


class Arrangement:
    """Which plan serves which gradient, and what else does not depend on the gradients' addresses.

    Attributes:
        members: The positions, among the gradients, of each plan's members.
        count: The number of gradients.
        is_in_order: Whether one plan has all gradients, in their order.
        is_alone: Whether there is one plan only, on the first gradient's device.
        device: The first gradient's.
        dtype: The gradients' own, real and promoted where they differ: that of torch's norm.
        is_by_address: Whether plans for other gradients can be made from these plans; see `Backend.by_address`.
        may_be_captured: Whether a plan launches kernels, which a CUDA graph may be capturing.
        streams: The current stream of each GPU, for which the plans were made.
    """

    def __init__(self, tensors: Sequence[Tensor], groups: dict[tuple[Backend, torch.device], list[int]]) -> None:
        self.members = list(groups.values())
        self.count = len(tensors)
        self.is_in_order = self.members == [list(range(self.count))]
        self.device = tensors[0].device
        self.is_alone = [device for _, device in groups] == [self.device]
        self.dtype = promoted({tensor.dtype.to_real() for tensor in tensors})
        self.is_by_address = all(backend.by_address for backend, _ in groups)
        self.may_be_captured = any(backend is TRITON for backend, _ in groups)
        self.streams = {device: stream_of(device) for _, device in groups if device.type == "cuda"}

    @cached_property
    def positions(self) -> list[Tensor]:
        """`members` on the first gradient's device."""
        return [upload(np.array(members), self.device) for members in self.members]

    def is_for_the_current_streams(self) -> bool:
        """Whether the plans may be used on the streams that are current now."""
        return all(stream_of(device) == stream for device, stream in self.streams.items())


class Prepared:
    """Gradients made ready to be clipped together: what the plans do, done to all of them.

    Attributes:
        arrangement: Which plan serves which gradient.
        plans: One for each backend and device, in the order of their first members; none if no gradient has elements.
    """

    __slots__ = ("_temporaries", "arrangement", "plans")

    def __init__(self, arrangement: Arrangement, plans: list[Plan], temporaries: Sequence[Tensor] = ()) -> None:
        self.arrangement = arrangement
        self.plans = plans
        self._temporaries = temporaries

    @property
    def device(self) -> torch.device:
        """The first gradient's."""
        return self.arrangement.device

    @property
    def dtype(self) -> torch.dtype:
        """The gradients' own, real and promoted where they differ: that of torch's norm."""
        return self.arrangement.dtype

    @property
    def devices(self) -> set[torch.device]:
        """Where the gradients are."""
        return {self.device, *(plan.device for plan in self.plans)}

    def clip_(self, grads: Gradients, p: float, max_norm: float, dtype: torch.dtype) -> Tensor:
        """Clip the gradients that this was prepared from by the norm of all, which is returned."""
        if self.arrangement.is_alone:
            _increment_version(grads.tensors)
            return self.plans[0].clip_(p, max_norm, dtype)
        reduced = self.reduce(p, max_norm, dtype)
        self.scale_(grads, reduced.coefficient)
        return reduced.norm

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
        """Reduce all plans to one norm, on the first gradient's device."""
        if self.arrangement.is_alone:
            return self.plans[0].reduce(p, max_norm, dtype, unscaling)
        totals = [on(self.device, plan.reduce(p, max_norm, dtype).total) for plan in self.plans]
        return reduction(combine(totals or [on(self.device, 0.0)], p), max_norm, dtype, unscaling)

    def norms(self) -> Tensor:
        """Return the 2-norm of each gradient, [gradients], on the first gradient's device."""
        if self.arrangement.is_in_order:
            return on(self.device, self.plans[0].norms())
        norms = torch.zeros(self.arrangement.count, dtype=wide_dtype(self.device), device=self.device)
        for plan, positions in zip(self.plans, self.arrangement.positions, strict=True):
            norms[positions] = on(self.device, plan.norms())
        return norms

    def scale_(self, grads: Gradients, coefficient: Scalar) -> None:
        """Multiply the gradients that this was prepared from by one coefficient, or by one each."""
        _increment_version(grads.tensors)
        if not isinstance(coefficient, Tensor) or coefficient.dim() == 0 or self.arrangement.is_in_order:
            for plan in self.plans:
                plan.scale_(coefficient)
            return
        for plan, positions in zip(self.plans, self.arrangement.positions, strict=True):
            plan.scale_(coefficient[positions])

    def clamp_(self, grads: Gradients, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> list[Tensor]:
        """Clamp the gradients that this was prepared from. Return flags if `watch`, as a plan does."""
        _increment_version(grads.tensors)
        flags = [
            plan.clamp_(_pick(minimum, members), _pick(maximum, members), watch=watch)
            for plan, members in zip(self.plans, self.arrangement.members, strict=True)
        ]
        return [flag for flag in flags if flag is not None]


def _pick(bound: Bounds, members: list[int]) -> Bounds:
    return [bound[i] for i in members] if isinstance(bound, Sequence) else bound


class _Pattern:
    """An arrangement, what tells whether it fits, and the gradients that it was used for last."""

    def __init__(self, tensors: Sequence[Tensor], addresses: list[int], prepared: Prepared) -> None:
        self.arrangement = prepared.arrangement
        self.fits = _guards(tensors)
        self._addresses = addresses
        self._prepared = prepared

    def at(self, addresses: list[int]) -> Prepared | None:
        """What is prepared for gradients like these at other addresses; None where they cannot be served alike."""
        if addresses == self._addresses:
            return self._prepared
        arrangement, plans = self.arrangement, self._prepared.plans
        if arrangement.is_in_order:
            moved = [plans[0].moved(addresses)]
        else:
            members = arrangement.members
            moved = [plan.moved([addresses[i] for i in own]) for plan, own in zip(plans, members, strict=True)]
        if None in moved:
            return None
        self._addresses, self._prepared = addresses, Prepared(arrangement, cast("list[Plan]", moved))
        return self._prepared


class _Kept(threading.local):
    """What is kept, by a sketch of the gradients: several may share one. The oldest is dropped first."""

    def __init__(self) -> None:
        self.by_sketch: dict[_Key, list[_Pattern]] = {}
        self._ages: OrderedDict[_Pattern, _Key] = OrderedDict()
        self.gradients = 0

    def find(self, sketch: _Key, tensors: Sequence[Tensor]) -> _Pattern | None:
        """The pattern that gradients fit, for the streams that are current now."""
        for pattern in self.by_sketch.get(sketch, ()):
            if pattern.fits(*tensors) and (not pattern.arrangement.streams or _may_use(pattern.arrangement)):
                return pattern
        return None

    def add(self, sketch: _Key, pattern: _Pattern) -> None:
        """Keep a pattern, and drop those that there is no more room for."""
        self.by_sketch.setdefault(sketch, []).insert(0, pattern)
        self._ages[pattern] = sketch
        self.gradients += max(pattern.arrangement.count, _LEAST)
        while self.gradients > _KEPT and len(self._ages) > 1:
            oldest, its_sketch = self._ages.popitem(last=False)
            self.gradients -= max(oldest.arrangement.count, _LEAST)
            self.by_sketch[its_sketch].remove(oldest)
            if not self.by_sketch[its_sketch]:
                del self.by_sketch[its_sketch]


_kept = _Kept()


def _may_use(arrangement: Arrangement) -> bool:
    return is_capturing(arrangement.device) or arrangement.is_for_the_current_streams()


# `os.environ.get` takes 7 µs among cold caches, and this 2.
_variables: Any = getattr(os.environ, "_data", os.environ)
_variable: Any = os.environ.encodekey(ENVIRONMENT_VARIABLE) if hasattr(os.environ, "_data") else ENVIRONMENT_VARIABLE


def prepare(grads: Gradients, *, in_place: bool) -> Prepared:
    """Group gradients into plans, or take over what was prepared for gradients like these in an earlier call.

    Gradients without elements contribute nothing and are left out. Of plain gradients that share memory (one listed
    twice, overlapping views) all but the first are left to torch, one after another: there they are counted and scaled
    once more, as torch does, and no two threads ever race for an address.

    Args:
        grads: At least one gradient.
        in_place: Whether they are going to be written.

    Raises:
        RuntimeError: A gradient has no norm or cannot be written, or the forced backend (`FASTCLIP_BACKEND`) cannot
            serve its device.
    """
    tensors = grads.tensors
    addresses = _addresses(grads) if grads.addresses is None else grads.addresses
    if addresses is None or (is_watched() and is_traced()):  # traces by other means the guards below see
        return _prepared_anew(grads, in_place=in_place)
    first = tensors[0]
    sketch = (len(tensors), first.numel(), in_place, _variables.get(_variable))
    pattern = _kept.find(sketch, tensors)
    prepared = None if pattern is None else pattern.at(addresses)
    if (pattern is None or pattern.arrangement.may_be_captured) and is_capturing(first.device):
        return _captured(prepared)
    if prepared is None:
        prepared = _prepared_anew(grads, in_place=in_place)
        if TensorGuards is not None and prepared.arrangement.is_by_address:
            _kept.add(sketch, _Pattern(tensors, addresses, prepared))
    return prepared


def _addresses(grads: Gradients) -> list[int] | None:
    """The gradients' addresses, or None where one is not of torch's own two classes or has no address."""
    if not grads.kinds.issubset(PLAIN_TYPES):
        return None
    try:
        return list(map(Tensor.data_ptr, grads.tensors))
    except RuntimeError:  # a sparse tensor, or one inside of a function transform
        return None


def _guards(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """What tells whether as many other tensors are like these: in all that torch knows of them, but for their memory.

    `torch.compile` looks at its inputs so: 40 ns a tensor, where a look by Python at each attribute takes 500. Types,
    dtypes, devices, sizes and strides are compared, and the dispatch keys, which tell sparse, negated, inference and
    other tensors apart; no tensor may be there twice.
    """
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    check: Callable[..., bool] = guards.check
    return check


_captures: list[Prepared] = []
"""What CUDA graphs replay from: it has to live as long as the graph, and when that ends nobody tells."""


def _captured(kept: Prepared | None) -> Prepared:
    """Make ready for a CUDA graph what was prepared before its capture, on whatever stream."""
    if kept is None:
        raise RuntimeError(
            "a CUDA graph is being captured, and nothing was prepared for these gradients before: make the same call "
            "once ahead of the capture, with the same gradients (a sparse or strided gradient, or one of another type, "
            "has to be clipped outside of the graph)"
        )
    prepared = Prepared(kept.arrangement, [plan.captured() for plan in kept.plans])
    _captures.append(prepared)
    return prepared


def _prepared_anew(grads: Gradients, *, in_place: bool) -> Prepared:
    """Check and group gradients."""
    check_dtypes(grads)
    if in_place:
        check_writable(grads)
    tensors = grads.tensors
    values = [_values(t, in_place=in_place) if t.layout is torch.sparse_coo else t for t in tensors]
    groups = _group(values)
    plans = [backend.plan([values[i] for i in members]) for (backend, _), members in groups.items()]
    # The coalesced values of sparse gradients have to stay: plans know but their addresses.
    temporaries = [value for value, tensor in zip(values, tensors, strict=True) if value is not tensor]
    return Prepared(Arrangement(tensors, groups), plans, temporaries)


def promoted(dtypes: set[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of at least one."""
    return reduce(torch.promote_types, dtypes)


def _group(values: Sequence[Tensor]) -> dict[tuple[Backend, torch.device], list[int]]:
    """The positions of the tensors that each backend serves on each device."""
    groups: dict[tuple[Backend, torch.device], list[int]] = {}
    plain: dict[torch.device, list[int]] = {}
    by_kernels = not is_traced()
    for position, tensor in enumerate(values):
        if tensor.numel() == 0:
            continue
        if by_kernels and _is_plain(tensor):
            plain.setdefault(tensor.device, []).append(position)
        else:
            groups.setdefault((TORCH, tensor.device), []).append(position)
    for device, members in plain.items():
        backend = for_device(device)
        tensors = [values[position] for position in members]
        starts = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
        shared = overlapping(starts, np.array([tensor.nbytes for tensor in tensors]))
        for i, position in enumerate(members):
            groups.setdefault((TORCH if i in shared else backend, device), []).append(position)
    return groups


def _values(grad: Tensor, *, in_place: bool) -> Tensor:
    """The values of a sparse COO gradient with its duplicate indices summed, in the gradient itself if `in_place`."""
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
        and grad.dtype in _PLAIN_DTYPES
        and grad.device.type != "meta"
        and not grad.is_neg()
        and (grad.is_contiguous() or _fills_its_memory(grad))
        and _has_aligned_memory(grad)
    )


def _has_aligned_memory(grad: Tensor) -> bool:
    try:
        address = grad.data_ptr()
    except RuntimeError:  # inside of a function transform (`torch.func`)
        return False
    return address > 0 and address % grad.element_size() == 0  # torch's "efficient zeros" have no memory


def _fills_its_memory(grad: Tensor) -> bool:
    """Whether the elements lie without gaps or overlaps, in whatever order (transposed, channels last)."""
    expected = 1
    for stride, size in sorted(zip(grad.stride(), grad.shape, strict=True)):
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True
