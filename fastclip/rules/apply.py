"""What all in-place rules share: take the norms of groups, ask the rule, write the gradients.

Nothing here waits for a GPU. The number of launches depends neither on the number of gradients nor on that of groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress
from typing import TypeGuard

import torch
from torch import Tensor

from fastclip.backends.interface import Bounds
from fastclip.core.checks import check_bounds, check_whole
from fastclip.core.collect import some_of, weights_of
from fastclip.core.dtensors import present
from fastclip.core.gradients import Gradients
from fastclip.core.owners import Owners
from fastclip.core.prepare import prepare
from fastclip.core.prepared import Prepared
from fastclip.core.units import check_units, clip_units_, has_units
from fastclip.foundation.arithmetic import norm_of_norms, stable_norm
from fastclip.foundation.devices import index_of, on, wide_dtype
from fastclip.rules.by_weight import ClipByWeightNorm
from fastclip.rules.catalogue import AnyRule
from fastclip.rules.formulas import ClipByValue, Measured
from fastclip.rules.groups import Groups, group


@dataclass(frozen=True)
class ClipResult:
    """What a call found and did. Its tensors are on the gradients' device: reading a number on the host is a sync.

    Attributes:
        norm: The 2-norm of all gradients before clipping: 0-dim, fp64.
        norms: The 2-norm of each parameter's gradient, [parameters], fp64, 0 for a parameter without one; None if the
            call did not ask for them.
        present: The positions of the parameters that have a gradient.
        groups: The parameters of each group, and the groups' labels.
        group_norms: The 2-norm of each group, [groups], fp64.
        coefficients: The factor of each group, [groups], fp64; None if nothing was clipped by the norm of a group.
        thresholds: The norm above which each group is scaled, [groups], fp64, infinite if nothing limits its own norm
            (in the warm-up of `ClipByEMA` the global norm limits it); None if the rule has none.
        changed: 0-dim bool: whether a value was outside the bounds, or a unit above its own; None if neither values nor
            units were clipped.
    """

    norm: Tensor
    norms: Tensor | None
    present: Sequence[int]
    groups: Groups
    group_norms: Tensor
    coefficients: Tensor | None = None
    thresholds: Tensor | None = None
    changed: Tensor | None = None

    @cached_property
    def clipped(self) -> Tensor:
        """0-dim bool, on the device: whether a coefficient was not 1, or a value or unit was out of bounds."""
        if self.coefficients is not None:
            return (self.coefficients != 1).any()
        return torch.zeros((), dtype=torch.bool, device=self.norm.device) if self.changed is None else self.changed

    @cached_property
    def clipped_norm(self) -> Tensor | None:
        """The 2-norm of all gradients after clipping: 0-dim, fp64, on the device. It does not read the gradients.

        None if values or units were clipped: the norms before do not determine the norm after.
        """
        if self.changed is not None:
            return None
        if self.coefficients is None:
            return self.norm
        norms = self.group_norms * self.coefficients
        return norms[0].abs() if len(norms) == 1 else stable_norm(norms, 2.0)


def groups_of(rule: AnyRule | None, owners: Owners) -> Groups:
    """Return the groups of a rule. By unit, each parameter is a group whose units are clipped one by one.

    Raises:
        TypeError: The rule's `by` is not a grouping.
        ValueError: Its `by` needs names or parameter groups that were not given, or has another number of labels.
    """
    if rule is None:
        return group(owners, "global")
    return group(owners, "parameter" if _is_by_unit(rule) else rule.by)


def _is_by_unit(rule: AnyRule | None) -> TypeGuard[ClipByWeightNorm]:
    return isinstance(rule, ClipByWeightNorm) and rule.by == "unit"


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
    """Take the norms of the groups, turn them into coefficients by the rule, and scale the gradients.

    Args:
        grads: The gradients.
        rule: The rule; None only measures.
        groups: The groups of the gradients' owners.
        each: Whether to take the norm of each parameter even if the rule does not need it.
        scale: The loss scale in the gradients (one element): norms are those without it.
        write: Whether to scale the gradients; False leaves that to the caller. Values and units are always clipped.
    """
    if isinstance(rule, ClipByValue):
        return _clamp(grads, rule, groups, each=each, scale=scale)
    if _is_by_unit(rule):
        return _clip_units(grads, rule, groups, scale=scale)
    if rule is not None:
        rule = rule.for_groups(groups.labels)
    check_whole(grads)
    if not _has_gradients(grads):
        return _empty_result(grads, groups)
    prepared = prepare(grads, in_place=rule is not None)
    norm, norms, group_norms = _take_norms(prepared, grads, groups, each=each, scale=scale)
    if rule is None:
        return ClipResult(norm, norms, present(grads), groups, group_norms)
    weights = _weight_norms(grads, groups) if isinstance(rule, ClipByWeightNorm) else None
    coefficients, thresholds = rule.decide(Measured(groups.labels, group_norms, norm, weights))
    if write:
        prepared.scale_(grads, _per_gradient(coefficients, grads, groups))
    return ClipResult(norm, norms, present(grads), groups, group_norms, coefficients, thresholds)


def _clip_units(grads: Gradients, rule: ClipByWeightNorm, groups: Groups, *, scale: Tensor | None) -> ClipResult:
    """Clip the units of each parameter by themselves. A parameter that is one unit is clipped as by parameter."""
    rule = rule.for_groups(groups.labels)
    check_whole(grads)
    if not _has_gradients(grads):
        return _empty_result(grads, groups)
    weights = _weights(grads)
    chosen = set(compress(weights.positions, map(has_units, weights.tensors)))
    with_units, whole = some_of(grads, chosen), some_of(weights, set(weights.positions) - chosen)
    check_units(with_units, some_of(weights, chosen))
    prepared = prepare(grads, in_place=True)
    norm, norms, group_norms = _take_norms(prepared, grads, groups, each=True, scale=scale)
    limits = Measured(groups.labels, group_norms, norm, _norms_of_whole(whole, norm))
    coefficients = rule.decide(limits).coefficients
    ratios = rule.ratios(group_norms)[index_of(with_units.positions, norm.device)]
    if scale is not None:
        ratios = ratios * on(norm.device, scale.reshape(()))
    flags = clip_units_(with_units, some_of(weights, set(with_units.positions)), ratios, rule.eps)
    prepared.scale_(grads, _per_gradient(coefficients, grads, groups))  # marks all gradients as changed
    changed = _any([coefficients != 1, *prepared.flags_of_all(flags)], prepared.device)
    return ClipResult(norm, norms, present(grads), groups, group_norms, changed=changed)


def _norms_of_whole(weights: Gradients, norm: Tensor) -> Tensor:
    """Return the norms of parameters that are one unit each, in [parameters], and infinity for the others."""
    norms = norm.new_full((len(weights.owners.tensors),), float("inf"))
    if not weights.tensors and not weights.has_dtensors:  # with DTensors it is a collective
        return norms
    index = index_of(weights.positions, norm.device)
    own = _per_parameter(on(norm.device, prepare(weights, in_place=False).norms()), weights)
    return norms.index_copy(0, index, own[index])


def _clamp(grads: Gradients, rule: ClipByValue, groups: Groups, *, each: bool, scale: Tensor | None) -> ClipResult:
    """Take the norms of the groups, and clamp the gradients. FSDP1's shards are accepted: clamping needs no norm."""
    limits = value_limits(grads, rule, groups)
    if not _has_gradients(grads):
        return _empty_result(grads, groups)
    prepared = prepare(grads, in_place=True)
    norm, norms, group_norms = _take_norms(prepared, grads, groups, each=each, scale=scale)
    changed = _any(prepared.clamp_(grads, *limits, watch=True), prepared.device)
    return ClipResult(norm, norms, present(grads), groups, group_norms, changed=changed)


