r"""The rules of clipping: each is a small function from norms to coefficients.

    norms, one for each group --rule--> coefficients, one for each group: ``g <- g * coefficient``

Norms and coefficients are fp64 vectors on the gradients' device, so a rule is a little arithmetic there, without a
sync. `by` defines the groups (see `fastclip.rules.groups.By`): the same formula clips by the global norm, or by the
norm of each parameter, layer or parameter group. A rule of your own is one function of the same shape::

    def halve_the_largest(norms: Tensor) -> Tensor:
        return torch.where(norms == norms.max(), 0.5, 1.0)

    fastclip.clip_grads_(model, halve_the_largest)  # or Rule(halve_the_largest, by="layer")

`ClipByValue` is the only rule without norms: it holds a minimum and a maximum for every element.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastclip.backends.coefficient import EPS
from fastclip.backends.interface import Bounds
from fastclip.foundation.arguments import positive, real
from fastclip.rules.bounds import Bound, as_tensor, by_label, check_order, in_order, read_bound
from fastclip.rules.groups import By

_R = TypeVar("_R", bound="RuleWithBounds")


@dataclass(frozen=True)
class RuleWithBounds:
    """The base of every rule with fixed bounds: checks them when the rule is made, and puts them in group order."""

    bounds: ClassVar[tuple[str, ...]]  # the names of the fields that are bounds

    def __post_init__(self) -> None:
        for name in self.bounds:
            object.__setattr__(self, name, read_bound(name, getattr(self, name), self._read_number))

    def _read_number(self, name: str, value: object) -> float:
        return positive(name, value)

    def for_groups(self: _R, labels: Sequence[Hashable]) -> _R:
        """Return this rule with its bounds in the order of the groups.

        Raises:
            ValueError: A group has no bound, or a bound belongs to no group.
        """
        ordered = {name: in_order(name, getattr(self, name), labels) for name in self.bounds}
        return replace(self, **ordered) if any(isinstance(getattr(self, b), Mapping) for b in self.bounds) else self

    def settings(self, labels: Sequence[Hashable]) -> dict[str, Any]:
        """Return the fields as plain data for a checkpoint. `by` is left out if it is a function."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in self.bounds:
            if isinstance(values[name], Mapping):
                values[name] = dict(zip(labels, map(float, by_label(name, values[name], labels)), strict=True))
        return {name: value for name, value in values.items() if not callable(value)}


class Measured(NamedTuple):
    """What a rule knows about the gradients; all tensors are fp64 on one device.

    Attributes:
        labels: The groups' labels.
        norms: The 2-norm of each group, [groups].
        total: The 2-norm of all gradients: 0-dim.
        weights: The 2-norm of each group's parameters, [groups]; None if the rule does not ask for them.
    """

    labels: tuple[Hashable, ...]
    norms: Tensor
    total: Tensor
    weights: Tensor | None


class Decision(NamedTuple):
    """What a rule does to the gradients; both tensors are [groups].

    Attributes:
        coefficients: The factor of each group.
        thresholds: The norm above which a group is scaled; None if the rule has none.
    """

    coefficients: Tensor
    thresholds: Tensor | None


