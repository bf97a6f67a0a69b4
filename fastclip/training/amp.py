r"""Mixed precision in one go: taking the loss scale off, looking for infinities, norm and clipping, in two passes.

`scaler.unscale_(optimizer)` reads and writes every gradient, and clipping then reads, reads and writes: 3R + 2W. Here
the norm of the scaled gradients tells all of it. It is finite exactly where every gradient is, because it does not
overflow while they are; but for fp64 gradients whose norm is beyond fp64, and sparse ones whose duplicates overflow
when they are summed. Times the inverse scale it is the norm wanted; and one coefficient both unscales and clips. That
is 2R + 1W: on a GPU two launches, and no sync.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from fastclip.backends.interface import Unscaling
from fastclip.core.checks import check_whole
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
    r"""Do what ``scaler.unscale_(optimizer)`` and `clip_grad_norm_` of the optimizer's parameters do, in one go.

    .. math::
        n = \frac{\|g\|_p}{s}, \qquad
        g_t \leftarrow g_t \cdot \frac{1}{s} \cdot \min\Big(\frac{\text{max\_norm}}{n + 10^{-6}},\; 1\Big)

    for the scaler's scale s. The scaler is left as `unscale_` leaves it, so that ``scaler.step(optimizer)`` leaves the
    step out where a gradient was not finite, ``scaler.update()`` then lowers the scale, and a second call before that
    is an error. Each optimizer has a norm of its own: for one norm over several, call ``scaler.unscale_`` for each and
    then `clip_grad_norm_` of all parameters.

    Gradients are multiplied once and so rounded once, by a coefficient in fp32 (fp64 for fp64 gradients). Where nothing
    is clipped they are those of `unscale_` to the bit.

    Args:
        scaler: A `torch.amp.GradScaler`. One that is not enabled leaves it at clipping.
        optimizer: The optimizer whose gradients these are, as it is given to ``scaler.step``.
        max_norm: The largest norm allowed, of the gradients without the scale.
        norm_type: The order p, at least 1: below that a norm may be finite though a gradient is not.
        norm_dtype: The dtype of the returned norm. By default torch's: the gradients' own, promoted where they differ.

    Returns:
        The norm without the scale, before clipping: 0-dim, on the first gradient's device. It is inf or NaN where the
        step will be left out.

    Raises:
        AssertionError: Nothing was scaled by the scaler yet.
        RuntimeError: The optimizer's gradients were unscaled, or it stepped, since the last ``scaler.update()``; or a
            gradient cannot be written in place.
        TypeError: `scaler` is a scaler with an `unscale_` of its own, such as FSDP1's, or none at all; or `optimizer`
            is no `torch.optim.Optimizer`, or wraps one, which `scaler.step` would take for another.
        ValueError: A gradient is fp16, which torch's scaler does not unscale; or `norm_type` is below 1.

    Example:
        >>> scaler.scale(loss).backward()
        >>> norm = fastclip.unscale_and_clip_grad_norm_(scaler, optimizer, max_norm=1.0)
        >>> scaler.step(optimizer)
        >>> scaler.update()
    """
    _check(scaler, optimizer)
    limit, p = as_float("max_norm", max_norm), _order(norm_type)
    check_norm_dtype(norm_dtype)
    grads = collect(optimizer.param_groups)
    if not scaler.is_enabled() or grads.has_dtensors:
        scaler.unscale_(optimizer)
        return clip_grad_norm_(optimizer.param_groups, limit, p, norm_dtype=norm_dtype)
    norms: list[Tensor] = []

    def unscale_and_clip(
        _: Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        fp16 = [index for index, grad in enumerate(grads.tensors) if grad.dtype == torch.float16]
        if fp16 and not allow_fp16:
            raise ValueError(f"Attempting to unscale FP16 gradients: {grads.label(fp16[0])} is one")
        norms.append(_clip(grads, limit, p, inv_scale, found_inf, norm_dtype))
        return {device: found_inf.to(device) for device in {grad.device for grad in grads.tensors}}

    # torch's own `unscale_` looks whether it may be called now, and keeps the books; only its passes are replaced.
    vars(scaler)["_unscale_grads_"] = unscale_and_clip
    try:
        scaler.unscale_(optimizer)
    finally:
        del vars(scaler)["_unscale_grads_"]
    return norms[0]


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
    r"""Take a loss scale off gradients and clip them in one go, and note whether one of them is not finite.

    .. math::
        n = \|g\|_p \cdot \text{inv\_scale}, \qquad
        g_t \leftarrow g_t \cdot \text{inv\_scale} \cdot \min\Big(\frac{\text{max\_norm}}{n + 10^{-6}},\; 1\Big)

    For loss scaling without a `torch.amp.GradScaler`; with one, see `unscale_and_clip_grad_norm_`.

    Args:
        parameters: As in `clip_grad_norm_`.
        max_norm: The largest norm allowed, of the gradients without the scale.
        inv_scale: One over the scale, above 0, in fp32: a number, or a tensor of one element on any device, whose value
            is not looked at.
        found_inf: An fp32 tensor of one element, on any device. It becomes 1 where a gradient is not finite, and else
            stays as it is.
        norm_type: The order p, at least 1.
        norm_dtype: The dtype of the returned norm, by default torch's.

    Returns:
        The norm without the scale, before clipping: 0-dim, on the first gradient's device; ``tensor(0.)`` where there
        are no gradients.

    Raises:
        NotImplementedError: A gradient is a DTensor.
        RuntimeError: A gradient cannot be written in place.
        TypeError: `parameters` holds something other than tensors, or `found_inf` is no fp32 tensor.
        ValueError: `inv_scale` is a number that is not above 0 and finite in fp32; or it or `found_inf` has more than
            one element; or `norm_type` is below 1.
    """
    limit, p = as_float("max_norm", max_norm), _order(norm_type)
    check_norm_dtype(norm_dtype)
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
    grads = collect(parameters)
    if grads.has_dtensors:
        raise NotImplementedError(
            "gradients that are DTensors are unscaled by torch: call `unscale_`, then fastclip.clip_grad_norm_"
        )
    return _clip(grads, limit, p, inverse, found_inf, norm_dtype)


@torch.no_grad()
def _clip(
    grads: Gradients, limit: float, p: float, inv_scale: Tensor, found_inf: Tensor, norm_dtype: torch.dtype | None
) -> Tensor:
    check_whole(grads)
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


def _check(scaler: GradScaler, optimizer: Optimizer) -> None:
    check_is_optimizer(optimizer)
    kind = type(scaler)
    names = ("unscale_", "_unscale_grads_")
    if not isinstance(scaler, GradScaler) or any(
        name in vars(scaler) or getattr(kind, name) is not getattr(GradScaler, name) for name in names
    ):
        raise TypeError(
            f"`scaler` must be a torch.amp.GradScaler that unscales as torch's does, not {kind.__name__}: call its "
            "unscale_(optimizer), then clip"
        )


def _order(norm_type: float) -> float:
    p = as_float("norm_type", norm_type)
    if not p >= 1:
        raise ValueError(
            f"`norm_type` must be at least 1 here, not {norm_type}: below, the norm may be finite though a gradient is "
            "not. Unscale first, then clip"
        )
    return p
