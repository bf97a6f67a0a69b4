"""What a backend must offer.

A backend is a module with three functions:

- ``obstacle(device: torch.device) -> str | None``: why it cannot serve a device; None if it can.
- ``plan(tensors: list[Tensor]) -> Plan``: a plan for plain tensors of one device that do not overlap in memory. (All
  others go to torch's own backend.)
- ``adapt(adaptation: Adaptation, state: Tensor, norms: Tensor, total: Tensor) -> tuple[Tensor, Tensor]``: one step of
  an adaptive rule. It takes the norms of groups, [groups], and the norm of all gradients, 0-dim, both fp64 on one
  device; updates the state of earlier steps, [groups, width]; and returns coefficients and thresholds, each [groups].

It may have a string ``HERE``, which says in a few words how it works on this machine. `fastclip.backends.Backend`
declares the rest: the devices that it is for, and what its plans allow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from fastclip.foundation.devices import Scalar

ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""The dtypes that kernels take, and the index of each in their tables; see `kernels/table.py` and `kernels/cpu.h`."""

Bounds: TypeAlias = float | Sequence[float]
"""A bound of values: one for all gradients, or one for each gradient."""


class Reduction(NamedTuple):
    """The result of one pass over gradients.

    Attributes:
        norm: The norm to return: 0-dim, on the gradients' device, in the requested dtype.
        total: The same norm, before it was rounded to that dtype.
        coefficient: ``min(max_norm / (total + 1e-6), 1)``. NaN if the norm is NaN. 1 if max_norm is infinite.
    """

    norm: Tensor
    total: Scalar
    coefficient: Scalar


class Unscaling(NamedTuple):
    """How to take the loss scale off gradients.

    Attributes:
        inv_scale: One over the scale: 0-dim, fp32, on the gradients' device.
        found_inf: A flag that is set to 1 if a gradient is not finite: 0-dim, fp32, on the same device.
    """

    inv_scale: Tensor
    found_inf: Tensor


class Adaptation(NamedTuple):
    """What an adaptive rule computes.

    Attributes:
        kind: "quantile", "z_score" or "ema".
        numbers: Its settings, in the order of the function of that kind in `fastclip.backends.thresholds`.
    """

    kind: str
    numbers: tuple[float, ...]


class Plan(Protocol):
    """Gradients of one device, ready to be reduced, scaled, clamped and clipped by unit together."""

    device: torch.device

    def moved(self, addresses: list[int]) -> Plan | None:  # noqa: ARG002 - plans that hold addresses use it
        """Return a plan for gradients that differ from this plan's by their addresses only.

        Return None if a gradient at these addresses has no memory, overlaps another one, or is not aligned; or if the
        plan holds tensors.
        """
        return None

    def captured(self) -> Plan:
        """Return a plan for the same gradients with a workspace of its own, so that a CUDA graph may replay it.

        Only plans of backends that are `by_address` are cached, and so captured.
        """
        raise RuntimeError("a plan that holds tensors is never cached, and so cannot be captured")

    def reduce(self, p: float, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
        """Read every gradient once for the p-norm of all. For p = 0 it is the number of tensors that are not all zero.

        With `unscaling` (p at least 1), the norm is that without the loss scale, and the coefficient takes it off.
        """

    def clip_(self, p: float, max_norm: float, dtype: torch.dtype) -> Tensor:
        """Reduce, scale by the coefficient of the global norm, and return the norm."""
        reduced = self.reduce(p, max_norm, dtype)
        self.scale_(reduced.coefficient)
        return reduced.norm

    def norms(self) -> Tensor:
        """Read every gradient once for the 2-norm of each, [gradients], fp64 if the device has it.

        On a GPU that is one launch more than `reduce`. The memory of the result is not reused by later calls.
        """

    def scale_(self, coefficient: Scalar) -> None:
        """Multiply the gradients by a coefficient, which may be on any device. Write nothing if it is 1.

        A tensor of shape [gradients] has a coefficient for each gradient.
        """

    def clamp_(self, minimum: Bounds, maximum: Bounds, *, watch: bool = False) -> Tensor | None:
        """Clamp the gradients to [minimum, maximum]. Write only where something is out of bounds.

        With `watch`, return flags on the device: one of them is set if any element was out of bounds. They are valid
        until the next call.
        """

    def clip_units_(self, weights: Plan, counts: Sequence[int], ratios: Tensor, eps: float) -> Tensor:
        """Scale each unit whose norm x is above ``T = ratio * max(w, eps)`` by ``T / max(x, 1e-6)``.

        Gradient i consists of ``counts[i]`` units of equal length, which follow each other in memory, unless the plan
        holds tensors; w is the norm of the same elements of its weight.

        Args:
            weights: A plan of this backend for the weights, whose numbers of elements and dtypes are the gradients'.
            counts: The number of units of each gradient: the size of its dimension 0.
            ratios: The largest ratio of the norms of gradient and weight, [gradients]: fp64 on any device.
            eps: The least w.

        Returns:
            Flags on the device: one of them is set if any unit was scaled. They are valid until the next call.
        """


def one_each(bound: Bounds, count: int) -> Sequence[float]:
    """A bound for each of `count` gradients."""
    return bound if isinstance(bound, Sequence) else (bound,) * count
