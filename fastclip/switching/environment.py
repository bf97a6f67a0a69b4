"""Show which backend serves each device of this machine; compile kernels before the first step."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import nn

from fastclip.backends import choose
from fastclip.core.clipping import clip_grad_norm_, clip_grad_value_
from fastclip.core.collect import as_gradients
from fastclip.core.owners import Parameters, warn_of_empty_iterator


@dataclass(frozen=True)
class DeviceInfo:
    """The backend for gradients on one device.

    Attributes:
        device: The device, as torch names it.
        hardware: The name of the GPU, or how many threads the CPU path may use.
        backend: The backend's name, as in `FASTCLIP_BACKEND`; None if the forced backend does not support the device.
        reason: Why it is this backend.
    """

    device: str
    hardware: str
    backend: str | None
    reason: str


@dataclass(frozen=True)
class Info:
    """Versions, and the backend for each device; its ``str`` is a printable table.

    Attributes:
        versions: The version of each package that matters, or "not installed".
        devices: One entry for the CPU and for each GPU.
    """

    versions: dict[str, str]
    devices: list[DeviceInfo]

    def __str__(self) -> str:
        """Return a few lines to print or to paste into a bug report."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        devices = (f"{entry.device} ({entry.hardware}): {entry.backend}, {entry.reason}" for entry in self.devices)
        return "\n".join([versions, *devices])


def info() -> Info:
    """Find out which backend clips the gradients on each device, and why.

    Returns:
        Versions and devices, to be printed.
    """
    versions = {name: _version(name) for name in ("fastclip", "torch", "triton", "numpy")}
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return Info({"python": platform.python_version()} | versions, [_describe(device) for device in devices])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _describe(device: torch.device) -> DeviceInfo:
    threads = f"{torch.get_num_threads()} threads"
    hardware = threads if device.type == "cpu" else torch.cuda.get_device_name(device)
    try:
        choice = choose(device)
    except RuntimeError as error:
        return DeviceInfo(str(device), hardware, None, str(error))
    return DeviceInfo(str(device), hardware, choice.backend.name, choice.reason)


def warm_up(parameters: Parameters, norm_type: float = 2.0, *, norm_dtype: torch.dtype | None = None) -> None:
    """Compile and load the kernels for clipping these parameters, so that the first step does not wait for them.

    This clips stand-ins of one element, by norm and by value, on the parameters' devices and in their dtypes. It does
    not touch the parameters and their gradients. Triton caches the compiled kernels on disk for later runs.

    Args:
        parameters: The parameters that will be passed to the clipping function.
        norm_type: The order of the norm that will be passed.
        norm_dtype: The dtype of the norm that will be passed.

    Raises:
        TypeError: `parameters` holds something other than tensors.
    """
    stand_ins = []
    tensors = as_gradients(parameters).tensors
    warn_of_empty_iterator("parameters", parameters, tensors, "nothing will be compiled")
    # Integers (quantised, frozen weights) have no gradients.
    kinds = dict.fromkeys((t.device, t.dtype) for t in tensors if t.is_floating_point() or t.is_complex())
    for device, dtype in kinds:
        stand_in = nn.Parameter(torch.zeros(1, device=device, dtype=dtype))
        stand_in.grad = torch.zeros_like(stand_in)
        stand_ins.append(stand_in)
    clip_grad_norm_(stand_ins, 1.0, norm_type, norm_dtype=norm_dtype)
    clip_grad_value_([stand_in for stand_in in stand_ins if not stand_in.is_complex()], 1.0)
