r"""The rules of clipping: each is a small function from norms to coefficients.

    norms, one a group of gradients --rule--> coefficients, one a group: ``g <- g * coefficient``

The vector of norms lies on the gradients' device, in fp64, and so do the coefficients: a rule is a little arithmetic
there, without a sync. `by` says what a group is (see `fastclip.groups.By`): the same formula clips by the global norm,
by the norm of each parameter, layer or parameter group. A rule of your own is one function of the same shape::

    def halve_the_largest(norms: Tensor) -> Tensor:
        return torch.where(norms == norms.max(), 0.5, 1.0)

    fastclip.clip_grads_(model, halve_the_largest)  # or Rule(halve_the_largest, by="layer")

Only clipping by value is not a matter of norms: `ClipByValue` holds the bounds.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from itertools import repeat
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastclip.backends.coefficient import EPS
from fastclip.backends.interface import Bounds
from fastclip.foundation.arguments import positive, real
from fastclip.foundation.devices import for_graphs, upload
from fastclip.foundation.tracing import cached_tensors
from fastclip.foundation.warn import warn_caller
from fastclip.rules.groups import By

Bound: TypeAlias = float | Sequence[float] | Mapping[Any, float]
"""One number for all groups, a sequence with one for each in their order, or a mapping from each group's label."""

_R = TypeVar("_R", bound="_Bounded")


