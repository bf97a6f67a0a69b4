"""The error for a norm that is not finite: which gradients are the cause."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastclip.core.dtensors import local_parts
from fastclip.core.gradients import Gradients
from fastclip.foundation.devices import Scalar, is_capturing
from fastclip.foundation.memory import pieces

_MOST_NAMED = 10  # gradients in an error message


def raise_if_nonfinite(grads: Gradients, p: float, total: Scalar) -> None:
    """Raise if a norm is not finite, and name the gradients that are not.

    Args:
        grads: The gradients.
        p: The order of the norm.
        total: Their norm. If it is on a GPU, this is a sync.

    Raises:
        RuntimeError: The norm is not finite, or a CUDA graph is being captured, which forbids a sync.
    """
    if isinstance(total, Tensor) and is_capturing(total.device):
        raise RuntimeError(
            "`error_if_nonfinite` waits for the device, which is impossible while a CUDA graph is captured"
        )
    if math.isfinite(total):
        return
    parts = local_parts(grads)  # an operation on a DTensor would be a collective
    culprits = [i for i, part in enumerate(parts.tensors) if not all(piece.isfinite().all() for piece in _pieces(part))]
    named = "; ".join(_describe(parts, index) for index in culprits[:_MOST_NAMED])
    more = f"; and {len(culprits) - _MOST_NAMED} more" if len(culprits) > _MOST_NAMED else ""
    if culprits:
        reason = f"Non-finite: {named}{more}"
    elif parts is grads:
        reason = "Every gradient is finite, but their norm is beyond fp64"
    else:
        reason = "What this process has of them is finite: another one names the culprits, or the norm is beyond fp64"
    raise RuntimeError(
        f"The total norm of order {p} for gradients from `{grads.argument}` is non-finite, so it cannot be clipped. "
        "To disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`. "
        f"{reason}"
    )


def _describe(grads: Gradients, index: int) -> str:
    counts = [(int(piece.isnan().sum()), int(piece.isinf().sum())) for piece in _pieces(grads.tensors[index])]
    nans, infs = map(sum, zip(*counts, strict=True))
    return f"{grads.label(index)} ({nans} NaN, {infs} inf)"


def _pieces(grad: Tensor) -> Iterator[Tensor]:
    return pieces(grad.coalesce().values() if grad.layout is torch.sparse_coo else grad)
