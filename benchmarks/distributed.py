"""The cost of clipping DTensors, fastclip's and torch's: collectives, their bytes, and host time, without a network.

    python -m benchmarks.distributed [triton | numpy]

One process acts as one of eight ranks, in torch's fake process group: its collectives return at once and move nothing.
So the benchmark measures host time, and counts the bytes that a network would carry. Each local shard has 8 elements.
Plain tensors of the same sizes come first: the difference is the cost of DTensors.

As in `benchmarks.counts`, fastclip launches its kernels through a stand-in driver that returns at once. torch computes
on the CPU, with arithmetic on tiny tensors. Both do around ten operations on single numbers on the CPU. With ``numpy``,
fastclip clips on the CPU, too.
"""

from __future__ import annotations

import gc
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import fastclip

WORLD = 8
COUNTS = (20, 200, 2000)
ROUNDS = 15
SECONDS = 0.02  # the least total time of calls: Python needs a few hundred calls to warm up
SHARD = (2, 4)  # the shape of a rank's local shard


class Model(NamedTuple):
    """A way to shard.

    Attributes:
        shape: The shape of the mesh; without dimensions, there are no DTensors.
        placements: The placements of the parameters, in turns.
    """

    shape: tuple[int, ...]
    placements: Sequence[tuple[Placement, ...]]


MODELS = {
    "plain tensors": Model((), [()]),
    "FSDP2": Model((8,), [(Shard(0),)]),
    "HSDP": Model((2, 4), [(Replicate(), Shard(0))]),
    "FSDP2 + tensor parallel": Model((4, 2), [(Shard(0), Shard(1)), (Shard(0), Replicate())]),
}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "torch": torch.nn.utils.clip_grad_norm_,
    "fastclip": fastclip.clip_grad_norm_,
}


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts collectives that reduce, as those of clipping do, and the bytes of one rank's input."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.collectives = 0
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operation if it is a collective. Operations on DTensors come here again, on their local shards."""
        if DTensor in types:
            return NotImplemented
        if "c10d" in func.namespace and "reduce" in func.name():
            self.collectives += 1
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self.bytes += sum(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        return func(*args, **(kwargs or {}))


def give_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give parameters new gradients, as a backward pass does. Like FSDP2, use the parameter's own spec."""
    for parameter in parameters:
        grad = torch.ones(SHARD)
        if isinstance(parameter, DTensor):
            grad = DTensor(grad, parameter._spec, requires_grad=False)  # type: ignore[no-untyped-call]
        parameter.grad = grad


def make(model: Model, count: int) -> list[nn.Parameter]:
    """Make `count` parameters of a model."""
    values = [torch.zeros(SHARD) for _ in range(count)]
    if model.shape:
        mesh = init_device_mesh("cpu", model.shape, mesh_dim_names=("a", "b")[: len(model.shape)])
        placements = [model.placements[i % len(model.placements)] for i in range(count)]
        values = [
            DTensor.from_local(value, mesh, own, run_check=False) for value, own in zip(values, placements, strict=True)
        ]
    return [nn.Parameter(value) for value in values]


def measure(function: Callable[..., Any], parameters: Sequence[nn.Parameter], *, moves: bool) -> float:
    """Return the median time of a call in seconds. If `moves`, each call gets new gradients."""
    times: list[float] = []
    give_gradients(parameters)
    while len(times) < ROUNDS + 2 or sum(times) < SECONDS:
        if moves:
            give_gradients(parameters)
        start = time.perf_counter()
        function(parameters, 1.0)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _line(name: str, model: Model, count: int) -> str:
    """Measure one row of the table."""
    parameters = make(model, count)
    cells, times = "", []
    for function in FUNCTIONS.values():
        stays, moves = (measure(function, parameters, moves=moves) for moves in (False, True))
        with Traffic() as traffic:
            function(parameters, 1.0)
        times.append((stays, moves))
        cells += f"{traffic.collectives:12} {traffic.bytes:6} {stays * 1e3:7.2f} ({moves * 1e3:6.2f})"
    theirs, ours = times
    return f"{name:24} {count:8}{cells} {theirs[0] / ours[0]:5.1f} ({theirs[1] / ours[1]:5.1f})"


def main(arguments: Sequence[str]) -> int:
    """Print the table."""
    backend = arguments[0] if arguments else "triton"
    # torch warns that its all-reduces are serialised.
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    os.environ["FASTCLIP_BACKEND"] = backend
    if backend == "triton":
        sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
        import ptxlab

        ptxlab.activate(90, execute=False)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    gc.collect()
    gc.disable()
    print(f"torch {torch.__version__}, {backend}; ms, in brackets with new gradients in each call; bytes of one rank")
    columns = "".join(f"{name:>12} {'bytes':>6} {'host time':>16}" for name in FUNCTIONS)
    print(f"{'model':24} {'DTensors':>8}{columns} {'ratio':>13}")
    for (name, model), count in product(MODELS.items(), COUNTS):
        print(_line(name, model, count), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
