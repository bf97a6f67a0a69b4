"""Gradients, grouped by the backend that serves them and made ready: prepared once, and kept while they stay put.

    Gradients --prepare--> Prepared: [Plan, Plan, ...]

A gradient is *plain* when it fills its memory without gaps or overlaps and holds real floating-point numbers: then it
is an address and a number of elements, which is all that the Triton and NumPy backends need. Everything else (complex,
strided views, tensor subclasses, meta tensors) is left to torch's own operations; a sparse gradient takes part by its
values. Whatever the mixture, one norm is taken over all of it.

Training clips the same gradients again and again, so what was prepared is kept, together with what it rests on: the
address of every gradient, and its type, dtype, device, sizes, strides and whatever else torch knows of it. All of that
is compared on every call, and nothing is reused unless all of it is as it was. Where only the addresses differ
(`zero_grad(set_to_none=True)` moves gradients), what does not depend on them is: who serves which gradient, and the
tables of sizes.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from fastclip.backends import ENVIRONMENT_VARIABLE, TORCH, Backend, for_device
from fastclip.backends.interface import (
    Bounds,
    Int64s,
    Plan,
    Reduction,
    Scalar,
    Unscaling,
    combine,
    is_capturing,
    on,
    reduction,
    stream_of,
    upload,
    wide_dtype,
)
from fastclip.gradients import Gradients, check_dtypes, check_writable

# A part of torch that is torch's own affair: without it nothing is kept, and every call prepares anew.
TensorGuards: Any = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)

_PLAIN_TYPES = {Tensor, nn.Parameter}
_PLAIN_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_Key: TypeAlias = tuple[object, ...]
_KEPT = 16_384  # gradients, a thread, of some 1 KB each: a few large models that are trained in turns
_LEAST = 8  # what a list of gradients counts as at least, so that 2048 parameters may be clipped each by itself


class Arrangement:
    """Which plan serves which gradient, and what else does not depend on the gradients' addresses.

    Attributes:
        members: The positions, among the gradients, of each plan's members.
        count: The number of gradients.
        device: The first gradient's.
        dtype: The gradients' own, real and promoted where they differ: that of torch's norm.
        fits: Tells whether as many other tensors differ from these in their addresses only; None where that cannot be
            told.
        filled: The positions of the gradients that have elements.
        itemsizes: Bytes an element of each of those.
        sizes: Bytes of each of those.
    """

    def __init__(self, tensors: Sequence[Tensor], members: list[list[int]], fits: Callable[..., bool] | None) -> None:
        self.members = members
        self.count = len(tensors)
        self.device = tensors[0].device
        self.dtype = promoted({tensor.dtype.to_real() for tensor in tensors})
        self.fits = fits
        sizes = np.array([tensor.numel() * tensor.dtype.itemsize for tensor in tensors])
        self.filled = np.flatnonzero(sizes)
        self.itemsizes = np.array([tensor.dtype.itemsize for tensor in tensors])[self.filled]
        self.sizes = sizes[self.filled]

    @cached_property
    def is_in_order(self) -> bool:
        """Whether one plan has all gradients, in their order."""
        return self.members == [list(range(self.count))]

    def may_be_at(self, addresses: Int64s) -> bool:
        """Whether gradients at these addresses, [gradients], are aligned and share no memory."""
        starts = addresses[self.filled]
        if np.count_nonzero((starts <= 0) | (starts % self.itemsizes != 0)):
            return False
        return not _overlapping(starts, self.sizes)

    @cached_property
    def positions(self) -> list[Tensor]:
        """`members` on the first gradient's device."""
        return [upload(np.array(members), self.device) for members in self.members]


