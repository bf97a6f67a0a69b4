"""Defects that were found by trying to break the library: for each, the smallest case that showed it."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from gradients import grad_of, parameters
from legs import Leg
from torch import Tensor, nn

import fastclip
from fastclip import backends
from fastclip.core import cache, prepare

# Norms are within 1e-6 of fp64's, as claimed; exp2 and log2 in fp64 add about p * log2(x) * 2**-53.
NORM_TOLERANCE = 1e-6


@pytest.mark.parametrize(
    ("value", "dtype", "p"),
    [
        (1e-35, torch.float32, -10.0),
        (1e-200, torch.float64, -2.0),
        (1e200, torch.float64, -3.0),
        (3e37, torch.float32, 12.0),
        (1.5, torch.float64, 3000.0),
        (0.4, torch.float32, 1e4),
    ],
)
def test_no_order_overflows_or_underflows(leg: Leg, value: float, dtype: torch.dtype, p: float) -> None:
    gradients = [torch.full((4,), value, dtype=dtype, device=leg.device) for _ in range(3)]
    norm = fastclip.get_total_norm(gradients, p, norm_dtype=torch.float64).item()
    assert norm == pytest.approx(gradients[0][0].item() * 12 ** (1 / p), rel=NORM_TOLERANCE)


def test_a_strided_gradient_overflows_no_more_than_a_contiguous_one() -> None:
    strided = torch.full((4, 2), 3e37)[:, 0]
    norm = fastclip.get_total_norm([strided], 12.0)
    assert norm.item() == pytest.approx(3e37 * 4 ** (1 / 12), rel=NORM_TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_a_coefficient_below_the_normal_numbers_keeps_its_precision_under_torch(dtype: torch.dtype) -> None:
    gradient = torch.full((4, 2), 1e38).to(dtype)[:, 0]
    parameter = torch.zeros_like(gradient)
    parameter.grad = gradient
    fastclip.clip_grad_norm_([parameter], 1e-8)
    # Half an ulp of bfloat16 for the stored gradient and half for the product; the error of fp32 is far smaller.
    assert gradient.abs().double().tolist() == pytest.approx([5e-9] * 4, rel=2**-8)


def test_a_parameter_list_counts_a_repeated_parameter_twice(leg: Leg) -> None:
    parameter = nn.Parameter(torch.zeros(2, device=leg.device))
    parameter.grad = torch.tensor([3.0, 4.0], device=leg.device)
    assert fastclip.get_total_norm([parameter.grad] * 2).item() == pytest.approx(math.sqrt(50))
    assert fastclip.clip_grad_norm_(nn.ParameterList([parameter, parameter]), 1e9).item() == pytest.approx(
        math.sqrt(50)
    )


def test_large_gradients_are_clipped_while_the_interpreter_shuts_down() -> None:
    script = """
