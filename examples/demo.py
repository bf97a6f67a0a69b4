"""Train the same small GPT twice, clipping with torch and with fastclip, and compare the two.

    python examples/demo.py

The model (about a million parameters) learns to predict the next byte of Python source. The text is the standard
library's own files, so nothing is downloaded. Both runs have the same seed and see the same batches. They differ only
in the function that clips. In addition, in every step both functions clip copies of the *same* gradients. That gives a
fair ratio of their times, and shows whether they compute the same. The demo prints a table and draws a picture. The
exit status is 1 if the two disagree.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional

import fastclip

VOCABULARY = 256  # bytes
BLOCK = 64  # bytes of context
LAYERS = 4
HEADS = 4
WIDTH = 144
BATCH = 8

LEARNING_RATE = 1e-3
WARM_UP_STEPS = 10  # over which the learning rate rises
UNTIMED_STEPS = 3  # first steps, not timed: they touch memory first and build kernels

# Both functions sum the squares of the same float32 gradients, in different orders. The largest tensor has
# 4 * WIDTH**2 = 83,000 elements. torch's CPU kernel adds them in 8 lanes or more: n = 10,000 successive additions, each
# with an error of at most 2**-24 of the sum. The square root halves the error: n * 2**-24 / 2 = 3e-4 of the norm, at
# worst, and the same for clipped gradients. About 1e-5 is observed; the table shows the error of each function.
TOLERANCE = 3e-4
# Training amplifies a difference in rounding from step to step. The picture marks the step in which the two losses
# differ by more than this, which is far less than the width of a curve.
LOSS_TOLERANCE = 1e-3

Clip = Callable[[list[nn.Parameter], float], Tensor]


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self) -> None:
        """Make the two projections."""
        super().__init__()
        self.queries_keys_values = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Attend from each position to the earlier ones."""
        heads = self.queries_keys_values(x).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)  # each: batch, head, position, width of a head
        mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """A transformer layer: attention, then a small network at each position, both residual."""

    def __init__(self) -> None:
        """Make the two halves, each with a LayerNorm before it."""
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(WIDTH), Attention())
        self.network = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add the output of each half."""
        x = x + self.attention(x)
        out: Tensor = x + self.network(x)
        return out


class GPT(nn.Module):
    """A GPT over bytes. Its output layer shares the embedding's weight (weight tying)."""

    def __init__(self) -> None:
        """Make the layers, with GPT-2's initial weights."""
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Embedding(BLOCK, WIDTH)
        self.layers = nn.Sequential(*[Layer() for _ in range(LAYERS)], nn.LayerNorm(WIDTH))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.token.weight
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim > 1:  # the weights of LayerNorm have one dimension, and stay 1
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss over all targets."""
        logits = self.head(self.layers(self.token(tokens) + self.position.weight))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


class SameGradients:
    """Clips copies of the same gradients with each function, and records times and differences."""

    def __init__(self, clips: dict[str, Clip], model: GPT) -> None:
        """Allocate parameters with gradients for each function, so that no step allocates memory for them."""
        self.clips = clips
        self.parameters = {name: [nn.Parameter(torch.empty_like(p)) for p in model.parameters()] for name in clips}
        self.gradients = {
            name: [torch.zeros_like(p) for p in parameters] for name, parameters in self.parameters.items()
        }
        for name in clips:
            for parameter, gradient in zip(self.parameters[name], self.gradients[name], strict=True):
                parameter.grad = gradient
        self.seconds: dict[str, list[float]] = {name: [] for name in clips}
        # The largest values so far, of norms relative to the norm, and of gradients to the largest element.
        self.norm_errors = dict.fromkeys(clips, 0.0)  # against the norm in float64
        self.norm_difference = 0.0
        self.gradient_difference = 0.0
        self.steps = 0

    def step(self, gradients: list[Tensor], max_norm: float) -> None:
        """Clip copies of `gradients`. The order alternates, so that neither function always has the warmer caches."""
        norms = {}
        for name in self.clips if self.steps % 2 == 0 else reversed(self.clips):
            for copy, gradient in zip(self.gradients[name], gradients, strict=True):
                copy.copy_(gradient)
            synchronize(gradients[0].device)
            start = time.perf_counter()
            norms[name] = self.clips[name](self.parameters[name], max_norm)
            synchronize(gradients[0].device)
            self.seconds[name].append(time.perf_counter() - start)
        self.steps += 1

        exact = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt().item()
        for name, norm in norms.items():
            self.norm_errors[name] = larger(self.norm_errors[name], abs(norm.item() - exact) / exact)
        self.norm_difference = larger(self.norm_difference, (norms["torch"] - norms["fastclip"]).abs().item() / exact)
        expected, clipped = (torch.cat([g.flatten() for g in self.gradients[name]]) for name in ("torch", "fastclip"))
        difference = (expected - clipped).abs().max() / expected.abs().max()
        self.gradient_difference = larger(self.gradient_difference, difference.item())

    def median_seconds(self, name: str) -> float:
        """Return the median time of one function."""
        return statistics.median(self.seconds[name][UNTIMED_STEPS:])

    def agree(self) -> bool:
        """Return whether both functions computed the same in every step, within the tolerance."""
        return self.norm_difference <= TOLERANCE and self.gradient_difference <= TOLERANCE


@dataclass
class Run:
    """The results of a training run, one value for each step."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # before clipping

    def final_loss(self) -> float:
        """Return the mean of the last ten losses, since a single batch is noisy."""
        return statistics.fmean(self.losses[-10:])

    def clipped(self, max_norm: float) -> int:
        """Return the number of steps that were clipped."""
        return sum(norm > max_norm for norm in self.norms)


