"""The benchmark inside training steps, on one small model."""

from __future__ import annotations

import importlib
from types import ModuleType

import paths
import pytest

import fastclip


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(paths.ROOT)
    return importlib.import_module("benchmarks.steps")


@pytest.mark.parametrize("markdown", [False, True])
def test_rows(steps: ModuleType, capsys: pytest.CaptureFixture[str], markdown: bool) -> None:
    cells = steps.main(["--seconds", "0", "actor 64x64", *["--markdown"] * markdown])
    assert len(cells) == (2 if markdown else 4)
    said = capsys.readouterr().out
    for cell in cells:
        assert min(cell.torch, cell.fastclip, cell.walk) > 0
        assert f"{cell.torch / cell.fastclip:.2f}" in said
    rows = [line for line in said.splitlines() if "actor 64x64" in line]
    assert len(rows) == len(cells) / 2
    assert all("4,866" in row for row in rows)


@pytest.mark.parametrize("name", ["actor 64x64", "300 small tensors", "encoder 6x256, bf16"])
def test_what_a_step_clips(steps: ModuleType, name: str) -> None:
    """The bound is a hundredth of the previous step's norm, or so high that nothing is clipped."""
    training = steps.Training(steps.MODELS[name])
    training.step(fastclip.clip_grad_norm_, clips=False, frees=True)
    found = training.norm
    assert training.norm_now() == pytest.approx(found, rel=2**-7)
    training.step(fastclip.clip_grad_norm_, clips=True, frees=False)
    assert training.norm_now() == pytest.approx(found / 100, rel=2**-7)
    assert len(training.walks) == 2


def test_every_model_trains(steps: ModuleType) -> None:
    for model in steps.MODELS.values():
        training = steps.Training(model)
        training.step(fastclip.clip_grad_norm_, clips=False, frees=True)
        assert 0 < training.norm < steps.FAR


def test_a_model_of_no_such_name(steps: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        steps.main(["actor"])
    assert "there is no 'actor', but actor 64x64; " in capsys.readouterr().err
