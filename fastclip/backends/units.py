"""Clipping of units by torch's operations; see `fastclip.backends.interface.Plan.clip_units_`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.foundation.arithmetic import stable_norm
from fastclip.foundation.devices import on, wide_dtype
from fastclip.foundation.memory import PIECE


def clip_units_(grad: Tensor, weight: Tensor, ratio: Tensor, eps: float) -> Tensor:
    """Clip each row of dimension 0 of a real gradient by the norm of the same row of its weight.

    Args:
        grad: The gradient, [units, ...], written in place.
        weight: Its weight, of the same shape.
        ratio: The largest ratio of the norms: 0-dim, on the gradient's device.
        eps: The least norm of the weight.

    Returns:
        Whether any row was scaled: 0-dim bool.
    """
    rows = max(1, PIECE * len(grad) // grad.numel())  # at a time: it bounds the temporaries
    pairs = zip(torch.split(grad, rows), torch.split(weight, rows), strict=True)
    return torch.stack([_clip_rows_(*pair, ratio, eps) for pair in pairs]).any()


def _clip_rows_(grad: Tensor, weight: Tensor, ratio: Tensor, eps: float) -> Tensor:
    """The same for a few rows."""
    wide = grad.to(wide_dtype(grad.device))
    norms, weights = (stable_norm(x.reshape(len(x), -1), 2.0, 1) for x in (wide, weight.to(wide.dtype)))
    thresholds = on(grad.device, ratio) * weights.clamp(min=eps)
    is_above = norms > thresholds
    coefficients = torch.where(is_above, thresholds / norms.clamp(min=1e-6), 1.0)
    grad.copy_(wide.mul_(coefficients.reshape(-1, *[1] * (grad.dim() - 1))))
    return is_above.any()
