"""The kernels alone: any number of programs, any address, any size, the whole range of values.

All memory that a kernel must write (the chunks' norms, state, result) is NaN before it runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import oracle
import pytest
import torch
from gradients import addresses, assert_untouched_around, embedded, random_values, twin
from legs import Leg
from torch import Tensor

pytestmark = pytest.mark.legs("gpu", "interpreter", "ptx")

INF = math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # in the order of the chunk map
KINDS = {2.0: "two", 1.0: "one", 0.0: "zero", 3.0: "power", -1.0: "power", INF: "max", -INF: "min"}
POISON = 0x7FC00000
SPECIAL = (0.0, -0.0, 1.5, -3.0, INF, -INF, math.nan)


class Launcher:
    """Launches the kernels on a list of tensors; the test chooses the number of programs."""

    def __init__(self, tensors: Sequence[Tensor], programs: int = 3, norm_dtype: torch.dtype = torch.float32) -> None:
        from fastclip.kernels import table

        device = tensors[0].device
        segments = np.array([DTYPES.index(tensor.dtype) for tensor in tensors])
        layout = table.lay_out(np.array([tensor.numel() for tensor in tensors]), segments)
        rows = [[tensor.data_ptr(), tensor.numel()] for tensor in tensors]
        self.device = device
        self.tensors = tensors  # they must stay alive: the kernels have only their addresses
        self.grid = (programs,)
        self.options = table.LAUNCH_OPTIONS
        self.ends = layout.ends
        self.chunks = torch.from_numpy(layout.chunks).to(device)
        self.slices = torch.from_numpy(layout.slices).to(device)
        self.rows = torch.tensor(rows, dtype=torch.int64, device=device)
        self.partials = self._poisoned(len(layout.chunks), torch.float64)
        self.counts = torch.zeros_like(self.partials)
        self.state = self._poisoned(2, torch.float64)
        self.norm = self._poisoned(1, norm_dtype).reshape(())
        self.norm_type = table.TYPES[DTYPES.index(norm_dtype)]
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)

    def _poisoned(self, size: int, dtype: torch.dtype) -> Tensor:
        return torch.full((size,), math.nan, dtype=dtype, device=self.device)

    def reduce(self, p: float = 2.0, max_norm: float = 1.0) -> None:
        """Take the norm of all tensors together."""
        from fastclip.kernels.reduce import reduce_kernel

        memory = (self.chunks, self.rows, self.counts if p == 0 else self.partials, self.ticket, self.state, self.norm)
        numbers = (*addresses(*memory), *self.ends, p, max_norm)
        reduce_kernel[self.grid](*numbers, KIND=KINDS[p], NORM=self.norm_type, **self.options)

    def tensor_norms(self) -> list[float]:
        """The 2-norm of each tensor, from the partial norms of `reduce`."""
        from fastclip.kernels.reduce import tensor_norms_kernel

        norms = self._poisoned(len(self.tensors), torch.float64)
        memory = addresses(self.partials, self.slices, norms)
        tensor_norms_kernel[self.grid](*memory, len(self.tensors), **self.options)
        values: list[float] = norms.tolist()
        return values

    def apply(self, coefficients: Tensor, stride: int) -> None:
        """Scale tensor t by `coefficients[t * stride]`."""
        from fastclip.kernels.apply import apply_kernel

        memory = addresses(self.chunks, self.rows, coefficients)
        apply_kernel[self.grid](*memory, stride, *self.ends, **self.options)

    def clamp(
        self, minimum: float, maximum: float, bounds: Tensor | None = None, *, watch: bool = False
    ) -> list[int] | None:
        """Clamp all to the same bounds, or tensor t to `bounds[t]`; if `watch`, return each program's flag."""
        from fastclip.kernels.clamp import clamp_kernel

        flags = torch.full(self.grid, POISON, dtype=torch.int32, device=self.device) if watch else None
        memory = addresses(self.chunks, self.rows, bounds, flags)
        clamp_kernel[self.grid](*memory, *self.ends, minimum, maximum, **self.options)
        return None if flags is None else flags.tolist()


def chunk_elements(dtype: torch.dtype) -> int:
    from fastclip.kernels import table

    return int(table.CHUNK_BYTES) // dtype.itemsize


def tile_elements(dtype: torch.dtype) -> int:
    from fastclip.kernels import table

    return int(table.TILE_VECTORS.value * table.VECTOR_BYTES.value) // dtype.itemsize


