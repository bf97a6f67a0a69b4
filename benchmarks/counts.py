"""What a call of `clip_grad_norm_` asks of the host and the driver, beside torch's: launches, copies, memory, time.

    python -m benchmarks.counts [number of gradients ...]

With a GPU everything is counted there, by torch's profiler and its statistics. Without one, fastclip's kernels are
launched through a stand-in driver (`tests/ptxlab`, which needs gcc and Linux) that counts them and returns at once, so
that fastclip's host time is what it would be but for the driver's own. torch has no such driver: its launches are then
*derived* from the limits of `multi_tensor_apply`, as `foreach_launches` tells, and its time is that of its foreach
functions on the CPU, arithmetic on tiny tensors included: a yardstick, not its time with a GPU.

The gradients are small, since none of this depends on their size but for torch's launches.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastclip
from fastclip.foundation.devices import upload

COUNTS = (1, 10, 100, 1000, 2000, 10_000)
ROUNDS = 15
FOREACH = partial(torch.nn.utils.clip_grad_norm_, foreach=True)
SECONDS = 0.02  # of calls at least, where gradients stay: Python takes a few hundred to be at its speed
MOVES = 64  # places of the gradients in their memory, each used once

_FP32, _BF16, _FP16, _FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES: dict[str, list[tuple[int, torch.dtype]]] = {
    "uniform": [(4, _FP32)],
    # a block of a transformer in miniature: two norms, attention, and a gated feed-forward layer
    "LLM-shaped": [(n, _BF16) for n in (64, 64 * 96, 64 * 64, 64, 64 * 176, 64 * 176, 176 * 64)],
    "mixed dtypes": [(4, _FP32), (4, _BF16), (4, _FP16), (4, _FP64)],
}


@dataclass
class Counts:
    """What one call asks for: kernels, host-to-device copies, device memory, waits for the device; and its µs."""

    launches: int = 0
    copies: int = 0
    allocations: int = 0
    syncs: int = 0
    microseconds: float = 0.0


class Gradients:
    """Parameters whose gradients lie in one piece of memory, and can be somewhere else in it for each call."""

    def __init__(self, count: int, shapes: Sequence[tuple[int, torch.dtype]], device: str) -> None:
        self.entries = list(islice(cycle(shapes), count))
        self.spans = [-(-numel * dtype.itemsize // 16) * 16 for numel, dtype in self.entries]
        self.memory = torch.zeros(sum(self.spans) + 16 * MOVES, dtype=torch.uint8, device=device)
        self.parameters = [nn.Parameter(torch.zeros(n, dtype=dtype, device=device)) for n, dtype in self.entries]
        self.place = 0
        self.settle()

    def settle(self) -> None:
        """Give each parameter its gradient, 16 bytes behind where the last one was: memory that was not seen before."""
        start = self.place = self.place + 16
        for parameter, (numel, dtype), span in zip(self.parameters, self.entries, self.spans, strict=True):
            parameter.grad = self.memory[start : start + numel * dtype.itemsize].view(dtype)
            start += span


# ---- Counting


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Counts torch's operations that allocate or wait, by what they do on a GPU."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        made = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(result) if _is_tensor(tensor)}
        self.counts.allocations += len(made - known)
        self.counts.syncs += func is torch.ops.aten._local_scalar_dense.default
        return result


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


@contextmanager
def _counting_uploads(counts: Counts) -> Iterator[None]:
    """Count fastclip's uploads, each a copy into new memory, which on the CPU are no operations at all."""

    def counted(array: npt.NDArray[Any], device: torch.device) -> Tensor:
        counts.copies += 1
        counts.allocations += 1
        return upload(array, device)

    with patch("fastclip.backends.triton.upload", counted):
        yield


def _count_without_gpu(call: Callable[[], object], settle: Callable[[], object]) -> Counts:
    import ptxlab

    with _Operations(Counts()):  # since what is kept for gradients is not used again under a dispatch mode
        call()
    settle()
    counts = Counts()
    before = ptxlab.launches()
    with _counting_uploads(counts), _Operations(counts):
        call()
    counts.launches = ptxlab.launches() - before
    return counts


def _count_on_gpu(call: Callable[[], object], settle: Callable[[], object]) -> Counts:
    settle()
    torch.cuda.synchronize()
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with warnings.catch_warnings(record=True) as waits:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")  # which itself warns that it is a prototype
        waits.clear()
        try:
            with torch.profiler.profile(activities=activities) as profile:
                call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    allocated = torch.cuda.memory_stats()["allocation.all.allocated"] - allocated
    on_device = [event.name for event in profile.events() or () if event.device_type.name == "CUDA"]
    copies = sum(name.startswith("Memcpy HtoD") for name in on_device)
    kernels = sum(not name.startswith("Memcpy") for name in on_device)
    return Counts(kernels, copies, allocated, sum("synchroniz" in str(wait.message) for wait in waits))


