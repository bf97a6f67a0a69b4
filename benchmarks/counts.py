"""Count launches, copies, allocations, syncs and host time of a call of `clip_grad_norm_`, fastclip's and torch's.

    python -m benchmarks.counts [number of gradients ...]

A second table has the rules of `clip_grads_`: fixed ones, and the adaptive ones that take their place. There torch's
own operations count, too: each is a small launch on a GPU.

With a GPU, torch's profiler and memory statistics count. Without one, fastclip launches its kernels through a stand-in
driver (`tests/ptxlab`, which needs gcc and Linux). It counts them and returns at once, so fastclip's host time is the
real one without the driver's own. torch has no such driver. Its launches are then *derived* from the limits of
`multi_tensor_apply` (see `foreach_launches`). Its time is that of its foreach functions on the CPU, with arithmetic on
tiny tensors: a reference, not its host time with a GPU.

The gradients are small: of all figures, only torch's launches depend on their size.
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
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastclip
from benchmarks.steps import RULES, clip_by
from fastclip.foundation.devices import upload

COUNTS = (1, 10, 100, 1000, 2000, 10_000)
ROUNDS = 15
FOREACH = partial(torch.nn.utils.clip_grad_norm_, foreach=True)
SECONDS = 0.02  # the least total time of calls if gradients stay: Python needs a few hundred calls to warm up
MOVES = 64  # places of the gradients in their memory, each used once

_FP32, _BF16, _FP16, _FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
SHAPES: dict[str, list[tuple[int, torch.dtype]]] = {
    "uniform": [(4, _FP32)],
    # a small transformer block: two norms, attention, and a gated feed-forward layer
    "LLM-shaped": [(n, _BF16) for n in (64, 64 * 96, 64 * 64, 64, 64 * 176, 64 * 176, 176 * 64)],
    "mixed dtypes": [(4, _FP32), (4, _BF16), (4, _FP16), (4, _FP64)],
}


@dataclass
class Counts:
    """The costs of one call.

    Attributes:
        launches: Launches of fastclip's kernels; on a GPU, of all.
        operations: Torch's operations that compute or write something; without a GPU only.
        copies: Copies from the host to the device.
        allocations: Allocations on the device.
        syncs: Waits of the host for the device.
        microseconds: Host time.
    """

    launches: int = 0
    operations: int = 0
    copies: int = 0
    allocations: int = 0
    syncs: int = 0
    microseconds: float = 0.0


class Gradients:
    """Parameters with gradients in one piece of memory, in which they can move between calls."""

    def __init__(self, count: int, shapes: Sequence[tuple[int, torch.dtype]], device: str) -> None:
        self.entries = list(islice(cycle(shapes), count))
        self.spans = [-(-numel * dtype.itemsize // 16) * 16 for numel, dtype in self.entries]
        self.memory = torch.zeros(sum(self.spans) + 16 * MOVES, dtype=torch.uint8, device=device)
        self.parameters = [nn.Parameter(torch.zeros(n, dtype=dtype, device=device)) for n, dtype in self.entries]
        self.place = 0
        self.settle()

    def settle(self) -> None:
        """Give each parameter a gradient 16 bytes after its last one, at an address that was not used before."""
        start = self.place = self.place + 16
        for parameter, (numel, dtype), span in zip(self.parameters, self.entries, self.spans, strict=True):
            parameter.grad = self.memory[start : start + numel * dtype.itemsize].view(dtype)
            start += span


# ---- Counting


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not annotate it
    """Counts the allocations and syncs that torch's operations would cause on a GPU."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        made = {tensor.untyped_storage().data_ptr() for tensor in tree_leaves(result) if _is_tensor(tensor)}
        self.counts.allocations += len(made - known)
        self.counts.operations += func._schema.is_mutable or (
            bool(made - known) and func.overloadpacket not in _ALLOCATIONS
        )
        self.counts.syncs += func is torch.ops.aten._local_scalar_dense.default
        return result