def scaled(tensor: Tensor, coefficient: float) -> oracle.Array:
    return oracle.as_numpy(tensor) * coefficient


def product_tolerance(leg: Leg, dtype: torch.dtype) -> float:
    """The tolerance of a product rounded to `dtype`; its coefficient is rounded to the type of the multiplication."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return oracle.rounding(leg, dtype) + 2 * oracle.half_ulp(wide)


@pytest.mark.parametrize("p", [2.0, -INF])
def test_any_number_of_programs_gives_the_same_bits(leg: Leg, p: float, rng: np.random.Generator) -> None:
    originals = [
        embedded(random_values(rng, (size,), dtype), offset=offset, device=leg.device)
        for offset, dtype in enumerate(DTYPES)
        for size in (1, 50, 5000, chunk_elements(dtype) + 777)[: 4 - offset % 2]
    ]
    seen = []
    for programs in (1, 2, 3, 7, 40):
        tensors = [twin(tensor) for tensor in originals]
        launcher = Launcher(tensors, programs, torch.float64 if p == 2 else torch.float32)
        launcher.reduce(p, max_norm=0.125)
        launcher.apply(launcher.state[1:], 0)
        seen.append([launcher.partials, launcher.state, launcher.norm, *tensors])
    for others in seen[1:]:
        for mine, first in zip(others, seen[0], strict=True):
            oracle.assert_same_bits(mine, first)
    oracle.assert_norm(seen[0][2], oracle.norm(originals, p), [torch.float32], leg)


def in_pieces(rng: np.random.Generator, device: torch.device, *, zeros: bool) -> list[Tensor]:
    """For every dtype: a tensor of one element, of a few, and of more than a chunk."""
    return [
        embedded(random_values(rng, (size,), dtype, zeros=zeros), offset=offset, device=device)
        for offset, dtype in enumerate(DTYPES)
        for size in (1, 30, chunk_elements(dtype) + 9)
    ]


@pytest.mark.parametrize("p", [p for p in KINDS if p != 0])
def test_norm_of_all(leg: Leg, p: float, rng: np.random.Generator) -> None:
    tensors = in_pieces(rng, leg.device, zeros=p >= 0)
    launcher = Launcher(tensors)
    launcher.reduce(p)
    oracle.assert_norm(launcher.norm, oracle.norm(tensors, p), DTYPES, leg)


def test_norm_of_each_tensor(leg: Leg, rng: np.random.Generator) -> None:
    tensors = in_pieces(rng, leg.device, zeros=True)
    launcher = Launcher(tensors)
    launcher.reduce()
    for norm, tensor in zip(launcher.tensor_norms(), tensors, strict=True):
        assert norm == pytest.approx(oracle.norm([tensor], 2.0), rel=oracle.NORM_TOLERANCE[tensor.dtype])


def test_zero_norm_counts_tensors(leg: Leg) -> None:
    """Each tensor with a nonzero element in any chunk counts once, and each launch counts from 0."""
    size = 2 * chunk_elements(torch.float32) + 5
    tensors = [embedded(torch.zeros(n, dtype=dtype), device=leg.device) for dtype in DTYPES for n in (3, size)]
    launcher = Launcher(tensors, programs=4)
    for nonzero in ([], [(0, 2)], [(1, 0), (1, 2 * size // 3), (3, size // 2), (7, size - 1), (4, 1)], [(5, 9)]):
        for tensor in tensors:
            tensor.zero_()
        for position, element in nonzero:
            tensors[position][element] = math.nan if element == 1 else 0.5
        launcher.norm.fill_(math.nan)
        launcher.reduce(0.0)
        assert launcher.norm.item() == len({position for position, _ in nonzero})
        assert not launcher.counts.any()


@pytest.mark.legs("ptx", "gpu")
def test_zero_norm_forgets_thousands_of_tensors(leg: Leg) -> None:
    tensors = list(torch.ones(1500, 1, device=leg.device))
    launcher = Launcher(tensors)
    launcher.reduce(0.0)
    assert launcher.norm.item() == 1500
    for tensor in tensors[600:]:
        tensor.zero_()
    launcher.reduce(0.0)
    assert launcher.norm.item() == 600
    assert not launcher.counts.any()


@pytest.mark.legs("ptx", "gpu")
def test_norm_of_more_chunks_than_a_chunk_has_vectors(leg: Leg) -> None:
    """All partial norms are combined, however many there are."""
    launcher = Launcher(list(torch.ones(20_000, 1, device=leg.device)))
    launcher.reduce()
    assert launcher.norm.item() == pytest.approx(20_000**0.5)
    assert launcher.tensor_norms() == [1.0] * 20_000


def small(leg: Leg, rng: np.random.Generator) -> list[Tensor]:
    """For every dtype, groups of small tensors of several sizes and powers of ten; the last group is not full."""
    return [
        embedded(
            random_values(rng, (int(size),), dtype, zeros=False) * 10.0 ** -int(rng.integers(3)),
            offset=position % 3,
            device=leg.device,
        )
        for dtype in DTYPES
        for position, size in enumerate([1, 64, *rng.integers(1, 65, 17)])
    ]


@pytest.mark.parametrize("p", KINDS)
def test_norm_of_each_small_tensor(leg: Leg, p: float, rng: np.random.Generator) -> None:
    tensors = small(leg, rng)
    nan, infinite, zero = (tensors[i] for i in (3, 25, 40))
    nan[-1], infinite[0] = math.nan, -INF
    zero.zero_()
    launcher = Launcher(tensors, programs=3)
    slots = launcher.counts if p == 0 else launcher.partials
    if p == 0:
        launcher.ticket.fill_(-9)  # so no program is the last one, and none clears the counts
    launcher.reduce(p)
    for tensor, (slot, count) in zip(tensors, launcher.slices.tolist(), strict=True):
        assert count == 1
        exact = int(tensor.count_nonzero()) if p == 0 else oracle.norm([tensor], p)
        relative = oracle.NORM_TOLERANCE[tensor.dtype]
        assert slots[slot].item() == pytest.approx(exact, rel=relative, abs=0, nan_ok=True)


def test_scaling_each_small_tensor(leg: Leg, rng: np.random.Generator) -> None:
    """Each has its own coefficient, which may be 1 or NaN; the memory around it does not change."""
    originals = small(leg, rng)
    tensors = [twin(tensor) for tensor in originals]
    coefficients = torch.from_numpy(rng.uniform(0.1, 0.9, len(tensors))).to(leg.device)
    coefficients[::5] = 1.0
    coefficients[7] = math.nan
    Launcher(tensors, programs=3).apply(coefficients, stride=1)
    for tensor, original, coefficient in zip(tensors, originals, coefficients.tolist(), strict=True):
        oracle.assert_close(tensor, scaled(original, coefficient), product_tolerance(leg, tensor.dtype))
        if coefficient == 1:
            oracle.assert_same_bits(tensor, original)
        assert_untouched_around(tensor, original)


def test_clamping_each_small_tensor(leg: Leg, rng: np.random.Generator) -> None:
    originals = small(leg, rng)
    tensors = [twin(tensor) for tensor in originals]
    pairs = np.sort(rng.integers(-40, 41, (len(tensors), 2)), axis=1) / 64  # bfloat16 can represent them
    bounds = torch.from_numpy(pairs).to(leg.device)
    Launcher(tensors, programs=3).clamp(9.0, -9.0, bounds)
    for tensor, original, (low, high) in zip(tensors, originals, bounds.tolist(), strict=True):
        oracle.assert_same_bits(tensor, original.clamp(low, high))
        assert_untouched_around(tensor, original)


def test_launches_in_a_row(leg: Leg, rng: np.random.Generator) -> None:
    """The ticket, which tells a program that it is the last one, is 0 again after each launch."""
    tensors = [embedded(random_values(rng, (1000,), torch.float32), device=leg.device) for _ in range(5)]
    launcher = Launcher(tensors, programs=4)
    for factor in (1.0, 3.0, 0.5):
        for tensor in tensors:
            tensor.mul_(factor)
        for poisoned in (launcher.partials, launcher.state, launcher.norm):
            poisoned.fill_(math.nan)
        launcher.reduce()
        assert launcher.ticket.item() == 0
        oracle.assert_norm(launcher.norm, oracle.norm(tensors, 2), [torch.float32], leg)


ALL_ALIGNMENTS = [
    (dtype, offset, size)
    for dtype in DTYPES
    for offset in range(16 // dtype.itemsize)
    for size in ((1, 16 // dtype.itemsize - 1, 64, 65, 66, 64 + 16 // dtype.itemsize, 75) if offset else (1, 16, 72))
]


def alignments(leg: Leg, rng: np.random.Generator) -> list[Tensor]:
    """Every address modulo 16, small tensors (up to 64 elements) and large ones, with and without a head and a tail."""
    return [
        embedded(random_values(rng, (size,), dtype), offset=offset, device=leg.device)
        for dtype, offset, size in ALL_ALIGNMENTS
    ]


def boundaries(leg: Leg, rng: np.random.Generator) -> list[Tensor]:
    """Sizes near those of a tile and of a chunk, at a 16-byte boundary and one element after it."""
    return [
        embedded(random_values(rng, (size + extra,), dtype), offset=offset, device=leg.device)
        for dtype in DTYPES
        for size, offset in ((tile_elements(dtype), 1), (chunk_elements(dtype), 0), (chunk_elements(dtype), 1))
        for extra in (-1, 0, 1)
    ]


@pytest.mark.parametrize("places", [alignments, boundaries])
def test_addresses_and_sizes(leg: Leg, places: object, rng: np.random.Generator) -> None:
    """Each tensor has its own norm and coefficient; memory around it is neither read nor written."""
    assert callable(places)
    originals: list[Tensor] = places(leg, rng)
    tensors = [twin(tensor) for tensor in originals]
    launcher = Launcher(tensors, programs=7)
    launcher.reduce()
    for norm, original in zip(launcher.tensor_norms(), originals, strict=True):
        exact = oracle.norm([original], 2)
        assert norm == pytest.approx(exact, rel=oracle.NORM_TOLERANCE[original.dtype])
    coefficients = torch.from_numpy(rng.uniform(0.1, 0.9, len(tensors))).to(leg.device)
    launcher.apply(coefficients, stride=1)
    for tensor, original, coefficient in zip(tensors, originals, coefficients.tolist(), strict=True):
        oracle.assert_close(tensor, scaled(original, coefficient), product_tolerance(leg, tensor.dtype))
        assert_untouched_around(tensor, original)
    for tensor, original in zip(tensors, originals, strict=True):
        tensor.copy_(original)
    launcher.clamp(-0.5, 0.25)
    for tensor, original in zip(tensors, originals, strict=True):
        oracle.assert_same_bits(tensor, original.clamp(-0.5, 0.25))
        assert_untouched_around(tensor, original)


def test_whole_range_of_fp32(leg: Leg, rng: np.random.Generator) -> None:
    """Every decade from the smallest subnormal to the largest value, alone and in pairs, within 1e-6."""
    decades = [float(f"1e{exponent}") for exponent in range(-45, 39)]
    signs = rng.choice([-1.0, 1.0], 33)
    values = [rng.uniform(1, 3, 33) * signs * decade for decade in decades]
    mixtures = [np.concatenate([values[i], values[j]]) for i, j in itertools.combinations(range(0, len(values), 7), 2)]
    tensors = [
        embedded(torch.from_numpy(x).float().to(leg.device), offset=1, device=leg.device) for x in [*values, *mixtures]
    ]
    launcher = Launcher(tensors, norm_dtype=torch.float64)
    launcher.reduce()
    for norm, tensor in zip(launcher.tensor_norms(), tensors, strict=True):
        assert norm == pytest.approx(oracle.norm([tensor], 2), rel=1e-6, abs=0)
    assert launcher.norm.item() == pytest.approx(oracle.norm(tensors, 2), rel=1e-6)
    assert launcher.norm.item() > torch.finfo(torch.float32).max


def test_many_values_at_the_edge_of_the_range(leg: Leg) -> None:
    """A sum that is neither 0 nor infinite may still have lost a part of its terms: values near 3e-23 and 1e19."""
    values = (1e-45, 1e-40, 3e-23, 1e-22, 2e-21, 1e-20, 1e17, 1e18, 1e19, 3.4e38)
    tensors = [embedded(torch.full((9000,), value, dtype=torch.float32), device=leg.device) for value in values]
    launcher = Launcher(tensors, norm_dtype=torch.float64)
    launcher.reduce()
    for norm, tensor in zip(launcher.tensor_norms(), tensors, strict=True):
        assert norm == pytest.approx(oracle.norm([tensor], 2), rel=1e-6, abs=0)


def test_whole_range_of_fp64(leg: Leg, rng: np.random.Generator) -> None:
    decades = (5e-324, 1e-310, 1e-300, 1e-160, 1e-150, 1.0, 1e150, 1e160, 1e300, 1e305)
    tensors = [
        embedded(torch.from_numpy(rng.uniform(1, 3, 21)) * decade, offset=1, device=leg.device) for decade in decades
    ]
    launcher = Launcher(tensors, norm_dtype=torch.float64)
    launcher.reduce()
    for norm, tensor in zip(launcher.tensor_norms(), tensors, strict=True):
        assert norm == pytest.approx(oracle.norm([tensor], 2), rel=1e-12, abs=0)
    assert launcher.norm.item() == pytest.approx(oracle.norm(tensors, 2), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_the_smallest_and_largest_values(leg: Leg, dtype: torch.dtype) -> None:
    numbers = torch.finfo(dtype)
    smallest = numbers.smallest_normal * numbers.eps
    values = [numbers.smallest_normal, numbers.max]
    if not leg.truncates_bfloat16 or dtype != torch.bfloat16:  # the interpreter reads bfloat16's subnormals as 0
        values.append(smallest)
    for value in values:
        tensors = [torch.full((3,), value, dtype=dtype, device=leg.device)]
        launcher = Launcher(tensors, norm_dtype=torch.float64)
        launcher.reduce()
        exact = math.sqrt(3) * value
        assert launcher.norm.item() == pytest.approx(exact, rel=1e-6, abs=0)


@pytest.mark.parametrize("p", KINDS)
def test_nan_and_infinity(leg: Leg, p: float) -> None:
    """One tensor for each pair of special values; each is once in the body, once in the head and once in the tail."""
    tensors = [
        embedded(torch.tensor(pair, dtype=dtype), offset=i % 4, device=leg.device)
        for dtype in DTYPES
        for i, pair in enumerate(itertools.combinations(SPECIAL, 2))
    ]
    tensors += [
        torch.ones(40, device=leg.device).index_fill_(0, torch.tensor([at], device=leg.device), math.nan)
        for at in (0, 39)
    ]
    launcher = Launcher(tensors)
    launcher.reduce(p)
    assert launcher.partials.numel() == len(tensors)
    if p == 0:
        assert launcher.norm.item() == len([tensor for tensor in tensors if tensor.any()])
        return
    norms = launcher.partials[launcher.slices[:, 0]].tolist()
    for norm, tensor in zip(norms, tensors, strict=True):
        assert norm == pytest.approx(oracle.norm([tensor], p), rel=1e-6, nan_ok=True), tensor
    assert math.isnan(launcher.state[0].item()) == math.isnan(oracle.norm(tensors, p))


RULES = [
    # max_norm, coefficient for a norm of 5
    (2.5, 2.5 / (5 + 1e-6)),
    (5.0, 5 / (5 + 1e-6)),
    (5.1, 1.0),
    (INF, 1.0),
    (0.0, 0.0),
    (-1.0, -1 / (5 + 1e-6)),
    (-INF, -INF),
    (math.nan, math.nan),
]


@pytest.mark.parametrize(("max_norm", "coefficient"), RULES)
def test_rule(leg: Leg, max_norm: float, coefficient: float) -> None:
    launcher = Launcher([torch.tensor([3.0, -4.0], device=leg.device)])
    launcher.reduce(max_norm=max_norm)
    assert launcher.state.tolist() == pytest.approx([5.0, coefficient], rel=1e-15, nan_ok=True)
    assert launcher.norm.item() == 5


COEFFICIENTS = (1.0, 0.0, -1.0, 0.3, 1e-30, 2.0**-126, 1e-41, -1e-44, 1e-50, INF, math.nan, 1 - 2.0**-24, 1 - 2.0**-25)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling(leg: Leg, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """Coefficients below fp32's normal numbers scale very large values, and no bits of the coefficient are lost."""
    large = torch.finfo(dtype).max if dtype in (torch.float32, torch.bfloat16) else 1.0
    original = embedded(
        random_values(rng, (37,), torch.float64).clamp(-1, 1).mul(large).to(dtype), offset=1, device=leg.device
    )
    tensors = [twin(original) for _ in COEFFICIENTS]
    launcher = Launcher(tensors)
    launcher.apply(torch.tensor(COEFFICIENTS, dtype=torch.float64, device=leg.device), stride=1)
    for tensor, coefficient in zip(tensors, COEFFICIENTS, strict=True):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        if torch.tensor(coefficient, dtype=wide) == 1:
            oracle.assert_same_bits(tensor, original)
            continue
        with np.errstate(invalid="ignore"):
            expected = scaled(original, coefficient)
        oracle.assert_close(tensor, expected, product_tolerance(leg, dtype))


