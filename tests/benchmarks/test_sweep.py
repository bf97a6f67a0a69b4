"""The sweep's copies of the kernels, with other tiles, chunks and warps, launched under ptxlab."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import paths
import pytest
import torch

pytest.importorskip("triton")
if not shutil.which("gcc") or not paths.BENCHMARKS.exists():
    pytest.skip("ptxlab is made with gcc, and the benchmarks are in a checkout only", allow_module_level=True)

import ptxlab


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(paths.ROOT)
    module = importlib.import_module("benchmarks.sweep")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    ptxlab.activate(90)
    yield module
    ptxlab.check()
    ptxlab.deactivate()


def test_other_constants_are_right(sweep: ModuleType) -> None:
    torch.manual_seed(0)
    grads = [torch.randn(numel) for numel in (40_000, 7, 100)] + [torch.randn(70_000).bfloat16()]
    exact = float(torch.linalg.vector_norm(torch.cat([grad.double() for grad in grads])))
    expected = [grad * 0.5 for grad in grads]
    # The constructor launches each kernel once, without clipping.
    launches = sweep.Launches(sweep.Configuration(tile=256, chunk=2048, warps=4), grads)
    reduce, scale = launches.by(3)
    launches.norm.fill_(torch.nan)
    reduce()
    assert launches.norm.item() == pytest.approx(exact, rel=1e-6)
    launches.state.fill_(0.5)
    scale()
    for grad, right in zip(grads, expected, strict=True):
        assert torch.equal(grad, right)


def test_the_best_beside_what_is_there(sweep: ModuleType) -> None:
    rows = [
        sweep.Row(512, 8192, 8, per_sm, 64, "list", reduce_us, scale_us)
        for per_sm, reduce_us, scale_us in ((4, 20.0, 40.0), (5, 30.0, 35.0), (6, 10.0, 50.0))
    ]
    first, second = sweep.best(rows)
    assert "reduce_us now      20.0, best      10.0 with tile 512, chunk 8192, 8 warps, 6 an SM" in first
    assert "scale_us  now      35.0, best      35.0" in second
