"""The triggers: a jump, a value above a limit, values that are not finite, vanishing gradients.

>>> Jump("norm", z=6.0, action="skip"), Above("norm", 100.0, action="skip"), NonFinite("gradients", action="raise")

`fastclip.monitoring.interface` says what the actions do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastclip.foundation.arguments import check_count, check_real
from fastclip.monitoring.averages import SERIES, Comparison
from fastclip.monitoring.interface import Observation, Trigger


@dataclass(frozen=True, repr=False)
class Jump(Trigger):
    r"""The loss or the norm is far above its mean.

    .. math:: \frac{x - m}{s} > z \quad\text{and, with a ratio,}\quad x > \text{ratio} \cdot m > 0

    Mean m and standard deviation s are the monitor's running averages (see `fastclip.monitoring.averages`), or with
    `window` those of so many last values (see `fastclip.monitoring.windows`). ``Jump("loss", z=6, window=128,
    action="skip")`` and the same of "norm" are the rule by which OLMo 2 and 3 skip steps.

    It does not hold during the warm-up of the averages, nor before half of the window is filled, nor for a value that
    is not finite: use `NonFinite` for that.

    Args:
        of: The series to watch: "loss", or the global "norm" of the gradients before clipping.
        z: By how many standard deviations the value must be above the mean.
        ratio: By what factor the value must be above the mean. If `z` is given too, both must hold.
        window: How many of the last values to compare with, at least 2; None compares with the running averages.
        action: What to do, see `fastclip.monitoring.interface`.

    Raises:
        TypeError: `z` or `ratio` is not a real number, or `window` is not a whole number.
        ValueError: `of` is neither "loss" nor "norm"; neither `z` nor `ratio` is given; or one of them is out of range.
    """

    of: Literal["loss", "norm"]
    z: float = 0.0
    ratio: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_of(self.of, SERIES)
        if self.z == 0 and self.ratio is None:
            raise ValueError(f"how far is a jump? Give `z`, as in Jump({self.of!r}, z=6.0), or `ratio`")
        check_real("z", self.z)
        if not 0 <= self.z < math.inf:
            raise ValueError(f"`z` must be above 0 and finite, not {self.z}")
        if self.ratio is not None:
            check_real("ratio", self.ratio)
            if not 1 < self.ratio < math.inf:
                raise ValueError(f"`ratio` must be above 1 and finite, not {self.ratio}")
        if self.window is not None:
            check_count("window", self.window)
            if self.window < 2:
                raise ValueError("`window` must be at least 2: one value has no standard deviation")

    @property
    def compares_with(self) -> int | None:
        """With how many of the last values the trigger compares; None: with the running averages."""
        return self.window

    def _comparison(self, step: Observation) -> Comparison:
        return step.comparison if self.window is None else step.windows[self.window]

    def holds(self, step: Observation) -> Tensor:
        """Return whether the value is above the limit."""
        i = SERIES.index(self.of)
        comparison = self._comparison(step)
        mean = comparison.mean[i]
        holds = comparison.z[i] > self.z
        return holds if self.ratio is None else holds & (step.values[i] > self.ratio * mean) & (mean > 0)

    def explain(self, step: Observation) -> tuple[float, float, str]:
        """Return the value, the largest value that does not fire, and a message."""
        i = SERIES.index(self.of)
        value, mean, s, z = (float(vector[i]) for vector in (step.values, *self._comparison(step)))
        limit = max(mean + self.z * s, (self.ratio or -math.inf) * mean)
        message = f"the {self.of} is {value:.4g}, above {limit:.4g}; before it was {mean:.4g} ± {s:.2g} (z = {z:.3g})"
        return value, limit, message


@dataclass(frozen=True, repr=False)
class Above(Trigger):
    r"""The loss or the norm is above a limit.

    .. math:: \text{not}\; x \le \text{limit}

    So it also holds if the value is NaN: a step to be skipped above a limit must then be skipped as well.

    Args:
        of: The series to watch: "loss", or the global "norm" of the gradients before clipping.
        limit: The largest value that does not fire.
        action: What to do, see `fastclip.monitoring.interface`.

    Raises:
        TypeError: `limit` is not a real number.
        ValueError: `of` is neither "loss" nor "norm", or `limit` is not finite.
    """

    of: Literal["loss", "norm"]
    limit: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_of(self.of, SERIES)
        check_real("limit", self.limit)
        if not math.isfinite(self.limit):
            raise ValueError(f"`limit` must be finite, not {self.limit}")

    def holds(self, step: Observation) -> Tensor:
        """Return whether there is a value, and it is not within the limit."""
        i = SERIES.index(self.of)
        exceeds = ~(step.values[i] <= self.limit)
        return exceeds if step.known[i] else torch.zeros_like(exceeds)

    def explain(self, step: Observation) -> tuple[float, float, str]:
        """Return the value, the limit and a message."""
        value = float(step.values[SERIES.index(self.of)])
        return value, self.limit, f"the {self.of} is {value:.4g}, and should be {self.limit:.4g} at most"


@dataclass(frozen=True, repr=False)
class NonFinite(Trigger):
    """The loss, a gradient or a weight is NaN or infinite.

    fp64 gradients with a norm beyond the range of fp64 count as well. So do the overflows by which
    `torch.amp.GradScaler` finds its scale, if the optimizer is fused and ``unscale_`` is not called: do not use
    ``action="raise"`` for these.

    Args:
        of: "loss", "gradients" or "weights". "weights" needs ``Monitor(weights=True)``; it sees the weights before the
            step.
        action: What to do, see `fastclip.monitoring.interface`.

    Raises:
        ValueError: `of` is none of these.
    """

    of: Literal["loss", "gradients", "weights"]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_of(self.of, ("loss", "gradients", "weights"))

    @property
    def watches_weights(self) -> bool:
        """Whether the trigger watches the parameters themselves instead of their gradients."""
        return self.of == "weights"

    def holds(self, step: Observation) -> Tensor:
        """Return whether anything is not finite. The global norm is finite if all gradients are."""
        if self.watches_weights:
            return ~(step.weights < math.inf).all()
        i = 0 if self.of == "loss" else 1
        exceeds = ~(step.values[i].abs() < math.inf)
        return exceeds if step.known[i] else torch.zeros_like(exceeds)

    def explain(self, step: Observation) -> tuple[float, float, str]:
        """Return the loss and infinity, or the number of parameters that are not finite and 0; and a message."""
        if self.of == "loss":
            value = float(step.values[0])
            return value, math.inf, f"the loss is {value}"
        norms = step.norms if self.of == "gradients" else step.weights
        count = int((~norms.isfinite()).sum())
        which = "the gradients" if self.of == "gradients" else "the parameters themselves"
        return count, 0, f"{which} are not finite in {count} of {len(norms)} parameters"


@dataclass(frozen=True, repr=False)
class Vanishing(Trigger):
    """The global norm of the gradients is below a bound in several steps in a row.

    Args:
        below: The bound.
        steps: How many steps in a row. The trigger fires in the last of them, and in each step after it that is still
            below the bound.
        action: What to do, see `fastclip.monitoring.interface`.

    Raises:
        TypeError: `below` is not a real number, or `steps` is not a whole number.
        ValueError: `below` is not above 0 and finite, or `steps` is below 1.
    """

    below: float
    steps: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("below", self.below)
        if not 0 < self.below < math.inf:
            raise ValueError(f"`below` must be above 0 and finite, not {self.below}")
        check_count("steps", self.steps)

    @property
    def patience(self) -> int:
        """In how many steps in a row the condition must hold before the trigger fires."""
        return self.steps

    def holds(self, step: Observation) -> Tensor:
        """Return whether the norm is below the bound."""
        return step.values[1] < self.below

    def explain(self, step: Observation) -> tuple[float, float, str]:
        """Return the norm, the bound and a message."""
        norm = float(step.values[1])
        message = f"the norm is {norm:.4g}, below {self.below:.4g} for {self.steps} steps in a row or more"
        return norm, self.below, message


def _check_of(of: str, allowed: Sequence[str]) -> None:
    if of not in allowed:
        raise ValueError(f"`of` must be one of {', '.join(map(repr, allowed))}, not {of!r}")
