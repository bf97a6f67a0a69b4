"""Gradients that lie scattered over processes (DTensors): each process works on its parts, then they add up.

    Gradients --prepare--> Prepared or, where a DTensor is among them, Sharded: the same operations, by all processes

The parts of a process are gradients like any others, and `fastclip.plans` serves them. What all processes must know
of them is a norm, or a vector of norms:

- Over a dimension of a mesh on which any gradient is sharded, evenly or not, parts are added up.
- A replicated gradient is counted once, by the first process in each of these dimensions.
- A tensor that is no DTensor is taken as replicated over the first mesh.
- A gradient that is a sum yet to be made (`Partial`) is summed first, to a temporary, since the norm of a sum is not
  the sum of norms. It moves as many bytes as these gradients have, in one all-reduce for all that are alike. They stay
  as they are: scaled addends have a scaled sum.

Who takes part follows from the parameters' meshes and placements, whether they have gradients or not, and from nothing
that a single process knows: what it has kept from earlier calls, or whether its part is empty. So none is waited for in
vain.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from fastclip.backends.coefficient import clip_coefficient, reduction
from fastclip.backends.interface import Bounds, Reduction
from fastclip.core import plans
from fastclip.core.collectives import Share, all_reduce, all_reduced, code_of, groups_of
from fastclip.core.gradients import Gradients, dtensor_type, has_dtensors
from fastclip.core.plans import Prepared, promoted
from fastclip.foundation.arithmetic import combine
from fastclip.foundation.devices import Scalar, index_of, on, wide_dtype
from fastclip.foundation.tracing import is_traced

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor._dtensor_spec import DTensorSpec

_Kind: TypeAlias = "DTensorSpec | torch.dtype"
"""What decides on a tensor's place: the mesh and placements of a DTensor, or, of any other, nothing but its dtype."""


def prepare(grads: Gradients, *, in_place: bool) -> Prepared | Sharded:
    """Make gradients ready to be clipped together, by this process or by all that have parts of them.

    Args:
        grads: At least one gradient, or an owner that is a DTensor.
        in_place: Whether they are going to be written.

    Raises:
        RuntimeError: A gradient has no norm or cannot be written, or the forced backend (`FASTCLIP_BACKEND`) cannot
            serve its device.
    """
    if grads.addresses is not None or not has_dtensors(grads):
        return plans.prepare(grads, in_place=in_place)
    return Sharded(grads, in_place=in_place)


def local_parts(grads: Gradients) -> Gradients:
    """Return the gradients with this process's part of each DTensor in its place."""
    return _local_parts(grads) if has_dtensors(grads) else grads


_local = attrgetter("_local_tensor")


def _local_parts(grads: Gradients) -> Gradients:
    dtensor: Any = dtensor_type()
    if grads.kinds == {dtensor}:
        parts = list(map(_local, grads.tensors))
    else:
        parts = [_local(grad) if isinstance(grad, dtensor) else grad for grad in grads.tensors]
    kinds = set(map(type, parts))
    if kinds != {Tensor}:  # one may be the result of a collective that is under way, and has a method to wait for it
        parts = [part.wait() if hasattr(part, "wait") else part for part in parts]
        kinds = set(map(type, parts))
    return grads._replace(tensors=parts, kinds=kinds, addresses=None)


def present(grads: Gradients) -> Sequence[int]:
    """The positions of the owners that have a gradient, or may have one in another process."""
    if not has_dtensors(grads):
        return grads.positions
    here, dtensor = set(grads.positions), dtensor_type() or ()
    owners = enumerate(grads.owners.tensors)
    return [i for i, owner in owners if i in here or (isinstance(owner, dtensor) and owner.requires_grad)]


def as_plain(number: Any) -> Any:
    """Return what a DTensor stands for, as a tensor that each process has; anything else as it is."""
    dtensor = dtensor_type()
    return number.full_tensor() if dtensor is not None and isinstance(number, dtensor) else number


def on_mesh(norm: Tensor, prepared: Prepared | Sharded) -> Tensor:
    """Return the norm as callers of torch's functions look for it: on one mesh a DTensor, replicated over it."""
    spec = prepared.layout.spec(norm) if isinstance(prepared, Sharded) else None
    dtensor = dtensor_type()
    if spec is None or dtensor is None:
        return norm
    # `DTensor.from_local` takes 70 µs, 25 times as long.
    return dtensor(norm, spec, requires_grad=False)


class _Part(NamedTuple):
    """What one mesh has a share of.

    Attributes:
        share: The mesh, and those of its dimensions over which is added up.
        members: The positions of all its owners, and in the first part those of owners that are no DTensors.
        counted: The gradients that this process counts, by their positions among the gradients.
        places: The positions of their owners among the members.
    """

    share: Share
    members: tuple[int, ...]
    counted: tuple[int, ...]
    places: tuple[int, ...]


