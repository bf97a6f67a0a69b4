"""The picture of the norms over time: what its cells and marks show, for few layers and for many."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastclip
from fastclip.rules.apply import ClipResult
from fastclip.rules.groups import Groups

pytest.importorskip("matplotlib", reason="pictures need matplotlib, and it is not installed")

from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

RED = to_rgba("#e3170a")
GREY = to_rgba("0.85")


def monitor_of(norms: Sequence[Sequence[float]], losses: Sequence[float | None] | None = None) -> fastclip.Monitor:
    """A monitor that recorded these norms; -1 is a missing gradient."""
    count = len(norms[0])
    names: list[tuple[str, Tensor]] = [(f"layer{i}.weight", torch.zeros(1)) for i in range(count)]
    monitor = fastclip.Monitor(names, triggers=[fastclip.NonFinite("loss", action="skip")], max_skipped=100)
    for step, row in enumerate(norms):
        vector = torch.tensor(row, dtype=torch.float64).clamp(min=0)
        present = [i for i, norm in enumerate(row) if norm != -1]
        result = ClipResult(vector.norm(), vector, present, Groups(("all",), (0,) * count), vector.norm().reshape(1))
        monitor.update(result, losses[step] if losses else None)
    return monitor


def cells_of(figure: Figure) -> np.ndarray:
    """The map's colours: [rows, columns, 4]."""
    (image,) = (image for axes in figure.axes for image in axes.get_images())
    cells: np.ndarray = np.asarray(image.get_array())
    return cells


def labels_of(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes if axes.get_images() for text in axes.get_yticklabels()]


def explained(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_cells_of_few_layers(tmp_path: Path) -> None:
    norms = np.ones((20, 10))
    norms[5, 3], norms[7, 4], norms[9, :], norms[:, 9], norms[2, 1] = math.nan, math.inf, 50.0, -1, 0.0
    path = tmp_path / "norms.png"
    figure = monitor_of(norms.tolist(), [1.0] * 20).plot(path)
    cells = cells_of(figure)
    assert cells.shape == (10, 20, 4)
    is_red, is_grey = (np.all(cells == colour, axis=-1) for colour in (RED, GREY))
    assert np.argwhere(is_red).tolist() == [[3, 5], [4, 7]]
    assert is_grey[9].all()
    assert not is_grey[:9].any()
    assert len(np.unique(cells[0], axis=0)) == 2  # the spike, and all other cells
    assert not np.array_equal(cells[0, 9], cells[0, 8])
    assert labels_of(figure) == [f"layer{i}" for i in range(10)]
    assert explained(figure) == ["running mean", "not finite", "no gradient"]
    assert path.read_bytes().startswith(b"\x89PNG")


def test_many_layers_share_cells_and_nothing_is_averaged_away() -> None:
    norms = np.ones((900, 1001))
    norms[700, 500], norms[300, 1000] = math.nan, 1e4
    figure = monitor_of(norms.tolist()).plot()
    cells = cells_of(figure)
    assert cells.shape == (201, 300, 4)  # five layers and three steps each
    assert np.argwhere(np.all(cells == RED, axis=-1)).tolist() == [[100, 233]]
    assert len(np.unique(cells.reshape(-1, 4), axis=0)) == 3
    assert not np.array_equal(cells[200, 100], cells[0, 0])
    labels = labels_of(figure)
    assert len(labels) <= 40
    assert labels[:2] == ["layer0", "layer26"]


def test_panels() -> None:
    with pytest.warns(RuntimeWarning, match="steps skipped: 1"):
        with_loss = monitor_of([[1.0, 2.0]] * 3, [3.0, math.inf, 1.0]).plot()
    assert [axes.get_ylabel() for axes in with_loss.axes] == ["loss", "global norm", "", "gradient norm"]
    assert explained(with_loss) == ["running mean", "skipped", "not finite"]
    assert with_loss.axes[0].get_yscale() == "linear"
    without = monitor_of([[1.0, 2.0]] * 3).plot()
    assert [axes.get_ylabel() for axes in without.axes] == ["global norm", "", "gradient norm"]
    assert without.axes[0].get_yscale() == "log"
    exploded = monitor_of([[1.0]] * 5, [1.0, 1.0, 1.0, 1.0, 1e6]).plot()
    assert exploded.axes[0].get_yscale() == "log"


def test_panels_of_what_was_clipped() -> None:
    """The norms before and after clipping in one panel, the clip rate in the one below."""
    model = nn.Linear(2, 1, bias=False)
    monitor = fastclip.Monitor(model, window=2)
    for value in (3.0, 0.1, 0.2, 3.0):
        model.weight.grad = torch.tensor([[value, 0.0]])
        monitor.update(fastclip.clip_grads_(model, fastclip.ClipByGlobalNorm(1.0)))
    figure = monitor.plot()
    assert [axes.get_ylabel() for axes in figure.axes] == ["global norm", "clip rate", "", "gradient norm"]
    assert explained(figure) == ["running mean", "norm after clipping", "threshold"]
    drawn = [list(np.asarray(line.get_ydata(), dtype=float)) for line in figure.axes[0].get_lines()]
    assert any(after == pytest.approx([1.0, 0.1, 0.2, 1.0]) for after in drawn)
    assert [1.0] * 4 in drawn
    (area,) = figure.axes[1].collections
    heights = {(x, round(y, 3)) for x, y in area.get_paths()[0].vertices.tolist()}  # type: ignore[union-attr]
    assert {(1.0, 1.0), (2.0, 0.5), (3.0, 0.0), (4.0, 0.5)} <= heights


@pytest.mark.parametrize("row", [[0.0, 0.0], [math.nan, math.nan], [-1, -1]], ids=["zeros", "NaNs", "no gradients"])
def test_nothing_to_scale_colours_by(row: list[float], tmp_path: Path) -> None:
    figure = monitor_of([row] * 2).plot(tmp_path / "norms.png")
    assert cells_of(figure).shape == (2, 2, 4)


def test_one_step(tmp_path: Path) -> None:
    figure = monitor_of([[1.0]], [2.0]).plot(tmp_path / "norms.svg")
    assert figure.axes[-1].get_ylim() == pytest.approx((1.0, 10.0))  # a scale of colours of some length
    assert (tmp_path / "norms.svg").read_text().startswith("<?xml")


def test_no_steps() -> None:
    with pytest.raises(ValueError, match="has seen no step"):
        fastclip.Monitor([("w", torch.zeros(1))]).plot()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = monitor_of([[1.0]])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        monitor.plot()


def test_what_is_not_asked_for_is_not_imported() -> None:
    code = "import fastclip, sys; fastclip.Monitor; print({'matplotlib', 'tensorboard'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "set()"


@pytest.mark.parametrize("norm", [5e-324, 1e-300, 1e200, 1.7e308])
def test_extreme_norms_and_labels_that_look_like_formulas(tmp_path: Path, norm: float) -> None:
    parameters = [nn.Parameter(torch.ones(1, dtype=torch.float64)) for _ in range(2)]
    monitor = fastclip.Monitor(parameters, by=["$\\frac$", "plain"])
    for value in (1.0, norm, 1e-300, 1e300):
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, value)
        monitor.update(fastclip.measure_grads(parameters), loss=value)
    monitor.plot(tmp_path / "norms.png")
    assert (tmp_path / "norms.png").stat().st_size > 5000
