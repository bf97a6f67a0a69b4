"""Missing memory ordering between programs is found in the compiled kernel, even if every value is right."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ptxlab
import pytest
import torch

triton: Any = pytest.importorskip("triton")
tl: Any = pytest.importorskip("triton.language")

SLOTS = 64
BLOCK = 1024

# A process without torch and Triton, which take ten seconds to import under the sanitizer.
RUN = f"""
import sys
import numpy as np
import ptxlab

kernel = ptxlab.Kernel(open(sys.argv[1]).read(), {1 << 16}, sanitize="thread")
for seed in range(10):
    x = np.ones(15 * {BLOCK} - 5, np.float32)
    partials = np.full({SLOTS}, np.nan, np.float32)
    total, ticket = np.zeros(1, np.float32), np.zeros(1, np.int32)
    arrays = (x, partials, total, ticket)
    ranges = [(array.ctypes.data, array.nbytes) for array in arrays]
    arguments = [start for start, _ in ranges] + [x.size]
    kernel.launch((15,), arguments, ranges, resident=4, jitter=20, seed=seed)
    assert total[0] == x.size and ticket[0] == 0, total
print("right")
"""


@triton.jit
def sum_of_squares(
    x,
    partials,
    total,
    ticket,
    size,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,
    ORDER: tl.constexpr,
    BARRIER: tl.constexpr,
):
    """The last program to take a ticket adds the partial sums of all."""
    program = tl.program_id(0)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + offsets, mask=offsets < size, other=0.0)
    tl.store(partials + program, tl.sum(values * values))
    if BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem=ORDER) == tl.num_programs(0) - 1:
        slots = tl.arange(0, SLOTS)
        tl.store(total, tl.sum(tl.load(partials + slots, mask=slots < tl.num_programs(0), other=0.0)))
        tl.store(ticket, 0)


@functools.cache
def _ptx(order: str, *, barrier: bool = False) -> str:
    ptxlab.activate(90)
    try:
        types = (*(torch.float32,) * 3, torch.int32, 15 * BLOCK - 5)
        compiled = sum_of_squares.warmup(*types, BLOCK=BLOCK, SLOTS=SLOTS, ORDER=order, BARRIER=barrier, grid=(1,))
    finally:
        ptxlab.deactivate()
    text: str = compiled.asm["ptx"]
    return text


def _ordered() -> str:
    return _ptx("acq_rel")


def _narrow_scope() -> str:
    text = _ptx("acq_rel").replace(".gpu.acq_rel", ".cta.acq_rel")
    assert text != _ptx("acq_rel")
    return text


VARIANTS: dict[str, tuple[Callable[[], str], int]] = {
    "acq_rel": (_ordered, 0),
    "relaxed": (functools.partial(_ptx, "relaxed"), ptxlab.RACE_FOUND),
    "release only": (functools.partial(_ptx, "release"), ptxlab.RACE_FOUND),
    "a barrier and relaxed": (functools.partial(_ptx, "relaxed", barrier=True), ptxlab.RACE_FOUND),
    "acq_rel in the scope of a CTA": (_narrow_scope, ptxlab.RACE_FOUND),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_ticket(variant: str, tmp_path: Path) -> None:
    ptx, status = VARIANTS[variant]
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx())
    done = ptxlab.run_under_sanitizer(["-c", RUN, str(source)])
    assert done.stdout == "right\n", done.stderr[:2000]
    assert done.returncode == status, done.stderr[:2000]
    if status:
        assert "test_races.py:" in done.stderr  # the report names lines of the Triton source


THROUGH_TRITON = """
import sys
import torch
import ptxlab
sys.path.insert(0, sys.argv[1])
from test_races import BLOCK, SLOTS, sum_of_squares

ptxlab.activate(90, sanitize="thread", resident=4, jitter=20)
x, ticket = torch.ones(15 * BLOCK - 5), torch.zeros(1, dtype=torch.int32)
partials, total = torch.full((SLOTS,), float("nan")), torch.zeros(1)
for _ in range(5):
    with ptxlab.recording():
        sum_of_squares[(15,)](x, partials, total, ticket, x.numel(), BLOCK, SLOTS, "relaxed", False)
    assert total.item() == x.numel()
print("right")
"""


def test_race_is_found_through_tritons_launcher() -> None:
    done = ptxlab.run_under_sanitizer(["-c", THROUGH_TRITON, str(Path(__file__).parent)])
    assert done.stdout == "right\n", done.stderr[:2000]
    assert done.returncode == ptxlab.RACE_FOUND, done.stderr[:2000]


def test_sanitizer_that_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    races = importlib.import_module("ptxlab.races")
    monkeypatch.setattr(races, "_prefix", races._prefix.__wrapped__)
    monkeypatch.setattr(races.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="does not start here"):
        ptxlab.run_under_sanitizer(["-c", "pass"])
