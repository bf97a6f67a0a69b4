"""Time the clip alone, in real training steps: the time that a user waits for.

    python -m benchmarks.steps [--seconds 3] [--markdown | --rules] [name ...]

Each model trains: zero_grad, forward, backward, the clip, the optimizer's step. torch's clip and fastclip's take turns,
step by step. Only that call is timed, on a list of the parameters. Before it, `model.parameters()` walks the modules,
which takes the same time for both and is a column of its own (`walk`). So caches are cold and gradients newly
allocated, as in training. They are not in a loop that does nothing but clip (`benchmarks.cpu`).

Gradients are freed between steps (`zero_grad(set_to_none=True)`, torch's default) or zeroed in place. The bound is a
hundredth of the previous norm, so that every step clips, or far above it. The first steps do not count. Times are
medians, and a ratio is torch's time over fastclip's. The exit status tells whether everything ran, not how fast.

With `--rules`, the rules of `clip_grads_` take turns instead: fixed ones, and the adaptive ones in their place.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastclip
from benchmarks.workloads import gradients_of

UNTIMED = 20  # steps at the start
LEAST = 30  # timed steps of each contender, however long they take
FAR = 1e9  # a bound above every norm

CLIPS: dict[str, Callable[..., Tensor]] = {
    "torch": torch.nn.utils.clip_grad_norm_,
    "fastclip": fastclip.clip_grad_norm_,
}


def _mlp(widths: Sequence[int]) -> nn.Module:
    layers = [layer for inputs, outputs in pairwise(widths) for layer in (nn.Linear(inputs, outputs), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


class _LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(64, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x)[0][:, -1])
        return out


def _conv_net() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 10))


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 6, enable_nested_tensor=False), nn.Flatten(), nn.LazyLinear(10))


class _GPT(nn.Module):
    """A GPT: as in examples/demo.py, or a quarter of GPT-2 with half of its width."""

    def __init__(self, vocabulary: int, context: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(context, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = functional.linear(
            self.layers(self.token(x) + self.position[: x.shape[1]])[:, -1], self.token.weight
        )
        return out


class _Residual(nn.Module):
    """A deep and narrow network of 300 small tensors."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 24)) for _ in range(50)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return x