@dataclass(frozen=True)
class _Bounded:
    """What rules with bounds share: the bounds are checked when the rule is made, and given out by group."""

    bounds: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        for name in self.bounds:
            object.__setattr__(self, name, _numbers(name, getattr(self, name), self._number))

    def _number(self, name: str, value: object) -> float:
        return positive(name, value)

    def for_groups(self: _R, labels: Sequence[Hashable]) -> _R:
        """Return this rule with its bounds in the order of the groups.

        Raises:
            ValueError: A group has no bound, or there is a bound for no group.
        """
        ordered = {name: _in_order(name, getattr(self, name), labels) for name in self.bounds}
        return replace(self, **ordered) if any(not isinstance(b, float) for b in ordered.values()) else self

    def settings(self, labels: Sequence[Hashable]) -> dict[str, Any]:
        """Return the fields as plain data, for a checkpoint; without `by` where that is a function."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in self.bounds:
            if isinstance(values[name], Mapping):
                values[name] = dict(zip(labels, map(float, _by_label(name, values[name], labels)), strict=True))
        return {name: value for name, value in values.items() if not callable(value)}


@dataclass(frozen=True)
class _NormRule(_Bounded, ABC):
    """A rule of one bound; call it with the groups' norms for their coefficients."""

    def __call__(self, norms: Tensor) -> Tensor:
        """Return the coefficients, of the shape of `norms`."""
        bound = getattr(self, self.bounds[0])
        # A tensor, because torch takes number / tensor for number * (1 / tensor), and that is not 1 for c / c.
        bounds = torch.full_like(norms, bound) if isinstance(bound, float) else for_graphs(_on(norms.device, bound))
        return self._coefficients(norms, bounds)

    @abstractmethod
    def _coefficients(self, norms: Tensor, bounds: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ClipByNorm(_NormRule):
    r"""Scale each group whose norm is above `clip_norm` down to it; by default each parameter by itself.

    .. math:: g \leftarrow g \cdot \frac{\text{clip\_norm}}{\max(\|g\|_2,\; \text{clip\_norm})}

    TensorFlow's ``tf.clip_by_norm`` and Keras' ``clipnorm``: no epsilon. A NaN makes its whole group NaN; an infinite
    gradient zeroes the finite ones of its group and becomes NaN.

    Args:
        clip_norm: The largest norm of a group, above 0.
        by: What a group is.

    Raises:
        ValueError: `clip_norm` is not above 0 and finite.
    """

    clip_norm: Bound
    by: By = "parameter"
    bounds = ("clip_norm",)

    def _coefficients(self, norms: Tensor, bounds: Tensor) -> Tensor:
        return bounds / norms.clamp(min=bounds)


@dataclass(frozen=True)
class ClipByGlobalNorm(_NormRule):
    r"""Scale each group whose norm is above `clip_norm` down to it; by default all gradients as one.

    .. math:: g \leftarrow g \cdot \min\Big(\frac{\text{clip\_norm}}{\|g\|_2},\; 1\Big)

    TensorFlow's ``tf.clip_by_global_norm`` and Keras' ``global_clipnorm``: no epsilon, and *every* gradient of a group
    becomes NaN where the norm of the group is not finite.

    Args:
        clip_norm: The largest norm of a group, above 0.
        by: What a group is.

    Raises:
        ValueError: `clip_norm` is not above 0 and finite.
    """

    clip_norm: Bound
    by: By = "global"
    bounds = ("clip_norm",)

    def _coefficients(self, norms: Tensor, bounds: Tensor) -> Tensor:
        # The original multiplies by clip_norm * min(1 / norm, 1 / clip_norm), which is 1 but for rounding where
        # nothing is to be clipped. norm - norm is 0, or NaN where the norm is not finite: the original's own trick.
        return (bounds / norms).clamp(max=1.0) + (norms - norms)


@dataclass(frozen=True)
class ClipGradNorm(_NormRule):
    r"""Torch's rule: as :func:`fastclip.clip_grad_norm_`, with its epsilon, by default on all gradients as one.

    .. math:: g \leftarrow g \cdot \min\Big(\frac{\text{max\_norm}}{\|g\|_2 + 10^{-6}},\; 1\Big)

    Args:
        max_norm: The largest norm of a group, above 0.
        by: What a group is.

    Raises:
        ValueError: `max_norm` is not above 0 and finite.
    """

    max_norm: Bound
    by: By = "global"
    bounds = ("max_norm",)

    def _coefficients(self, norms: Tensor, bounds: Tensor) -> Tensor:
        return (bounds / (norms + EPS)).clamp(max=1.0)


@dataclass(frozen=True)
class ClipAtThreshold(_NormRule):
    r"""Where the norm of a group reaches `threshold`, scale the group so that its norm is the threshold.

    .. math:: \text{if } \|g\|_2 \ge c \text{ then } g \leftarrow c \cdot \frac{g}{\|g\|_2}

    The rule as Pascanu, Mikolov and Bengio wrote it ("On the difficulty of training recurrent neural networks", 2013,
    algorithm 1), to the letter: a norm that is NaN does not reach the threshold, and its group stays as it is.

    Args:
        threshold: The norm c from which on a group is scaled, above 0.
        by: What a group is.

    Raises:
        ValueError: `threshold` is not above 0 and finite.
    """

    threshold: Bound
    by: By = "global"
    bounds = ("threshold",)

    def _coefficients(self, norms: Tensor, bounds: Tensor) -> Tensor:
        return torch.where(norms >= bounds, bounds / norms, 1.0)


@dataclass(frozen=True)
class ClipByValue(_Bounded):
    r"""Clamp every element to [clip_value_min, clip_value_max]; the two need not be symmetric.

    .. math:: g_i \leftarrow \max(\min(g_i, \text{clip\_value\_max}), \text{clip\_value\_min})

    TensorFlow's ``tf.clip_by_value``; Keras' ``clipvalue=c`` is ``ClipByValue(-c, c)``. NaN stays NaN, and an infinity
    becomes the bound on its side. The bounds are rounded to each gradient's dtype. TensorFlow clamps integers, too;
    here they are refused, for autograd makes no gradients of integers, and what is one is no gradient.

    Args:
        clip_value_min: The smallest value allowed.
        clip_value_max: The largest value allowed.
        by: What a group is: matters where groups have bounds of their own.

    Raises:
        ValueError: A bound is NaN, or clip_value_min is above clip_value_max.
    """

    clip_value_min: Bound
    clip_value_max: Bound
    by: By = "global"
    bounds = ("clip_value_min", "clip_value_max")

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.clip_value_min, self.clip_value_max
        if not (isinstance(low, Mapping) or isinstance(high, Mapping)):  # whose order is known once groups are
            _check_order(low, high)

    def _number(self, name: str, value: object) -> float:
        number = real(name, value)
        if math.isnan(number):
            raise ValueError(f"`{name}` must be a number, not NaN")
        return number

    def limits(self, group_of: Sequence[int]) -> tuple[Bounds, Bounds]:
        """Return minimum and maximum: for all, or for each gradient, given the position of its group."""
        low, high = (
            bound if isinstance(bound, float) else [bound[group] for group in group_of]
            for bound in (self.clip_value_min, self.clip_value_max)
        )
        return low, high


@dataclass(frozen=True)
class Rule:
    """A rule of your own: a function from the norms of groups to their coefficients.

    Args:
        function: Takes the groups' norms, [groups] in fp64 on the gradients' device, and returns a coefficient for each
            or one for all. It should do without a sync (``float(norms[0])``, ``if norms[0] > 1``). A gradient whose
            coefficient is exactly 1 is not written. A callable object may keep a state; where it has ``state_dict`` and
            ``load_state_dict``, `attach` saves it with the optimizer.
        by: What a group is.
    """

    function: Callable[[Tensor], Tensor]
    by: By = "parameter"

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"`function` must be a function from norms to coefficients, not {self.function!r}")

    def __call__(self, norms: Tensor) -> Tensor:
        """Return the coefficients."""
        return self.function(norms.clone())  # it may work in place

    def for_groups(self, labels: Sequence[Hashable]) -> Rule:  # noqa: ARG002 - the signature is that of the other rules
        """Return itself: what its groups are called is nothing to a function."""
        return self

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", None) or repr(self.function)
        return f"Rule({name}, by={self.by!r})"


AnyRule: TypeAlias = ClipByNorm | ClipByGlobalNorm | ClipGradNorm | ClipAtThreshold | ClipByValue | Rule

