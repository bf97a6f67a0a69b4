"""Gradients of one process, ready to be clipped: in one plan for each backend and device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastclip.backends import Backend
from fastclip.backends.coefficient import reduction
from fastclip.backends.interface import Bounds, Plan, Reduction, Unscaling
from fastclip.core.gradients import Gradients
from fastclip.core.prepared import Prepared
from fastclip.foundation.arithmetic import combine
from fastclip.foundation.devices import Scalar, on, stream_of, upload, wide_dtype

# Kernels write to memory directly, which does not bump the version counters that tell autograd that a saved tensor has
# changed. The public function is a Python wrapper around this one.
_increment_version: Any = getattr(torch._C, "_increment_version", torch.autograd.graph.increment_version)


class Dispatch:
    """Which backend's plan each gradient is in. It does not depend on the gradients' addresses.

    Attributes:
        members: For each plan, the indices of its gradients.
        count: The number of gradients.
        is_in_order: Whether a single plan has all gradients, in their order.
        is_alone: Whether there is a single plan, on the first gradient's device.
        device: The first gradient's device.
        dtype: The gradients' own dtype, real, promoted if they differ.
        is_by_address: Whether the plans can be reused for gradients at other addresses; see `Backend.by_address`.
        may_be_captured: Whether a CUDA graph may be capturing a plan's launches; see `Backend.launches`.
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
        self.may_be_captured = any(backend.launches for backend, _ in groups)
        self.streams = {device: stream_of(device) for _, device in groups if device.type == "cuda"}

    @cached_property
    def positions(self) -> list[Tensor]:
        """`members` on the first gradient's device."""
        return [upload(np.array(members), self.device) for members in self.members]

    def is_for_the_current_streams(self) -> bool:
        """Whether the streams that the plans were made for are the current ones."""
        return all(stream_of(device) == stream for device, stream in self.streams.items())


def promoted(dtypes: set[torch.dtype]) -> torch.dtype:
    """The dtype that holds the values of all dtypes, at least one."""
    return reduce(torch.promote_types, dtypes)


class Planned(Prepared):
    """Gradients of this process, in one plan for each backend and device.

    Attributes:
        device, dtype: See `Prepared`.
        dispatch: Which plan each gradient is in.
        plans: The plans, in the order of `dispatch.members`; none if no gradient has elements.
    """

    __slots__ = ("_temporaries", "dispatch", "plans")

    def __init__(self, dispatch: Dispatch, plans: list[Plan], temporaries: Sequence[Tensor] = ()) -> None:
        self.device = dispatch.device
        self.dtype = dispatch.dtype
        self.dispatch = dispatch
        self.plans = plans
        self._temporaries = temporaries  # tensors that the plans know by address only, and that nobody else keeps alive

    @property
    def devices(self) -> set[torch.device]:
        return {self.device, *(plan.device for plan in self.plans)}

    def clip_(self, grads: Gradients, p: float, max_norm: float, dtype: torch.dtype) -> Tensor:
        if self.dispatch.is_alone:
            _increment_version(grads.tensors)
            return self.plans[0].clip_(p, max_norm, dtype)
        return super().clip_(grads, p, max_norm, dtype)

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
        if self.dispatch.is_alone:
            return self.plans[0].reduce(p, max_norm, dtype, unscaling)
        totals = [on(self.device, plan.reduce(p, max_norm, dtype).total) for plan in self.plans]
        return reduction(combine(totals or [on(self.device, 0.0)], p), max_norm, dtype, unscaling)

    def norms(self) -> Tensor:
        if self.dispatch.is_in_order:
            return on(self.device, self.plans[0].norms())
        norms = torch.zeros(self.dispatch.count, dtype=wide_dtype(self.device), device=self.device)
        for plan, positions in zip(self.plans, self.dispatch.positions, strict=True):
            norms[positions] = on(self.device, plan.norms())
        return norms

    def scale_(self, grads: Gradients, coefficient: Scalar) -> None:
        _increment_version(grads.tensors)
        if not isinstance(coefficient, Tensor) or coefficient.dim() == 0 or self.dispatch.is_in_order:
            for plan in self.plans:
                plan.scale_(coefficient)
            return
        for plan, positions in zip(self.plans, self.dispatch.positions, strict=True):
            plan.scale_(coefficient[positions])

    def clamp_(self, grads: Gradients, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> list[Tensor]:
        _increment_version(grads.tensors)
        flags = [
            plan.clamp_(_pick(minimum, members), _pick(maximum, members), watch=watch)
            for plan, members in zip(self.plans, self.dispatch.members, strict=True)
        ]
        return [flag for flag in flags if flag is not None]

    def moved(self, addresses: list[int]) -> Planned | None:
        """The same for gradients at other addresses; None if the plans cannot serve them there."""
        if self.dispatch.is_in_order:
            moved = [self.plans[0].moved(addresses)]
        else:
            pairs = zip(self.plans, self.dispatch.members, strict=True)
            moved = [plan.moved([addresses[i] for i in members]) for plan, members in pairs]
        if None in moved:
            return None
        return Planned(self.dispatch, moved)  # type: ignore[arg-type]  # `cast` would be a call

    def captured(self) -> Planned:
        """The same for a CUDA graph, which replays from memory that nothing else uses."""
        return Planned(self.dispatch, [plan.captured() for plan in self.plans])


def _pick(bound: Bounds, members: list[int]) -> Bounds:
    return [bound[i] for i in members] if isinstance(bound, Sequence) else bound
