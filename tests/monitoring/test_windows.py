"""`Jump` with a window: against NumPy on random series, its reports, and its checkpoint.

`tests/rules/test_adaptive_vectors.py` compares it with the originals.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
from legs import Leg
from torch import nn

import fastclip
from fastclip import Jump, Report

CPU = torch.device("cpu")


class Series:
    """Feeds losses and norms to a monitor, and keeps the reports of its triggers."""

    def __init__(self, *jumps: dict[str, Any], device: torch.device = CPU, skips: bool = False, **options: Any) -> None:
        self.reports: list[Report] = []
        self.parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64, device=device))
        triggers = [Jump(**jump, action=self.reports.append) for jump in jumps]
        if skips:
            triggers += [Jump(**jump, action="skip") for jump in jumps]
        self.monitor = fastclip.Monitor([self.parameter], triggers=triggers, max_skipped=1000, **options)

    def feed(self, losses: Sequence[float], norms: Sequence[float]) -> list[bool]:
        """Return which steps were skipped."""
        skipped = []
        for loss, norm in zip(losses, norms, strict=True):
            self.parameter.grad = torch.full_like(self.parameter, norm)
            skipped.append(bool(self.monitor.update(fastclip.measure_grads([self.parameter]), loss)))
        return skipped

    def fired(self) -> list[int]:
        """The steps in which a trigger fired, from 0 on."""
        return [report.step - 1 for report in self.reports]


def jumps_in(values: Sequence[float], z: float, window: int, ratio: float | None = None) -> list[tuple[int, float]]:
    """The steps that are jumps, and the limit of each; every one from all values before it."""
    found = []
    for i, x in enumerate(values):
        before = [value for value in values[:i] if math.isfinite(value)][-window:]
        if len(before) < 2 or len(before) + 1 < window // 2 or not math.isfinite(x):
            continue
        mean, s = float(np.mean(before)), float(np.std(before, ddof=1))
        if x - mean > z * s and (ratio is None or x > ratio * mean > 0):
            found.append((i, max(mean + z * s, -math.inf if ratio is None else ratio * mean)))
    return found


def draw(rng: np.random.Generator, steps: int) -> list[float]:
    """Values with a trend, jumps, and some that are not finite."""
    values = 5 * np.exp(-np.arange(steps) / 500) + rng.normal(0, 0.1, steps)
    values[rng.random(steps) < 0.05] *= 2
    for value in (math.nan, math.inf, -math.inf):
        values[rng.random(steps) < 0.02] = value
    return [float(value) for value in values]


@pytest.mark.filterwarnings("ignore:steps skipped:RuntimeWarning")
@pytest.mark.legs("native", "torch", "gpu")
@pytest.mark.parametrize("skips", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("of", ["loss", "norm"])
@pytest.mark.parametrize(
    ("z", "window", "ratio"), [(2.0, 128, None), (2.0, 16, None), (2.0, 3, 1.2), (0.0, 20, 1.3), (1.0, 2, None)]
)
def test_random_series(
    leg: Leg,
    of: Literal["loss", "norm"],
    z: float,
    window: int,
    ratio: float | None,
    skips: bool,
    rng: np.random.Generator,
) -> None:
    """The same steps and limits as by NumPy, whether the host judges or the device."""
    values = draw(rng, 200)
    if of == "norm":
        values = [abs(value) for value in values]  # a norm has no sign
    other = [1.0] * len(values)
    series = Series({"of": of, "z": z, "window": window, "ratio": ratio}, device=leg.device, skips=skips)
    skipped = series.feed(values, other) if of == "loss" else series.feed(other, values)
    expected = jumps_in(values, z, window, ratio)
    assert len(expected) > 2
    assert series.fired() == [step for step, _ in expected]
    assert [report.limit for report in series.reports] == pytest.approx([limit for _, limit in expected], rel=1e-9)
    assert [report.value for report in series.reports] == pytest.approx([values[step] for step, _ in expected])
    assert np.flatnonzero(skipped).tolist() == (series.fired() if skips else [])


def test_windows_and_averages_of_one_monitor_do_not_mix(rng: np.random.Generator) -> None:
    """Each trigger fires as if it were alone."""
    losses, norms = draw(rng, 200), [abs(value) for value in draw(rng, 200)]
    jumps: list[dict[str, Any]] = [
        {"of": "loss", "z": 2.0, "window": 10},
        {"of": "norm", "z": 2.0, "window": 10},
        {"of": "loss", "z": 2.0, "window": 60},
        {"of": "norm", "z": 2.0, "window": 25},
        {"of": "norm", "z": 2.0},
    ]
    together = Series(*jumps)
    together.feed(losses, norms)
    assert len({str(report.trigger) for report in together.reports}) == len(jumps)
    for jump in jumps:
        alone = Series(jump)
        alone.feed(losses, norms)
        assert [str(r) for r in together.reports if r.trigger.__repr__() == repr(Jump(**jump))] == [
            str(report) for report in alone.reports
        ]


def test_the_report_explains_the_window() -> None:
    series = Series({"of": "loss", "z": 3.0, "window": 4})
    series.feed([9.0, 1.0, 2.0, 3.0, 2.0, 10.0], [1.0] * 6)
    (report,) = series.reports
    assert (report.step, report.value) == (6, 10.0)
    assert report.limit == pytest.approx(2.0 + 3.0 * math.sqrt(2 / 3))
    assert "the loss is 10, above 4.449; before it was 2 ± 0.82 (z = 9.8)" in str(report)
    assert str(report.trigger) == "Jump('loss', z=3.0, window=4)"


def test_nothing_fires_before_half_of_the_window() -> None:
    """Of a window of 10, with the fourth value before."""
    for at, fires in ((3, False), (4, True)):
        series = Series({"of": "norm", "z": 3.0, "window": 10})
        norms = [1.0, 1.1, 0.9, 1.0, 1.1, 1.0]
        norms[at] = 50.0
        series.feed([1.0] * 6, norms)
        assert series.fired() == ([at] if fires else [])


def test_a_constant_series_jumps_at_any_rise() -> None:
    """As OLMo's: the standard deviation is 0."""
    series = Series({"of": "norm", "z": 6.0, "window": 8})
    series.feed([1.0] * 20, [0.5] * 18 + [0.5 + 1e-12, 0.5])
    assert series.fired() == [18]


