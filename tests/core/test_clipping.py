"""The matrix: leg x dtype x norm type x shapes x {clipping, not clipping}, against fp64 and against torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gradients import assert_untouched_around, embedded, parameters, random_values, twin
from legs import AVAILABLE, Leg
from torch import Tensor

import fastclip

CHUNK_BYTES = 131_072  # of a chunk in the kernels' table
INF = math.inf

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "fp64": (torch.float64,),
    "fp32": (torch.float32,),
    "fp16": (torch.float16,),
    "bf16": (torch.bfloat16,),
    "mixed": (torch.bfloat16, torch.float32, torch.float16, torch.float64),
}

ORDERS: tuple[float | str, ...] = (2.0, 0.0, 0.5, 1, 3.0, INF, -INF, -1.0, "inf")

Values = Callable[[int, Sequence[int]], Tensor]  # (position in the list, shape) -> random values


def one_element(values: Values) -> Iterator[Tensor]:
    yield embedded(values(0, (1,)))


def odd_sizes(values: Values) -> Iterator[Tensor]:
    """Sizes near that of a 16-byte vector and that of a warp's share, each at another offset."""
    for i, size in enumerate((1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 127, 129, 513, 1000)):
        yield embedded(values(i // 4, (size,)), offset=i)


def several_chunks(values: Values) -> Iterator[Tensor]:
    """More elements than two chunks hold, and more than one piece of the NumPy backend holds."""
    for i in range(4):
        first = values(i, (3,))
        yield embedded(first)
    yield embedded(values(0, (2 * CHUNK_BYTES // values(0, (1,)).element_size() + 5,)), offset=1)
    yield embedded(values(1, (CHUNK_BYTES // values(1, (1,)).element_size() + 1,)))


def many_tiny(values: Values) -> Iterator[Tensor]:
    for i in range(30):
        yield embedded(values(i, (1 + i % 7,)), offset=i % 5)


def layouts(values: Values) -> Iterator[Tensor]:
    """Dense in another order (the kernels take these as they are), and with gaps (torch's operations do these)."""
    for i in range(4):
        yield embedded(values(i, (12, 7)), strides=(1, 12), offset=i)  # transposed
        yield embedded(values(i, (2, 3, 5, 4)), strides=(60, 1, 12, 3))  # channels last
        yield embedded(values(i, (3, 4, 5)), strides=(4, 1, 12))  # permuted
        yield embedded(values(i, (9, 6)), strides=(13, 2))  # every other column of a wider matrix
        yield embedded(values(i, ()), offset=1)


def empty_ones(values: Values) -> Iterator[Tensor]:
    for i in range(4):
        yield embedded(values(i, (0,)))
        yield embedded(values(i, (5,)))
        yield embedded(values(i, (3, 0, 2)))


SHAPES: dict[str, Callable[[Values], Iterator[Tensor]]] = {
    shapes.__name__: shapes for shapes in (odd_sizes, one_element, several_chunks, many_tiny, layouts, empty_ones)
}


def _matrix() -> Iterator[Any]:
    for leg, dtype, p, shapes, clips in itertools.product(AVAILABLE, DTYPES, ORDERS, SHAPES, (True, False)):
        if leg.environment is None or _tells_more(dtype, p, shapes, clips):
            clipping = "clipping" if clips else "not_clipping"
            yield pytest.param(leg, dtype, p, shapes, clips, id=f"{leg.name}-{dtype}-{p}-{shapes}-{clipping}")


def _tells_more(dtype: str, p: float | str, shapes: str, clips: bool) -> bool:
    """Whether a slow leg runs the case.

    The order of the norm does not change how a kernel goes through memory, and neither does clipping. And "mixed" has
    every element type, each on its own segment of the kernel.
    """
    if p == 2:
        return clips or shapes in ("odd_sizes", "layouts")
    return clips and p != "inf" and shapes == "odd_sizes" and dtype in ("mixed", "bf16")


@pytest.mark.parametrize(("leg", "dtype", "p", "shapes", "clips"), list(_matrix()), indirect=["leg"])
def test_clip_grad_norm(
    leg: Leg, dtype: str, p: float | str, shapes: str, clips: bool, rng: np.random.Generator
) -> None:
    order = float(p)
    dtypes = DTYPES[dtype]

    def values(i: int, shape: Sequence[int]) -> Tensor:
        # One zero makes a norm of negative order 0, and such a result would show nothing.
        return random_values(rng, shape, dtypes[i % len(dtypes)], zeros=order >= 0)

    grads = [_onto(leg.device, grad) for grad in SHAPES[shapes](values)]
    present = sorted({grad.dtype for grad in grads}, key=str)
    exact = oracle.norm(grads, order)
    max_norm = exact / 3 if clips else 2 * exact + 1
    ours, theirs = ([twin(grad) for grad in grads] for _ in range(2))

    norm = fastclip.clip_grad_norm_(parameters(ours), max_norm, p, norm_dtype=_norm_dtype(leg, order))  # type: ignore[arg-type]

    oracle.assert_norm(norm, exact, present, leg)
    assert norm.device == grads[0].device
    factor = oracle.coefficient(exact, max_norm)
    for result, original in zip(ours, grads, strict=True):
        if clips:
            tolerance = oracle.NORM_TOLERANCE[max(present, key=oracle.NORM_TOLERANCE.__getitem__)]
            tolerance += oracle.rounding(leg, result.dtype) + 2 * oracle.half_ulp(_width(result.dtype))
            oracle.assert_close(result, oracle.as_numpy(original) * factor, tolerance)
        else:
            oracle.assert_same_bits(result, original)
        assert_untouched_around(result, original)

    # torch has no inf norm of an empty tensor; it zeroes 16-bit gradients whose norm is beyond their range.
    with_elements = [grad for grad in theirs if grad.numel()]
    expected = torch.nn.utils.clip_grad_norm_(parameters(with_elements), max_norm, p)  # type: ignore[arg-type]
    if not (expected == 0 or torch.finfo(expected.dtype).smallest_normal <= expected < INF):
        return
    error = max(oracle.TORCH_NORM_ERROR[dtype] for dtype in present)
    assert norm.double().item() == pytest.approx(expected.double().item(), rel=error + oracle.rounding(leg, norm.dtype))
    if _norm_dtype(leg, order) is None:
        assert norm.dtype == expected.dtype
    for result, reference in zip([grad for grad in ours if grad.numel()], with_elements, strict=True):
        if clips:
            tolerance = error + oracle.TORCH_ROUNDINGS * oracle.half_ulp(max(present, key=oracle.half_ulp))
            oracle.assert_close(result, oracle.as_numpy(reference), tolerance + oracle.rounding(leg, result.dtype))
        else:
            oracle.assert_same_bits(result, reference)


def _norm_dtype(leg: Leg, order: float) -> torch.dtype | None:
    """On ptx, all orders except 2 have one type of result: ptxlab compiles the reduction for another in 5 s or more."""
    return torch.float32 if leg.name == "ptx" and order != 2 else None


def _onto(device: torch.device, tensor: Tensor) -> Tensor:
    if device.type == "cpu":
        return tensor
    memory = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).to(device)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _width(dtype: torch.dtype) -> torch.dtype:
    """The type of the multiplication; the coefficient is rounded to it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


VALUES = (0.5, 1e-3, 0.0, -0.25, 3, INF, math.nan)
FEW_VALUES = (0.5, -0.25, math.nan)  # for legs that are slow


def _value_matrix() -> Iterator[Any]:
    for leg, dtype, shapes in itertools.product(AVAILABLE, DTYPES, SHAPES):
        if leg.environment is None or shapes == "odd_sizes" or dtype == "mixed":
            yield pytest.param(leg, dtype, shapes, id=f"{leg.name}-{dtype}-{shapes}")


@pytest.mark.parametrize(("leg", "dtype", "shapes"), list(_value_matrix()), indirect=["leg"])
def test_clip_grad_value(leg: Leg, dtype: str, shapes: str, rng: np.random.Generator) -> None:
    dtypes = DTYPES[dtype]

    def values(i: int, shape: Sequence[int]) -> Tensor:
        drawn = random_values(rng, shape, dtypes[i % len(dtypes)])
        if drawn.numel() > 8:
            drawn.view(-1)[:4] = torch.tensor([INF, -INF, math.nan, -0.0])
        return drawn

    grads = [_onto(leg.device, grad) for grad in SHAPES[shapes](values)]
    for clip_value in FEW_VALUES if leg.environment is not None else VALUES:
        ours, theirs = ([twin(grad) for grad in grads] for _ in range(2))
        fastclip.clip_grad_value_(parameters(ours), clip_value)
        torch.nn.utils.clip_grad_value_(parameters(theirs), clip_value)
        for result, expected, original in zip(ours, theirs, grads, strict=True):
            result_values, expected_values = oracle.as_numpy(result), oracle.as_numpy(expected)
            np.testing.assert_array_equal(result_values, expected_values)
            if clip_value > 0:  # otherwise torch itself may return either zero
                numbers = ~np.isnan(expected_values)
                np.testing.assert_array_equal(np.signbit(result_values)[numbers], np.signbit(expected_values)[numbers])
            assert_untouched_around(result, original)


EDGES_OF_FP32 = (1e-45, 1e-40, 3e-23, 1e-22, 2e-21, 1e-20, 1e-17, 1e17, 1e18, 1e19, 3.4e38)


@pytest.mark.parametrize("size", [40, 9000])
def test_norm_over_the_whole_range(leg: Leg, size: int) -> None:
    """Also where a sum of squares in fp32 is neither 0 nor infinite, but has lost a part of its terms."""
    for value in EDGES_OF_FP32:
        tensor = embedded(torch.full((size,), value, dtype=torch.float32), offset=1, device=leg.device)
        exact = oracle.norm([tensor], 2)
        norm = fastclip.get_total_norm([tensor], norm_dtype=torch.float64)
        assert norm.item() == pytest.approx(exact, rel=1e-6, abs=0)
        # The limit is two thirds of the norm; the 1e-6 that torch adds to the norm matters where the norm is small.
        fastclip.clip_grad_norm_(parameters([tensor]), exact / 1.5, norm_dtype=torch.float64)
        step = torch.finfo(torch.float32).smallest_normal * torch.finfo(torch.float32).eps
        assert tensor.max().item() == pytest.approx(value * exact / 1.5 / (exact + 1e-6), rel=2e-6, abs=step)
