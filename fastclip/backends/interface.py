"""What a backend must offer, and the rule of the global norm that all of them share.

A backend is a module with two functions: ``obstacle(device)`` tells why it cannot serve a device, or None, and
``plan(tensors)`` takes tensors of one device that do not overlap and returns a `Plan` for them. It may tell in ``HERE``
how it works on this machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from fastclip.foundation.devices import Scalar

Bounds: TypeAlias = float | Sequence[float]
"""A bound of values: one for all gradients, or one for each."""


class Reduction(NamedTuple):
    """What one pass over gradients leaves.

    Attributes:
        norm: The norm as it is returned: 0-dim, on the gradients' device, in the dtype asked for.
        total: The same norm before it was rounded to that dtype.
        coefficient: ``min(max_norm / (total + 1e-6), 1)``; NaN where the norm is, but 1 where max_norm is infinite.
    """

    norm: Tensor
    total: Scalar
    coefficient: Scalar


class Unscaling(NamedTuple):
    """How gradients that carry a loss scale get rid of it, and who is to know that one of them is not finite.

    Attributes:
        inv_scale: What they are to be multiplied by: 0-dim, fp32, on the gradients' device.
        found_inf: Becomes 1 where a gradient is not finite, and else stays as it is: 0-dim, fp32, on the same device.
    """

    inv_scale: Tensor
    found_inf: Tensor


class Plan(Protocol):
    """Gradients of one device, ready to be reduced, scaled and clamped together."""

    device: torch.device

    def moved(self, addresses: list[int]) -> Plan | None:
        """Return a plan for gradients that differ from this one's in their addresses only, [gradients].

        Of addresses it is None where gradients there have no memory, or share it, or are not aligned to their elements.
        """

    def captured(self) -> Plan:
        """Return a plan for the same gradients that a CUDA graph may replay: nobody else works in its memory."""

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
        """Read every gradient once for the p-norm of all of them. For p = 0 that is the number of nonzero tensors.

        With `unscaling`, for p at least 1, it is the norm without the loss scale, which the coefficient takes off, too.
        """

    def clip_(self, p: float, max_norm: float, dtype: torch.dtype) -> Tensor:
        """Reduce, scale by the coefficient of the global norm, and return the norm."""
        reduced = self.reduce(p, max_norm, dtype)
        self.scale_(reduced.coefficient)
        return reduced.norm

    def norms(self) -> Tensor:
        """Read every gradient once for the 2-norm of each: fp64 where the device has it, in memory that stays as it is.

        On a GPU that is one launch more than `reduce`.
        """

    def scale_(self, coefficient: Scalar) -> None:
        """Multiply the gradients by a coefficient, on whatever device it is; write nothing where it is 1.

        A tensor with one dimension holds a coefficient for each gradient.
        """

    def clamp_(self, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> Tensor | None:
        """Clamp the gradients to [minimum, maximum]; write nothing where nothing is outside.

        If `watch`, return flags on the device, of which one is set if any element was outside; valid until the next
        call.
        """


def one_each(bound: Bounds, count: int) -> Sequence[float]:
    """A bound for each of `count` gradients."""
    return bound if isinstance(bound, Sequence) else (bound,) * count