@pytest.mark.parametrize("special", [INF, -INF, math.nan, -0.0])
def test_special_values_are_scaled_as_torch_does(leg: Leg, special: float) -> None:
    for dtype in DTYPES:
        original = torch.tensor([special, 2.0, -0.0, 0.0], dtype=dtype, device=leg.device)
        for coefficient in (0.0, 0.5, -1.0, math.nan, INF):
            tensor = original.clone()
            Launcher([tensor]).apply(torch.tensor([coefficient], dtype=torch.float64, device=leg.device), stride=0)
            expected = oracle.as_numpy(original * coefficient)
            np.testing.assert_array_equal(oracle.as_numpy(tensor), expected)
            numbers = ~np.isnan(expected)
            np.testing.assert_array_equal(np.signbit(oracle.as_numpy(tensor))[numbers], np.signbit(expected)[numbers])


BOUNDS = [
    (-1.0, 1.0),
    (-0.1, 0.3),
    (0.0, 0.0),
    (2.0, -2.0),
    (-INF, INF),
    (-INF, 0.5),
    (math.nan, 1.0),
    (-1.0, math.nan),
]


@pytest.mark.parametrize(("minimum", "maximum"), BOUNDS)
def test_clamping(leg: Leg, minimum: float, maximum: float, rng: np.random.Generator) -> None:
    values = torch.cat([random_values(rng, (50,), torch.float64), torch.tensor(SPECIAL, dtype=torch.float64)])
    # A bound is rounded to the tensor's type; the interpreter does that wrong for bfloat16.
    dtypes = [dtype for dtype in DTYPES if not (leg.truncates_bfloat16 and dtype == torch.bfloat16)]
    tensors = [embedded(values.to(dtype), offset=3, device=leg.device) for dtype in dtypes]
    originals = [twin(tensor) for tensor in tensors]
    Launcher(tensors).clamp(minimum, maximum)
    for tensor, original in zip(tensors, originals, strict=True):
        bounds = torch.tensor([minimum, maximum], dtype=torch.float64, device=leg.device).to(tensor.dtype)
        expected = original.clamp(*bounds)
        np.testing.assert_array_equal(oracle.as_numpy(tensor), oracle.as_numpy(expected))
        assert_untouched_around(tensor, original)


