r"""Mixed precision: remove the loss scale and clip together, in two passes over the gradients.

`scaler.unscale_(optimizer)` reads and writes every gradient; clipping then reads each twice and writes it: 3R + 2W.
Here one norm, that of the scaled gradients, replaces the search for infinities: it is finite exactly if every gradient
is finite. (There are two exceptions: fp64 gradients whose norm is beyond fp64, and sparse gradients whose duplicates
overflow when they are summed.) The norm times the inverse scale is the norm without the scale, and one coefficient both
unscales and clips. This costs 2R + 1W: on a GPU two launches and no sync.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from fastclip.backends.interface import Unscaling
from fastclip.core.clipping import clip_grad_norm_
from fastclip.core.collect import collect
from fastclip.core.gradients import Gradients
from fastclip.core.owners import Parameters
from fastclip.core.planned import Planned
from fastclip.core.prepare import prepare
from fastclip.foundation.arguments import as_float, check_norm_dtype
from fastclip.foundation.tracing import untraced
from fastclip.training.optimizers import check_is_optimizer


@untraced
def unscale_and_clip_grad_norm_(
    scaler: GradScaler,
    optimizer: Optimizer,
    max_norm: float,
    norm_type: float = 2.0,
    *,
    norm_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Do what ``scaler.unscale_(optimizer)`` and then `clip_grad_norm_` of the optimizer's parameters do, together.

    .. math::
        n = \frac{\|g\|_p}{s}, \qquad
        g_t \leftarrow g_t \cdot \frac{1}{s} \cdot \min\Big(\frac{\text{max\_norm}}{n + 10^{-6}},\; 1\Big)

    Here s is the scaler's scale. The scaler is in the same state as after `unscale_`: ``scaler.step(optimizer)`` skips
    the step if a gradient was not finite, ``scaler.update()`` then lowers the scale, and a second call before
    ``scaler.update()`` is an error. Each optimizer has its own norm. For one norm over several optimizers, call
    ``scaler.unscale_`` for each and then `clip_grad_norm_` with all parameters.

    Gradients are multiplied once, and so rounded once, by a coefficient in fp32 (fp64 for fp64 gradients). If nothing
    is clipped, they are bitwise equal to those of `unscale_`.

    Args:
        scaler: A `torch.amp.GradScaler`. If it is not enabled, this only clips.
        optimizer: The optimizer of the gradients, the same one that ``scaler.step`` gets.
        max_norm: The largest norm allowed, of the gradients without the scale.
        norm_type: The order p, at least 1: with a smaller p the norm may be finite although a gradient is not.
        norm_dtype: The dtype of the returned norm. By default torch's: that of the gradients, promoted if they differ.

    Returns:
        The norm without the scale, before clipping: 0-dim, on the first gradient's device. It is inf or NaN if
        ``scaler.step`` will skip the step.

    Raises:
        AssertionError: The scaler has not scaled anything yet.
        RuntimeError: The optimizer's gradients were unscaled, or it stepped, since the last ``scaler.update()``; or a
            gradient cannot be written in place.
        TypeError: `scaler` is not a GradScaler, or has its own `unscale_`, as FSDP1's does; or `optimizer` is not a
            `torch.optim.Optimizer`, or wraps one, which `scaler.step` would treat as another optimizer.
        ValueError: A gradient is fp16, which torch's scaler does not unscale; or `norm_type` is below 1.

    Example:
        >>> scaler.scale(loss).backward()
        >>> norm = fastclip.unscale_and_clip_grad_norm_(scaler, optimizer, max_norm=1.0)
        >>> scaler.step(optimizer)
        >>> scaler.update()
    """
    check_is_optimizer(optimizer)
    _check_scaler(scaler)
    limit, p = as_float("max_norm", max_norm), _order(norm_type)
    check_norm_dtype(norm_dtype)
    grads = collect(optimizer.param_groups, whole=True)
    if not scaler.is_enabled() or grads.has_dtensors:
        scaler.unscale_(optimizer)
        return clip_grad_norm_(optimizer.param_groups, limit, p, norm_dtype=norm_dtype)
    unscale_and_clip = _UnscaleAndClip(grads, limit, p, norm_dtype)
    # torch's own `unscale_` checks that it may be called now, and records that it was; only its passes are replaced.
    vars(scaler)["_unscale_grads_"] = unscale_and_clip
    try:
        scaler.unscale_(optimizer)
    finally:
        del vars(scaler)["_unscale_grads_"]
    return unscale_and_clip.norm


