"""What a monitor watches for: each trigger is a small function from a step's statistics to yes or no, on the device.

>>> Jump("norm", z=6.0, action="skip"), Above("norm", 100.0, action="skip"), NonFinite("gradients", action="raise")

What happens then is the trigger's action:

- ``"warn"`` warns (`RuntimeWarning`) when it begins to fire, and again only after a step in which it did not.
- ``"raise"`` raises `TriggerError`.
- ``"skip"`` asks for this step to be left out, without a sync; see `Monitor.update`.
- A function is called with the `Report`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastclip.foundation.arguments import check_count, check_real
from fastclip.monitoring.averages import Standing

SERIES = ("loss", "norm")
"""What is averaged, in the order of the vectors of a `Moment`."""

_WORST = 5  # parameters that a printed report names


class Moment(NamedTuple):
    """What is known of a step, on one device.

    Attributes:
        values: Loss and global norm, [2].
        known: Whether there is a loss, and any gradient, at all.
        standing: How the two stand to what was before.
        norms: The norm of each parameter's gradient, [parameters]; 0 where it has none.
        weights: The norm of each parameter, [parameters], or nothing, [0].
    """

    values: Tensor
    known: tuple[bool, bool]
    standing: Standing
    norms: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Share:
    """A parameter's part in what happened.

    Attributes:
        name: The parameter's name.
        norm: The norm of its gradient, or of itself where the weights are not finite.
        share: Its square over the sum of those of all that are finite; NaN where it is not finite itself.
    """

    name: str
    norm: float
    share: float

    def __str__(self) -> str:
        """Return half a line of a report."""
        return f"{self.name}: norm {self.norm:.4g}" + ("" if math.isnan(self.share) else f", {self.share:.1%}")


@dataclass(frozen=True)
class Report:
    """What a trigger found in a step; its ``str`` is a few lines to print.

    Attributes:
        step: The step's number, from 1 on.
        trigger: The trigger.
        value: The loss, the norm, or the number of parameters that are not finite.
        limit: What the value was compared with: it is beyond this.
        message: The same in words.
        names: The names of all parameters with a gradient.
        norms: Their gradients' norms; their own where the weights are not finite.
    """

    step: int
    trigger: Trigger
    value: float
    limit: float
    message: str
    names: Sequence[str]
    norms: npt.NDArray[np.float64]

    def worst(self, k: int = _WORST) -> list[Share]:
        """Return the parameters with the largest shares of the squared norm, those that are not finite first.

        Args:
            k: How many.
        """
        finite = np.isfinite(self.norms)
        # In units of the largest, lest the squares overflow.
        largest = self.norms[finite].max(initial=0.0) or 1.0
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
    """What ``action="raise"`` raises, and what a run of skipped steps ends in.

    Attributes:
        report: What was found.
    """

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[type[TriggerError], tuple[str, Report]]:
        return type(self), (str(self), self.report)


@dataclass(frozen=True, repr=False)
class Trigger(ABC):
    """What all triggers share."""

    action: Action = field(default="warn", kw_only=True)

    def __post_init__(self) -> None:
        if not (callable(self.action) or self.action in ("warn", "raise", "skip")):
            raise ValueError(f"`action` must be 'warn', 'raise', 'skip' or a function of a report, not {self.action!r}")

    @property
    def patience(self) -> int:
        """In how many steps in a row it must hold before it fires."""
        return 1

    @property
    def watches_weights(self) -> bool:
        """Whether it is the parameters themselves that it watches, not their gradients."""
        return False

    @abstractmethod
    def holds(self, moment: Moment) -> Tensor:
        """Return whether a step is what it watches for: 0-dim bool on the step's device, without a sync."""

    @abstractmethod
    def explain(self, moment: Moment) -> tuple[float, float, str]:
        """Return value, limit and message of a report on a step, which is on the host by then."""

    def __repr__(self) -> str:
        """Return what makes the trigger, without what is left at its default."""
        first, *others = (entry for entry in fields(self) if entry.name != "action")
        settings = [f"{f.name}={getattr(self, f.name)!r}" for f in others if getattr(self, f.name) != f.default]
        return f"{type(self).__name__}({', '.join([repr(getattr(self, first.name)), *settings])})"


@dataclass(frozen=True, repr=False)
class Jump(Trigger):
    r"""The loss or the norm is far above its running mean (see `fastclip.averages`).

    .. math:: \frac{x - m}{s} > z \quad\text{and, with a ratio,}\quad x > \text{ratio} \cdot m > 0

    It holds neither while the averages warm up, nor where the value is not finite: that is `NonFinite`'s.

    Args:
        of: What jumps: "loss", or the global "norm" of the gradients before clipping.
        z: By how many standard deviations at least.
        ratio: To how many times the mean at least. Where `z` is given too, both must hold.
        action: What to do, see `fastclip.triggers`.

    Raises:
        ValueError: `of` is neither, neither `z` nor `ratio` is given, or it is too small.
    """

    of: Literal["loss", "norm"]
    z: float = 0.0
    ratio: float | None = None

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

    def holds(self, moment: Moment) -> Tensor:
        """Return whether the value is above the limit."""
        i = SERIES.index(self.of)
        mean = moment.standing.mean[i]
        holds = moment.standing.z[i] > self.z
        return holds if self.ratio is None else holds & (moment.values[i] > self.ratio * mean) & (mean > 0)

    def explain(self, moment: Moment) -> tuple[float, float, str]:
        """Return the value, the largest that would have passed, and a message."""
        i = SERIES.index(self.of)
        value, mean, s, z = (float(vector[i]) for vector in (moment.values, *moment.standing))
        limit = max(mean + self.z * s, (self.ratio or -math.inf) * mean)
        message = f"the {self.of} is {value:.4g}, above {limit:.4g}; before it was {mean:.4g} ± {s:.2g} (z = {z:.3g})"
        return value, limit, message