PAIRS = [(-0.5, 0.25), (-INF, 0.5), (-0.25, INF), (-INF, INF), (0.0, 0.0), (0.25, 1.0), (-2.0, -1.0)]
"""Bounds that every dtype represents exactly."""


@pytest.mark.parametrize("programs", [1, 3, 40])
def test_clamping_to_bounds_of_each_tensor(leg: Leg, programs: int, rng: np.random.Generator) -> None:
    """The common bounds are ignored; each tensor's own bounds apply in all of its chunks."""
    originals = [
        embedded(random_values(rng, (size,), dtype), offset=offset % 4, device=leg.device)
        for offset, dtype in enumerate(DTYPES * 2)
        for size in (1, 9, 75, chunk_elements(dtype) + 33)[: 4 if offset % 4 == 3 else 3]
    ]
    for original in originals:
        original[:7] = torch.tensor(SPECIAL, dtype=original.dtype)[: len(original)]
    pairs = [PAIRS[i % len(PAIRS)] for i in range(len(originals))]
    bounds = torch.tensor(pairs, dtype=torch.float64, device=leg.device)
    for watch in (False, True):
        tensors = [twin(original) for original in originals]
        flags = Launcher(tensors, programs).clamp(9.0, -9.0, bounds, watch=watch)
        for tensor, original, (low, high) in zip(tensors, originals, pairs, strict=True):
            np.testing.assert_array_equal(oracle.as_numpy(tensor), oracle.as_numpy(original.clamp(low, high)))
            assert_untouched_around(tensor, original)
        assert flags is None or set(flags) <= {0, 1}
    again = Launcher(tensors, programs).clamp(9.0, -9.0, bounds, watch=True)
    assert again == [0] * programs  # no value is outside any more


