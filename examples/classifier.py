"""An image classifier, trained with and without clipping. Its training does not diverge.

    python examples/classifier.py

Network and loop are those of PyTorch's CIFAR-10 tutorial: batches of 4, SGD with a learning rate of 0.001 and momentum
0.9. If `--data` contains CIFAR-10 (the folder `cifar-10-batches-py`), the network learns that. Nothing is downloaded.
Otherwise it learns scikit-learn's handwritten digits. These are 8 x 8 and grey: enlarged by four, with three equal
channels, they fit the same network.

The gradients are clipped by value to [-1, 1], or by norm to 2, by the rules of torch's `clip_grad_value_` and
`clip_grad_norm_`. A run that is stable without clipping shows what a threshold costs: how often it clips, and how the
accuracy changes.
"""

from __future__ import annotations

import argparse
import pickle
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from progress import save, show
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional

import fastclip

BATCH = 4
LEARNING_RATE = 0.001
MOMENTUM = 0.9
SMOOTHING = 100  # steps: a point in the picture is their mean

CLIPS: dict[str, Callable[[nn.Module], fastclip.ClipResult]] = {
    "unclipped": fastclip.measure_grads,
    "by value, 1.0": lambda model: fastclip.clip_grads_(model, fastclip.ClipByValue(-1.0, 1.0)),
    "by norm, 2.0": lambda model: fastclip.clip_grads_(model, fastclip.ClipGradNorm(2.0)),
}
COLORS = ("#f2a65a", "#c8553d", "#1b3a5c")
WIDTHS = (5.0, 1.5, 1.5)  # the first two curves almost coincide


class Images(NamedTuple):
    """Images with values from -1 to 1, [images, 3, 32, 32], and their classes, [images]."""

    name: str
    train: Tensor
    train_classes: Tensor
    test: Tensor
    test_classes: Tensor


class ArraysOnly(pickle.Unpickler):
    """Reads pickles of NumPy arrays, such as CIFAR-10's. It raises if a pickle would call anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function of the pickle.

        Raises:
            pickle.UnpicklingError: NumPy does not need it to make an array.
        """
        if (module, name) not in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        }:
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a NumPy array")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


class Network(nn.Module):
    """Two convolutions and three linear layers."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.linear = nn.Sequential(
            nn.Linear(16 * 5 * 5, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return a score for each class."""
        scores: Tensor = self.linear(self.convolutions(images).flatten(1))
        return scores


@dataclass
class Run:
    """The results of a run: one value for each step, and the accuracy at the end."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # before clipping
    clipped: list[bool] = field(default_factory=list)
    accuracy: float = 0.0


def read_cifar10(folder: Path) -> Images:
    """Read CIFAR-10 in its authors' format for Python: rows of 3072 bytes, red, green and blue."""

    def read(names: list[str]) -> tuple[Tensor, Tensor]:
        batches = []
        for name in names:
            with (folder / name).open("rb") as file:
                batches.append(ArraysOnly(file, encoding="bytes").load())
        pixels = np.concatenate([batch[b"data"] for batch in batches]).reshape(-1, 3, 32, 32)
        classes = [label for batch in batches for label in batch[b"labels"]]
        return torch.from_numpy(pixels).float() / 127.5 - 1, torch.tensor(classes)

    return Images("CIFAR-10", *read([f"data_batch_{i}" for i in range(1, 6)]), *read(["test_batch"]))


def read_digits() -> Images:
    """Return scikit-learn's digits, in the shape of CIFAR-10."""
    digits = load_digits()
    pixels = digits.images.repeat(4, axis=1).repeat(4, axis=2)[:, None].repeat(3, axis=1)  # values from 0 to 16
    train, test, train_classes, test_classes = (
        torch.from_numpy(part)
        for part in train_test_split(pixels, digits.target, test_size=0.2, random_state=0, stratify=digits.target)
    )
    return Images("scikit-learn's digits", train.float() / 8 - 1, train_classes, test.float() / 8 - 1, test_classes)


