"""What the examples share: a line of progress, and a picture written to a folder that may not exist yet."""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure


def show(line: str, step: int, steps: int, every: int) -> None:
    """Report on a step: rewrite one line on a terminal; elsewhere print a line `every` so many steps, and the last."""
    last = step == steps
    if sys.stdout.isatty():
        print(f"\r{line}", end="\n" if last else "", flush=True)
    elif last or step % every == 0:
        print(line, flush=True)


def save(figure: Figure, out: Path) -> None:
    """Write a picture, and say where."""
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=130)
    print(f"Picture: {out}")
