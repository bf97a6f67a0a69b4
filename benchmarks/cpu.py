"""fastclip beside torch on the CPU: the same gradients, the same threads, in one run.

    python -m benchmarks.cpu [-k "GPT-2"] [any other option of pytest]

pytest-benchmark measures; the table on top gives medians and their ratio, torch's time over fastclip's.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastclip

ROUNDS = 21


def _gpt2(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The 148 tensors of GPT-2, 124 M elements."""
    block = [(768,), (768,), (768, 2304), (2304,), (768, 768), (768,)]
    block += [(768,), (768,), (768, 3072), (3072,), (3072, 768), (768,)]
    shapes = [(50257, 768), (1024, 768), *block * 12, (768,), (768,)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


WORKLOADS: dict[str, Callable[[], list[Tensor]]] = {
    "GPT-2 124M, fp32": _gpt2,
    "GPT-2 124M, bf16": lambda: _gpt2(torch.bfloat16),
    "GPT-2 124M, fp16": lambda: _gpt2(torch.float16),
    "the demo's model, 1M": lambda: [torch.randn(144, 576) for _ in range(12)] + [torch.randn(144) for _ in range(40)],
    "2000 x 64": lambda: [torch.randn(64) for _ in range(2000)],
    "10000 x 4": lambda: [torch.randn(4) for _ in range(10_000)],
    "1 x 64": lambda: [torch.randn(64)],
}
FUNCTIONS = {"torch": torch.nn.utils.clip_grad_norm_, "fastclip": fastclip.clip_grad_norm_}


@cache
def _parameters(workload: str) -> list[Tensor]:
    _parameters.cache_clear()  # one workload at a time: the largest takes half a gigabyte
    parameters = []
    for gradient in WORKLOADS[workload]():
        parameter = torch.empty_like(gradient)
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


def _bounds(parameters: list[Tensor], clips: bool) -> Iterator[float]:
    """Bounds that never clip, or that clip every time: each below the norm that the one before it left."""
    norm = fastclip.get_total_norm([p.grad for p in parameters if p.grad is not None], norm_dtype=torch.float64).item()
    return (norm * 0.95**i if clips else norm * 2 for i in count(1))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("clips", [False, True], ids=["idle", "clipping"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_clip_grad_norm_(benchmark: Any, workload: str, clips: bool, function: str) -> None:
    """One cell of the table; `benchmark` is pytest-benchmark's fixture."""
    parameters = _parameters(workload)
    bounds = _bounds(parameters, clips)
    benchmark.pedantic(
        FUNCTIONS[function], setup=lambda: ((parameters, next(bounds)), {}), rounds=ROUNDS, warmup_rounds=2
    )


def main(arguments: list[str]) -> int:
    """Run the benchmarks and print the table of medians.

    Returns:
        pytest's exit status.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "benchmark.json"
        options = [
            "-q",
            "--benchmark-only",
            "--benchmark-disable-gc",
            "--benchmark-columns=min,median,max",
            f"--benchmark-json={report}",
        ]
        status = pytest.main([__file__, *options, *arguments])
        if report.exists():
            _print_table(json.loads(report.read_text())["benchmarks"])
    return int(status)


def _print_table(benchmarks: list[dict[str, Any]]) -> None:
    medians = {_cell(**entry["params"]): entry["stats"]["median"] * 1e3 for entry in benchmarks}
    versions = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    sys.stdout.write(f"\n{versions}\n{'gradients':22} {'':9} {'torch':>10} {'fastclip':>10} {'ratio':>6}\n")
    for workload in WORKLOADS:
        for clips in (False, True):
            theirs, ours = (medians.get(_cell(workload, clips, function)) for function in FUNCTIONS)
            if theirs and ours:
                what = "clipping" if clips else "idle"
                sys.stdout.write(f"{workload:22} {what:9} {theirs:7.3f} ms {ours:7.3f} ms {theirs / ours:6.2f}\n")


def _cell(workload: str, clips: bool, function: str) -> tuple[str, bool, str]:
    return workload, clips, function


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