_ALLOCATIONS = tuple(getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty"))
"""Torch's operations that make a tensor and launch nothing."""


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


@contextmanager
def _counting_uploads(counts: Counts) -> Iterator[None]:
    """Count fastclip's uploads. Each is a copy into new memory, but on the CPU it is no torch operation."""

    def counted(array: npt.NDArray[Any], device: torch.device) -> Tensor:
        counts.copies += 1
        counts.allocations += 1
        return upload(array, device)

    with patch("fastclip.backends.triton.upload", counted):
        yield


def _count_without_gpu(call: Callable[[], object], settle: Callable[[], object]) -> Counts:
    import ptxlab

    with _Operations(Counts()):  # plans that were cached without a dispatch mode are not used under one
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
        torch.cuda.set_sync_debug_mode("warn")  # this call itself warns that it is a prototype
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
    """The number of launches of torch 2.13's foreach clip, derived from its source.

    A launch of `multi_tensor_apply` takes up to `tensors` tensors and `blocks` chunks of 65,536 elements, of one dtype:
    110 and 320 if built with CUDA 12, 770 and 2240 with CUDA 13. It computes the norms and scales. If there are several
    dtypes, each tensor with another dtype than the coefficient is scaled by a launch of its own. `stack` adds one for
    each 128 norms, and the total and the coefficient add about 7 small kernels.
    """
    groups = [[n for n, dtype in grads if dtype == wanted] for wanted in {dtype for _, dtype in grads}]
    norms = sum(_multi_tensor_launches(group, tensors, blocks) for group in groups)
    total_dtype = grads[0][1]
    for _, dtype in grads:
        total_dtype = torch.promote_types(total_dtype, dtype)
    alike = len(groups) == 1
    scaling = norms if alike else sum(dtype != total_dtype for _, dtype in grads) + 1
    return norms + scaling + -(-len(grads) // 128) + 7


def _multi_tensor_launches(numels: Sequence[int], tensors: int, blocks: int) -> int:
    """The number of launches of `multi_tensor_apply` for tensors of one dtype."""
    launches, used_tensors, used_blocks = 1, 0, 0
    for numel in numels:
        left = -(-numel // 65_536)
        if used_tensors == tensors:
            launches, used_tensors, used_blocks = launches + 1, 0, 0
        used_tensors += 1
        while left > blocks - used_blocks:
            launches, left, used_tensors, used_blocks = launches + 1, left - (blocks - used_blocks), 1, 0
        used_blocks += left
    return launches


# ---- Measuring


def measure(clip: Callable[..., Tensor], grads: Gradients, *, moved: bool, count: Callable[..., Counts]) -> Counts:
    """Count one call, and time others after a warm-up. The time is host time: nothing waits for the GPU."""

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
    """Print the table. Return fastclip's and torch's counts, a pair for each row."""
    with _kernels() as device:
        return list(_rows(numbers, device))


@contextmanager
def _kernels() -> Iterator[str]:
    """Have the kernels launched on a GPU or through the stand-in driver, without a garbage collection between."""
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
        yield "cuda" if on_gpu else "cpu"
    finally:
        gc.enable()
        if forced is None:
            del os.environ["FASTCLIP_BACKEND"]
        else:
            os.environ["FASTCLIP_BACKEND"] = forced
        if not on_gpu:
            ptxlab.deactivate()


def rules(numbers: Sequence[int] = (10, 100)) -> dict[tuple[int, str], Counts]:
    """Print the table of rules. Return the counts for each number of gradients and each rule."""
    found = {}
    with _kernels() as device:
        count = _count_on_gpu if device == "cuda" else _count_without_gpu
        print(f"\n{'gradients':>9} {'rule':28} launches operations copies allocs syncs  host us")
        for number, (name, make) in product(numbers, RULES.items()):
            grads, rule = Gradients(number, SHAPES["LLM-shaped"], device), make()
            for parameter in grads.parameters:
                _give_rows(parameter, 32)
            counts = found[number, name] = measure(clip_by(rule), grads, moved=False, count=count)
            print(
                f"{number:9} {name:28} {counts.launches:8} {counts.operations:10} {counts.copies:6} "
                f"{counts.allocations:6} {counts.syncs:5} {counts.microseconds:8.0f}",
                flush=True,
            )
    return found


def _give_rows(parameter: nn.Parameter, columns: int) -> None:
    """Make a long vector and its gradient matrices, which have units."""
    grad, parameter.grad = parameter.grad, None
    shape = (-1, columns) if parameter.numel() > 2 * columns else (-1,)
    parameter.data = parameter.data.view(shape)
    parameter.grad = None if grad is None else grad.view(shape)


def _rows(numbers: Sequence[int], device: str) -> Iterator[tuple[Counts, Counts]]:
    count = _count_on_gpu if device == "cuda" else _count_without_gpu
    where = torch.cuda.get_device_name() if device == "cuda" else "a stand-in driver; torch on the CPU"
    print(f"fastclip {fastclip.__version__}, torch {torch.__version__}, {where}")
    print(f"{'':32}{'fastclip':^38} {'torch, foreach':^48}")
    shared = f"{'allocs':>6} {'syncs':>5} {'host us':>8}"
    print(
        f"{'gradients':>9} {'':21} {'launches':>8} {'copies':>6} {shared} {'launches, CUDA 12/13':>20} {shared}  ratio"
    )
    memories = []  # alive until the end, so that no later gradients get the same addresses
    for number, (name, shapes), moved in product(numbers, SHAPES.items(), (False, True)):
        grads = Gradients(number, shapes, device)
        memories.append(grads.memory)
        ours, theirs = (measure(clip, grads, moved=moved, count=count) for clip in (fastclip.clip_grad_norm_, FOREACH))
        derived = f"{foreach_launches(grads.entries, 110, 320)}/{foreach_launches(grads.entries, 770, 2240)} derived"
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
    rules()
