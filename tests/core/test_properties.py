"""Lists of any shapes, strides, offsets, dtypes and values, against the fp64 reference and against torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gradients import assert_untouched_around, embedded, parameters, twin
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from legs import Leg
from torch import Tensor

import fastclip

INF = math.inf
ORDERS = (2.0, 1.0, 3.0, 0.5, 0.0, -1.0, INF, -INF)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def special_values(dtype: torch.dtype) -> list[float]:
    numbers = torch.finfo(dtype)
    smallest = numbers.smallest_normal * numbers.eps
    magnitudes = [0.0, smallest, numbers.smallest_normal, 1.0, math.sqrt(numbers.max), numbers.max, INF]
    return [*magnitudes, *(-magnitude for magnitude in magnitudes), math.nan]


@st.composite
def values_of(draw: st.DrawFn, dtype: torch.dtype, size: int, *, finite: bool) -> Tensor:
    """Values of one scale, a few of them replaced by special values."""
    numbers = torch.finfo(dtype)
    scale = 2.0 ** draw(st.integers(-40, 40) if dtype == torch.float64 else st.integers(-12, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = torch.from_numpy(rng.standard_normal(size) * scale)
    choices = [v for v in special_values(dtype) if math.isfinite(v) or not finite]
    for _ in range(draw(st.integers(0, 3)) if size else 0):
        values[draw(st.integers(0, size - 1))] = draw(st.sampled_from(choices))
    return values.clamp(-numbers.max, numbers.max).where(values.isfinite(), values).to(dtype)


@st.composite
def gradients(draw: st.DrawFn, *, finite: bool = False) -> list[Tensor]:
    """One to six tensors: sliced with steps, transposed, permuted, at any offset; some are scalars or empty."""
    tensors = []
    for _ in range(draw(st.integers(1, 6))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        if draw(st.booleans()):
            shape = (*shape, draw(st.integers(1, 40)))
        flat = draw(values_of(dtype, math.prod(shape), finite=finite))
        order = draw(st.permutations(range(len(shape))))
        gaps = draw(st.lists(st.integers(1, 2), min_size=len(shape), max_size=len(shape)))
        strides, step = [0] * len(shape), 1
        for dimension, gap in zip(order, gaps, strict=True):
            strides[dimension] = step * gap
            step *= gap * max(shape[dimension], 1)
        tensors.append(embedded(flat.view(shape), offset=draw(st.integers(0, 15)), strides=strides))
    return tensors


def examples(leg: Leg) -> int:
    return {"interpreter": 20, "ptx": 25}.get(leg.name, 100)


def run(leg: Leg, test: Any, **strategies: Any) -> None:
    """Test a property on as many examples as the leg has time for; they are the same in every run."""
    # To shrink a failure takes thousands of further examples: minutes on a slow leg.
    phases = tuple(Phase) if leg.environment is None else (Phase.generate,)
    settled = settings(
        phases=phases,
        deadline=None,
        derandomize=True,
        database=None,
        max_examples=examples(leg),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settled(given(**strategies)(test))()


def tolerance_of(tensors: list[Tensor]) -> float:
    return max(oracle.NORM_TOLERANCE[tensor.dtype] for tensor in tensors)


def as_the_leg_sees(leg: Leg, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors; on the interpreter with 0 for bfloat16's subnormals, as it reads them."""
    if leg.truncates_bfloat16:
        for tensor in tensors:
            if tensor.dtype == torch.bfloat16:
                tiny = tensor.abs() < torch.finfo(torch.bfloat16).smallest_normal
                tensor.masked_fill_(tiny, 0.0)
    return tensors


PROPERTY_LEGS = pytest.mark.legs("numpy", "torch", "interpreter", "ptx")


