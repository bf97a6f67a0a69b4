"""Collect the gradients of what the caller passed: every call begins here.

parameters --list_owners--> Owners --gradients_of--> Gradients
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from operator import attrgetter

from torch import Tensor

from fastclip.core.checks import PROCESS_GROUPS, check_not_used_up, check_whole
from fastclip.core.dtensors import dtensor_type
from fastclip.core.gradients import PLAIN_TYPES, Gradients, of_one_process
from fastclip.core.owners import (
    Owners,
    Parameters,
    list_owners,
    not_a_tensor,
    warn_of_empty_iterator,
    warn_of_no_parameters,
)

try:
    from fastclip.kernels.native import gather
except ImportError:  # it only saves time

    def gather(_owners: list[Tensor], _types: tuple[type, type], /) -> tuple[list[Tensor], list[int]] | None:
        """Leave the gathering to Python."""
        return None


def collect(parameters: Parameters, *, whole: bool = False) -> Gradients:
    """Collect the gradients of a tensor, of tensors, of (name, tensor) pairs, of a module or of parameter groups.

    It warns if there are none and the caller cannot have meant that.

    Args:
        parameters: What the caller passed.
        whole: Whether a norm will be taken, for which gradients must not be parts of FSDP1's; see `check_whole`.

    Raises:
        RuntimeError: Optimizers that step inside of backward have used up all gradients.
        TypeError: `parameters` is not iterable, or has an item that is none of these; or the gradients are not `whole`.
    """
    owners = list_owners(parameters, "parameters")
    grads = gradients_of(owners)
    if whole and PROCESS_GROUPS:
        check_whole(grads)
    if not grads.tensors:
        warn_of_empty_iterator("parameters", parameters, owners.tensors, "no gradient clipping will occur.")
        warn_of_no_parameters(owners.tensors)
    return grads


def gradients_of(owners: Owners) -> Gradients:
    """Collect the gradients that the parameters have now.

    Raises:
        RuntimeError: Optimizers that step inside of backward have used up all gradients.
        TypeError: A parameter is not a tensor.
    """
    gathered = gather(owners.tensors, PLAIN_TYPES)
    if gathered is None:
        return _gathered_by_python(owners)
    grads, addresses = gathered
    return Gradients(grads, owners, range(len(grads)), "parameters", addresses, has_dtensors=False)


_grad = attrgetter("grad")  # with `map` faster than a comprehension


def _gathered_by_python(owners: Owners) -> Gradients:
    """Collect gradients some of which may be missing, or of any class."""
    try:
        grads = list(map(_grad, owners.tensors))
    except AttributeError as error:
        raise not_a_tensor(owners.tensors, "parameters", attribute="grad") from error
    kinds = set(map(type, grads))
    positions: Sequence[int] = range(len(grads))
    if type(None) in kinds:
        check_not_used_up(owners.tensors, grads)
        positions = [position for position, grad in enumerate(grads) if grad is not None]
        grads = [grads[position] for position in positions]
        kinds.remove(type(None))
    return _gradients(grads, kinds, owners, positions, "parameters")


def as_gradients(tensors: Parameters) -> Gradients:
    """Take the tensors themselves for gradients, as `get_total_norm` does.

    Raises:
        TypeError: `tensors` is not iterable, or has an item that is not a tensor.
    """
    owners = list_owners(tensors, "tensors")
    if not all(isinstance(owner, Tensor) for owner in owners.tensors):
        raise not_a_tensor(owners.tensors, "tensors", attribute="data_ptr")
    kinds = set(map(type, owners.tensors))
    return _gradients(owners.tensors, kinds, owners, range(len(owners.tensors)), "tensors")


def weights_of(grads: Gradients, positions: Sequence[int]) -> Gradients:
    """The parameters at some positions in the place of their gradients, so that their norms can be taken.

    Raises:
        TypeError: A parameter is not a tensor.
    """
    owners = grads.owners
    tensors = [owners.tensors[position] for position in positions]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise not_a_tensor(owners.tensors, grads.argument, attribute="data_ptr")
    return _gradients(tensors, set(map(type, tensors)), owners, positions, grads.argument)


def some_of(grads: Gradients, chosen: Container[int]) -> Gradients:
    """The gradients of the parameters at the chosen positions."""
    indices = [i for i, position in enumerate(grads.positions) if position in chosen]
    tensors, positions = [grads.tensors[i] for i in indices], [grads.positions[i] for i in indices]
    return _gradients(tensors, set(map(type, tensors)), grads.owners, positions, grads.argument)


def _gradients(
    tensors: list[Tensor], kinds: set[type], owners: Owners, positions: Sequence[int], argument: str
) -> Gradients:
    dtensor = dtensor_type()
    if dtensor is not None:
        classes = kinds if len(tensors) == len(owners.tensors) else kinds.union(map(type, owners.tensors))
        if any(issubclass(kind, dtensor) for kind in classes):
            return Gradients(tensors, owners, positions, argument, None, has_dtensors=True)
    return of_one_process(tensors, kinds, owners, positions, argument)
