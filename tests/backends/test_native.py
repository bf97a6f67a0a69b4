"""What only the native kernels have: exact bits, their table, what they do with Python's objects. See also drive.c."""

from __future__ import annotations

import math
import re
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import paths
import pytest
import torch
from gradients import embedded, parameters, random_values
from torch import Tensor, nn

import fastclip
from fastclip.backends import native as backend
from fastclip.core import cache, prepare
from fastclip.core.gradients import PLAIN_TYPES
from fastclip.foundation import tracing

native: Any = pytest.importorskip("fastclip.kernels.native", reason="they were not built: no C compiler")

NAN, INF = math.nan, math.inf
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LONG_NAN = struct.unpack("<d", b"\xff" * 7 + b"\x7f")[0]  # one more unit would make it a zero
COEFFICIENTS = (0.5, 0.3, -1.7, 1 + 2**-20, 3e-5, 1e-30, 2.0**-127, 1.7e-45, 0.0, -0.0, INF, NAN, 1e30, LONG_NAN)


@pytest.fixture(autouse=True)
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_BACKEND", "native")


@pytest.fixture(params=native.levels())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this processor."""
    native.use_level(request.param)
    yield request.param
    native.use_level(native.levels()[0])


def patterns(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit type, or a wide choice of values of another type, with subnormal and special ones."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    info = torch.finfo(dtype)
    rng = np.random.default_rng(5)
    exponents = rng.integers(
        math.floor(math.log2(info.smallest_normal)) - 20, 127 if dtype == torch.float32 else 1023, 5000
    )
    values = torch.from_numpy(np.ldexp(rng.uniform(-1, 1, 5000), exponents)).to(dtype)
    return torch.cat([values, torch.tensor([0.0, -0.0, INF, -INF, NAN, info.max, -info.max, info.tiny], dtype=dtype)])


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which products are computed for a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def assert_same(result: Tensor, expected: Tensor) -> None:
    """The same bits, except for those of a NaN."""
    is_nan = expected.isnan()
    assert torch.equal(result.isnan(), is_nan)
    oracle.assert_same_bits(result[~is_nan], expected[~is_nan])


# ---- Bits


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("coefficient", COEFFICIENTS)
def test_a_product_is_rounded_once(dtype: torch.dtype, coefficient: float) -> None:
    original = patterns(dtype)
    tensor = embedded(original)
    backend.plan([tensor]).scale_(coefficient)
    small = 2.0**-900 if dtype == torch.float64 else 2.0**-100
    power = small if abs(coefficient) < small else 1.0  # 1e-45, for example, has only one bit in fp32
    factor = torch.tensor(coefficient / power, dtype=wide(dtype))
    assert_same(tensor, (original.to(wide(dtype)) * factor * power).to(dtype))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("low", "high"),
    [
        (-1.0, 2.0),
        (-0.0, 0.0),
        (0.0, INF),
        (-INF, -1e-7),
        (-INF, INF),
        (2.0, -1.0),
        (-1e-40, 1e-40),
        (NAN, 1.0),
        (-1, NAN),
    ],
)
def test_a_clamp_is_torch_s(dtype: torch.dtype, low: float, high: float) -> None:
    original = patterns(dtype)
    tensor = embedded(original)
    flag = backend.plan([tensor]).clamp_(float(low), float(high), watch=True)
    bounds = torch.tensor([low, high], dtype=dtype)
    expected = torch.minimum(torch.maximum(original, bounds[0]), bounds[1])
    np.testing.assert_array_equal(oracle.as_numpy(tensor), oracle.as_numpy(expected))
    unchanged = (original >= bounds[0]) & (original <= bounds[1])
    oracle.assert_same_bits(tensor[unchanged], original[unchanged])
    if not bounds.isnan().any():
        assert flag is not None
        assert flag.item() == bool(((original < bounds[0]) | (original > bounds[1])).any())
        oracle.assert_same_bits(tensor[original.isnan()], original[original.isnan()])


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, INF, -INF, 0.5, 4.0, 20.0, -1.0])
def test_norms_over_every_decade(dtype: torch.dtype, p: float, rng: np.random.Generator) -> None:
    """One decade alone, where powers may leave the range of fp32 or fp64, and two neighbouring decades."""
    info = torch.finfo(dtype)
    decades = range(
        math.ceil(math.log10(info.tiny * info.eps)), math.floor(math.log10(info.max)), 7 if p in {2, 1} else 31
    )
    for decade in decades:
        for sizes in ((1,), (67,), (2048, 33)):
            tensors = [
                embedded(
                    torch.from_numpy(rng.uniform(1, 9, size) * 10.0 ** min(max(decade - 6 * i, -320), 300)).to(dtype),
                    offset=i,
                )
                for i, size in enumerate(sizes)
            ]
            total = backend.plan(tensors).reduce(p, 1.0, torch.float64).total
            exact = oracle.norm(tensors, p)
            assert total == pytest.approx(exact, rel=oracle.NORM_TOLERANCE[dtype], abs=0), (decade, sizes)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_counts_wherever_it_is(dtype: torch.dtype) -> None:
    for size in (1, 16, 17, 63, 64, 65, 2049, 16_385):
        for position in {0, size // 2, size - 1}:
            for special in (NAN, INF, -INF):
                tensor = torch.ones(size, dtype=dtype)
                tensor[position] = special
                for p in (2.0, 1.0, 3.0, INF, 0.5):
                    total = backend.plan([embedded(tensor)]).reduce(p, 1.0, torch.float64).total
                    assert math.isnan(total) if math.isnan(special) else total == INF
                smallest = backend.plan([tensor]).reduce(-INF, 1.0, torch.float64).total
                assert math.isnan(smallest) if math.isnan(special) else smallest == (1 if size > 1 else INF)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 1.5, 2.5, 7.0, 100.0, -0.01, -0.5, -3.0, NAN])
def test_general_powers(p: float, rng: np.random.Generator) -> None:
    """For fp32 they are computed in vectors of fp64, far more exactly than fp32 needs."""
    x = torch.from_numpy(10.0 ** rng.uniform(-38, 38, 5000)).float()
    x[7] = 0.0 if p > 0 else INF
    far_from_powers_of_two = torch.cat([torch.full((2000,), 1.4144), torch.tensor([2.0, 1.0])])
    others = (far_from_powers_of_two, torch.zeros(3), torch.full((70,), 1e-45), torch.ones(1, dtype=torch.float64))
    for tensor in (x, x[:1], x[3:9], x[:100].clamp(1e-3, 1e3), *others):
        total = backend.plan([embedded(tensor)]).reduce(p, 1.0, torch.float64).total
        exact = oracle.norm([tensor], p)
        # If the sum has an error of 2**-44, the root has an error of 2**-44 / p.
        assert total == pytest.approx(exact, rel=2.0**-43 * max(1, 1 / abs(p)), abs=0, nan_ok=True)


def test_every_instruction_set_has_the_same_bits(rng: np.random.Generator) -> None:
    originals = [random_values(rng, (size,), dtype) for dtype in DTYPES for size in (3, 70, 5000, 40_001)]
    seen: list[list[Tensor]] = []
    for name in native.levels():
        native.use_level(name)
        tensors = [original.clone() for original in originals]
        plan = backend.plan(tensors)
        norms = [torch.tensor(plan.reduce(p, 1.0, torch.float64).total) for p in (2.0, 1.0, 3.0, INF, -INF, 0.0, 0.7)]
        plan.scale_(0.3)
        plan.clamp_(-0.2, 0.1)
        seen.append([*norms, plan.norms(), *tensors])
    native.use_level(native.levels()[0])
    for others in seen[1:]:
        for mine, first in zip(others, seen[0], strict=True):
            oracle.assert_same_bits(mine, first)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e5m2], ids=str
)
def test_the_norm_is_rounded_as_by_torch(dtype: torch.dtype) -> None:
    for value in (1.00390625, 2049.0, 65_520.0, 3.39e38, 1e300, 1e-45):
        norm = fastclip.get_total_norm([torch.tensor([value], dtype=torch.float64)], norm_dtype=dtype)
        clipped = fastclip.clip_grad_norm_(
            parameters([torch.tensor([value], dtype=torch.float64)]), 1.0, norm_dtype=dtype
        )
        expected = torch.tensor(value, dtype=torch.float64).to(dtype)
        oracle.assert_same_bits(
            norm.view(torch.uint8) if dtype.itemsize == 1 else norm,
            expected.view(torch.uint8) if dtype.itemsize == 1 else expected,
        )
        oracle.assert_same_bits(
            clipped.view(torch.uint8) if dtype.itemsize == 1 else clipped,
            expected.view(torch.uint8) if dtype.itemsize == 1 else expected,
        )


# ---- The table


def header(name: str) -> int:
    """A constant of kernels/cpu.h, from the sources in the repository."""
    text = (paths.KERNELS / "cpu.h").read_text()
    constants: dict[str, int] = {}
    for constant, value in re.findall(r"^    (\w+) = ([\w* ]+?),? +/\*", text, re.MULTILINE):
        constants[constant] = eval(value, {}, constants)  # noqa: S307 - our own header
    return constants[name]


@pytest.mark.skipif(not paths.KERNELS.exists(), reason="there are no sources beside the tests here")
def test_python_and_c_cut_alike() -> None:
    assert header("CHUNK") == backend.CHUNK


@pytest.mark.parametrize(
    "counts", [[1], [16_384], [16_385, 1, 40_000], [5] * 300, [200_000, 3, 70_000] * 9, [1_000_003]]
)
def test_every_element_is_in_one_chunk_and_every_chunk_in_one_task(counts: Sequence[int]) -> None:
    types = np.arange(len(counts)) % 4
    table = np.frombuffer(backend.lay_out(np.array(counts), types), np.int64)
    rows, chunks, tasks, elements = table[:4]
    assert (rows, elements) == (len(counts), sum(counts))
    row, rest = np.split(table[4:], [2 * rows])
    chunk, task = np.split(rest, [2 * chunks])
    assert row.reshape(-1, 2).tolist() == [[count, kind] for count, kind in zip(counts, types, strict=True)]
    covered = [(owner, start) for owner, count in enumerate(counts) for start in range(0, count, backend.CHUNK)]
    assert chunk.reshape(-1, 2).tolist() == [list(each) for each in covered]
    assert len(task) == tasks + 1
    assert (task[0], task[-1]) == (0, chunks)
    assert np.all(np.diff(task) > 0)
    sizes = (
        np.minimum(backend.CHUNK, np.array(counts)[chunk[::2]] - chunk[1::2])
        * np.array([4, 2, 2, 8])[types[chunk[::2]]]
    )
    of_tasks = np.add.reduceat(sizes, task[:-1])
    assert of_tasks.max() < backend.TASK + 8 * backend.CHUNK
    assert np.all(of_tasks[:-1] > backend.TASK - 8 * backend.CHUNK)


def test_whether_gradients_are_apart(rng: np.random.Generator) -> None:
    found = set()
    for _ in range(300):
        count = int(rng.integers(1, 150))
        sizes = rng.integers(1, 40, count)
        table = backend.lay_out(sizes, np.zeros(count, np.int64))
        gaps = rng.integers(0, 3, count) if rng.random() < 0.8 else rng.integers(-1, 3, count)
        starts = 4096 + 4 * (np.cumsum(sizes + gaps) - sizes)
        if rng.random() < 0.2:
            starts[rng.integers(count)] = rng.choice([0, 4097])
        order = rng.permutation(count)
        table = backend.lay_out(sizes[order], np.zeros(count, np.int64))
        spans = sorted(zip(starts.tolist(), (starts + 4 * sizes).tolist(), strict=True))
        apart = all(end <= start for (_, end), (start, _) in pairwise(spans))
        right = apart and all(start > 0 and start % 4 == 0 for start, _ in spans)
        assert native.are_apart(table, starts[order].tolist()) is right
        found.add(right)
    assert found == {True, False}


# ---- In Python


def plan_of(size: int) -> tuple[Tensor, Any]:
    tensor = torch.ones(size)
    return tensor, backend.plan([tensor])


def test_the_gil_is_free_while_it_works() -> None:
    _tensor, plan = plan_of(4_000_000)
    stages = {"inside": False, "done": False}
    progress = []

    def work() -> None:
        for _ in range(3):
            stages["inside"] = True
            plan.reduce(0.7, 1.0, torch.float64)  # powers are slow
            stages["inside"] = False
        stages["done"] = True

    thread = threading.Thread(target=work)
    thread.start()
    while not stages["done"]:
        time.sleep(1e-3)  # if this thread got the GIL only between calls, it would never see "inside"
        progress.append(stages["inside"])
    thread.join()
    assert sum(progress) >= 3


def test_a_child_does_not_wait_for_threads_that_it_has_not() -> None:
    script = """
