"""The backends there are, and which one serves a device.

`FASTCLIP_BACKEND` forces one on every device. A forced backend that cannot serve raises; one that was chosen
automatically and cannot serve gives way to the next one, in the end to torch, and says so once.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from fastclip.backends.interface import Plan
from fastclip.foundation.warn import warn_caller

ENVIRONMENT_VARIABLE = "FASTCLIP_BACKEND"


@dataclass(frozen=True)
class Backend:
    """One way to reduce, scale and clamp; its module is imported when it is first needed.

    Attributes:
        name: What it is called in `FASTCLIP_BACKEND`.
        summary: How it works, in a few words.
        devices: The types of device that it is a choice for.
        by_address: Whether its plans know gradients by their addresses only, and so may be kept, and moved to others.
    """

    name: str
    summary: str
    devices: frozenset[str]
    by_address: bool

    @cached_property
    def _module(self) -> ModuleType:
        return importlib.import_module(f"fastclip.backends.{self.name}")

    def plan(self, tensors: list[Tensor]) -> Plan:
        """Prepare tensors of one device that do not overlap."""
        plan: Plan = self._module.plan(tensors)
        return plan

    def here(self) -> str:
        """How it works on this machine."""
        return getattr(self._module, "HERE", self.summary)

    def obstacle(self, device: torch.device) -> str | None:
        """Why this backend cannot serve the device, or None."""
        reason: str | None = self._module.obstacle(device)
        return reason


TRITON = Backend("triton", "fused Triton kernels over a chunk table", frozenset({"cuda"}), by_address=True)
NATIVE = Backend("native", "kernels in C over a table of gradients", frozenset({"cpu"}), by_address=True)
NUMPY = Backend("numpy", "NumPy over zero-copy views", frozenset({"cpu"}), by_address=False)
TORCH = Backend("torch", "torch's own operations, tensor by tensor", frozenset(), by_address=False)
BACKENDS = {backend.name: backend for backend in (TRITON, NATIVE, NUMPY, TORCH)}
"""In the order in which they are chosen."""


def for_device(device: torch.device) -> Backend:
    """The backend for plain gradients on a device: the forced one, or the first choice that has no obstacle.

    Raises:
        RuntimeError: The forced backend does not exist or cannot serve the device.
    """
    choice = choose(device)
    if choice.fell_back:
        _warn_once(f"fastclip uses {choice.backend.summary}, for gradients on {device.type}: {choice.reason}")
    return choice.backend


@dataclass(frozen=True)
class Choice:
    """A backend, why it is this one, and whether it had to stand in for the first choice."""

    backend: Backend
    reason: str
    fell_back: bool = False


def choose(device: torch.device) -> Choice:
    """Choose as `for_device` does, and tell why.

    Raises:
        RuntimeError: The forced backend does not exist or cannot serve the device.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced:
        return Choice(_forced(forced, device), f"forced by {ENVIRONMENT_VARIABLE}")
    obstacles: list[str] = []
    for backend in BACKENDS.values():
        if device.type in backend.devices:
            obstacle = backend.obstacle(device)
            if obstacle is None:
                return Choice(backend, "; ".join(obstacles) or backend.here(), fell_back=bool(obstacles))
            obstacles.append(f"{backend.name} cannot: {obstacle}")
    return Choice(TORCH, "; ".join(obstacles) or f"no faster backend serves {device.type}", fell_back=bool(obstacles))


def _forced(name: str, device: torch.device) -> Backend:
    known = "; ".join(f"{backend.name}: {backend.summary}" for backend in BACKENDS.values())
    if name not in BACKENDS:
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE}={name!r} names no backend. There are: {known}")
    reason = BACKENDS[name].obstacle(device)
    if reason:
        raise RuntimeError(
            f"{ENVIRONMENT_VARIABLE}={name} cannot serve gradients on {device}: {reason}. There are: {known}. "
            "Unset the variable to choose by the gradients' device"
        )
    return BACKENDS[name]


_warned: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warn_caller(message, RuntimeWarning)
