"""The gradients of what the caller passed, and what about them must be refused before any is changed."""

from __future__ import annotations

import sys
import types
from collections.abc import Collection, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fastclip.foundation.warn import warn_caller

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

try:
    from fastclip.kernels.native import gather
except ImportError:  # it only saves time

    def gather(_owners: list[Tensor], _types: tuple[type, type], /) -> tuple[list[Tensor], list[int]] | None:
        """Leave it to Python's own way to gather gradients."""
        return None


Parameters: TypeAlias = Tensor | nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]
"""A tensor, a module, tensors, (name, tensor) pairs, or parameter groups as in ``optimizer.param_groups``."""


_c10d: Any = getattr(torch.distributed, "distributed_c10d", None)  # which not all builds of torch have
PROCESS_GROUPS: Collection[object] = getattr(_c10d, "_pg_map", ())
"""Torch's own: empty in most programs. To ask torch whether there are any takes 3 µs among cold caches."""

PLAIN_TYPES = (Tensor, nn.Parameter)
"""Those of tensors that are what they seem."""


class Owners(NamedTuple):
    """What the caller passed, as lists: the tensors, and what is known of each.

    Attributes:
        tensors: Parameters, or, for `get_total_norm`, what takes their gradients' place.
        names: Their names, where the caller gave names.
        groups: The position of each one's parameter group, where the caller gave parameter groups.
        group_count: The number of parameter groups, those without parameters among them.
    """

    tensors: list[Tensor]
    names: list[str] | None = None
    groups: list[int] | None = None
    group_count: int = 0


class Gradients(NamedTuple):
    """The gradients that are there, and what is needed to name one in an error message.

    Attributes:
        tensors: The gradients, without those that are None.
        owners: Whose they are, those without gradient included.
        positions: The position among the owners of each gradient's.
        kinds: The types of the gradients.
        argument: What the caller's argument is called.
        addresses: Where the gradients are, if that is known already: then all owners have one, of `PLAIN_TYPES`.
    """

    tensors: list[Tensor]
    owners: Owners
    positions: Sequence[int]
    kinds: set[type]
    argument: str
    addresses: list[int] | None = None

    def label(self, index: int) -> str:
        """Name one of `tensors` as the caller knows it."""
        position = self.positions[index]
        name = f" {self.owners.names[position]!r}" if self.owners.names else ""
        shape = getattr(self.owners.tensors[position], "shape", self.tensors[index].shape)
        return f"{self.argument}[{position}]{name} of shape {tuple(shape)}"


def collect(parameters: Parameters) -> Gradients:
    """Collect the gradients of a tensor, of tensors, of (name, tensor) pairs, of a module or of parameter groups.

    Where there is none, and the caller cannot have meant that, it warns.

    Raises:
        RuntimeError: No gradient is left, because optimizers have stepped inside of backward.
        TypeError: `parameters` is not iterable, or holds something that is none of these.
    """
    owners = listed(parameters, "parameters")
    grads = gradients_of(owners)
    if not grads.tensors:
        warn_of_empty_iterator("parameters", parameters, owners.tensors, "no gradient clipping will occur.")
        _warn_of_no_parameters(owners.tensors)
    return grads


def warn_of_empty_iterator(argument: str, given: object, listed: Sequence[object], consequence: str) -> None:
    """Say so where what the caller passed was an iterator that, most likely, somebody else has used up."""
    if not listed and isinstance(given, Iterator):
        kind = "generator" if isinstance(given, types.GeneratorType) else "iterator"
        warn_caller(f"`{argument}` is an empty {kind}, {consequence}")


def _warn_of_no_parameters(tensors: Sequence[Tensor]) -> None:
    """Say so where no tensor has a gradient, nor can ever have one: as gradients themselves, or frozen parameters."""
    if tensors and not any(map(_may_have_a_gradient, tensors)):
        warn_caller(
            f"none of the {len(tensors)} tensors in `parameters` has a gradient or requires one: nothing is clipped. "
            "Pass parameters, not their gradients, and such as are not frozen"
        )


def _may_have_a_gradient(owner: object) -> bool:
    return not isinstance(owner, Tensor) or (owner.requires_grad and (owner.is_leaf or owner.retains_grad))


def check_whole(grads: Gradients) -> None:
    """Refuse gradients of FSDP1's shards: each process would take the norm of its own part.

    FSDP1 marks what it has flattened. Whether that is a part shows in its shape: a flat parameter knows that of the
    whole. Of original parameters (`use_orig_params`) the parts have one dimension, and with NO_SHARD, where they are
    whole, the shapes that they always had; so where each has one dimension they count as parts.

    Raises:
        TypeError: They are so.
    """
    if not PROCESS_GROUPS or "torch.distributed.fsdp" not in sys.modules:
        return  # a look at each owner takes 30 ns
    flattened = [owner for owner in grads.owners.tensors if hasattr(owner, "_fsdp_flattened")]
    if not flattened:
        return
    originals = [owner for owner in flattened if not hasattr(owner, "_unpadded_unsharded_size")]
    if any(owner.shape != getattr(owner, "_unpadded_unsharded_size", owner.shape) for owner in flattened) or (
        originals and all(owner.dim() == 1 for owner in originals)
    ):
        raise TypeError(
            f"`{grads.argument}` are of a model sharded by FSDP1, and each process would take its own part's norm: "
            "use the model's own method, model.clip_grad_norm_(max_norm)"
        )