class Progress:
    """Progress of a run: on a terminal a line that is rewritten, elsewhere a line every 20 steps."""

    def __init__(self, name: str, steps: int) -> None:
        """Start the clock."""
        self.name = name
        self.steps = steps
        self.start = time.perf_counter()

    def show(self, run: Run) -> None:
        """Report on the step that has just ended."""
        step = len(run.losses)
        last = step == self.steps
        line = (
            f"clipping with {self.name:<8}  step {step:>3} of {self.steps}  loss {run.losses[-1]:.3f}"
            f"  gradient norm {run.norms[-1]:5.2f}  {time.perf_counter() - self.start:4.1f} s"
        )
        if sys.stdout.isatty():
            print(f"\r{line}", end="\n" if last else "", flush=True)
        elif last or step % 20 == 0:
            print(line, flush=True)


def larger(a: float, b: float) -> float:
    """Return the larger of two numbers, or NaN if either is NaN (`max` may ignore it)."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def read_text(limit: int = 4_000_000) -> Tensor:
    """Return up to `limit` bytes of the standard library's sources, the same in every call."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))[:limit]
    if len(text) < 1000 * BLOCK:
        sys.exit(f"demo: too little Python source to train on in {folder}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def choose_device(name: str) -> torch.device:
    """Return the device to use, configured so that the same seed gives the same run."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            sys.exit("demo: --device cuda, but torch finds no GPU")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # That also fills new memory, to reveal reads of it. Here it would only cost time.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return torch.device(name)


def synchronize(device: torch.device) -> None:
    """Wait until the device is idle, if it is a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train(name: str, same: SameGradients, text: Tensor, device: torch.device, options: argparse.Namespace) -> Run:
    """Train a new model, clipping with the function called `name`. All else depends only on the options."""
    clip = same.clips[name]
    torch.manual_seed(options.seed)
    batches = torch.Generator().manual_seed(options.seed)
    model = GPT().to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS))
    window = torch.arange(BLOCK + 1)
    run = Run()
    progress = Progress(name, options.steps)
    for _ in range(options.steps):
        tokens = text[torch.randint(len(text) - BLOCK, (BATCH, 1), generator=batches) + window].to(device)
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        same.step([parameter.grad for parameter in parameters if parameter.grad is not None], options.max_norm)
        norm = clip(parameters, options.max_norm)  # only this line differs between the runs
        optimizer.step()
        schedule.step()
        run.losses.append(loss.item())
        run.norms.append(norm.item())
        progress.show(run)
    return run


@dataclass
class Parting:
    """The difference between the losses of the two runs."""

    largest: float
    horizon: int  # the number of steps before they differ by more than LOSS_TOLERANCE
    steps: int

    def __str__(self) -> str:
        """Describe it in words."""
        which = "all" if self.horizon == self.steps else f"the first {self.horizon} of"
        return f"within {LOSS_TOLERANCE:g} on {which} {self.steps} steps"


def parting(runs: dict[str, Run]) -> Parting:
    """Compare the losses of the two runs."""
    pairs = zip(runs["torch"].losses, runs["fastclip"].losses, strict=True)
    differences = [abs(expected - loss) for expected, loss in pairs]
    apart = [step for step, difference in enumerate(differences) if not difference <= LOSS_TOLERANCE]
    return Parting(max(differences), apart[0] if apart else len(differences), len(differences))


