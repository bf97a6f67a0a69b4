"""Triton kernels similar to the package's, compiled for NVIDIA GPUs and executed by ptxlab."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ptxlab
import pytest
import torch
from torch._subclasses import FakeTensorMode

triton: Any = pytest.importorskip("triton")
tl: Any = pytest.importorskip("triton.language")

CAPABILITIES = (80, 90, 100)
TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float64: tl.float64}
SCALE_UP = tl.constexpr(2.0**100)
SCALE_DOWN = tl.constexpr(2.0**-80)
BLOCK = 1024


@pytest.fixture(autouse=True)
def _without_gpu() -> Iterator[None]:
    ptxlab.activate(90)
    yield
    ptxlab.deactivate()


@triton.jit
def sum_of_squares(rows, chunks, partials, total, ticket, count, ELEMENT: tl.constexpr, BLOCK: tl.constexpr):
    """Sum chunks of many tensors; a chunk whose fp32 sum is out of range is summed again, scaled.

    `rows` has an address and a size for each tensor, `chunks` a tensor and one of its chunks for each step of the grid.
    """
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    step = program
    while step < count:
        chunk = tl.load(chunks + step)
        row = rows + 2 * (chunk >> 32)
        start = (chunk & 0xFFFFFFFF) * BLOCK
        values = tl.load(row).to(tl.pointer_type(ELEMENT)) + start
        mask = lanes < tl.load(row + 1) - start
        scale = tl.full([], 1.0, tl.float32)
        partial = tl.full([], 0.0, tl.float32)
        tries = 0
        while tries < 2:
            x = tl.load(values + lanes, mask=mask, other=0.0).to(tl.float32) * scale
            partial = tl.sum(x * x)
            largest = tl.max(tl.abs(x))
            fits = ((partial > 1e-30) & (partial < float("inf"))) | (largest == 0)
            tries = tl.where(fits, 2, tries + 1)
            if tries < 2:
                scale = tl.where(partial == float("inf"), SCALE_DOWN, SCALE_UP).to(tl.float32)
        tl.store(partials + step, partial.to(tl.float64) / (scale.to(tl.float64) * scale.to(tl.float64)))
        step += tl.num_programs(0)
    if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        result = tl.zeros([BLOCK], tl.float64)
        first = 0
        while first < count:
            result += tl.load(partials + first + lanes, mask=first + lanes < count, other=0.0)
            first += BLOCK
        tl.store(total, tl.sum(result))
        tl.store(ticket, 0)


@triton.jit
def clamp(x, bound, size, BLOCK: tl.constexpr):
    """Clamp values; write a vector only if one of its values changes."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + offsets, mask=offsets < size, other=0.0)
    wide = values.to(tl.float32)
    bounded = tl.clamp(wide, -bound, bound, propagate_nan=tl.PropagateNan.ALL)
    tl.store(x + offsets, bounded.to(values.dtype), mask=(offsets < size) & (bounded != wide))


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest(x, out, size, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    values = tl.abs(tl.load(x + offsets, mask=offsets < size, other=0.0))
    tl.store(out, tl.reduce(values.to(out.dtype.element_ty), 0, larger))


@triton.jit
def powers(x, roots, logs, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + offsets, mask=offsets < size, other=1.0)
    tl.store(roots + offsets, tl.exp2(values), mask=offsets < size)
    tl.store(logs + offsets, tl.log2(tl.abs(values)), mask=offsets < size)


@triton.jit
def sum_of_powers(x, out, power, BLOCK: tl.constexpr):
    values = tl.abs(tl.load(x + tl.arange(0, BLOCK)))
    tl.store(out, tl.sum(tl.exp2(tl.log2(values) * power)))


@triton.jit
def copy(source, target, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + offsets, mask=offsets < size)
    tl.store(target + offsets, values.to(target.dtype.element_ty), mask=offsets < size)


@triton.jit
def copy_aligned(address, target, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    source = tl.multiple_of(tl.load(address).to(tl.pointer_type(tl.float32)), 16)
    tl.store(target + offsets, tl.load(source + offsets))


def _norm(tensors: list[torch.Tensor], programs: int) -> float:
    """The norm of all tensors, computed by the kernel."""
    rows = torch.tensor([(t.data_ptr(), t.numel()) for t in tensors], dtype=torch.int64)
    steps = [(number << 32) + i for number, t in enumerate(tensors) for i in range(-(-t.numel() // BLOCK))]
    chunks = torch.tensor(steps, dtype=torch.int64)
    partials = torch.full((len(steps),), math.nan, dtype=torch.float64)
    total, ticket = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
    arguments = (rows, chunks, partials, total, ticket, len(steps))
    with ptxlab.recording() as launched:
        sum_of_squares[(programs,)](*arguments, ELEMENT=TYPES[tensors[0].dtype], BLOCK=BLOCK)
    assert launched == [("sum_of_squares", (programs, 1, 1))]
    assert ticket.item() == 0
    return math.sqrt(total.item())


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [(90, torch.float32), (90, torch.float16), (90, torch.bfloat16), (80, torch.bfloat16), (100, torch.bfloat16)],
)
def test_norm(capability: int, dtype: torch.dtype) -> None:
    ptxlab.activate(capability)
    torch.manual_seed(0)
    tensors = [torch.randn(size).to(dtype) for size in (1, 7, 1024, 5000)]
    expected = math.sqrt(sum(t.double().square().sum().item() for t in tensors))
    results = {_norm(tensors, programs) for programs in (1, 3, 8)}
    assert len(results) == 1  # to the bit, on any number of programs
    assert results.pop() == pytest.approx(expected, rel=1e-6)


def test_norm_beyond_the_range_of_squares() -> None:
    for value in (1e30, 1e-30):
        assert _norm([torch.full((3000,), value)], 2) == pytest.approx(value * math.sqrt(3000), rel=1e-6)
    assert math.isnan(_norm([torch.full((5,), math.nan)], 1))
    assert _norm([torch.zeros(2000)], 1) == 0


@pytest.mark.parametrize("dtype", TYPES)
def test_clamp_bounds_values_and_keeps_nan(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(3000)).to(dtype)
    x[:5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1.0])
    expected = x.clamp(-1, 1)
    with ptxlab.recording():
        clamp[(3,)](x, 1.0, x.numel(), BLOCK=BLOCK)
    if dtype is torch.float64:  # the kernel computes in fp32
        expected = torch.where(x == x.clamp(-1, 1), x, expected.float().double())
    assert torch.equal(x.nan_to_num(9), expected.nan_to_num(9))
    assert torch.signbit(x[3])


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_largest_value_propagates_nan(capability: int, dtype: torch.dtype) -> None:
    """On sm_100 the reduction is `redux.sync.max.NaN.f32`; on older GPUs it is shuffles."""
    ptxlab.activate(capability)
    torch.manual_seed(0)
    x, out = torch.randn(1000).to(dtype), torch.zeros(1, dtype=torch.float32)
    x[700] = -9.0
    with ptxlab.recording():
        largest[(1,)](x, out, x.numel(), BLOCK=BLOCK)
    assert out.item() == 9
    x[500] = math.nan
    with ptxlab.recording():
        largest[(1,)](x, out, x.numel(), BLOCK=BLOCK)
    assert out.isnan()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-7), (torch.float64, 3e-16)])
