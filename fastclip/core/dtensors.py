"""DTensors, without the second that it takes to import their module."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

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
