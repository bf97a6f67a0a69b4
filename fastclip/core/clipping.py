"""The public functions: torch's gradient clipping, with torch's signatures.

Each reads straight down: collect the gradients, prepare them, reduce them to a norm and its coefficient, scale. The
README lists, under "Better than torch's", where results differ from torch's on purpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastclip.backends.coefficient import clip_coefficient
from fastclip.core.checks import check_bounds
from fastclip.core.collect import as_gradients, collect
from fastclip.core.dtensors import as_plain
from fastclip.core.gradients import Gradients
from fastclip.core.owners import Parameters, warn_of_empty_iterator
from fastclip.core.prepare import prepare
from fastclip.core.prepared import Prepared
from fastclip.core.sharding.sharded import local_parts
from fastclip.foundation import originals
from fastclip.foundation.arguments import as_float, check_norm_dtype
from fastclip.foundation.devices import Scalar, is_capturing, on
from fastclip.foundation.memory import pieces
from fastclip.foundation.tracing import untraced

_INF = math.inf
_MOST_NAMED = 10  # culprits in an error message


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

    A drop-in replacement for :func:`torch.nn.utils.clip_grad_norm_`. The norm is accumulated in fp32 and fp64 whatever
    the gradients' dtype, and does not overflow while they are finite. Nothing is written where the coefficient is 1.

    Args:
        parameters: A tensor, an iterable of tensors or of (name, tensor) pairs, or a module; ``.grad`` is clipped.
            Names, where given, are used in error messages.
        max_norm: The largest norm allowed. ``inf`` only measures, and never writes, whatever the norm; 0 zeroes the
            gradients; a negative one flips them.
        norm_type: The order p: any real number, ``inf`` for max|g|, ``-inf`` for min|g|, 0 for the number of gradients
            with a nonzero element.
        error_if_nonfinite: Raise, before any gradient is changed, where the norm is NaN or infinite. It looks at the
            norm before its rounding to the returned dtype. On a GPU it waits for the device once.
        foreach: Accepted for torch's sake; True raises on a device for which torch has no foreach operations.
        norm_dtype: The dtype of the returned norm. By default torch's: the gradients' own, promoted where they differ.

    Returns:
        The norm before clipping: 0-dim, on the first gradient's device; ``tensor(0.)`` where there are no gradients.
        Of DTensors on one mesh it is a DTensor, whose ``full_tensor()`` is the norm of the whole gradients.

    Raises:
        RuntimeError: The norm is non-finite and `error_if_nonfinite`; or a gradient cannot be written in place.
        TypeError: `parameters` holds something other than tensors, or a number or dtype is not one; or they are parts
            of a model that FSDP1 has sharded.
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
        _raise_if_nonfinite(grads, p, reduced.total)
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
    r"""Return the norm of tensors, usually gradients, taken as one vector; nothing is written.

    .. math:: \|g\|_p = \Big(\sum_t \sum_i |g_{t,i}|^p\Big)^{1/p}

    A drop-in replacement for :func:`torch.nn.utils.get_total_norm`; arguments, result and errors are those of
    :func:`clip_grad_norm_`.

    Args:
        tensors: A tensor, or an iterable of tensors or of (name, tensor) pairs. Their ``.grad`` is ignored.
        norm_type: The order p.
        error_if_nonfinite: Raise where the norm is NaN or infinite.
        foreach: Accepted for torch's sake.
        dtype: The dtype of the result; by default the tensors' own, promoted where they differ. A coming version of
            torch has it under this name (pull request 194033).
        norm_dtype: The same, as `clip_grad_norm_` calls it.

    Returns:
        The norm: 0-dim, on the first tensor's device; ``tensor(0.)`` where there are no tensors. Of DTensors on one
        mesh it is a DTensor.

    Raises:
        RuntimeError: The norm is non-finite and `error_if_nonfinite`.
        TypeError: `tensors` holds something other than tensors, or a dtype is none of floating-point numbers.
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
        _raise_if_nonfinite(grads, p, reduced.total)
    return prepared.returned(reduced.norm)


