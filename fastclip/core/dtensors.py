"""DTensors, without the second that it takes to import their module."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from fastclip.core.gradients import Gradients, of_one_process

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def dtensor_type() -> type[DTensor] | None:
    """The class of DTensors. None if nobody has imported it: then no DTensor exists."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor


def as_plain(number: Any) -> Any:
    """The full tensor of a DTensor, which is a collective; anything else unchanged."""
    return number.full_tensor() if isinstance(number, dtensor_type() or ()) else number


_local = attrgetter("_local_tensor")


def local_parts(grads: Gradients) -> Gradients:
    """The gradients, with this process's shard in the place of each DTensor."""
    if not grads.has_dtensors:
        return grads
    dtensor = dtensor_type() or ()
    if set(map(type, grads.tensors)) == {dtensor}:
        parts = list(map(_local, grads.tensors))
    else:
        parts = [_local(grad) if isinstance(grad, dtensor) else grad for grad in grads.tensors]
    kinds = set(map(type, parts))
    if kinds != {Tensor}:  # the result of a collective that is under way has a method to wait for it
        parts = [part.wait() if hasattr(part, "wait") else part for part in parts]
        kinds = set(map(type, parts))
    return of_one_process(parts, kinds, grads.owners, grads.positions, grads.argument)


def present(grads: Gradients) -> Sequence[int]:
    """The indices of the parameters that have a gradient, or may have one in another process."""
    if not grads.has_dtensors:
        return grads.positions
    here, dtensor = set(grads.positions), dtensor_type() or ()
    owners = enumerate(grads.owners.tensors)
    return [i for i, owner in owners if i in here or (isinstance(owner, dtensor) and owner.requires_grad)]
