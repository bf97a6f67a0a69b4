"""Gradients, grouped by the backend that serves them and made ready: prepared once, and kept while they stay put.

    Gradients --prepare--> Prepared: [Plan, Plan, ...]

A gradient is *plain* when it fills its memory without gaps or overlaps and holds real floating-point numbers: then it
is an address and a number of elements, which is all that the Triton and NumPy backends need. Everything else (complex,
strided views, tensor subclasses, meta tensors) is left to torch's own operations; a sparse gradient takes part by its
values. Whatever the mixture, one norm is taken over all of it.

Training clips the same gradients again and again, so what was prepared is kept, together with a *fingerprint* of what
it rests on: address, size, dtype and strides of every gradient, and the settings. It is taken anew on every call, and
nothing is reused unless all of it is as it was: `zero_grad(set_to_none=True)`, for one, moves gradients.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastclip.backends import ENVIRONMENT_VARIABLE, TORCH, Backend, for_device
from fastclip.backends.interface import (
    Bounds,
    Plan,
    Reduction,
    Scalar,
    combine,
    on,
    reduction,
    upload,
    wide_dtype,
)
from fastclip.gradients import Gradients, check_dtypes, check_writable


class Fingerprint(NamedTuple):
    """All that plans rest on; two that are equal may share plans."""

    addresses: list[int]
    numels: list[int]
    dtypes: list[torch.dtype]
    contiguous: list[bool]
    strides: list[tuple[int, ...]]
    device: torch.device
    settings: tuple[object, ...]


_PLAIN_TYPES = {Tensor, nn.Parameter}
_PLAIN_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
_KEPT = 65_536  # gradients, a thread: a few large models that are trained in turns, or each parameter by itself


@dataclass(frozen=True)
class Prepared:
    """Gradients made ready to be clipped together: what the plans do, done to all of them.

    Attributes:
        plans: One for each backend and device, in the order of their first members; none if no gradient has elements.
        members: The positions, among the gradients, of each plan's members.
        count: The number of gradients.
        device: The first gradient's.
        dtype: The gradients' own, real and promoted where they differ: that of torch's norm.
        streams: The current stream of each GPU, for which the plans were made.
        fingerprint: What all this rests on, or None where that cannot be told and it must not be used again.
        temporaries: Among others the coalesced values of sparse gradients, of which plans know but the addresses.
    """

    plans: list[Plan]
    members: list[list[int]]
    count: int
    device: torch.device
    dtype: torch.dtype
    streams: tuple[tuple[torch.device, int], ...]
    fingerprint: Fingerprint | None
    temporaries: list[Tensor]

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype) -> Reduction:
        """Reduce all plans to one norm, on the first gradient's device."""
        if self._is_one_plan:
            return self.plans[0].reduce(p, max_norm, dtype)
        totals = [on(self.device, plan.reduce(p, max_norm, dtype).total) for plan in self.plans]
        return reduction(combine(totals or [on(self.device, 0.0)], p), max_norm, dtype)

    def norms(self) -> Tensor:
        """Return the 2-norm of each gradient, [count], on the first gradient's device."""
        if self._is_in_order:
            return on(self.device, self.plans[0].norms())
        norms = torch.zeros(self.count, dtype=wide_dtype(self.device), device=self.device)
        for plan, positions in zip(self.plans, self._positions, strict=True):
            norms[positions] = on(self.device, plan.norms())
        return norms

    def scale_(self, grads: Gradients, coefficient: Scalar) -> None:
        """Multiply the gradients that this was prepared from by one coefficient, or by one each."""
        # Raw writes do not bump the version counters by which autograd knows that a saved tensor was changed.
        torch.autograd.graph.increment_version(grads.tensors)
        if not isinstance(coefficient, Tensor) or coefficient.dim() == 0 or self._is_in_order:
            for plan in self.plans:
                plan.scale_(coefficient)
            return
        for plan, positions in zip(self.plans, self._positions, strict=True):
            plan.scale_(coefficient[positions])

    def clamp_(self, grads: Gradients, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> list[Tensor]:
        """Clamp the gradients that this was prepared from. Return flags if `watch`, as a plan does."""
        torch.autograd.graph.increment_version(grads.tensors)
        flags = [
            plan.clamp_(_pick(minimum, members), _pick(maximum, members), watch=watch)
            for plan, members in zip(self.plans, self.members, strict=True)
        ]
        return [flag for flag in flags if flag is not None]

    @property
    def _is_one_plan(self) -> bool:
        return len(self.plans) == 1 and self.plans[0].device == self.device

    @cached_property
    def _is_in_order(self) -> bool:
        """Whether one plan has all gradients, in their order."""
        return self.members == [list(range(self.count))]

    @cached_property
    def _positions(self) -> list[Tensor]:
        return [upload(np.array(members), self.device) for members in self.members]


def _pick(bound: Bounds, members: list[int]) -> Bounds:
    return [bound[i] for i in members] if isinstance(bound, Sequence) else bound


class _Kept(threading.local):
    """What was prepared last, by the first gradient's address and the number of gradients; the oldest come first."""

    def __init__(self) -> None:
        self.by_start: OrderedDict[tuple[int, int], Prepared] = OrderedDict()
        self.gradients = 0

    def add(self, start: tuple[int, int], prepared: Prepared) -> None:
        self.discard(start)
        self.by_start[start] = prepared
        self.gradients += start[1]
        while self.gradients > _KEPT and len(self.by_start) > 1:
            self.discard(next(iter(self.by_start)))

    def discard(self, start: tuple[int, int]) -> None:
        if self.by_start.pop(start, None):
            self.gradients -= start[1]


_kept = _Kept()


def prepare(grads: Gradients, *, in_place: bool) -> Prepared:
    """Group gradients into plans, or find the plans of the last call that had the same.

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
    fingerprint = _fingerprint(grads.tensors, in_place=in_place)
    start = (fingerprint.addresses[0], len(grads.tensors)) if fingerprint else (0, 0)
    kept = _kept.by_start.get(start)
    if kept and kept.fingerprint == fingerprint and _streams_are_current(kept):
        return kept
    check_dtypes(grads)
    if in_place:
        check_writable(grads)
    prepared = _prepare(grads.tensors, fingerprint, in_place=in_place)
    if prepared.fingerprint:
        _kept.add(start, prepared)
    return prepared


def _fingerprint(tensors: list[Tensor], *, in_place: bool) -> Fingerprint | None:
    """Take the fingerprint, or None where a tensor is not of torch's own two classes or has no address."""
    if not _PLAIN_TYPES.issuperset(map(type, tensors)):
        return None
    try:
        addresses = list(map(Tensor.data_ptr, tensors))
    except RuntimeError:  # a sparse tensor, or one inside of a function transform
        return None
    numels = list(map(Tensor.numel, tensors))
    dtypes = [tensor.dtype for tensor in tensors]
    contiguous = list(map(Tensor.is_contiguous, tensors))
    strides = [t.stride() for t, whole in zip(tensors, contiguous, strict=True) if not whole]
    inference = (torch.is_inference_mode_enabled(), any(map(Tensor.is_inference, tensors)))
    settings = (in_place, inference, os.environ.get(ENVIRONMENT_VARIABLE))
    return Fingerprint(addresses, numels, dtypes, contiguous, strides, tensors[0].device, settings)


def _prepare(tensors: list[Tensor], fingerprint: Fingerprint | None, *, in_place: bool) -> Prepared:
    values = [_values(t, in_place=in_place) if t.layout is torch.sparse_coo else t for t in tensors]
    groups = _group(values)
    dtype = _promoted({tensor.dtype.to_real() for tensor in tensors})
    devices = {device for _, device in groups if device.type == "cuda"}
    streams = tuple((device, torch.cuda.current_stream(device).cuda_stream) for device in devices)
    # torch's plans hold the tensors themselves: kept, they would keep the gradients' memory alive.
    keep = all(backend is not TORCH for backend, _ in groups)
    plans = [backend.plan([values[i] for i in members]) for (backend, _), members in groups.items()]
    return Prepared(
        plans,
        list(groups.values()),
        len(tensors),
        tensors[0].device,
        dtype,
        streams,
        fingerprint if keep else None,
        [] if fingerprint else values,
    )


def _streams_are_current(prepared: Prepared) -> bool:
    return all(torch.cuda.current_stream(device).cuda_stream == stream for device, stream in prepared.streams)


def _promoted(dtypes: set[torch.dtype]) -> torch.dtype:
    promoted = dtypes.pop()
    for dtype in dtypes:
        promoted = torch.promote_types(promoted, dtype)
    return promoted


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
        overlapping = _overlapping([values[position] for position in members])
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


def _overlapping(tensors: Sequence[Tensor]) -> set[int]:
    """Positions of the tensors whose memory begins within that of another one."""
    starts = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    sizes = np.fromiter((tensor.numel() * tensor.element_size() for tensor in tensors), np.int64, len(tensors))
    order = np.argsort(starts, kind="stable")
    ends = np.maximum.accumulate((starts + sizes)[order])
    return set(order[1:][starts[order][1:] < ends[:-1]].tolist())
