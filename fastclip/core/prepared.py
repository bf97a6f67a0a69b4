"""What can be done with a set of gradients that is ready: reduce, scale, clamp, clip."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from fastclip.backends.interface import Bounds, Reduction
from fastclip.core.gradients import Gradients
from fastclip.foundation.devices import Scalar


class Prepared(ABC):
    """Gradients ready to be clipped together. It holds addresses, so methods that write get the gradients again.

    Attributes:
        device: The first gradient's device, on which norms are returned.
        dtype: The dtype of torch's norm: the gradients' own, real, promoted if they differ.
    """

    __slots__ = ("device", "dtype")

    device: torch.device
    dtype: torch.dtype

    @property
    @abstractmethod
    def devices(self) -> set[torch.device]:
        """All devices on which gradients are."""

    @abstractmethod
    def reduce(self, p: float, max_norm: float, dtype: torch.dtype) -> Reduction:
        """Read every gradient once: the p-norm of all of them, and the coefficient that limits it to `max_norm`."""

    @abstractmethod
    def norms(self) -> Tensor:
        """Read every gradient once: the 2-norm of each, [gradients], fp64 if the device has it, on `device`.

        If DTensors are among them, it is that of each parameter's gradient, [owners], and 0 for one that no process
        has: this process may lack gradients that others have.
        """

    @abstractmethod
    def scale_(self, grads: Gradients, coefficient: Scalar) -> None:
        """Multiply all gradients by one coefficient, or each by its own, [gradients]."""

    @abstractmethod
    def clamp_(self, grads: Gradients, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> list[Tensor]:
        """Clamp all gradients. With `watch`, return flags: any of them is set if any element was out of bounds."""

    def flags_of_all(self, flags: Sequence[Tensor]) -> Sequence[Tensor]:
        """Flags that are set if those of any process are; with DTensors a collective."""
        return flags

    def clip_(self, grads: Gradients, p: float, max_norm: float, dtype: torch.dtype) -> Tensor:
        """Clip the gradients by the norm of all of them, and return the norm."""
        reduced = self.reduce(p, max_norm, dtype)
        self.scale_(grads, reduced.coefficient)
        return self.returned(reduced.norm)

    def returned(self, norm: Tensor) -> Tensor:
        """The norm in the form in which torch's functions return it."""
        return norm