class _Addends(NamedTuple):
    """Gradients that are sums yet to be made, over the same processes and of one dtype.

    Attributes:
        share: The mesh, and those of its dimensions over which they are summed.
        divisor: By what the sum is divided: 1, or, where it is an average, the number of processes.
        members: Their positions among the gradients.
    """

    share: Share
    divisor: int
    members: tuple[int, ...]


class _Layout:
    """How gradients lie on their meshes, seen from this process.

    Attributes:
        parts: One for each mesh that this process is in. Where it is in none there is one, of what is no DTensor.
        addends: The gradients that are sums yet to be made.
        dtype: The gradients' own, real and promoted where they differ; the owner's where one has no gradient here.
        is_narrow: Whether none of them is fp64.
    """

    def __init__(self, parts: Sequence[_Part], addends: Sequence[_Addends], dtypes: set[torch.dtype]) -> None:
        self.parts = parts
        self.addends = addends
        self.dtype = promoted({dtype.to_real() for dtype in dtypes})
        self.is_narrow = dtypes.isdisjoint({torch.float64, torch.complex128})
        self.shares = [part.share for part in parts]
        self._specs: dict[torch.dtype, DTensorSpec] = {}

    def spec(self, norm: Tensor) -> DTensorSpec | None:
        """What makes a DTensor of a norm that is replicated over the mesh, where there is only one."""
        if len(self.parts) == 1 and norm.dtype not in self._specs:
            from torch.distributed.tensor import Replicate
            from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

            mesh = self.shares[0].mesh
            meta = TensorMeta(norm.shape, norm.stride(), norm.dtype)
            self._specs[norm.dtype] = DTensorSpec(mesh, (Replicate(),) * mesh.ndim, meta)
        return self._specs.get(norm.dtype)