def test_exponentials_and_logarithms(dtype: torch.dtype, tolerance: float) -> None:
    """In fp64 they are libdevice's code: polynomials, and operations on the bits of exponents."""
    torch.manual_seed(0)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 100.25, -100.25, math.inf, -math.inf, math.nan, 2.0**-126])
    x = torch.cat([special.to(dtype), 20 * torch.randn(500, dtype=dtype)])
    if dtype is torch.float64:
        x = torch.cat([x, torch.tensor([1023.5, -1022.5, -1060.0, -1080.0, 1e-310, 1.7e308], dtype=dtype)])
    roots, logs = torch.zeros_like(x), torch.zeros_like(x)
    with ptxlab.recording():
        powers[(2,)](x, roots, logs, x.numel(), BLOCK=BLOCK)
    torch.testing.assert_close(roots, torch.exp2(x), rtol=tolerance, atol=5e-324, equal_nan=True)
    torch.testing.assert_close(logs, torch.log2(x.abs()), rtol=tolerance, atol=tolerance, equal_nan=True)


def test_slow_paths_of_few_lanes_before_a_reduction() -> None:
    """Zeros, subnormals and large values take libdevice's slow paths, and the later shuffles need every lane."""
    torch.manual_seed(0)
    x, out = torch.randn(256, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    x[::7] = torch.tensor([0.0, 1e-310, 1e100, -1e-200], dtype=torch.float64).repeat(10)[:37]
    with ptxlab.recording():
        sum_of_powers[(1,)](x, out, 2.5, BLOCK=256)
    assert out.item() == pytest.approx(x.abs().pow(2.5).sum().item(), rel=1e-12)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float16),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float64),
    ],
)
def test_conversions(capability: int, source: torch.dtype, target: torch.dtype) -> None:
    ptxlab.activate(capability)
    torch.manual_seed(0)
    x = (torch.randn(3000) * 2.0 ** torch.randint(-30, 30, (3000,))).to(source)
    x[:4] = torch.tensor([math.inf, -math.inf, math.nan, -0.0])
    out = torch.zeros(3000, dtype=target)
    with ptxlab.recording():
        copy[(3,)](x, out, x.numel(), BLOCK=BLOCK)
    torch.testing.assert_close(out, x.to(target), rtol=0, atol=0, equal_nan=True)


