"""Time the clip in the training of a GPT on a GPU: what it adds to a step.

    python -m benchmarks.training [--small] [--out out]

A GPT of 355 M parameters (GPT-2 medium) trains on random tokens with fused AdamW: with bf16 weights, with fp32 weights
under autocast to bf16, and with fp32 weights under autocast to fp16 and a GradScaler. Ways to clip take turns, step by
step, on the same model: none at all, torch's, fastclip's and, with the scaler, unscaling and clipping in one call.
Without the scaler, fastclip's clip folded into the optimizer's step follows. Gradients are freed between steps (torch's
default) or zeroed in place. Every step clips, or none does. The columns are medians in milliseconds:

- `clip_gpu`, `clip_host`: the clip alone, on the GPU by events, and on the host until the call returns. With a scaler
  it includes `unscale_`. If folded, the scaling is part of the optimizer's step.
- `optimizer_gpu`: the optimizer's step. `step`: the whole step, until the GPU is done.

`moved` is the share of steps in which some gradient had another address than in the step before. Each row goes to
training.csv as soon as it is measured. Without a GPU, a tiny model trains on the CPU, to test the benchmark itself.
"""

from __future__ import annotations

import argparse
import csv
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastclip
from benchmarks.workloads import gradients_of

FAR = 1e9  # a bound above every norm
WARM_UP = 3  # first steps of each way, which do not count


@dataclass(frozen=True)
class Size:
    """The sizes of the model and of a batch, and the number of timed steps of each way."""

    vocabulary: int
    context: int
    layers: int
    width: int
    heads: int
    batch: int
    steps: int


LARGE = Size(50_304, 1024, 24, 1024, 16, 8, 9)
SMALL = Size(257, 16, 2, 32, 2, 2, 2)


class _Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads, width = size.heads, size.width
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        qkv = self.qkv(self.first(x)).view(batch, context, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, context, width))
        out: Tensor = x + self.down(functional.gelu(self.up(self.second(x))))
        return out


class GPT(nn.Module):
    """GPT-2, with the loss as its output."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*(_Block(size) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the mean loss of predicting each token except the first."""
        x, y = tokens[:, :-1], tokens[:, 1:]
        hidden = self.blocks(self.tokens(x) + self.places.weight[: x.shape[1]])
        logits = functional.linear(self.norm(hidden), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1), y.flatten())


@dataclass(frozen=True)
class Precision:
    """The precision of a training: the dtype of the weights, and that of autocast."""

    weights: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def is_scaled(self) -> bool:
        """Whether a GradScaler is needed: fp16 gradients underflow without it."""
        return self.autocast == torch.float16


PRECISIONS = {
    "bf16 weights": Precision(torch.bfloat16),
    "fp32 weights, autocast to bf16": Precision(torch.float32, torch.bfloat16),
    "fp32 weights, autocast to fp16, GradScaler": Precision(torch.float32, torch.float16),
}


class Training:
    """A model, its optimizer and its scaler, on one stream, so that events measure times."""

    def __init__(self, size: Size, precision: Precision, device: torch.device) -> None:
        torch.manual_seed(0)
        self.size, self.precision, self.device = size, precision, device
        self.model = GPT(size).to(device, precision.weights)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision.is_scaled)  # does nothing if not enabled
        self.places: list[int] = []

    def ways(self) -> dict[str, Callable[[float], object]]:
        """Return the ways to clip to a bound between `backward` and the optimizer's step."""
        scaler, optimizer, parameters = self.scaler, self.optimizer, self.parameters

        def after_unscaling(clip: Callable[..., object]) -> Callable[[float], object]:
            def unscale_and_clip(bound: float) -> None:
                scaler.unscale_(optimizer)
                clip(parameters, bound)

            return unscale_and_clip

        ways: dict[str, Callable[[float], object]] = {
            "none": lambda _: None,
            "torch": after_unscaling(torch.nn.utils.clip_grad_norm_),
            "fastclip": after_unscaling(fastclip.clip_grad_norm_),
        }
        if self.precision.is_scaled:
            ways["in one"] = lambda bound: fastclip.unscale_and_clip_grad_norm_(scaler, optimizer, bound)
        return ways

    def step(self, clip: Callable[[float], object], bound: float, *, frees: bool) -> Times:
        """Take a training step, and return its times."""
        tokens = torch.randint(self.size.vocabulary, (self.size.batch, self.size.context + 1), device=self.device)
        marks = _Marks(self.device)
        self.optimizer.zero_grad(set_to_none=frees)
        autocast = self.precision.autocast
        with torch.autocast(self.device.type, autocast, enabled=autocast is not None):
            loss = self.model(tokens)
        self.scaler.scale(loss).backward()
        marks.set()
        clip(bound)
        marks.set()
        self.scaler.step(self.optimizer)
        marks.set()
        self.scaler.update()
        times = marks.times()
        before, self.places = self.places, [grad.data_ptr() for grad in gradients_of(self.parameters)]
        return Times(*times, moved=before != self.places)


