"""DTensors, without the second that it takes to import their module."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastclip.core.gradients import PLAIN_TYPES, Gradients, addresses_of

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def dtensor_type() -> type[DTensor] | None:
    """The class of DTensors. None if nobody has imported it: then no DTensor exists."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def is_dtensor(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    return isinstance(tensor, dtensor_type() or ())


def as_plain(number: Any) -> Any:
    """The full tensor of a DTensor, which is a collective; anything else unchanged."""
    return number.full_tensor() if is_dtensor(number) else number


_local = attrgetter("_local_tensor")


def local_parts(grads: Gradients) -> Gradients:
    """The gradients, with this process's shard in the place of each DTensor."""
    if not grads.has_dtensors:
        return grads
    if set(map(type, grads.tensors)) == {dtensor_type()}:
        parts = list(map(_local, grads.tensors))
    else:
        parts = [_local(grad) if is_dtensor(grad) else grad for grad in grads.tensors]
    if set(map(type, parts)) != {Tensor}:  # the result of a collective that is under way has a method to wait for it
        parts = [part.wait() if hasattr(part, "wait") else part for part in parts]
    return of_this_process(grads, parts, grads.positions)


def of_this_process(grads: Gradients, tensors: list[Tensor], positions: Sequence[int]) -> Gradients:
    """Gradients of which each process has its own, even if their owners are DTensors."""
    addresses = addresses_of(tensors) if set(map(type, tensors)).issubset(PLAIN_TYPES) else None
    return Gradients(tensors, grads.owners, positions, grads.argument, addresses, has_dtensors=False)


def present(grads: Gradients) -> Sequence[int]:
    """The indices of the parameters that have a gradient, or may have one in another process."""
    if not grads.has_dtensors:
        return grads.positions
    here = set(grads.positions)
    owners = enumerate(grads.owners.tensors)
    return [i for i, owner in owners if i in here or (is_dtensor(owner) and owner.requires_grad)]