@pytest.mark.parametrize("shared", [True, False])
def test_flags_tell_whose_chunk_was_clamped(leg: Leg, shared: bool) -> None:
    """One element outside sets the flag of the program that has its chunk, and no other flag; NaN sets none."""
    programs = 5
    dtypes = DTYPES if leg.name != "interpreter" else DTYPES[2:]  # the interpreter is slow
    tensors = [
        embedded(torch.full((size,), 0.75, dtype=dtype), offset=1, device=leg.device)
        for dtype in dtypes
        for size in (1, 40, chunk_elements(dtype) + 40)
    ]
    tensors[1][3] = tensors[4][-5] = math.nan
    launcher = Launcher(tensors, programs)
    pairs = [(0.5, 1.0)] * len(tensors)  # masked lanes have 0, which is outside these bounds
    bounds = None if shared else torch.tensor(pairs, dtype=torch.float64, device=leg.device)
    assert launcher.clamp(0.5, 1.0, bounds, watch=True) == [0] * programs
    for i, tensor in enumerate(tensors):
        first, count = launcher.slices[i].tolist()
        begin = launcher.ends[2 * DTYPES.index(tensor.dtype)]
        if first >= begin:  # a small tensor belongs to the program of its group
            first = begin + (first - begin) // 8
        # Head, body and tail belong to the first chunk, and elements next to the tail to the last.
        places = [(0, 0), (-1, 0)] if len(tensor) < 50 else [(0, 0), (100, 0), (-1, 0), (-20, count - 1)]
        for position, chunk in places:
            kept = tensor[position].item()
            for value in (0.25, -INF, 1.5)[: 3 if leg.name != "interpreter" else 1]:
                tensor[position] = value
                expected = [int(program == (first + chunk) % programs) for program in range(programs)]
                assert launcher.clamp(0.5, 1.0, bounds, watch=True) == expected, (i, position, value)
                assert tensor[position].item() == min(max(value, 0.5), 1.0)
            tensor[position] = kept


