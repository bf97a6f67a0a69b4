"""The public functions: torch's gradient clipping, with torch's signatures.

Each reads straight down: collect the gradients, prepare them, reduce them to a norm and its coefficient, scale. The
README lists, under "Better than torch's", where results differ from torch's on purpose.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastclip.backends.coefficient import clip_coefficient
from fastclip.core.checks import check_bounds
from fastclip.core.collect import as_gradients, collect
from fastclip.core.dtensors import as_plain
from fastclip.core.nonfinite import raise_if_nonfinite
from fastclip.core.owners import Parameters, warn_of_empty_iterator
from fastclip.core.prepare import prepare
from fastclip.core.prepared import Prepared
from fastclip.foundation import originals
from fastclip.foundation.arguments import as_float, check_norm_dtype
from fastclip.foundation.devices import on
from fastclip.foundation.tracing import untraced

_INF = math.inf


@untraced
def clip_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    norm_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Scale gradients in place so that their global norm is at most `max_norm`, and return the norm before that.

    .. math::
        \|g\|_p = \Big(\sum_t \sum_i |g_{t,i}|^p\Big)^{1/p}, \qquad
        g_t \leftarrow g_t \cdot \min\Big(\frac{\text{max\_norm}}{\|g\|_p + 10^{-6}},\; 1\Big)

    A drop-in replacement for :func:`torch.nn.utils.clip_grad_norm_`. The norm is accumulated in fp32 and fp64 for every
    dtype, and does not overflow if the gradients are finite. If the coefficient is 1, nothing is written.

    Args:
        parameters: A tensor, an iterable of tensors or of (name, tensor) pairs, or a module. Their ``.grad`` is
            clipped. Names are used in error messages.
        max_norm: The largest norm allowed. ``inf`` only measures and never writes; 0 zeroes the gradients; a negative
            number flips their signs.
        norm_type: The order p: any real number, ``inf`` for max|g|, ``-inf`` for min|g|, 0 for the number of gradients
            with a nonzero element.
        error_if_nonfinite: Raise if the norm is NaN or infinite, before any gradient is changed. The norm is checked
            before it is rounded to the returned dtype. On a GPU this is one sync.
        foreach: Accepted for compatibility. True raises on a device for which torch has no foreach operations.
        norm_dtype: The dtype of the returned norm. By default torch's: the gradients' own, promoted if they differ.

    Returns:
        The norm before clipping: 0-dim, on the first gradient's device; ``tensor(0.)`` if there are no gradients.
        For DTensors on one mesh it is a DTensor: ``full_tensor()`` is the norm of the whole gradients.

    Raises:
        RuntimeError: The norm is not finite and `error_if_nonfinite` is True; or a gradient cannot be written in place.
        TypeError: `parameters` has an item that is not a tensor, or `max_norm` or `norm_type` is not a number, or
            `norm_dtype` not a floating-point dtype; or the parameters are shards of a model under FSDP1.
        ValueError: `norm_type` or `max_norm` is a string that is not a number.

    Example:
        >>> loss.backward()
        >>> norm = fastclip.clip_grad_norm_(model.parameters(), max_norm=1.0)
        >>> optimizer.step()
    """
    # Inside of a training step caches are cold, and a call of a Python function takes most of a microsecond.
    limit = max_norm if type(max_norm) is float else as_float("max_norm", max_norm)
    p = norm_type if type(norm_type) is float else as_float("norm_type", norm_type)
    if norm_dtype is not None:
        check_norm_dtype(norm_dtype)
    grads = collect(parameters, whole=True)
    if not grads.tensors and not grads.has_dtensors:
        return torch.zeros((), dtype=norm_dtype)
    writes = limit != _INF
    prepared = prepare(grads, in_place=writes)
    if foreach:
        _check_foreach(prepared)
    dtype = norm_dtype or prepared.dtype
    if writes and not error_if_nonfinite:
        return prepared.clip_(grads, p, limit, dtype)
    reduced = prepared.reduce(p, limit, dtype)
    if error_if_nonfinite:
        raise_if_nonfinite(grads, p, reduced.total)
    if writes:
        prepared.scale_(grads, reduced.coefficient)
    return prepared.returned(reduced.norm)