@PROPERTY_LEGS
def test_norms(leg: Leg) -> None:
    def test(tensors: list[Tensor], p: float) -> None:
        tensors = as_the_leg_sees(leg, tensors)
        before = [twin(tensor) for tensor in tensors]
        exact = oracle.norm(tensors, p)
        norm = fastclip.get_total_norm(tensors, p, norm_dtype=torch.float32)
        with np.errstate(over="ignore"):
            oracle.assert_norm(norm, exact, [tensor.dtype for tensor in tensors], leg)
        for tensor, original in zip(tensors, before, strict=True):
            oracle.assert_same_bits(tensor, original)

    run(leg, test, tensors=gradients(), p=st.sampled_from(ORDERS))


@PROPERTY_LEGS
def test_clipping_finite_gradients(leg: Leg) -> None:
    """For all finite values, the result is `g * min(max_norm / (norm + 1e-6), 1)`, or `g` itself to the bit."""

    def test(tensors: list[Tensor], ratio: float) -> None:
        tensors = as_the_leg_sees(leg, tensors)
        originals = [twin(tensor) for tensor in tensors]
        exact = oracle.norm(tensors, 2)
        max_norm = exact * ratio
        fastclip.clip_grad_norm_(parameters(tensors), max_norm, norm_dtype=torch.float32)
        factor = oracle.coefficient(exact, max_norm)
        for tensor, original in zip(tensors, originals, strict=True):
            assert_untouched_around(tensor, original)
            if factor == 1:
                oracle.assert_same_bits(tensor, original)
                continue
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            tolerance = tolerance_of(tensors) + 3 * oracle.half_ulp(wide) + oracle.rounding(leg, tensor.dtype)
            oracle.assert_close(tensor, oracle.as_numpy(original) * factor, tolerance, leg)

    run(leg, test, tensors=gradients(finite=True), ratio=st.sampled_from([0.3, 1e-3, 0.0, -0.5, 2.0, INF]))


@PROPERTY_LEGS
def test_clipping_nonfinite_gradients_poisons_as_torch_does(leg: Leg) -> None:
    def test(tensors: list[Tensor], max_norm: float) -> None:
        tensors = as_the_leg_sees(leg, tensors)
        exact = oracle.norm(tensors, 2)
        if math.isfinite(exact):
            return  # the other property's
        theirs = [twin(tensor) for tensor in tensors]
        fastclip.clip_grad_norm_(parameters(tensors), max_norm, norm_dtype=torch.float32)
        torch.nn.utils.clip_grad_norm_(parameters(theirs), max_norm)
        for tensor, expected in zip(tensors, theirs, strict=True):
            np.testing.assert_array_equal(oracle.as_numpy(tensor), oracle.as_numpy(expected))

    run(leg, test, tensors=gradients(), max_norm=st.sampled_from([1.0, 0.0, -1.0]))


@PROPERTY_LEGS
def test_an_infinite_bound_leaves_whatever_there_is(leg: Leg) -> None:
    def test(tensors: list[Tensor], p: float) -> None:
        before = [twin(tensor) for tensor in tensors]
        fastclip.clip_grad_norm_(parameters(tensors), INF, p)
        for tensor, original in zip(tensors, before, strict=True):
            oracle.assert_same_bits(tensor, original)
            assert_untouched_around(tensor, original)

    run(leg, test, tensors=gradients(), p=st.sampled_from(ORDERS))


@PROPERTY_LEGS
def test_value_clipping_is_torchs(leg: Leg) -> None:
    def test(tensors: list[Tensor], clip_value: float) -> None:
        tensors = as_the_leg_sees(leg, tensors)
        originals, theirs = ([twin(tensor) for tensor in tensors] for _ in range(2))
        fastclip.clip_grad_value_(parameters(tensors), clip_value)
        torch.nn.utils.clip_grad_value_(parameters(theirs), clip_value)
        for tensor, original, expected in zip(tensors, originals, theirs, strict=True):
            np.testing.assert_array_equal(oracle.as_numpy(tensor), oracle.as_numpy(expected))
            assert_untouched_around(tensor, original)

    # Bounds that every dtype holds exactly: the interpreter rounds others wrongly to bfloat16.
    run(leg, test, tensors=gradients(), clip_value=st.sampled_from([1.0, 0.125, 0.0, -0.5, 2.0**-14, 49152.0, INF]))
