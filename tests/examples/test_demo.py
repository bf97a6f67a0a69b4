"""The demo, with few steps."""

import importlib
import struct
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import paths
import pytest
import torch
from torch import Tensor, nn

import fastclip

pytest.importorskip("matplotlib", reason="the demo draws a picture")

STEPS = 4


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The demo as a module, on one thread: threads that wait for a busy core make it slow. Restores all settings."""
    monkeypatch.syspath_prepend(paths.EXAMPLES)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module("demo")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def arguments(out: Path, device: str = "cpu") -> list[str]:
    return ["--steps", str(STEPS), "--out", str(out), "--device", device]


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_prints_a_table_and_writes_a_picture(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    out = tmp_path / "new" / "demo.png"
    assert demo.main(arguments(out, device)) == 0

    printed = capsys.readouterr().out
    for row in (
        "loss at the start",
        "loss at the end",
        "largest difference in loss",
        "steps on which clipping fired (norm > 1)",
        f"The same gradients clipped by both, {2 * STEPS} times",
        "median time in clipping",
        "ratio (torch's time / fastclip's time)",
        "largest error of the norm, against float64",
        "largest difference in norm",
        "largest difference in clipped gradients",
        f"within 0.001 on all {STEPS} steps",
        f"Picture: {out}",
    ):
        assert row in printed
    assert "nan" not in printed

    picture = out.read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", picture[16:24])
    assert width > 1000
    assert height > 400
    assert len(picture) > 20_000


def test_runs_differ_only_in_the_function_that_clips(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastclip, "clip_grad_norm_", nn.utils.clip_grad_norm_)
    assert demo.main(arguments(tmp_path / "demo.png")) == 0
    differences = [line for line in capsys.readouterr().out.splitlines() if "largest difference" in line]
    assert [line.split()[-1] for line in differences] == ["0.0e+00"] * 3


def scaled_too_far(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.mul_(0.999)
    return norm


def not_a_number(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    assert parameters[-1].grad is not None
    parameters[-1].grad.view(-1)[0] = torch.nan
    return norm


def wrong_norm(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    return nn.utils.clip_grad_norm_(parameters, max_norm) * 1.001


@pytest.mark.parametrize("wrong", [scaled_too_far, not_a_number, wrong_norm])
def test_fails_when_the_implementations_disagree(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, wrong: object
) -> None:
    monkeypatch.setattr(fastclip, "clip_grad_norm_", wrong)
    assert demo.main(arguments(tmp_path / "demo.png")) == 1
    assert "disagree by more than 0.0003" in capsys.readouterr().err


def test_marks_where_the_losses_part(demo: ModuleType, tmp_path: Path) -> None:
    runs = {"torch": demo.Run([4.0, 3.0, 2.0], [1.0] * 3), "fastclip": demo.Run([4.0, 3.0, 2.5], [2.0] * 3)}
    losses = demo.parting(runs)
    assert (losses.largest, losses.horizon) == (0.5, 2)
    assert str(losses) == "within 0.001 on the first 2 of 3 steps"
    demo.draw(runs, 1.5, tmp_path / "demo.png")


@pytest.mark.parametrize("wrong", [["--steps", "2"], ["--max-norm", "0"], ["--max-norm", "nan"]])
def test_refuses_options_without_a_result(demo: ModuleType, wrong: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        demo.main(wrong)
    assert exit_.value.code == 2
