"""A step as one vector on the device, so that the host reads many steps in one transfer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastclip.foundation.devices import on
from fastclip.monitoring.averages import SERIES
from fastclip.rules.apply import ClipResult


class Step(NamedTuple):
    """What is recorded about a step. Facts that the host knows without a sync are fields of their own.

    Attributes:
        number: The step's number; the first step is 1.
        has_loss: Whether there was a loss.
        has_coefficient: Whether gradients were clipped by norm.
        has_clipped_norm: Whether there were gradients with a known norm after clipping.
        present: The positions of the parameters that had a gradient.
        numbers: All numbers in one vector, see `Parts`: on the device until the host reads the step. `before`,
            `windows` and `fired` are appended when the step is judged.
    """

    number: int
    has_loss: bool
    has_coefficient: bool
    has_clipped_norm: bool
    present: Sequence[int]
    numbers: Tensor

    @property
    def known(self) -> tuple[bool, bool]:
        """Whether there was a loss, and whether there was any gradient."""
        return self.has_loss, bool(self.present)


class Parts(NamedTuple):
    """The parts of a judged step's numbers, in order. For several steps each has a first dimension [steps].

    Attributes:
        values: Loss and global norm, [2].
        coefficient: The smallest coefficient of all groups, [1].
        clipped: Whether anything was clipped: 1 or 0, [1].
        clipped_norm: The global norm after clipping, [1].
        threshold: The global norm above which gradients are scaled, [1].
        norms: The norms of the parameters' gradients, [parameters].
        weights: The norms of the parameters, [parameters]; [0] if the monitor does not take them.
        before: The state of the averages before the step, flattened, [3 x 2].
        windows: Mean and standard deviation of each window before the step, flattened, [windows x 2 x 2].
        fired: Which triggers fired: 1 or 0, [triggers].
    """

    values: Tensor
    coefficient: Tensor
    clipped: Tensor
    clipped_norm: Tensor
    threshold: Tensor
    norms: Tensor
    weights: Tensor
    before: Tensor
    windows: Tensor
    fired: Tensor


class Layout:
    """Splits the numbers of steps into their parts.

    Args:
        parameters: The number of parameters.
        triggers: The number of triggers.
        windows: The number of windows that triggers compare with.
        weights: Whether the norms of the parameters are recorded.
    """

    def __init__(self, parameters: int, triggers: int, windows: int, *, weights: bool) -> None:
        self._measured = [len(SERIES), 1, 1, 1, 1, parameters, parameters if weights else 0]
        self._judged = [*self._measured, 3 * len(SERIES), 2 * windows * len(SERIES), triggers]

    def split_measured(self, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """Return `values`, `norms` and `weights` of a measured step, which is not judged yet."""
        values, _, _, _, _, norms, weights = torch.split(step.numbers, self._measured)
        return values, norms, weights

    def split(self, step: Step) -> Parts:
        """Return the parts of a judged step."""
        return Parts(*torch.split(step.numbers, self._judged))

    def stack(self, steps: Sequence[Step]) -> Parts:
        """Return the parts of judged steps on the host, each [steps, ...]."""
        if steps:
            rows = torch.stack([step.numbers for step in steps])
        else:
            rows = torch.zeros(0, sum(self._judged), dtype=torch.float64)
        return Parts(*torch.split(rows, self._judged, dim=-1))


def measured(
    number: int, result: ClipResult, norms: Tensor, loss: Tensor | float | None, weights: Tensor | None
) -> Step:
    """Return a measured step, which is not judged yet. This costs one concatenation and no sync.

    Args:
        number: The step's number.
        result: The result of clipping.
        norms: The norms in `result`; the caller has checked that they are not None.
        loss: The loss, if there is one.
        weights: The norms of the parameters, if the monitor takes them.
    """
    like = result.norm
    clipped_norm = result.clipped_norm if result.present else None
    parts = [
        _as_vector(loss, like),
        _as_vector(like if result.present else None, like),
        _as_vector(None if result.coefficients is None else result.coefficients.min(), like),
        result.clipped.reshape(1),
        _as_vector(clipped_norm, like),
        _as_vector(_threshold(result), like),
        norms,
    ]
    if weights is not None:
        parts.append(on(like.device, weights))
    has = (loss is not None, result.coefficients is not None, clipped_norm is not None)
    return Step(number, *has, result.present, torch.cat(parts))


def _threshold(result: ClipResult) -> Tensor | None:
    """The threshold of all gradients together; None if the rule has several groups, or no threshold."""
    return result.thresholds if result.groups.is_one else None


def _as_vector(number: Tensor | float | None, like: Tensor) -> Tensor:
    """Return a number as a vector of one element; None becomes NaN. A float is filled in, as a copy would sync."""
    if isinstance(number, Tensor):
        return on(like.device, number).reshape(1)
    return torch.full((1,), math.nan if number is None else number, dtype=like.dtype, device=like.device)
