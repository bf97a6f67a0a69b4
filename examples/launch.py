"""Shared code of the distributed examples: start processes on this machine's CPU, and compare the results."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn

PROCESSES = 4


class Run(NamedTuple):
    """The results of a run, one value for each step.

    Attributes:
        losses: The mean loss over all data, before the step.
        norms: The norm of all gradients, before clipping.
    """

    losses: list[float]
    norms: list[float]


def train_alone(
    model: nn.Module, data: tuple[Tensor, Tensor], learning_rate: float, max_norm: float, steps: int
) -> Run:
    """Train in this process, on inputs and targets, with torch's own clipping."""
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    x, target = data
    run = Run([], [])
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()  # type: ignore[no-untyped-call]
        run.norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item())
        optimizer.step()
        run.losses.append(loss.item())
    return run


def main(
    description: str | None, train: Callable[[int], Run], alone: Callable[[int], Run], arguments: Sequence[str]
) -> int:
    """Train on four processes and in this one, and print losses and norms side by side.

    Args:
        description: The example's docstring. Its first line is the help text.
        train: Trains for a number of steps. Every process calls it, in a gloo process group.
        alone: Does the same in one process, in fp64.
        arguments: The command line's arguments.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args(arguments).steps
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        given = (train, steps, str(Path(folder) / "store"), str(results))
        multiprocessing.spawn(_run_rank, given, PROCESSES)  # type: ignore[attr-defined, no-untyped-call]
        losses, norms = torch.load(results)
    expected = alone(steps)
    print(f"step   loss on {PROCESSES}   alone, fp64   norm on {PROCESSES}   alone, fp64")
    for step, (loss, other, norm, other_norm) in enumerate(
        zip(losses, expected.losses, norms, expected.norms, strict=True), start=1
    ):
        print(f"{step:4} {loss:11.6f} {other:13.6f} {norm:11.6f} {other_norm:13.6f}")
    print(f"The losses differ by at most {_difference(losses, expected.losses):.1e} of their size,")
    print(f"the norms by {_difference(norms, expected.norms):.1e}.")
    return 0


def _run_rank(rank: int, train: Callable[[int], Run], steps: int, store: str, results: str) -> None:
    """Train as one of the processes. The first one saves its results to a file."""
    torch.set_num_threads(1)
    rendezvous = dist.FileStore(store, PROCESSES)  # type: ignore[attr-defined]  # not in torch's stubs
    dist.init_process_group("gloo", store=rendezvous, rank=rank, world_size=PROCESSES)
    run = train(steps)
    if rank == 0:
        torch.save(tuple(run), results)
    dist.destroy_process_group()


def _difference(found: Sequence[float], expected: Sequence[float]) -> float:
    return max(abs(own - other) / abs(other) for own, other in zip(found, expected, strict=True))
