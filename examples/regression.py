"""A regression that becomes NaN under Adam. Every way of clipping prevents that, but does not replace scaling.

    python examples/regression.py

The data are scikit-learn's `make_regression` with inputs and targets raised to the fifth power: targets reach 1e14, and
gradients 1e20. Adam divides by the size of the gradient, so its steps are never long, whatever that size. But Adam also
squares the gradient. Keras' Adam updates the mean of the squares by

    v += (1 - beta2) * (g**2 - v)

If a gradient is above 1.8e19, its square overflows float32 and v is infinite. In the next step, inf - inf makes v and
the weight NaN. `KerasAdam` here does that. torch's Adam runs for comparison. It computes beta2 * v + (1 - beta2) * g *
g, which is finite for gradients up to 5.8e20. Above, v stays infinite, so the weight stops moving but is not NaN.

Clipped gradients have small squares, whatever the way of clipping. A norm is a sum of squares, too, but fastclip's does
not overflow. (Keras' own `global_clipnorm` does: with Keras 3.15 on JAX, a gradient of 2e19 gave an infinite norm, and
every weight was NaN.)

The last run shows what clipping does not do. With standardised data, the usual learning rate and no clipping, the
validation loss is soon below that of all other runs.
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
from matplotlib.axes import Axes
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

# A step of Adam moves a weight by about the learning rate, and targets reach 1e14. With a rate of 0.1 no run, clipped
# or not, explains even 0.1 % of the variance.
LEARNING_RATE = 10.0
STANDARDISED_LEARNING_RATE = 1e-3

SQUARE_OVERFLOWS = math.sqrt(torch.finfo(torch.float32).max)  # 1.8e19


class KerasAdam(torch.optim.Optimizer):
    """Adam as Keras 3 computes it."""

    def __init__(self, parameters: list[nn.Parameter], lr: float) -> None:
        """Use Keras' defaults, except for the learning rate."""
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
    """Inputs and targets for training and validation. A squared error times `unit` is in units of the raw targets."""

    train_inputs: Tensor
    valid_inputs: Tensor
    train_targets: Tensor
    valid_targets: Tensor
    unit: float

    def variances(self) -> tuple[float, float]:
        """Return the squared error of predicting the mean, in training and validation."""
        return self.unit * self.train_targets.var().item(), self.unit * self.valid_targets.var().item()


@dataclass(frozen=True)
class Setting:
    """The configuration of a run: the optimizer, how gradients are clipped, the data, and the style in the picture."""

    name: str
    clip: dict[str, Any] = field(default_factory=dict)  # arguments of `fastclip.attach`
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
    """The results of a run, one value for each epoch that it finished."""

    train_losses: list[float] = field(default_factory=list)
    valid_losses: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)  # gradient element before clipping, of a lost epoch, too
    lost: int | None = None  # the step in which the loss was NaN

    def last(self) -> tuple[float, float]:
        """Return the last losses in training and validation."""
        return (math.nan, math.nan) if self.lost else (self.train_losses[-1], self.valid_losses[-1])


def load(*, standardised: bool) -> Data:
    """Make the data. If `standardised`, scale them by the means and deviations of the training data."""
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
    """Train a new model. All runs have the same initial weights and see the same batches."""
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
        losses, largest = train_epoch(model, optimizer, data)
        run.largest.append(largest)
        line = f"{setting.name:<24} epoch {epoch:>2} of {epochs}"
        if math.isnan(losses[-1]):
            run.lost = (epoch - 1) * math.ceil(len(data.train_inputs) / BATCH) + len(losses)
            show(f"{line}  the loss is NaN in step {run.lost}", epoch, epoch, 1)
            break
        run.train_losses.append(sum(losses) / len(losses))
        run.valid_losses.append(validate(model, data))
        line += f"  loss {run.train_losses[-1]:.3e}  validation {run.valid_losses[-1]:.3e}"
        line += f"  largest gradient {largest:.0e}  {time.perf_counter() - start:4.1f} s"
        show(line, epoch, epochs, every=10)
    return run