@dataclass(frozen=True)
class Times:
    """The times of a step in milliseconds, and whether a gradient moved since the step before."""

    clip_gpu: float
    clip_host: float
    optimizer_gpu: float
    step: float
    moved: float


class _Marks:
    """Points in time on the GPU and on the host: the start, and each call of `set`."""

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        self.events: list[torch.cuda.Event] = []
        self.walls: list[float] = []
        self._wait()
        self.set()

    def _wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def set(self) -> None:
        """Record this point in time."""
        if self.is_gpu:
            self.events.append(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]
            self.events[-1].record()
        self.walls.append(time.perf_counter() * 1e3)

    def times(self) -> tuple[float, float, float, float]:
        """Return the times of the clip on GPU and host, of the optimizer on the GPU, and of the whole step."""
        self._wait()
        end = time.perf_counter() * 1e3
        host = [b - a for a, b in pairwise(self.walls)]
        gpu = [a.elapsed_time(b) for a, b in pairwise(self.events)] if self.is_gpu else host
        return gpu[1], host[1], gpu[2], end - self.walls[0]


@dataclass(frozen=True)
class Row:
    """A line of the CSV file."""

    precision: str
    gradients: str
    bound: str
    way: str
    clip_gpu: float
    clip_host: float
    optimizer_gpu: float
    step: float
    moved: float


def rows(size: Size, device: torch.device) -> Iterator[Row]:
    """Train in all precisions, and time all ways to clip."""
    for name, precision in PRECISIONS.items():
        training = Training(size, precision, device)
        for frees, bound in product((True, False), (1e-3, FAR)):
            case = (name, "freed" if frees else "kept", "idle" if bound == FAR else "clips")
            for way, times in _times_of_ways(training, bound, frees=frees).items():
                yield Row(*case, way, *(_middle(times, field.name) for field in fields(Times)))
        del training
        gc.collect()


def _times_of_ways(training: Training, bound: float, *, frees: bool) -> dict[str, list[Times]]:
    """The times of all ways to clip to a bound, without those of the warm-up."""
    times: dict[str, list[Times]] = {}
    ways = training.ways()
    for number in range(WARM_UP + training.size.steps):
        for way, clip in ways.items():
            seen = training.step(clip, bound, frees=frees)
            if number >= WARM_UP:
                times.setdefault(way, []).append(seen)
    if not training.precision.is_scaled:
        times["folded"] = list(_folded(training, bound, frees=frees))
    return times


def _folded(training: Training, bound: float, *, frees: bool) -> Iterator[Times]:
    """Yield the times of steps with the clip folded into the optimizer, without those of the warm-up."""
    clipper = fastclip.attach(training.optimizer, fastclip.ClipGradNorm(bound), fold=True)
    try:
        for number in range(WARM_UP + training.size.steps):
            seen = training.step(lambda _: None, bound, frees=frees)
            if number >= WARM_UP:
                yield seen
    finally:
        clipper.detach()


def _middle(times: Sequence[Times], name: str) -> float:
    values = [getattr(each, name) for each in times]
    return float(statistics.mean(values)) if name == "moved" else statistics.median(values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print the rows and write them.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny model and few steps, as without a GPU")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for training.csv (default: out)")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = SMALL if options.small or device.type == "cpu" else LARGE
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}, fastclip {fastclip.__version__}, {device}; ms")
    print("  ".join(f"{field.name:10}" for field in fields(Row)))
    with (options.out / "training.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows(size, device):
            values: dict[str, Any] = asdict(row)
            writer.writerow(values)
            file.flush()
            print("  ".join(f"{v:9.3f}" if isinstance(v, float) else f"{v:10}" for v in values.values()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
