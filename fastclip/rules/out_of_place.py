"""Clipping out of place, by torch's own operations, so that autograd can differentiate it."""

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

_WIDE = frozenset({torch.float64, torch.complex128})  # multiplied by a coefficient in fp64, all others in fp32


def clip_by_global_norm(
    grads: _Grads, clip_norm: float | Tensor, use_norm: float | Tensor | None = None
) -> tuple[_Grads, Tensor]:
    r"""Return gradients scaled so that their global 2-norm is at most `clip_norm`, and the norm; change nothing.

    .. math:: g'_t = g_t \cdot \frac{\text{clip\_norm}}{\max(\|g\|_2,\; \text{clip\_norm})}, \qquad
        \|g\|_2 = \Big(\sum_t \sum_i |g_{t,i}|^2\Big)^{1/2}

    This is TensorFlow's ``tf.clip_by_global_norm`` by torch's operations: autograd differentiates the results, any
    number of times, with respect to the gradients and to `clip_norm`. It works inside ``torch.func`` transforms and
    ``torch.compile(fullgraph=True)``. If there is nothing to differentiate, `clip_by_global_norm_` is faster.

    The norm is computed in fp64 (fp32 on devices without it). If it is not finite, every gradient becomes NaN. The norm
    of fp64 gradients is infinite if their squares overflow, and 0 if they underflow. If all gradients are 0, the
    derivative of the norm is defined as 0.

    Args:
        grads: A tensor, a sequence or a mapping of tensors, as ``torch.autograd.grad`` and ``torch.func.grad`` return
            them; None stays None.
        clip_norm: The largest norm allowed, above 0: a number, or a tensor of one element (its value is not checked).
        use_norm: The norm, if it is already known: a number, or a tensor of one element.

    Returns:
        The gradients in the same form (a dict for any mapping, a tuple for any sequence that is not a list), each with
        its shape, dtype and device; and the norm, 0-dim, fp64, on the first gradient's device.

    Raises:
        TypeError: `grads` holds something other than strided tensors of floating-point or complex numbers, or holds
            parameters; or `clip_norm` or `use_norm` is not a number.
        ValueError: `clip_norm` is a number that is not above 0 and finite; or `clip_norm` or `use_norm` has more than
            one element.

    Example:
        >>> grads = torch.autograd.grad(inner_loss, weights, create_graph=True)
        >>> grads, norm = fastclip.clip_by_global_norm(grads, 1.0)
        >>> adapted = [weight - 0.1 * grad for weight, grad in zip(weights, grads)]
        >>> outer_loss(adapted).backward()
    """
    bound = clip_norm if isinstance(clip_norm, Tensor) else positive("clip_norm", clip_norm)
    if isinstance(grads, Tensor):
        (clipped,), norm = _clip([grads], bound, use_norm)
    elif isinstance(grads, Mapping):
        values, norm = _clip(grads.values(), bound, use_norm)
        clipped = dict(zip(grads, values, strict=True))
    else:
        values, norm = _clip(grads, bound, use_norm)
        clipped = values if isinstance(grads, list) else tuple(values)
    return cast("_Grads", clipped), norm


def _clip(
    items: Iterable[Tensor | None], clip_norm: float | Tensor, use_norm: float | Tensor | None
) -> tuple[list[Any], Tensor]:
    grads = list(items)
    warn_of_empty_iterator("grads", items, grads, "no gradient clipping will occur.")
    _check_grads(grads)
    device = next((grad.device for grad in grads if grad is not None), torch.device("cpu"))
    bound = _as_scalar("clip_norm", clip_norm, device)
    norm = _global_norm(grads, device) if use_norm is None else _as_scalar("use_norm", use_norm, device)
    coefficient = bound / torch.maximum(norm, bound) + (norm - norm)  # norm - norm is 0, or NaN if it is not finite
    return [None if grad is None else _scale(grad, coefficient) for grad in grads], norm


def _check_grads(grads: Sequence[Any]) -> None:
    for index, grad in enumerate(grads):
        if grad is None:
            continue
        if not isinstance(grad, Tensor) or isinstance(grad, torch.nn.Parameter):
            raise TypeError(f"grads[{index}] is a {type(grad).__name__}, not a gradient: pass tensors such as p.grad")
        if not (grad.is_floating_point() or grad.is_complex()):
            raise TypeError(f"grads[{index}] is of {grad.dtype}: gradients are of floating-point or complex numbers")
        if grad.layout is not torch.strided:
            raise TypeError(f"grads[{index}] is laid out as {grad.layout}: pass grad.to_dense(), or clip it in place")


def _as_scalar(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    number = value if isinstance(value, Tensor) else real(name, value)
    scalar = torch.as_tensor(number, dtype=wide_dtype(device), device=device)
    if scalar.numel() != 1:
        raise ValueError(f"`{name}` must be one number, not a tensor of shape {tuple(scalar.shape)}")
    return scalar.reshape(())


def _global_norm(grads: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Return the global norm as the root of a sum of squares: unlike norms, squares are differentiable at 0."""
    squares = torch.zeros((), dtype=wide_dtype(device), device=device)
    for grad in grads:
        if grad is not None:
            parts = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
            squares = squares + parts.to(wide_dtype(grad.device)).square().sum().to(device)
    is_zero = squares == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, squares).sqrt())


def _scale(grad: Tensor, coefficient: Tensor) -> Tensor:
    factor = coefficient.to(grad.device, torch.float64 if grad.dtype in _WIDE else torch.float32)
    scaled: Tensor = (grad.to(IN_FP32.get(grad.dtype, grad.dtype)) * factor).to(grad.dtype)
    return scaled