@dataclass(frozen=True)
class Prepared:
    """Gradients made ready to be clipped together: what the plans do, done to all of them.

    Attributes:
        plans: One for each backend and device, in the order of their first members; none if no gradient has elements.
        arrangement: Which plan serves which gradient.
        streams: The current stream of each GPU, for which the plans were made.
        addresses: Where the gradients were, or None where this must not be used again.
        temporaries: Among others the coalesced values of sparse gradients, of which plans know but the addresses.
    """

    plans: list[Plan]
    arrangement: Arrangement
    streams: tuple[tuple[torch.device, int], ...]
    addresses: list[int] | None
    temporaries: list[Tensor]

    @property
    def device(self) -> torch.device:
        """The first gradient's."""
        return self.arrangement.device

    @property
    def devices(self) -> set[torch.device]:
        """Where the gradients are."""
        return {self.device, *(plan.device for plan in self.plans)}

    @property
    def dtype(self) -> torch.dtype:
        """The gradients' own, real and promoted where they differ: that of torch's norm."""
        return self.arrangement.dtype

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
        """Reduce all plans to one norm, on the first gradient's device."""
        if len(self.plans) == 1 and self.plans[0].device == self.device:
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
        # Raw writes do not bump the version counters by which autograd knows that a saved tensor was changed.
        torch.autograd.graph.increment_version(grads.tensors)
        if not isinstance(coefficient, Tensor) or coefficient.dim() == 0 or self.arrangement.is_in_order:
            for plan in self.plans:
                plan.scale_(coefficient)
            return
        for plan, positions in zip(self.plans, self.arrangement.positions, strict=True):
            plan.scale_(coefficient[positions])

    def clamp_(self, grads: Gradients, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> list[Tensor]:
        """Clamp the gradients that this was prepared from. Return flags if `watch`, as a plan does."""
        torch.autograd.graph.increment_version(grads.tensors)
        flags = [
            plan.clamp_(_pick(minimum, members), _pick(maximum, members), watch=watch)
            for plan, members in zip(self.plans, self.arrangement.members, strict=True)
        ]
        return [flag for flag in flags if flag is not None]


def _pick(bound: Bounds, members: list[int]) -> Bounds:
    return [bound[i] for i in members] if isinstance(bound, Sequence) else bound


class _Kept(threading.local):
    """What was prepared, to be looked up by where it is or by what it is like; the oldest come first."""

    def __init__(self) -> None:
        self.by_place: OrderedDict[_Key, Prepared] = OrderedDict()
        self.by_sketch: dict[_Key, Prepared] = {}  # the last one of each
        self.gradients = 0

    def add(self, place: _Key, sketch: _Key, prepared: Prepared) -> None:
        self._discard(place)
        self.by_place[place] = self.by_sketch[sketch] = prepared
        self.gradients += max(prepared.arrangement.count, _LEAST)
        while self.gradients > _KEPT and len(self.by_place) > 1:
            self._discard(next(iter(self.by_place)))

    def _discard(self, place: _Key) -> None:
        prepared = self.by_place.pop(place, None)
        if prepared:
            self.gradients -= max(prepared.arrangement.count, _LEAST)
            for sketch in [sketch for sketch, last in self.by_sketch.items() if last is prepared]:
                del self.by_sketch[sketch]


_kept = _Kept()


def prepare(grads: Gradients, *, in_place: bool) -> Prepared:
    """Group gradients into plans, or find the plans of an earlier call that had the same.

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
    addresses = _addresses(grads)
    if addresses is None:
        return _prepared_anew(grads, None, in_place=in_place)
    settings = (len(tensors), in_place, os.environ.get(ENVIRONMENT_VARIABLE))
    place = (addresses[0], addresses[-1], *settings)
    kept = _kept.by_place.get(place)
    is_there = kept is not None and kept.addresses == addresses and _fits(kept, tensors)
    if is_capturing(tensors[0].device):
        return _captured(kept if is_there else None)
    if kept is not None and is_there and _streams_are_current(kept):
        return kept
    sketch = (tensors[0].numel(), tensors[0].dtype, tensors[-1].numel(), *settings)
    alike = _kept.by_sketch.get(sketch)
    prepared = None
    if alike is not None and _fits(alike, tensors) and _streams_are_current(alike):
        prepared = _moved(alike, addresses)
    if prepared is None:
        prepared = _prepared_anew(grads, addresses, in_place=in_place)
    if prepared.addresses is not None:
        _kept.add(place, sketch, prepared)
    return prepared


def _addresses(grads: Gradients) -> list[int] | None:
    """The gradients' addresses, or None where one is not of torch's own two classes or has no address."""
    if not grads.kinds <= _PLAIN_TYPES:
        return None
    try:
        return list(map(Tensor.data_ptr, grads.tensors))
    except RuntimeError:  # a sparse tensor, or one inside of a function transform
        return None


def _fits(kept: Prepared, tensors: Sequence[Tensor]) -> bool:
    """Whether tensors, as many, differ in their addresses only from those that something was prepared for."""
    return kept.arrangement.fits is not None and kept.arrangement.fits(*tensors)


def _guards(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """What tells whether as many other tensors are like these: in all that torch knows of them, but for their memory.

    `torch.compile` looks at its inputs so: 40 ns a tensor, where a look by Python at each attribute takes 500. Types,
    dtypes, devices, sizes and strides are compared, and the dispatch keys, which tell sparse, negated, inference and
    other tensors apart; no tensor may be there twice.
    """
    if TensorGuards is None:
        return None
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
    prepared = replace(kept, plans=[plan.captured() for plan in kept.plans])
    _captures.append(prepared)
    return prepared


def _moved(kept: Prepared, addresses: list[int]) -> Prepared | None:
    """Take over what was prepared for gradients like these elsewhere, or None where these would not be served alike.

    Those were plain gradients only; what their likeness does not tell of it is looked at again, for all at once.
    """
    arrangement = kept.arrangement
    starts = np.array(addresses)
    if not arrangement.may_be_at(starts):
        return None
    plans = [plan.moved(starts[members]) for plan, members in zip(kept.plans, arrangement.members, strict=True)]
    return Prepared(plans, arrangement, kept.streams, addresses, [])


def _prepared_anew(grads: Gradients, addresses: list[int] | None, *, in_place: bool) -> Prepared:
    """Check and group gradients; `addresses` are None where they cannot be told, and nothing may be kept."""
    check_dtypes(grads)
    if in_place:
        check_writable(grads)
    tensors = grads.tensors
    values = [_values(t, in_place=in_place) if t.layout is torch.sparse_coo else t for t in tensors]
    groups = _group(values)
    devices = {device for _, device in groups if device.type == "cuda"}
    streams = tuple((device, stream_of(device)) for device in devices)
    plans = [backend.plan([values[i] for i in members]) for (backend, _), members in groups.items()]
    # torch's plans hold the tensors themselves: kept, they would keep the gradients' memory alive.
    keep = addresses is not None and all(backend is not TORCH for backend, _ in groups)
    fits = _guards(tensors) if keep else None
    arrangement = Arrangement(tensors, list(groups.values()), fits)
    return Prepared(plans, arrangement, streams, addresses if fits else None, values if addresses is None else [])


def _streams_are_current(prepared: Prepared) -> bool:
    return not prepared.streams or all(stream_of(device) == stream for device, stream in prepared.streams)


def promoted(dtypes: set[torch.dtype]) -> torch.dtype:
    """The dtype that holds all of at least one."""
    return reduce(torch.promote_types, dtypes)


def _group(values: Sequence[Tensor]) -> dict[tuple[Backend, torch.device], list[int]]:
    """The positions of the tensors that each backend serves on each device."""
    groups: dict[tuple[Backend, torch.device], list[int]] = {}
    plain: dict[torch.device, list[int]] = {}
    for position, tensor in enumerate(values):
        if tensor.numel() == 0:
            continue
        if _is_plain(tensor):
            plain.setdefault(tensor.device, []).append(position)
        else:
            groups.setdefault((TORCH, tensor.device), []).append(position)
    for device, members in plain.items():
        backend = for_device(device)
        tensors = [values[position] for position in members]
        starts = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
        overlapping = _overlapping(starts, np.array([tensor.nbytes for tensor in tensors]))
        for i, position in enumerate(members):
            groups.setdefault((TORCH if i in overlapping else backend, device), []).append(position)
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
        type(grad) in _PLAIN_TYPES
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


def _overlapping(starts: Int64s, sizes: Int64s) -> set[int]:
    """Positions of the tensors, of nonzero sizes in bytes, whose memory begins within that of another one."""
    order = starts.argsort(kind="stable")  # which is quick where they are nearly in order
    ends = np.maximum.accumulate((starts + sizes)[order])
    return set(order[1:][starts[order][1:] < ends[:-1]].tolist())
