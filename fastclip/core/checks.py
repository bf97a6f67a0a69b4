"""What is refused before any gradient is changed: errors with the culprit's name and a remedy."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip.core.gradients import Gradients
from fastclip.foundation.warn import warn_caller

_c10d: Any = getattr(torch.distributed, "distributed_c10d", None)  # some builds of torch lack it
PROCESS_GROUPS: Collection[object] = getattr(_c10d, "_pg_map", ())
"""Torch's own collection of process groups, empty in most programs. A call that asks torch takes 3 µs, cold."""


def check_whole(grads: Gradients) -> None:
    """Refuse parameters that FSDP1 has sharded: each process would take the norm of its own part.

    FSDP1 marks the parameters that it has flattened. A flat parameter knows the shape of the whole, so its own shape
    tells whether it is a part. Original parameters (`use_orig_params`) do not know it: parts of them have one
    dimension, and whole ones (NO_SHARD) keep their shapes. So if all of them have one dimension, they count as parts.

    Raises:
        TypeError: The parameters are FSDP1's shards.
    """
    if not PROCESS_GROUPS or "torch.distributed.fsdp" not in sys.modules:
        return  # the check below takes 30 ns a parameter
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


def check_not_used_up(owners: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Warn if optimizers may have used up gradients inside of backward, so that only the rest would be clipped.

    Such an optimizer steps in a hook on the accumulation of a gradient, and frees the gradient. Other hooks of that
    kind leave it, and a parameter without hooks merely has no gradient. What a hook does is unknown, so this is an
    error only if it is torch's own `torch.distributed.optim` that steps; torch returns a norm of 0 there.

    Raises:
        RuntimeError: Torch's optimizer has stepped so for every parameter.
    """
    missing = [owner for owner, grad in zip(owners, grads, strict=True) if grad is None and _has_hook(owner)]
    if not missing:
        return
    message = f"{len(missing)} of {len(owners)} parameters have no gradient, but a hook on its accumulation. "
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
    if len(missing) == len(owners) and any(hasattr(owner, "_in_backward_optimizers") for owner in owners):
        raise RuntimeError(message)
    warn_caller(message)


def _has_hook(parameter: Tensor) -> bool:
    """Whether a hook sees the accumulated gradient: a hook of torch's own kind, or of `torch.distributed.optim`."""
    hooks: object = getattr(parameter, "_post_accumulate_grad_hooks", None)
    return getattr(parameter, "requires_grad", False) and (bool(hooks) or hasattr(parameter, "_in_backward_optimizers"))


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


def _first_of_each_dtype(grads: Gradients) -> dict[torch.dtype, int]:
    """The index of the first gradient of each dtype. What holds for it holds for all of that dtype."""
    dtypes = [tensor.dtype for tensor in grads.tensors]
    return {dtype: dtypes.index(dtype) for dtype in dict.fromkeys(dtypes)}


_WITHOUT_CLAMP = frozenset(
    {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc, torch._mkldnn}  # type: ignore[attr-defined]
)


def check_bounds(grads: Gradients, *bounds: float | Sequence[float]) -> None:
    """Refuse gradients that cannot be clamped to the bounds, which are rounded to each gradient's dtype.

    Args:
        grads: The gradients.
        bounds: Each is a number for all gradients, or one number for each.

    Raises:
        NotImplementedError: A gradient is complex.
        RuntimeError: A gradient is neither floating-point nor complex, or torch cannot clamp its layout; or a finite
            bound is above the largest value of a gradient's dtype.
    """
    first = _first_of_each_dtype(grads)
    _check_dtypes(grads, first)
    for dtype, index in first.items():
        if dtype.is_complex:
            message = f"clamp is not supported for complex types, and {grads.label(index)} is of {dtype}"
            raise NotImplementedError(message)
        for bound in bounds:
            _check_range(grads, dtype, enumerate(bound) if isinstance(bound, Sequence) else [(index, bound)])
    for index, grad in enumerate(grads.tensors if grads.addresses is None else ()):  # an address means strided
        if grad.layout in _WITHOUT_CLAMP:
            message = f"{grads.label(index)} is laid out as {grad.layout}, whose values torch cannot clamp"
            raise RuntimeError(f"{message}: convert it before, for example by to_dense()")


def _check_range(grads: Gradients, dtype: torch.dtype, bounds: Iterable[tuple[int, float]]) -> None:
    """Refuse a finite bound, given with its gradient's index, above the largest value of the dtype."""
    largest = torch.finfo(dtype).max
    for index, value in bounds:
        if largest < abs(value) < float("inf") and grads.tensors[index].dtype == dtype:
            message = f"{value} cannot be converted to {dtype} without overflow, for {grads.label(index)}"
            raise RuntimeError(f"{message}: the largest value there is {largest}")


def check_writable(grads: Gradients) -> None:
    """Refuse gradients that torch would not write to.

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