def foreach_launches(grads: Sequence[tuple[int, torch.dtype]], tensors: int, blocks: int) -> int:
    """The launches of torch 2.13's clip by foreach, derived from its source.

    `multi_tensor_apply` takes up to `tensors` tensors and `blocks` chunks of 65,536 elements a launch, of one dtype:
    110 and 320 when built with CUDA 12, 770 and 2240 with CUDA 13. It is launched for the norms and for the scaling.
    With more than one dtype the scaling is one launch a tensor, for those that are not of the coefficient's. To that
    come `stack`, for each 128 norms, and about 7 small kernels for the total and the coefficient.
    """
    groups = [[n for n, dtype in grads if dtype == wanted] for wanted in {dtype for _, dtype in grads}]
    norms = 0
    for group in groups:
        used_tensors = used_blocks = 0
        norms += 1
        for numel in group:
            left = -(-numel // 65_536)
            if used_tensors == tensors:
                norms, used_tensors, used_blocks = norms + 1, 0, 0
            used_tensors += 1
            while left > blocks - used_blocks:
                norms, left, used_tensors, used_blocks = norms + 1, left - (blocks - used_blocks), 1, 0
            used_blocks += left
    total_dtype = grads[0][1]
    for _, dtype in grads:
        total_dtype = torch.promote_types(total_dtype, dtype)
    alike = len(groups) == 1
    scaling = norms if alike else sum(dtype != total_dtype for _, dtype in grads) + 1
    return norms + scaling + -(-len(grads) // 128) + 7


# ---- Measuring


def measure(clip: Callable[..., Tensor], grads: Gradients, *, moved: bool, count: Callable[..., Counts]) -> Counts:
    """Count one call, and time others, after some to warm up. The host's time: nothing waits for the GPU."""

    def call() -> None:
        clip(grads.parameters, 1.0)

    times: list[float] = []
    while len(times) < ROUNDS + 2 or (not moved and sum(times) < SECONDS):
        if moved:
            grads.settle()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    counts = count(call, grads.settle if moved else lambda: None)
    counts.microseconds = statistics.median(times[2:]) * 1e6
    return counts


def main(numbers: Sequence[int] = COUNTS) -> list[tuple[Counts, Counts]]:
    """Print the table, and return fastclip's and torch's counts, a row each."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        import ptxlab

        ptxlab.activate(90, execute=False)
    forced = os.environ.get("FASTCLIP_BACKEND")
    os.environ["FASTCLIP_BACKEND"] = "triton"
    gc.collect()
    gc.disable()
    try:
        return list(_rows(numbers, "cuda" if on_gpu else "cpu"))
    finally:
        gc.enable()
        if forced is None:
            del os.environ["FASTCLIP_BACKEND"]
        else:
            os.environ["FASTCLIP_BACKEND"] = forced
        if not on_gpu:
            ptxlab.deactivate()


def _rows(numbers: Sequence[int], device: str) -> Iterator[tuple[Counts, Counts]]:
    count = _count_on_gpu if device == "cuda" else _count_without_gpu
    where = torch.cuda.get_device_name() if device == "cuda" else "a stand-in driver; torch on the CPU"
    print(f"fastclip {fastclip.__version__}, torch {torch.__version__}, {where}")
    print(f"{'':32}{'fastclip':^38} {'torch, foreach':^48}")
    shared = f"{'allocs':>6} {'syncs':>5} {'host us':>8}"
    print(
        f"{'gradients':>9} {'':21} {'launches':>8} {'copies':>6} {shared} {'launches, CUDA 12/13':>20} {shared}  ratio"
    )
    memories = []  # kept, lest later gradients lie where earlier ones did and are found not to have moved
    for number in numbers:
        for name, shapes in SHAPES.items():
            for moved in (False, True):
                grads = Gradients(number, shapes, device)
                memories.append(grads.memory)
                ours, theirs = (
                    measure(clip, grads, moved=moved, count=count) for clip in (fastclip.clip_grad_norm_, FOREACH)
                )
                entries = list(islice(cycle(shapes), number))
                derived = f"{foreach_launches(entries, 110, 320)}/{foreach_launches(entries, 770, 2240)} derived"
                launches = str(theirs.launches) if device == "cuda" else derived
                print(
                    f"{number:9} {name:14} {'moved' if moved else 'stay':6} "
                    f"{ours.launches:8} {ours.copies:6} {ours.allocations:6} {ours.syncs:5} {ours.microseconds:8.0f} "
                    f"{launches:>20} {theirs.allocations:6} {theirs.syncs:5} {theirs.microseconds:8.0f} "
                    f"{theirs.microseconds / ours.microseconds:6.1f}",
                    flush=True,
                )
                yield ours, theirs


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or COUNTS)
