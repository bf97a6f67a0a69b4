"""A regression that goes to NaN under Adam, saved by each way of clipping; and what clipping does not mend.

    python examples/regression.py

The data are scikit-learn's `make_regression` with inputs and targets raised to the fifth power: targets reach 1e14, and
gradients 1e20. The scale of a gradient is nothing to Adam, which divides by it: no step is ever long, whatever happens.
But it squares the gradient, and Keras' Adam keeps the mean of the squares by

    v += (1 - beta2) * (g**2 - v)

A gradient above 1.8e19 has a square beyond float32, so v is infinite; a step later inf - inf makes v and the weight
NaN. That is `KerasAdam` here. torch's Adam runs beside it: written as beta2 * v + (1 - beta2) * g * g, its v survives
up to 5.8e20, and is infinite from there on, so that the weight never moves again but is no NaN.

Clipped gradients have small squares, whichever way they are clipped. The norm that it takes has squares in it too, but
fastclip's does not overflow. (Keras' own `global_clipnorm` does: tried with Keras 3.15 on JAX, a gradient of 2e19 gives
it an infinite norm, and every weight is NaN.)

The last run shows what clipping does not do: with data that are standardised, the usual learning rate, and no clipping,
the loss in validation is soon below that of all others.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from progress import save, show
from sklearn.datasets import make_regression
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional

import fastclip

SAMPLES = 10_000
FEATURES = 30
RANDOM_STATE = 65
POWER = 5
HIDDEN = 50
BATCH = 32

# A step of Adam moves a weight by about the learning rate, and targets of 1e14 are far away: at 0.1 no run, clipped or
# not, explains 0.1 % of the variance.
LEARNING_RATE = 10.0
STANDARDISED_LEARNING_RATE = 1e-3

SQUARE_OVERFLOWS = math.sqrt(torch.finfo(torch.float32).max)  # 1.8e19


class KerasAdam(torch.optim.Optimizer):
    """Adam as Keras 3 computes it."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        """Take Keras' defaults for all but the learning rate."""
        super().__init__(parameters, {"lr": lr, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-7})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 - torch's name
        """Take a step."""
        for group in self.param_groups:
            beta1, beta2 = group["beta1"], group["beta2"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state.update(t=0, m=torch.zeros_like(parameter), v=torch.zeros_like(parameter))
                state["t"] += 1
                t, m, v, g = state["t"], state["m"], state["v"], parameter.grad
                alpha = group["lr"] * math.sqrt(1 - beta2**t) / (1 - beta1**t)
                m += (1 - beta1) * (g - m)
                v += (1 - beta2) * (g.square() - v)
                parameter.sub_(alpha * m / (v.sqrt() + group["epsilon"]))


class Data(NamedTuple):
    """Inputs and targets, split; `unit` turns a squared error into one of the targets as they were raised."""

    train_inputs: Tensor
    valid_inputs: Tensor
    train_targets: Tensor
    valid_targets: Tensor
    unit: float

    def variances(self) -> tuple[float, float]:
        """Return the squared error, in training and validation, of always answering with the mean."""
        return self.unit * self.train_targets.var().item(), self.unit * self.valid_targets.var().item()


@dataclass(frozen=True)
class Setting:
    """What a run does: the optimizer, how its gradients are clipped, and on which data."""

    name: str
    clip: dict[str, Any] = field(default_factory=dict)  # what `fastclip.attach` is given
    optimizer: type[KerasAdam | torch.optim.Adam] = KerasAdam
    standardised: bool = False
    color: str = "#c8553d"
    line: str = "-"
    width: float = 1.8


SETTINGS = (
    Setting("unclipped", width=5.0),
    Setting("by norm, 1.0", {"clipnorm": 1.0}, color="#1b3a5c"),
    Setting("by value, 3.0", {"clipvalue": 3.0}, color="#2a9d8f"),
    Setting("by global norm, 1.0", {"global_clipnorm": 1.0}, color="#f2a65a", line="--"),
    Setting("unclipped, torch's Adam", optimizer=torch.optim.Adam, color="#8d8d8d"),
    Setting("unclipped, standardised", standardised=True, color="#7b2d8b"),
)


@dataclass
class Run:
    """What a run leaves behind: a value for each epoch that it finished."""

    train_losses: list[float] = field(default_factory=list)
    valid_losses: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)  # of the gradients' elements, before clipping; also of the last
    lost: int | None = None  # the step whose loss was NaN

    def last(self) -> tuple[float, float]:
        """Return the last losses in training and validation."""
        return (math.nan, math.nan) if self.lost else (self.train_losses[-1], self.valid_losses[-1])