def test_layout() -> None:
    from fastclip.kernels import table

    vector = table.CHUNK_BYTES // 4
    numels = np.array([1, 2 * vector + 1, 5, 2 * vector, 64])
    layout = table.lay_out(numels, np.array([3, 0, 1, 2, 0]))
    # fp32: tensor 1 in three chunks, then tensor 4, a small one; bf16: tensor 2; fp16: tensor 3 in one; fp64: tensor 0
    assert [(entry >> 32, entry & 0xFFFFFFFF) for entry in layout.chunks.tolist()] == [
        (1, 0),
        (1, 1),
        (1, 2),
        (4, 0),
        (2, 0),
        (3, 0),
        (0, 0),
    ]
    assert layout.ends == (3, 4, 4, 5, 6, 6, 6, 7)
    assert layout.slices.tolist() == [[6, 1], [0, 3], [4, 1], [5, 1], [3, 1]]


MODELS = {
    "one tensor that dwarfs a thousand others": [1000] * 500 + [2**31] + [1000] * 500,
    "weights of one chunk and biases in turns": [65_536, 256] * 2000,
    "a weight of two chunks and three vectors": [131_072, 256, 256, 256] * 2000,
    "weights that end in a short chunk": [65_536 + 999, 999] * 2000,
}


@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("processors", [108, 132, 148, 304])
def test_the_load_is_balanced(sizes: list[int], processors: int) -> None:
    """With n programs, program i takes the chunks whose index modulo n is i (see the test of flags)."""
    from fastclip.backends.triton import prime_below
    from fastclip.kernels import table

    programs = prime_below(4 * processors)
    numels = np.array(sizes)
    layout = table.lay_out(numels, np.ones(len(sizes), dtype=np.int64))
    left = numels[layout.chunks >> 32] * 2 - (layout.chunks & 0xFFFFFFFF) * table.CHUNK_BYTES
    load = np.bincount(np.arange(len(layout.chunks)) % programs, weights=np.minimum(left, table.CHUNK_BYTES))
    assert load.sum() == sum(sizes) * 2
    assert load.max() - load.min() <= 2 * table.CHUNK_BYTES
    # The load of each processor, if programs are dealt out to them in turn.
    total = np.bincount(np.arange(programs) % processors, weights=load)
    assert total.max() < total.mean() + 4 * table.CHUNK_BYTES