def train(name: str, images: Images, steps: int) -> Run:
    """Train a new network. The runs differ only in clipping."""
    torch.manual_seed(0)
    batches = torch.Generator().manual_seed(0)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    run = Run()
    start = time.perf_counter()
    while len(run.losses) < steps:
        order = torch.randperm(len(images.train), generator=batches)
        for batch in order.split(BATCH)[: steps - len(run.losses)]:  # type: ignore[no-untyped-call]
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images.train[batch]), images.train_classes[batch])
            loss.backward()  # type: ignore[no-untyped-call]
            found = CLIPS[name](model)  # between backward and step: only this line differs between the runs
            optimizer.step()
            run.losses.append(loss.item())
            run.norms.append(found.norm.item())
            run.clipped.append(bool(found.clipped))
            step = len(run.losses)
            recent = statistics.fmean(run.losses[-SMOOTHING:])
            seconds = time.perf_counter() - start
            show(f"{name:<14} step {step:>4} of {steps}  loss {recent:.3f}  {seconds:4.1f} s", step, steps, every=1000)
    with torch.no_grad():
        run.accuracy = (model(images.test).argmax(1) == images.test_classes).float().mean().item()
    return run


def table(runs: dict[str, Run]) -> str:
    """Return a table of the results."""
    rows = [
        ("", list(runs)),
        (f"loss at the end (mean of {SMOOTHING} steps)", [f"{last_loss(run):.3f}" for run in runs.values()]),
        ("accuracy on images not trained on", [f"{run.accuracy:.1%}" for run in runs.values()]),
        ("steps that were clipped", [f"{statistics.fmean(run.clipped):.1%}" for run in runs.values()]),
        ("median norm, before clipping", [f"{statistics.median(run.norms):.2f}" for run in runs.values()]),
        ("largest norm, before clipping", [f"{max(run.norms):.1f}" for run in runs.values()]),
    ]
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"{label:<{width}}{''.join(f'{cell:>16}' for cell in cells)}".rstrip() for label, cells in rows)


def last_loss(run: Run) -> float:
    """Return the mean of the last losses, since a batch of four is noisy."""
    return statistics.fmean(run.losses[-SMOOTHING:])


def findings(runs: dict[str, Run]) -> str:
    """Describe the results in words."""
    plain, by_value, by_norm = runs.values()
    value_share, norm_share = statistics.fmean(by_value.clipped), statistics.fmean(by_norm.clipped)
    return (
        f"Nothing explodes here: unclipped, the largest norm is {max(plain.norms):.0f}, and {plain.accuracy:.1%} are "
        "right in the end.\n"
        f"Clipping by value fires on {value_share:.1%} of the steps, and {by_value.accuracy:.1%} are right; by norm on "
        f"{norm_share:.1%}, and {by_norm.accuracy:.1%} are.\n"
        f"The losses end at {last_loss(plain):.3f}, {last_loss(by_value):.3f} and {last_loss(by_norm):.3f}: a bound "
        "that fires often slows learning."
    )


def draw(runs: dict[str, Run], images: Images, out: Path) -> None:
    """Draw losses and norms."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    loss_axes, norm_axes = figure.subplots(1, 2)
    for (name, run), color, width in zip(runs.items(), COLORS, WIDTHS, strict=True):
        share = "" if name == "unclipped" else f": {statistics.fmean(run.clipped):.1%} of the steps clipped"
        for axes, values, label in (
            (loss_axes, run.losses, f"{name}: {run.accuracy:.1%} right in the end"),
            (norm_axes, run.norms, f"{name}{share}"),
        ):
            ends = range(SMOOTHING, len(values) + 1, SMOOTHING)
            means = [statistics.fmean(values[end - SMOOTHING : end]) for end in ends]
            axes.plot(ends, means, color=color, linewidth=width, label=label)
    loss_axes.set(title=f"Loss on {images.name}", ylabel="cross-entropy (nats)")
    norm_axes.set(title="Gradient norm, before clipping", ylabel="2-norm")
    for axes in (loss_axes, norm_axes):
        axes.set(xlabel=f"step (means of {SMOOTHING})", ylim=(0, 1.3 * axes.get_ylim()[1]))  # room for the legend
        axes.legend()
    save(figure, out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4000, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="where cifar-10-batches-py may be (data)")
    parser.add_argument("--out", type=Path, default=Path("out/classifier.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.steps < SMOOTHING:
        parser.error(f"--steps must be at least {SMOOTHING}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Train once with each way of clipping."""
    options = parse(arguments)
    torch.set_num_threads(1)  # the tensors are small: threads that wait for a busy core would slow it down
    folder = options.data / "cifar-10-batches-py"
    images = read_cifar10(folder) if folder.is_dir() else read_digits()
    print(f"{len(images.train)} of {images.name} to learn from, {len(images.test)} to test with\n")
    runs = {name: train(name, images, options.steps) for name in CLIPS}
    print(f"\n{table(runs)}\n\n{findings(runs)}")
    draw(runs, images, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
