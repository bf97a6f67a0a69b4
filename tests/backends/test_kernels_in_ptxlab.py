"""The package's own kernels under ptxlab: on each generation of GPUs, free of races, and broken on purpose.

`test_kernels.py` runs the same kernels through all their cases, as compiled for sm_90.
"""

from __future__ import annotations

import importlib
import math
import mmap
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import oracle
import ptxlab
import pytest
import torch
from gradients import addresses, assert_untouched_around, embedded, random_values, twin
from torch import Tensor

pytest.importorskip("triton")

CAPABILITIES = (80, 90, 100)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KINDS = {2.0: "two", 1.0: "one", 0.0: "zero", 3.0: "power", math.inf: "max", -math.inf: "min"}
NORESERVE = 0x4000  # Linux's MAP_NORESERVE, which `mmap` lacks before Python 3.11
SOURCES = Path(str(importlib.import_module("fastclip.kernels").__file__)).parent


@pytest.fixture(autouse=True)
def _without_gpu() -> Iterator[None]:
    yield
    ptxlab.deactivate()


class Kernels:
    """Launches the kernels of `fastclip.kernels`, or of a package like it, on tensors of all dtypes."""

    def __init__(self, package: str, tensors: list[Tensor]) -> None:
        self.modules = {name: importlib.import_module(f"{package}.{name}") for name in ("reduce", "apply", "clamp")}
        table = importlib.import_module(f"{package}.table")
        numels = np.array([tensor.numel() for tensor in tensors])
        layout = table.lay_out(numels, np.array([DTYPES.index(tensor.dtype) for tensor in tensors]))
        self.options = table.LAUNCH_OPTIONS
        self.norm_type = table.TYPES[0]
        self.tensors = tensors
        self.table = (
            torch.from_numpy(layout.chunks),
            torch.tensor([[tensor.data_ptr(), tensor.numel()] for tensor in tensors]),
        )
        self.ends = layout.ends
        self.slices = torch.from_numpy(layout.slices)
        self.partials = torch.full((len(layout.chunks),), math.nan, dtype=torch.float64)
        self.counts = torch.zeros_like(self.partials)
        state, ticket = torch.full((2,), math.nan, dtype=torch.float64), torch.zeros(1, dtype=torch.int32)
        self.norm = torch.full((), math.nan)
        self.memory = (*self.table, self.partials, ticket, state, self.norm)

    def choose(self, chunks: list[int]) -> None:
        """Use only some chunks, of the only tensor."""
        self.table = (torch.tensor(chunks), self.table[1])
        self.partials = torch.full((len(chunks),), math.nan, dtype=torch.float64)
        self.memory = (*self.table, self.partials, *self.memory[3:])
        self.ends = tuple(end and len(chunks) for end in self.ends)
        self.slices = torch.tensor([[0, len(chunks)]])

    def norms(self, p: float) -> tuple[float, list[float]]:
        """The norm of all tensors, and the norm of each, which is right for p = 2 only."""
        kernels, kind = self.modules["reduce"], KINDS[p]
        memory = (*self.table, self.counts if p == 0 else self.partials, *self.memory[3:])
        kernels.reduce_kernel[(3,)](
            *addresses(*memory), *self.ends, p, 1.0, KIND=kind, NORM=self.norm_type, **self.options
        )
        each = torch.full((len(self.tensors),), math.nan, dtype=torch.float64)
        tables = addresses(self.partials, self.slices, each)
        kernels.tensor_norms_kernel[(3,)](*tables, len(self.tensors), **self.options)
        return self.norm.item(), each.tolist()

    def reduction_as_ptx(self, p: float) -> str:
        """The PTX of the kernel for the p-norm."""
        kernel = self.modules["reduce"].reduce_kernel
        options = self.options | {"KIND": KINDS[p], "NORM": self.norm_type}
        compiled = kernel.warmup(*addresses(*self.memory), *self.ends, p, 1.0, grid=(1,), **options)
        return str(compiled.asm["ptx"])

    def scale(self, coefficients: Tensor) -> None:
        """Scale each tensor by its own coefficient."""
        self.modules["apply"].apply_kernel[(3,)](*addresses(*self.table, coefficients), 1, *self.ends, **self.options)

    def clamp(self, bounds: Tensor, flags: Tensor) -> None:
        """Clamp each tensor to its own bounds."""
        arguments = (*addresses(*self.table, bounds, flags), *self.ends, 0.0, 0.0)
        self.modules["clamp"].clamp_kernel[(3,)](*arguments, **self.options)


