"""What the CPU's backends do to their process: memory, threads, forked children, torch's modes."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from gradients import parameters
from torch import Tensor

import fastclip
from fastclip.core import prepare

needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux weighs a process so")


@pytest.fixture(autouse=True, params=["native", "numpy"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The forced backend, also in the processes that a test starts."""
    if request.param == "native":
        pytest.importorskip("fastclip.kernels.native", reason="the native kernels were not built: no C compiler")
    monkeypatch.setenv("FASTCLIP_BACKEND", request.param)
    return str(request.param)


PRELUDE = """
import os, sys, threading, time
import torch, fastclip

def parameter_of(elements, dtype):
    parameter = torch.zeros(elements, dtype=dtype)
    parameter.grad = torch.full((elements,), 0.5, dtype=dtype)
    return parameter

def mib(entry):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024
"""


def output_of(script: str, *arguments: str) -> list[str]:
    """The words that a script prints in a new process."""
    command = [sys.executable, "-c", PRELUDE + script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@needs_proc
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_four_mebibytes_beside_the_gradients_and_none_of_theirs_is_kept(dtype: str) -> None:
    """The process's memory: its peak during the clip, and what is left after the gradients are freed."""
    script = """
dtype = getattr(torch, sys.argv[1])
torch.set_num_threads(2)

def call(parameter):
    for order in (2, float("inf"), 1, 3):
        fastclip.clip_grad_norm_([parameter], 1e30, order)
        fastclip.clip_grad_norm_([parameter], 1.0, order)
    fastclip.clip_grad_value_([parameter], 1e-9)
    fastclip.get_total_norm([parameter.grad], norm_dtype=torch.float64)  # tiny: redone in fp64

call(parameter_of(1000, dtype))  # imports, and other one-time costs
parameter = parameter_of(32 << 20, dtype)
# Threads have stacks, and the allocator keeps an arena for each: the same for gradients of any size.
call(smaller := parameter_of(2 << 20, dtype))
open("/proc/self/clear_refs", "w").write("5")  # sets the peak to the present use
before = mib("VmRSS")
call(parameter)
heaviest = mib("VmHWM")
parameter.grad = None
print(heaviest - before, mib("VmRSS") - before)
"""
    more, left = map(float, output_of(script, dtype))
    gradients = 32 * getattr(torch, dtype).itemsize
    assert more <= 4
    assert left <= 4 - gradients


LARGE = {
    "one NaN": "torch.full((SIZE,), 0.5, dtype=dtype).index_fill_(0, torch.tensor([7]), math.nan)",
    "gaps": "torch.full((SIZE // 4, 6), 0.5, dtype=dtype)[:, :4]",
    "gaps, on end": "torch.full((8, SIZE // 4), 0.5, dtype=dtype)[:, : SIZE // 8].t()",
    "complex": "torch.full((SIZE // 2,), 0.5 + 0.25j, dtype=dtype.to_complex())",
}


@needs_proc
@pytest.mark.parametrize("made", LARGE)
def test_what_torch_s_operations_do_takes_little_memory_too(made: str) -> None:
    """They count NaN, and clip what no kernel takes. If memory is short, the error should still be about the NaN."""
    script = f"""
import math

class Holder:
    def __init__(self, dtype, SIZE):
        self.grad = {LARGE[made]}

def call(made):
    try:
        for order in (2, 3, math.inf):
            fastclip.clip_grad_norm_([made], 1e30, order, error_if_nonfinite=True)
            fastclip.clip_grad_norm_([made], 1.0, order, error_if_nonfinite=True)
        if not made.grad.is_complex():
            fastclip.clip_grads_([made], fastclip.ClipByValue(-1e-9, 1e-9))
    except RuntimeError as error:
        assert "(1 NaN, 0 inf)" in str(error), error

for dtype in (torch.float32, torch.float16, torch.float64):
    call(Holder(dtype, 2 << 20))  # imports, and other one-time costs
    made = Holder(dtype, 24 << 20)
    open("/proc/self/clear_refs", "w").write("5")  # sets the peak to the present use
    before = mib("VmRSS")
    call(made)
    print(mib("VmHWM") - before)
"""
    more = list(map(float, output_of(script)))
    assert max(more) <= 40  # MiB; the gradients take 96, 48 and 192, and earlier versions took 2 to 4 times that


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists a process's threads so")
def test_torch_s_number_of_threads_is_the_limit() -> None:
    """The process has as many threads as `torch.set_num_threads` says, for every dtype and norm."""
    script = """
torch.set_num_threads(1)
made = [parameter_of(5 << 20, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)]
for threads in (1, 3):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    for each in ([parameter] for parameter in made):
        for order in (2, float("inf"), 3, 0):
            fastclip.clip_grad_norm_(each, 1e-3, order)
        fastclip.clip_grad_value_(each, 1e-9)
    print(len(os.listdir("/proc/self/task")) - before)
"""
    assert output_of(script) == ["0", "2"]


def test_threads_sleep_between_calls() -> None:
    """Between calls the process uses almost no processor time."""
    script = """
made = [parameter_of(5 << 20, torch.float32), parameter_of(5 << 20, torch.bfloat16)]
torch.set_num_threads(4)
fastclip.clip_grad_norm_(made, 1.0)
before = time.process_time()
time.sleep(1)
print(time.process_time() - before)
"""
    (seconds,) = map(float, output_of(script))
    assert seconds < 0.2  # one spinning thread would take 1 s


def test_workers_of_a_data_loader_clip() -> None:
    """The workers are forked, without the threads of their parent; torch makes each use one thread."""
    script = """
from torch.utils.data import DataLoader, Dataset

torch.set_num_threads(2)
dtypes = (torch.float32, torch.bfloat16, torch.float64)

class Norms(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        made = [parameter_of(size, dtype) for size in (1 << 20, 1000) for dtype in dtypes]
        norm = fastclip.clip_grad_norm_(made, 1.0, norm_dtype=torch.float64).item()
        fastclip.clip_grad_value_(made, 1e-9)
        return norm, made[1].grad.max().item()

Norms()[0]
for norm, largest in DataLoader(Norms(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60):
    print(norm, largest)
"""
    norms = [float(each) for each in output_of(script)]
    assert norms[::2] == pytest.approx([math.sqrt(3 * ((1 << 20) + 1000) / 4)] * 4)
    assert norms[1::2] == pytest.approx([1e-9] * 4, rel=2**-8)


def test_gradients_first_seen_in_inference_mode_are_clipped_outside_of_it_too() -> None:
    script = """
for dtype in (torch.float32, torch.bfloat16):
    made = [parameter_of(size, dtype) for size in (300_000, 100_000, 64, 64, 64, 64, 64)]
    with torch.inference_mode():
        fastclip.clip_grad_norm_(made, 100.0)
        fastclip.get_total_norm([parameter.grad for parameter in made], 3)
    fastclip.clip_grad_norm_(made, 1.0, 2)
    fastclip.get_total_norm([parameter.grad for parameter in made], 3)
    print(fastclip.get_total_norm([parameter.grad for parameter in made], norm_dtype=torch.float64).item())
"""
    assert [float(norm) for norm in output_of(script)] == pytest.approx([1.0, 1.0], rel=2**-8)


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("mode", ["FakeTensorMode(allow_non_fake_inputs=True)", "torch.func.functionalize"])
@pytest.mark.parametrize("call", ["clip_grad_norm_(made, 1.0)", "measure_grads(made, by='parameter')"])
def test_nothing_of_a_call_under_a_mode_is_kept(call: str, mode: str, is_first: bool) -> None:
    """Under a mode a call may work, or raise because tensors have no memory there; the next call clips in any case."""
    script = f"""
from torch._subclasses import FakeTensorMode
if not {is_first}:
    fastclip.clip_grad_norm_([parameter_of(6000, torch.bfloat16)], 1.0)
made = [parameter_of(size, torch.bfloat16) for size in (50_000, 5000)]
def clip(x):
    fastclip.{call}
    return x
mode = {mode}
try:
    if mode is torch.func.functionalize:
        mode(clip)(torch.ones(3))
    else:
        with mode:
            clip(None)
except RuntimeError as error:
    assert "clip outside of it" in str(error), error
for made in (made, [parameter_of(size, torch.bfloat16) for size in (7000, 5000)]):
    fastclip.clip_grad_norm_(made, 1.0)
    print(torch.nn.utils.get_total_norm([parameter.grad.double() for parameter in made]).item())
"""
    norms = output_of(script)
    assert [float(norm) for norm in norms] == pytest.approx([1.0, 1.0], rel=2**-8)


@needs_proc
def test_what_is_kept_of_a_gradient_does_not_grow_with_it() -> None:
    """For 16-bit gradients at other addresses in each step, which need a new plan each time."""
    script = """
memory = torch.ones(8 * 500_000 + 400, dtype=torch.bfloat16)
made = [torch.nn.Parameter(torch.zeros(500_000, dtype=torch.bfloat16)) for _ in range(8)]
for step in range(400):
    if step == 20:
        before = mib("VmRSS")
    for i, parameter in enumerate(made):
        parameter.grad = memory[500_000 * i + step :][:500_000]
    fastclip.clip_grad_norm_(made, 1e9)
print((mib("VmRSS") - before) * 2**20 / (380 * 8))
"""
    [kept] = output_of(script)
    assert float(kept) < 4000


@pytest.mark.parametrize("order", [2, 3])
def test_python_s_threads_do_not_share_memory_for_conversions(order: float) -> None:
    sets = [parameters([torch.full((900_000,), value, dtype=torch.bfloat16)]) for value in (1.0, 2.0)]
    start = threading.Barrier(len(sets))

    def norms(made: list[Tensor]) -> set[float]:
        start.wait()
        return {fastclip.clip_grad_norm_(made, 1e9, order, norm_dtype=torch.float64).item() for _ in range(40)}

    with ThreadPoolExecutor(len(sets)) as pool:
        for value, found in zip((1.0, 2.0), pool.map(norms, sets), strict=True):
            assert sorted(found) == [pytest.approx(value * 900_000 ** (1 / order), rel=1e-6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_many_small_gradients_lie_anywhere(dtype: torch.dtype) -> None:
    """At any address; the memory around them does not change."""
    memory = torch.full((5000,), math.nan, dtype=dtype)
    places = [1, 8, 22, 29, 400, 4993, 4000, *range(1000, 1700, 7)]
    grads = [memory[place : place + 7] for place in places]
    for i, grad in enumerate(grads):
        grad.fill_(1 + i % 3)
    exact = math.sqrt(sum(7 * (1 + i % 3) ** 2 for i in range(len(grads))))
    made = parameters(grads)
    assert fastclip.clip_grad_norm_(made, 1e9, norm_dtype=torch.float64).item() == pytest.approx(exact, rel=1e-6)
    fastclip.clip_grad_norm_(made, exact / 2)
    fastclip.clip_grad_value_(made, 1.25)
    assert [grad.tolist() for grad in grads] == [
        pytest.approx([min((1 + i % 3) / 2, 1.25)] * 7, rel=2**-8) for i in range(len(grads))
    ]
    assert int(memory.isnan().sum()) == 5000 - 7 * len(grads)


def test_norms_of_zeros_are_not_negative() -> None:
    """A norm of -0 would make an infinite coefficient of the wrong sign."""
    measured = fastclip.measure_grads(parameters([torch.zeros(5), -torch.zeros(3), *[torch.zeros(2)] * 1]))
    assert measured.norms is not None
    assert not measured.norms.signbit().any()


def test_what_is_written_is_what_is_kept_track_of() -> None:
    """A cached plan writes to the gradients of the present call, not to those of an earlier one."""
    prepare._cache.__init__()  # type: ignore[misc]
    for _ in range(3):
        held = [torch.full((16,), 2.0) for _ in range(20)]
        fastclip.clip_grad_norm_(parameters(held), 1.0)
        norm = fastclip.get_total_norm(held, norm_dtype=torch.float64).item()
        assert norm == pytest.approx(1.0, rel=1e-5)
