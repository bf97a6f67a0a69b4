"""The history of some steps on the host: an array for each quantity, an entry for each step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fastclip.rules.groups import Groups

Array: TypeAlias = npt.NDArray[Any]
Row: TypeAlias = dict[str, float | int | bool | None]
"""A step for a sink. All rows of a monitor have the same keys; a missing value (no loss, say) is None."""

_NAMED = 3  # groups that a summary names


@dataclass(frozen=True)
class History:
    """Successive steps; its ``str`` is a summary of a few lines.

    S steps, P parameters, G groups, T triggers. Missing values are NaN: the loss if none was recorded, the norm of a
    parameter without a gradient, the averages before the first value. `has_loss` and `present` tell a missing value
    from a NaN that training produced.

    Attributes:
        names: The names of the parameters.
        groups: Which parameters form which group, and the groups' labels.
        triggers: The triggers, as strings.
        steps: The steps' numbers, [S]; the first step of a run is 1.
        has_loss: Whether there was a loss, [S].
        has_coefficient: Whether gradients were clipped by norm, [S].
        has_clipped_norm: Whether there were gradients with a known norm after clipping, [S].
        present: Which parameters had a gradient, [S, P].
        loss: The loss, [S].
        norm: The 2-norm of all gradients before clipping, [S].
        coefficient: The smallest coefficient of all groups, [S]; NaN if nothing was clipped, or only by value.
        clipped: Whether anything was clipped, [S].
        clipped_norm: The 2-norm of all gradients after clipping, [S]; NaN if they were clipped by value.
        threshold: The norm above which all gradients are scaled, [S]; NaN if the rule clips several groups or has none,
            infinite while nothing limits it.
        clip_rate: In what share of the last `window` steps, up to this one, anything was clipped, [S].
        window: Over how many steps the clip rate is taken; over fewer at the start of a run.
        norms: The 2-norm of each parameter's gradient, [S, P].
        weights: The 2-norm of each parameter before the step, [S, P]; [S, 0] if the monitor does not take these norms.
        mean: Running means of loss and norm before the step, [S, 2].
        s: Running standard deviations of loss and norm before the step, [S, 2].
        z: How many standard deviations loss and norm were above their means, [S, 2].
        fired: Which triggers fired, [S, T].
        skipped: Whether a trigger asked to skip the step, [S].
    """

    names: Sequence[str]
    groups: Groups
    triggers: Sequence[str]
    steps: Array
    has_loss: Array
    has_coefficient: Array
    has_clipped_norm: Array
    present: Array
    loss: Array
    norm: Array
    coefficient: Array
    clipped: Array
    clipped_norm: Array
    threshold: Array
    clip_rate: Array
    window: int
    norms: Array
    weights: Array
    mean: Array
    s: Array
    z: Array
    fired: Array
    skipped: Array

    @property
    def has_norm(self) -> Array:
        """Whether any parameter had a gradient, [S]."""
        has_norm: Array = np.any(self.present, axis=1)
        return has_norm

    @property
    def share_clipped(self) -> float:
        """The share of the steps in which anything was clipped; NaN if there are no steps."""
        return float(self.clipped.mean()) if len(self.steps) else math.nan

    @property
    def nonfinite(self) -> Array:
        """The number of parameters with a gradient that is not finite, [S].

        The norm tells: norms of finite gradients do not overflow, except fp64 gradients with a norm beyond fp64.
        """
        return _count(self.present & ~np.isfinite(self.norms))

    @property
    def nonfinite_weights(self) -> Array:
        """The number of parameters that are not finite themselves, [S]; 0 if the monitor does not take their norms."""
        return _count(~np.isfinite(self.weights))

    @property
    def group_norms(self) -> Array:
        """The 2-norm of each group's gradients, [S, G]; NaN also if a group has no gradient."""
        norms = _combined(np.where(self.present, self.norms, 0.0), self.groups)
        return np.where(self.group_present, norms, math.nan)

    @property
    def group_present(self) -> Array:
        """Which groups had a gradient, [S, G]."""
        order, starts = _runs(self.groups)
        present = np.logical_or.reduceat(self.present[:, order], starts, axis=1)
        has_members = np.isin(np.arange(len(starts)), self.groups.of)  # a parameter group may be empty
        return present & has_members

    @property
    def group_weights(self) -> Array:
        """The 2-norm of each group's parameters, [S, G]; [S, 0] if the monitor does not take these norms."""
        return _combined(self.weights, self.groups) if self.weights.size else self.weights

    def rows(self) -> Iterator[Row]:
        """Yield each step as a flat dict for sinks.

        The keys: "step"; "loss" and "grad_norm", each also with "_mean", "_s" and "_z"; "clipped_grad_norm", the norm
        after clipping; "threshold", "coefficient", "clipped", "clip_rate", "skipped", "nonfinite"; "grad_norm/<label>"
        for each group; and, if the monitor takes the norms of weights, "nonfinite_weights" and "weight_norm/<label>".
        """
        columns = self._columns()
        lists = [_with_none(*column) for column in columns.values()]
        return (dict(zip(columns, values, strict=True)) for values in zip(*lists, strict=True))

    def _columns(self) -> dict[str, tuple[Array, Array | None]]:
        """The columns of the rows by key: the values, and which are known; None if all are."""
        columns: dict[str, tuple[Array, Array | None]] = {"step": (self.steps, None)}
        series = (("loss", self.loss, self.has_loss), ("grad_norm", self.norm, self.has_norm))
        for i, (name, values, known) in enumerate(series):
            columns[name] = values, known
            for field, averages in (("mean", self.mean), ("s", self.s), ("z", self.z)):
                columns[f"{name}_{field}"] = averages[:, i], ~np.isnan(averages[:, i])
        columns["clipped_grad_norm"] = self.clipped_norm, self.has_clipped_norm
        columns["threshold"] = self.threshold, ~np.isnan(self.threshold)
        columns["coefficient"] = self.coefficient, self.has_coefficient
        columns |= {
            "clipped": (self.clipped, None),
            "clip_rate": (self.clip_rate, None),
            "skipped": (self.skipped, None),
            "nonfinite": (self.nonfinite, None),
        }
        norms, present, weights = self.group_norms, self.group_present, self.group_weights
        columns |= {f"grad_norm/{label}": (norms[:, g], present[:, g]) for g, label in enumerate(self.groups.labels)}
        if weights.size:
            columns["nonfinite_weights"] = self.nonfinite_weights, None
            columns |= {f"weight_norm/{label}": (weights[:, g], None) for g, label in enumerate(self.groups.labels)}
        return columns

    def __str__(self) -> str:
        """Return a summary of all steps, and of the last step."""
        if not len(self.steps):
            return "no steps"
        return "\n".join([self._overview(), *self._extremes(), self._largest_groups()])

    def _overview(self) -> str:
        skipped, nonfinite = np.count_nonzero(self.skipped), np.count_nonzero(self.nonfinite)
        lately = f" ({self.clip_rate[-1]:.1%} of the last {self.window})" if len(self.steps) > self.window else ""
        return (
            f"steps {self.steps[0]} to {self.steps[-1]}: {self.share_clipped:.1%} clipped{lately}, {skipped} skipped, "
            f"{nonfinite} with non-finite gradients"
        )

    def _extremes(self) -> Iterator[str]:
        """A line for loss and norm each: the last value, its averages, and the largest value."""
        for i, (name, values) in enumerate((("loss", self.loss), ("norm", self.norm))):
            if np.isfinite(values).any():
                largest = int(np.argmax(np.where(np.isfinite(values), values, -math.inf)))
                yield (
                    f"{name} {values[-1]:.4g} after a mean of {self.mean[-1, i]:.4g} ± {self.s[-1, i]:.2g}, "
                    f"largest {values[largest]:.4g} at step {self.steps[largest]}"
                )

    def _largest_groups(self) -> str:
        norms, present = self.group_norms[-1], np.flatnonzero(self.group_present[-1])
        largest_first = present[np.argsort(-np.nan_to_num(norms[present], nan=math.inf), kind="stable")]
        named = [f"{self.groups.labels[g]} {norms[g]:.4g}" for g in largest_first[:_NAMED]]
        return f"largest norms at the last step: {', '.join(named) or 'no gradients'}"


def _count(flags: Array) -> Array:
    counts: Array = flags.sum(axis=1)
    return counts


def _runs(groups: Groups) -> tuple[Array, Array]:
    """The parameters sorted by group, and the position at which each group begins."""
    of = np.array(groups.of, dtype=np.int64)
    order = np.argsort(of, kind="stable")
    return order, np.searchsorted(of[order], np.arange(len(groups.labels)))


def _combined(norms: Array, groups: Groups) -> Array:
    """Combine the parameters' norms, [S, P], to the groups' norms, [S, G]. hypot does not overflow."""
    order, starts = _runs(groups)
    with np.errstate(invalid="ignore"):
        combined: Array = np.hypot.reduceat(norms[:, order], starts, axis=1)
    combined[np.logical_or.reduceat(np.isnan(norms[:, order]), starts, axis=1)] = math.nan  # hypot(inf, nan) is inf
    return combined


def _with_none(values: Array, known: Array | None) -> list[Any]:
    """Return an array as a list of Python numbers, with None for values that are not known."""
    items: list[Any] = values.tolist()
    return items if known is None else [item if k else None for item, k in zip(items, known.tolist(), strict=True)]