_PLAIN_KINDS: set[type] = set(PLAIN_TYPES)
_grad = attrgetter("grad")  # faster than a comprehension


def gradients_of(owners: Owners) -> Gradients:
    """Collect the gradients that the owners have now.

    Raises:
        RuntimeError: No gradient is left, because optimizers have stepped inside of backward.
        TypeError: An owner is not a tensor.
    """
    plain = gather(owners.tensors, PLAIN_TYPES)
    if plain is not None:
        grads, addresses = plain
        return Gradients(grads, owners, range(len(grads)), _PLAIN_KINDS, "parameters", addresses)
    try:
        grads = list(map(_grad, owners.tensors))
    except AttributeError as error:
        raise _not_a_tensor(owners.tensors, "parameters", wanted="grad") from error
    kinds = set(map(type, grads))
    if type(None) not in kinds:
        return Gradients(grads, owners, range(len(grads)), kinds, "parameters")
    positions = [position for position, grad in enumerate(grads) if grad is not None]
    _warn_if_used_up(owners.tensors, grads)
    return Gradients([grads[i] for i in positions], owners, positions, kinds - {type(None)}, "parameters")


def _warn_if_used_up(tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Say so where an optimizer may have used gradients up inside of backward: only what is left of them is clipped.

    It steps in a hook that runs when a parameter's gradient is accumulated, and frees the gradient. Other hooks of that
    kind leave the gradient, and parameters without hooks merely have none. What a hook does cannot be told, so it is
    an error only where torch's own `torch.distributed.optim` steps; torch returns a norm of 0 then.

    Raises:
        RuntimeError: It steps so for each of the parameters.
    """
    missing = [tensor for tensor, grad in zip(tensors, grads, strict=True) if grad is None and _has_hook(tensor)]
    if not missing:
        return
    message = f"{len(missing)} of {len(tensors)} parameters have no gradient, but a hook on its accumulation. "
    if torch._C._current_graph_task_id() >= 0:
        warn_caller(
            f"{message}This is inside of backward, which has not reached them yet, or an optimizer steps there and "
            "frees it: what is taken are the gradients that are there. In a hook clip its own parameter only; for a "
            "norm of all gradients, call this after backward"
        )
        return
    message += (
        "Either no backward has reached them yet, or an optimizer steps inside of backward and frees it: then nothing "
        "is left to clip. Clip each gradient in its hook, ahead of the step "
        "(fastclip.clip_grad_norm_(parameter, 1.0)), or attach a rule by parameter or by value to each optimizer "
        "(fastclip.attach(optimizer, clipnorm=1.0)). For a norm of all gradients, step after backward"
    )
    if len(missing) == len(tensors) and any(hasattr(tensor, "_in_backward_optimizers") for tensor in tensors):
        raise RuntimeError(message)
    warn_caller(message)


def _has_hook(parameter: Tensor) -> bool:
    """Whether a hook sees the accumulated gradient: one of torch's own kind, or one by `torch.distributed.optim`."""
    hooks: object = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return getattr(parameter, "requires_grad", False) and (bool(hooks) or hasattr(parameter, "_in_backward_optimizers"))


def as_gradients(tensors: Parameters) -> Gradients:
    """Take the tensors themselves for gradients, as `get_total_norm` does.

    Raises:
        TypeError: `tensors` is not iterable, or holds something that is not a tensor.
    """
    owners = listed(tensors, "tensors")
    if not all(isinstance(owner, Tensor) for owner in owners.tensors):
        raise _not_a_tensor(owners.tensors, "tensors", wanted="data_ptr")
    kinds = set(map(type, owners.tensors))
    return Gradients(owners.tensors, owners, range(len(owners.tensors)), kinds, "tensors")


def listed(parameters: Parameters, argument: str) -> Owners:
    """List what the caller passed as `argument`.

    Raises:
        TypeError: It is not iterable.
    """
    if isinstance(parameters, Tensor):
        return Owners([parameters])
    # A ParameterList is iterated as torch does, which counts a parameter that it holds twice twice.
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
    """List parameter groups, whose names torch's optimizers keep as "param_names", if they were given any."""
    parts = [listed(group["params"], argument) for group in groups]
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


def _not_a_tensor(items: Sequence[object], argument: str, *, wanted: str) -> TypeError:
    position, culprit = next((i, item) for i, item in enumerate(items) if not hasattr(item, wanted))
    remedies = [remedy for kind, remedy in _REMEDIES if isinstance(culprit, kind)]
    remedy = [*remedies, "pass tensors, or (name, tensor) pairs as model.named_parameters() yields"][0]
    return TypeError(f"{argument}[{position}] is a {type(culprit).__name__}, not a tensor: {remedy}")


def check_dtypes(grads: Gradients) -> None:
    """Refuse gradients that have no norm.

    Raises:
        RuntimeError: A gradient is neither floating-point nor complex.
    """
    _check_dtypes(grads, _first_of_each_dtype(grads))


def _check_dtypes(grads: Gradients, first: dict[torch.dtype, int]) -> None:
    for dtype, index in first.items():
        if not (dtype.is_floating_point or dtype.is_complex):
            message = f"{grads.label(index)} is of {dtype}: only floating-point and complex gradients can be clipped"
            raise RuntimeError(message)


_WITHOUT_CLAMP = frozenset(
    {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc, torch._mkldnn}  # type: ignore[attr-defined]
)


def check_bounds(grads: Gradients, *bounds: float | Sequence[float]) -> None:
    """Refuse gradients that cannot be clamped to the bounds, which are rounded to the gradients' own dtypes.

    Args:
        grads: The gradients.
        bounds: Each is one for all gradients, or one for each.

    Raises:
        NotImplementedError: A gradient is complex.
        RuntimeError: A gradient is neither floating-point nor complex, or of a layout that torch cannot clamp; or a
            finite bound is beyond the largest value of its dtype.
    """
    first = _first_of_each_dtype(grads)
    _check_dtypes(grads, first)
    for dtype, index in first.items():
        if dtype.is_complex:
            message = f"clamp is not supported for complex types, and {grads.label(index)} is of {dtype}"
            raise NotImplementedError(message)
        largest = torch.finfo(dtype).max
        for bound in bounds:
            for i, value in enumerate(bound) if isinstance(bound, Sequence) else ((index, bound),):
                if largest < abs(value) < float("inf") and grads.tensors[i].dtype == dtype:
                    message = f"{value} cannot be converted to {dtype} without overflow, for {grads.label(i)}"
                    raise RuntimeError(f"{message}: the largest value there is {largest}")
    for index, grad in enumerate(grads.tensors if grads.addresses is None else ()):  # those with addresses are strided
        if grad.layout in _WITHOUT_CLAMP:
            message = f"{grads.label(index)} is laid out as {grad.layout}, whose values torch cannot clamp"
            raise RuntimeError(f"{message}: convert it before, for example by to_dense()")


def _first_of_each_dtype(grads: Gradients) -> dict[torch.dtype, int]:
    """The first gradient of each dtype: what is found of it holds for all that have the same."""
    dtypes = [tensor.dtype for tensor in grads.tensors]
    return {dtype: dtypes.index(dtype) for dtype in dict.fromkeys(dtypes)}


def check_writable(grads: Gradients) -> None:
    """Refuse gradients that torch would not write to, before any of them is written.

    Raises:
        RuntimeError: Elements of a gradient share memory, or it has none, or it is an inference tensor outside of
            inference mode.
    """
    frozen = not torch.is_inference_mode_enabled()
    for index, grad in enumerate(grads.tensors):
        values = grad._values() if grad.layout is torch.sparse_coo and grad.is_coalesced() else grad
        if values.layout is torch.strided and not values.is_contiguous() and _repeats_elements(values):
            message = "unsupported operation: more than one element of the written-to tensor refers to a single memory"
            raise RuntimeError(f"{message} location. Please clone() {grads.label(index)} before clipping it")
        if grad._is_zerotensor():
            message = "ZeroTensors are immutable, for they have no memory: clone()"
            raise RuntimeError(f"{message} {grads.label(index)} before clipping it, or set it to None")
        if frozen and grad.is_inference():
            message = "Inplace update to inference tensor outside InferenceMode is not allowed"
            raise RuntimeError(f"{message}: clone() {grads.label(index)} before clipping it")


def _repeats_elements(grad: Tensor) -> bool:
    return any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True))


def has_dtensors(grads: Gradients) -> bool:
    """Whether a gradient is a DTensor, or an owner that has none here, but may have one in another process."""
    dtensor = dtensor_type()
    if dtensor is None:
        return False
    kinds = grads.kinds
    if len(grads.tensors) < len(grads.owners.tensors):
        kinds = kinds.union(map(type, grads.owners.tensors))
    return any(issubclass(kind, dtensor) for kind in kinds)


def dtensor_type() -> type[DTensor] | None:
    """The class of DTensors; None where there can be none, because nobody has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return None if module is None else module.DTensor