def table(runs: dict[str, Run], same: SameGradients, max_norm: float) -> str:
    """Return a table of the results."""
    losses = parting(runs)
    seconds = {name: same.median_seconds(name) for name in runs}
    rows: list[tuple[str, list[str]]] = [
        ("", list(runs)),
        ("Training", []),
        ("loss at the start", [f"{run.losses[0]:.5f}" for run in runs.values()]),
        ("loss at the end (mean of the last 10 steps)", [f"{run.final_loss():.5f}" for run in runs.values()]),
        ("largest difference in loss", ["", f"{losses.largest:.1e}"]),
        (f"steps on which clipping fired (norm > {max_norm:g})", [f"{run.clipped(max_norm)}" for run in runs.values()]),
        (f"The same gradients clipped by both, {same.steps} times", []),
        ("median time in clipping", [f"{1e3 * seconds[name]:.3f} ms" for name in runs]),
        ("ratio (torch's time / fastclip's time)", ["", f"{seconds['torch'] / seconds['fastclip']:.2f}"]),
        ("largest error of the norm, against float64", [f"{same.norm_errors[name]:.1e}" for name in runs]),
        ("largest difference in norm", ["", f"{same.norm_difference:.1e}"]),
        ("largest difference in clipped gradients", ["", f"{same.gradient_difference:.1e}"]),
    ]
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(
        f"{'  ' * bool(cells) + label:<{width}}{''.join(f'{cell:>12}' for cell in cells)}".rstrip()
        for label, cells in rows
    )


def draw(runs: dict[str, Run], max_norm: float, out: Path) -> None:
    """Draw the losses and the gradient norms."""
    torch_run, fastclip_run = runs["torch"], runs["fastclip"]
    losses = parting(runs)
    steps = range(1, losses.steps + 1)
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)

    left.plot(steps, torch_run.losses, color="#f2a65a", linewidth=6, label="torch.nn.utils.clip_grad_norm_")
    left.plot(
        steps, fastclip_run.losses, color="#1b3a5c", linewidth=1.5, linestyle="--", label="fastclip.clip_grad_norm_"
    )
    if losses.horizon < losses.steps:
        left.axvline(losses.horizon + 0.5, color="gray", linestyle=":", label=f"more than {LOSS_TOLERANCE:g} apart")
    left.set_title(f"Losses: {losses} (largest difference {losses.largest:.1e})", fontsize="medium")
    left.set(xlabel="step", ylabel="loss (nats per byte)")
    left.legend()

    right.plot(steps, fastclip_run.norms, color="#1b3a5c", linewidth=1.5, label="before clipping")
    right.axhline(max_norm, color="#c8553d", linestyle="--", label=f"threshold, max_norm = {max_norm:g}")
    right.set_yscale("log")
    right.yaxis.set_major_formatter("{x:g}")
    share = fastclip_run.clipped(max_norm) / losses.steps
    right.set_title(f"Gradient norm: clipping fired on {share:.0%} of the steps", fontsize="medium")
    right.set(xlabel="step", ylabel="2-norm")
    right.legend()

    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="training steps of each run (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out/demo.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-norm", type=float, default=1.0, help="threshold for clipping (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < UNTIMED_STEPS:
        parser.error(f"--steps must be at least {UNTIMED_STEPS}")
    if not options.max_norm > 0:
        parser.error("--max-norm must be above 0")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison, and return the exit status."""
    options = parse(arguments)
    device = choose_device(options.device)
    text = read_text()
    model = GPT().to(device)
    same = SameGradients({"torch": nn.utils.clip_grad_norm_, "fastclip": fastclip.clip_grad_norm_}, model)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    size = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"A GPT of {size:,} parameters in {len(list(model.parameters()))} tensors, on {where}\n"
        f"fastclip {fastclip.__version__}, torch {torch.__version__}, Python {platform.python_version()}\n"
    )
    runs = {name: train(name, same, text, device, options) for name in same.clips}
    print(f"\n{table(runs, same, options.max_norm)}\n")
    print(
        f"The losses are {parting(runs)}. Norms are compared relative to the norm, and gradients relative to the\n"
        f"largest element; up to {TOLERANCE:g} is rounding."
    )
    draw(runs, options.max_norm, options.out)
    print(f"Picture: {options.out}")
    if not same.agree():
        print(f"demo: fastclip and torch disagree by more than {TOLERANCE:g}; see the last two rows", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
