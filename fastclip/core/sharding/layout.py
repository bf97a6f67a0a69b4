"""How gradients lie on their meshes: which process counts which, and what is reduced over what.

- A gradient that is sharded, evenly or not, is counted shard by shard: norms are reduced over the mesh dimensions on
  which any gradient is sharded.
- A replicated gradient is counted once, by the first process in each of these dimensions.
- A tensor that is not a DTensor counts as replicated over the first mesh.
- A gradient with a pending sum (`Partial`) is summed first, into a temporary: the norm of a sum is not the sum of
  norms. That moves as many bytes as these gradients have, in one all-reduce for all that are alike.

All of this follows from the parameters' meshes and placements, with or without gradients. It depends on nothing that
only one process knows, such as its cache or an empty shard. So all processes make the same collectives.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastclip.core.dtensors import dtensor_type
from fastclip.core.gradients import Gradients
from fastclip.core.planned import promoted
from fastclip.core.sharding.collectives import Share

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

_Kind: TypeAlias = "DTensorSpec | torch.dtype"
"""What a tensor's place follows from: the mesh and placements of a DTensor; only the dtype of any other tensor."""


class Part(NamedTuple):
    """The gradients that have shards or replicas on one mesh.

    Attributes:
        share: The mesh, and its dimensions over which norms are reduced.
        members: The indices of all parameters on it. The first part also has those that are not DTensors.
        counted: The gradients that this process counts, by their index among the gradients.
        places: The indices of their parameters among the members.
    """

    share: Share
    members: tuple[int, ...]
    counted: tuple[int, ...]
    places: tuple[int, ...]


class Addends(NamedTuple):
    """Gradients with a pending sum over the same processes, of one dtype.

    Attributes:
        share: The mesh, and its dimensions over which they are summed.
        divisor: What the sum is divided by: 1, or, for an average, the number of processes.
        members: Their indices among the gradients.
    """

    share: Share
    divisor: int
    members: tuple[int, ...]


class Layout:
    """How gradients lie on their meshes, seen from this process.

    Attributes:
        parts: One for each mesh that this process is in; if it is in none, one part without DTensors.
        addends: The gradients with a pending sum.
        dtype: The gradients' own dtype, real, promoted if they differ. A parameter without gradient here counts, too.
        is_narrow: Whether no gradient is fp64.
        shares: Over what the norm of each part is reduced.
    """

    def __init__(self, parts: Sequence[Part], addends: Sequence[Addends], dtypes: set[torch.dtype]) -> None:
        self.parts = parts
        self.addends = addends
        self.dtype = promoted({dtype.to_real() for dtype in dtypes})
        self.is_narrow = dtypes.isdisjoint({torch.float64, torch.complex128})
        self.shares = [part.share for part in parts]
        self._specs: dict[torch.dtype, DTensorSpec] = {}

    def spec(self, norm: Tensor) -> DTensorSpec | None:
        """The spec of a DTensor that replicates a norm over the mesh, if there is only one mesh."""
        if len(self.parts) == 1 and norm.dtype not in self._specs:
            from torch.distributed.tensor import Replicate
            from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

            mesh = self.shares[0].mesh
            meta = TensorMeta(norm.shape, norm.stride(), norm.dtype)
            self._specs[norm.dtype] = DTensorSpec(mesh, (Replicate(),) * mesh.ndim, meta)
        return self._specs.get(norm.dtype)


_layouts: OrderedDict[tuple[int, ...], tuple[tuple[object, ...], Layout]] = OrderedDict()
_CAPACITY = 256  # layouts: a few models, or each of many parameters by itself


def layout_of(grads: Gradients) -> Layout:
    """The layout of gradients; cached. A hit takes 30 ns a gradient if its spec is the same object as before.

    Raises:
        RuntimeError: As `_layout`.
    """
    owners, kinds = _kinds_of_owners(grads), _kinds(grads.tensors)
    # Equal meshes may belong to process groups that have ended: an entry must be of this very mesh.
    mesh = next(kind.mesh for kind in chain(owners, kinds) if not isinstance(kind, torch.dtype))
    key = (id(mesh), id(owners[0]), len(owners), len(kinds))
    # Stored in the entry, so that no other object gets their ids.
    inputs = (mesh, owners, kinds, tuple(grads.positions))
    entry = _layouts.get(key)
    if entry is not None and entry[0] == inputs:
        return entry[1]
    layout = _layout(owners, kinds, grads.positions)
    _layouts[key] = inputs, layout
    while len(_layouts) > _CAPACITY:
        _layouts.popitem(last=False)
    return layout


