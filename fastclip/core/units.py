"""Units, the rows of gradients: each is clipped by the norm of the same row of its weight.

Rows are those of dimension 0. A parameter with at most one dimension above 1 (a bias, a gain) is a unit as a whole,
which is no matter of this module. A process clips the units of its own shards, without a collective: shards of
dimension 0 keep units whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastclip.backends import GENERAL
from fastclip.core.dtensors import dtensor_type, local_parts
from fastclip.core.gradients import Gradients, at
from fastclip.core.prepare import prepare
from fastclip.foundation.devices import index_of

if TYPE_CHECKING:
    from fastclip.core.planned import Planned


def has_units(owner: Tensor) -> bool:
    """Whether the rows of a parameter are its units, rather than the parameter as a whole, or its only row."""
    shape = owner.shape
    return len(shape) - shape.count(1) > 1 and shape[0] != 1


def check_units(grads: Gradients, weights: Gradients) -> None:
    """Raise unless this process has every row of its gradients, and of the weights, as a whole.

    Args:
        grads: The gradients that have units.
        weights: The parameters that have units, with or without gradient here.

    Raises:
        NotImplementedError: A gradient is sparse, a DTensor is sharded other than by dimension 0, or a gradient is not
            placed as its parameter (it has a sum to be made, for example).
    """
    if grads.addresses is not None and not weights.has_dtensors:
        return  # dense tensors of this process
    for index, weight in enumerate(weights.tensors):
        placements = _placements(weight)
        if not all(place.is_replicate() or place.is_shard(0) for place in placements):
            raise NotImplementedError(
                f"{weights.label(index)} is placed by {placements}, which cuts its units into parts: shard it by "
                "dimension 0, or clip by='parameter'"
            )
    for index, (grad, position) in enumerate(zip(grads.tensors, grads.positions, strict=True)):
        if grad.layout is not torch.strided:
            raise NotImplementedError(
                f"{grads.label(index)} has a {grad.layout} gradient, whose rows are not those of its weight: clip it "
                "by='parameter', or by another rule"
            )
        if _placements(grad) != _placements(grads.owners.tensors[position]):
            raise NotImplementedError(
                f"{grads.label(index)} has a gradient placed by {_placements(grad)}, and not as it is itself: put one "
                "with its own placements in the place, parameter.grad = parameter.grad.redistribute(...)"
            )


def _placements(tensor: Tensor) -> tuple[Any, ...]:
    is_dtensor = isinstance(tensor, dtensor_type() or ())
    return tuple(tensor.placements) if is_dtensor else ()  # type: ignore[attr-defined]


def clip_units_(grads: Gradients, weights: Gradients, ratios: Tensor, eps: float) -> list[Tensor]:
    """Clip the units of gradients; see `fastclip.backends.interface.Plan.clip_units_`. No version counter moves.

    Args:
        grads: Gradients with units that passed `check_units`.
        weights: Their parameters.
        ratios: The largest ratio of the norms of gradient and weight, [gradients].
        eps: The least norm of a weight.

    Returns:
        Flags: one of them is set if a unit of this process was scaled.
    """
    own, other = local_parts(grads), local_parts(weights)
    are_alike = list(map(_are_alike, own.tensors, other.tensors))
    if all(are_alike):
        return _by_plans(own, other, ratios, eps)
    flags = []
    for wanted, clip in ((True, _by_plans), (False, _by_torch)):
        indices = [i for i, is_alike in enumerate(are_alike) if is_alike == wanted]
        flags += clip(at(own, indices), at(other, indices), ratios[index_of(indices, ratios.device)], eps)
    return flags


def _by_plans(grads: Gradients, weights: Gradients, ratios: Tensor, eps: float) -> list[Tensor]:
    """Clip gradients that lie in memory as their weights do, each by its backend."""
    if not grads.tensors:
        return []
    planned: Planned = prepare(grads, in_place=True)  # type: ignore[assignment]  # a process's own tensors
    of_weights: Planned = prepare(weights, in_place=False)  # type: ignore[assignment]
    if planned.dispatch.members != of_weights.dispatch.members or any(
        type(plan) is not type(mate) for plan, mate in zip(planned.plans, of_weights.plans, strict=True)
    ):
        return _by_torch(grads, weights, ratios, eps)  # a weight that shares its memory, or has a class of its own
    flags = []
    for plan, mate, members in zip(planned.plans, of_weights.plans, planned.dispatch.members, strict=True):
        counts = [grads.tensors[i].shape[0] for i in members]
        own = ratios if planned.dispatch.is_in_order else ratios[index_of(members, ratios.device)]
        flags.append(plan.clip_units_(mate, counts, own, eps))
    return flags


def _by_torch(grads: Gradients, weights: Gradients, ratios: Tensor, eps: float) -> list[Tensor]:
    """Clip gradients one by one, by torch's operations."""
    pairs = zip(grads.tensors, weights.tensors, ratios.unbind(), strict=True)
    return [
        GENERAL.plan([grad]).clip_units_(GENERAL.plan([weight]), [len(grad)], ratio.reshape(1), eps)
        for grad, weight, ratio in pairs
        if grad.numel()
    ]


def _are_alike(grad: Tensor, weight: Tensor) -> bool:
    """Whether a gradient and its weight have the same dtype, and rows that follow each other in memory."""
    return grad.dtype == weight.dtype and _is_by_rows(grad) and _is_by_rows(weight)


def _is_by_rows(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.stride(0) * tensor.shape[0] == tensor.numel()
