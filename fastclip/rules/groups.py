"""Groups of gradients. A rule clips each group by its own norm.

`Groups` holds a label for each group, and for each parameter the position of its group. It computes the norms of groups
from those of their parameters, on the device and without a sync. It uses no atomics: the order of the additions is
fixed, so every run returns the same bits.
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
from fastclip.foundation.memory import Int64s
from fastclip.foundation.tracing import cached_tensors

By: TypeAlias = Literal["global", "parameter", "layer", "group"] | Callable[[str], Hashable] | Sequence[Hashable]
"""What a group is: all gradients ("global"), each parameter ("parameter"), the parameters of one module ("layer": names
that differ only after the last dot), one of the optimizer's parameter groups ("group"); or a function from a
parameter's name to its group's label; or the labels themselves, one for each parameter."""

_WIDTH = 64  # the largest number of norms that one row of `_levels` combines


@dataclass(frozen=True)
class Groups:
    """The groups, and the group of each parameter.

    Attributes:
        labels: Each group's label: "all", a parameter's or module's name, a parameter group's position, or a label that
            the caller gave.
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
        """Whether each parameter is its own group, at the same position."""
        return self.of == tuple(range(len(self.labels)))

    def combine(self, norms: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return the 2-norms of the groups, [groups], from those of the parameters, [parameters].

        Args:
            norms: The 2-norm of each parameter's gradient.
            dtype: The dtype of the gradients.
        """
        if self.is_each:
            return norms
        for rows in map(for_graphs, _levels(self.of, len(self.labels), norms.device)):
            padded = torch.cat([norms, norms.new_zeros(1)])
            norms = norm_of_norms(padded[rows], dtype, 1)
        return norms

    def spread(self, values: Tensor) -> Tensor:
        """Return for each parameter, [parameters], the value of its group, given the groups' values, [groups]."""
        return values if self.is_each else values[index_of(self.of, values.device)]


def group(owners: Owners, by: By) -> Groups:
    """Group parameters, with or without gradients.

    Raises:
        TypeError: `by` is not a grouping.
        ValueError: `by` needs names or parameter groups that were not given, or has another number of labels.
    """
    if not isinstance(by, str):
        return _groups_by_label(_labels(owners, by))
    count = len(owners.tensors)
    if by == "global":
        return Groups(("all",), (0,) * count)
    if by == "parameter":
        return Groups(tuple(owners.names or range(count)), tuple(range(count)))
    if by == "layer":
        return _groups_by_label(_labels(owners, _module_of))
    if by == "group":
        if owners.groups is None:
            raise ValueError("by='group' needs parameter groups: pass optimizer.param_groups, or attach the rule")
        return Groups(tuple(range(owners.group_count)), tuple(owners.groups))
    raise _not_a_grouping(by)


def _labels(owners: Owners, by: Callable[[str], Hashable] | Sequence[Hashable]) -> Sequence[Hashable]:
    """Return the label of each parameter's group."""
    if callable(by):
        if owners.names is None:
            raise ValueError("`by` goes by names: pass a model or model.named_parameters()")
        return [by(name) for name in owners.names]
    if not isinstance(by, Sequence):
        raise _not_a_grouping(by)
    if len(by) != len(owners.tensors):
        raise ValueError(f"`by` has {len(by)} labels for {len(owners.tensors)} parameters")
    return by


def _not_a_grouping(by: object) -> TypeError:
    known = "'global', 'parameter', 'layer', 'group'"
    return TypeError(f"`by` must be one of {known}, a function of a parameter's name, or labels, not {by!r}")


def _module_of(name: str) -> str:
    return name.rpartition(".")[0] or name


def _groups_by_label(labels: Sequence[Hashable]) -> Groups:
    """Group the parameters with equal labels. Groups are ordered by the first appearance of their labels."""
    positions: dict[Hashable, int] = {}
    try:
        # A checkpoint can hold Python's numbers and strings, but not NumPy's.
        plain = [label.item() if isinstance(label, np.generic) else label for label in labels]
        of = tuple(positions.setdefault(label, len(positions)) for label in plain)
    except TypeError as error:
        raise TypeError(f"the labels of groups must be hashable, as strings, numbers and tuples are: {error}") from None
    return Groups(tuple(positions), of)


@cached_tensors(64)
def _levels(of: tuple[int, ...], count: int, device: torch.device) -> tuple[Tensor, ...]:
    """Return index matrices that lead from the norms of parameters to those of groups, one level after the other.

    Each level combines every row of its matrix to one norm. The last level has one row for each group.
    """
    levels: list[Tensor] = []
    groups = np.array(of, dtype=np.int64)
    while True:
        matrix, groups = _level(groups, count)
        levels.append(upload(matrix, device, for_every_stream=True))
        if len(groups) == count:
            return tuple(levels)


def _level(groups: Int64s, count: int) -> tuple[Int64s, Int64s]:
    """Put the members of each group into rows of at most `_WIDTH`, given the group of each member.

    A long group takes several rows, and the next level combines their norms. A short row is padded with the position
    after the last member, where `Groups.combine` puts a 0. So memory is linear in the number of members.

    Returns:
        The positions of the members in each row, [rows, width], and the group of each row, [rows].
    """
    sizes = np.bincount(groups, minlength=count)
    width = min(_WIDTH, max(1, int(sizes.max())))
    order = np.argsort(groups, kind="stable")
    within = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = np.maximum(1, -(-sizes // width))
    first_row = np.cumsum(rows) - rows
    matrix = np.full((int(rows.sum()), width), len(groups))
    matrix[first_row[groups[order]] + within // width, within % width] = order
    return matrix, np.repeat(np.arange(count), rows)