import os, torch, fastclip
torch.set_num_threads(3)
parameter = torch.nn.Parameter(torch.zeros(3_000_000))
parameter.grad = torch.full((3_000_000,), 0.5)
exact = (3_000_000 / 4) ** 0.5
assert abs(fastclip.clip_grad_norm_([parameter], 1e9).item() / exact - 1) < 1e-6
child = os.fork()
if not child:
    torch.set_num_threads(3)  # torch itself does not survive this
    right = abs(fastclip.clip_grad_norm_([parameter], 1.0).item() / exact - 1) < 1e-6
    fastclip.clip_grad_value_([parameter], 1e-9)
    os._exit(0 if right and parameter.grad.numpy().max() == torch.tensor(1e-9).item() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    # Python 3.12 warns of a fork in a process with threads.
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.strip(), done.stderr) == ("0", "")


def test_nothing_is_written_where_nothing_changes(tmp_path: Path) -> None:
    """The gradients are in read-only pages."""
    (tmp_path / "ones").write_bytes(np.ones(300_000, np.float32).tobytes())
    script = f"""
import mmap, warnings, torch, fastclip
warnings.simplefilter("ignore")
file = open({str(tmp_path / "ones")!r}, "rb")
memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
parameter = torch.nn.Parameter(torch.zeros(300_000))
parameter.grad = torch.frombuffer(memory, dtype=torch.float32)
for _ in range(2):
    fastclip.clip_grad_norm_([parameter], 1e9)
    fastclip.clip_grad_value_([parameter], 1.0)
    fastclip.clip_grads_([parameter], fastclip.ClipByNorm(1e9))
print("read", flush=True)
fastclip.clip_grad_norm_([parameter], 1.0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "read"
    assert done.returncode < 0  # so a write crashes


def test_what_gather_leaves_to_python() -> None:
    class Odd(nn.Parameter):
        pass

    plain = parameters([torch.ones(3), torch.ones(2)])
    grads, addresses = native.gather(plain, PLAIN_TYPES)
    assert all(mine is parameter.grad for mine, parameter in zip(grads, plain, strict=True))
    assert addresses == [grad.data_ptr() for grad in grads]
    sparse, meta, odd = (nn.Parameter(torch.ones(2)) for _ in range(3))
    sparse.grad = torch.eye(2)[0].to_sparse()
    odd.grad = Odd(torch.ones(2))
    for owner in (nn.Parameter(torch.ones(1)), Odd(torch.ones(1)), sparse, odd, 5, None):
        assert native.gather([*plain, owner], PLAIN_TYPES) is None
    assert native.gather([], PLAIN_TYPES) == ([], [])
    assert meta.grad is None


def test_gathering_keeps_no_reference() -> None:
    made = parameters([torch.ones(3)])
    grad = made[0].grad
    before = sys.getrefcount(grad), sys.getrefcount(made[0])
    for found in native.gather(made, PLAIN_TYPES):
        assert sys.getrefcount(found) == 3  # `found`, the tuple of the loop, the argument
    del found
    for _ in range(100):
        native.gather(made, PLAIN_TYPES)
        native.gather([*made, None], PLAIN_TYPES)
        fastclip.clip_grad_norm_(made, 1.0)
    assert (sys.getrefcount(grad), sys.getrefcount(made[0])) == before


def test_wrong_arguments_raise() -> None:
    _tensor, plan = plan_of(5)
    table, addresses = plan.table, plan.addresses
    calls: list[tuple[str, tuple[object, ...]]] = [
        ("reduce", ()),
        ("reduce", (table, addresses, "2", 0, 1)),
        ("reduce", (table, [*addresses, 64], 2.0, 0, 1)),
        ("reduce", ("table", addresses, 2.0, 0, 1)),
        ("reduce", (table, tuple(addresses), 2.0, 0, 1)),
        ("reduce", (table, ["0"], 2.0, 0, 1)),
        ("apply", (table, addresses, "1", 1)),
        ("apply", (table, addresses)),
        ("clamp", (table, addresses, 1.0, None, 1)),
        ("clamp", (table,)),
        ("clip", (table, addresses, 2.0, 1.0, "norm", 0, 1)),
        ("clip", ()),
        ("are_apart", (table,)),
        ("are_apart", (table, [])),
        ("gather", (5, PLAIN_TYPES)),
        ("gather", ()),
        ("use_level", ("avx1024",)),
        ("use_threads", ("many",)),
    ]
    for name, arguments in calls:
        with pytest.raises((TypeError, ValueError, SystemError)):
            getattr(native, name)(*arguments)


def test_without_torch_s_openmp_there_is_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastclip.backends.native.ctypes.CDLL", lambda _: object())
    assert backend._entry_of_openmp() == 0
    native.use_threads(0)
    try:
        tensor, plan = plan_of(1_000_000)
        assert plan.reduce(2.0, 1.0, torch.float64).total == 1000
        plan.scale_(0.5)
        assert bool((tensor == 0.5).all())
    finally:
        monkeypatch.undo()
        native.use_threads(backend._entry_of_openmp())


def test_without_the_extension_there_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "native", None)
    monkeypatch.setattr(backend, "_missing", "they were not built", raising=False)
    reason = backend.obstacle(torch.device("cpu"))
    assert reason is not None
    assert "C compiler" in reason
    with pytest.raises(
        RuntimeError, match="FASTCLIP_BACKEND=native cannot serve gradients on cpu: its kernels are not"
    ):
        fastclip.clip_grad_norm_(parameters([torch.ones(117)]), 1.0)
    monkeypatch.delenv("FASTCLIP_BACKEND")
    monkeypatch.setattr("fastclip.backends._warned", set())
    with pytest.warns(RuntimeWarning, match="fastclip uses NumPy .* on cpu: native cannot: its kernels are not there"):
        fastclip.clip_grad_norm_(parameters([torch.ones(119)]), 1.0)


def test_models_that_are_alike_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of one sketch but other shapes, and one with shapes of an earlier model: plans of all are cached."""
    monkeypatch.setattr(prepare, "_cache", cache.Cache())
    shapes: list[list[tuple[int, ...]]] = [[(4, 4), (8,), (2,)], [(4, 4), (9,), (2,)], [(16,), (8,), (2,)]]
    models = [
        parameters([torch.full(shape, float(i + 1)) for shape in each]) for i, each in enumerate([*shapes, shapes[0]])
    ]
    for model in models:
        fastclip.clip_grad_norm_(model, 1e9)
    monkeypatch.setattr(prepare, "plan", None)
    for _ in range(3):
        for i, model in enumerate(models):
            for parameter in model:
                parameter.grad = torch.full_like(parameter, float(i + 1))
            exact = (i + 1) * math.sqrt(sum(parameter.numel() for parameter in model))
            assert fastclip.clip_grad_norm_(model, 1e9).item() == pytest.approx(exact, rel=1e-6)


