r"""From the norms of shards to the norm of the whole, by one all-reduce.

An all-reduce takes a sum, a maximum or a minimum. A p-norm goes through it as a power,

.. math:: \|x\|_p = \Big(\sum_r \|x_r\|_p^p\Big)^{1/p},

in fp64. There the squares of norms of narrower dtypes neither overflow nor underflow. The squares of fp64 norms may,
and so may other powers: these are sorted into several bins of magnitude, each scaled by a power of two that keeps its
sum in the middle of fp64's range. For the maximum and the minimum, norms go as the integers that have their bits: a
floating-point maximum may ignore a NaN, but as an integer a NaN is larger than all numbers, or smaller.
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
from fastclip.foundation.tracing import cached_tensors, is_watched

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_REACH = 900  # powers in a bin lie between 2**-900 and 2**900, so 2**123 of them can be added
_LEAST, _MOST = -1074, 1056  # exponents of the smallest norm, and of the largest norm of 2**64 elements


class Code(NamedTuple):
    """How norms are encoded for an all-reduce.

    Attributes:
        operation: The operation of the all-reduce.
        neutral: The norm of a shard without elements.
        encode: From norms, [n], to the tensor that is reduced, [n, ...].
        decode: From the reduced tensor to norms, [n].
    """

    operation: dist.ReduceOp.RedOpType
    neutral: float
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


@lru_cache
def code_of(p: float, *, narrow: bool) -> Code:
    """The code for p-norms in fp64.

    Args:
        p: The order, not 0.
        narrow: Whether the gradients are narrower than fp64.
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
    return norms.abs().view(torch.int64)  # without sign: the larger of two positive numbers has the larger bits


def _bits_with_nan_least(norms: Tensor) -> Tensor:
    return torch.where(norms.isnan(), -1, _bits(norms))  # the bits of -1 are also those of a NaN


def _binned(norms: Tensor, p: float) -> Tensor:
    """The p-th powers of norms, [n, bins]: each in its bin, divided by the p-th power of the bin's centre."""
    width, numbers, roots = _bins(p, norms.device)
    bins = (norms.log2() / width).round().clamp(numbers[0], numbers[-1]).unsqueeze(1)
    powers = (norms.unsqueeze(1) / roots / roots).pow(p)
    return torch.where((bins - numbers).abs() > 0, 0.0, powers)  # a NaN is in every bin


def _unbinned(sums: Tensor, p: float) -> Tensor:
    roots = _bins(p, sums.device)[2]
    return stable_norm(sums.pow(1 / p) * roots * roots, p, 1)


@cached_tensors(128)
def _bins(p: float, device: torch.device) -> tuple[float, Tensor, Tensor]:
    """The width of a bin in powers of two, the bins' numbers, [bins], and the square roots of their centres, [bins].

    Square roots, because a centre itself may exceed fp64.
    """
    width = 2 * _REACH / abs(p)
    least, most = round(_LEAST / width), round(_MOST / width)
    numbers = torch.arange(least, most + 1, dtype=torch.float64)
    return width, numbers.to(device), (numbers * (width / 2)).exp2().to(device)


class Share(NamedTuple):
    """The processes that something is reduced over.

    Attributes:
        mesh: Their mesh.
        dims: The dimensions of the mesh to reduce over, without those of size 1.
    """

    mesh: DeviceMesh
    dims: tuple[int, ...]


def all_reduce(parts: Sequence[Tensor], shares: Sequence[Share], operation: dist.ReduceOp.RedOpType) -> list[Tensor]:
    """Reduce each part over its processes: one all-reduce for each process group, in a fixed order.

    Args:
        parts: Each [n] or [n, k] with the same k, on any device. All processes of a share have the same n. They may be
            overwritten.
        shares: The processes of each part.
        operation: The operation of the all-reduce.
    """
    reduced = list(parts)
    rounds: dict[str, tuple[dist.ProcessGroup, DeviceMesh, list[int]]] = {}
    for i, share in enumerate(shares):
        for group in groups_of(share):
            rounds.setdefault(group.group_name, (group, share.mesh, []))[2].append(i)
    for group, mesh, members in rounds.values():
        pieces = [reduced[i] for i in members]
        # The process groups' backend works on the mesh's type of device. Gradients may be offloaded to the CPU.
        on_mesh = [piece.to(mesh.device_type) for piece in pieces]
        buffer = on_mesh[0] if len(pieces) == 1 else torch.cat(on_mesh)
        buffer = all_reduced(buffer, operation, group)
        wholes = [buffer] if len(pieces) == 1 else torch.split(buffer, [len(piece) for piece in pieces])
        for i, piece, whole in zip(members, pieces, wholes, strict=True):
            reduced[i] = whole.to(piece.device)
    return reduced


def all_reduced(tensor: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> Tensor:
    """Reduce a tensor over a process group; the tensor may be overwritten.

    While a mode sees torch's operations (`CommDebugMode`, make_fx) this is a functional collective, as DTensors use, so
    that the mode counts or records it. Otherwise it is not: that takes three times as long (gloo, 8 bytes: 190 µs, not
    58).
    """
    if is_watched():
        from torch.distributed import _functional_collectives as functional

        pending = functional.all_reduce(tensor, operation.name.lower(), group)
        reduced: Tensor = functional.wait_tensor(pending)  # type: ignore[no-untyped-call]
        return reduced
    dist.all_reduce(tensor, operation, group)
    return tensor


def groups_of(share: Share) -> Iterable[dist.ProcessGroup]:
    """The process groups that cover a share: one group if one exists, else one for each dimension.

    No new group is made: that would be a collective by itself, and would cost memory on a GPU.
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
    """The flattened mesh of these dimensions, if one was made before. DTensors find it by the same private function."""
    from torch.distributed.tensor import _redistribute

    find: Callable[[DeviceMesh, tuple[int, ...]], DeviceMesh | None] | None
    find = getattr(_redistribute, "_get_flattened_mesh_by_layout", None)
    return None if find is None else find(mesh, dims)
