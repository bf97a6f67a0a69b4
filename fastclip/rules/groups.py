"""Groups of gradients, each of which a rule clips by itself.

A set of groups is a label for each group, and for each parameter the position of its group. Norms of groups come from
the norms of their parameters, on the device, without a sync and in a fixed order, so that they are the same to the bit
in every run: no atomics.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from fastclip.core.owners import Owners
from fastclip.foundation.arithmetic import norm_of_norms
from fastclip.foundation.devices import for_graphs, index_of, upload
from fastclip.foundation.tracing import cached_tensors

By: TypeAlias = Literal["global", "parameter", "layer", "group"] | Callable[[str], Hashable] | Sequence[Hashable]
"""What a group is: all gradients ("global"), each by itself ("parameter"), those of one module ("layer": names that
differ only in what follows the last dot), one of the optimizer's parameter groups ("group"); or a function from a
parameter's name to its group's label; or the labels themselves, one a parameter."""

_WIDTH = 64  # norms that are combined at a time: what shorter groups are padded to


@dataclass(frozen=True)
class Groups:
    """Who belongs together.

    Attributes:
        labels: Each group's label: "all", a parameter's or module's name, a parameter group's position, or a label of
            the caller's.
        of: For each parameter, with or without gradient, the position of its group.
    """

    labels: tuple[Hashable, ...]
    of: tuple[int, ...]

    @property
    def is_one(self) -> bool:
        """Whether all parameters are one group."""
        return len(self.labels) == 1

    @cached_property
    def is_each(self) -> bool:
        """Whether every parameter is a group of its own."""
        return self.of == tuple(range(len(self.labels)))

    def combine(self, norms: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the groups' 2-norms, [groups], from the parameters', [parameters], of gradients of a dtype."""
        if self.is_each:
            return norms
        for index in map(for_graphs, _levels(self.of, len(self.labels), norms.device)):
            padded = torch.cat([norms, norms.new_zeros(1)])
            norms = norm_of_norms(padded[index], dtype, 1)
        return norms

    def spread(self, values: Tensor) -> Tensor:
        """Return each parameter's share, [parameters], of values for each group, [groups]."""
        return values if self.is_each else values[index_of(self.of, values.device)]


def group(owners: Owners, by: By) -> Groups:
    """Group parameters, with or without gradients.

    Raises:
        TypeError: `by` is none of what it may be.
        ValueError: `by` needs names or parameter groups that were not given, or has another number of labels.
    """
    if not isinstance(by, str):
        return _labelled(_labels(owners, by))
    count = len(owners.tensors)
    if by == "global":
        return Groups(("all",), (0,) * count)
    if by == "parameter":
        return Groups(tuple(owners.names or range(count)), tuple(range(count)))
    if by == "layer":
        return _labelled(_labels(owners, _module_of))
    if by == "group":
        if owners.groups is None:
            raise ValueError("by='group' needs parameter groups: pass optimizer.param_groups, or attach the rule")
        return Groups(tuple(range(owners.group_count)), tuple(owners.groups))
    raise _no_grouping(by)


def _labels(owners: Owners, by: Callable[[str], Hashable] | Sequence[Hashable]) -> Sequence[Hashable]:
    """The label of each parameter's group."""
    if callable(by):
        if owners.names is None:
            raise ValueError("`by` goes by names: pass a model or model.named_parameters()")
        return [by(name) for name in owners.names]
    if not isinstance(by, Sequence):
        raise _no_grouping(by)
    if len(by) != len(owners.tensors):
        raise ValueError(f"`by` has {len(by)} labels for {len(owners.tensors)} parameters")
    return by


def _no_grouping(by: object) -> TypeError:
    known = "'global', 'parameter', 'layer', 'group'"
    return TypeError(f"`by` must be one of {known}, a function of a parameter's name, or labels, not {by!r}")


def _module_of(name: str) -> str:
    return name.rpartition(".")[0] or name


def _labelled(labels: Sequence[Hashable]) -> Groups:
    """Groups in the order in which their labels come first."""
    positions: dict[Hashable, int] = {}
    try:
        # NumPy's numbers and strings as Python's own, which a checkpoint can hold.
        plain = [label.item() if isinstance(label, np.generic) else label for label in labels]
        of = tuple(positions.setdefault(label, len(positions)) for label in plain)
    except TypeError as error:
        raise TypeError(f"the labels of groups must be hashable, as strings, numbers and tuples are: {error}") from None
    return Groups(tuple(positions), of)


@cached_tensors(64)
def _levels(of: tuple[int, ...], count: int, device: torch.device) -> tuple[Tensor, ...]:
    """How to come from parameters to groups: matrices of positions, of which each row is combined to one norm.

    A long group takes several rows, whose norms the next level combines; a row is filled up with the position behind
    the last, where there is a 0. So memory stays linear in the number of parameters, whatever the groups' sizes.
    """
    levels: list[Tensor] = []
    groups = np.array(of, dtype=np.int64)
    while True:
        sizes = np.bincount(groups, minlength=count)
        width = min(_WIDTH, max(1, int(sizes.max())))
        order = np.argsort(groups, kind="stable")
        within = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = np.maximum(1, -(-sizes // width))
        first_row = np.cumsum(rows) - rows
        index = np.full((int(rows.sum()), width), len(groups))
        index[first_row[groups[order]] + within // width, within % width] = order
        levels.append(upload(index, device, for_every_stream=True))
        groups = np.repeat(np.arange(count), rows)
        if len(groups) == count:
            return tuple(levels)
