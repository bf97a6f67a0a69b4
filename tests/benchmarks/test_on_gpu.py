"""The command that does all checks on a GPU: its dry run does every part, and it reports what happened to each."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import paths
import pytest
import torch

pytest.importorskip("matplotlib", reason="the benchmark draws a picture")
pytest.importorskip("triton")

if not paths.BENCHMARKS.exists():
    pytest.skip("the benchmarks are beside the tests in a checkout only", allow_module_level=True)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(paths.ROOT)
    return importlib.import_module("benchmarks.on_gpu")


def test_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--dry", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=420, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    parts = [
        "check",
        "tests",
        "memcheck",
        "compile",
        "gpu",
        "training",
        "ncu",
        "sweep",
        "optimizer",
        "counts",
        "racecheck",
    ]
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.startswith("".join(f"{part}: ok\n" for part in parts))
    assert "GPT 1.3B bf16, small" in summary
    assert "bf16 weights, freed, clips (moved in" in summary
    assert {file.name for file in tmp_path.iterdir()} == {
        *("log.txt", "summary.txt"),
        *("gpu.csv", "gpu.png", "training.csv"),
    }
    log = (tmp_path / "log.txt").read_text()
    for part in parts:
        assert f"######## {part}\n" in log


def test_without_a_gpu_each_part_says_so(
    on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert on_gpu.main(["gpu", "counts", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "== gpu: SKIPPED: torch sees no GPU" in said
    assert "== counts: SKIPPED: torch sees no GPU" in said
    assert "== check" not in said


def part(on_gpu: ModuleType, name: str, code: str, **fields: object) -> object:
    command = (sys.executable, "-c", code)
    return on_gpu.Part(name, **{"seconds": 30, "command": command, "dry": command, **fields})


def test_no_part_stops_the_others(on_gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One part fails, one takes too long with a child process; the output of both is kept."""
    slow = "import os, time; print('begun', flush=True); os.system('sleep 60')"
    session = on_gpu.Session(tmp_path, 60.0, dry=True)
    session.run(
        [
            part(on_gpu, "wrong", "print('FAILED this'); print('\\n' * 50); raise SystemExit(3)", alone=False),
            part(on_gpu, "slow", slow, seconds=2),
            part(on_gpu, "right", "import os; print('value', os.environ['A'])", environment={"A": "7"}),
        ]
    )
    assert session.close() == 1
    said = capsys.readouterr().out
    assert "== wrong: FAILED with 3" in said
    assert "\nFAILED this\n" in said
    assert "== slow: TIMED OUT" in said
    assert "begun" in said
    assert "== right: ok" in said
    assert "value 7" in (tmp_path / "log.txt").read_text()
    assert (tmp_path / "summary.txt").read_text().startswith("wrong: FAILED with 3\nslow: TIMED OUT\nright: ok\n")


def test_a_tool_or_the_time_may_be_missing(on_gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "_gpu", lambda: True)
    session = on_gpu.Session(tmp_path, 60.0, dry=False)
    session.run([part(on_gpu, "profile", "", needs="no-such-tool")])
    session.end = 0.0
    session.run([part(on_gpu, "late", "")])
    assert session.close() == 0
    assert session.verdicts == {
        "profile": "SKIPPED: there is no no-such-tool",
        "late": "SKIPPED: no time left",
    }


def test_an_unknown_part(on_gpu: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        on_gpu.main(["chekc"])
    assert "there is no part 'chekc', but machine, check, tests," in capsys.readouterr().err


def test_what_ncu_found(tmp_path: Path, on_gpu: ModuleType) -> None:
    (tmp_path / "ncu.csv").write_text(
        '==PROF== noise\n"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","reduce_kernel","gpu__time_duration.sum","us","12.5"\n'
        '"0","reduce_kernel","dram__bytes_read.sum","Mbyte","250"\n"1","apply_kernel","launch__grid_size","","523"\n'
    )
    assert list(on_gpu.summary_of(tmp_path)) == [
        "reduce_kernel, time 12.5 us, read 250 Mbyte",
        "apply_kernel, programs 523",
    ]