@dataclass(frozen=True, repr=False)
class Above(Trigger):
    r"""The loss or the norm is above a limit.

    .. math:: \text{not}\; x \le \text{limit}

    So it holds where the value is NaN, too: a step that is to be skipped above a limit is to be skipped then.

    Args:
        of: What is looked at: "loss", or the global "norm" of the gradients before clipping.
        limit: The largest value that passes.
        action: What to do, see `fastclip.triggers`.

    Raises:
        TypeError: `limit` is not a real number.
        ValueError: `of` is neither, or `limit` is not finite.
    """

    of: Literal["loss", "norm"]
    limit: float

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_of(self.of, SERIES)
        check_real("limit", self.limit)
        if not math.isfinite(self.limit):
            raise ValueError(f"`limit` must be finite, not {self.limit}")

    def holds(self, moment: Moment) -> Tensor:
        """Return whether the value is there, and not within the limit."""
        i = SERIES.index(self.of)
        exceeds = ~(moment.values[i] <= self.limit)
        return exceeds if moment.known[i] else torch.zeros_like(exceeds)

    def explain(self, moment: Moment) -> tuple[float, float, str]:
        """Return the value, the limit and a message."""
        value = float(moment.values[SERIES.index(self.of)])
        return value, self.limit, f"the {self.of} is {value:.4g}, and should be {self.limit:.4g} at most"


@dataclass(frozen=True, repr=False)
class NonFinite(Trigger):
    """The loss, a gradient or a weight is NaN or infinite.

    fp64 gradients whose norm is beyond fp64 count as well. With a fused optimizer and `torch.amp.GradScaler`, but
    without ``unscale_``, so do the overflows by which the scaler finds its scale: do not let these raise.

    Args:
        of: "loss", "gradients" or "weights"; the last needs ``Monitor(weights=True)``, and sees the weights before the
            step.
        action: What to do, see `fastclip.triggers`.

    Raises:
        ValueError: `of` is none of these.
    """

    of: Literal["loss", "gradients", "weights"]

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_of(self.of, ("loss", "gradients", "weights"))

    @property
    def watches_weights(self) -> bool:
        """Whether it is the parameters themselves that it watches, not their gradients."""
        return self.of == "weights"

    def holds(self, moment: Moment) -> Tensor:
        """Return whether anything is not finite. The norm of all gradients is finite if each of them is."""
        if self.watches_weights:
            return ~(moment.weights < math.inf).all()
        i = 0 if self.of == "loss" else 1
        missing = torch.zeros_like(moment.values[i], dtype=torch.bool)
        return ~(moment.values[i].abs() < math.inf) if moment.known[i] else missing

    def explain(self, moment: Moment) -> tuple[float, float, str]:
        """Return the loss or the number of culprits, the limit of these, and a message."""
        if self.of == "loss":
            value = float(moment.values[0])
            return value, math.inf, f"the loss is {value}"
        norms = moment.norms if self.of == "gradients" else moment.weights
        count = int((~norms.isfinite()).sum())
        which = "the gradients" if self.of == "gradients" else "the parameters themselves"
        return count, 0, f"{which} are not finite in {count} of {len(norms)} parameters"


@dataclass(frozen=True, repr=False)
class Vanishing(Trigger):
    """The global norm of the gradients is below a bound, several steps in a row.

    Args:
        below: The bound.
        steps: How many steps in a row; it fires in the last of them, and as long as the norm stays there.
        action: What to do, see `fastclip.triggers`.

    Raises:
        ValueError: `below` is not above 0, or `steps` is not at least 1.
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
        """In how many steps in a row it must hold before it fires."""
        return self.steps

    def holds(self, moment: Moment) -> Tensor:
        """Return whether the norm is below the bound."""
        return moment.values[1] < self.below

    def explain(self, moment: Moment) -> tuple[float, float, str]:
        """Return the norm, the bound and a message."""
        norm = float(moment.values[1])
        return (
            norm,
            self.below,
            f"the norm is {norm:.4g}, below {self.below:.4g} for {self.steps} steps in a row or more",
        )


def _check_of(of: str, known: Sequence[str]) -> None:
    if of not in known:
        raise ValueError(f"`of` must be one of {', '.join(map(repr, known))}, not {of!r}")
