"""The benchmark for GPUs also runs without one, and reports no speed of wrong results."""

import csv
import importlib
from pathlib import Path
from types import ModuleType

import paths
import pytest
import torch

import fastclip

pytest.importorskip("matplotlib", reason="the benchmark draws a picture")


@pytest.fixture
def benchmark_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(paths.ROOT)
    return importlib.import_module("benchmarks.gpu")


def run(module: ModuleType, out: Path) -> tuple[int, list[dict[str, str]]]:
    status = int(module.main(["--small", "--only", "10 x 4 fp32", "--out", str(out)]))
    file = out / "gpu.csv"
    return status, list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def test_table_csv_and_picture(benchmark_gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, rows = run(benchmark_gpu, tmp_path)
    assert status == 0
    assert {(row["contender"], row["operation"]) for row in rows} >= {
        (contender, operation)
        for contender in ("fastclip", "torch foreach", "torch loop", "torch.compile")
        for operation in ("norm", "idle", "clipping", "value")
        if (contender, operation) != ("torch.compile", "value")
    }
    for row in rows:
        assert f"torch {fastclip.info().versions['torch']}" in row["environment"]
        assert float(row["gpu_p20_ms"]) <= float(row["gpu_ms"]) <= float(row["gpu_p80_ms"])
        assert float(row["host_ms"]) > 0
        assert (
            0
            < float(row["floor_ms"])
            == pytest.approx(float(row["percent_of_floor"]) / 100 * float(row["gpu_ms"]), rel=1e-9)
        )
        assert row["has_gaps"] == "False"
    assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")
    assert "10 x 4 fp32, small" in capsys.readouterr().out


def test_no_speed_of_what_is_wrong(
    benchmark_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = benchmark_gpu.Contender(
        "fastclip",
        lambda grads: torch.nn.utils.get_total_norm(grads) * 1.2,
        lambda params, bound: torch.nn.utils.clip_grad_norm_(params, bound * 0.8),
        lambda params, bound: torch.nn.utils.clip_grad_value_(params, bound * 0.7),
    )
    monkeypatch.setattr(benchmark_gpu, "contenders", lambda _workload, _params: [wrong])
    assert run(benchmark_gpu, tmp_path) == (1, [])
    out = capsys.readouterr().out
    assert "WRONG, and not timed: the norm is" in out
    assert "the norm of what was clipped is" in out
    assert "the largest value that was clipped is" in out


def test_a_contender_that_cannot_does_not_stop_the_others(
    benchmark_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raising(*_: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    utils = torch.nn.utils
    both = [
        benchmark_gpu.Contender("broken", raising, raising),
        benchmark_gpu.Contender("whole", utils.get_total_norm, utils.clip_grad_norm_),
    ]
    monkeypatch.setattr(benchmark_gpu, "contenders", lambda _workload, _params: both)
    status, rows = run(benchmark_gpu, tmp_path)
    assert status == 0
    assert {row["contender"] for row in rows} == {"whole"}
    assert "broken             WRONG, and not timed: RuntimeError: no such kernel" in capsys.readouterr().out


def test_no_speed_where_the_check_fails(
    benchmark_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_gpu.check, "main", lambda _arguments: 1)
    assert run(benchmark_gpu, tmp_path) == (1, [])