def test_prime_below() -> None:
    from fastclip.backends.triton import prime_below

    assert [prime_below(n) for n in (2, 3, 4, 25, 432, 528, 592, 1216)] == [2, 3, 3, 23, 431, 523, 587, 1213]


# ---- Units, and adaptive thresholds


def clip_units(grads: Sequence[Tensor], weights: Sequence[Tensor], ratios: Tensor, programs: int) -> list[int]:
    """Clip the rows of gradients by those of their weights; return each program's flag."""
    from fastclip.kernels import table
    from fastclip.kernels.units import clip_units_kernel

    device = grads[0].device
    counts = np.array([len(grad) for grad in grads])
    units, ends = table.lay_out_units(counts, np.array([DTYPES.index(grad.dtype) for grad in grads]))
    rows, of_weights = (
        torch.tensor([[tensor.data_ptr(), tensor.numel()] for tensor in tensors], device=device)
        for tensors in (grads, weights)
    )
    flags = torch.full((programs,), POISON, dtype=torch.int32, device=device)
    numbers = torch.from_numpy(units).to(device), rows, of_weights, torch.from_numpy(counts).to(device), ratios
    arguments = (*addresses(*numbers, flags), *ends, 1e-3)
    clip_units_kernel[(programs,)](*arguments, **table.LAUNCH_OPTIONS)
    values: list[int] = flags.tolist()
    return values