def value_limits(grads: Gradients, rule: ClipByValue, groups: Groups) -> tuple[Bounds, Bounds]:
    """Return the minimum and the maximum: each one number for all gradients, or one for each.

    Raises:
        NotImplementedError: A gradient is complex.
        RuntimeError: A gradient cannot be clamped, or a bound is beyond its dtype.
        ValueError: The bounds do not fit the groups.
    """
    limits = rule.for_groups(groups.labels).limits(groups.of, grads.positions)
    check_bounds(grads, *limits)
    return limits


def _has_gradients(grads: Gradients) -> bool:
    """Whether this process has a gradient, or, for DTensors, another process may have one and wait for this one."""
    return bool(grads.tensors) or grads.has_dtensors


def _empty_result(grads: Gradients, groups: Groups) -> ClipResult:
    norms = torch.zeros(len(grads.owners.tensors), dtype=torch.float64)
    group_norms = torch.zeros(len(groups.labels), dtype=torch.float64)
    return ClipResult(norms.sum(), norms, [], groups, group_norms)


def _take_norms(
    prepared: Prepared, grads: Gradients, groups: Groups, *, each: bool, scale: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the norm of all gradients, that of each parameter (None if nobody needs it) and that of each group."""
    if not each and groups.is_one:
        norm = _unscaled(prepared.reduce(2.0, float("inf"), wide_dtype(prepared.device)).norm, scale)
        return norm, None, norm.reshape(1)
    norms = _per_parameter(_unscaled(prepared.norms(), scale), grads)
    norm = norm_of_norms(norms, prepared.dtype)
    return norm, norms, norm.reshape(1) if groups.is_one else groups.combine(norms, prepared.dtype)


def _weights(grads: Gradients) -> Gradients:
    """Return the parameters that have a gradient or require one, which all processes agree on."""
    here = set(grads.positions)
    owners = enumerate(grads.owners.tensors)
    return weights_of(grads, [i for i, owner in owners if i in here or getattr(owner, "requires_grad", False)])


def _weight_norms(grads: Gradients, groups: Groups) -> Tensor:
    """Return the norm of each group's parameters; see `_weights`."""
    weights = _weights(grads)
    prepared = prepare(weights, in_place=False)
    return groups.combine(_per_parameter(prepared.norms(), weights), prepared.dtype)


def _unscaled(norms: Tensor, scale: Tensor | None) -> Tensor:
    return norms if scale is None else norms / scale.to(norms.device, norms.dtype).reshape(())


def _per_parameter(norms: Tensor, grads: Gradients) -> Tensor:
    """Return the norm of each parameter's gradient from the norms of the gradients: 0 for a parameter without one."""
    if len(norms) == len(grads.owners.tensors):
        return norms
    return norms.new_zeros(len(grads.owners.tensors)).index_copy(0, index_of(grads.positions, norms.device), norms)


def _per_gradient(coefficients: Tensor, grads: Gradients, groups: Groups) -> Tensor:
    """Return the coefficient of each gradient from those of the groups; one for all gradients if there is one group."""
    if groups.is_one:
        return coefficients[0]
    if len(grads.tensors) == len(grads.owners.tensors):
        return groups.spread(coefficients)
    return groups.spread(coefficients)[index_of(grads.positions, coefficients.device)]


def _any(flags: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return whether any flag of any plan is set: 0-dim bool. There are no flags if no gradient has elements."""
    found = [flag.any().to(device) for flag in flags]
    return torch.stack(found).any() if found else torch.zeros((), dtype=torch.bool, device=device)
