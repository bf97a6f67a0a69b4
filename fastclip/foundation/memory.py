"""The memory of tensors: where it lies, what shares it, and how to go through it in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int64s: TypeAlias = npt.NDArray[np.int64]


def address_of(made: Tensor) -> int:
    """Where a tensor that was just made lies.

    Raises:
        RuntimeError: It has no memory: a mode or transform has made something else of it.
    """
    try:
        address = made.data_ptr() if type(made) is Tensor else 0
    except RuntimeError:
        address = 0
    if not address:
        raise RuntimeError(
            "clipping needs tensors with memory, but a mode or function transform makes something else of tensors "
            "here: clip outside of it"
        )
    return address


def overlapping(starts: Int64s, sizes: Int64s) -> set[int]:
    """Positions of the tensors, of nonzero sizes in bytes, whose memory begins within that of another one."""
    order = starts.argsort(kind="stable")  # which is quick where they are nearly in order
    ends = np.maximum.accumulate((starts + sizes)[order])
    return set(order[1:][starts[order][1:] < ends[:-1]].tolist())


PIECE = 1 << 18
"""Elements of a gradient that torch's operations, which leave temporaries of that size, go through at a time."""


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views that make up a tensor, of at most `PIECE` elements each, cut where the strides are largest.

    A tensor of a class other than torch's own stays whole.
    """
    if tensor.numel() <= PIECE or type(tensor) not in (Tensor, torch.nn.Parameter):
        yield tensor
        return
    count = -(-tensor.numel() // PIECE)
    dim = max(range(tensor.dim()), key=lambda d: (tensor.shape[d] > 1, tensor.stride(d)))
    for part in torch.split(tensor.detach(), max(1, tensor.shape[dim] // count), dim):
        yield from pieces(part)
