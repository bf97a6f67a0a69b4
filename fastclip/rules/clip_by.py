"""Clipping by any rule, and measuring without clipping; TensorFlow's functions are three of the rules by name.

Each call reads straight down: collect the gradients, group them, reduce them to a norm for each group, ask the rule for
the coefficients, scale. On a GPU nothing waits for the device, and the number of launches depends neither on the number
of gradients nor on that of groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastclip.backends.interface import Bounds
from fastclip.core.checks import check_bounds, check_whole
from fastclip.core.collect import collect
from fastclip.core.dtensors import as_plain
from fastclip.core.gradients import Gradients
from fastclip.core.owners import Parameters
from fastclip.core.prepare import prepare
from fastclip.core.sharding.sharded import present
from fastclip.foundation.arithmetic import norm_of_norms, stable_norm
from fastclip.foundation.devices import index_of, on, wide_dtype
from fastclip.foundation.tracing import untraced
from fastclip.rules.formulas import AnyRule, Bound, ClipByGlobalNorm, ClipByNorm, ClipByValue, as_rule
from fastclip.rules.groups import By, Groups, group


@dataclass(frozen=True)
class ClipResult:
    """What a call found and did. Its tensors lie on the gradients' device: to look at a number is to wait for it.

    Attributes:
        norm: The 2-norm of all gradients before clipping: 0-dim, fp64.
        norms: The 2-norm of each parameter's gradient, [parameters], fp64, 0 where a parameter has none; None where it
            was not asked for.
        present: The positions of the parameters that have a gradient.
        groups: Who belongs together, and the groups' labels.
        group_norms: The 2-norm of each group, [groups], fp64.
        coefficients: What each group was multiplied by, [groups], fp64; None where nothing was clipped by norm.
        changed: 0-dim bool: whether a value was outside the bounds, where values were clamped.
    """

    norm: Tensor
    norms: Tensor | None
    present: Sequence[int]
    groups: Groups
    group_norms: Tensor
    coefficients: Tensor | None = None
    changed: Tensor | None = None

    @cached_property
    def clipped(self) -> Tensor:
        """0-dim bool, on the device: whether a coefficient was not 1, or a value outside the bounds."""
        if self.coefficients is not None:
            return (self.coefficients != 1).any()
        return torch.zeros((), dtype=torch.bool, device=self.norm.device) if self.changed is None else self.changed

    @cached_property
    def clipped_norm(self) -> Tensor | None:
        """The 2-norm of all gradients after clipping: 0-dim, fp64, on the device. The gradients are not read for it.

        None where values were clamped, of which the norms before tell nothing.
        """
        if self.changed is not None:
            return None
        if self.coefficients is None:
            return self.norm
        norms = self.group_norms * self.coefficients
        return norms[0].abs() if len(norms) == 1 else stable_norm(norms, 2.0)


@untraced
def clip_grads_(parameters: Parameters, rule: AnyRule | Callable[[Tensor], Tensor]) -> ClipResult:
    r"""Clip gradients in place by a rule, and return what was found.

    .. math:: g_t \leftarrow g_t \cdot \text{rule}\big(\|g\|_2 \text{ of each group}\big)_{\text{group}(t)}

    Args:
        parameters: A tensor, a module, an iterable of tensors or of (name, tensor) pairs, or parameter groups as in
            ``optimizer.param_groups``; ``.grad`` is clipped.
        rule: One of `fastclip.rules`, or a function from the vector of the parameters' norms to coefficients.

    Returns:
        Norms before clipping and coefficients, all on the gradients' device.

    Raises:
        RuntimeError: A gradient cannot be written in place, or a bound is beyond its dtype.
        TypeError: `parameters` holds something other than tensors, or `rule` is no rule.
        ValueError: The rule's bounds or coefficients do not fit the groups.
        NotImplementedError: A gradient is complex, and the rule clips by value.

    Example:
        >>> fastclip.clip_grads_(model, fastclip.ClipByNorm({"encoder": 1.0, "head": 0.1}, by="layer"))
    """
    checked = as_rule(rule)
    grads = collect(parameters)
    return apply_rule(grads, checked, group(grads.owners, checked.by))


@untraced
def clip_by_value_(parameters: Parameters, clip_value_min: Bound, clip_value_max: Bound, *, by: By = "global") -> None:
    r"""Clamp every element of the gradients in place to [clip_value_min, clip_value_max].

    .. math:: g_i \leftarrow \max(\min(g_i, \text{clip\_value\_max}), \text{clip\_value\_min})

    TensorFlow's ``tf.clip_by_value``: see `ClipByValue`. One pass, which writes only where something is out of bounds.
    Unlike the original it refuses integers, of which there are no gradients.

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
    groups = group(grads.owners, by)
    rule = rule.for_groups(groups.labels)
    if grads.tensors:
        limits = _limits(rule, grads, groups)
        check_bounds(grads, *limits)
        prepare(grads, in_place=True).clamp_(grads, *limits)


