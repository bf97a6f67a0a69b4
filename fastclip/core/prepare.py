"""Make gradients ready to be clipped: a cache hit in all steps of a training except the first.

Gradients --cache--> Planned          the hot path
Gradients --plan---> Planned          the first time
Gradients ---------> Sharded          where DTensors are among them
"""

from __future__ import annotations

from fastclip.backends import forced
from fastclip.core.cache import Cache, Entry, TensorGuards
from fastclip.core.first_time import plan
from fastclip.core.gradients import Gradients
from fastclip.core.planned import Planned
from fastclip.core.prepared import Prepared
from fastclip.core.sharding.sharded import Sharded
from fastclip.foundation.devices import is_capturing
from fastclip.foundation.tracing import is_traced, is_watched

_cache = Cache()


def prepare(grads: Gradients, *, in_place: bool) -> Prepared:
    """Make gradients ready to be clipped together, by this process or by all processes that have parts of them.

    Args:
        grads: At least one gradient, or a parameter that is a DTensor.
        in_place: Whether they will be written.

    Raises:
        RuntimeError: A gradient has no norm or cannot be written, or the backend that `FASTCLIP_BACKEND` forces cannot
            serve its device.
    """
    tensors, addresses = grads.tensors, grads.addresses
    if addresses is None or (is_watched() and is_traced()):  # the cache's guards see all other ways to trace
        return _uncached(grads, in_place=in_place)
    first = tensors[0]
    key = (len(tensors), first.numel(), in_place, forced())
    entry = _cache.find(key, tensors)
    prepared = None if entry is None else entry.at(addresses)
    if (entry is None or entry.dispatch.may_be_captured) and is_capturing(first.device):
        return _captured(prepared)
    if prepared is None:
        prepared = plan(grads, in_place=in_place)
        if TensorGuards is not None and prepared.dispatch.is_by_address:
            _cache.add(key, Entry(tensors, addresses, prepared))
    return prepared


def _uncached(grads: Gradients, *, in_place: bool) -> Prepared:
    if grads.has_dtensors:
        return Sharded(grads, prepare, in_place=in_place)
    return plan(grads, in_place=in_place)


_captures: list[Planned] = []
"""What CUDA graphs replay from. Nothing tells when a graph ends, so this is never freed."""


def _captured(prepared: Planned | None) -> Planned:
    """Copy what was prepared before the capture, with workspaces that only the CUDA graph uses."""
    if prepared is None:
        raise RuntimeError(
            "a CUDA graph is being captured, and nothing was prepared for these gradients before: make the same call "
            "once ahead of the capture, with the same gradients (a sparse or strided gradient, or one of another type, "
            "has to be clipped outside of the graph)"
        )
    _captures.append(prepared.captured())
    return _captures[-1]