@dataclass(frozen=True)
class Model:
    """A row of the table.

    Attributes:
        make: Makes the model.
        batch: Makes its input.
        bars: The target ratios: clipping, and idle.
        dtype: The dtype of the model.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Tensor]
    bars: tuple[float, float] = (1.3, 1.5)
    dtype: torch.dtype = torch.float32


_SMALL, _MANY, _MEDIUM, _BF16 = (2.5, 2.5), (4.0, 4.0), (1.6, 2.2), (2.0, 3.0)

MODELS = {
    "actor 64x64": Model(lambda: _mlp([8, 64, 64, 2]), lambda: torch.randn(64, 8), _SMALL),
    "critic 256x256": Model(lambda: _mlp([17, 256, 256, 1]), lambda: torch.randn(64, 17), _SMALL),
    "MLP 512 x 8": Model(lambda: _mlp([512] * 9), lambda: torch.randn(32, 512), _MEDIUM),
    "MLP 1024 x 8": Model(lambda: _mlp([1024] * 9), lambda: torch.randn(32, 1024), _MEDIUM),
    "LSTM 2x256": Model(_LSTM, lambda: torch.randn(16, 20, 64)),
    "conv net": Model(_conv_net, lambda: torch.randn(16, 3, 32, 32)),
    "encoder 6x256": Model(_encoder, lambda: torch.randn(4, 32, 256), _MEDIUM),
    "encoder 6x256, bf16": Model(_encoder, lambda: torch.randn(4, 32, 256), _BF16, torch.bfloat16),
    "the demo's GPT": Model(lambda: _GPT(256, 64, 4, 144, 4), lambda: torch.randint(256, (8, 64)), _MEDIUM),
    "GPT-2, a quarter": Model(lambda: _GPT(50257, 64, 6, 384, 6), lambda: torch.randint(50257, (1, 16))),
    "300 small tensors": Model(_Residual, lambda: torch.randn(32, 24), _MANY),
}


class Training:
    """A model, its optimizer and a batch."""

    def __init__(self, model: Model) -> None:
        torch.manual_seed(0)
        batch = model.batch()
        self.batch = batch.to(model.dtype) if batch.is_floating_point() else batch
        self.module = model.make()
        self.module(batch)  # gives lazy layers their sizes
        self.module.to(model.dtype)
        self.target = torch.zeros_like(self.module(self.batch))
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3)
        self.norm = 0.0  # of the gradients, before the last clip
        self.walks: list[float] = []  # seconds to list the parameters

    def step(self, clip: Callable[..., Tensor], *, clips: bool, frees: bool) -> float:
        """Take a training step, and return the seconds of its clip."""
        self.optimizer.zero_grad(set_to_none=frees)
        functional.mse_loss(self.module(self.batch), self.target).backward()  # type: ignore[no-untyped-call]
        bound = self.norm / 100 if clips else FAR
        start = perf_counter()
        parameters = list(self.module.parameters())
        listed = perf_counter()
        norm = clip(parameters, bound)
        seconds = perf_counter() - listed
        self.walks.append(listed - start)
        self.norm = norm.item()
        self.optimizer.step()
        return seconds

    def norm_now(self) -> float:
        """Return the norm of the gradients after the last step."""
        grads = gradients_of(self.module.parameters())
        return fastclip.get_total_norm(grads, norm_dtype=torch.float64).item()


@dataclass(frozen=True)
class Cell:
    """Median seconds of both contenders and of listing the parameters, and the target ratio."""

    torch: float
    fastclip: float
    walk: float
    bar: float

    @property
    def ratio(self) -> float:
        """The ratio of torch's time to fastclip's."""
        return self.torch / self.fastclip


def take_turns(
    training: Training, contenders: Mapping[str, Callable[..., Tensor]], seconds: float, **setting: bool
) -> list[float]:
    """Train for about `seconds`, and return the median seconds of each clip."""
    training.step(CLIPS["torch"], clips=False, frees=True)  # sets the first norm
    times: dict[str, list[float]] = {name: [] for name in contenders}
    start = perf_counter()
    while min(map(len, times.values())) < UNTIMED + LEAST or perf_counter() - start < seconds:
        for name, clip in contenders.items():
            times[name].append(training.step(clip, **setting))
    return [median(of_one[UNTIMED:]) for of_one in times.values()]


def measure(model: Model, *, clips: bool, frees: bool, seconds: float) -> Cell:
    """Train for about `seconds`, and time both clips."""
    training = Training(model)
    theirs, ours = take_turns(training, CLIPS, seconds, clips=clips, frees=frees)
    return Cell(theirs, ours, median(training.walks), model.bars[0 if clips else 1])


RULES: dict[str, Callable[[], Any]] = {
    "ClipGradNorm, global": lambda: fastclip.ClipGradNorm(1.0),
    "ClipByQuantile, global": fastclip.ClipByQuantile,
    "ClipByZScore, global": fastclip.ClipByZScore,
    "ClipByEMA, global": partial(fastclip.ClipByEMA, by="global"),
    "ClipByNorm, parameter": lambda: fastclip.ClipByNorm(1.0),
    "ClipByQuantile, parameter": partial(fastclip.ClipByQuantile, window=100, by="parameter"),
    "ClipByZScore, parameter": partial(fastclip.ClipByZScore, by="parameter"),
    "ClipByEMA, parameter": fastclip.ClipByEMA,
    "ClipByWeightNorm, parameter": fastclip.ClipByWeightNorm,
    "ClipByWeightNorm, unit": partial(fastclip.ClipByWeightNorm, by="unit"),
}


def clip_by(rule: Any) -> Callable[..., Tensor]:
    """Return a function of parameters and a bound, which it ignores, that clips by a rule and returns the norm."""
    return lambda parameters, _: fastclip.clip_grads_(parameters, rule).norm


def measure_rules(model: Model, seconds: float) -> dict[str, float]:
    """Train for about `seconds`; return the median seconds of `clip_grad_norm_`, and of `clip_grads_` by each rule."""
    contenders = {"clip_grad_norm_": CLIPS["fastclip"], **{name: clip_by(make()) for name, make in RULES.items()}}
    times = take_turns(Training(model), contenders, seconds, clips=False, frees=True)
    return dict(zip(contenders, times, strict=True))


def _line(name: str, frees: bool, cells: Sequence[Cell], *, markdown: bool) -> str:
    module = Training(MODELS[name]).module
    sizes = [parameter.numel() for parameter in module.parameters()]
    if markdown:
        figures = " | ".join(f"{1e6 * c.torch:,.0f} | {1e6 * c.fastclip:,.0f} | **{c.ratio:.2f}**" for c in cells)
        return f"| {name} | {len(sizes)} | {sum(sizes):,} | {figures} | {1e6 * cells[0].walk:,.0f} |"
    figures = "".join(
        f"{1e6 * cell.torch:10.1f} {1e6 * cell.fastclip:9.1f} {cell.ratio:6.2f} {cell.bar:4} "
        f"{'' if cell.ratio >= cell.bar else 'missed':6}"
        for cell in cells
    )
    grads = "freed" if frees else "zeroed"
    return f"{name:20} {grads:6} {len(sizes):4} {sum(sizes):11,}{1e6 * cells[0].walk:7.1f}{figures}".rstrip()


def _rows(names: Sequence[str], seconds: float, *, markdown: bool) -> Iterator[tuple[str, list[Cell]]]:
    for name in names:
        for frees in (True,) if markdown else (True, False):
            cells = [measure(MODELS[name], clips=clips, frees=frees, seconds=seconds) for clips in (True, False)]
            yield _line(name, frees, cells, markdown=markdown), cells


def main(arguments: list[str]) -> list[Cell]:
    """Print the table, and return its cells; none with `--rules`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps", description="The clip inside of training steps."
    )
    parser.add_argument("name", nargs="*", help=f"some of: {'; '.join(MODELS)}")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to train for each figure")
    parser.add_argument("--markdown", action="store_true", help="print a table for the README, of freed gradients")
    parser.add_argument("--rules", action="store_true", help="time the rules of clip_grads_ instead")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.name) - set(MODELS))
    if unknown:
        parser.error(f"there is no {unknown[0]!r}, but {'; '.join(MODELS)}")
    cpu = fastclip.info().devices[0]
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {cpu.hardware}; {cpu.backend}: {cpu.reason}")
    if options.rules:
        for name in options.name or list(MODELS):
            seconds = measure_rules(MODELS[name], options.seconds * len(RULES))
            print(name, *(f"{1e6 * each:10.1f} us  {rule}" for rule, each in seconds.items()), sep="\n", flush=True)
        return []
    if options.markdown:
        print("| in the step, µs | tensors | elements | clipping: torch | fastclip | ratio ", end="")
        print("| idle: torch | fastclip | ratio | walk |\n|---" + "|--:" * 9 + "|")
    else:
        head = f"{'torch':>10} {'fastclip':>9} {'ratio':>6} {'bar':>4} {'':6}"
        print(f"{'us':20} {'grads':6} {'':4} {'elements':>11} {'walk':>6}  {'clipping':38}  idle\n{'':50}{head}{head}")
    found: list[Cell] = []
    for line, cells in _rows(options.name or list(MODELS), options.seconds, markdown=options.markdown):
        print(line, flush=True)
        found += cells
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
