"""The adaptive rules and the windows of `Jump`, against what the authors' own code computed: `vectors/README.md`."""

from __future__ import annotations

import json
import lzma
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from gradients import grad_of
from legs import Leg
from torch import nn

import fastclip
from fastclip import ClipByEMA, ClipByQuantile, ClipByZScore, Jump

VECTORS: dict[str, list[dict[str, Any]]] = json.loads(
    lzma.decompress((Path(__file__).parent / "vectors" / "vectors.json.xz").read_bytes())
)

EXACT = 1e-12  # the originals compute in fp64, in another order
FP32 = 1e-6  # their history is in fp32: 2**-24 in each norm, and again in what is computed of them

Array = npt.NDArray[np.float64]
on_fast_legs = pytest.mark.legs("native", "torch", "gpu")  # tests/rules/test_adaptive.py compares the other legs


def cases_of(origin: str) -> pytest.MarkDecorator:
    """Parametrise a test by the cases of an origin."""
    return pytest.mark.parametrize("case", VECTORS[origin], ids=map(_name_of, VECTORS[origin]))


def _name_of(case: dict[str, Any]) -> str:
    return "-".join([case["case"], *map(str, case["settings"].values())])


class Steps:
    """What a rule did to gradients with the given norms, step by step; entries are [steps, groups]."""

    def __init__(self, leg: Leg, rule: Any, norms: Sequence[Any]) -> None:
        self.norms: Array = np.array(norms, dtype=np.float64).reshape(len(norms), -1)
        groups = self.norms.shape[1]
        parameters = [
            (str(g), nn.Parameter(torch.zeros(1, dtype=torch.float64, device=leg.device))) for g in range(groups)
        ]
        coefficients, thresholds, rows = [], [], []
        for step in self.norms:
            for (_, parameter), norm in zip(parameters, step, strict=True):
                parameter.grad = torch.tensor([-norm], dtype=torch.float64, device=leg.device)
            result = fastclip.clip_grads_(parameters, rule)
            assert result.coefficients is not None
            assert result.thresholds is not None
            coefficients.append(result.coefficients.cpu().numpy())
            thresholds.append(result.thresholds.cpu().numpy())
            rows.append(rule.state_dict()["rows"].cpu().numpy())
            after = [-grad_of(parameter).item() for _, parameter in parameters]
            np.testing.assert_allclose(after, step * coefficients[-1], rtol=1e-15)
        self.coefficients, self.thresholds = np.stack(coefficients), np.stack(thresholds)
        self.rows = np.stack(rows)  # [steps, groups, width]


def assert_same(ours: Array, theirs: Sequence[Any], tolerance: float = EXACT) -> None:
    """All entries agree. Those that the original has not (NaN) are left out."""
    expected = np.array(theirs, dtype=np.float64).reshape(ours.shape)
    known = ~np.isnan(expected)
    np.testing.assert_allclose(ours[known], expected[known], rtol=tolerance)


@on_fast_legs
@cases_of("autoclip_original")
def test_autoclip(leg: Leg, case: dict[str, Any]) -> None:
    """The authors keep all norms; a window that no sequence fills is the same."""
    settings = case["settings"]
    steps = Steps(leg, ClipByQuantile(settings["clip_percentile"] / 100, 200, include_current=True), case["norms"])
    assert_same(steps.coefficients, case["coefficients"])
    assert_same(steps.thresholds, case["thresholds"])


@on_fast_legs
@cases_of("autoclip_package")
def test_the_package_autoclip(leg: Leg, case: dict[str, Any]) -> None:
    settings = case["settings"]
    by: Any = "global" if settings["global_threshold"] else "parameter"
    steps = Steps(leg, ClipByQuantile(settings["quantile"], settings["history_length"], by=by), case["norms"])
    assert_same(steps.coefficients, case["coefficients"])


@on_fast_legs
@cases_of("trellis")
def test_trellis(leg: Leg, case: dict[str, Any]) -> None:
    settings = case["settings"]
    window = settings["buffer_size"]
    rule = ClipByQuantile(settings["clip_percentile"] / 100, window, warmup=window, cap=settings["max_norm"])
    steps = Steps(leg, rule, case["norms"])
    assert_same(steps.coefficients, case["coefficients"], FP32)
    assert_same(steps.thresholds, case["thresholds"], FP32)


