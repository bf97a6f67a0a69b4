"""The backends, and the choice of one for a device.

`FASTCLIP_BACKEND` forces a backend on every device; if it cannot serve a device, that is an error. Without it the first
backend that can serve the device is chosen, in the end torch's own operations. If that is not the first choice, a
warning says so once.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastclip.backends.interface import Adaptation, Plan
from fastclip.foundation.warn import warn_caller

ENVIRONMENT_VARIABLE = "FASTCLIP_BACKEND"


@dataclass(frozen=True)
class Backend:
    """One way to do what `fastclip.backends.interface` asks for. Its module is imported on first use.

    Attributes:
        name: Its name in `FASTCLIP_BACKEND`, and that of its module.
        summary: How it works, in a few words.
        devices: The types of device that it is chosen for.
        by_address: Whether its plans hold addresses rather than tensors, so that they can be cached and moved.
        launches: Whether it launches kernels on a stream, which a CUDA graph may be capturing.
    """

    name: str
    summary: str
    devices: frozenset[str] = frozenset()
    by_address: bool = False
    launches: bool = False

    @cached_property
    def _module(self) -> ModuleType:
        return importlib.import_module(f"fastclip.backends.{self.name}")

    def plan(self, tensors: list[Tensor]) -> Plan:
        """Prepare tensors of one device that do not overlap."""
        plan: Plan = self._module.plan(tensors)
        return plan

    def adapt(self, adaptation: Adaptation, state: Tensor, norms: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients and the thresholds of an adaptive rule, and update its state."""
        results: tuple[Tensor, Tensor] = self._module.adapt(adaptation, state, norms, total)
        return results

    def here(self) -> str:
        """How it works on this machine, in a few words."""
        return getattr(self._module, "HERE", self.summary)

    def obstacle(self, device: torch.device) -> str | None:
        """Why this backend cannot serve the device, or None."""
        reason: str | None = self._module.obstacle(device)
        return reason


TRITON = Backend(
    "triton", "fused Triton kernels over a chunk table", frozenset({"cuda"}), by_address=True, launches=True
)
NATIVE = Backend("native", "kernels in C over a table of gradients", frozenset({"cpu"}), by_address=True)
NUMPY = Backend("numpy", "NumPy over zero-copy views", frozenset({"cpu"}))
TORCH = Backend("torch", "torch's own operations, tensor by tensor")

BACKENDS = {backend.name: backend for backend in (TRITON, NATIVE, NUMPY, TORCH)}
"""In the order in which they are tried."""

GENERAL = TORCH
"""The backend for tensors of any kind, on any device."""

# `os.environ.get` takes 7 µs with cold caches, and the dict below it 2.
_environ: Any = os.environ
forced: Callable[[], object] = (
    partial(_environ._data.get, _environ.encodekey(ENVIRONMENT_VARIABLE))
    if hasattr(_environ, "_data")
    else partial(_environ.get, ENVIRONMENT_VARIABLE)
)
"""The value of `FASTCLIP_BACKEND` now, as the operating system encodes it, or None."""


def for_device(device: torch.device) -> Backend:
    """The backend for plain gradients on a device: the forced one, or the first one without an obstacle.

    Raises:
        RuntimeError: The forced backend does not exist or cannot serve the device.
    """
    choice = choose(device)
    if choice.fell_back:
        _warn_once(f"fastclip uses {choice.backend.summary}, for gradients on {device.type}: {choice.reason}")
    return choice.backend


def for_each_step(device: torch.device) -> Backend:
    """The same, cached for each value of `FASTCLIP_BACKEND`: the choice itself looks at the driver."""
    return _for_each_step(device, forced())


@lru_cache(maxsize=64)
def _for_each_step(device: torch.device, _forced: object) -> Backend:
    return for_device(device)


@dataclass(frozen=True)
class Choice:
    """A backend, the reason for it, and whether it replaces the first choice."""

    backend: Backend
    reason: str
    fell_back: bool = False


def choose(device: torch.device) -> Choice:
    """Choose as `for_device` does, and give the reason.

    Raises:
        RuntimeError: The forced backend does not exist or cannot serve the device.
    """
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if name:
        return Choice(_forced(name, device), f"forced by {ENVIRONMENT_VARIABLE}")
    obstacles: list[str] = []
    for backend in BACKENDS.values():
        if device.type in backend.devices:
            obstacle = backend.obstacle(device)
            if obstacle is None:
                return Choice(backend, "; ".join(obstacles) or backend.here(), fell_back=bool(obstacles))
            obstacles.append(f"{backend.name} cannot: {obstacle}")
    return Choice(GENERAL, "; ".join(obstacles) or f"no faster backend serves {device.type}", fell_back=bool(obstacles))


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