_spec = attrgetter("_spec")


def _kinds(tensors: Sequence[Tensor]) -> tuple[_Kind, ...]:
    try:
        return tuple(map(_spec, tensors))
    except AttributeError:  # not all are DTensors
        dtensor = dtensor_type() or ()
        return tuple(_spec(tensor) if isinstance(tensor, dtensor) else tensor.dtype for tensor in tensors)


def _kinds_of_owners(grads: Gradients) -> tuple[_Kind, ...]:
    """The kinds of the parameters. An owner that is not a tensor has its gradient's kind, or that of any other."""
    owners = grads.owners.tensors
    try:
        return _kinds(owners)
    except AttributeError:
        by_position = dict(zip(grads.positions, grads.tensors, strict=True))
        other = next(chain(grads.tensors, filter(is_tensor, owners)))
        return _kinds([owner if is_tensor(owner) else by_position.get(i, other) for i, owner in enumerate(owners)])


def is_tensor(owner: object) -> bool:
    """Whether an owner is a tensor, rather than any object with a ``.grad``."""
    return isinstance(owner, Tensor)


def _layout(owners: Sequence[_Kind], grads: Sequence[_Kind], positions: Sequence[int]) -> Layout:
    """Work out a layout from the kinds of parameters and gradients, and which parameter each gradient belongs to.

    Raises:
        RuntimeError: Some processes are outside of a mesh, and would clip by another norm; or a gradient is on another
            mesh than its parameter, or has a pending reduction other than a sum or an average.
    """
    by_position = dict(zip(positions, grads, strict=True))
    members: dict[DeviceMesh, list[int]] = {}
    plain = []
    for position, owner in enumerate(owners):
        grad = by_position.get(position, owner)
        _check_mesh(position, owner, grad)
        kind = grad if isinstance(owner, torch.dtype) else owner
        if isinstance(kind, torch.dtype):
            plain.append(position)
        else:
            members.setdefault(kind.mesh, []).append(position)
    _check_processes(members, plain)
    mine = {mesh: own for mesh, own in members.items() if mesh.get_coordinate() is not None}
    mine = mine or {mesh: [] for mesh in list(members)[:1]}
    parts = [
        _part(mesh, own if i else sorted(own + plain), owners, grads, positions)
        for i, (mesh, own) in enumerate(mine.items())
    ]
    dtypes = {_dtype(by_position.get(position, kind)) for position, kind in enumerate(owners)}
    return Layout(parts, _addends(grads, positions), dtypes)


def _check_mesh(position: int, owner: _Kind, grad: _Kind) -> None:
    if not isinstance(owner, torch.dtype) and not isinstance(grad, torch.dtype) and grad.mesh != owner.mesh:
        raise RuntimeError(
            f"the gradient of parameters[{position}] lies on another mesh, {grad.mesh}, than the parameter, "
            f"{owner.mesh}: redistribute() it before clipping"
        )


def _check_processes(members: Mapping[DeviceMesh, Sequence[int]], plain: Sequence[int]) -> None:
    """Refuse gradients of which a process would see a part only, by what all processes know.

    A slice of a mesh counts as the whole mesh: the other slices are taken to hold replicas.
    """
    first: dict[frozenset[int], int] = {}
    for mesh, own in members.items():
        first.setdefault(frozenset(_root_of(mesh).mesh.flatten().tolist()), own[0])
    if len(first) > 1:
        (ranks, position), (others, other) = list(first.items())[:2]
        raise RuntimeError(
            f"parameters[{position}] lies on a mesh of the processes {sorted(ranks)}, and parameters[{other}] on one "
            f"of {sorted(others)}: a process outside of one would clip by another norm. Take the norm of each mesh's "
            "gradients by itself (fastclip.get_total_norm), bring them together among all processes, and scale by "
            "fastclip.clip_grads_with_norm_"
        )
    if plain and all(mesh.get_coordinate() is None for mesh in members):
        raise RuntimeError(
            f"parameters[{plain[0]}] is no DTensor, beside DTensors on a mesh that this process is not in: it cannot "
            "know their norm. Clip the two apart, or leave it to the processes of the mesh"
        )