@dataclass(frozen=True)
class _NormRule(RuleWithBounds, ABC):
    """A rule with one bound. Calling it with the groups' norms returns their coefficients."""

    def __call__(self, norms: Tensor) -> Tensor:
        """Return the coefficients, in the shape of `norms`."""
        return self._coefficients(norms, as_tensor(getattr(self, self.bounds[0]), norms))

    def decide(self, measured: Measured) -> Decision:
        """Return the coefficients, and the bounds as thresholds."""
        bounds = as_tensor(getattr(self, self.bounds[0]), measured.norms)
        return Decision(self._coefficients(measured.norms, bounds), bounds)

    @abstractmethod
    def _coefficients(self, norms: Tensor, bounds: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ClipByNorm(_NormRule):
    r"""Scale each group whose norm is above `clip_norm` down to that norm; by default each parameter is a group.

    .. math:: g \leftarrow g \cdot \frac{\text{clip\_norm}}{\max(\|g\|_2,\; \text{clip\_norm})}

    This is TensorFlow's ``tf.clip_by_norm`` and Keras' ``clipnorm``: no epsilon. A NaN makes its whole group NaN. An
    infinite element zeroes the finite elements of its group and becomes NaN itself.

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
    r"""Scale each group whose norm is above `clip_norm` down to that norm; by default all gradients are one group.

    .. math:: g \leftarrow g \cdot \min\Big(\frac{\text{clip\_norm}}{\|g\|_2},\; 1\Big)

    This is TensorFlow's ``tf.clip_by_global_norm`` and Keras' ``global_clipnorm``: no epsilon. If the norm of a group
    is not finite, *every* gradient of the group becomes NaN.

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
        # TensorFlow multiplies by clip_norm * min(1 / norm, 1 / clip_norm). If there is nothing to clip, that is 1
        # except for rounding. TensorFlow also adds norm - norm, which is 0, or NaN if the norm is not finite.
        return (bounds / norms).clamp(max=1.0) + (norms - norms)


@dataclass(frozen=True)
class ClipGradNorm(_NormRule):
    r"""Torch's rule: as :func:`fastclip.clip_grad_norm_`, with its epsilon; by default all gradients are one group.

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
    r"""If the norm of a group reaches `threshold`, scale the group so that its norm is the threshold.

    .. math:: \text{if } \|g\|_2 \ge c \text{ then } g \leftarrow c \cdot \frac{g}{\|g\|_2}

    The rule exactly as Pascanu, Mikolov and Bengio wrote it ("On the difficulty of training recurrent neural
    networks", 2013, algorithm 1). A norm that is NaN does not reach the threshold, so its group stays unchanged.

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
class ClipByValue(RuleWithBounds):
    r"""Clamp every element to [clip_value_min, clip_value_max]; the two need not be symmetric.

    .. math:: g_i \leftarrow \max(\min(g_i, \text{clip\_value\_max}), \text{clip\_value\_min})

    This is TensorFlow's ``tf.clip_by_value``; Keras' ``clipvalue=c`` is ``ClipByValue(-c, c)``. NaN stays NaN, and an
    infinity becomes the bound on its side. The bounds are rounded to each gradient's dtype. TensorFlow clamps integers
    too. Here integers raise an error: autograd computes no gradients of integer dtype, so they cannot be gradients.

    Args:
        clip_value_min: The smallest value allowed.
        clip_value_max: The largest value allowed.
        by: What a group is; it matters only if groups have different bounds.

    Raises:
        ValueError: A bound is NaN, or clip_value_min is above clip_value_max.
    """

    clip_value_min: Bound
    clip_value_max: Bound
    by: By = "global"
    bounds = ("clip_value_min", "clip_value_max")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_order(self.clip_value_min, self.clip_value_max)

    def _read_number(self, name: str, value: object) -> float:
        number = real(name, value)
        if math.isnan(number):
            raise ValueError(f"`{name}` must be a number, not NaN")
        return number

    def limits(self, group_of: Sequence[int], positions: Sequence[int]) -> tuple[Bounds, Bounds]:
        """Return minimum and maximum: each one number for all gradients, or one for each.

        Args:
            group_of: The position of each parameter's group.
            positions: The position of each gradient's parameter.
        """
        low, high = (
            bound if isinstance(bound, float) else [bound[group_of[position]] for position in positions]
            for bound in (self.clip_value_min, self.clip_value_max)
        )
        return low, high


@dataclass(frozen=True)
class Rule:
    """A rule of your own: a function from the norms of groups to their coefficients.

    Args:
        function: Takes the groups' norms, [groups] in fp64 on the gradients' device, and returns a coefficient for each
            or one for all. It should avoid a sync (``float(norms[0])``, ``if norms[0] > 1``). A gradient whose
            coefficient is exactly 1 is not written. A callable object may have state: if it has ``state_dict`` and
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
        return self.function(norms.clone())  # the function may work in place

    def decide(self, measured: Measured) -> Decision:
        """Return the function's coefficients. A function has no thresholds.

        Raises:
            ValueError: The function's answer is neither one coefficient for each group nor one for all.
            Exception: torch cannot convert the answer to a tensor. The type is that of torch's error.
        """
        norms = measured.norms
        answer = self(norms)
        try:
            coefficients = torch.as_tensor(answer, dtype=norms.dtype, device=norms.device).detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise type(error)(f"{self!r} returned {answer!r}, not coefficients: {error}") from None
        if coefficients.shape not in (norms.shape, (), (1,)):
            raise ValueError(
                f"{self!r} returned coefficients of shape {tuple(coefficients.shape)} for norms of shape "
                f"{tuple(norms.shape)}: return one for each, or one for all"
            )
        return Decision(coefficients.expand(norms.shape), None)

    def for_groups(self, labels: Sequence[Hashable]) -> Rule:  # noqa: ARG002 - the signature is that of the other rules
        """Return the rule itself: a function has no bounds to put in order."""
        return self

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", None) or repr(self.function)
        return f"Rule({name}, by={self.by!r})"