class Sharded:
    """Gradients made ready, some of which are DTensors: what `Prepared` offers, done by all processes together.

    Every process has to make the same calls, for the same parameters.

    Attributes:
        layout: How the gradients lie.
        device: The first gradient's; the first owner's where this process has no gradient.
        dtype: The gradients' own, real and promoted where they differ: that of torch's norm.
    """

    def __init__(self, grads: Gradients, *, in_place: bool) -> None:
        self._grads = grads
        self._parts = _local_parts(grads)
        owners, kinds = _kinds_of_owners(grads), _kinds(grads.tensors)
        # Equal meshes may be those of process groups that have ended: what is kept must be of this very mesh.
        mesh = next(kind.mesh for kind in chain(owners, kinds) if not isinstance(kind, torch.dtype))
        self.layout = _layout_on(mesh, owners, kinds, grads.positions)
        self.device = next(chain(grads.tensors, filter(_is_tensor, grads.owners.tensors))).device
        self.dtype = self.layout.dtype
        # Ahead of the first collective: what is refused here is most likely refused by all processes.
        self._all = plans.prepare(self._parts, in_place=in_place) if grads.tensors else None

    @property
    def devices(self) -> set[torch.device]:
        """Where the gradients are."""
        return {self.device} if self._all is None else self._all.devices

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype) -> Reduction:
        """Reduce all parts of all processes to one norm.

        For p = 0 it takes a vector of norms through the all-reduces, for a gradient counts once, wherever it is not 0.
        """
        if p == 0:
            total = self.norms().count_nonzero().to(wide_dtype(self.device))
        else:
            code = code_of(p, narrow=self.layout.is_narrow)
            encoded = [
                code.encode(on(self.device, _norm(counted, p, code.neutral)).reshape(1)) for counted in self._counted()
            ]
            sums = all_reduce(encoded, self.layout.shares, code.operation)
            wholes = [code.decode(whole).reshape(()) for whole in sums]
            total = wholes[0] if len(wholes) == 1 else combine(wholes, p)
        if self.device.type == "cpu" and not is_traced():  # where numbers are faster than tensors
            number = total.item()
            return Reduction(total.to(dtype), number, clip_coefficient(number, max_norm))
        return reduction(total, max_norm, dtype)

    def norms(self) -> Tensor:
        """Return the 2-norm of each owner's gradient, [owners], 0 where no process has one."""
        code = code_of(2.0, narrow=self.layout.is_narrow)
        vectors = []
        for part, counted in zip(self.layout.parts, self._counted(), strict=True):
            norms = torch.zeros(len(part.members), dtype=wide_dtype(self.device), device=self.device)
            if counted is not None:
                norms.index_copy_(0, index_of(part.places, self.device), on(self.device, counted.norms()))
            vectors.append(code.encode(norms))
        wholes = [code.decode(sums) for sums in all_reduce(vectors, self.layout.shares, code.operation)]
        owners = len(self._grads.owners.tensors)
        if len(wholes) == 1 and len(wholes[0]) == owners:
            return wholes[0]
        order = [position for part in self.layout.parts for position in part.members]
        norms = torch.zeros(owners, dtype=wide_dtype(self.device), device=self.device)
        return norms.index_copy_(0, index_of(order, self.device), torch.cat(wholes))

    def scale_(self, grads: Gradients, coefficient: Scalar) -> None:
        """Multiply this process's parts by one coefficient, or by one for each gradient."""
        if self._all is not None:
            torch.autograd.graph.increment_version(grads.tensors)  # of the parts, `Prepared` does
            self._all.scale_(self._parts, coefficient)

    def clamp_(self, grads: Gradients, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> list[Tensor]:
        """Clamp this process's parts. Return flags if `watch`, of which one is set if any process changed any.

        Raises:
            RuntimeError: A gradient is a sum yet to be made.
        """
        if self.layout.addends:
            label = grads.label(self.layout.addends[0].members[0])
            raise RuntimeError(
                f"{label} is a sum yet to be made (a DTensor with a Partial placement), and to clamp its addends would "
                "not clamp it: put its sum in its place before, parameter.grad = parameter.grad.redistribute(...)"
            )
        flags = []
        if self._all is not None:
            torch.autograd.graph.increment_version(grads.tensors)
            flags = self._all.clamp_(self._parts, minimum, maximum, watch=watch)
        if not watch:
            return []
        changed = torch.zeros(1, dtype=torch.int64, device=self.device)
        for flag in flags:
            changed |= flag.any().to(self.device)
        return [
            whole > 0
            for whole in all_reduce([changed] * len(self.layout.shares), self.layout.shares, dist.ReduceOp.MAX)
        ]

    def _counted(self) -> list[Prepared | None]:
        """What this process counts of each part of the layout; None where that is nothing."""
        parts = self._summed if self.layout.addends else self._parts
        return [
            self._all
            if parts is self._parts and len(part.counted) == len(parts.tensors)
            else _prepare_some(parts, part.counted)
            for part in self.layout.parts
        ]

    @cached_property
    def _summed(self) -> Gradients:
        """The parts, with sums in the place of addends. They have to stay: plans know but their addresses."""
        tensors = list(self._parts.tensors)
        for addends in self.layout.addends:
            mine = [tensors[i] for i in addends.members]
            sums = torch.cat([tensor.reshape(-1) for tensor in mine]).to(addends.share.mesh.device_type)
            for group in groups_of(addends.share):
                sums = all_reduced(sums, dist.ReduceOp.SUM, group)
            sums = sums.div_(addends.divisor).to(mine[0].device)
            for i, whole in zip(addends.members, torch.split(sums, [tensor.numel() for tensor in mine]), strict=True):
                tensors[i] = whole
        return self._parts._replace(tensors=tensors, addresses=None)


def _norm(counted: Prepared | None, p: float, neutral: float) -> Scalar:
    if counted is None or not counted.plans:  # nothing that has elements
        return neutral
    return counted.reduce(p, math.inf, torch.float64).total


def _prepare_some(grads: Gradients, chosen: Sequence[int]) -> Prepared | None:
    if not chosen:
        return None
    tensors, positions = [grads.tensors[i] for i in chosen], [grads.positions[i] for i in chosen]
    return plans.prepare(grads._replace(tensors=tensors, positions=positions, addresses=None), in_place=False)


_spec = attrgetter("_spec")


def _is_tensor(owner: object) -> bool:
    return isinstance(owner, Tensor)


def _kinds_of_owners(grads: Gradients) -> tuple[_Kind, ...]:
    """What the owners are; of one that is no tensor, what its gradient is, and where it has none, what any other is."""
    owners = grads.owners.tensors
    try:
        return _kinds(owners)
    except AttributeError:
        here = dict(zip(grads.positions, grads.tensors, strict=True))
        any_other = next(chain(grads.tensors, filter(_is_tensor, owners)))
        return _kinds([owner if _is_tensor(owner) else here.get(i, any_other) for i, owner in enumerate(owners)])


def _kinds(tensors: Sequence[Tensor]) -> tuple[_Kind, ...]:
    try:
        return tuple(map(_spec, tensors))
    except AttributeError:  # not all are DTensors
        dtensor = dtensor_type() or ()
        return tuple(_spec(tensor) if isinstance(tensor, dtensor) else tensor.dtype for tensor in tensors)


_known: OrderedDict[tuple[int, ...], tuple[tuple[object, ...], _Layout]] = OrderedDict()
_MOST_KNOWN = 256  # layouts: a few models, or each of many parameters by itself


def _layout_on(
    mesh: DeviceMesh, owners: tuple[_Kind, ...], grads: tuple[_Kind, ...], positions: Sequence[int]
) -> _Layout:
    """Work out how gradients lie, or remember it: that takes 30 ns a gradient whose kind is the same object."""
    place = (id(mesh), id(owners[0]), len(owners), len(grads))
    given = (mesh, owners, grads, positions)  # which has to stay, lest the ids become those of others
    known = _known.get(place)
    if known is not None and known[0] == given:
        return known[1]
    layout = _layout(owners, grads, positions)
    _known[place] = given, layout
    while len(_known) > _MOST_KNOWN:
        _known.popitem(last=False)
    return layout


def _layout(owners: Sequence[_Kind], grads: Sequence[_Kind], positions: Sequence[int]) -> _Layout:
    """Work out how gradients lie, from what owners and gradients are and which owners the gradients belong to.

    Raises:
        RuntimeError: Some processes are outside of a mesh, and would clip by another norm; or a gradient lies on
            another mesh than its parameter, or is to be reduced by something that is neither a sum nor an average.
    """
    here = dict(zip(positions, grads, strict=True))
    members: dict[DeviceMesh, list[int]] = {}
    plain = []
    for position, owner in enumerate(owners):
        grad = here.get(position, owner)
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
    dtypes = {_dtype(here.get(position, kind)) for position, kind in enumerate(owners)}
    return _Layout(parts, _addends(grads, positions), dtypes)


def _check_mesh(position: int, owner: _Kind, grad: _Kind) -> None:
    if not isinstance(owner, torch.dtype) and not isinstance(grad, torch.dtype) and grad.mesh != owner.mesh:
        raise RuntimeError(
            f"the gradient of parameters[{position}] lies on another mesh, {grad.mesh}, than the parameter, "
            f"{owner.mesh}: redistribute() it before clipping"
        )


def _check_processes(members: Mapping[DeviceMesh, Sequence[int]], plain: Sequence[int]) -> None:
    """Refuse gradients of which some process would see a part only, by what all processes know alike.

    A slice of a mesh counts for all of it: the other slices are taken to hold replicas.
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
) -> _Part:
    coordinate = mesh.get_coordinate() or ()  # of nothing, where this process is not in the mesh
    dims = sorted({dim for kind in (*owners, *grads) for dim in _sharded_dims(kind, mesh) if coordinate})
    not_first = {dim for dim in dims if coordinate[dim] > 0}  # here only what is sharded over all of these is counted
    place = {position: i for i, position in enumerate(members)}
    counted = [
        i
        for i, position in enumerate(positions)
        if position in place and not_first.issubset(_sharded_dims(grads[i], mesh))
    ]
    places = tuple(place[positions[i]] for i in counted)
    return _Part(Share(mesh, tuple(dims)), tuple(members), tuple(counted), places)


def _dtype(kind: _Kind) -> torch.dtype:
    if isinstance(kind, torch.dtype):
        return kind
    dtype: torch.dtype = kind.tensor_meta.dtype  # type: ignore[union-attr]  # only torch's shape inference lacks it
    return dtype


def _sharded_dims(kind: _Kind, mesh: DeviceMesh) -> list[int]:
    """The dimensions of a mesh on which a tensor is cut up among several processes."""
    if isinstance(kind, torch.dtype) or kind.mesh != mesh:
        return []
    return [
        dim
        for dim, placement in enumerate(kind.placements)
        if mesh.size(dim) > 1 and not (placement.is_replicate() or placement.is_partial())
    ]


def _addends(grads: Sequence[_Kind], positions: Sequence[int]) -> list[_Addends]:
    """Find the gradients that are sums yet to be made.

    Raises:
        RuntimeError: One is to be reduced by something that is neither a sum nor an average.
    """
    from torch.distributed.tensor import Partial

    alike: dict[tuple[DeviceMesh, tuple[int, ...], int, torch.dtype], list[int]] = {}
    for i, kind in enumerate(grads):
        if isinstance(kind, torch.dtype) or kind.mesh.get_coordinate() is None:
            continue
        dims, divisor = [], 1
        for dim, placement in enumerate(kind.placements):
            if not placement.is_partial() or kind.mesh.size(dim) == 1:
                continue
            if type(placement) is not Partial or placement.reduce_op not in ("sum", "avg"):
                raise RuntimeError(
                    f"the gradient of parameters[{positions[i]}] has the placement {placement!r}: of reductions that "
                    "are yet to be made, only sums and averages can be scaled before; redistribute() it before clipping"
                )
            dims.append(dim)
            divisor *= kind.mesh.size(dim) if placement.reduce_op == "avg" else 1
        if dims:
            alike.setdefault((kind.mesh, tuple(dims), divisor, _dtype(kind)), []).append(i)
    return [_Addends(Share(mesh, dims), divisor, tuple(own)) for (mesh, dims, divisor, _), own in alike.items()]
