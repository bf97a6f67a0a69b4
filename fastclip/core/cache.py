"""The cache of what was prepared for gradients in earlier calls.

Training clips alike gradients again and again, at new addresses in each step, since `zero_grad(set_to_none=True)` frees
them. So a cache entry keeps what does not depend on addresses: the dispatch to backends, and the plans' tables of
sizes. It also keeps guards on all that these depend on: type, dtype, device, sizes, strides and dispatch keys of every
gradient. The guards run in every call, and an entry is reused only if they all pass.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastclip.core.planned import Dispatch, Planned
from fastclip.foundation.devices import is_capturing

# Private to torch. Without it nothing is cached, and every call plans anew.
TensorGuards: Any = getattr(getattr(torch._C._dynamo, "guards", None), "TensorGuards", None)

_Key: TypeAlias = tuple[object, ...]

_CAPACITY = 16_384
"""Gradients in the cache of a thread, at about 1 KB each: a few large models that are trained in turns."""
_LEAST = 8
"""An entry counts as this many gradients at least, so that 2048 entries fit: parameters that are clipped one by one."""


class Entry:
    """Prepared gradients, and the guards that tell whether other gradients are alike."""

    def __init__(self, tensors: Sequence[Tensor], addresses: list[int], prepared: Planned) -> None:
        self.dispatch = prepared.dispatch
        self.fits = _guards(tensors)
        self._addresses = addresses
        self._prepared = prepared

    def at(self, addresses: list[int]) -> Planned | None:
        """What is prepared, for gradients at these addresses; None if the plans cannot serve them there."""
        if addresses != self._addresses:
            moved = self._prepared.moved(addresses)
            if moved is None:
                return None
            self._addresses, self._prepared = addresses, moved
        return self._prepared


def _guards(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function that tells whether other tensors equal these in everything that torch knows, except their memory.

    `torch.compile` checks its inputs with it: 40 ns a tensor, where attributes compared in Python take 500. It compares
    types, dtypes, devices, sizes, strides and dispatch keys; the latter differ for sparse, negated, inference and other
    tensors. It fails for a list that has a tensor twice.
    """
    sizes, strides = [list(tensor.shape) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    check: Callable[..., bool] = guards.check
    return check


class Cache(threading.local):
    """Entries by a key that is cheap to make; several entries may share a key. The oldest entry is dropped first.

    Each thread has its own: the workspaces of plans must not be used by two threads at once.
    """

    def __init__(self) -> None:
        self.entries: dict[_Key, list[Entry]] = {}
        self.gradients = 0
        self._ages: OrderedDict[Entry, _Key] = OrderedDict()

    def find(self, key: _Key, tensors: Sequence[Tensor]) -> Entry | None:
        """The entry that fits the tensors and the current streams."""
        for entry in self.entries.get(key, ()):
            if entry.fits(*tensors) and (not entry.dispatch.streams or _may_use(entry.dispatch)):
                return entry
        return None

    def add(self, key: _Key, entry: Entry) -> None:
        """Add an entry, and drop the oldest ones beyond the capacity."""
        self.entries.setdefault(key, []).insert(0, entry)
        self._ages[entry] = key
        self.gradients += max(entry.dispatch.count, _LEAST)
        while self.gradients > _CAPACITY and len(self._ages) > 1:
            oldest, its_key = self._ages.popitem(last=False)
            self.gradients -= max(oldest.dispatch.count, _LEAST)
            self.entries[its_key].remove(oldest)
            if not self.entries[its_key]:
                del self.entries[its_key]


def _may_use(dispatch: Dispatch) -> bool:
    """Whether the plans may be used now: on their own streams, or on any stream in a capture, which gets copies."""
    return is_capturing(dispatch.device) or dispatch.is_for_the_current_streams()
