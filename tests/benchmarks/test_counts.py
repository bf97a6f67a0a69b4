"""The command that counts the host's operations and the driver's launches and copies in a call."""

import importlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import paths
import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    if not (torch.cuda.is_available() or shutil.which("gcc")):
        pytest.skip("the stand-in driver is made with gcc")
    monkeypatch.syspath_prepend(paths.ROOT)
    monkeypatch.delenv("FASTCLIP_BACKEND", raising=False)
    module = importlib.import_module("benchmarks.counts")
    monkeypatch.setattr(module, "ROUNDS", 1)
    yield module
    assert "FASTCLIP_BACKEND" not in os.environ


def test_two_launches_and_one_copy_whatever_the_gradients(
    counts: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = counts.main([1, 50])
    assert capsys.readouterr().out.count("\n") == 3 + len(rows)
    assert len(rows) == 2 * len(counts.SHAPES) * 2
    for i, (ours, theirs) in enumerate(rows):
        moved = i % 2 == 1
        assert (ours.launches, ours.copies, ours.syncs) == (2, int(moved), 0)
        assert ours.allocations == 1 + int(moved)
        assert theirs.syncs == 0
        assert ours.microseconds > 0
    assert rows[-1][1].allocations > 50  # so allocations are counted


def test_a_sync_is_counted(counts: ModuleType) -> None:
    if torch.cuda.is_available():
        pytest.skip("this is how they are counted without a GPU")
    seen = counts.Counts()
    with counts._Operations(seen):
        torch.ones(3).sum().item()
    assert (seen.syncs, seen.allocations) == (1, 2)


@pytest.mark.parametrize("part", ["reduce", "moved"])
def test_what_a_plan_does_beside_is_counted(counts: ModuleType, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the call itself, and in its work for gradients that have moved."""
    if torch.cuda.is_available():
        pytest.skip("this is how they are counted without a GPU")
    triton = importlib.import_module("fastclip.backends.triton")
    method = getattr(triton.TritonPlan, part)

    def wasteful(*arguments: Any) -> Any:
        torch.zeros(7).sum().item()
        return method(*arguments)

    stay, moved = 0, 1
    row = moved if part == "moved" else stay
    cache, prepare = (importlib.import_module(f"fastclip.core.{name}") for name in ("cache", "prepare"))

    def measured() -> Any:
        """The counts with empty caches, as earlier gradients may have had the same addresses."""
        monkeypatch.setattr(prepare, "_cache", cache.Cache())
        monkeypatch.setattr(triton, "_cache", triton._TableCache())
        counted, _ = counts.main([3])[row]
        return counted

    frugal = measured()
    monkeypatch.setattr(triton.TritonPlan, part, wasteful)
    wasted = measured()
    assert (wasted.syncs, wasted.allocations) == (frugal.syncs + 1, frugal.allocations + 2)


@pytest.mark.parametrize(
    ("numels", "cuda12", "cuda13"), [([1 << 20] * 2000, 100, 15), ([4] * 1000, 10, 2), ([6_000_261 * 256], 74, 11)]
)
def test_launches_of_torch(counts: ModuleType, numels: list[int], cuda12: int, cuda13: int) -> None:
    """For workloads where the number of torch's launches for a norm is known; scaling takes the same number."""
    grads = [(numel, torch.float32) for numel in numels]
    rest = -(-len(numels) // 128) + 7
    assert counts.foreach_launches(grads, 110, 320) == 2 * cuda12 + rest
    assert counts.foreach_launches(grads, 770, 2240) == 2 * cuda13 + rest


def test_adaptive_rules_launch_hardly_more_than_fixed_ones(
    counts: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three launches at most, whatever the number of gradients; torch's small operations are launches, too."""
    table = counts.rules([3, 40])
    assert capsys.readouterr().out.count("\n") == 2 + len(table)
    for number, name in table:
        own = table[number, name]
        fixed = table[number, "ClipGradNorm, global" if name.endswith("global") else "ClipByNorm, parameter"]
        assert (own.syncs, own.copies) == (0, 0)
        assert own.launches <= fixed.launches + (4 if "unit" in name else 2 if "Weight" in name else 1)
        assert own == replace(table[3, name], microseconds=own.microseconds)
        if "Weight" not in name:
            assert own.launches + own.operations <= fixed.launches + fixed.operations + 3
