"""The rule of the global norm, which all backends share: from a norm to a coefficient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastclip.backends.interface import Reduction, Unscaling
from fastclip.foundation.devices import Scalar

EPS = 1e-6
"""Added to the norm before the division, as torch does. It keeps the coefficient finite if the norm is 0."""


def reduction(total: Tensor, max_norm: float, dtype: torch.dtype, unscaling: Unscaling | None = None) -> Reduction:
    """Apply the rule to a total by torch's operations, so without a sync."""
    if unscaling is None:
        return Reduction(total.to(dtype), total, clip_coefficient(total, max_norm))
    # The norm of finite gradients does not overflow. So it is not finite exactly if one of the gradients is not.
    unscaling.found_inf.masked_fill_(~total.isfinite(), 1.0)
    total = total * unscaling.inv_scale
    return Reduction(total.to(dtype), total, clip_coefficient(total, max_norm) * unscaling.inv_scale)


def clip_coefficient(total: Scalar, max_norm: float) -> Scalar:
    """``min(max_norm / (total + 1e-6), 1)`` in fp64 if the device has it; NaN if the total is NaN."""
    if max_norm == math.inf:  # nothing is clipped, whatever the norm; inf / inf would be NaN
        return torch.ones_like(total) if isinstance(total, Tensor) else 1.0
    coefficient = max_norm / (total + EPS)
    if isinstance(coefficient, Tensor):
        return torch.clamp(coefficient, max=1.0)
    return 1.0 if coefficient > 1 else coefficient
