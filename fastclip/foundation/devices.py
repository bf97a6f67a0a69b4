"""Devices: numbers and arrays brought to them, their precision, streams and graph captures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastclip.foundation.tracing import cached_tensors

Scalar: TypeAlias = Tensor | float
"""One number in fp64: a 0-dim tensor on a device, or a Python float if the host knows it anyway."""

_WITHOUT_FP64 = frozenset({"mps"})


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of norms and coefficients on a device: fp64 if the device has it."""
    return torch.float32 if device.type in _WITHOUT_FP64 else torch.float64


def on(device: torch.device, scalar: Scalar) -> Tensor:
    """Copy a number to a device. A copy to the CPU waits for the number; a copy to a GPU does not."""
    if isinstance(scalar, Tensor):
        if scalar.device == device and scalar.dtype == wide_dtype(device):
            return scalar  # what `to` does, but faster
        return scalar.to(device, wide_dtype(device), non_blocking=device.type != "cpu")
    return torch.tensor(scalar, dtype=wide_dtype(device), device=device)


def stream_of(device: torch.device) -> int:
    """The handle of a GPU's current stream; 0 for a device without streams."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_read_by_graphs: list[Tensor] = []


def for_graphs(tensor: Tensor) -> Tensor:
    """Keep a tensor alive forever if a CUDA graph that reads it is being captured: nothing tells when a graph ends."""
    if is_capturing(tensor.device):
        _read_by_graphs.append(tensor)
    return tensor


def upload(array: npt.NDArray[Any], device: torch.device, *, for_every_stream: bool = False) -> Tensor:
    """Copy an array to a device. To a GPU it is an asynchronous copy from pinned memory, so without a sync.

    Torch does not reuse the pinned memory before the copy is done.

    Args:
        array: What to copy.
        device: The target.
        for_every_stream: Wait for the copy, so that any stream may read it: for what is cached for all streams.

    Raises:
        RuntimeError: A CUDA graph is being captured. It would replay the copy from memory that is freed by then.
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
    """Positions as a tensor on a device; cached."""
    return for_graphs(_index(tuple(positions), device))


@cached_tensors(64)
def _index(positions: tuple[int, ...], device: torch.device) -> Tensor:
    return upload(np.array(positions, dtype=np.int64), device, for_every_stream=True)