@untraced
def clip_by_norm_(parameters: Parameters, clip_norm: Bound, *, by: By = "parameter") -> Tensor:
    r"""Scale each gradient in place so that its own 2-norm is at most `clip_norm`.

    .. math:: g_t \leftarrow g_t \cdot \frac{\text{clip\_norm}}{\max(\|g_t\|_2,\; \text{clip\_norm})}

    TensorFlow's ``tf.clip_by_norm`` of each gradient, and Keras' ``clipnorm``: see `ClipByNorm`.

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

    TensorFlow's ``tf.clip_by_global_norm`` and Keras' ``global_clipnorm``: no epsilon, and every gradient becomes NaN
    where the norm is not finite. See `ClipByGlobalNorm`.

    Args:
        parameters: As in `clip_grads_`.
        clip_norm: The largest norm allowed, above 0.
        use_norm: The norm, where it is known already; the gradients are not read for it then.

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
    try:
        norm = torch.as_tensor(as_plain(use_norm)).detach()
    except (TypeError, ValueError, RuntimeError):  # all of which torch raises for what is no number
        raise TypeError(f"`use_norm` must be one number, not {use_norm!r}") from None
    if norm.numel() != 1:
        raise ValueError(f"`use_norm` must be one number, not a tensor of shape {tuple(norm.shape)}")
    if not grads.tensors:
        return on(norm.device, norm.reshape(()))
    prepared = prepare(grads, in_place=True)
    norm = on(prepared.device, norm.reshape(()))
    prepared.scale_(grads, rule(norm))
    return norm


@untraced
def measure_grads(parameters: Parameters, by: By = "parameter") -> ClipResult:
    r"""Take the norms of gradients, each group's, each parameter's and that of all, without clipping; write nothing.

    .. math:: \|g\|_2 = \Big(\sum_t \|g_t\|_2^2\Big)^{1/2}

    Args:
        parameters: As in `clip_grads_`.
        by: What a group is. With "global" the norm of all is the only one that is taken: one launch on a GPU, not two.

    Returns:
        The norms, on the gradients' device.

    Raises:
        TypeError: `parameters` holds something other than tensors, or `by` is no grouping.
        ValueError: `by` does not fit what is known of the parameters.
    """
    grads = collect(parameters)
    return apply_rule(grads, None, group(grads.owners, by), each=by != "global")


@torch.no_grad()
def apply_rule(
    grads: Gradients,
    rule: AnyRule | None,
    groups: Groups,
    *,
    each: bool = True,
    scale: Tensor | None = None,
    write: bool = True,
) -> ClipResult:
    """Reduce, ask the rule, scale.

    Args:
        grads: The gradients.
        rule: The rule; None measures only.
        groups: The groups of the gradients' owners.
        each: Whether the norm of each parameter is wanted, though the rule may do without.
        scale: What the gradients were multiplied by (a loss scale, one element): norms are those without it.
        write: Whether to multiply by the coefficients, or to leave that, too, to the caller.
    """
    if rule is not None:
        rule = rule.for_groups(groups.labels)
    if not isinstance(rule, ClipByValue):  # which clips parts as well as wholes
        check_whole(grads)
    if not grads.tensors and not grads.has_dtensors:
        return _of_nothing(grads, groups)
    limits = _limits(rule, grads, groups) if isinstance(rule, ClipByValue) else None
    if limits is not None:
        check_bounds(grads, *limits)
    prepared = prepare(grads, in_place=rule is not None)
    norms = None
    if each or not groups.is_one:
        norms = _scattered(_unscaled(prepared.norms(), scale), grads)
        norm = norm_of_norms(norms, prepared.dtype)
        group_norms = norm.reshape(1) if groups.is_one else groups.combine(norms, prepared.dtype)
    else:
        norm = _unscaled(prepared.reduce(2.0, float("inf"), wide_dtype(prepared.device)).norm, scale)
        group_norms = norm.reshape(1)
    coefficients = changed = None
    if limits is not None:
        changed = _any(prepared.clamp_(grads, *limits, watch=True), prepared.device)
    elif rule is not None and not isinstance(rule, ClipByValue):
        coefficients = _coefficients(rule, group_norms)
        if write:
            prepared.scale_(grads, _gathered(coefficients, grads, groups))
    return ClipResult(norm, norms, present(grads), groups, group_norms, coefficients, changed)


def _of_nothing(grads: Gradients, groups: Groups) -> ClipResult:
    norms = torch.zeros(len(grads.owners.tensors), dtype=torch.float64)
    group_norms = torch.zeros(len(groups.labels), dtype=torch.float64)
    return ClipResult(norms.sum(), norms, [], groups, group_norms)


def _any(flags: Sequence[Tensor], device: torch.device) -> Tensor:
    """Whether any flag of any plan is set: 0-dim. There is no plan where no gradient has elements."""
    found = [flag.any().to(device) for flag in flags]
    return torch.stack(found).any() if found else torch.zeros((), dtype=torch.bool, device=device)


def _limits(rule: ClipByValue, grads: Gradients, groups: Groups) -> tuple[Bounds, Bounds]:
    return rule.limits([groups.of[position] for position in grads.positions])


def _unscaled(norms: Tensor, scale: Tensor | None) -> Tensor:
    return norms if scale is None else norms / scale.to(norms.device, norms.dtype).reshape(())


def _scattered(norms: Tensor, grads: Gradients) -> Tensor:
    """From the norms of gradients those of all parameters: 0 where there is no gradient."""
    if len(norms) == len(grads.owners.tensors):
        return norms
    return norms.new_zeros(len(grads.owners.tensors)).index_copy(0, index_of(grads.positions, norms.device), norms)


def _gathered(coefficients: Tensor, grads: Gradients, groups: Groups) -> Tensor:
    """From the coefficients of groups those of gradients; one for all where there is one group."""
    if groups.is_one:
        return coefficients[0]
    if len(grads.tensors) == len(grads.owners.tensors):
        return groups.spread(coefficients)
    return groups.spread(coefficients)[index_of(grads.positions, coefficients.device)]


def _coefficients(rule: Callable[[Tensor], Tensor], norms: Tensor) -> Tensor:
    """Ask the rule, and see that its answer fits the groups."""
    answer = rule(norms)
    try:
        coefficients = torch.as_tensor(answer, dtype=norms.dtype, device=norms.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise type(error)(f"{rule!r} returned {answer!r}, not coefficients: {error}") from None
    if coefficients.shape not in (norms.shape, (), (1,)):
        raise ValueError(
            f"{rule!r} returned coefficients of shape {tuple(coefficients.shape)} for norms of shape "
            f"{tuple(norms.shape)}: return one for each, or one for all"
        )
    return coefficients.expand(norms.shape)