@on_fast_legs
@cases_of("icefall")
def test_icefall(leg: Leg, case: dict[str, Any]) -> None:
    """From the first whole window on; what icefall does at steps 10, 20 and 40 before has no counterpart.

    It takes no norm in its first step. Its element ``2 * (n // 4)`` of n sorted norms is a quantile without
    interpolation: of 25 the median, of 100 the one above.
    """
    settings = case["settings"]
    period = settings["clipping_update_period"]
    q = 2 * (period // 4) / (period - 1)
    scale = settings["clipping_scale"]
    rule = ClipByQuantile(q, period, factor=scale, include_current=True, warmup=period, every=period)
    steps = Steps(leg, rule, case["norms"][1:])
    assert np.isinf(steps.thresholds[: period - 1]).all()
    if len(case["norms"]) > period:
        assert_same(steps.coefficients[period - 1 :], case["coefficients"][period:], FP32)
        assert_same(steps.thresholds[period - 1 :], case["thresholds"][period:], FP32)


@on_fast_legs
@cases_of("zclip")
def test_zclip(leg: Leg, case: dict[str, Any]) -> None:
    settings = case["settings"]
    mode: Any = {"adaptive_scaling": "reciprocal", "mean": "mean"}[settings["clip_option"]]
    rule = ClipByZScore(
        settings["alpha"],
        settings["z_thresh"],
        warmup=settings["warmup_steps"],
        cap=settings["max_grad_norm"],
        mode="max" if settings["mode"] == "percentile" else mode,
        factor=settings["clip_factor"],
        freeze=settings["skip_update_on_spike"],
    )
    steps = Steps(leg, rule, case["norms"])
    assert_same(steps.coefficients, case["coefficients"])
    assert_same(steps.rows[:, :, 1], case["mean_after"])
    assert_same(steps.rows[:, :, 2], case["var_after"])
    assert steps.rows[:, 0, 0].tolist() == list(range(1, len(case["norms"]) + 1))


@on_fast_legs
@cases_of("adagc")
def test_adagc(leg: Leg, case: dict[str, Any]) -> None:
    settings = case["settings"]
    by: Any = {"tensor": "parameter", "global": "global"}[settings["scope"]]
    rule = ClipByEMA(
        settings["clip_ratio"],
        settings["beta"],
        warmup=settings["start_clip_steps"],
        max_norm=settings["max_norm"],
        by=by,
    )
    steps = Steps(leg, rule, case["norms"])
    assert_same(steps.coefficients, case["coefficients"])
    assert_same(steps.rows[:, :, 1], case["ema_after"])


@on_fast_legs
@cases_of("adagc_pytorch_optimizer")
def test_adagc_of_pytorch_optimizer(leg: Leg, case: dict[str, Any]) -> None:
    """Its warm-up is a step shorter, and it takes the global norm in fp32.

    It adds no epsilon to norms. The rule is the same in any unit, except for its epsilon, so norms in units of 2**-40
    are as good as without one; with it, they would differ by more than the tolerance.
    """
    settings = case["settings"]
    unit = 2.0**40
    rule = ClipByEMA(
        settings["lambda_rel"],
        settings["beta"],
        warmup=settings["warmup_steps"] - 1,
        max_norm=settings["lambda_abs"] * unit,
    )
    steps = Steps(leg, rule, (np.array(case["norms"]) * unit).tolist())
    assert_same(steps.coefficients, case["coefficients"], FP32 / 5)
    assert_same(steps.rows[:, :, 1] / unit, case["ema_after"], FP32 / 5)


def jumps(case: dict[str, Any], make: Callable[[Any], Jump], *, with_norm: bool) -> list[float]:
    """Return 0 for each step that a jump of loss or norm skips, and 1 for the others."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    series = ("loss", "norm") if with_norm else ("loss",)
    monitor = fastclip.Monitor([parameter], triggers=[make(of) for of in series], max_skipped=len(case["norms"]))
    factors = []
    for loss, norm in zip(case["losses"], case["norms"], strict=True):
        parameter.grad = torch.tensor([norm], dtype=torch.float64)
        factors.append(0.0 if monitor.update(fastclip.measure_grads([parameter]), loss) else 1.0)
    return factors


@pytest.mark.filterwarnings("ignore:steps skipped:RuntimeWarning")
@cases_of("olmo")
def test_jump_with_a_window_is_olmo_s(case: dict[str, Any]) -> None:
    settings = case["settings"]
    window, z = settings["rolling_interval_length"], float(settings["sigma_factor"])
    ours = jumps(case, lambda of: Jump(of, z=z, window=window, action="skip"), with_norm=settings["with_grad_norm"])
    assert ours == case["step_factors"]


@pytest.mark.filterwarnings("ignore:steps skipped:RuntimeWarning")
@cases_of("maxtext")
def test_jump_with_a_window_is_maxtext_s(case: dict[str, Any]) -> None:
    """Except that after a constant series ours, as OLMo's, skips any rise, and MaxText's not one of 1e-7."""
    settings = case["settings"]
    window, z = settings["interval"], settings["scaling_factor"]
    ours = jumps(case, lambda of: Jump(of, z=z, window=window, action="skip"), with_norm=True)
    expected = list(case["step_factors"])
    if case["case"] == "constant":
        assert (case["norms"][160] - case["norms"][159], ours[160]) == (pytest.approx(1.2e-7, rel=0.01), 0.0)
        del ours[160], expected[160]
    assert ours == expected


def test_every_origin_has_steps_that_were_clipped_or_skipped() -> None:
    """So that no comparison above is one of nothing but ones, nor of nothing but a warm-up."""
    for origin, cases in VECTORS.items():
        key = "coefficients" if "coefficients" in cases[0] else "step_factors"
        factors = np.concatenate([np.ravel(case[key]) for case in cases])
        assert (factors < 1).any(), origin
        assert len(set(factors.tolist())) > 1, origin
        assert max(len(case["norms"]) for case in cases) >= 110
        assert all(math.isfinite(norm) for case in cases for norm in np.ravel(case["norms"]))
