"""A set of gradients: what one call reduces, scales or clamps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fastclip.core.owners import Owners

PLAIN_TYPES = (Tensor, nn.Parameter)
"""The classes whose tensors are plain memory. A subclass may redefine any operation."""


class Gradients(NamedTuple):
    """Gradients, and what is needed to name one in an error message.

    Attributes:
        tensors: The gradients that exist; None is left out.
        owners: All parameters, those without gradient included.
        positions: The index of each gradient's parameter among the owners.
        argument: The name of the caller's argument.
        addresses: The address of each gradient in memory. None if a gradient has no address (it is sparse, or belongs
            to a function transform), or is not of `PLAIN_TYPES`.
        has_dtensors: Whether a gradient is a DTensor, or may be one in another process: its parameter is a DTensor.
    """

    tensors: list[Tensor]
    owners: Owners
    positions: Sequence[int]
    argument: str
    addresses: list[int] | None
    has_dtensors: bool

    def label(self, index: int) -> str:
        """Name a gradient as the caller knows it."""
        position = self.positions[index]
        name = f" {self.owners.names[position]!r}" if self.owners.names else ""
        shape = getattr(self.owners.tensors[position], "shape", self.tensors[index].shape)
        return f"{self.argument}[{position}]{name} of shape {tuple(shape)}"

    def refreshed(self) -> Gradients:
        """The same tensors at their present addresses: their memory may have been replaced."""
        return self if self.addresses is None else self._replace(addresses=addresses_of(self.tensors))


def of_one_process(
    tensors: list[Tensor], kinds: set[type], owners: Owners, positions: Sequence[int], argument: str
) -> Gradients:
    """Gradients none of which is a DTensor, given their classes. Their owners may be DTensors all the same."""
    addresses = addresses_of(tensors) if kinds.issubset(PLAIN_TYPES) else None
    return Gradients(tensors, owners, positions, argument, addresses, has_dtensors=False)


def at(grads: Gradients, indices: Sequence[int]) -> Gradients:
    """Some of the gradients of one process."""
    tensors, positions = [grads.tensors[i] for i in indices], [grads.positions[i] for i in indices]
    return of_one_process(tensors, set(map(type, tensors)), grads.owners, positions, grads.argument)


def addresses_of(tensors: list[Tensor]) -> list[int] | None:
    """Where tensors of `PLAIN_TYPES` lie; None if one has no address."""
    try:
        return list(map(Tensor.data_ptr, tensors))
    except RuntimeError:  # a sparse tensor, or one inside of a function transform
        return None
