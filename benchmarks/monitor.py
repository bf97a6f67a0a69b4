"""The cost of a monitor: the same gradients, clipped in turns with and without one.

    python -m benchmarks.monitor [--device cuda] [--steps 2000]

The table has the median host time of a step. A monitor reads the device only at the end: that time, divided by the
number of steps, is a column of its own. On a GPU the host runs ahead of the device, and syncs only then.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fastclip

WORKLOADS = {
    "10 x 1000": (10, 1000),
    "150 x 1000": (150, 1000),
    "150 x 100,000": (150, 100_000),
    "2000 x 64": (2000, 64),
}
SKIPPING = (
    fastclip.Jump("norm", z=6.0, action="skip"),
    fastclip.Jump("loss", z=6.0, action="skip"),
    fastclip.NonFinite("gradients", action="skip"),
)
WARNING = tuple(type(trigger)(**{**vars(trigger), "action": "warn"}) for trigger in SKIPPING)


def _parameters(count: int, size: int, device: str) -> list[tuple[str, Tensor]]:
    named: list[tuple[str, Tensor]] = []
    for i in range(count):
        parameter = nn.Parameter(torch.randn(size, device=device))
        parameter.grad = torch.randn(size, device=device)
        named.append((f"layer{i}.weight", parameter))
    return named


def _candidates(
    named: list[tuple[str, Tensor]], steps: int
) -> dict[str, tuple[Callable[[], object], fastclip.Monitor | None]]:
    """Return what is timed, and the monitor that is read afterwards. The bound is so large that nothing is written."""
    parameters = [parameter for _, parameter in named]
    loss = torch.ones((), device=parameters[0].device)
    rule = fastclip.ClipByGlobalNorm(1e9)

    def watched(monitor: fastclip.Monitor) -> tuple[Callable[[], object], fastclip.Monitor]:
        return lambda: monitor.update(fastclip.clip_grads_(parameters, rule), loss), monitor

    # The monitor syncs only at the end: no step is skipped, and `every` is longer than the benchmark.
    options: Any = {"history": steps + 1, "every": steps + 1, "max_skipped": steps + 1}
    return {
        "clip_grad_norm_": (lambda: fastclip.clip_grad_norm_(parameters, 1e9), None),
        "clip_grads_": (lambda: fastclip.clip_grads_(parameters, rule), None),
        "+ monitor": watched(fastclip.Monitor(named, **options)),
        "+ 3 that warn": watched(fastclip.Monitor(named, triggers=WARNING, **options)),
        "+ 3 that skip": watched(fastclip.Monitor(named, triggers=SKIPPING, **options)),
        "+ weights": watched(fastclip.Monitor(named, weights=True, **options)),
    }


def main(arguments: list[str]) -> int:
    """Measure, and print a table in microseconds.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.monitor", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args(arguments)
    print(f"torch {torch.__version__}, {options.device}, {torch.get_num_threads()} threads; microseconds a step")
    for workload, (count, size) in WORKLOADS.items():
        candidates = _candidates(_parameters(count, size, options.device), options.steps)
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(options.steps):
            for name, (step, _) in candidates.items():
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
        print(workload)
        for name, (_, monitor) in candidates.items():
            line = f"  {name:16} {median(times[name]) * 1e6:8.1f}"
            if monitor is not None:
                start = time.perf_counter()
                monitor.read()
                line += f"   reading {(time.perf_counter() - start) / options.steps * 1e6:6.1f}"
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
