"""The bounds of a rule: check the numbers, order them by group, copy them to the device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from copy import copy
from itertools import repeat
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastclip.foundation.devices import for_graphs, upload
from fastclip.foundation.tracing import cached_tensors

Bound: TypeAlias = float | Sequence[float] | Mapping[Any, float]
"""One number for all groups, a sequence with one number for each group in order, or a mapping from label to number."""


def read_bound(name: str, bound: object, read_number: Callable[[str, object], float]) -> Bound:
    """Check every number of a bound by ``read_number(name, number)``, and return the bound with its numbers as floats.

    A mapping is returned as it is: a defaultdict has numbers for more labels than it lists, so `in_order` looks its
    numbers up when the labels are known.
    """
    if isinstance(bound, Mapping):
        for number in bound.values():
            read_number(name, number)
        return bound
    if isinstance(bound, Sequence) and not isinstance(bound, (str, bytes)):
        return tuple(read_number(name, number) for number in bound)
    return read_number(name, bound)


def check_order(minimum: Bound, maximum: Bound) -> None:
    """Raise unless each minimum is at most its maximum. Does nothing for mappings, whose order is not known yet.

    Raises:
        ValueError: A minimum is above its maximum.
    """
    for low, high in _pairs(minimum, maximum):
        if low > high:
            raise ValueError(f"`clip_value_min`, {low}, is above `clip_value_max`, {high}")


def _pairs(minimum: Bound, maximum: Bound) -> Iterable[tuple[float, float]]:
    if isinstance(minimum, float) and isinstance(maximum, float):
        return [(minimum, maximum)]
    if isinstance(minimum, Mapping) or isinstance(maximum, Mapping):
        return []
    lows, highs = (repeat(bound) if isinstance(bound, float) else bound for bound in (minimum, maximum))
    return zip(lows, highs, strict=False)  # `in_order` compares the lengths with the number of groups later


def in_order(name: str, bound: Bound, labels: Sequence[Hashable]) -> float | tuple[float, ...]:
    """Return the bound as one number for all groups, or as one number for each label.

    Raises:
        ValueError: A group has no bound, or a bound belongs to no group.
    """
    if isinstance(bound, float):
        return bound
    if isinstance(bound, Mapping):
        return by_label(name, bound, labels)
    if len(bound) != len(labels):
        raise ValueError(f"`{name}` has {len(bound)} bounds for {len(labels)} groups: {_first_ten(labels)}")
    return tuple(bound)


def by_label(name: str, bound: Mapping[Any, float], labels: Sequence[Hashable]) -> tuple[float, ...]:
    """Return the number of each label.

    Raises:
        ValueError: A label has no number, or a number belongs to no label.
    """
    known = set(labels)
    unknown = [label for label in bound if label not in known]
    if unknown:
        raise ValueError(f"`{name}` has a bound for {unknown[0]!r}, which is no group: there are {_first_ten(labels)}")
    if hasattr(bound, "__missing__"):
        bound = copy(bound)  # a defaultdict stores every label that it is asked for: do not change the caller's
    try:
        return tuple(bound[label] for label in labels)
    except KeyError as error:
        raise ValueError(f"`{name}` has no bound for the group {error}; a defaultdict gives one to the rest") from None


def _first_ten(labels: Sequence[Hashable]) -> str:
    listed = ", ".join(repr(label) for label in labels[:10])
    return f"{listed} and {len(labels) - 10} more" if len(labels) > 10 else listed


def as_tensor(bound: float | tuple[float, ...], norms: Tensor) -> Tensor:
    """Return the bound of each group, in the shape of `norms` and on their device."""
    # One number becomes a tensor too: torch computes number / tensor as number * (1 / tensor), so c / c may not be 1.
    return torch.full_like(norms, bound) if isinstance(bound, float) else for_graphs(_uploaded(norms.device, bound))


@cached_tensors(64)
def _uploaded(device: torch.device, bound: tuple[float, ...]) -> Tensor:
    """One number for each group as a cached tensor on the device, uploaded once."""
    return upload(np.array(bound), device, for_every_stream=True)
