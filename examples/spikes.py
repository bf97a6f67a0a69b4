"""The same training with spikes in its data, clipped by fixed and by adaptive rules, or with steps skipped.

    python examples/spikes.py

A small network predicts the next byte of Python source from the eight before. Some batches are garbage: one snippet of
random bytes, repeated to fill the batch, as from a reader that is stuck. Their gradients all point the same way, and
their norm is about 9 to 23 times the usual. Four come alone, and six in a row. Later the norms rise for good,
because the loss counts 2.5 times from there on.

Every run has the same initial weights and sees the same batches. They differ only in the rule and the triggers. The
table says what spikes did to the validation loss, which share of steps was clipped before and after the rise, and which
steps were skipped. The picture shows each run's norms, and the threshold that follows them or does not.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from demo import VOCABULARY, read_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from progress import save, show
from torch import Tensor, nn
from torch.nn import functional

import fastclip
from fastclip import ClipByQuantile, ClipByZScore, ClipGradNorm, History, Jump, Monitor

CONTEXT = 8  # bytes
EMBEDDING = 16
WIDTH = 128
BATCH = 256
MOMENTUM = 0.9
VALIDATION = 2048  # snippets
VALIDATE_EVERY = 5  # steps

# When things happen, in 24ths of the run.
SINGLE = (3, 6, 18, 21)
BURST = 10
BURST_STEPS = 6
RISE = 14
FACTOR = 2.5  # by which the loss rises
AFTERMATH = 30  # steps after a spike in which its damage is looked for: the momentum carries it on
SETTLING = 100  # steps after the rise for which adaptive rules are given time

WINDOW = 128
SHORTEST = 480  # steps: with fewer, little is left once the rules have had time to follow the rise

# In the picture, for learning rates at which the run without clipping is lost.
HIGHEST_LOSS = 1.5  # above the lowest at the end
HIGHEST_NORM = 100.0

GlobalRule: TypeAlias = ClipGradNorm | ClipByQuantile | ClipByZScore


@dataclass(frozen=True)
class Setting:
    """How a run is protected, and its colour in the picture. Rules keep state, so each run makes its own."""

    name: str
    color: str
    rule: Callable[[], GlobalRule] | None = None
    skips: bool = False

    def make_rule(self) -> GlobalRule | None:
        """Return a rule that has seen nothing yet."""
        return self.rule() if self.rule else None

    def triggers(self) -> list[Jump]:
        """Return OLMo's triggers, if the run skips steps."""
        of = ("loss", "norm") if self.skips else ()
        return [Jump(series, z=6.0, window=WINDOW, action="skip") for series in of]  # type: ignore[arg-type]


SETTINGS = (
    Setting("unclipped", "#c8553d"),
    Setting("fixed, 10", "#f2a65a", partial(ClipGradNorm, 10.0)),
    Setting("fixed, 1.5", "#6c757d", partial(ClipGradNorm, 1.5)),
    Setting("fixed, 0.2", "#a98467", partial(ClipGradNorm, 0.2)),
    Setting("quantile", "#2a9d8f", partial(ClipByQuantile, 0.9, 100)),
    Setting("z-score", "#7b2d8b", partial(ClipByZScore)),
    Setting("z-score, relearn", "#d16ba5", partial(ClipByZScore, relearn=50)),
    Setting("z-score, max", "#3a86c8", partial(ClipByZScore, mode="max")),
    Setting("skip", "#1b3a5c", skips=True),
)