def gradients(rng: np.random.Generator) -> list[Tensor]:
    """For every dtype, off the 16-byte boundary: less than a vector, a few tiles, and more than a chunk."""
    return [
        embedded(random_values(rng, (size,), dtype, zeros=False), offset=1)
        for dtype in DTYPES
        for size in (3, 5003, 140_000 // dtype.itemsize)
    ]


# ---- Every generation


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("p", KINDS)
def test_norms(capability: int, p: float, rng: np.random.Generator) -> None:
    ptxlab.activate(capability)
    tensors = gradients(rng)
    with ptxlab.recording():
        norm, each = Kernels("fastclip.kernels", tensors).norms(p)
    assert norm == pytest.approx(len(tensors) if p == 0 else oracle.norm(tensors, p), rel=1e-6)
    if p == 2:
        for mine, tensor in zip(each, tensors, strict=True):
            assert mine == pytest.approx(oracle.norm([tensor], p), rel=oracle.NORM_TOLERANCE[tensor.dtype])


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_scaling_and_clamping(capability: int, rng: np.random.Generator) -> None:
    ptxlab.activate(capability)
    originals = gradients(rng)
    tensors = [twin(tensor) for tensor in originals]
    kernels = Kernels("fastclip.kernels", tensors)
    factors = torch.tensor([1.0, 0.5, -2.0] * 4, dtype=torch.float64)
    limits = torch.linspace(0.25, 3, len(tensors), dtype=torch.float64)
    flags = torch.full((3,), -1, dtype=torch.int32)
    with ptxlab.recording():
        kernels.scale(factors)
        for tensor, original, factor in zip(tensors, originals, factors.tolist(), strict=True):
            oracle.assert_same_bits(tensor, original * factor)
        kernels.clamp(torch.stack([-limits, limits], 1), flags)
    for tensor, original, factor, limit in zip(tensors, originals, factors.tolist(), limits.tolist(), strict=True):
        oracle.assert_same_bits(tensor, (original * factor).clamp(-limit, limit))
        assert_untouched_around(tensor, original)
    assert flags.tolist() == [1, 1, 1]


# ---- Beyond 32 bits

FAR = {
    torch.float32: 2**33 + 1003,
    torch.bfloat16: 2**33 + 1007,
    torch.float16: 2**33 + 1007,
    torch.float64: 2**32 + 1001,
}
"""Numbers of elements: more than 2**32, and more than 2**34 bytes. Only written pages take memory."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensor_of_more_than_2_to_the_32_elements(dtype: torch.dtype) -> None:
    """It uses the chunks in which an index, an offset or a number of vectors passes a power of two."""
    ptxlab.activate(90)
    chunk = 2**17 // dtype.itemsize
    memory = mmap.mmap(-1, FAR[dtype] * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    tensor = torch.frombuffer(memory, dtype=dtype)
    bounds = [2**31 // dtype.itemsize, 2**32 // dtype.itemsize, 2**31, 2**32, FAR[dtype] // chunk * chunk]
    wanted = sorted({0, *(element // chunk + step for element in bounds for step in (-1, 0))})
    for number in wanted:
        tensor[number * chunk] = 3
        tensor[min((number + 1) * chunk, tensor.numel()) - 1] = 4
    tensor[-1] = 12  # in the tail, which chunk 0 has
    kernels = Kernels("fastclip.kernels", [tensor])
    kernels.choose(wanted)
    with ptxlab.recording():
        norm, _ = kernels.norms(2.0)
        kernels.scale(torch.tensor([2.0], dtype=torch.float64))
    last = 3.0  # its end is the tail
    assert kernels.partials.tolist() == [13.0, *[5.0] * (len(wanted) - 2), last]
    assert norm == pytest.approx(math.hypot(13, *[5] * (len(wanted) - 2), last))
    assert {float(tensor[number * chunk]) for number in wanted} == {6}
    assert float(tensor[-1]) == 24


# ---- Broken on purpose


@pytest.fixture
def mutant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str, str], ModuleType]]:
    """Make a copy of the kernels in which one piece of code is replaced."""

    def make(file: str, old: str, new: str) -> ModuleType:
        package = tmp_path / "mutated_kernels"
        package.mkdir()
        for source in SOURCES.glob("*.py"):
            text = source.read_text()
            if source.name == file:
                assert text.count(old) == 1
                text = text.replace(old, new)
            (package / source.name).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module("mutated_kernels")

    yield make
    for name in [name for name in sys.modules if name.startswith("mutated_kernels")]:
        del sys.modules[name]


BREAKS = {
    "a body of one vector more": ("table.py", "(vector < vectors)[:, None]", "(vector <= vectors)[:, None]"),
    "a tail of one element more": ("table.py", "lane - PER_VECTOR < tl.where", "lane - PER_VECTOR <= tl.where"),
    "a head of one element more": (
        "table.py",
        "lane < tl.where(chunk == 0, head, 0)",
        "lane <= tl.where(chunk == 0, head, 0)",
    ),
    "a body off its boundary": ("table.py", "start = address + head * SIZE", "start = address + (head - 1) * SIZE"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_wrong_mask_is_found(
    name: str, mutant: Callable[[str, str, str], ModuleType], rng: np.random.Generator
) -> None:
    """The checks of bounds or alignment find it, or an element is scaled twice or not at all."""
    package = mutant(*BREAKS[name]).__name__
    tensor = random_values(rng, (5004,), torch.float32)[1:]
    expected = tensor * 0.5
    kernels = Kernels(package, [tensor])
    coefficients = torch.tensor([0.5], dtype=torch.float64)
    # Only these ranges: of all live tensors, one of another test could lie around this one's memory.
    memory = (*kernels.memory, tensor, coefficients)
    ptxlab.activate(90, bounds=[(part.data_ptr(), part.nbytes) for part in memory])
    try:
        with ptxlab.recording():
            kernels.scale(coefficients)
    except ptxlab.PtxError:
        return
    assert not torch.equal(tensor, expected)


# ---- Races

SIZES = [3001] * 6 + [70_000] + [40] * 10  # six tensors of one chunk, one of three, two groups of small ones
# A process without torch and Triton, which take ten seconds to import under the sanitizer.
RUN = f"""
import sys
import numpy as np
import ptxlab

kernel = ptxlab.Kernel(open(sys.argv[1]).read(), {1 << 16}, sanitize="thread")
tensors = [np.full(size, 2, np.float32) for size in {SIZES}]
chunks = np.array([*(np.arange(7) << 32), 6 << 32 | 1, 6 << 32 | 2, *(np.arange(7, 17) << 32)])
rows = np.array([[tensor.ctypes.data, tensor.size] for tensor in tensors])
ticket = np.zeros(1, np.int32)
p, expected = float(sys.argv[2]), float(sys.argv[3])
for seed in range(5):
    partials, state, norm = np.full(19, np.nan if p else 0), np.full(2, np.nan), np.full(1, np.nan, np.float32)
    arrays = (chunks, rows, partials, ticket, state, norm)
    ranges = [(array.ctypes.data, array.nbytes) for array in (*arrays, *tensors)]
    arguments = [start for start, _ in ranges[:6]] + [9] + [19] * 7 + [p, 1.0]
    kernel.launch((6,), arguments, ranges, resident=4, jitter=20, seed=seed)
    assert abs(norm[0] / expected - 1) < 1e-6 and ticket[0] == 0, norm
print("right")
"""


def status_of_races(package: str, capability: int, folder: Path, p: float = 2.0) -> int:
    """The exit status of a reduction by several programs under the sanitizer; checks that all values are right."""
    ptxlab.activate(capability)
    ptx = folder / "reduce.ptx"
    ptx.write_text(Kernels(package, [torch.ones(8)]).reduction_as_ptx(p))
    expected = len(SIZES) if p == 0 else math.sqrt(4 * sum(SIZES))
    done = ptxlab.run_under_sanitizer(["-c", RUN, str(ptx), str(p), str(expected)])
    assert done.stdout == "right\n", done.stderr[:2000]
    return done.returncode


@pytest.mark.parametrize("p", [2.0, 0.0])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_partials_and_ticket_do_not_race(capability: int, p: float, tmp_path: Path) -> None:
    assert status_of_races("fastclip.kernels", capability, tmp_path, p) == 0


@pytest.mark.parametrize("order", ['"relaxed"', '"acq_rel", scope="cta"'])
def test_a_ticket_of_weaker_order_is_found(
    order: str, mutant: Callable[[str, str, str], ModuleType], tmp_path: Path
) -> None:
    package = mutant("reduce.py", 'sem="acq_rel"', f"sem={order}").__name__
    assert status_of_races(package, 90, tmp_path) == ptxlab.RACE_FOUND


# A process as above, which launches the kernels of units and of quantiles several times.
RUN_UNITS = f"""
import sys
import numpy as np
import ptxlab

kernel = ptxlab.Kernel(open(sys.argv[1]).read(), {1 << 16}, sanitize="thread")
shapes = [(9, 1003), (5, 30), (2, 6001)]
for seed in range(3):
    grads = [np.full(shape, 2, np.float32) for shape in shapes]
    weights = [np.full(shape, 1, np.float32) for shape in shapes]
    units = np.array([i << 32 | unit for i, shape in enumerate(shapes) for unit in range(shape[0])])
    rows, of_weights = (np.array([[t.ctypes.data, t.size] for t in tensors]) for tensors in (grads, weights))
    counts, ratios, flags = np.array([shape[0] for shape in shapes]), np.full(3, 0.5), np.full(4, -1, np.int32)
    arrays = (units, rows, of_weights, counts, ratios, flags)
    ranges = [(array.ctypes.data, array.nbytes) for array in (*arrays, *grads, *weights)]
    arguments = [*(start for start, _ in ranges[:6]), *[len(units)] * 4, 1e-3]
    kernel.launch((4,), arguments, ranges, resident=4, jitter=20, seed=seed)
    assert all(np.allclose(grad, 0.5) for grad in grads) and flags.tolist() == [1] * 4, flags
print("right")
"""
WINDOW = 300
RUN_QUANTILES = f"""
import sys
import numpy as np
import ptxlab

kernel = ptxlab.Kernel(open(sys.argv[1]).read(), {1 << 16}, sanitize="thread")
groups, width = 5, {2 + 2 * WINDOW}
random = np.random.default_rng(0)
state = np.full((groups, width), np.inf)
state[:, 0] = {WINDOW}
state[:, 2 : 2 + {WINDOW}] = seen = random.integers(1, 50, (groups, {WINDOW}))
state[:, 2 + {WINDOW} :] = np.sort(seen)
for seed in range(6):
    norms, total, results = random.integers(1, 50, groups) + 0.0, np.ones(1), np.full(2 * groups, np.nan)
    seen = np.concatenate([seen[:, 1:], norms[:, None]], 1)
    ranges = [(array.ctypes.data, array.nbytes) for array in (state, norms, total, results)]
    arguments = [*(start for start, _ in ranges), groups, width, {WINDOW}, 0.37, 1, np.inf, 1, 1, 1, 0]
    kernel.launch((3,), arguments, ranges, resident=3, jitter=20, seed=seed)
    assert np.allclose(results[groups:], np.quantile(seen, 0.37, axis=1), rtol=1e-12), results
    assert np.array_equal(state[:, 2 + {WINDOW} :], np.sort(seen))
print("right")
"""


def status_of(run: str, package: str, file: str, kernel: str, folder: Path, **constants: object) -> int:
    """The exit status of a script under the sanitizer, given a kernel. Without a race, its values are right."""
    ptxlab.activate(90)
    compiled = getattr(importlib.import_module(f"{package}.{file}"), kernel)
    by_type = {"fp64": 0.0, "i64": 0}  # a parameter without an annotation is an address, of more than 32 bits
    values = [by_type.get(p.annotation_type, 1 << 40) for p in compiled.params if p.name not in constants]
    options = importlib.import_module(f"{package}.table").LAUNCH_OPTIONS | constants
    ptx = folder / "kernel.ptx"
    ptx.write_text(compiled.warmup(*values, grid=(1,), **options).asm["ptx"])
    done = ptxlab.run_under_sanitizer(["-c", run, str(ptx)])
    assert done.returncode == ptxlab.RACE_FOUND or done.stdout == "right\n", done.stderr[:2000]
    return done.returncode


def test_units_do_not_race(tmp_path: Path) -> None:
    """A program writes a unit when all its warps have read it."""
    assert status_of(RUN_UNITS, "fastclip.kernels", "units", "clip_units_kernel", tmp_path) == 0


def test_windows_do_not_race(tmp_path: Path) -> None:
    constants: dict[str, object] = {"KIND": "quantile", "LANES": 512}
    assert status_of(RUN_QUANTILES, "fastclip.kernels", "adapt", "adapt_kernel", tmp_path, **constants) == 0


def test_a_window_read_without_a_barrier_is_found(
    mutant: Callable[[str, str, str], ModuleType], tmp_path: Path
) -> None:
    package = mutant("adapt.py", "    tl.debug_barrier()", "    pass").__name__
    constants: dict[str, object] = {"KIND": "quantile", "LANES": 512}
    assert status_of(RUN_QUANTILES, package, "adapt", "adapt_kernel", tmp_path, **constants) == ptxlab.RACE_FOUND
