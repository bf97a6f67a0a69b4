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
makes s larger by :math:`\sqrt{(1 - w)(1 + 9 w)}`, 11 % at a decay of 0.97; at decays of 1/9 and below it does not, and
such a level is not followed. What is not finite does not enter; where there were only zeros there is no scale, no
z-score, and the next value enters as it is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_FLOOR = 0.01  # of the mean: the least that s is
_REACH = 3.0  # s: how far from the mean a value may enter
_LARGEST = 1e100  # from here on squares may overflow: such a value does not enter


class Standing(NamedTuple):
    """How values stand to the averages before them; each [..., series].

    Attributes:
        mean: The mean m of what was before; 0 where that was nothing.
        s: How far from it values are wont to be.
        z: How many s the value is above the mean; NaN where that cannot be told: in the warm-up, of what is not finite,
            or after nothing but zeros.
    """

    mean: Tensor
    s: Tensor
    z: Tensor


class Averages:
    """The averages' arithmetic. The state itself is a tensor, [..., 3, series]: mean, variance, number of values.

    Args:
        decay: What is left of a mean's weight after a step, from 0 to below 1.
        warmup: The number of values from which on there are z-scores.
    """

    def __init__(self, decay: float, warmup: int) -> None:
        self.decay = decay
        self.warmup = warmup

    def compare(self, state: Tensor, values: Tensor) -> Standing:
        """Compare values, [..., series], with a state that they have not entered yet."""
        mean, variance, count = state.unbind(-2)
        s = torch.addcmul(variance, mean, mean, value=_FLOOR**2).sqrt()
        z = (values - mean) / s
        return Standing(mean, s, torch.where((count >= self.warmup) & (z.abs() < _LARGEST), z, math.nan))

    def enter(self, state: Tensor, values: Tensor, standing: Standing) -> Tensor:
        """Return the state that values, [series], leave, given how they stand to the one before."""
        mean, variance, count = state
        _, s, z = standing
        distance = torch.where(z.isnan(), values - mean, z.clamp(-_REACH, _REACH) * s)
        count = count + 1
        weight = (1 / count).clamp(min=1 - self.decay)
        step = weight * distance
        entered = torch.stack([mean + step, (1 - weight) * torch.addcmul(variance, step, distance), count])
        return torch.where(values.abs() < _LARGEST, entered, state)