@dataclass(frozen=True)
class Plan:
    """In which steps things happen. The first step is 1."""

    steps: int

    @property
    def rise(self) -> int:
        """The last step before the rise."""
        return RISE * self.steps // 24

    @property
    def singles(self) -> list[int]:
        """The steps of garbage that come alone."""
        return [part * self.steps // 24 for part in SINGLE]

    @property
    def burst(self) -> list[int]:
        """The steps of the burst."""
        first = BURST * self.steps // 24
        return [*range(first, first + BURST_STEPS)]

    @property
    def garbage(self) -> list[int]:
        """All steps with a garbage batch."""
        return sorted(self.singles + self.burst)


@dataclass(frozen=True)
class Run:
    """The results of a run. `losses` are those in validation, by step."""

    history: History
    losses: dict[int, float]
    plan: Plan

    def final_loss(self) -> float:
        """Return the mean of the last ten losses."""
        return statistics.fmean([*self.losses.values()][-10:])

    def damage(self, steps: list[int]) -> float:
        """Return by how much these steps, and those shortly after, raised the loss at most."""
        before = max(step for step in self.losses if step < steps[0])
        after = [loss for step, loss in self.losses.items() if steps[0] <= step <= steps[-1] + AFTERMATH]
        return max(after) - self.losses[before]

    def worst_single(self) -> float:
        """Return the largest damage by garbage that came alone."""
        return max(self.damage([step]) for step in self.plan.singles)

    def share_clipped(self, first: int, last: int) -> float:
        """Return the share of the clean steps from `first` to `last` that were clipped."""
        steps = self.history.steps
        counted = (steps >= first) & (steps <= last) & ~np.isin(steps, self.plan.garbage)
        return float(self.history.clipped[counted].mean())

    def share_before(self) -> float:
        """Return the share of clean steps before the rise that were clipped."""
        return self.share_clipped(1, self.plan.rise)

    def share_after(self) -> float:
        """Return the share of clean steps that were clipped after the rise, once rules had time to follow."""
        return self.share_clipped(self.plan.rise + SETTLING + 1, self.plan.steps)

    def skipped(self) -> list[int]:
        """Return the steps that were skipped."""
        return [int(step) for step in self.history.steps[self.history.skipped]]


def snippets(text: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return random snippets of the text, each with the byte to predict at its end."""
    return text[torch.randint(len(text) - CONTEXT, (count, 1), generator=generator) + torch.arange(CONTEXT + 1)]


def garbage(step: int) -> Tensor:
    """Return a batch that is one snippet of random bytes, another in each step."""
    snippet = torch.randint(VOCABULARY, (1, CONTEXT + 1), generator=torch.Generator().manual_seed(step))
    return snippet.expand(BATCH, -1)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean loss of the last bytes, in nats."""
    return functional.cross_entropy(model(batch[:, :-1]), batch[:, -1])


def train(setting: Setting, text: Tensor, plan: Plan, options: argparse.Namespace) -> Run:
    """Train a new network. The runs differ only in the rule and the triggers."""
    torch.manual_seed(options.seed)
    batches = torch.Generator().manual_seed(options.seed)
    model = nn.Sequential(
        nn.Embedding(VOCABULARY, EMBEDDING),
        nn.Flatten(),
        nn.Linear(CONTEXT * EMBEDDING, WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, VOCABULARY),
    )
    held_out = len(text) // 10
    validation = snippets(text[-held_out:], VALIDATION, torch.Generator().manual_seed(0))
    text = text[:-held_out]
    optimizer = torch.optim.SGD(model.parameters(), lr=options.learning_rate, momentum=MOMENTUM)
    monitor = Monitor(model, triggers=setting.triggers(), history=plan.steps)
    fastclip.attach(optimizer, setting.make_rule(), monitor=monitor)
    losses: dict[int, float] = {}
    start = time.perf_counter()
    for step in range(1, plan.steps + 1):
        batch = snippets(text, BATCH, batches)  # drawn in any case, so that all others are the same
        loss = loss_of(model, garbage(step) if step in plan.garbage else batch)
        loss = loss * (FACTOR if step > plan.rise else 1.0)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        monitor.record_loss(loss)
        optimizer.step()
        if step % VALIDATE_EVERY == 0:
            with torch.no_grad():
                losses[step] = loss_of(model, validation).item()
            line = f"{setting.name:<17} step {step:>4} of {plan.steps}  validation loss {losses[step]:.3f}"
            show(f"{line}  {time.perf_counter() - start:4.1f} s", step, plan.steps, every=plan.steps)
    return Run(monitor.read(), losses, plan)


def table(runs: dict[str, Run]) -> str:
    """Return a table of the results."""
    rows: list[tuple[str, ...]] = [("", "loss", "a spike", "the burst", "clipped", "after rise", "skipped")]
    for name, run in runs.items():
        shares = [f"{share:.1%}" for share in (run.share_before(), run.share_after())]
        damages = [f"+{max(damage, 0):.2f}" for damage in (run.worst_single(), run.damage(run.plan.burst))]
        rows.append((name, f"{run.final_loss():.3f}", *damages, *shares, f"{len(run.skipped())}"))
    return "\n".join(f"{row[0]:<18}{''.join(f'{cell:>12}' for cell in row[1:])}".rstrip() for row in rows)


def findings(runs: dict[str, Run], plan: Plan) -> str:
    """Describe the results in words."""
    skipped = runs["skip"].skipped()
    garbage_skipped = [step for step in skipped if step in plan.garbage]
    alone = sum(step in plan.singles for step in skipped)
    clean = [step for step in skipped if step not in plan.garbage]
    z, quantile, largest = (runs[name] for name in ("z-score", "quantile", "z-score, max"))
    return (
        "'a spike', 'the burst': by how much garbage raised the validation loss at most. 'clipped', 'after rise': the\n"
        f"share of clean steps, before the rise and from {SETTLING} steps after it on.\n\n"
        f"The triggers skipped {alone} of {len(plan.singles)} single spikes and {len(garbage_skipped) - alone} of "
        f"{BURST_STEPS} in the burst; and {len(clean)} clean steps{': ' * bool(clean)}{', '.join(map(str, clean))}.\n"
        f"The norms rose after step {plan.rise}. From {SETTLING} steps after it on, z-score clips "
        f"{z.share_after():.1%} of the steps, quantile {quantile.share_after():.1%}, and z-score with "
        f'mode="max" {largest.share_after():.1%}.'
    )


def draw(runs: dict[str, Run], plan: Plan, out: Path) -> None:
    """Draw the losses, and for each run norms and threshold."""
    figure = Figure(figsize=(12, 11.5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.1), squeeze=False).flat
    whole, end = top.subplots(1, 2, width_ratios=(2, 1))
    draw_losses(whole, end, runs, plan)
    top.legend(
        *whole.get_legend_handles_labels(), loc="outside upper center", ncols=len(runs), frameon=False, fontsize=9
    )
    all_axes = bottom.subplots(3, 3, sharex=True, sharey=True)
    for axes, setting in zip(all_axes.flat, SETTINGS, strict=True):
        draw_norms(axes, setting, runs[setting.name])
    norms = np.concatenate([run.history.norm for run in runs.values()])
    all_axes[0, 0].set_ylim(top=4 * min(norms[np.isfinite(norms)].max(), HIGHEST_NORM))  # with room for the marks
    for axes in all_axes[-1]:
        axes.set_xlabel("step")
    for axes in all_axes[:, 0]:
        axes.set_ylabel("gradient norm")
    handles = [
        Line2D([], [], color="0.7", label="norm before clipping"),
        Line2D([], [], color="0.2", linewidth=2, label="threshold (in the run's colour)"),
        Line2D([], [], color="black", marker="v", linestyle="", label="garbage"),
        Line2D([], [], color="#e3170a", marker="x", linestyle="", label="skipped"),
        Line2D([], [], color="black", linestyle=":", label=f"the loss counts {FACTOR:g} times from here on"),
    ]
    bottom.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    save(figure, out)


def draw_losses(whole: Axes, end: Axes, runs: dict[str, Run], plan: Plan) -> None:
    """Draw the validation losses of the whole run, and of its last part."""
    for setting in SETTINGS:
        losses = runs[setting.name].losses
        for axes in (whole, end):
            axes.plot([*losses], [*losses.values()], color=setting.color, linewidth=1.4, label=setting.name)
    final = [run.final_loss() for run in runs.values() if math.isfinite(run.final_loss())]
    later = [loss for run in runs.values() for step, loss in run.losses.items() if step >= plan.singles[1]]
    highest = min(max(loss for loss in later if math.isfinite(loss)), min(final) + HIGHEST_LOSS)
    whole.set(title="Validation loss", ylabel="nats per byte", ylim=(min(final) - 0.1, highest + 0.1))
    end.set(
        title="Its last quarter",
        xlim=(plan.singles[2], plan.steps),
        ylim=(min(final) - 0.05, min(max(final), highest) + 0.1),
    )
    whole.set(xlim=(0, plan.steps), xlabel="step")
    end.set(xlabel="step")
    mark(whole, plan)
    mark(end, plan)


def draw_norms(axes: Axes, setting: Setting, run: Run) -> None:
    """Draw the norms of a run and its threshold, and mark the steps that it skipped."""
    history = run.history
    axes.plot(history.steps, history.norm, color="0.7", linewidth=0.8)
    axes.plot(history.steps, np.where(np.isfinite(history.threshold), history.threshold, np.nan), color=setting.color)
    skipped = history.skipped
    axes.plot(history.steps[skipped], history.norm[skipped], "x", color="#e3170a", markersize=6)
    axes.set_yscale("log")
    clips = f"clips {run.share_before():.0%}, then {run.share_after():.0%}" if setting.rule else "clips nothing"
    title = f"{setting.name}: skips {len(run.skipped())} steps" if setting.skips else f"{setting.name}: {clips}"
    axes.set_title(title, color=setting.color, weight="bold", fontsize=11)
    mark(axes, run.plan)


def mark(axes: Axes, plan: Plan) -> None:
    """Mark the garbage at the top of a panel, and the rise."""
    at_top = axes.get_xaxis_transform()
    first, last = axes.get_xlim()
    steps = [step for step in plan.garbage if first <= step <= last]
    axes.plot(steps, [0.97] * len(steps), "v", color="black", markersize=4, transform=at_top)
    if first <= plan.rise <= last:
        axes.axvline(plan.rise, color="black", linestyle=":", linewidth=1.2)
    axes.grid(alpha=0.3)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of SGD (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/spikes.png"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.steps < SHORTEST:
        parser.error(f"--steps must be at least {SHORTEST}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Train all runs."""
    options = parse(arguments)
    torch.set_num_threads(1)  # the tensors are small: threads that wait for a busy core would slow it down
    plan = Plan(options.steps)
    text = read_text()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "steps skipped", RuntimeWarning)  # the table says it
        runs = {setting.name: train(setting, text, plan, options) for setting in SETTINGS}
    print(f"\n{table(runs)}\n\n{findings(runs, plan)}")
    draw(runs, plan, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
