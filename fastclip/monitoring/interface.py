"""What a trigger is: it fires on an `Observation` of a step, and explains it in a `Report`.

Whether a trigger fires is decided on the observation's device, without a sync. Then its action follows:

- ``"warn"`` warns (`RuntimeWarning`) when the trigger begins to fire, and again only after a step in which it did not.
- ``"raise"`` raises `TriggerError`.
- ``"skip"`` asks the training loop to skip this step, without a sync; see `Monitor.update`.
- A function is called with the `Report`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fastclip.monitoring.averages import Comparison

_WORST = 5  # parameters that a printed report names


class Observation(NamedTuple):
    """What is known about a step; all tensors are on one device.

    Attributes:
        values: Loss and global norm, [2].
        known: Whether there is a loss, and whether there is any gradient.
        comparison: Loss and norm compared with their running averages.
        windows: Loss and norm compared with their last values, for each window that a trigger asks for.
        norms: The norm of each parameter's gradient, [parameters]; 0 if it has none.
        weights: The norm of each parameter, [parameters]; [0] if the monitor does not take these norms.
    """

    values: Tensor
    known: tuple[bool, bool]
    comparison: Comparison
    windows: Mapping[int, Comparison]
    norms: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Share:
    """One parameter's share of the squared norm.

    Attributes:
        name: The parameter's name.
        norm: The norm of its gradient, or of the parameter itself if the report is about weights.
        share: The square of `norm` over the sum of all finite squares; NaN if `norm` is not finite.
    """

    name: str
    norm: float
    share: float

    def __str__(self) -> str:
        """Return name, norm and share as one line of a report."""
        return f"{self.name}: norm {self.norm:.4g}" + ("" if math.isnan(self.share) else f", {self.share:.1%}")


@dataclass(frozen=True)
class Report:
    """Why a trigger fired in a step; its ``str`` is a few lines to print.

    Attributes:
        step: The step's number; the first step is 1.
        trigger: The trigger.
        value: The loss, the norm, or the number of parameters that are not finite.
        limit: The limit that `value` is beyond.
        message: Value and limit in words.
        names: The names of all parameters with a gradient; of all parameters if the report is about weights.
        norms: The norms of these gradients, or of the parameters if the report is about weights.
    """

    step: int
    trigger: Trigger
    value: float
    limit: float
    message: str
    names: Sequence[str]
    norms: npt.NDArray[np.float64]

    def worst(self, k: int = _WORST) -> list[Share]:
        """Return the parameters with the largest shares of the squared norm; those that are not finite come first.

        Args:
            k: How many parameters to return.
        """
        finite = np.isfinite(self.norms)
        largest = self.norms[finite].max(initial=0.0) or 1.0  # norms are divided by it: squares must not overflow
        squares = np.where(finite, np.square(np.where(finite, self.norms, 0.0) / largest), np.nan)
        shares = squares / (np.nansum(squares) or 1.0)
        order = np.argsort(np.where(finite, -shares, -np.inf), kind="stable")[:k]
        return [Share(self.names[i], float(self.norms[i]), float(shares[i])) for i in order]

    def __str__(self) -> str:
        """Return the message, and a line for each of the worst parameters."""
        worst = self.worst()
        heading = ["most of the squared norm:"] if worst else []
        return "\n  ".join([f"step {self.step}, {self.trigger}: {self.message}", *heading, *map(str, worst)])


Action: TypeAlias = Literal["warn", "raise", "skip"] | Callable[[Report], object]


class TriggerError(RuntimeError):
    """A trigger with ``action="raise"`` fired, or too many steps in a row were skipped.

    Attributes:
        report: The report of the trigger that fired.
    """

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[type[TriggerError], tuple[str, Report]]:
        return type(self), (str(self), self.report)


@dataclass(frozen=True, repr=False)
class Trigger(ABC):
    """A condition on a step, and the action to take when it holds."""

    action: Action = field(default="warn", kw_only=True)

    def __post_init__(self) -> None:
        if not (callable(self.action) or self.action in ("warn", "raise", "skip")):
            raise ValueError(f"`action` must be 'warn', 'raise', 'skip' or a function of a report, not {self.action!r}")

    @property
    def skips(self) -> bool:
        """Whether the action is to skip the step."""
        return self.action == "skip"

    @property
    def patience(self) -> int:
        """In how many steps in a row the condition must hold before the trigger fires."""
        return 1

    @property
    def compares_with(self) -> int | None:
        """With how many of the last values the trigger compares; None: with the running averages, or with nothing."""
        return None

    @property
    def watches_weights(self) -> bool:
        """Whether the trigger watches the parameters themselves instead of their gradients."""
        return False

    @abstractmethod
    def holds(self, step: Observation) -> Tensor:
        """Return whether the condition holds in a step: 0-dim bool on the step's device, without a sync."""

    @abstractmethod
    def explain(self, step: Observation) -> tuple[float, float, str]:
        """Return value, limit and message of a report about a step, given on the host."""

    def __repr__(self) -> str:
        """Return the trigger as a call, without arguments that have their default."""
        first, *others = (entry for entry in fields(self) if entry.name != "action")
        settings = [f"{f.name}={getattr(self, f.name)!r}" for f in others if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join([repr(getattr(self, first.name)), *settings])})"
