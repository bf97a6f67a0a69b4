"""Shared code of the examples: show progress, and save a picture."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure


def show(line: str, step: int, steps: int, every: int) -> None:
    """Report on a step. On a terminal, rewrite one line. Elsewhere, print a line every `every` steps, and the last."""
    last = step == steps
    if sys.stdout.isatty():
        print(f"\r{line}", end="\n" if last else "", flush=True)
    elif last or step % every == 0:
        print(line, flush=True)


def save(figure: Figure, out: Path) -> None:
    """Save a picture, in a new folder if necessary, and print its path."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    print(f"Picture: {out}")