def test_each_capability_gets_its_own_kernel() -> None:
    x, out = torch.ones(8), torch.zeros(8)
    targets = []
    for capability in (80, 90, 80):
        ptxlab.activate(capability)
        targets.append(copy[(1,)](x, out, 8, BLOCK=16).metadata.target.arch)
    assert targets == [80, 90, 80]


def test_access_outside_live_tensors_is_reported() -> None:
    x, out = torch.ones(100), torch.zeros(100)
    with (
        pytest.raises(ptxlab.PtxError, match=r"out-of-bounds global load .*test_ptxlab_triton\.py"),
        ptxlab.recording(),
    ):
        copy[(1,)](x, out, 1000, BLOCK=BLOCK)
    with ptxlab.recording():  # and the next launch is right
        copy[(1,)](x, out, 100, BLOCK=BLOCK)
    assert torch.equal(out, x)


def test_fault_outside_recording_raises_at_the_launch_and_waits_for_check() -> None:
    x, out = torch.ones(100), torch.zeros(100)
    with pytest.raises(RuntimeError, match="out-of-bounds"):
        copy[(1,)](x, out, 1000, BLOCK=BLOCK)
    with pytest.raises(ptxlab.PtxError, match="out-of-bounds"):
        ptxlab.check()
    ptxlab.check()


def test_looking_for_live_tensors_disturbs_no_other_thread() -> None:
    """While another thread makes a tuple from an iterator, that tuple must have no second reference."""
    ptxlab.activate(90)
    done = threading.Event()
    others = [[i] for i in range(100_000)]  # so the search takes longer than a thread's time slice

    def make() -> int:
        made = 0
        while not done.is_set():
            made += len(tuple(i for i in range(30)))
        return made

    x = torch.randn(64)
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(make)
        try:
            for _ in range(40):
                y = torch.full_like(x, torch.nan)
                copy[(1,)](x, y, 64, BLOCK=64)
                assert torch.equal(y, x)
        finally:
            done.set()
        assert making.result() > 0
    assert len(others) == 100_000


def test_fake_tensors_are_not_looked_for() -> None:
    """They have no memory. To ask for it causes a warning, which is an error here."""
    with FakeTensorMode():
        fakes = [torch.ones(64), torch.nn.Parameter(torch.ones(64))]
    x = torch.randn(64)
    y = torch.full_like(x, torch.nan)
    copy[(1,)](x, y, 64, BLOCK=64)
    assert torch.equal(y, x)
    assert all(fake.shape == (64,) for fake in fakes)


def test_bounds_can_be_listed_and_extended() -> None:
    x, out = torch.ones(16), torch.zeros(16)
    ptxlab.activate(90, bounds=[(x.data_ptr(), 64)])
    with pytest.raises(ptxlab.PtxError, match="out-of-bounds global store"), ptxlab.recording():
        copy[(1,)](x, out, 16, BLOCK=16)
    ptxlab.allow(out)
    with ptxlab.recording():
        copy[(1,)](x, out, 16, BLOCK=16)
    assert torch.equal(out, x)


def test_wide_access_through_an_untrue_hint_is_reported() -> None:
    memory, out = torch.ones(2049), torch.zeros(1024)
    with ptxlab.recording():
        copy_aligned[(1,)](torch.tensor([memory.data_ptr()]), out, BLOCK=BLOCK)
    assert out.all()
    with pytest.raises(ptxlab.PtxError, match="misaligned"), ptxlab.recording():
        copy_aligned[(1,)](torch.tensor([memory.data_ptr() + 4]), out, BLOCK=BLOCK)


def test_launches_are_counted_without_execution() -> None:
    ptxlab.activate(90, execute=False)
    x, out = torch.ones(16), torch.zeros(16)
    before = ptxlab.launches()
    for _ in range(3):
        copy[(1,)](x, out, 16, BLOCK=16)
    assert ptxlab.launches() == before + 3
    assert not out.any()


def test_unknown_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="live"):
        ptxlab.activate(90, bounds="all")
