"""What the caller passed, as a list of parameters with the names and groups that it gave."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor, nn

from fastclip.foundation.warn import warn_caller

Parameters: TypeAlias = Tensor | nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
"""A tensor, a module, tensors, (name, tensor) pairs, or parameter groups as in ``optimizer.param_groups``."""


class Owners(NamedTuple):
    """The parameters that own the gradients.

    Attributes:
        tensors: The parameters. For `get_total_norm`: the tensors whose norm is taken.
        names: Their names, if the caller gave names.
        groups: The index of each parameter's group, if the caller gave parameter groups.
        group_count: The number of parameter groups, empty ones included.
    """

    tensors: list[Tensor]
    names: list[str] | None = None
    groups: list[int] | None = None
    group_count: int = 0


def list_owners(parameters: Parameters, argument: str) -> Owners:
    """List what the caller passed as `argument`.

    Raises:
        TypeError: It is not iterable.
    """
    if isinstance(parameters, Tensor):
        return Owners([parameters])
    # A ParameterList is iterated, as torch does: a parameter that it holds twice counts twice.
    if isinstance(parameters, nn.Module) and not isinstance(parameters, nn.ParameterList):
        parameters = parameters.named_parameters()
    try:
        iterator: Iterator[Any] = iter(parameters)
    except TypeError:
        message = f"`{argument}` must be a tensor, an iterable of tensors or a module, not {type(parameters).__name__}"
        raise TypeError(message) from None
    items = list(iterator)
    if items and isinstance(items[0], Tensor):
        return Owners(items)
    if items and _is_named(items[0]) and all(map(_is_named, items)):
        return Owners([tensor for _, tensor in items], [name for name, _ in items])
    if items and _is_group(items[0]) and all(map(_is_group, items)):
        return _of_groups(items, argument)
    return Owners(items)


def _of_groups(groups: Sequence[dict[str, Any]], argument: str) -> Owners:
    """List parameter groups. An optimizer made from named parameters has their names in "param_names"."""
    parts = [list_owners(group["params"], argument) for group in groups]
    for position, (group, part) in enumerate(zip(groups, parts, strict=True)):
        name = f"{argument}[{position}]['params']"
        warn_of_empty_iterator(name, group["params"], part.tensors, "no gradient clipping will occur.")
    names = [part.names or group.get("param_names", ()) for part, group in zip(parts, groups, strict=True)]
    are_named = all(len(own) == len(part.tensors) for own, part in zip(names, parts, strict=True))
    return Owners(
        [tensor for part in parts for tensor in part.tensors],
        [name for own in names for name in own] if are_named else None,
        [position for position, part in enumerate(parts) for _ in part.tensors],
        len(parts),
    )


def _is_named(item: object) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], Tensor)


def _is_group(item: object) -> bool:
    return isinstance(item, dict) and "params" in item


_REMEDIES = (
    (dict, "pass parameter groups only, or their 'params'"),
    (str, "pass the values of a dict rather than the dict, and (name, tensor) pairs in a list"),
    (tuple, "pass tensors only, or (name, tensor) pairs only"),
    (list, "pass one flat list"),
    (nn.Module, "pass the module itself, or its parameters()"),
)


def not_a_tensor(items: Sequence[object], argument: str, *, attribute: str) -> TypeError:
    """The error for a list with an item that lacks an attribute of tensors; it names the first such item."""
    position, culprit = next((i, item) for i, item in enumerate(items) if not hasattr(item, attribute))
    remedies = [remedy for kind, remedy in _REMEDIES if isinstance(culprit, kind)]
    remedy = [*remedies, "pass tensors, or (name, tensor) pairs as model.named_parameters() yields"][0]
    return TypeError(f"{argument}[{position}] is a {type(culprit).__name__}, not a tensor: {remedy}")


def warn_of_empty_iterator(argument: str, given: object, listed: Sequence[object], consequence: str) -> None:
    """Warn if the caller passed an iterator that yielded nothing: most likely it was used up before."""
    if not listed and isinstance(given, Iterator):
        kind = "generator" if isinstance(given, types.GeneratorType) else "iterator"
        warn_caller(f"`{argument}` is an empty {kind}, {consequence}")


def warn_of_no_parameters(tensors: Sequence[Tensor]) -> None:
    """Warn if none of the tensors can have a gradient: they are gradients themselves, or frozen parameters."""
    if tensors and not any(map(_may_have_a_gradient, tensors)):
        warn_caller(
            f"none of the {len(tensors)} tensors in `parameters` has a gradient or requires one: nothing is clipped. "
            "Pass parameters, not their gradients, and such as are not frozen"
        )


def _may_have_a_gradient(owner: object) -> bool:
    return not isinstance(owner, Tensor) or (owner.requires_grad and (owner.is_leaf or owner.retains_grad))
