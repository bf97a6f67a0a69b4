"""Plans: a norm, a coefficient and bounds for each gradient, on every backend and in however many parts."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gradients import assert_untouched_around, embedded, parameters, random_values, twin
from legs import Leg
from torch import Tensor

import fastclip
from fastclip.core import cache, first_time, planned
from fastclip.core import prepare as prepare_module
from fastclip.core.collect import as_gradients
from fastclip.core.gradients import Gradients
from fastclip.core.planned import Planned
from fastclip.core.prepare import prepare

INF = math.inf
NAN = math.nan
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHUNK_BYTES = 131_072  # of a chunk in the kernels' table


def prepared(tensors: Sequence[Tensor]) -> tuple[Planned, Gradients]:
    grads = as_gradients(list(tensors))
    plans = prepare(grads, in_place=True)
    assert isinstance(plans, Planned)
    return plans, grads


def assert_norms(tensors: Sequence[Tensor]) -> None:
    """The norms of each and of all are right to rounding, and the next call does not overwrite those of each."""
    plans, _ = prepared(tensors)
    norms = plans.norms()
    assert (norms.dtype, norms.shape) == (torch.float64, (len(tensors),))
    before = norms.tolist()
    plans.norms()
    assert norms.tolist() == pytest.approx(before, rel=0, nan_ok=True)
    for norm, tensor in zip(before, tensors, strict=True):
        exact = oracle.norm([tensor], 2)
        assert norm == pytest.approx(exact, rel=oracle.NORM_TOLERANCE[tensor.dtype], abs=0, nan_ok=True)
    tolerance = max(oracle.NORM_TOLERANCE[tensor.dtype] for tensor in tensors)
    total = plans.reduce(2.0, 1.0, torch.float64).norm.item()
    assert total == pytest.approx(oracle.norm(tensors, 2), rel=tolerance, abs=0, nan_ok=True)


def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the NumPy backend cut gradients into rows and blocks of a few elements each."""
    numpy_backend = importlib.import_module("fastclip.backends.numpy")
    monkeypatch.setattr(numpy_backend, "ROW", 10)
    monkeypatch.setattr(numpy_backend, "BLOCK", 35)


EDGES: dict[torch.dtype, tuple[float, ...]] = {
    torch.float32: (1e-45, 1e-40, 3e-23, 1e-22, 2e-21, 1e-20, 1e-17, 1.0, 1e17, 1e18, 1e19, 3e38),
    torch.float64: (5e-324, 1e-310, 1e-300, 1e-160, 1e-150, 1.0, 1e150, 1e160, 1e300, 1e305),
}


