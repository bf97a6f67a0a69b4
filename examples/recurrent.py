"""A recurrent network with exploding gradients, and the same network with clipping, which keeps learning.

    python examples/recurrent.py

A plain ReLU network reads 200 bytes of Python source, from the standard library, and predicts each next byte. Its
recurrent weights are initially 0.95 times the identity, so that its memory fades slowly. But then a small change of
these weights acts 200 times. Pascanu, Mikolov and Bengio ("On the difficulty of training recurrent neural networks",
2013) describe the result: the loss is flat with cliffs, and at a cliff the gradient is orders of magnitude larger. The
learning rate rises in each step, until the run without clipping steps over a cliff.

A monitor watches both runs. Its triggers report the step in which the norm jumps, and the parameters that cause it.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from demo import VOCABULARY, read_text
from matplotlib.figure import Figure
from progress import save, show
from torch import Tensor, nn
from torch.nn import functional

import fastclip
from fastclip import History, Report

LENGTH = 200  # bytes that the gradient is propagated through
WIDTH = 96
BATCH = 16
RECURRENT_GAIN = 0.95
LEARNING_RATE_RISE = 0.001  # in each step
MOMENTUM = 0.9
MAX_NORM = 1.0
JUMP = 10.0  # times the running mean of the norm
COLORS = ("#c8553d", "#1b3a5c")


class Network(nn.Module):
    """An embedding, a plain recurrent layer, and a head that predicts the next byte at each position."""

    def __init__(self) -> None:
        """Make the layers. Initially the recurrent one keeps most of its state."""
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.rnn = nn.RNN(WIDTH, WIDTH, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.rnn.weight_hh_l0 = nn.Parameter(RECURRENT_GAIN * torch.eye(WIDTH))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over all positions."""
        states, _ = self.rnn(self.embedding(tokens))
        return functional.cross_entropy(self.head(states).flatten(0, 1), targets.flatten())


@dataclass
class Run:
    """The results of a run."""

    history: History
    reports: list[Report]

    @property
    def lost(self) -> int | None:
        """The step in which the loss became infinite or NaN; None if it stayed finite."""
        return None if math.isfinite(self.history.loss[-1]) else int(self.history.steps[-1])

    @property
    def jumps(self) -> list[Report]:
        """The reports of steps in which the norm jumped."""
        return [report for report in self.reports if isinstance(report.trigger, fastclip.Jump)]

    def final_loss(self) -> float:
        """Return the mean of the last ten losses, since a single batch is noisy."""
        return float(self.history.loss[-10:].mean())

    def finite_norms(self) -> npt.NDArray[np.float64]:
        """Return the finite norms, before clipping."""
        norm = self.history.norm
        finite: npt.NDArray[np.float64] = norm[np.isfinite(norm)]
        return finite


def train(name: str, text: Tensor, options: argparse.Namespace) -> Run:
    """Train a new network. The runs differ only in clipping."""
    torch.manual_seed(options.seed)
    batches = torch.Generator().manual_seed(options.seed)
    model = Network()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE_RISE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step + 1.0)
    reports: list[Report] = []
    triggers = [
        fastclip.Jump("norm", ratio=JUMP, action=reports.append),
        fastclip.NonFinite("gradients", action=reports.append),
    ]
    monitor = fastclip.Monitor(model, triggers=triggers, by="parameter", warmup=5)
    fastclip.attach(optimizer, global_clipnorm=MAX_NORM if name == "clipped" else None, monitor=monitor)
    window = torch.arange(LENGTH + 1)
    start = time.perf_counter()
    for step in range(1, options.steps + 1):
        tokens = text[torch.randint(len(text) - LENGTH, (BATCH, 1), generator=batches) + window]
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        monitor.record_loss(loss)
        optimizer.step()
        schedule.step()
        lost = not loss.isfinite()
        line = f"{name:<9}  step {step:>3} of {options.steps}  loss {loss:.3g}  {time.perf_counter() - start:4.1f} s"
        show(line, step, step if lost else options.steps, every=50)
        if lost:
            break
    return Run(monitor.read(), reports)


