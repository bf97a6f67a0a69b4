"""What NVIDIA's tools check and profile: every kernel once, or the kernels of a few clips.

compute-sanitizer --tool memcheck python -m benchmarks.profiled every-kernel
ncu --profile-from-start off python -m benchmarks.profiled clips
python -m benchmarks.profiled summary out/ncu.csv
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import torch
from torch import nn

import fastclip
from benchmarks.workloads import exact_norm, gradients_of, models, parameters_of, published

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of the bandwidth, %",
    "lts__t_sector_hit_rate.pct": "hits in L2, %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps, %",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "programs",
}
"""ncu's metrics, and their names in the summary."""


def every_kernel() -> None:
    """Run every kernel: odd sizes and addresses, small tensors and several chunks, all kinds of norms and bounds."""
    params = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for offset in (0, 1, 3):
            for size in (1, 64, 75, 280_002 // dtype.itemsize):
                memory = torch.randn(size + offset, device=DEVICE).to(dtype)
                param = nn.Parameter(torch.empty(1, dtype=dtype, device=DEVICE).expand(size))
                param.grad = memory[offset:]
                params.append(param)
    for p in (2.0, 1.0, 0.0, math.inf, -math.inf, 3.0):
        fastclip.clip_grad_norm_(params, 1e9, p)
    fastclip.clip_grad_norm_(params, 1.0)
    fastclip.clip_by_norm_(params, 0.1)
    fastclip.clip_grad_value_(params, 1e-3)
    fastclip.clip_grads_(params, fastclip.ClipByValue(-1e-4, 1e-4))
    print("all kernels ran; the norm is", fastclip.get_total_norm(gradients_of(params)).item())


def clips(*, small: bool) -> None:
    """Clip a few lists: with nothing to clip, with a bound that clips, and by value. Profile after a warm-up."""
    lists = {workload.name: workload for workload in chain(models(), published())}
    for name in ("GPT 1.3B bf16", "GPT-2 124M fp32", "ResNet-50 fp32", "10000 x 4 fp32"):
        params = parameters_of(lists[name].shrunk() if small else lists[name], DEVICE)
        exact = exact_norm(gradients_of(params))
        calls: list[Callable[[], object]] = [
            lambda params=params, exact=exact: fastclip.clip_grad_norm_(params, 2 * exact),  # type: ignore[misc]
            lambda params=params, exact=exact: fastclip.clip_grad_norm_(params, exact / 2),  # type: ignore[misc]
            lambda params=params: fastclip.clip_grad_value_(params, 1e9),  # type: ignore[misc]
        ]
        for call in calls:
            call()
        exact_now = exact_norm(gradients_of(params))
        calls[1] = lambda params=params, bound=exact_now / 2: fastclip.clip_grad_norm_(params, bound)  # type: ignore[misc]
        print(name, flush=True)
        with _profiling():
            for call in calls:
                call()


@contextmanager
def _profiling() -> Iterator[None]:
    """Let ncu profile the kernels of a block."""
    if DEVICE.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()  # type: ignore[no-untyped-call]
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]


def summary(file: Path) -> Iterator[str]:
    """Yield a line for each kernel that ncu profiled, from its CSV file."""
    lines = [line for line in file.read_text().splitlines() if line.startswith('"')]
    kernels: dict[str, list[str]] = {}
    for row in csv.DictReader(lines):
        name = METRICS.get(row["Metric Name"], row["Metric Name"])
        kernels.setdefault(row["ID"], [row["Kernel Name"][:32]]).append(
            f"{name} {row['Metric Value']} {row['Metric Unit']}".rstrip()
        )
    yield from (", ".join(parts) for parts in kernels.values())


def main(arguments: Sequence[str]) -> int:
    """Run a command.

    Returns:
        The exit status.
    """
    match list(arguments):
        case ["every-kernel"]:
            every_kernel()
        case ["clips", *rest]:
            clips(small="--small" in rest or DEVICE.type == "cpu")
        case ["summary", file]:
            print(*summary(Path(file)), sep="\n")
        case _:
            sys.exit((__doc__ or "").strip())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
