"""The memory of tensors: its address, what overlaps, and how to traverse it in pieces."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int64s: TypeAlias = npt.NDArray[np.int64]


def address_of(made: Tensor) -> int:
    """The address of a tensor that was just made.

    Raises:
        RuntimeError: It has no memory, because a mode or function transform replaces tensors by others.
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
    """The indices of the tensors that begin inside of another one, given addresses and nonzero sizes in bytes."""
    order = starts.argsort(kind="stable")  # fast for addresses that are almost sorted
    ends = np.maximum.accumulate((starts + sizes)[order])
    return set(order[1:][starts[order][1:] < ends[:-1]].tolist())


PIECE = 1 << 18
"""The number of elements that torch's operations work on at a time. It bounds their temporaries."""


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Split a tensor into views of at most `PIECE` elements, along the dimensions with the largest strides.

    A tensor subclass is not split.
    """
    if tensor.numel() <= PIECE or type(tensor) not in (Tensor, torch.nn.Parameter):
        yield tensor
        return
    count = -(-tensor.numel() // PIECE)
    dim = max(range(tensor.dim()), key=lambda d: (tensor.shape[d] > 1, tensor.stride(d)))
    for part in torch.split(tensor.detach(), max(1, tensor.shape[dim] // count), dim):
        yield from pieces(part)
