"""Clipping and the optimizer's step, and clipping and a GradScaler's unscaling: separate, and in one call.

    python -m benchmarks.optimizer [--device cuda] [--rounds 21] [--only NAME]

The rows of an optimizer time a clip and a fused step: torch's clip, fastclip's before the step (`ahead`), and
fastclip's folded into it (`folded`). The rows `unscale` time the unscaling and a clip: torch's both, torch's and
fastclip's (`apart`), and fastclip's one call for both (`in one`). Each candidate has its own parameters and gradients,
with the same values, and they take turns. Times are medians, and include a sync on a GPU. "Differs" compares the
gradients after the first timed call with those of `ahead` or `apart`: the largest difference, relative to the largest
element of the tensor. It is rounding and, in torch's column, the error of its fp32 sum of squares.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import fastclip
from benchmarks.workloads import gradients_of

WORKLOADS = {
    "150 x 1000": [1000] * 150,
    "150 x 100,000": [100_000] * 150,
    "40 x 1,000,000": [1_000_000] * 40,
}
ON_CPU_ONLY = {"Adagrad"}  # which has no fused step on a GPU
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, fused=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, fused=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, fused=True),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, fused=True),
}
SCALE = 2.0**16
FAR = 1e9  # a bound above every norm


class Candidate:
    """Parameters and their optimizer. `call` is what is timed; each call has new values in the gradients."""

    def __init__(self, sizes: Sequence[int], make: Callable[[Any], Optimizer], device: str) -> None:
        self.parameters = [nn.Parameter(torch.zeros(size, device=device)) for size in sizes]
        self.optimizer = make(self.parameters)
        self.call: Callable[[], object] = self.optimizer.step
        for parameter in self.parameters:
            parameter.grad = torch.empty_like(parameter)

    @property
    def grads(self) -> list[Tensor]:
        """The parameters' gradients."""
        return gradients_of(self.parameters)

    def refill(self, values: Sequence[Tensor]) -> None:
        """Set the values of the gradients in place."""
        torch._foreach_copy_(self.grads, list(values))


def steps(sizes: Sequence[int], optimizer: str, device: str, bound: float) -> dict[str, Candidate]:
    """Return the candidates for a clip and a step."""
    torch_s, ahead, folded = (Candidate(sizes, OPTIMIZERS[optimizer], device) for _ in range(3))

    def call_of(candidate: Candidate, clip: Callable[..., object]) -> Callable[[], object]:
        return lambda: (clip(candidate.parameters, bound), candidate.optimizer.step())

    torch_s.call = call_of(torch_s, torch.nn.utils.clip_grad_norm_)
    ahead.call = call_of(ahead, fastclip.clip_grad_norm_)
    fastclip.attach(folded.optimizer, fastclip.ClipGradNorm(bound), fold=True)
    return {"torch": torch_s, "ahead": ahead, "folded": folded}


def unscaling(sizes: Sequence[int], device: str, bound: float) -> dict[str, Candidate]:
    """Return the candidates for the unscaling and a clip."""
    candidates = {name: Candidate(sizes, OPTIMIZERS["SGD"], device) for name in ("torch", "apart", "in one")}

    def call_of(candidate: Candidate, name: str) -> Callable[[], object]:
        scaler = torch.amp.GradScaler(device, init_scale=SCALE)
        scaler.scale(torch.zeros((), device=device))
        clip: Any = {"torch": torch.nn.utils.clip_grad_norm_, "apart": fastclip.clip_grad_norm_}.get(name)

        def call() -> None:
            scaler._per_optimizer_states.clear()  # as `update` does, which is not timed
            if clip is None:
                fastclip.unscale_and_clip_grad_norm_(scaler, candidate.optimizer, bound)
            else:
                scaler.unscale_(candidate.optimizer)
                clip(candidate.parameters, bound)

        return call

    for name, candidate in candidates.items():
        candidate.call = call_of(candidate, name)
    return candidates


def compare(candidates: dict[str, Candidate], values: Sequence[Tensor], device: str, rounds: int) -> str:
    """Return a row of the table: each candidate's time, and the distance of its gradients from the second one's."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    distances = dict.fromkeys(candidates, 0.0)
    for number in range(rounds + 2):
        for name, candidate in candidates.items():
            candidate.refill(values)
            _wait(device)
            start = time.perf_counter()
            candidate.call()
            _wait(device)
            times[name].append(time.perf_counter() - start)
        if number == 2:
            reference = list(candidates.values())[1].grads
            distances = {name: _distance(candidate.grads, reference) for name, candidate in candidates.items()}
    shown = [f"{name} {median(times[name][2:]) * 1e3:8.2f} ms" for name in candidates]
    return "  ".join(shown) + "   differs " + ", ".join(f"{value:.1e}" for value in distances.values())


def _distance(grads: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(grads, reference, strict=True))


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def main(arguments: list[str]) -> int:
    """Measure and print the table.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--only", default="", help="only workloads with this in their names")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}")
    device = options.device
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, medians of {options.rounds} rounds")
    chosen = {name: sizes for name, sizes in WORKLOADS.items() if options.only in name}
    optimizers = [name for name in OPTIMIZERS if device == "cpu" or name not in ON_CPU_ONLY]
    for workload, sizes in chosen.items():
        values = [torch.randn(size, device=device) for size in sizes]
        for case, bound in (("clips", 1.0), ("nothing to clip", FAR)):
            for optimizer in optimizers:
                row = compare(steps(sizes, optimizer, device, bound), values, device, options.rounds)
                print(f"{workload:14} {case:16} {optimizer:8} {row}", flush=True)
            row = compare(unscaling(sizes, device, bound), [v * SCALE for v in values], device, options.rounds)
            print(f"{workload:14} {case:16} unscale  {row}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