@pytest.mark.parametrize("dtype", EDGES, ids=str)
def test_norms_over_the_whole_range(leg: Leg, dtype: torch.dtype) -> None:
    sizes = (1, 3, 40, 2000) if leg.name != "interpreter" else (3, 40)
    assert_norms(
        [
            embedded(torch.full((size,), value, dtype=torch.float64).to(dtype), offset=i % 4, device=leg.device)
            for i, value in enumerate(EDGES[dtype])
            for size in sizes
        ]
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_of_gradients_in_several_parts(
    leg: Leg, dtype: torch.dtype, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are chunks of the kernels or blocks of NumPy's. The squares of none overflow, and none is left out."""
    cut(monkeypatch)
    part = CHUNK_BYTES // dtype.itemsize if leg.backend == "triton" else 100
    tensors = [random_values(rng, (size,), dtype) for size in (3, 2 * part + 5, 1, part + 1, part, 16, 17)]
    # One nonzero value: in the first part, in between, and in the last part.
    for position in (0, part + part // 2, -1) if leg.name != "interpreter" else ():
        tensors.append(torch.zeros(2 * part + 5, dtype=dtype))
        tensors[-1][position] = -3.0
    if dtype in EDGES:
        parts = [torch.full((part,), value, dtype=dtype) for value in (EDGES[dtype][2], EDGES[dtype][-1], 1.0)]
        tensors += [torch.cat(parts), torch.cat(parts[::-1]), torch.cat([parts[0]] * 2)][
            : 1 if leg.name == "interpreter" else 3
        ]
    assert_norms([embedded(tensor, offset=i % 4, device=leg.device) for i, tensor in enumerate(tensors)])


@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_what_is_not_finite_is_in_its_own_norm_only(leg: Leg, special: float, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(monkeypatch)
    for size, position in ((3, 1), (300, 0), (300, 150), (300, 299), (1100, 1099)):
        tensors = [torch.ones(size, device=leg.device) for _ in range(3)]
        tensors[1][position] = special
        norms = prepared(tensors)[0].norms().tolist()
        assert norms == pytest.approx([size**0.5, abs(special), size**0.5], rel=1e-6, nan_ok=True)


def mixture(leg: Leg, rng: np.random.Generator) -> list[Tensor]:
    """Gradients that need several backends: dense ones, ones with gaps, without elements, and overlapping ones."""
    flat = embedded(random_values(rng, (60,), torch.float32), device=leg.device)
    made = [
        embedded(random_values(rng, (9, 6), torch.float32), strides=(13, 2), device=leg.device),
        embedded(random_values(rng, (0,), torch.float32), device=leg.device),
        embedded(random_values(rng, (40,), torch.bfloat16), offset=1, device=leg.device),
        flat[:40],
        embedded(random_values(rng, (5, 7), torch.float64), strides=(1, 5), device=leg.device),
        embedded(random_values(rng, (4, 3), torch.float16), strides=(7, 2), device=leg.device),
        flat[:40],
        embedded(random_values(rng, (), torch.float32), device=leg.device),
    ]
    assert len(prepared(made)[0].plans) == (1 if leg.backend == "torch" else 2)
    return made


def test_norms_of_a_mixture(leg: Leg, rng: np.random.Generator) -> None:
    assert_norms(mixture(leg, rng))


def test_each_of_a_mixture_has_its_own_coefficient(leg: Leg, rng: np.random.Generator) -> None:
    tensors = mixture(leg, rng)
    originals = [twin(tensor) for tensor in tensors]
    coefficients = [0.5, 7.0, 0.25, 2.0, 1.0, 0.125, 4.0, -1.0]  # powers of two: exact
    plans, grads = prepared(tensors)
    plans.scale_(grads, torch.tensor(coefficients, dtype=torch.float64, device=leg.device))
    coefficients[3] = coefficients[6] = 8.0  # both scale the same memory
    for tensor, original, coefficient in zip(tensors, originals, coefficients, strict=True):
        oracle.assert_same_bits(tensor, original * coefficient)
    for position in (0, 2, 4, 5, 7):
        assert_untouched_around(tensors[position], originals[position])


def test_each_of_a_mixture_has_its_own_bounds(leg: Leg, rng: np.random.Generator) -> None:
    lows = [-0.5, 0.0, -0.25, -INF, -0.125, -1.0, 0.0, -2.0]
    highs = [0.25, 0.0, INF, 0.5, 0.125, 0.5, 1.0, -1.0]
    for low, high in ((lows, highs), (-2.0, highs), (lows, 2.0)):
        tensors = mixture(leg, rng)
        originals = [twin(tensor) for tensor in tensors]
        plans, grads = prepared(tensors)
        flags = plans.clamp_(grads, low, high, watch=True)
        assert any(flag.any() for flag in flags)
        for i, (tensor, original) in enumerate(zip(tensors, originals, strict=True)):
            both = (3, 6) if i in {3, 6} else (i,)  # both clamp the same memory
            expected = original
            for j in both:
                mine = [bound[j] if isinstance(bound, list) else bound for bound in (low, high)]
                expected = expected.clamp(*mine)
            np.testing.assert_array_equal(oracle.as_numpy(tensor), oracle.as_numpy(expected))


@pytest.mark.legs("native", "numpy")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_of_every_size(
    leg: Leg, dtype: torch.dtype, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part uses its own gradient's coefficient and bounds; one value outside is found wherever it is."""
    cut(monkeypatch)
    sizes = [350, 5, 16, 17, 210, 1, *[7] * 30, 50, 500, 45, 33]
    originals = [random_values(rng, (size,), dtype).clamp(-2, 2) for size in sizes]
    assert_norms([original.clone() for original in originals])
    coefficients = torch.tensor([2.0 ** (i % 5 - 2) for i in range(len(sizes))], dtype=torch.float64)
    bounds = [2.0 ** (i % 4 - 1) for i in range(len(sizes))]
    tensors = [original.clone() for original in originals]
    plans, grads = prepared(tensors)
    plans.scale_(grads, coefficients)
    for tensor, original, coefficient in zip(tensors, originals, coefficients.tolist(), strict=True):
        oracle.assert_same_bits(tensor, original * coefficient)
    plans.clamp_(grads, [-b for b in bounds], bounds)
    for tensor, original, coefficient, b in zip(tensors, originals, coefficients.tolist(), bounds, strict=True):
        oracle.assert_same_bits(tensor, (original * coefficient).clamp(-b, b))
    for position, low in ((None, [-b for b in bounds]), (0, -64.0), (3, -64.0), (len(sizes) - 1, -64.0)):
        for tensor in tensors:
            tensor.zero_()
        if position is not None:
            tensors[position][-1] = -100.0
        flags = plans.clamp_(grads, low, 64.0, watch=True)
        assert any(flag.any() for flag in flags) is (position is not None)
        assert position is None or tensors[position][-1] == -64
    assert leg


@pytest.mark.legs("native", "numpy")
def test_whether_anything_was_outside_is_remembered_past_a_part_of_nan(
    leg: Leg, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut(monkeypatch)
    tensor = torch.zeros(150)
    tensor[3], tensor[120] = -100.0, NAN
    plans, grads = prepared([tensor])
    assert [flag.tolist() for flag in plans.clamp_(grads, -1.0, 1.0, watch=True)] == [[True]]
    assert (tensor[3].item(), tensor[120].isnan().item(), int(tensor.count_nonzero())) == (-1, True, 2)
    assert leg


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_coefficients_far_below_the_smallest_normal_number(leg: Leg, dtype: torch.dtype) -> None:
    """A norm can be larger than the largest value. The results of so small a coefficient are right to rounding, too."""
    largest = math.ldexp(1.0, math.frexp(torch.finfo(dtype).max)[1] - 1)
    small = 2.0 ** (-1070 if dtype == torch.float64 else -140) * 0.7
    for sizes in ((3, 40), (5,) * 6):
        tensors = [torch.full((size,), largest, dtype=dtype, device=leg.device) for size in sizes]
        plans, grads = prepared(tensors)
        coefficients = [NAN, small, 0.5 * small, *[1.0] * 4][: len(sizes)]
        plans.scale_(grads, torch.tensor(coefficients, dtype=torch.float64, device=leg.device))
        for tensor, coefficient in zip(tensors, coefficients, strict=True):
            tolerance = 2 * oracle.rounding(leg, dtype) + 2.0**-23
            assert tensor.tolist() == pytest.approx([largest * coefficient] * len(tensor), rel=tolerance, nan_ok=True)
        plans.scale_(grads, small)
        expected = [largest * small] * len(tensors[-1]) if len(sizes) == 6 else [largest * small * small] * 40
        assert tensors[-1].tolist() == pytest.approx(expected, rel=tolerance, abs=1e-45)


# ---- Several devices and streams, imitated on one


class Launches:
    """Records which kernels were launched inside the block, and by which plans."""

    def __enter__(self) -> Launches:
        from fastclip.backends.triton import TritonPlan

        self.made: list[tuple[str, TritonPlan]] = []
        self._monkeypatch = pytest.MonkeyPatch()
        launch = TritonPlan._launch

        def note(plan: TritonPlan, kernel: str, *rest: Any) -> None:
            self.made.append((kernel, plan))
            launch(plan, kernel, *rest)

        self._monkeypatch.setattr(TritonPlan, "_launch", note)
        return self

    def __exit__(self, *_: object) -> None:
        self._monkeypatch.undo()

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.made]


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other gradient counts as on a second device; the cache is empty before, and dropped afterwards."""
    group = first_time._dispatched

    def halves(values: Sequence[Tensor]) -> dict[Any, list[int]]:
        [((backend, device), members)] = group(values).items()
        return {(backend, device): members[::2], (backend, torch.device("meta")): members[1::2]}

    monkeypatch.setattr(first_time, "_dispatched", halves)
    monkeypatch.setattr(prepare_module, "_cache", cache.Cache())


@pytest.mark.legs("interpreter", "ptx", "gpu")
@pytest.mark.parametrize("p", [2.0, INF, 0.0, 3.0])
@pytest.mark.usefixtures("two_devices")
def test_two_launches_a_device_and_one_combination(leg: Leg, p: float, rng: np.random.Generator) -> None:
    sizes = (300, 5, 40, 7, 1)
    tensors = [embedded(random_values(rng, (size,), torch.float32), device=leg.device) for size in sizes]
    tensors[2].zero_()
    originals = [twin(tensor) for tensor in tensors]
    exact = 4.0 if p == 0 else oracle.norm(tensors, p)
    for _ in range(2):  # the second time from the cache
        for tensor, original in zip(tensors, originals, strict=True):
            tensor.copy_(original)
        with Launches() as launches:
            norm = fastclip.clip_grad_norm_(parameters(tensors), exact / 2, norm_type=p)
        assert launches.names == ["reduce_kernel"] * 2 + ["apply_kernel"] * 2
        assert norm.item() == pytest.approx(exact, rel=1e-6)
        for tensor, original in zip(tensors, originals, strict=True):
            expected = oracle.as_numpy(original) * oracle.coefficient(exact, exact / 2)
            oracle.assert_close(tensor, expected, 4 * oracle.half_ulp(torch.float32))
    assert_norms(tensors)
    with Launches() as launches:
        fastclip.clip_grad_value_(parameters(tensors), 0.01)
    assert launches.names == ["clamp_kernel"] * 2
    assert all(tensor.abs().max() <= 0.01 for tensor in tensors)


@pytest.mark.legs("interpreter", "ptx", "gpu")
@pytest.mark.parametrize("p", [2.0, 0.0])
def test_two_streams_share_no_memory_that_is_written(
    leg: Leg, p: float, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither for one list that both clip, nor for lists of the same sizes and types."""
    lists = [[random_values(rng, (size,), torch.float32).to(leg.device) for size in (70, 3)] for _ in range(2)]
    current = 0
    for module in (planned, importlib.import_module("fastclip.backends.triton")):
        monkeypatch.setattr(module, "stream_of", lambda _: current)
    prepare_anew = first_time.plan

    def on_a_stream(*arguments: Any, **keywords: Any) -> Planned:
        made = prepare_anew(*arguments, **keywords)
        made.dispatch.streams = {leg.device: current}
        return made

    monkeypatch.setattr(prepare_module, "plan", on_a_stream)  # as on a GPU, which this may not be
    monkeypatch.setattr(prepare_module, "_cache", cache.Cache())
    seen: dict[int, set[int]] = {1: set(), 2: set()}
    for stream in (1, 2, 1, 2):
        current = stream
        for grads in lists:
            plans, _ = prepared(grads)
            plan: Any = plans.plans[0]
            assert plan.tables.stream == stream
            plans.reduce(p, 1.0, torch.float32)
            plans.clamp_(as_gradients(grads), -1e9, 1e9, watch=True)
            tables = plan.tables
            written = (tables.partials, tables.counts, tables.ticket, tables.state, tables.changed)
            seen[stream].update(tensor.data_ptr() for tensor in written)
    assert not seen[1] & seen[2]


def test_flags_are_those_of_the_last_call(leg: Leg) -> None:
    tensors = [torch.tensor([3.0, -4.0], device=leg.device), torch.tensor([1.0], device=leg.device)]
    plans, grads = prepared(tensors)
    assert plans.clamp_(grads, -5.0, 5.0) == []
    for bound, outside in ((5.0, False), (3.5, True), (3.5, False), (0.5, True)):
        flags = plans.clamp_(grads, -bound, bound, watch=True)
        assert [flag.device.type for flag in flags] == [leg.device.type]
        assert bool(flags[0].any()) is outside


CALLS: dict[str, Callable[[Planned, Gradients], object]] = {
    "scale": lambda plans, grads: plans.scale_(grads, torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)),
    "clamp": lambda plans, grads: plans.clamp_(grads, [-9.0] * 3, [9.0] * 3),
}


@pytest.mark.parametrize("call", CALLS)
def test_version_counters_are_bumped_also_where_nothing_changes(leg: Leg, call: str) -> None:
    """As torch does: its graphs then know that a tensor that they saved may have changed."""
    tensors = [torch.ones(3, device=leg.device) for _ in range(3)]
    plans, grads = prepared(tensors)
    CALLS[call](plans, grads)
    assert all(tensor._version > 0 for tensor in tensors)


@pytest.mark.parametrize("value", [1.0, INF, NAN])
def test_under_an_infinite_bound_a_plan_writes_nothing_either(leg: Leg, value: float) -> None:
    """The public functions do not call its `clip_` then; in any case the coefficient is 1, not inf / inf."""
    tensors = [torch.tensor([value, 2.0], device=leg.device), torch.full((100,), 3.0, device=leg.device)]
    plans, grads = prepared(tensors)
    before = [tensor.clone() for tensor in tensors]
    plans.clip_(grads, 2.0, INF, torch.float32)
    assert float(plans.reduce(2.0, INF, torch.float32).coefficient) == 1
    for tensor, old in zip(tensors, before, strict=True):
        oracle.assert_same_bits(tensor, old)