BY_NAME: dict[str, Any] = {
    kind.__name__: kind for kind in (ClipByNorm, ClipByGlobalNorm, ClipGradNorm, ClipAtThreshold, ClipByValue)
}
"""The rules that a checkpoint can name."""


def as_rule(rule: object) -> AnyRule:
    """Take a rule for itself, and a function for a rule by parameter.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(rule, (_Bounded, Rule)):
        return rule  # type: ignore[return-value]  # each kind of _Bounded is listed
    if callable(rule) and not isinstance(rule, type):
        return Rule(rule)
    known = ", ".join([*BY_NAME, "Rule"])
    raise TypeError(f"`rule` must be a rule ({known}) or a function from norms to coefficients, not {rule!r}")


def _numbers(name: str, bound: object, number: Callable[[str, object], float]) -> Bound:
    """The bound with its numbers as floats, each of them checked."""
    if isinstance(bound, Mapping):
        for value in bound.values():
            number(name, value)
        return bound  # whose numbers are taken when its labels meet the groups: a defaultdict may have more
    if isinstance(bound, Sequence) and not isinstance(bound, (str, bytes)):
        return tuple(number(name, value) for value in bound)
    return number(name, bound)


def _in_order(name: str, bound: Bound, labels: Sequence[Hashable]) -> float | tuple[float, ...]:
    """The bound as one number, or as one for each label."""
    if isinstance(bound, float):
        return bound
    if isinstance(bound, Mapping):
        return _by_label(name, bound, labels)
    if len(bound) != len(labels):
        raise ValueError(f"`{name}` has {len(bound)} bounds for {len(labels)} groups: {_some(labels)}")
    return tuple(bound)


def _by_label(name: str, bound: Mapping[Any, float], labels: Sequence[Hashable]) -> tuple[float, ...]:
    """The bound of each label."""
    known = set(labels)
    unknown = [label for label in bound if label not in known]
    if unknown:
        raise ValueError(f"`{name}` has a bound for {unknown[0]!r}, which is no group: there are {_some(labels)}")
    if hasattr(bound, "__missing__"):
        bound = copy(bound)  # a defaultdict keeps what it is asked for, and the caller's is to stay as it is
    try:
        return tuple(bound[label] for label in labels)
    except KeyError as error:
        raise ValueError(f"`{name}` has no bound for the group {error}; a defaultdict gives one to the rest") from None


def _some(labels: Sequence[Hashable]) -> str:
    listed = ", ".join(repr(label) for label in labels[:10])
    return f"{listed} and {len(labels) - 10} more" if len(labels) > 10 else listed


def _check_order(minimum: float | Sequence[float], maximum: float | Sequence[float]) -> None:
    bounds = [repeat(b) if isinstance(b, float) else b for b in (minimum, maximum)]
    if isinstance(minimum, float) and isinstance(maximum, float):
        bounds = [[minimum], [maximum]]
    for low, high in zip(*bounds, strict=False):  # whether there is one for each group is not known yet
        if low > high:
            raise ValueError(f"`clip_value_min`, {low}, is above `clip_value_max`, {high}")


@cached_tensors(64)
def _on(device: torch.device, bounds: tuple[float, ...]) -> Tensor:
    """The groups' bounds on a device, uploaded once."""
    return upload(np.array(bounds), device, for_every_stream=True)


def state_of(rule: AnyRule, labels: Sequence[Hashable]) -> dict[str, Any]:
    """Return what a checkpoint holds of a rule: its name and settings, or the state of a function that has one."""
    if isinstance(rule, Rule):
        get_state = getattr(rule.function, "state_dict", None)
        return {"name": "Rule", "state": get_state() if get_state else None}
    return {"name": type(rule).__name__, "settings": rule.settings(labels)}


def from_state(rule: AnyRule, labels: Sequence[Hashable], state: dict[str, Any]) -> AnyRule:
    """Return the rule that a checkpoint holds; what it could not hold is taken from the rule in use.

    Like the learning rate, the bounds are the checkpoint's. It says so where that changes the rule.

    Raises:
        ValueError: The checkpoint's rule is unknown, or a function's state is there without a function to take it.
    """
    if state["name"] == "Rule":
        if not isinstance(rule, Rule):
            raise ValueError(
                f"the checkpoint was made with a rule of its own, but {rule} is attached: attach that rule"
            )
        if state["state"] is not None:
            rule.function.load_state_dict(state["state"])  # type: ignore[attr-defined]
        return rule
    if state["name"] not in BY_NAME:
        raise ValueError(f"the checkpoint was made with the rule {state['name']}, which this version does not know")
    if state == state_of(rule, labels):
        return rule
    kept = {"by": rule.by} if "by" not in state["settings"] else {}
    restored: AnyRule = BY_NAME[state["name"]](**state["settings"], **kept)
    warn_caller(f"the checkpoint's rule {restored} takes the place of {rule}")
    return restored
