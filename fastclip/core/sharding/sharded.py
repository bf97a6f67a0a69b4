"""Gradients with shards in several processes, ready to be clipped by all of them together.

The shards of a process are gradients like any others: this process reduces them by plans, and one all-reduce for each
process group makes its norms those of whole gradients. Scaling and clamping are local.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import chain
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.backends.coefficient import clip_coefficient, reduction
from fastclip.backends.interface import Bounds, Reduction
from fastclip.core.dtensors import dtensor_type, local_parts
from fastclip.core.gradients import Gradients, at, of_one_process
from fastclip.core.planned import Planned
from fastclip.core.prepared import Prepared
from fastclip.core.sharding.collectives import all_reduce, all_reduced, code_of, groups_of
from fastclip.core.sharding.layout import is_tensor, layout_of
from fastclip.foundation.arithmetic import combine
from fastclip.foundation.devices import Scalar, index_of, on, wide_dtype
from fastclip.foundation.tracing import is_traced


class _Prepare(Protocol):
    def __call__(self, grads: Gradients, *, in_place: bool) -> Prepared: ...


class Sharded(Prepared):
    """Gradients ready to be clipped, some of which are DTensors.

    Every process has to make the same calls, for the same parameters.

    Args:
        grads: The gradients.
        prepare: Makes the shards of this process ready: `fastclip.core.prepare.prepare`, which is above this module.
        in_place: Whether they will be written.

    Attributes:
        device: The first gradient's; the first parameter's if this process has no gradient.
        dtype: See `Prepared`.
    """

    def __init__(self, grads: Gradients, prepare: _Prepare, *, in_place: bool) -> None:
        self._grads = grads
        self._plan = cast("Callable[..., Planned]", prepare)  # which is what it returns for a process's own tensors
        self._parts = local_parts(grads)
        self._layout = layout_of(grads)
        self.dtype = self._layout.dtype
        self.device = next(chain(grads.tensors, filter(is_tensor, grads.owners.tensors))).device
        # Before the first collective: a process that raises here alone would leave the others waiting, and what is
        # refused here is most likely refused by all.
        self._all = self._plan(self._parts, in_place=in_place) if grads.tensors else None

    @property
    def devices(self) -> set[torch.device]:
        return {self.device} if self._all is None else self._all.devices

    def returned(self, norm: Tensor) -> Tensor:
        """A DTensor that is replicated over the mesh, if all gradients are on one."""
        spec, dtensor = self._layout.spec(norm), dtensor_type()
        if spec is None or dtensor is None:
            return norm
        return dtensor(norm, spec, requires_grad=False)  # `DTensor.from_local` takes 70 µs, 25 times as long

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype) -> Reduction:
        """Reduce all shards of all processes to one norm.

        For p = 0 vectors of norms go through the all-reduce: a gradient counts once if any shard has a nonzero element.
        """
        if p == 0:
            total = self.norms().count_nonzero().to(wide_dtype(self.device))
        else:
            code = code_of(p, narrow=self._layout.is_narrow)
            encoded = [
                code.encode(on(self.device, _norm(counted, p, code.neutral)).reshape(1)) for counted in self._counted()
            ]
            sums = all_reduce(encoded, self._layout.shares, code.operation)
            wholes = [code.decode(whole).reshape(()) for whole in sums]
            total = wholes[0] if len(wholes) == 1 else combine(wholes, p)
        if self.device.type == "cpu" and not is_traced():  # where numbers are faster than tensors
            number = total.item()
            return Reduction(total.to(dtype), number, clip_coefficient(number, max_norm))
        return reduction(total, max_norm, dtype)

    def norms(self) -> Tensor:
        """The 2-norm of each parameter's gradient, [owners], 0 if no process has one."""
        code = code_of(2.0, narrow=self._layout.is_narrow)
        vectors = []
        for part, counted in zip(self._layout.parts, self._counted(), strict=True):
            norms = torch.zeros(len(part.members), dtype=wide_dtype(self.device), device=self.device)
            if counted is not None:
                norms.index_copy_(0, index_of(part.places, self.device), on(self.device, counted.norms()))
            vectors.append(code.encode(norms))
        wholes = [code.decode(sums) for sums in all_reduce(vectors, self._layout.shares, code.operation)]
        owners = len(self._grads.owners.tensors)
        if len(wholes) == 1 and len(wholes[0]) == owners:
            return wholes[0]
        order = [position for part in self._layout.parts for position in part.members]
        norms = torch.zeros(owners, dtype=wide_dtype(self.device), device=self.device)
        return norms.index_copy_(0, index_of(order, self.device), torch.cat(wholes))

    def scale_(self, grads: Gradients, coefficient: Scalar) -> None:
        if self._all is not None:
            torch.autograd.graph.increment_version(grads.tensors)  # the shards' versions are `Planned`'s affair
            self._all.scale_(self._parts, coefficient)

    def clamp_(self, grads: Gradients, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> list[Tensor]:
        """Clamp the shards of this process. The flags tell of all processes.

        Raises:
            RuntimeError: A gradient has a pending sum.
        """
        if self._layout.addends:
            label = grads.label(self._layout.addends[0].members[0])
            raise RuntimeError(
                f"{label} is a sum yet to be made (a DTensor with a Partial placement), and to clamp its addends would "
                "not clamp it: put its sum in its place before, parameter.grad = parameter.grad.redistribute(...)"
            )
        flags = []
        if self._all is not None:
            torch.autograd.graph.increment_version(grads.tensors)
            flags = self._all.clamp_(self._parts, minimum, maximum, watch=watch)
        return self.flags_of_all(flags) if watch else []

    def flags_of_all(self, flags: Sequence[Tensor]) -> list[Tensor]:
        changed = torch.zeros(1, dtype=torch.int64, device=self.device)
        for flag in flags:
            changed |= flag.any().to(self.device)
        shares = self._layout.shares
        return [whole > 0 for whole in all_reduce([changed] * len(shares), shares, dist.ReduceOp.MAX)]

    def _counted(self) -> list[Planned | None]:
        """What this process counts of each part of the layout; None if it counts nothing of it."""
        parts = self._summed if self._layout.addends else self._parts
        return [
            self._all
            if parts is self._parts and len(part.counted) == len(parts.tensors)
            else self._prepare_some(parts, part.counted)
            for part in self._layout.parts
        ]

    def _prepare_some(self, grads: Gradients, chosen: Sequence[int]) -> Planned | None:
        return self._plan(at(grads, chosen), in_place=False) if chosen else None

    @cached_property
    def _summed(self) -> Gradients:
        """The shards, with sums in the place of addends. Plans know their addresses only, so they are cached here."""
        parts = self._parts
        tensors = list(parts.tensors)
        for addends in self._layout.addends:
            mine = [tensors[i] for i in addends.members]
            sums = torch.cat([tensor.reshape(-1) for tensor in mine]).to(addends.share.mesh.device_type)
            for group in groups_of(addends.share):
                sums = all_reduced(sums, dist.ReduceOp.SUM, group)
            sums = sums.div_(addends.divisor).to(mine[0].device)
            for i, whole in zip(addends.members, torch.split(sums, [tensor.numel() for tensor in mine]), strict=True):
                tensors[i] = whole
        return of_one_process(tensors, set(map(type, tensors)), parts.owners, parts.positions, parts.argument)


def _norm(counted: Planned | None, p: float, neutral: float) -> Scalar:
    if counted is None or not counted.plans:  # no element
        return neutral
    return counted.reduce(p, math.inf, torch.float64).total
