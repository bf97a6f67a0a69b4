"""The CPU's benchmark, on one small row."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import paths
import pytest


@pytest.fixture
def cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(paths.ROOT)
    monkeypatch.chdir(tmp_path)
    return importlib.import_module("benchmarks.cpu")


def test_rows_profile_and_picture(cpu: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    assert cpu.main(["-k", "demo and idle", "-p", "no:cacheprovider"]) == 0
    said = capfd.readouterr().out
    (row,) = [line.split() for line in said.splitlines() if line.startswith("the demo's model, 1M       idle")]
    torch_ms, fastclip_ms, ratio, read_ms = (float(row[i]) for i in (5, 7, 9, -3))
    assert min(torch_ms, fastclip_ms, read_ms) > 0
    assert ratio == pytest.approx(torch_ms / fastclip_ms, rel=0.02)
    (profile,) = [
        line.split()[-4:]
        for line in said.splitlines()
        if line.startswith("the demo's model, 1M   ") and "ms" not in line
    ]
    assert all(float(us) > 0 for us in profile)
    assert (Path("out") / "cpu.png").stat().st_size > 1000


def test_nothing_selected(cpu: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    assert cpu.main(["-k", "nothing of that name", "-p", "no:cacheprovider"]) != 0
    assert "Traceback" not in capfd.readouterr().out