def test_units_by_any_number_of_programs(leg: Leg, rng: np.random.Generator) -> None:
    """Units of a few elements and of more than a tile, at any address; the bits do not depend on the programs."""
    shapes = [(3, 5), (2, 700), (6, 1), (1, 2 * tile_elements(torch.float64) + 3)]
    originals, weights = (
        [
            embedded(random_values(rng, shape, dtype) * 2.0 ** rng.integers(-2, 3), offset, device=leg.device)
            for offset, dtype in enumerate(DTYPES)
            for shape in shapes
        ]
        for _ in range(2)
    )
    ratios = torch.from_numpy(rng.choice([0.1, 1.0, 1e6], len(originals))).to(leg.device)
    seen = []
    for programs in (1, 5):
        tensors = [twin(tensor) for tensor in originals]
        flags = clip_units(tensors, weights, ratios, programs)
        assert set(flags) <= {0, 1}
        assert sum(flags) > 0
        seen.append(tensors)
    for others in seen[1:]:
        for mine, first in zip(others, seen[0], strict=True):
            oracle.assert_same_bits(mine, first)
    for tensor, original, weight, ratio in zip(seen[0], originals, weights, ratios.tolist(), strict=True):
        g, w = oracle.as_numpy(original), oracle.as_numpy(weight)
        norms, limits = np.linalg.norm(g, axis=1), ratio * np.maximum(np.linalg.norm(w, axis=1), 1e-3)
        expected = g * np.where(norms > limits, limits / np.maximum(norms, 1e-6), 1.0)[:, None]
        oracle.assert_close(tensor, expected, product_tolerance(leg, tensor.dtype) + 2.0**-18, leg)
        assert_untouched_around(tensor, original)
    assert clip_units([twin(tensor) for tensor in originals], weights, ratios * 1e9, 3) == [0, 0, 0]


SETTINGS = {
    "quantile": (37.0, 0.3, 1.5, 20.0, 2.0, 1.0, 1.0, 0.0),
    "z_score": (0.9, 1.5, 4.0, 20.0, 0.0, 1.0, 0.0, 3.0),
    "ema": (1.05, 0.9, 3.0, 2.0, 0.0, 0.0, 0.0, 0.0),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_thresholds_by_any_number_of_programs(leg: Leg, kind: str, rng: np.random.Generator) -> None:
    """As many groups as several programs take, with results that were NaN; as torch's operations compute them."""
    from fastclip.backends.interface import Adaptation
    from fastclip.backends.thresholds import adapt
    from fastclip.kernels import table
    from fastclip.kernels.adapt import NUMBERS, adapt_kernel

    numbers = SETTINGS[kind]
    settings = Adaptation(kind, numbers[: {"quantile": 7, "z_score": 8, "ema": 5}[kind]])
    assert len(numbers) == len(NUMBERS)
    groups = 7 if kind == "quantile" else 600
    first = {"quantile": [0.0, *[INF] * 75], "z_score": [0.0] * 4, "ema": [0.0, INF]}[kind]
    states = [torch.tensor([first] * groups, dtype=torch.float64, device=leg.device) for _ in range(3)]
    expected_state = states[0].clone()
    for step in range(12 if leg.name == "gpu" else 6):
        values = rng.lognormal(0.0, 1.0, groups)
        values[rng.random(groups) < 0.1] = rng.choice([0.0, math.nan, INF])
        norms = torch.from_numpy(values).to(leg.device)
        total = torch.tensor(INF if step == 2 else 3.0, dtype=torch.float64, device=leg.device)
        expected = torch.stack(adapt(settings, expected_state, norms, total))
        for state, programs in zip(states, (1, 2, 5), strict=True):
            results = torch.full((2, groups), math.nan, dtype=torch.float64, device=leg.device)
            memory = addresses(state, norms, total, results)
            options = table.LAUNCH_OPTIONS | {"KIND": kind, "LANES": 512}
            adapt_kernel[(programs,)](*memory, groups, len(first), *numbers, **options)
            torch.testing.assert_close(results, expected, rtol=1e-12, atol=0.0, equal_nan=True)
            torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-300, equal_nan=True)