def test_untraced_without_torch_s_own_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_mark", None)
    seen = []

    @tracing.untraced
    def look() -> None:
        seen.append(torch.compiler.is_compiling())

    def step(x: Tensor) -> Tensor:
        look()
        return x * 2

    assert torch.compile(step, backend="eager")(torch.ones(())).item() == 2
    assert seen == [False]


@pytest.mark.parametrize("frees", [True, False])
@pytest.mark.parametrize("kind", ["norm", "value"])
def test_training_is_torch_s(frees: bool, kind: str) -> None:
    losses: list[list[float]] = []
    for module in (torch.nn.utils, fastclip):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        x, y = torch.randn(64, 7), torch.randn(64, 1)
        losses.append([])
        for _ in range(40):
            optimizer.zero_grad(set_to_none=frees)
            loss = (model(x) - y).square().mean()
            loss.backward()
            getattr(module, f"clip_grad_{kind}_")(model.parameters(), 0.05)
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists what is loaded so")
def test_one_openmp_is_loaded() -> None:
    """In a new process, as other packages bring their own OpenMP."""
    script = """
import torch, fastclip
parameter = torch.nn.Parameter(torch.zeros(1_000_000))
parameter.grad = torch.ones(1_000_000)
fastclip.clip_grad_norm_([parameter], 1.0)
print(open("/proc/self/maps").read())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    loaded = {Path(line.split()[-1]).name for line in done.stdout.splitlines() if ".so" in line}
    assert len([name for name in loaded if re.match(r"lib[gi]?omp", name)]) == 1
    assert any(name.startswith("native.") for name in loaded)
