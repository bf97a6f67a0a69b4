"""Devices: what precision they have, their streams and captures, and how numbers get there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastclip.foundation.tracing import kept

Scalar: TypeAlias = Tensor | float
"""One number in fp64: 0-dim on a device, or a Python float where it is on the host anyway."""

_WITHOUT_FP64 = frozenset({"mps"})


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of norms and coefficients on a device: fp64 where it has that."""
    return torch.float32 if device.type in _WITHOUT_FP64 else torch.float64


def on(device: torch.device, scalar: Scalar) -> Tensor:
    """Bring a number to a device. To the CPU it waits, for what is read there must have arrived."""
    if isinstance(scalar, Tensor):
        if scalar.device == device and scalar.dtype == wide_dtype(device):
            return scalar  # as `to` would, but sooner
        return scalar.to(device, wide_dtype(device), non_blocking=device.type != "cpu")
    return torch.tensor(scalar, dtype=wide_dtype(device), device=device)


def stream_of(device: torch.device) -> int:
    """The handle of a GPU's current stream; 0 where there are no streams."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_read_by_graphs: list[Tensor] = []


def for_graphs(tensor: Tensor) -> Tensor:
    """Keep a tensor for good if a CUDA graph is being captured that is to read it: nobody tells when a graph ends."""
    if is_capturing(tensor.device):
        _read_by_graphs.append(tensor)
    return tensor


def upload(array: npt.NDArray[Any], device: torch.device, *, for_every_stream: bool = False) -> Tensor:
    """Copy to a device; to a GPU without a sync, by pinned memory that torch does not reuse before the copy is done.

    Args:
        array: What to copy.
        device: Where to.
        for_every_stream: Wait for the copy, so that any stream may read it; for what is kept whatever the stream.

    Raises:
        RuntimeError: A CUDA graph is being captured, which would replay from memory that is gone by then.
    """
    host = torch.from_numpy(np.ascontiguousarray(array))
    if is_capturing(device):
        raise RuntimeError(
            "fastclip cannot upload tables while a CUDA graph is captured. Make the same call once before the capture, "
            "with the same gradients"
        )
    if device.type != "cuda" or for_every_stream:
        return host.to(device)
    return host.pin_memory().to(device, non_blocking=True)


def index_of(positions: Sequence[int], device: torch.device) -> Tensor:
    """Positions as a tensor on a device, uploaded once."""
    return for_graphs(_index(tuple(positions), device))


@kept(64)
def _index(positions: tuple[int, ...], device: torch.device) -> Tensor:
    return upload(np.array(positions, dtype=np.int64), device, for_every_stream=True)
