"""A picture of training: loss, global norm, clip rate, and the norms of all layers over time.

It must be readable for 10 layers and for 1000, so the number of cells is bounded. Layers and steps that share a cell
show the largest of their norms. A NaN or infinity is never averaged away, but marked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from fastclip.monitoring.history import Array, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

_ROWS = 250  # cells from top to bottom, at least two pixels each
_COLUMNS = 400  # cells from left to right
_LABELS = 40  # layers that are named
_LABEL_WIDTH = 36  # characters
_DRAWABLE = (1e-100, 1e100)  # matplotlib's axes overflow beyond
_COLOURS = "viridis"
_MEAN = "0.5"
_CLIPPED = "C2"
_THRESHOLD = "C3"
_SKIPPED = "C1"
_MISSING = "0.85"  # grey: no gradient
_ALARM = "#e3170a"  # red: not finite


def draw(history: History) -> Figure:
    """Draw the loss, the global norm, the clip rate and the groups' norms over the steps, one panel below the other.

    Args:
        history: At least one step.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        ValueError: `history` has no steps.
    """
    if not len(history.steps):
        raise ValueError("there is nothing to draw yet: the monitor has seen no step")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        message = "a picture needs matplotlib: pip install matplotlib"
        raise ModuleNotFoundError(message, name="matplotlib") from error

    panels: list[tuple[float, Callable[[Axes, History], None]]] = [(1.3, _draw_norm)]  # each with its height in inches
    if history.has_loss.any():
        panels.insert(0, (1.3, _draw_loss))
    if history.clipped.any():
        panels.append((0.6, _draw_clip_rate))
    panels.append((1.9 + 0.22 * min(len(history.groups.labels), _LABELS), _draw_layers))
    heights = [height for height, _ in panels]
    figure = Figure(figsize=(11, 1.3 + sum(heights)), layout="constrained", dpi=130)
    all_axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights)
    for axes, (_, draw_panel) in zip(all_axes, panels, strict=True):
        draw_panel(axes, history)
    _draw_legend(figure, history)
    return figure


def _draw_loss(axes: Axes, history: History) -> None:
    _draw_series(axes, history, history.loss, history.mean[:, 0], history.has_loss)
    axes.set(ylabel="loss", yscale="log" if _spans_decades(history.loss) else "linear")


def _draw_norm(axes: Axes, history: History) -> None:
    """The global norm before clipping, after clipping if anything was clipped, and the threshold if there is one."""
    if history.clipped.any():
        axes.plot(history.steps, _drawable(_finite(history.clipped_norm)), color=_CLIPPED, linewidth=1)
    axes.plot(history.steps, _drawable(_finite(history.threshold)), color=_THRESHOLD, linewidth=1)
    _draw_series(axes, history, history.norm, history.mean[:, 1], history.has_norm)
    axes.set_ylabel("global norm")
    if (history.norm > 0).any():
        axes.set_yscale("log", nonpositive="mask")


def _draw_clip_rate(axes: Axes, history: History) -> None:
    axes.fill_between(history.steps, history.clip_rate, color=_CLIPPED, alpha=0.5, linewidth=0)
    axes.set(ylabel="clip rate", ylim=(0, 1))
    axes.grid(alpha=0.3)


def _draw_series(axes: Axes, history: History, values: Array, mean: Array, known: Array) -> None:
    """Draw values and their running mean; mark steps that were skipped, or have a value that is not finite."""
    axes.plot(history.steps, _drawable(_finite(values)), color="C0", linewidth=1, marker=".", markersize=2)
    axes.plot(history.steps, _drawable(mean), color=_MEAN, linewidth=1, linestyle="--")
    bad = known & ~np.isfinite(values)
    for steps, colour in ((history.steps[history.skipped], _SKIPPED), (history.steps[bad], _ALARM)):
        if len(steps):
            at_top = axes.get_xaxis_transform()
            axes.plot(steps, np.ones(len(steps)), "v", color=colour, transform=at_top, clip_on=False)
    axes.grid(alpha=0.3)


def _spans_decades(values: Array) -> bool:
    """Whether all values are positive, and so far apart that a linear scale would flatten most of them to one line."""
    finite = values[np.isfinite(values)]
    return bool(finite.size and finite.min() > 0 and finite.max() > 100 * np.median(finite))


def _draw_layers(axes: Axes, history: History) -> None:
    """Draw a map of norms: a row for each layer, in the model's order from top to bottom."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.ticker import MaxNLocator

    norms, present = _drawable(_finite(history.group_norms)), history.group_present
    steps, layers = norms.shape
    columns, rows = -(-steps // _COLUMNS), -(-layers // _ROWS)  # steps and layers that share a cell
    scale = _scale_of(norms)
    cells = _cells_of(norms, present, scale, columns, rows)
    left = history.steps[0] - 0.5
    extent = (left, left + columns * cells.shape[0], rows * cells.shape[1] - 0.5, -0.5)
    axes.imshow(cells.swapaxes(0, 1), extent=extent, aspect="auto", interpolation="nearest", origin="upper")
    axes.set(xlabel="step", xlim=(left, history.steps[-1] + 0.5), ylim=(layers - 0.5, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    named = range(0, layers, -(-layers // _LABELS))
    axes.set_yticks(list(named), [_shortened(str(history.groups.labels[g])) for g in named], fontsize="small")
    _mark_rows(axes, np.flatnonzero((present & np.isnan(norms)).any(axis=0)))
    axes.figure.colorbar(ScalarMappable(scale, _COLOURS), ax=axes, label="gradient norm", pad=0.02, aspect=40)


def _scale_of(norms: Array) -> LogNorm:
    """Return a logarithmic scale of colours for norms, [steps, layers]."""
    from matplotlib.colors import LogNorm

    positive = norms[norms > 0]
    # The smallest 1 % share a colour. Otherwise they would take the contrast from large norms, which matter most.
    low, high = (np.percentile(positive, 1), positive.max()) if positive.size else (1.0, 1.0)
    return LogNorm(low, max(high, 10 * low), clip=True)


def _cells_of(norms: Array, present: Array, scale: LogNorm, columns: int, rows: int) -> Array:
    """Return the colour of each cell, [columns, rows, 4].

    Args:
        norms: The norms, [steps, layers]; NaN if missing or not finite.
        present: Which layers had a gradient, [steps, layers].
        scale: The scale of colours.
        columns: How many steps share a cell.
        rows: How many layers share a cell.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_rgba

    colours: Array = colormaps[_COLOURS](scale(_largest(norms, columns, rows)))
    colours[~_largest(present, columns, rows)] = to_rgba(_MISSING)
    colours[_largest(present & np.isnan(norms), columns, rows)] = to_rgba(_ALARM)
    return colours


def _mark_rows(axes: Axes, rows: Array) -> None:
    """Point at rows with a norm that is not finite."""
    if len(rows):
        at_right = axes.get_yaxis_transform()
        axes.plot(np.full(len(rows), 1.005), rows, "<", color=_ALARM, transform=at_right, clip_on=False)


def _draw_legend(figure: Figure, history: History) -> None:
    """Draw a legend above the panels, of the marks that are used."""
    from matplotlib.lines import Line2D

    marks = [Line2D([], [], color=_MEAN, linestyle="--", label="running mean")]
    if history.clipped.any() and history.has_clipped_norm.any():
        marks.append(Line2D([], [], color=_CLIPPED, label="norm after clipping"))
    if np.isfinite(history.threshold).any():
        marks.append(Line2D([], [], color=_THRESHOLD, label="threshold"))
    if history.skipped.any():
        marks.append(Line2D([], [], color=_SKIPPED, marker="v", linestyle="", label="skipped"))
    if history.nonfinite.any() or (history.has_loss & ~np.isfinite(history.loss)).any():
        marks.append(Line2D([], [], color=_ALARM, marker="s", linestyle="", label="not finite"))
    if not history.group_present.all():
        marks.append(Line2D([], [], color=_MISSING, marker="s", linestyle="", label="no gradient"))
    figure.legend(handles=marks, loc="outside upper right", fontsize="small", ncols=len(marks), frameon=False)


def _largest(values: Array, columns: int, rows: int) -> Array:
    """Return the largest value of each cell, of `columns` steps and `rows` layers; NaN only if all are.

    For bool: whether any is true.
    """
    for axis, size in enumerate((columns, rows)):
        values = np.fmax.reduceat(values, np.arange(0, values.shape[axis], size), axis=axis)
    return values


def _shortened(label: str) -> str:
    short = label if len(label) <= _LABEL_WIDTH else f"…{label[1 - _LABEL_WIDTH :]}"
    return short.replace("$", r"\$")  # matplotlib reads $ as the start of a formula


def _finite(values: Array) -> Array:
    """Return values with NaN for those that are not finite."""
    return np.where(np.isfinite(values), values, math.nan)


def _drawable(values: Array) -> Array:
    """Clamp magnitudes to those that matplotlib can lay out; zeros and NaN stay."""
    magnitudes = np.clip(np.abs(values), *_DRAWABLE)
    return np.where((values == 0) | np.isnan(values), values, np.copysign(magnitudes, values))
