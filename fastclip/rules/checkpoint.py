"""A rule in a checkpoint: its name with its settings as plain data, or the state of a function."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from fastclip.foundation.warn import warn_caller
from fastclip.rules.adaptive import AdaptiveRule
from fastclip.rules.catalogue import BY_NAME, AnyRule
from fastclip.rules.formulas import Rule


def state_of(rule: AnyRule, labels: Sequence[Hashable]) -> dict[str, Any]:
    """Return what a checkpoint holds of a rule: its name and settings, or the state of a function that has one."""
    if isinstance(rule, Rule):
        get_state = getattr(rule.function, "state_dict", None)
        return {"name": "Rule", "state": get_state() if get_state else None}
    state = {"name": type(rule).__name__, "settings": rule.settings(labels)}
    if isinstance(rule, AdaptiveRule):
        state["state"] = rule.state_dict()
    return state


def from_state(rule: AnyRule, labels: Sequence[Hashable], state: dict[str, Any]) -> AnyRule:
    """Return the rule that a checkpoint holds; its functions, which a checkpoint does not hold, are those of `rule`.

    The bounds are the checkpoint's, as the learning rate is. A warning says so if the rule changes. What the rule has
    learned is for `load_state`.

    Raises:
        ValueError: This version does not know the checkpoint's rule; or the checkpoint was made with a function, and
            `rule` has none.
    """
    if state["name"] == "Rule":
        if not isinstance(rule, Rule):
            raise ValueError(
                f"the checkpoint was made with a rule of its own, but {rule} is attached: attach that rule"
            )
        return rule
    if state["name"] not in BY_NAME:
        raise ValueError(f"the checkpoint was made with the rule {state['name']}, which this version does not know")
    if isinstance(rule, Rule) or state["name"] != type(rule).__name__ or state["settings"] != rule.settings(labels):
        settings = {"by": rule.by, **state["settings"]}  # `by` is not in the settings if it is a function
        restored: AnyRule = BY_NAME[state["name"]](**settings)
        warn_caller(f"the checkpoint's rule {restored} takes the place of {rule}")
        return restored
    return rule


def load_state(rule: AnyRule, state: dict[str, Any]) -> None:
    """Load what the rule of a checkpoint has learned, or the state of its function.

    Raises:
        ValueError: The state does not fit the rule.
    """
    if isinstance(rule, AdaptiveRule):
        rule.load_state_dict(state["state"])
    elif isinstance(rule, Rule) and state["state"] is not None:
        rule.function.load_state_dict(state["state"])  # type: ignore[attr-defined]
