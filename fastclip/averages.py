r"""Running averages, by which a monitor tells what is unusual: no sync, on whatever device the values are.

For each series (loss, norm) a mean m and a variance v, of the t values x that were entered so far:

.. math::
    w_t = \max(1 - \text{decay},\; 1/t), \qquad d_t = x_t - m_{t-1}, \qquad
    m_t = m_{t-1} + w_t d_t, \qquad v_t = (1 - w_t)(v_{t-1} + w_t d_t^2)

So up to 1 / (1 - decay) values the two are the plain mean and (population) variance of all values, and from there on
exponentially weighted ones. A value is compared with what was before it:

.. math:: z_t = d_t / s_{t-1}, \qquad s^2 = v + (0.01\, m)^2

The second term keeps a series that hardly moves from raising alarms about rounding. Once warmed up, a value enters as
at most :math:`m \pm 3 s` (ZClip, arXiv:2504.02507, has the same idea): an outlier moves the mean by 3 w s, makes s
larger by a tenth, and is forgotten soon. A level that changed for good is followed all the same, for each such value
makes s larger by :math:`\sqrt{(1 - w)(1 + 9 w)}`, 11 % at a decay of 0.97. What is not finite does not enter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_FLOOR = 0.01  # of the mean: the least that s is
_REACH = 3.0  # s: how far from the mean a value may enter
_LARGEST = 1e100  # from here on squares may overflow: such a value does not enter


class Averages:
    """Means and variances of some series.

    Args:
        series: How many there are.
        decay: What is left of a mean's weight after a step, from 0 to below 1.
        warmup: The number of values from which on there are z-scores.
    """

    def __init__(self, series: int, decay: float, warmup: int) -> None:
        self.decay = decay
        self.warmup = warmup
        self.state = torch.zeros(3, series, dtype=torch.float64)
        """Mean, variance, number of values."""

    def enter(self, values: Tensor) -> Tensor:
        """Enter a value into each series.

        Args:
            values: [series], fp64. What is not finite is left out.

        Returns:
            Mean, s and z-score of `values` as they were before: [3, series]. Mean and s are NaN as long as there was no
            value, z-scores during the warm-up and of what is not finite.
        """
        self.state = self.state.to(values)
        mean, variance, count = self.state
        s = torch.addcmul(variance, mean, mean, value=_FLOOR**2).sqrt()
        distance = values - mean
        is_usable = values.abs() < _LARGEST
        is_warm = count >= self.warmup
        z = torch.where(is_usable & is_warm, distance / s, math.nan)
        before = torch.where(count > 0, torch.stack([mean, s, z]), math.nan)

        # Nothing but zeros leaves no scale by which a value could be too large: the next one enters as it is.
        reach = torch.where(is_warm & (s > 0), s * _REACH, math.inf)
        distance = torch.where(is_usable, torch.clamp(distance, -reach, reach), 0.0)
        count = count + is_usable
        weight = (1 / count).clamp(1 - self.decay, 1.0) * is_usable
        step = weight * distance
        self.state = torch.stack([mean + step, (1 - weight) * torch.addcmul(variance, step, distance), count])
        return before