@untraced
def get_total_norm(
    tensors: Parameters,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    dtype: torch.dtype | None = None,
    *,
    norm_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Return the norm of tensors, usually gradients, taken as one vector. Nothing is written.

    .. math:: \|g\|_p = \Big(\sum_t \sum_i |g_{t,i}|^p\Big)^{1/p}

    A drop-in replacement for :func:`torch.nn.utils.get_total_norm`; arguments, result and errors are those of
    :func:`clip_grad_norm_`.

    Args:
        tensors: A tensor, or an iterable of tensors or of (name, tensor) pairs. Their ``.grad`` is ignored.
        norm_type: The order p.
        error_if_nonfinite: Raise if the norm is NaN or infinite.
        foreach: Accepted for compatibility.
        dtype: The dtype of the result; by default the tensors' own, promoted if they differ. The name is that of a
            future version of torch (pull request 194033).
        norm_dtype: Another name of `dtype`, as in `clip_grad_norm_`.

    Returns:
        The norm: 0-dim, on the first tensor's device; ``tensor(0.)`` if there are no tensors. For DTensors on one mesh
        it is a DTensor.

    Raises:
        RuntimeError: The norm is not finite and `error_if_nonfinite` is True.
        TypeError: `tensors` has an item that is not a tensor, or a dtype is not a floating-point dtype.
        ValueError: `norm_type` is a string that is not a number, or `dtype` and `norm_dtype` differ.
    """
    p = as_float("norm_type", norm_type)
    check_norm_dtype(norm_dtype)
    check_norm_dtype(dtype, "dtype")
    wanted = norm_dtype or dtype
    if dtype not in (None, wanted):
        raise ValueError(f"`dtype` and `norm_dtype` are one thing by two names, not {dtype} and {norm_dtype}")
    grads = as_gradients(tensors)
    if not grads.tensors:
        warn_of_empty_iterator("tensors", tensors, grads.tensors, "whose norm is 0")
        return torch.zeros((), dtype=wanted)
    prepared = prepare(grads, in_place=False)
    if foreach:
        _check_foreach(prepared)
    reduced = prepared.reduce(p, math.inf, wanted or prepared.dtype)
    if error_if_nonfinite:
        raise_if_nonfinite(grads, p, reduced.total)
    return prepared.returned(reduced.norm)


@untraced
def clip_grads_with_norm_(
    parameters: Parameters,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    r"""Scale gradients in place by a norm that was taken before, as by :func:`get_total_norm`.

    .. math:: g_t \leftarrow g_t \cdot \min\Big(\frac{\text{max\_norm}}{\text{total\_norm} + 10^{-6}},\; 1\Big)

    A drop-in replacement for :func:`torch.nn.utils.clip_grads_with_norm_`. For every dtype of `total_norm` the
    coefficient is computed in fp64 and applied in fp32 (in fp64 to fp64 gradients).

    Args:
        parameters: As in :func:`clip_grad_norm_`.
        max_norm: The largest norm allowed. ``inf`` writes nothing.
        total_norm: The norm: a tensor of one element on any device, or a DTensor.
        foreach: Accepted for compatibility.

    Raises:
        RuntimeError: A gradient cannot be written in place.
        TypeError: `parameters` has an item that is not a tensor, or `max_norm` is not a number.
        ValueError: `total_norm` has more than one element.
    """
    limit = as_float("max_norm", max_norm)
    grads = collect(parameters)
    # Before the check for gradients, which only some processes may have: `full_tensor` of a DTensor is a collective.
    total = as_plain(total_norm) if isinstance(total_norm, Tensor) else torch.tensor(total_norm, device="cpu")
    if total.numel() != 1:
        raise ValueError(f"`total_norm` must be one number, not a tensor of shape {tuple(total.shape)}")
    if not grads.tensors or limit == math.inf:
        return
    prepared = prepare(grads, in_place=True)
    if foreach:
        _check_foreach(prepared)
    prepared.scale_(grads, clip_coefficient(on(prepared.device, total.detach().reshape(())), limit))


@untraced
def clip_grad_value_(
    parameters: Parameters,
    clip_value: float,
    foreach: bool | None = None,
) -> None:
    r"""Clamp every element of the gradients in place to [-clip_value, clip_value].

    .. math:: g_i \leftarrow \min(\max(g_i, -\text{clip\_value}), \text{clip\_value})

    A drop-in replacement for :func:`torch.nn.utils.clip_grad_value_`. NaN stays NaN, infinities become the bound. It is
    one pass, which writes only where something is out of bounds.

    Args:
        parameters: As in :func:`clip_grad_norm_`. Of a sparse gradient the values are clamped.
        clip_value: The largest magnitude allowed, in the units of the gradients, rounded to their dtype.
        foreach: Accepted for compatibility.

    Raises:
        NotImplementedError: A gradient is complex.
        RuntimeError: `clip_value` exceeds a gradient's dtype, or a gradient cannot be written in place, or is a DTensor
            with a pending sum.
        TypeError: `parameters` has an item that is not a tensor, or `clip_value` is not a number.
        ValueError: `clip_value` is a string that is not a number.
    """
    bound = as_float("clip_value", clip_value)
    grads = collect(parameters)
    if not grads.tensors:
        return
    check_bounds(grads, bound)
    prepared = prepare(grads, in_place=True)
    if foreach:
        _check_foreach(prepared)
    prepared.clamp_(grads, -bound, bound)


def _check_foreach(prepared: Prepared) -> None:
    """Let torch raise its own error for a device that it has no foreach operations for."""
    for device in (device for device in prepared.devices if device.type not in ("cpu", "cuda")):
        originals.get_total_norm([torch.empty(1, device=device)], foreach=True)