def train_epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: Data) -> tuple[list[float], float]:
    """Train for an epoch, or until the loss is NaN. Return the losses, and the largest element of all gradients."""
    losses: list[float] = []
    largest = torch.zeros(())
    for batch in torch.randperm(len(data.train_inputs)).split(BATCH):  # type: ignore[no-untyped-call]
        loss = functional.mse_loss(model(data.train_inputs[batch]), data.train_targets[batch])
        losses.append(data.unit * loss.item())
        if math.isnan(losses[-1]):
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        peaks = (p.grad.abs().max() for p in model.parameters() if p.grad is not None)
        largest = torch.stack([largest, *peaks]).max()
        optimizer.step()
    return losses, largest.item()


@torch.no_grad()
def validate(model: nn.Module, data: Data) -> float:
    """Return the validation loss."""
    return data.unit * functional.mse_loss(model(data.valid_inputs), data.valid_targets).item()


def table(runs: dict[str, Run], variance: float) -> str:
    """Return a table of the last losses. `variance` is the validation loss of predicting the mean."""
    rows = [("", "last loss", "in validation", "explained", "largest gradient")]
    for name, run in runs.items():
        loss, valid_loss = run.last()
        explained = "" if run.lost else f"{1 - valid_loss / variance:.1%}"
        rows.append((name, f"{loss:.3e}", f"{valid_loss:.3e}", explained, f"{max(run.largest):.1e}"))
    return "\n".join(f"{name:<26}" + "".join(f"{cell:>18}" for cell in cells) for name, *cells in rows)


def findings(runs: dict[str, Run], variance: float) -> str:
    """Describe the results in words."""
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
        plot(train_axes, [loss / variances[0] for loss in run.train_losses], setting, run, (0.5, 0.94))
        plot(valid_axes, [loss / variances[1] for loss in run.valid_losses], setting, run, (0.5, 0.94))
        if not setting.standardised:  # standardised gradients are 1e18 times smaller
            plot(gradient_axes, run.largest, setting, run, (0.25, 0.25))
    mark_overflow(gradient_axes)
    train_axes.set(title="Training loss", ylabel="mean squared error / variance of the targets")
    valid_axes.set(title="Validation loss")
    gradient_axes.set(title="Largest element of the gradients, before clipping", yscale="log")
    for axes in (train_axes, valid_axes, gradient_axes):
        axes.set(xlabel="epoch")
        axes.grid(alpha=0.3)
    handles, labels = train_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save(figure, out)


def plot(axes: Axes, values: list[float], setting: Setting, run: Run, note: tuple[float, float]) -> None:
    """Plot a value for each epoch. If the loss became NaN, mark that, with a note at this position in the panel."""
    epochs = range(1, len(values) + 1)
    axes.plot(epochs, values, setting.line, color=setting.color, linewidth=setting.width, label=setting.name)
    if run.lost and values:
        axes.plot(epochs[-1], values[-1], "X", color=setting.color, markersize=12, zorder=3)
        axes.annotate(
            f"NaN in step {run.lost},\nepoch {len(run.largest)}",
            (epochs[-1], values[-1]),
            xytext=note,
            textcoords="axes fraction",
            color=setting.color,
            weight="bold",
            va="center",
            arrowprops={"arrowstyle": "-", "color": setting.color},
        )


def mark_overflow(axes: Axes) -> None:
    """Mark the gradient above which the square overflows."""
    axes.axhline(SQUARE_OVERFLOWS, color="black", linestyle=":")
    above_line = axes.get_yaxis_transform()
    text = "above, the square overflows"
    axes.text(0.98, SQUARE_OVERFLOWS, text, transform=above_line, ha="right", va="bottom")


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
    """Train all runs. Return 1 if the loss of a clipped one became NaN."""
    options = parse(arguments)
    torch.set_num_threads(1)  # the tensors are small: threads that wait for a busy core would slow it down
    variances = load(standardised=False).variances()
    runs = {setting.name: train(setting, options.epochs) for setting in SETTINGS}
    print(f"\n{table(runs, variances[1])}\n\n{findings(runs, variances[1])}")
    draw(runs, variances, options.out)
    return int(any(runs[setting.name].lost is not None for setting in SETTINGS if setting.clip))


if __name__ == "__main__":
    sys.exit(main())