def test_missing_losses_are_no_values() -> None:
    series = Series({"of": "loss", "z": 3.0, "window": 4})
    losses = [1.0, None, 1.1, None, 0.9, None, 5.0]
    for loss in losses:
        series.parameter.grad = torch.ones_like(series.parameter)
        series.monitor.update(fastclip.measure_grads([series.parameter]), loss)
    assert series.fired() == [6]
    assert series.reports[0].limit == pytest.approx(1.0 + 3 * 0.1)


@pytest.mark.parametrize("skips", [False, True], ids=["host", "device"])
@pytest.mark.filterwarnings("ignore:steps skipped:RuntimeWarning")
def test_a_resumed_monitor_compares_with_the_values_before(skips: bool, rng: np.random.Generator) -> None:
    losses, norms = draw(rng, 100), [abs(value) for value in draw(rng, 100)]
    jumps: list[dict[str, Any]] = [{"of": "loss", "z": 2.0, "window": 30}, {"of": "norm", "z": 2.0, "window": 12}]
    whole, first, second, fresh = (Series(*jumps, skips=skips) for _ in range(4))
    whole.feed(losses, norms)
    first.feed(losses[:50], norms[:50])
    file = io.BytesIO()
    torch.save(first.monitor.state_dict(), file)
    file.seek(0)
    second.monitor.load_state_dict(torch.load(file, weights_only=True))
    second.feed(losses[50:], norms[50:])
    fresh.feed(losses[50:], norms[50:])
    assert [*map(str, first.reports), *map(str, second.reports)] == [*map(str, whole.reports)]
    assert second.reports
    assert [report.limit for report in fresh.reports] != [report.limit for report in second.reports]


@pytest.mark.parametrize(("saved", "window"), [(6, 8), (8, 6)])
def test_a_state_of_another_window_leaves_what_fits(saved: int, window: int) -> None:
    """A jump right after a checkpoint is found, also if the window is another one than before."""
    first, second = (
        Series({"of": "norm", "z": 3.0, "window": saved}),
        Series({"of": "norm", "z": 3.0, "window": window}),
    )
    norms = [9.0, 9.0, 1.0, 1.1, 0.9, 1.0, 1.1, 0.9]
    first.feed([1.0] * 8, norms)
    second.monitor.load_state_dict(first.monitor.state_dict())
    second.feed([1.0] * 2, [1.0, 90.0])
    assert second.fired() == [9]
    known = [*norms[-min(saved, window) :], 1.0][-window:]
    assert second.reports[0].limit == pytest.approx(np.mean(known) + 3 * np.std(known, ddof=1))


def test_a_value_whose_square_overflows_does_not_blind_the_window() -> None:
    series = Series({"of": "norm", "z": 3.0, "window": 6})
    series.feed([1.0] * 8, [1.0, 1.1, 0.9, 1.0, 1.1, 1e200, 0.9, 50.0])
    assert series.fired() == [5, 7]


@pytest.mark.parametrize(
    ("window", "error"),
    [(1, ValueError), (0, ValueError), (-3, ValueError), (8.0, TypeError), ("8", TypeError), (True, TypeError)],
)
def test_windows_out_of_range(window: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="`window` must be"):
        Jump("norm", z=6.0, window=window)