@untraced
def clip_grads_with_norm_(
    parameters: Parameters,
    max_norm: float,
    total_norm: Tensor,
    foreach: bool | None = None,
) -> None:
    r"""Scale gradients in place by a norm that is known already, as from :func:`get_total_norm`.

    .. math:: g_t \leftarrow g_t \cdot \min\Big(\frac{\text{max\_norm}}{\text{total\_norm} + 10^{-6}},\; 1\Big)

    A drop-in replacement for :func:`torch.nn.utils.clip_grads_with_norm_`. The coefficient is computed in fp64 and
    applied in fp32 (fp64 to fp64 gradients), whatever the dtype of `total_norm`.

    Args:
        parameters: As in :func:`clip_grad_norm_`.
        max_norm: The largest norm allowed; under ``inf`` nothing is written.
        total_norm: The norm, a tensor of one element on any device, or a DTensor.
        foreach: Accepted for torch's sake.

    Raises:
        RuntimeError: A gradient cannot be written in place.
        TypeError: `parameters` holds something other than tensors, or a number is not one.
        ValueError: `total_norm` has more than one element.
    """
    limit = as_float("max_norm", max_norm)
    grads = collect(parameters)
    # Ahead of a look at this process's gradients: a DTensor's number is asked for by all processes together.
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

    A drop-in replacement for :func:`torch.nn.utils.clip_grad_value_`. NaN stays NaN, infinities become the bound. One
    pass, which writes only where something is out of bounds.

    Args:
        parameters: As in :func:`clip_grad_norm_`. Of a sparse gradient the values are clamped.
        clip_value: The largest magnitude allowed, in the units of the gradients, rounded to their dtype.
        foreach: Accepted for torch's sake.

    Raises:
        NotImplementedError: A gradient is complex.
        RuntimeError: `clip_value` is beyond a gradient's dtype, or a gradient cannot be written in place; or it is a
            DTensor whose sum is pending.
        TypeError: `parameters` holds something other than tensors, or `clip_value` is not a number.
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


def _raise_if_nonfinite(grads: Gradients, p: float, total: Scalar) -> None:
    if isinstance(total, Tensor) and is_capturing(total.device):
        raise RuntimeError(
            "`error_if_nonfinite` waits for the device, which is impossible while a CUDA graph is captured"
        )
    if math.isfinite(total):
        return
    parts = local_parts(grads)  # a look at DTensors themselves would be a collective
    culprits = [i for i, part in enumerate(parts.tensors) if not all(piece.isfinite().all() for piece in _pieces(part))]
    named = "; ".join(_describe(parts, index) for index in culprits[:_MOST_NAMED])
    more = f"; and {len(culprits) - _MOST_NAMED} more" if len(culprits) > _MOST_NAMED else ""
    if culprits:
        reason = f"Non-finite: {named}{more}"
    elif parts is grads:
        reason = "Every gradient is finite, but their norm is beyond fp64"
    else:
        reason = "What this process has of them is finite: another one names the culprits, or the norm is beyond fp64"
    raise RuntimeError(
        f"The total norm of order {p} for gradients from `{grads.argument}` is non-finite, so it cannot be clipped. "
        "To disable this error and scale the gradients by the non-finite norm anyway, set `error_if_nonfinite=False`. "
        f"{reason}"
    )


def _describe(grads: Gradients, index: int) -> str:
    counts = [(int(piece.isnan().sum()), int(piece.isinf().sum())) for piece in _pieces(grads.tensors[index])]
    nans, infs = map(sum, zip(*counts, strict=True))
    return f"{grads.label(index)} ({nans} NaN, {infs} inf)"


def _pieces(grad: Tensor) -> Iterator[Tensor]:
    return pieces(grad.coalesce().values() if grad.layout is torch.sparse_coo else grad)


def _check_foreach(prepared: Prepared) -> None:
    """Let torch itself raise where it has no foreach operations for a device, as it does for foreach=True."""
    for device in (device for device in prepared.devices if device.type not in ("cpu", "cuda")):
        originals.get_total_norm([torch.empty(1, device=device)], foreach=True)
