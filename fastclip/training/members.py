"""The parameters of an optimizer: their names, their order and their groups."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import Optimizer

from fastclip.core.owners import Owners, list_owners
from fastclip.rules.apply import groups_of
from fastclip.rules.catalogue import AnyRule
from fastclip.rules.groups import Groups


class Members:
    """Finds the parameters of an optimizer and their groups, and caches them.

    Args:
        names: A model or its ``named_parameters()``; None leaves the names that the optimizer or the monitor knows.
        watched: The parameters of a monitor, if there is one. They set the order.

    Raises:
        TypeError: `names` has no names.
    """

    def __init__(self, names: nn.Module | Iterable[tuple[str, Tensor]] | None, watched: Owners | None) -> None:
        self._names = _names_by_id(names)
        self._watched = watched
        self._cached: tuple[list[list[int]], AnyRule | None, tuple[Owners, Groups]] | None = None

    def find(self, optimizer: Optimizer, rule: AnyRule | None) -> tuple[Owners, Groups]:
        """Return the optimizer's parameters, and their groups under the rule. Cached for the same ones and same rule.

        Raises:
            ValueError: A parameter has no name in `names`, the monitor watches others, or the rule's bounds do not fit.
        """
        ids = [list(map(id, group_["params"])) for group_ in optimizer.param_groups]
        if self._cached is None or self._cached[0] != ids or self._cached[1] is not rule:
            owners = list_owners(optimizer.param_groups, "optimizer.param_groups")
            if self._names:
                owners = owners._replace(names=_named(owners.tensors, self._names))
            if self._watched is not None:
                owners = _in_order_of(self._watched, owners)
            self._cached = (ids, rule, (owners, _grouped(owners, rule)))
        return self._cached[2]

    def forget(self) -> None:
        """Clear the cache."""
        self._cached = None


def _names_by_id(names: nn.Module | Iterable[tuple[str, Tensor]] | None) -> dict[int, str]:
    if names is None:
        return {}
    owners = list_owners(names, "names")
    if owners.names is None:
        raise TypeError("`names` must be a model or its named_parameters()")
    return {id(tensor): name for tensor, name in zip(owners.tensors, owners.names, strict=True)}


def _named(tensors: list[Tensor], names: dict[int, str]) -> list[str]:
    missing = [position for position, tensor in enumerate(tensors) if id(tensor) not in names]
    if missing:
        shape = tuple(tensors[missing[0]].shape)
        raise ValueError(f"`names` has no name for the optimizer's parameter {missing[0]}, of shape {shape}")
    return [names[id(tensor)] for tensor in tensors]


def _in_order_of(watched: Owners, owners: Owners) -> Owners:
    """Return the optimizer's parameters in the order of the monitor, with the monitor's names if it has them."""
    positions = {id(tensor): position for position, tensor in enumerate(owners.tensors)}
    others = [position for position, tensor in enumerate(watched.tensors) if id(tensor) not in positions]
    if others or len(watched.tensors) != len(owners.tensors):
        culprit = "some of the optimizer's are missing"
        if others:
            name = watched.names[others[0]] if watched.names else f"parameters[{others[0]}]"
            culprit = f"{name!r} is not the optimizer's"
        raise ValueError(
            f"the monitor watches {len(watched.tensors)} parameters, which are not the {len(owners.tensors)} of the "
            f"optimizer: {culprit}. Make the monitor from just those that are optimized, for example "
            "[(name, p) for name, p in model.named_parameters() if p.requires_grad]"
        )
    order = [positions[id(tensor)] for tensor in watched.tensors]
    groups = None if owners.groups is None else [owners.groups[i] for i in order]
    names = watched.names or (None if owners.names is None else [owners.names[i] for i in order])
    return Owners(watched.tensors, names, groups, owners.group_count)


def _grouped(owners: Owners, rule: AnyRule | None) -> Groups:
    """Return the groups of a rule, after a check that its bounds fit them."""
    groups = groups_of(rule, owners)
    if rule is not None:
        rule.for_groups(groups.labels)
    return groups
