"""A picture of training: the loss, the global norm before clipping and after, the clip rate, every layer's norm.

It is to be read at a glance for 10 layers and for 1000. So there are never more cells than can be told apart: layers
and steps that share a cell show the largest of their norms, and a NaN or infinity is never averaged away but marked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastclip.monitoring.history import Array, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ROWS = 250  # cells from top to bottom: two pixels and more each
_COLUMNS = 400  # cells from left to right
_LABELS = 40  # layers that are named
_LABEL_WIDTH = 36  # characters
_DRAWABLE = (1e-100, 1e100)  # matplotlib's axes overflow beyond
_MEAN = "0.5"
_CLIPPED = "C2"
_SKIPPED = "C1"
_MISSING = "0.85"  # grey: no gradient
_ALARM = "#e3170a"  # red: not finite


def draw(history: History) -> Figure:
    """Draw the loss, the global norm and the groups' norms over the steps.

    Args:
        history: At least one step.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: There were no steps.
    """
    if not len(history.steps):
        raise ValueError("there is nothing to draw yet: the monitor has seen no step")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        message = "a picture needs matplotlib: pip install matplotlib"
        raise ModuleNotFoundError(message, name="matplotlib") from error

    labels = [str(label) for label in history.groups.labels]
    has_loss, has_clips = bool(history.has_loss.any()), bool(history.clipped.any())
    layers = 1.9 + 0.22 * min(len(labels), _LABELS)
    heights = [1.3] * has_loss + [1.3] + [0.6] * has_clips + [layers]
    figure = Figure(figsize=(11, 1.3 + sum(heights)), layout="constrained", dpi=130)
    all_axes = list(figure.subplots(len(heights), 1, sharex=True, height_ratios=heights))
    layer_axes = all_axes.pop()
    rate_axes = [all_axes.pop()] if has_clips else []
    norm_axes = all_axes.pop()
    for axes in all_axes:
        _draw_series(axes, history, history.loss, history.mean[:, 0], history.has_loss)
        axes.set(ylabel="loss", yscale="log" if _spans_decades(history.loss) else "linear")
    if has_clips:
        norm_axes.plot(history.steps, _drawable(_finite(history.clipped_norm)), color=_CLIPPED, linewidth=1)
    _draw_series(norm_axes, history, history.norm, history.mean[:, 1], history.has_norm)
    norm_axes.set_ylabel("global norm")
    if (history.norm > 0).any():
        norm_axes.set_yscale("log", nonpositive="mask")
    for axes in rate_axes:
        axes.fill_between(history.steps, history.clip_rate, color=_CLIPPED, alpha=0.5, linewidth=0)
        axes.set(ylabel="clip rate", ylim=(0, 1))
        axes.grid(alpha=0.3)
    _draw_layers(figure, layer_axes, history, labels)
    _explain(figure, history)
    return figure


def _draw_series(axes: Axes, history: History, values: Array, mean: Array, known: Array) -> None:
    """A line, its running mean, and the steps that were skipped, or in which it was not finite."""
    finite = _drawable(_finite(values))
    axes.plot(history.steps, finite, color="C0", linewidth=1, marker=".", markersize=2)
    axes.plot(history.steps, _drawable(mean), color=_MEAN, linewidth=1, linestyle="--")
    bad = known & ~np.isfinite(values)
    for steps, colour in ((history.steps[history.skipped], _SKIPPED), (history.steps[bad], _ALARM)):
        if len(steps):
            at_top = axes.get_xaxis_transform()
            axes.plot(steps, np.ones(len(steps)), "v", color=colour, transform=at_top, clip_on=False)
    axes.grid(alpha=0.3)


def _spans_decades(values: Array) -> bool:
    """Whether values are all positive, and so far apart that most would be one flat line on a linear scale."""
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() > 100 * np.median(finite))


def _draw_layers(figure: Figure, axes: Axes, history: History, labels: Sequence[str]) -> None:
    """A map of norms: a row for each layer, in the model's order from top to bottom."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, to_rgba
    from matplotlib.ticker import MaxNLocator

    norms, present = history.group_norms, history.group_present
    is_bad = present & ~np.isfinite(norms)
    norms = np.where(is_bad, norms, _drawable(norms))
    positive = norms[np.isfinite(norms) & (norms > 0)]
    # The few smallest norms share a colour, lest they take the others' contrast; the largest are what is looked for.
    low, high = (np.percentile(positive, 1), positive.max()) if positive.size else (1.0, 1.0)
    scale = LogNorm(low, max(high, 10 * low), clip=True)
    colours = colormaps["viridis"]
    columns, rows = -(-len(norms) // _COLUMNS), -(-len(labels) // _ROWS)  # steps and layers that share a cell
    shown = _largest(np.where(present & ~is_bad, np.maximum(norms, low), low), columns, rows)
    image = colours(scale(shown))
    image[~_largest(present, columns, rows)] = to_rgba(_MISSING)
    image[_largest(is_bad, columns, rows)] = to_rgba(_ALARM)
    left = history.steps[0] - 0.5
    extent = (left, left + columns * shown.shape[0], rows * shown.shape[1] - 0.5, -0.5)
    axes.imshow(image.swapaxes(0, 1), extent=extent, aspect="auto", interpolation="nearest", origin="upper")
    axes.set(xlabel="step", xlim=(left, history.steps[-1] + 0.5), ylim=(len(labels) - 0.5, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    named = range(0, len(labels), -(-len(labels) // _LABELS))
    axes.set_yticks(list(named), [_shortened(labels[g]) for g in named], fontsize="small")
    culprits = np.flatnonzero(is_bad.any(axis=0))
    if len(culprits):
        at_right = axes.get_yaxis_transform()
        axes.plot(np.full(len(culprits), 1.005), culprits, "<", color=_ALARM, transform=at_right, clip_on=False)
    figure.colorbar(ScalarMappable(scale, colours), ax=axes, label="gradient norm", pad=0.02, aspect=40)


def _explain(figure: Figure, history: History) -> None:
    """A legend, above everything, of the marks that there are."""
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=_MEAN, linestyle="--", label="running mean")]
    if history.clipped.any() and history.has_clipped_norm.any():
        marks.append(Line2D([], [], color=_CLIPPED, label="norm after clipping"))
    if history.skipped.any():
        marks.append(Line2D([], [], color=_SKIPPED, marker="v", linestyle="", label="skipped"))
    if history.nonfinite.any() or (history.has_loss & ~np.isfinite(history.loss)).any():
        marks.append(Line2D([], [], color=_ALARM, marker="s", linestyle="", label="not finite"))
    if not history.group_present.all():
        marks.append(Line2D([], [], color=_MISSING, marker="s", linestyle="", label="no gradient"))
    figure.legend(handles=marks, loc="outside upper right", fontsize="small", ncols=len(marks), frameon=False)


def _largest(values: Array, columns: int, rows: int) -> Array:
    """The largest of `columns` steps and `rows` layers each; whether any, of bool."""
    for axis, size in enumerate((columns, rows)):
        values = np.maximum.reduceat(values, np.arange(0, values.shape[axis], size), axis=axis)
    return values


def _shortened(label: str) -> str:
    short = label if len(label) <= _LABEL_WIDTH else f"…{label[1 - _LABEL_WIDTH :]}"
    return short.replace("$", r"\$")  # which would begin a formula


def _finite(values: Array) -> Array:
    return np.where(np.isfinite(values), values, math.nan)


def _drawable(values: Array) -> Array:
    """Values with those beyond what matplotlib can lay out moved to the edge of it; zeros and NaN as they are."""
    magnitudes = np.clip(np.abs(values), *_DRAWABLE)
    return np.where((values == 0) | np.isnan(values), values, np.copysign(magnitudes, values))
