"""Which backend is chosen, what it writes, what it caches, and what threads and forked children may do."""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import importlib
import itertools
import mmap
import os
import resource
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gradients import grad_of, parameters, random_values
from legs import Leg
from torch import Tensor, nn

import fastclip
from fastclip import backends
from fastclip.backends import interface
from fastclip.core import cache, prepare
from fastclip.foundation import devices

INF = float("inf")

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system, and nothing to test")


def clip_two() -> Tensor:
    return fastclip.clip_grad_norm_(parameters([torch.tensor([3.0]), torch.tensor([4.0])]), 1.0)


# ---- Selection

ON_CPU = "numpy" if find_spec("fastclip.kernels.native") is None else "native"


@pytest.fixture
def unforced(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.delenv("FASTCLIP_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(prepare, "_cache", cache.Cache())  # other tests' plans, for gradients at the same addresses
    return monkeypatch


@pytest.mark.usefixtures("unforced")
def test_devices_choose_their_backend() -> None:
    assert backends.for_device(torch.device("cpu")).name == ON_CPU
    for other in ("meta", "mps", "xpu"):
        assert backends.for_device(torch.device(other)) is backends.TORCH


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_forced_backend_serves_every_call(name: str, unforced: pytest.MonkeyPatch) -> None:
    """Each call asks the forced backend for a plan, whatever the device."""
    unforced.setenv("FASTCLIP_BACKEND", name)
    unforced.setenv("TRITON_INTERPRET", "1")  # without it, Triton has an obstacle on the CPU

    class Asked(Exception):  # noqa: N818 - it is no error
        pass

    def plan(tensors: list[Tensor]) -> interface.Plan:
        raise Asked(len(tensors))

    unforced.setattr(importlib.import_module(f"fastclip.backends.{name}"), "plan", plan)
    with pytest.raises(Asked, match="2"):
        clip_two()
    with pytest.raises(Asked):
        fastclip.get_total_norm([torch.ones(1)])
    with pytest.raises(Asked):
        fastclip.clip_grad_value_(parameters([torch.ones(1)]), 1.0)


def test_unknown_backend(unforced: pytest.MonkeyPatch) -> None:
    unforced.setenv("FASTCLIP_BACKEND", "fast")
    with pytest.raises(RuntimeError, match="FASTCLIP_BACKEND='fast' names no backend") as error:
        clip_two()
    assert all(f"{name}: " in str(error.value) for name in ("triton", "native", "numpy", "torch"))


def test_forced_backend_that_cannot_serve(unforced: pytest.MonkeyPatch) -> None:
    unforced.setenv("FASTCLIP_BACKEND", "numpy")
    with pytest.raises(
        RuntimeError, match="FASTCLIP_BACKEND=numpy cannot serve gradients on xpu: NumPy works on"
    ) as error:
        backends.for_device(torch.device("xpu"))
    assert all(f"{name}: " in str(error.value) for name in ("triton", "native", "numpy", "torch"))


def no_triton(name: str, package: str | None = None) -> None:
    """Stand for `importlib.util.find_spec` where Triton is not installed."""
    assert (name, package) == ("triton", None)


def test_without_triton(unforced: pytest.MonkeyPatch) -> None:
    from fastclip.backends import triton

    unforced.setattr(triton, "find_spec", no_triton)
    assert clip_two().item() == 5
    unforced.setenv("FASTCLIP_BACKEND", "triton")
    with pytest.raises(
        RuntimeError, match="FASTCLIP_BACKEND=triton cannot serve gradients on cpu: Triton is not installed"
    ):
        clip_two()
    unforced.delenv("FASTCLIP_BACKEND")
    with pytest.warns(
        RuntimeWarning,
        match="torch's own operations, tensor by tensor, for gradients on cuda: triton cannot: Triton is not",
    ):
        assert backends.for_device(torch.device("cuda")) is backends.TORCH
    assert backends.for_device(torch.device("cuda")) is backends.TORCH  # and warns only once


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton has a driver here")
def test_triton_without_a_driver(unforced: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    unforced.setenv("FASTCLIP_BACKEND", "triton")
    with pytest.raises(
        RuntimeError, match=r"Triton has no active driver .* TRITON_INTERPRET=1 runs its kernels on the CPU"
    ):
        clip_two()


def test_triton_whose_driver_serves_another_device(unforced: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("triton.runtime").driver
    from fastclip.backends import triton

    class Driver:
        @staticmethod
        def get_active_torch_device() -> torch.device:
            return torch.device("cuda", 0)

    unforced.setattr(driver, "_active", Driver())
    assert triton.obstacle(torch.device("cuda")) is None
    assert triton.obstacle(torch.device("cpu")) == "Triton's active driver serves cuda"


def test_changing_the_backend_between_calls(unforced: pytest.MonkeyPatch) -> None:
    """A plan cached for one backend is not used for another."""
    made = parameters([torch.tensor([3.0, 4.0])])
    assert fastclip.clip_grad_norm_(made, INF).item() == 5
    unforced.setenv("FASTCLIP_BACKEND", "fast")
    with pytest.raises(RuntimeError, match="names no backend"):
        fastclip.clip_grad_norm_(made, INF)


@pytest.mark.parametrize(("device", "backend"), [("cpu", ON_CPU), ("meta", "torch")])
@pytest.mark.usefixtures("unforced")
def test_choice_tells_why(device: str, backend: str) -> None:
    choice = backends.choose(torch.device(device))
    assert choice.backend.name == backend
    assert choice.reason
    assert not choice.fell_back


def test_info(unforced: pytest.MonkeyPatch) -> None:
    info = fastclip.info()
    assert set(info.versions) >= {"fastclip", "torch", "numpy", "python"}
    assert info.devices[0].device == "cpu"
    assert info.devices[0].backend == ON_CPU
    assert f"torch {torch.__version__.split('+')[0]}" in str(info)
    unforced.setenv("FASTCLIP_BACKEND", "fast")
    assert fastclip.info().devices[0].backend is None
    assert "names no backend" in str(fastclip.info())


def test_warm_up_touches_nothing(leg: Leg) -> None:
    parameter = parameters([torch.tensor([3.0], device=leg.device)])[0]
    before = grad_of(parameter)._version
    fastclip.warm_up(
        [parameter, nn.Parameter(torch.zeros(2, dtype=torch.complex64, device=leg.device))], norm_dtype=torch.float32
    )
    assert grad_of(parameter).item() == 3
    assert grad_of(parameter)._version == before
    fastclip.warm_up([])


# ---- What is written


PAGE = mmap.PAGESIZE


class Page:
    """A page of memory that can be made read-only; a write then ends the process with SIGSEGV."""

    def __init__(self, values: Tensor) -> None:
        self.memory = mmap.mmap(-1, PAGE)
        self.tensor = torch.frombuffer(self.memory, dtype=values.dtype, count=values.numel(), offset=16)
        self.tensor.copy_(values)

    def protect(self) -> None:
        """Make the page read-only; this cannot be undone."""
        address = self.tensor.data_ptr() - 16
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(PAGE), 1):  # PROT_READ
            raise OSError(ctypes.get_errno(), "mprotect")


def signal_of_child(work: Callable[[], None]) -> int:
    """Do the work in a forked child; return the signal that ended the child, or 0."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, "the child raised"
        return 0
    return os.WTERMSIG(status)


# Python 3.12 and later warn of every fork of a process with threads. Here the child takes no lock, starts no OpenMP.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")

WRITES: dict[str, tuple[Callable[[list[nn.Parameter]], Any], bool]] = {
    "norm, below": (lambda made: fastclip.clip_grad_norm_(made, 100.0), False),
    "norm, measured": (lambda made: fastclip.clip_grad_norm_(made, INF), False),
    "total norm": (lambda made: fastclip.get_total_norm([grad_of(parameter) for parameter in made]), False),
    "known norm, below": (lambda made: fastclip.clip_grads_with_norm_(made, 100.0, torch.tensor(50.0)), False),
    "value, inside": (lambda made: fastclip.clip_grad_value_(made, 4.0), False),
    "value, at the bound": (lambda made: fastclip.clip_grad_value_(made, 2.0), False),
    "each norm, below": (lambda made: fastclip.clip_by_norm_(made, 100.0), False),
    "norm without epsilon, below": (lambda made: fastclip.clip_by_global_norm_(made, 100.0), False),
    "norms, measured": (fastclip.measure_grads, False),
    "each value, at the bound": (
        lambda made: fastclip.clip_grads_(made, fastclip.ClipByValue([-2.0, -3.0, -2.0], 2.0, by="parameter")),
        False,
    ),
    "each norm, above": (lambda made: fastclip.clip_by_norm_(made, 1.0), True),
    "each value, outside": (
        lambda made: fastclip.clip_by_value_(made, [-2.0, -3.0, -2.0], [2.0, 2.0, 1.0], by="parameter"),
        True,
    ),
    "norm, above": (lambda made: fastclip.clip_grad_norm_(made, 1.0), True),
    "value, outside": (lambda made: fastclip.clip_grad_value_(made, 1.0), True),
}


@needs_fork
@forks
@pytest.mark.legs("numpy", "interpreter", "ptx")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("call", WRITES)
def test_nothing_is_written_where_nothing_is_clipped(leg: Leg, call: str, dtype: torch.dtype) -> None:
    """Read-only gradients raise no signal where nothing is clipped. They do where something is: the guard works."""
    clip, writes = WRITES[call]
    pages = [Page(torch.linspace(-2, 2, size).to(dtype)) for size in (1, 37, 300)]
    made = parameters([page.tensor for page in pages])
    clip(made)  # kernels are compiled, and modules imported, before the fork
    for page, size in zip(pages, (1, 37, 300), strict=True):
        page.tensor.copy_(torch.linspace(-2, 2, size).to(dtype))

    def work() -> None:
        for page in pages:
            page.protect()
        clip(made)
        leg.check()

    with leg.unbounded():
        ended_by = signal_of_child(work)
    assert ended_by == (signal.SIGSEGV if writes else 0)


@needs_fork
@forks
@pytest.mark.legs("interpreter", "ptx")
def test_clamp_writes_no_vector_that_is_inside(leg: Leg) -> None:
    """The kernel writes vectors of 16 bytes. A value out of bounds in another page causes no write to this one."""
    inside, outside = Page(torch.ones(100)), torch.full((100,), 5.0)
    made = parameters([inside.tensor, outside])

    def work() -> None:
        inside.protect()
        fastclip.clip_grad_value_(made, 2.0)
        assert outside.max() == 2

    fastclip.clip_grad_value_(made, 10.0)
    with leg.unbounded():
        assert signal_of_child(work) == 0


@needs_fork
@forks
@pytest.mark.legs("numpy", "interpreter", "ptx")
@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("size", [25, 100])  # tensors of up to 64 elements are in groups
def test_a_group_that_is_not_clipped_is_not_written(leg: Leg, size: int, by_norm: bool) -> None:
    inside, outside = Page(torch.ones(size)), torch.full((size,), 5.0)
    made = parameters([inside.tensor, outside])
    rule = (
        fastclip.ClipByNorm([10.0, 0.5 * size**0.5])
        if by_norm
        else fastclip.ClipByValue(-1.0, [1.0, 0.5], by="parameter")
    )

    def work() -> None:
        inside.protect()
        fastclip.clip_grads_(made, rule)
        assert outside.max() == 0.5

    fastclip.clip_grads_(made, rule)
    outside.fill_(5.0)
    with leg.unbounded():
        assert signal_of_child(work) == 0


# ---- What is cached


def test_plans_do_not_keep_gradients_alive(leg: Leg) -> None:
    model = nn.Linear(300, 7).to(leg.device)
    model(torch.ones(2, 300, device=leg.device)).sum().backward()
    fastclip.clip_grad_norm_(model.parameters(), 1.0)
    fastclip.clip_grad_value_(model.parameters(), 1.0)
    kept = [weakref.ref(grad_of(parameter).untyped_storage()) for parameter in model.parameters()]
    tensors = [weakref.ref(grad_of(parameter)) for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    gc.collect()
    assert [reference() for reference in tensors] == [None, None]
    assert [reference() for reference in kept] == [None, None]


def test_gradients_that_move_are_found(leg: Leg, rng: np.random.Generator) -> None:
    """`zero_grad(set_to_none=True)` and new shapes: no step uses the gradients of an earlier one."""
    hold = []
    for step in range(12):
        values = [random_values(rng, (size + step % 3,), torch.float32).to(leg.device) for size in (3, 50)]
        hold.append(values)  # so that new ones have other addresses
        made = parameters([value.clone() for value in values])
        norm = fastclip.clip_grad_norm_(made, 0.5)
        assert norm.item() == pytest.approx(oracle.norm(values, 2), rel=1e-6)
        for parameter, value in zip(made, values, strict=True):
            oracle.assert_close(grad_of(parameter), oracle.as_numpy(value) * (0.5 / norm.item()), 1e-5)


def test_the_same_memory_with_another_shape_or_dtype(leg: Leg) -> None:
    """A cached plan depends on sizes, strides and dtypes as well as on addresses."""
    memory = torch.arange(1.0, 65.0, device=leg.device)
    views = [memory, memory[:16], memory[::4], memory.view(8, 8).t(), memory.view(8, 8)[:, :2]]
    for view in [*views, *views]:
        exact = oracle.norm([view], 2)
        assert fastclip.get_total_norm([view]).item() == pytest.approx(exact, rel=1e-6)
        assert fastclip.clip_grad_norm_(parameters([view]), INF).item() == pytest.approx(exact, rel=1e-6)
    memory.fill_(0)
    assert fastclip.get_total_norm([memory.view(torch.float64)]).item() == 0
    memory.view(torch.bfloat16).fill_(0.5)
    assert fastclip.get_total_norm([memory.view(torch.bfloat16)]).item() == pytest.approx(0.5 * 128**0.5, rel=2**-7)
    assert fastclip.get_total_norm([memory.view(torch.float16)]).item() != 0


def test_what_is_kept_is_bounded(leg: Leg, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of cached plans is bounded. A short list of gradients counts as much as `_LEAST` gradients."""
    monkeypatch.setattr(cache, "_CAPACITY", 8 * 32)
    monkeypatch.setattr(cache, "_LEAST", 32)
    monkeypatch.setattr(prepare, "_cache", cache.Cache())
    if leg.backend == "triton":
        monkeypatch.setattr("fastclip.backends.triton.CACHED_TABLES", 8)
    held = [torch.ones(size, device=leg.device) for size in range(1, 30)]
    for tensor in held:
        fastclip.get_total_norm([tensor])
    many = [torch.ones(3, device=leg.device) for _ in range(100)]
    fastclip.get_total_norm(many)
    if leg.keeps_plans:  # plans of the other legs hold the gradients, and are not cached
        kept = prepare._cache
        counts = [entry.dispatch.count for entries in kept.entries.values() for entry in entries]
        assert counts == [1] * 4 + [100]
        assert kept.gradients == 4 * 32 + 100
    if leg.backend == "triton":
        from fastclip.backends import triton

        assert 0 < len(triton._cache.by_sizes) <= 8


def test_gradients_that_overlap_are_never_in_one_plan(leg: Leg, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan scales its tensors in any order and at once: two that share memory would race."""
    module = importlib.import_module(f"fastclip.backends.{leg.backend}")
    seen: list[list[Tensor]] = []

    def recorded(tensors: list[Tensor], plan: Callable[[list[Tensor]], interface.Plan] = module.plan) -> interface.Plan:
        seen.append(tensors)
        return plan(tensors)

    monkeypatch.setattr(module, "plan", recorded)
    flat = torch.arange(1.0, 101.0, device=leg.device)
    views = [flat[50:60], flat[:40], flat[39:50], flat[5:8], flat[60:], flat[5:8], flat[99:]]
    exact = oracle.norm(views, 2)
    assert fastclip.clip_grad_norm_(parameters(views), INF).item() == pytest.approx(exact, rel=1e-6)
    assert sum(map(len, seen)) == (len(views) if leg.backend == "torch" else 3)
    if leg.keeps_plans:  # torch's plan takes one tensor after another
        places = sorted((tensor.data_ptr(), tensor.data_ptr() + 4 * tensor.numel()) for tensor in seen[0])
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))


# ---- Threads, and forked children


@pytest.fixture
def any_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.legs("native", "numpy")
@pytest.mark.usefixtures("any_threads")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_number_of_threads_gives_the_same_bits(leg: Leg, dtype: torch.dtype, rng: np.random.Generator) -> None:
    originals = [random_values(rng, (size,), dtype) for size in (300_001, 5, 170_000, 1, *[40] * 50)]
    seen = []
    for threads in (1, 2, 4, 7):
        torch.set_num_threads(threads)
        made = parameters([tensor.clone() for tensor in originals])
        norms = [
            fastclip.get_total_norm([grad_of(p) for p in made], order, norm_dtype=torch.float64)
            for order in (2, 1, 0, INF, -INF, 3, 0.5)
        ]
        fastclip.clip_grad_norm_(made, 3.0)
        fastclip.clip_grad_value_(made, 0.01)
        seen.append([*norms, *map(grad_of, made)])
    for others in seen[1:]:
        for mine, first in zip(others, seen[0], strict=True):
            oracle.assert_same_bits(mine, first)
    assert seen[0][0].item() == pytest.approx(oracle.norm(originals, 2), rel=1e-6)
    assert seen[0][2].item() == len(originals)
    assert leg


def test_models_clipped_by_threads_at_once(leg: Leg, rng: np.random.Generator) -> None:
    """Several Python threads clip gradients of the same sizes: each gets the norms of its own gradients."""
    sizes = (1000, 3, 40_000) if leg.environment is None else (100, 3)
    sets = [
        [random_values(rng, (size,), torch.float32).to(leg.device) * factor for size in sizes]
        for factor in (1, 10, 100)
    ]
    expected = []
    for values in sets:
        made = parameters([value.clone() for value in values])
        expected.append([fastclip.clip_grad_norm_(made, 0.5), *map(grad_of, made)])
    start = threading.Barrier(len(sets))

    def work(values: list[Tensor]) -> list[list[Tensor]]:
        start.wait()
        results = []
        for _ in range(30 if leg.environment is None else 3):
            made = parameters([value.clone() for value in values])
            results.append([fastclip.clip_grad_norm_(made, 0.5), *map(grad_of, made)])
        return results

    if leg.name == "interpreter":
        # Triton's interpreter has its grid position in a global variable: threads take turns, each with its own tables.
        lock = threading.Lock()
        unlocked, start = work, threading.Barrier(1)

        def work(values: list[Tensor]) -> list[list[Tensor]]:
            with lock:
                return unlocked(values)

    with ThreadPoolExecutor(len(sets)) as pool:
        for results, right in zip(pool.map(work, sets), expected, strict=True):
            for result in results:
                for mine, reference in zip(result, right, strict=True):
                    oracle.assert_same_bits(mine, reference)


# ---- torch's backend, for devices without fp64


def test_devices_without_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_BACKEND", "torch")
    monkeypatch.setattr(devices, "_WITHOUT_FP64", frozenset({"cpu"}))
    made = parameters([torch.tensor([3e30, 0.0]), torch.tensor([4e30], dtype=torch.bfloat16)])
    assert fastclip.get_total_norm([torch.zeros(2), torch.ones(2)], 0).item() == 1
    norm = fastclip.clip_grad_norm_(made, 1.0)
    assert norm.item() == pytest.approx(5e30, rel=2**-7)
    assert grad_of(made[0]).tolist() == pytest.approx([0.6, 0.0], rel=2**-7)


# ---- launches


@pytest.mark.legs("ptx")
@pytest.mark.parametrize("count", [1, 40])
def test_launches_do_not_depend_on_the_number_and_dtypes_of_gradients(
    leg: Leg, rng: np.random.Generator, count: int
) -> None:
    import ptxlab

    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    drawn = (rng.standard_normal(int(rng.integers(1, 3000))) for _ in range(count))
    grads = [torch.from_numpy(values).to(leg.device, dtypes[i % 4]) for i, values in enumerate(drawn)]
    made = parameters(grads)
    calls: list[tuple[Callable[[], object], list[str]]] = [
        (lambda: fastclip.clip_grad_norm_(made, 1.0, norm_dtype=torch.float32), ["reduce_kernel", "apply_kernel"]),
        (lambda: fastclip.get_total_norm(grads, norm_dtype=torch.float32), ["reduce_kernel"]),
        (lambda: fastclip.clip_grad_value_(made, 0.5), ["clamp_kernel"]),
    ]
    for call, kernels in calls:
        with ptxlab.recording() as launched:
            call()
        assert [name for name, _ in launched] == kernels


@pytest.mark.legs("ptx")
@pytest.mark.parametrize("count", [3, 300])
def test_launches_depend_on_neither_the_number_of_gradients_nor_that_of_groups(
    leg: Leg, rng: np.random.Generator, count: int
) -> None:
    import ptxlab

    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    grads = [torch.from_numpy(rng.standard_normal(1 + i % 7)).to(leg.device, dtypes[i % 4]) for i in range(count)]
    made = parameters(grads)
    several = [f"group {i % 50}" for i in range(count)]
    norms = ["reduce_kernel", "tensor_norms_kernel"]
    groupings: list[Any] = ["global", "parameter", several, ["one"] * count]
    for by in groupings:
        bounds = [1.0 + i for i in range(len(fastclip.measure_grads(made, by).groups.labels))]
        calls: list[tuple[Callable[[], object], list[str]]] = [
            (partial(fastclip.measure_grads, made, by), norms[:1] if by == "global" else norms),
            (partial(fastclip.clip_by_norm_, made, bounds, by=by), [*norms, "apply_kernel"]),
            (partial(fastclip.clip_grads_, made, fastclip.ClipByNorm(1.0, by)), [*norms, "apply_kernel"]),
            (partial(fastclip.clip_by_value_, made, -1.0, bounds, by=by), ["clamp_kernel"]),
            (partial(fastclip.clip_grads_, made, fastclip.ClipByValue(-1.0, bounds, by)), [*norms, "clamp_kernel"]),
        ]
        for call, kernels in calls:
            with ptxlab.recording() as launched:
                call()
            assert [name for name, _ in launched] == kernels
    for use_norm, kernels in ((None, ["reduce_kernel", "apply_kernel"]), (5.0, ["apply_kernel"])):
        with ptxlab.recording() as launched:
            fastclip.clip_by_global_norm_(made, 1.0, use_norm)
        assert [name for name, _ in launched] == kernels


@pytest.mark.legs("ptx")
def test_nothing_is_compiled_anew_for_other_numbers_or_sizes(leg: Leg, rng: np.random.Generator) -> None:
    from fastclip.kernels.apply import apply_kernel
    from fastclip.kernels.clamp import clamp_kernel
    from fastclip.kernels.reduce import reduce_kernel

    def clip(count: int, max_norm: float, clip_value: float) -> None:
        drawn = (rng.standard_normal(1 + i * count) for i in range(count))
        made = parameters([torch.from_numpy(values).to(leg.device, torch.float32) for values in drawn])
        fastclip.clip_grad_norm_(made, max_norm)
        fastclip.clip_grad_value_(made, clip_value)

    def variants() -> list[int]:
        kernels = (reduce_kernel, apply_kernel, clamp_kernel)
        return [len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values()]

    clip(3, 1.0, 0.5)
    before = variants()
    assert min(before) > 0
    for count, number in ((1, 1), (2, 16), (16, 2.0), (17, 1e-3), (64, 0.0)):
        clip(count, number, number)
    assert variants() == before
