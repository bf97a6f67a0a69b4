"""All rules by name, and what a caller may pass as a rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from fastclip.rules.adaptive import AdaptiveRule, ClipByEMA, ClipByQuantile, ClipByZScore
from fastclip.rules.by_weight import ClipByWeightNorm
from fastclip.rules.formulas import (
    ClipAtThreshold,
    ClipByGlobalNorm,
    ClipByNorm,
    ClipByValue,
    ClipGradNorm,
    Rule,
    RuleWithBounds,
)

NormRule: TypeAlias = (
    ClipByNorm | ClipByGlobalNorm | ClipGradNorm | ClipAtThreshold | ClipByWeightNorm | AdaptiveRule | Rule
)
"""A rule that turns norms into coefficients."""

AnyRule: TypeAlias = NormRule | ClipByValue

AsRule: TypeAlias = AnyRule | Callable[[Tensor], Tensor]
"""What a caller may pass as a rule."""

BY_NAME: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        ClipByNorm,
        ClipByGlobalNorm,
        ClipGradNorm,
        ClipAtThreshold,
        ClipByValue,
        ClipByQuantile,
        ClipByZScore,
        ClipByEMA,
        ClipByWeightNorm,
    )
}
"""The rules that a checkpoint can name."""


def as_rule(rule: object) -> AnyRule:
    """Return a rule as it is, and a function as a rule by parameter.

    Raises:
        TypeError: `rule` is neither a rule nor a function.
    """
    if isinstance(rule, (RuleWithBounds, AdaptiveRule, Rule)):
        return rule  # type: ignore[return-value]  # AnyRule lists every subclass of RuleWithBounds
    if callable(rule) and not isinstance(rule, type):
        return Rule(rule)
    known = ", ".join([*BY_NAME, "Rule"])
    raise TypeError(f"`rule` must be a rule ({known}) or a function from norms to coefficients, not {rule!r}")