def load(*, standardised: bool) -> Data:
    """Make the data; standardise them by the training part's means and deviations, if that is asked for."""
    inputs, targets = make_regression(n_samples=SAMPLES, n_features=FEATURES, random_state=RANDOM_STATE)
    arrays = train_test_split(inputs**POWER, targets[:, None] ** POWER, test_size=0.2, random_state=RANDOM_STATE)
    unit = 1.0
    if standardised:
        scalers = [StandardScaler().fit(arrays[0]), StandardScaler().fit(arrays[2])]
        arrays = [scalers[i // 2].transform(array) for i, array in enumerate(arrays)]
        unit = float(scalers[1].var_[0])
    inputs, valid_inputs, targets, valid_targets = (torch.tensor(array, dtype=torch.float32) for array in arrays)
    return Data(inputs, valid_inputs, targets, valid_targets, unit)


def train(setting: Setting, epochs: int) -> Run:
    """Train a new model; all runs start from the same weights and see the same batches."""
    data = load(standardised=setting.standardised)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
    rate = STANDARDISED_LEARNING_RATE if setting.standardised else LEARNING_RATE
    optimizer = setting.optimizer(list(model.parameters()), lr=rate)
    if setting.clip:
        fastclip.attach(optimizer, **setting.clip)  # once, as in Keras: every step clips from here on
    run = Run()
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        losses = []
        largest = torch.zeros(())
        for batch in torch.randperm(len(data.train_inputs)).split(BATCH):  # type: ignore[no-untyped-call]
            loss = functional.mse_loss(model(data.train_inputs[batch]), data.train_targets[batch])
            losses.append(data.unit * loss.item())
            if math.isnan(losses[-1]):
                break
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            largest = torch.stack(
                [largest, *(p.grad.abs().max() for p in model.parameters() if p.grad is not None)]
            ).max()
            optimizer.step()
        run.largest.append(largest.item())
        line = f"{setting.name:<24} epoch {epoch:>2} of {epochs}"
        if math.isnan(losses[-1]):
            run.lost = (epoch - 1) * math.ceil(len(data.train_inputs) / BATCH) + len(losses)
            show(f"{line}  the loss is NaN in step {run.lost}", epoch, epoch, 1)
            break
        with torch.no_grad():
            valid_loss = data.unit * functional.mse_loss(model(data.valid_inputs), data.valid_targets).item()
        run.train_losses.append(sum(losses) / len(losses))
        run.valid_losses.append(valid_loss)
        seconds = time.perf_counter() - start
        show(
            f"{line}  loss {run.train_losses[-1]:.3e}  validation {valid_loss:.3e}"
            f"  largest gradient {run.largest[-1]:.0e}  {seconds:4.1f} s",
            epoch,
            epochs,
            every=10,
        )
    return run


def table(runs: dict[str, Run], variance: float) -> str:
    """Return the last losses in figures; `variance` is what always answering with the mean loses in validation."""
    rows = [("", "last loss", "in validation", "explained", "largest gradient")]
    for name, run in runs.items():
        loss, valid_loss = run.last()
        explained = "" if run.lost else f"{1 - valid_loss / variance:.1%}"
        rows.append((name, f"{loss:.3e}", f"{valid_loss:.3e}", explained, f"{max(run.largest):.1e}"))
    return "\n".join(f"{name:<26}" + "".join(f"{cell:>18}" for cell in cells) for name, *cells in rows)


def findings(runs: dict[str, Run], variance: float) -> str:
    """Say in words what happened."""
    plain, *clipped, _, standardised = runs.values()
    lines = []
    if plain.lost:
        lines.append(
            f"Unclipped, the loss is NaN in step {plain.lost}: float32 ends at squares of {SQUARE_OVERFLOWS:.1e}, and "
            f"the largest gradient was {max(plain.largest):.1e}."
        )
    if not any(run.lost for run in clipped):
        explained = [1 - run.valid_losses[-1] / variance for run in clipped]
        lines.append(
            f"Each way of clipping keeps the run alive: after {len(clipped[0].valid_losses)} epochs they explain "
            f"{min(explained):.1%} to {max(explained):.1%} of the variance in validation."
        )
        best = min(run.valid_losses[-1] for run in clipped)
        ahead = [epoch for epoch, loss in enumerate(standardised.valid_losses, 1) if loss < best]
        lines += [f"Standardised data need no clipping, and are past the best of these in epoch {ahead[0]}."] * bool(
            ahead
        )
    return "\n".join(lines)


def draw(runs: dict[str, Run], variances: tuple[float, float], out: Path) -> None:
    """Draw both losses, and the gradients that explain them."""
    figure = Figure(figsize=(15, 5.4), layout="constrained")
    train_axes, valid_axes, gradient_axes = figure.subplots(1, 3)
    for setting in SETTINGS:
        run = runs[setting.name]
        panels = [
            (train_axes, [loss / variances[0] for loss in run.train_losses]),
            (valid_axes, [loss / variances[1] for loss in run.valid_losses]),
        ]
        if not setting.standardised:  # whose gradients are 1e18 times smaller
            panels.append((gradient_axes, run.largest))
        for axes, values in panels:
            epochs = range(1, len(values) + 1)
            axes.plot(epochs, values, setting.line, color=setting.color, linewidth=setting.width, label=setting.name)
            if run.lost and values:
                axes.plot(epochs[-1], values[-1], "X", color=setting.color, markersize=12, zorder=3)
                axes.annotate(
                    f"NaN in step {run.lost},\nepoch {len(run.largest)}",
                    (epochs[-1], values[-1]),
                    xytext=(0.25, 0.25) if axes is gradient_axes else (0.5, 0.94),
                    textcoords="axes fraction",
                    color=setting.color,
                    weight="bold",
                    va="center",
                    arrowprops={"arrowstyle": "-", "color": setting.color},
                )
    gradient_axes.axhline(SQUARE_OVERFLOWS, color="black", linestyle=":")
    gradient_axes.text(
        0.98,
        SQUARE_OVERFLOWS,
        "above, the square overflows",
        transform=gradient_axes.get_yaxis_transform(),
        ha="right",
        va="bottom",
    )
    gradient_axes.set_yscale("log")
    train_axes.set(title="Training loss", ylabel="mean squared error / variance of the targets")
    valid_axes.set(title="Validation loss")
    gradient_axes.set(title="Largest element of the gradients, before clipping")
    for axes in (train_axes, valid_axes, gradient_axes):
        axes.set(xlabel="epoch")
        axes.grid(alpha=0.3)
    handles, labels = train_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save(figure, out)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="epochs of each run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/regression.png"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Train every run; return 1 if a clipped one was lost."""
    options = parse(arguments)
    torch.set_num_threads(1)  # the tensors are small, and threads that wait for a busy core make it slow
    variances = load(standardised=False).variances()
    runs = {setting.name: train(setting, options.epochs) for setting in SETTINGS}
    print(f"\n{table(runs, variances[1])}\n\n{findings(runs, variances[1])}")
    draw(runs, variances, options.out)
    return int(any(runs[setting.name].lost is not None for setting in SETTINGS if setting.clip))


if __name__ == "__main__":
    sys.exit(main())
