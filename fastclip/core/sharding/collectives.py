r"""Norms of parts, which several processes have, added up to the norm of the whole by one all-reduce.

An all-reduce adds numbers up or takes the largest or least. A p-norm goes through it as a power,

.. math:: \|x\|_p = \Big(\sum_r \|x_r\|_p^p\Big)^{1/p},

in fp64, in which the squares of norms of narrower types neither overflow nor underflow. Those of fp64 gradients may,
and so may other powers: these go in several bins of magnitude, each scaled by a power of two that keeps its sum in the
middle of fp64's range. The largest and the least norm go as the integers that their bits are, in which a NaN is larger
than all numbers, or less: a floating-point maximum may pass over it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.foundation.arithmetic import stable_norm
from fastclip.foundation.tracing import is_watched, kept

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_REACH = 900  # the exponents of two between which a bin's powers lie: 2**123 of them can be added up
_LEAST, _MOST = -1074, 1056  # exponents of the least and the largest norm, were it of 2**64 elements


class Code(NamedTuple):
    """How norms travel through an all-reduce.

    Attributes:
        operation: What the all-reduce does.
        neutral: The norm of a part without elements.
        encode: From norms, [n], to what is reduced, [n, ...].
        decode: Back to norms, [n].
    """

    operation: dist.ReduceOp.RedOpType
    neutral: float
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


@lru_cache
def code_of(p: float, *, narrow: bool) -> Code:
    """How p-norms (p ≠ 0), in fp64, travel.

    Args:
        p: The order.
        narrow: Whether they are norms of gradients narrower than fp64.
    """
    if p == math.inf:
        return Code(dist.ReduceOp.MAX, 0.0, _bits, lambda bits: bits.view(torch.float64))
    if p == -math.inf:
        return Code(dist.ReduceOp.MIN, math.inf, _bits_with_nan_least, lambda bits: bits.view(torch.float64))
    neutral = 0.0 if p > 0 else math.inf
    if narrow and p in (1.0, 2.0):
        return Code(dist.ReduceOp.SUM, neutral, lambda norms: norms.pow(p), lambda sums: sums.pow(1 / p))
    return Code(dist.ReduceOp.SUM, neutral, lambda norms: _binned(norms, p), lambda sums: _unbinned(sums, p))


def _bits(norms: Tensor) -> Tensor:
    return norms.abs().view(torch.int64)  # without sign: of positive numbers, the larger has the larger bits


def _bits_with_nan_least(norms: Tensor) -> Tensor:
    return torch.where(norms.isnan(), -1, _bits(norms))  # the bits of -1 are a NaN's too


def _binned(norms: Tensor, p: float) -> Tensor:
    """The p-th powers of norms, [n, bins], each in its bin, in units of the p-th power of the bin's centre."""
    width, numbers, roots = _bins(p, norms.device)
    bins = (norms.log2() / width).round().clamp(numbers[0], numbers[-1]).unsqueeze(1)
    powers = (norms.unsqueeze(1) / roots / roots).pow(p)
    return torch.where((bins - numbers).abs() > 0, 0.0, powers)  # a NaN is in every bin


def _unbinned(sums: Tensor, p: float) -> Tensor:
    roots = _bins(p, sums.device)[2]
    return stable_norm(sums.pow(1 / p) * roots * roots, p, 1)


@kept(128)
def _bins(p: float, device: torch.device) -> tuple[float, Tensor, Tensor]:
    """The bins' width, an exponent of two, their numbers, [bins], and the square roots of their centres, [bins].

    Roots, because a centre itself may be beyond fp64.
    """
    width = 2 * _REACH / abs(p)
    least, most = round(_LEAST / width), round(_MOST / width)
    numbers = torch.arange(least, most + 1, dtype=torch.float64)
    return width, numbers.to(device), (numbers * (width / 2)).exp2().to(device)


class Share(NamedTuple):
    """Over what a part is to be reduced.

    Attributes:
        mesh: The mesh whose processes have the other parts.
        dims: The dimensions of it over which they lie, those of one process left out.
    """

    mesh: DeviceMesh
    dims: tuple[int, ...]


def all_reduce(parts: Sequence[Tensor], shares: Sequence[Share], operation: dist.ReduceOp.RedOpType) -> list[Tensor]:
    """Reduce each part over its share of the processes: one all-reduce for each process group, in a fixed order.

    Args:
        parts: Each [n] or [n, k] with the same k, of any device, n the same on every process of the share; they may be
            overwritten.
        shares: Over what each is reduced.
        operation: What is done.
    """
    reduced = list(parts)
    rounds: dict[str, tuple[dist.ProcessGroup, DeviceMesh, list[int]]] = {}
    for i, share in enumerate(shares):
        for group in groups_of(share):
            rounds.setdefault(group.group_name, (group, share.mesh, []))[2].append(i)
    for group, mesh, members in rounds.values():
        pieces = [reduced[i] for i in members]
        # To the mesh's kind of device, to which its groups' backend belongs: gradients may be offloaded to the CPU.
        on_mesh = [piece.to(mesh.device_type) for piece in pieces]
        buffer = on_mesh[0] if len(pieces) == 1 else torch.cat(on_mesh)
        buffer = all_reduced(buffer, operation, group)
        wholes = [buffer] if len(pieces) == 1 else torch.split(buffer, [len(piece) for piece in pieces])
        for i, piece, whole in zip(members, pieces, wholes, strict=True):
            reduced[i] = whole.to(piece.device)
    return reduced


def all_reduced(tensor: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> Tensor:
    """Reduce a tensor over a process group; it may be overwritten.

    While anyone looks at torch's operations it is a functional collective, as those of DTensors are, so that it is
    counted and recorded with them (`CommDebugMode`, make_fx). Else not, for that takes three times as long (gloo, 8
    bytes: 58 µs, and 190).
    """
    if is_watched():
        from torch.distributed import _functional_collectives as functional

        pending = functional.all_reduce(tensor, operation.name.lower(), group)
        reduced: Tensor = functional.wait_tensor(pending)  # type: ignore[no-untyped-call]
        return reduced
    dist.all_reduce(tensor, operation, group)
    return tensor


def groups_of(share: Share) -> Iterable[dist.ProcessGroup]:
    """The process groups that reach all of a share: a single one, if there is one, or one for each dimension.

    None is made: that would be a collective of its own, and costs memory on a GPU.
    """
    mesh, dims = share
    if len(dims) > 1:
        world = dist.group.WORLD
        if world is not None and math.prod(mesh.size(dim) for dim in dims) == mesh.size() == world.size():
            return [world]
        flattened = _flattened(mesh, dims)
        if flattened is not None:
            return [flattened.get_group()]
    return [mesh.get_group(dim) for dim in dims]


def _flattened(mesh: DeviceMesh, dims: tuple[int, ...]) -> DeviceMesh | None:
    """The flattened mesh that somebody made of these dimensions, as DTensors themselves find it: torch's own affair."""
    from torch.distributed.tensor import _redistribute

    find: Callable[[DeviceMesh, tuple[int, ...]], DeviceMesh | None] | None
    find = getattr(_redistribute, "_get_flattened_mesh_by_layout", None)
    return None if find is None else find(mesh, dims)