def table(runs: dict[str, Run]) -> str:
    """Return a table of the results."""
    rows = [
        ("", list(runs)),
        ("step in which the loss was lost", [f"{run.lost or '-'}" for run in runs.values()]),
        ("loss at the end (mean of the last 10 steps)", [f"{run.final_loss():.3f}" for run in runs.values()]),
        ("largest finite norm, before clipping", [f"{run.finite_norms().max():.2g}" for run in runs.values()]),
        ("median norm", [f"{np.median(run.finite_norms()):.2g}" for run in runs.values()]),
        (f"steps on which the norm jumped to {JUMP:g} times its mean", [f"{len(run.jumps)}" for run in runs.values()]),
    ]
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"{label:<{width}}{''.join(f'{cell:>12}' for cell in cells)}".rstrip() for label, cells in rows)


def findings(runs: dict[str, Run]) -> str:
    """Describe the results in words."""
    plain, clipped = runs["unclipped"], runs["clipped"]
    lines = []
    if plain.lost:
        lines.append(f"Without clipping the loss is not finite in step {plain.lost}, and every weight is lost with it.")
    if plain.jumps:
        report = plain.jumps[-1]
        worst = report.worst(1)[0]
        lines.append(
            f"The trigger last fired in step {report.step}: a norm of {report.value:.2g}, {worst.share:.1%} of its "
            f"square from {worst.name}."
        )
    if clipped.lost is None:
        lines.append(
            f"Clipped to {MAX_NORM:g}, the same network meets norms up to {clipped.finite_norms().max():.2g}, passes "
            f"them, and learns: its loss ends at {clipped.final_loss():.2f}."
        )
    return "\n".join(lines)


def draw(runs: dict[str, Run], out: Path) -> None:
    """Draw loss and norm of both runs, and mark the steps in which triggers fired."""
    figure = Figure(figsize=(11, 7), layout="constrained")
    loss_axes, norm_axes = figure.subplots(2, 1, sharex=True)
    for (name, run), color in zip(runs.items(), COLORS, strict=True):
        history = run.history
        loss_axes.plot(history.steps, history.loss, color=color, linewidth=1.2, label=name)
        norm_axes.plot(history.steps, history.norm, color=color, linewidth=1.2, label=name)
        for report in run.jumps:
            norm_axes.plot(report.step, report.value, "o", color=color, fillstyle="none", markersize=11)
        if run.jumps:
            report = max(run.jumps, key=lambda report: report.value)
            worst = report.worst(1)[0]
            label = f"Jump in step {report.step}: {worst.share:.1%} from {worst.name}"
            norm_axes.annotate(label, (report.step, report.value), **label_style(color))
        if run.lost:
            at_top = loss_axes.get_xaxis_transform()
            loss_axes.plot(run.lost, 0.94, "X", color=color, markersize=11, transform=at_top)
            label = f"NaN in step {run.lost}, {history.loss[-2]:.2g} a step before"
            loss_axes.annotate(label, (run.lost, 0.94), xycoords=at_top, **label_style(color))
    norm_axes.axhline(MAX_NORM, color="gray", linestyle="--", linewidth=1, label=f"clipped to {MAX_NORM:g}")
    highest = runs["clipped"].history.loss.max()
    loss_axes.set(title="Loss", ylabel="nats per byte", yscale="log", ylim=(1, 3 * highest))
    loss_axes.yaxis.set_major_formatter("{x:g}")
    norm_axes.set(title="Gradient norm, before clipping", ylabel="2-norm", yscale="log", xlabel="step")
    for axes in (loss_axes, norm_axes):
        axes.legend(loc="upper right")
        axes.grid(alpha=0.3)
    save(figure, out)


def label_style(color: str) -> dict[str, Any]:
    """Return the style of a label to the right of a point."""
    return {"xytext": (12, -4), "textcoords": "offset points", "color": color, "weight": "bold"}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/recurrent.png"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Train both runs. Return 1 if the loss of the clipped one became infinite or NaN."""
    options = parse(arguments)
    torch.set_num_threads(1)  # the tensors are small: threads that wait for a busy core would slow it down
    text = read_text()
    runs = {name: train(name, text, options) for name in ("unclipped", "clipped")}
    for name, run in runs.items():
        for report in run.reports:
            print(f"\n{name}, {report}")
    print(f"\n{table(runs)}\n\n{findings(runs)}")
    draw(runs, options.out)
    return int(runs["clipped"].lost is not None)


if __name__ == "__main__":
    sys.exit(main())