import atexit, torch, fastclip
parameter = torch.zeros(400_000)
parameter.grad = torch.ones(400_000)
fastclip.clip_grad_norm_([parameter], 1e9)
atexit.register(lambda: print(fastclip.clip_grad_norm_([parameter], 1.0).item(), parameter.grad.double().norm().item()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, after = map(float, done.stdout.split())
    assert before == pytest.approx(math.sqrt(400_000))
    assert after == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("size", [5, 500_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_default_device_and_autocast_have_no_say(dtype: torch.dtype, size: int) -> None:
    (parameter,) = parameters([torch.ones(size, dtype=dtype)])
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        norms = [
            fastclip.get_total_norm(grad_of(parameter), order, norm_dtype=torch.float32)
            for order in (1, 2, 3, math.inf)
        ]
        fastclip.clip_grad_norm_([parameter], math.sqrt(size) / 2)
        fastclip.clip_grad_value_([parameter], 0.1)
    assert {norm.device.type for norm in norms} == {"cpu"}
    assert [norm.item() for norm in norms] == pytest.approx([size, size ** (1 / 2), size ** (1 / 3), 1], rel=1e-6)
    assert grad_of(parameter).max().item() == pytest.approx(0.1, rel=2**-8)


def test_gradients_inside_of_a_function_transform() -> None:
    gradient = torch.func.grad(lambda w: (fastclip.get_total_norm([w]) * w).sum())(torch.ones(4))
    assert gradient.tolist() == [2.0] * 4


def test_zeros_without_memory() -> None:
    assert fastclip.get_total_norm([torch._efficientzerotensor((5,))]).item() == 0


def test_warm_up_leaves_out_integer_weights() -> None:
    model = nn.Linear(3, 3)
    model.register_parameter("quantised", nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    fastclip.warm_up(model)


def test_a_bound_that_requires_grad_is_taken_without_a_warning() -> None:
    (parameter,) = parameters([torch.ones(4)])
    assert fastclip.clip_grad_norm_([parameter], torch.tensor(1.0, requires_grad=True)).item() == 2  # type: ignore[arg-type]


def test_a_bound_beyond_fp32_is_taken_without_a_warning(leg: Leg) -> None:
    (parameter,) = parameters([torch.ones(4, device=leg.device)])
    fastclip.clip_grad_norm_([parameter], -1e300)
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [-math.inf] * 4


def test_an_inference_tensor_over_the_memory_of_a_clipped_gradient_is_refused() -> None:
    memory = torch.ones(8).numpy()
    (parameter,) = parameters([torch.ones(8)])
    parameter.grad = torch.from_numpy(memory)
    fastclip.clip_grad_norm_([parameter], 1e9)
    with torch.inference_mode():
        frozen = torch.from_numpy(memory)
    other = nn.Parameter(torch.zeros(8))
    with torch.inference_mode():
        other.grad = frozen
    with pytest.raises(RuntimeError, match="inference tensor"):
        fastclip.clip_grad_norm_([other], 0.1)
    assert memory.tolist() == [1.0] * 8


def test_the_fallbacks_warning_names_the_callers_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(prepare, "_cache", cache.Cache())  # no cached plan for gradients of this size
    monkeypatch.setattr(backends.Backend, "obstacle", lambda self, device: f"{self.name} is away from {device}")
    (parameter,) = parameters([torch.ones(4)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fastclip.clip_grad_norm_([parameter], 1.0)
    assert [warning.filename for warning in caught] == [__file__]
    assert "numpy is away from cpu" in str(caught[0].message)


def test_an_error_inside_of_the_callers_generator_comes_through() -> None:
    def generator() -> Iterator[Tensor]:
        yield torch.ones(1)
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        fastclip.clip_grad_norm_(generator(), 1.0)


def test_what_is_not_a_tensor_is_named_whatever_else_it_has() -> None:
    class Impostor:
        grad = None

    with pytest.raises(TypeError, match=r"tensors\[0\] is a Impostor"):
        fastclip.get_total_norm([Impostor()])  # type: ignore[arg-type]


def test_the_value_clip_names_an_integer_gradient() -> None:
    parameter = torch.zeros(3, dtype=torch.int64)
    parameter.grad = torch.ones(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"parameters\[0\] of shape \(3,\) is of torch.int64"):
        fastclip.clip_grad_value_([parameter], 1.0)


def test_a_driver_that_cannot_be_built_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver

    from fastclip.backends import triton

    class Broken:
        def get_active_torch_device(self) -> torch.device:
            raise subprocess.CalledProcessError(1, ["gcc"])

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(type(driver), "active", Broken(), raising=False)
    assert "CalledProcessError" in str(triton.obstacle(torch.device("cuda")))


def test_each_parameter_clipped_by_itself_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    every = parameters([torch.ones(4) for _ in range(50)])
    for parameter in every:
        fastclip.clip_grad_norm_(parameter, 1e9)
    monkeypatch.setattr(backends.Backend, "plan", None)  # to make a new plan would fail
    for parameter in every:
        assert fastclip.clip_grad_norm_(parameter, 1e9).item() == 2