def _root_of(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that a mesh is a slice of, or itself."""
    if hasattr(mesh, "_get_root_mesh"):
        root: DeviceMesh = mesh._get_root_mesh()
        return root
    from torch.distributed.device_mesh import _mesh_resources  # before torch 2.9

    return _mesh_resources.get_root_mesh(mesh)


def _part(
    mesh: DeviceMesh,
    members: Sequence[int],
    owners: Sequence[_Kind],
    grads: Sequence[_Kind],
    positions: Sequence[int],
) -> Part:
    coordinate = mesh.get_coordinate() or ()  # empty if this process is not in the mesh
    dims = sorted({dim for kind in (*owners, *grads) for dim in _sharded_dims(kind, mesh) if coordinate})
    not_first = {dim for dim in dims if coordinate[dim] > 0}  # what is not sharded over all of these counts elsewhere
    place = {position: i for i, position in enumerate(members)}
    counted = [
        i
        for i, position in enumerate(positions)
        if position in place and not_first.issubset(_sharded_dims(grads[i], mesh))
    ]
    places = tuple(place[positions[i]] for i in counted)
    return Part(Share(mesh, tuple(dims)), tuple(members), tuple(counted), places)


def _dtype(kind: _Kind) -> torch.dtype:
    if isinstance(kind, torch.dtype):
        return kind
    dtype: torch.dtype = kind.tensor_meta.dtype  # type: ignore[union-attr]  # only torch's shape inference lacks it
    return dtype


def _sharded_dims(kind: _Kind, mesh: DeviceMesh) -> list[int]:
    """The mesh dimensions on which a tensor is sharded over several processes."""
    if isinstance(kind, torch.dtype) or kind.mesh != mesh:
        return []
    return [
        dim
        for dim, placement in enumerate(kind.placements)
        if mesh.size(dim) > 1 and not (placement.is_replicate() or placement.is_partial())
    ]


def _addends(grads: Sequence[_Kind], positions: Sequence[int]) -> list[Addends]:
    """The gradients with a pending sum, grouped by what they are summed over.

    Raises:
        RuntimeError: As `_pending`.
    """
    alike: dict[tuple[DeviceMesh, tuple[int, ...], int, torch.dtype], list[int]] = {}
    for i, kind in enumerate(grads):
        if isinstance(kind, torch.dtype) or kind.mesh.get_coordinate() is None:
            continue
        dims, divisor = _pending(kind, positions[i])
        if dims:
            alike.setdefault((kind.mesh, dims, divisor, _dtype(kind)), []).append(i)
    return [Addends(Share(mesh, dims), divisor, tuple(own)) for (mesh, dims, divisor, _), own in alike.items()]


def _pending(spec: DTensorSpec, position: int) -> tuple[tuple[int, ...], int]:
    """The mesh dimensions of a gradient's pending sum, and what the sum is divided by.

    Raises:
        RuntimeError: The pending reduction is neither a sum nor an average.
    """
    from torch.distributed.tensor import Partial

    dims, divisor = [], 1
    for dim, placement in enumerate(spec.placements):
        if not placement.is_partial() or spec.mesh.size(dim) == 1:
            continue
        if type(placement) is not Partial or placement.reduce_op not in ("sum", "avg"):
            raise RuntimeError(
                f"the gradient of parameters[{position}] has the placement {placement!r}: of reductions that "
                "are yet to be made, only sums and averages can be scaled before; redistribute() it before clipping"
            )
        dims.append(dim)
        divisor *= spec.mesh.size(dim) if placement.reduce_op == "avg" else 1
    return tuple(dims), divisor
