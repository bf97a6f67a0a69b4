"""The public functions that clip in place by any rule, and `measure_grads`.

Each collects the gradients, groups them, and calls `fastclip.rules.apply`. TensorFlow's three functions are rules under
their own names.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastclip.core.collect import collect
from fastclip.core.dtensors import as_plain
from fastclip.core.owners import Parameters
from fastclip.core.prepare import prepare
from fastclip.foundation.devices import on
from fastclip.foundation.tracing import untraced
from fastclip.rules.apply import ClipResult, apply_rule, groups_of, value_limits
from fastclip.rules.bounds import Bound
from fastclip.rules.catalogue import AsRule, as_rule
from fastclip.rules.formulas import ClipByGlobalNorm, ClipByNorm, ClipByValue
from fastclip.rules.groups import By, group


@untraced
def clip_grads_(parameters: Parameters, rule: AsRule) -> ClipResult:
    r"""Clip gradients in place by a rule.

    .. math:: g_t \leftarrow g_t \cdot \text{rule}\big(\|g\|_2 \text{ of each group}\big)_{\text{group}(t)}

    Args:
        parameters: A tensor, a module, an iterable of tensors or of (name, tensor) pairs, or parameter groups as in
            ``optimizer.param_groups``; ``.grad`` is clipped.
        rule: A rule such as `fastclip.ClipByNorm` (see `fastclip.rules.formulas`), or a function from the vector of the
            parameters' norms to coefficients.

    Returns:
        The norms before clipping and the coefficients, all on the gradients' device.

    Raises:
        RuntimeError: A gradient cannot be written in place, or a bound is beyond its dtype; or a CUDA graph is being
            captured, and an adaptive rule has no state yet.
        TypeError: `parameters` holds something other than tensors, or `rule` is not a rule.
        ValueError: The rule's bounds or coefficients do not fit the groups, or an adaptive rule has learned the norms
            of other groups.
        NotImplementedError: A gradient is complex, and the rule clips by value; or the rule is by unit, and a gradient
            is sparse, or sharded other than by dimension 0.

    Example:
        >>> fastclip.clip_grads_(model, fastclip.ClipByNorm({"encoder": 1.0, "head": 0.1}, by="layer"))
    """
    checked = as_rule(rule)
    grads = collect(parameters)
    return apply_rule(grads, checked, groups_of(checked, grads.owners))


@untraced
def clip_by_value_(parameters: Parameters, clip_value_min: Bound, clip_value_max: Bound, *, by: By = "global") -> None:
    r"""Clamp every element of the gradients in place to [clip_value_min, clip_value_max].

    .. math:: g_i \leftarrow \max(\min(g_i, \text{clip\_value\_max}), \text{clip\_value\_min})

    This is TensorFlow's ``tf.clip_by_value``: see `ClipByValue`. It takes one pass over the gradients, and writes only
    where something is out of bounds. Unlike TensorFlow it raises for integers, which cannot be gradients.

    Args:
        parameters: As in `clip_grads_`.
        clip_value_min: The smallest value allowed; a number, or one for each group.
        clip_value_max: The largest value allowed.
        by: What a group is.

    Raises:
        NotImplementedError: A gradient is complex.
        RuntimeError: A bound is beyond a gradient's dtype, or a gradient cannot be written in place.
        TypeError: `parameters` holds something other than tensors, or a bound is not a number.
        ValueError: A bound is NaN, or clip_value_min is above clip_value_max.
    """
    rule = ClipByValue(clip_value_min, clip_value_max, by)
    grads = collect(parameters)
    limits = value_limits(grads, rule, group(grads.owners, by))
    if grads.tensors:
        prepare(grads, in_place=True).clamp_(grads, *limits)


@untraced
def clip_by_norm_(parameters: Parameters, clip_norm: Bound, *, by: By = "parameter") -> Tensor:
    r"""Scale each gradient in place so that its own 2-norm is at most `clip_norm`.

    .. math:: g_t \leftarrow g_t \cdot \frac{\text{clip\_norm}}{\max(\|g_t\|_2,\; \text{clip\_norm})}

    This is TensorFlow's ``tf.clip_by_norm`` of each gradient, and Keras' ``clipnorm``: see `ClipByNorm`.

    Args:
        parameters: As in `clip_grads_`.
        clip_norm: The largest norm allowed, above 0; a number, or one for each group.
        by: What a group is.

    Returns:
        The norms before clipping, [groups], fp64, on the first gradient's device.

    Raises:
        RuntimeError: A gradient cannot be written in place.
        TypeError: `parameters` holds something other than tensors, or a bound is not a number.
        ValueError: `clip_norm` is not above 0 and finite.
    """
    return clip_grads_(parameters, ClipByNorm(clip_norm, by)).group_norms


@untraced
def clip_by_global_norm_(parameters: Parameters, clip_norm: float, use_norm: Tensor | float | None = None) -> Tensor:
    r"""Scale all gradients in place so that their global 2-norm is at most `clip_norm`.

    .. math:: g_t \leftarrow g_t \cdot \min\Big(\frac{\text{clip\_norm}}{\|g\|_2},\; 1\Big)

    This is TensorFlow's ``tf.clip_by_global_norm`` and Keras' ``global_clipnorm``: no epsilon, and every gradient
    becomes NaN if the norm is not finite. See `ClipByGlobalNorm`.

    Args:
        parameters: As in `clip_grads_`.
        clip_norm: The largest norm allowed, above 0.
        use_norm: The norm, if it is already known; then the gradients are not read for it.

    Returns:
        The norm before clipping, or `use_norm`: 0-dim, fp64, on the first gradient's device.

    Raises:
        RuntimeError: A gradient cannot be written in place.
        TypeError: `parameters` holds something other than tensors, or `clip_norm` or `use_norm` is not a number.
        ValueError: `clip_norm` is not above 0 and finite, or `use_norm` has more than one element.
    """
    rule = ClipByGlobalNorm(clip_norm)
    grads = collect(parameters)
    if use_norm is None:
        return apply_rule(grads, rule, group(grads.owners, "global"), each=False).norm
    norm = _as_norm(use_norm)
    if not grads.tensors:
        return on(norm.device, norm)
    prepared = prepare(grads, in_place=True)
    norm = on(prepared.device, norm)
    prepared.scale_(grads, rule(norm))
    return norm


def _as_norm(use_norm: Tensor | float) -> Tensor:
    """Return a norm that the caller passed, as a 0-dim tensor."""
    try:
        norm = torch.as_tensor(as_plain(use_norm)).detach()
    except (TypeError, ValueError, RuntimeError):  # torch raises each of them for something that is not a number
        raise TypeError(f"`use_norm` must be one number, not {use_norm!r}") from None
    if norm.numel() != 1:
        raise ValueError(f"`use_norm` must be one number, not a tensor of shape {tuple(norm.shape)}")
    return norm.reshape(())


@untraced
def measure_grads(parameters: Parameters, by: By = "parameter") -> ClipResult:
    r"""Take the norms of gradients without clipping: of each group, of each parameter and of all; write nothing.

    .. math:: \|g\|_2 = \Big(\sum_t \|g_t\|_2^2\Big)^{1/2}

    Args:
        parameters: As in `clip_grads_`.
        by: What a group is. With "global" only the norm of all is taken: one launch on a GPU instead of two.

    Returns:
        The norms, on the gradients' device.

    Raises:
        TypeError: `parameters` holds something other than tensors, or `by` is not a grouping.
        ValueError: `by` needs names or parameter groups that were not given, or has another number of labels.
    """
    grads = collect(parameters)
    return apply_rule(grads, None, group(grads.owners, by), each=by != "global")
