r"""Running averages of loss and norm, on the values' device and without a sync.

Each series (loss, norm) has a mean m and a variance v of the t values x that were added so far:

.. math::
    w_t = \max(1 - \text{decay},\; 1/t), \qquad d_t = x_t - m_{t-1}, \qquad
    m_t = m_{t-1} + w_t d_t, \qquad v_t = (1 - w_t)(v_{t-1} + w_t d_t^2)

For the first 1 / (1 - decay) values these are the plain mean and (population) variance of all values. After that they
are exponentially weighted. A value is compared with the averages before it:

.. math:: z_t = d_t / s_{t-1}, \qquad s^2 = v + (0.01\, m)^2

The second term of :math:`s^2` prevents alarms about rounding in a series that hardly moves. After the warm-up, a value
is clamped to :math:`m \pm 3 s` before it is added (ZClip, arXiv:2504.02507, has the same idea). So an outlier moves the
mean by 3 w s, makes s larger by a tenth, and is soon forgotten. The averages still follow a lasting change of level:
each such value makes s larger by :math:`\sqrt{(1 - w)(1 + 9 w)}`, which is 11 % at a decay of 0.97. At decays of 1/9
and below s does not grow, and they do not follow. Values that are not finite are not added. After nothing but zeros
there is no scale, so there is no z-score, and the next value is added unclamped.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SERIES = ("loss", "norm")
"""The series, in the order of every vector of values."""

_SMALLEST_S = 0.01  # in units of the mean
_LARGEST_DISTANCE = 3.0  # in units of s: values farther from the mean are clamped
LARGEST_VALUE = 1e100  # squares of larger values may overflow, so these are not added


class Comparison(NamedTuple):
    """Values compared with the averages before them; each field is [..., series].

    Attributes:
        mean: The mean m of the values before; 0 if there were none.
        s: Their standard deviation s, at least 1 % of the mean.
        z: The z-score: how many s the value is above the mean. NaN in the warm-up, for a value that is not finite, and
            after nothing but zeros.
    """

    mean: Tensor
    s: Tensor
    z: Tensor


class Averages:
    """The arithmetic of the averages. Their state is a tensor, [..., 3, series]: mean, variance, number of values.

    Args:
        decay: The share of the old mean's weight that remains after a step, from 0 to below 1.
        warmup: The number of values before the first z-score.
    """

    def __init__(self, decay: float, warmup: int) -> None:
        self.decay = decay
        self.warmup = warmup

    def compare(self, state: Tensor, values: Tensor) -> Comparison:
        """Compare values, [..., series], with the state before they are added."""
        mean, variance, count = state.unbind(-2)
        s = torch.addcmul(variance, mean, mean, value=_SMALLEST_S**2).sqrt()
        z = (values - mean) / s
        return Comparison(mean, s, torch.where((count >= self.warmup) & (z.abs() < LARGEST_VALUE), z, math.nan))

    def add(self, state: Tensor, values: Tensor, comparison: Comparison) -> Tensor:
        """Return the state after values, [series], are added, given their comparison with `state`."""
        mean, variance, count = state
        _, s, z = comparison
        distance = torch.where(z.isnan(), values - mean, z.clamp(-_LARGEST_DISTANCE, _LARGEST_DISTANCE) * s)
        count = count + 1
        weight = (1 / count).clamp(min=1 - self.decay)
        step = weight * distance
        added = torch.stack([mean + step, (1 - weight) * torch.addcmul(variance, step, distance), count])
        return torch.where(values.abs() < LARGEST_VALUE, added, state)
