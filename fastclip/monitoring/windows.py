r"""Plain statistics of loss and norm over the last values, on the device, without a sync.

Of the last n values x before this one, at most `window` of them:

.. math:: m = \frac{1}{n} \sum x, \qquad s^2 = \frac{1}{n - 1} \sum (x - m)^2

A value is compared with them as soon as n + 1 is at least half of the window (and n at least 2). Values that are not
finite, or whose squares would not be (above 1e100), are not entered; outliers are. After a constant series s is 0, and
any rise is a jump. These are the statistics of OLMo's ``SkipStepOptimizer`` (ai2-olmo-core 3.0.0), which lets values
that are not finite in, and so skips all steps until they have left.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fastclip.monitoring.averages import LARGEST_VALUE, SERIES, Comparison


class Windows:
    """The arithmetic of the windows. Their state is a tensor, [longest window, series], with the newest value last.

    Args:
        lengths: The windows, in values.

    Attributes:
        lengths: The windows, each once.
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        self.lengths = sorted(set(lengths))

    def first(self) -> Tensor:
        """The state before the first value: NaN in the place of each value."""
        return torch.full((max(self.lengths, default=0), len(SERIES)), math.nan, dtype=torch.float64)

    def compare(self, state: Tensor, values: Tensor) -> dict[int, Comparison]:
        """Compare values, [series], with each window before they are added."""
        return {length: _compare(state[-length:], values) for length in self.lengths}

    def add(self, state: Tensor, values: Tensor) -> Tensor:
        """Return the state after values, [series], are added."""
        if not self.lengths:
            return state
        return torch.where(values.abs() < LARGEST_VALUE, torch.cat([state[1:], values.unsqueeze(0)]), state)

    def restored(self, saved: Tensor) -> Tensor:
        """Return the state of a checkpoint, whose longest window may be another: the last values that fit."""
        state = self.first()
        count = min(len(saved), len(state)) if saved.dim() == 2 else 0
        if count:
            state[-count:] = saved[-count:]
        return state


def _compare(window: Tensor, values: Tensor) -> Comparison:
    is_known = ~window.isnan()
    count = is_known.sum(0)
    mean = window.nansum(0) / count
    squares = torch.where(is_known, window - mean, 0.0).square().sum(0)
    s = (squares / (count - 1)).sqrt()  # NaN for a single value
    z = (values - mean) / s
    is_due = (count + 1 >= len(window) // 2) & values.isfinite()
    return Comparison(mean, s, torch.where(is_due, z, math.nan))
