"""Clipping out of place, through which autograd goes, as meta-learning asks for: by torch's own operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from fastclip.core.owners import warn_of_empty_iterator
from fastclip.foundation.arguments import positive, real
from fastclip.foundation.arithmetic import IN_FP32
from fastclip.foundation.devices import wide_dtype

_Grads = TypeVar("_Grads", bound=Tensor | Sequence[Tensor | None] | Mapping[Any, Tensor | None])

_OF_COEFFICIENTS = {torch.float64: torch.float64, torch.complex128: torch.float64}  # in fp32 for all others


def clip_by_global_norm(
    grads: _Grads, clip_norm: float | Tensor, use_norm: float | Tensor | None = None
) -> tuple[_Grads, Tensor]:
    r"""Return gradients scaled so that their global 2-norm is at most `clip_norm`, and the norm; change nothing.

    .. math:: g'_t = g_t \cdot \frac{\text{clip\_norm}}{\max(\|g\|_2,\; \text{clip\_norm})}, \qquad
        \|g\|_2 = \Big(\sum_t \sum_i |g_{t,i}|^2\Big)^{1/2}

    TensorFlow's ``tf.clip_by_global_norm``, by torch's operations: results can be differentiated, as often as is
    wanted, with respect to the gradients and to `clip_norm`; and it works inside of ``torch.func`` transforms and of
    ``torch.compile(fullgraph=True)``. Where there is nothing to differentiate, `clip_by_global_norm_` is faster.

    The norm is computed in fp64 (fp32 on devices without it). Every gradient becomes NaN where it is not finite; that
    of fp64 gradients is infinite where their squares overflow, and 0 where they underflow. Where all gradients are 0
    its derivative is taken for 0.

    Args:
        grads: A tensor, a sequence or a mapping of tensors, as ``torch.autograd.grad`` and ``torch.func.grad`` return
            them; None stays None.
        clip_norm: The largest norm allowed, above 0: a number, or a tensor of one element, which is not looked at.
        use_norm: The norm, where it is known already: a number, or a tensor of one element.

    Returns:
        The gradients in the same form (a dict for any mapping, a tuple for any sequence that is no list), each of its
        shape, dtype and device; and the norm, 0-dim, fp64, on the first gradient's device.

    Raises:
        TypeError: `grads` holds something other than tensors of floating-point or complex numbers, or a sparse one, or
            parameters; or `clip_norm` or `use_norm` is not a number.
        ValueError: `clip_norm` is a number that is not above 0 and finite, or it or `use_norm` has more than one
            element.

    Example:
        >>> grads = torch.autograd.grad(inner_loss, weights, create_graph=True)
        >>> grads, norm = fastclip.clip_by_global_norm(grads, 1.0)
        >>> adapted = [weight - 0.1 * grad for weight, grad in zip(weights, grads)]
        >>> outer_loss(adapted).backward()
    """
    bound = clip_norm if isinstance(clip_norm, Tensor) else positive("clip_norm", clip_norm)
    if isinstance(grads, Tensor):
        (clipped,), norm = _clipped([grads], bound, use_norm)
    elif isinstance(grads, Mapping):
        values, norm = _clipped(grads.values(), bound, use_norm)
        clipped = dict(zip(grads, values, strict=True))
    else:
        values, norm = _clipped(grads, bound, use_norm)
        clipped = values if isinstance(grads, list) else tuple(values)
    return cast("_Grads", clipped), norm


def _clipped(
    items: Iterable[Tensor | None], clip_norm: float | Tensor, use_norm: float | Tensor | None
) -> tuple[list[Any], Tensor]:
    grads = list(items)
    warn_of_empty_iterator("grads", items, grads, "no gradient clipping will occur.")
    _check(grads)
    device = next((grad.device for grad in grads if grad is not None), torch.device("cpu"))
    bound = _number("clip_norm", clip_norm, device)
    norm = _norm(grads, device) if use_norm is None else _number("use_norm", use_norm, device)
    coefficient = bound / torch.maximum(norm, bound) + (norm - norm)  # which is 0, or NaN
    return [None if grad is None else _scaled(grad, coefficient) for grad in grads], norm


def _check(grads: Sequence[Any]) -> None:
    for index, grad in enumerate(grads):
        if grad is None:
            continue
        if not isinstance(grad, Tensor) or isinstance(grad, torch.nn.Parameter):
            raise TypeError(f"grads[{index}] is a {type(grad).__name__}, not a gradient: pass tensors such as p.grad")
        if not (grad.is_floating_point() or grad.is_complex()):
            raise TypeError(f"grads[{index}] is of {grad.dtype}: gradients are of floating-point or complex numbers")
        if grad.layout is not torch.strided:
            raise TypeError(f"grads[{index}] is laid out as {grad.layout}: pass grad.to_dense(), or clip it in place")


def _number(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    number = torch.as_tensor(
        value if isinstance(value, Tensor) else real(name, value), dtype=wide_dtype(device), device=device
    )
    if number.numel() != 1:
        raise ValueError(f"`{name}` must be one number, not a tensor of shape {tuple(number.shape)}")
    return number.reshape(())


def _norm(grads: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """The global norm. Of squares, which are smooth where a gradient is 0, as its own norm is not."""
    squares = torch.zeros((), dtype=wide_dtype(device), device=device)
    for grad in grads:
        if grad is not None:
            parts = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
            squares = squares + parts.to(wide_dtype(grad.device)).square().sum().to(device)
    is_zero = squares == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squares).sqrt())


def _scaled(grad: Tensor, coefficient: Tensor) -> Tensor:
    factor = coefficient.to(grad.device, _OF_COEFFICIENTS.get(grad.dtype, torch.float32))
    scaled: Tensor = (grad.to(IN_FP32.get(grad.dtype, grad.dtype)) * factor).to(grad.dtype)
    return scaled