@dataclass
class _UnscaleAndClip:
    """Replaces `GradScaler._unscale_grads_` for one call of `unscale_`. That call sets `norm`."""

    grads: Gradients
    max_norm: float
    p: float
    norm_dtype: torch.dtype | None
    norm: Tensor = field(init=False)

    def __call__(
        self, _: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """Unscale and clip the gradients, and return ``found_inf`` on each of their devices."""
        tensors = self.grads.tensors
        fp16 = [index for index, grad in enumerate(tensors) if grad.dtype == torch.float16]
        if fp16 and not allow_fp16:
            raise ValueError(f"Attempting to unscale FP16 gradients: {self.grads.label(fp16[0])} is one")
        self.norm = _clip(self.grads, self.max_norm, self.p, inv_scale, found_inf, self.norm_dtype)
        return {device: found_inf.to(device) for device in {grad.device for grad in tensors}}


@untraced
def clip_scaled_grad_norm_(
    parameters: Parameters,
    max_norm: float,
    inv_scale: Tensor | float,
    found_inf: Tensor,
    norm_type: float = 2.0,
    *,
    norm_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Remove a loss scale from gradients and clip them together, and record whether one of them is not finite.

    .. math::
        n = \|g\|_p \cdot \text{inv\_scale}, \qquad
        g_t \leftarrow g_t \cdot \text{inv\_scale} \cdot \min\Big(\frac{\text{max\_norm}}{n + 10^{-6}},\; 1\Big)

    This is for loss scaling without a `torch.amp.GradScaler`. With one, use `unscale_and_clip_grad_norm_`.

    Args:
        parameters: As in `clip_grad_norm_`.
        max_norm: The largest norm allowed, of the gradients without the scale.
        inv_scale: One over the scale, above 0, in fp32: a number, or a tensor of one element on any device. The value
            of a tensor is not checked.
        found_inf: An fp32 tensor of one element, on any device. It is set to 1 if a gradient is not finite, and not
            changed otherwise.
        norm_type: The order p, at least 1.
        norm_dtype: The dtype of the returned norm, by default torch's.

    Returns:
        The norm without the scale, before clipping: 0-dim, on the first gradient's device; ``tensor(0.)`` if there are
        no gradients.

    Raises:
        NotImplementedError: A gradient is a DTensor.
        RuntimeError: A gradient cannot be written in place.
        TypeError: `parameters` holds something other than tensors, or `found_inf` is not an fp32 tensor.
        ValueError: `inv_scale` is a number that is not above 0 and finite in fp32; or it or `found_inf` has more than
            one element; or `norm_type` is below 1.
    """
    limit, p = as_float("max_norm", max_norm), _order(norm_type)
    check_norm_dtype(norm_dtype)
    inverse = _check_scale(inv_scale, found_inf)
    grads = collect(parameters, whole=True)
    if grads.has_dtensors:
        raise NotImplementedError(
            "gradients that are DTensors are unscaled by torch: call `unscale_`, then fastclip.clip_grad_norm_"
        )
    return _clip(grads, limit, p, inverse, found_inf, norm_dtype)


@torch.no_grad()
def _clip(
    grads: Gradients, limit: float, p: float, inv_scale: Tensor, found_inf: Tensor, norm_dtype: torch.dtype | None
) -> Tensor:
    if not grads.tensors:
        return torch.zeros((), dtype=norm_dtype)
    prepared = cast("Planned", prepare(grads, in_place=True))  # there are no DTensors
    inverse, found = inv_scale.detach().to(prepared.device, torch.float32), found_inf.to(prepared.device)
    unscaling = Unscaling(inverse.reshape(()), found.reshape(()))
    reduced = prepared.reduce(p, limit, norm_dtype or prepared.dtype, unscaling)
    prepared.scale_(grads, reduced.coefficient)
    if found is not found_inf:
        found_inf.copy_(found)
    return reduced.norm


def _check_scaler(scaler: GradScaler) -> None:
    kind = type(scaler)
    names = ("unscale_", "_unscale_grads_")
    if not isinstance(scaler, GradScaler) or any(
        name in vars(scaler) or getattr(kind, name) is not getattr(GradScaler, name) for name in names
    ):
        raise TypeError(
            f"`scaler` must be a torch.amp.GradScaler that unscales as torch's does, not {kind.__name__}: call its "
            "unscale_(optimizer), then clip"
        )


def _check_scale(inv_scale: Tensor | float, found_inf: Tensor) -> Tensor:
    """Return the inverse scale as a tensor, after a check of both arguments."""
    if not isinstance(found_inf, Tensor) or found_inf.dtype != torch.float32:
        raise TypeError(f"`found_inf` must be a tensor of torch.float32, not {found_inf!r}")
    inverse = inv_scale
    if not isinstance(inverse, Tensor):
        inverse = torch.tensor(as_float("inv_scale", inv_scale), device="cpu", dtype=torch.float64).float()
        if not 0 < inverse < math.inf:
            raise ValueError(f"`inv_scale` must be above 0 and finite in fp32, not {inv_scale}")
    for name, tensor in (("inv_scale", inverse), ("found_inf", found_inf)):
        if tensor.numel() != 1:
            raise ValueError(f"`{name}` must be one number, not a tensor of shape {tuple(tensor.shape)}")
    return inverse


def _order(norm_type: float) -> float:
    """Return the order p as a float, after a check that the norm is infinite if a gradient is."""
    p = as_float("norm_type", norm_type)
    if not p >= 1:
        raise ValueError(
            f"`norm_type` must be at least 1 here, not {norm_type}: below, the norm may be finite though a gradient is "
            "not. Unscale first, then clip"
        )
    return p
