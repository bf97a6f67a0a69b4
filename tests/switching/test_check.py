"""`python -m fastclip check` reports agreement, and it reports disagreement."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from fastclip.core import clipping
from fastclip.rules import clip_by
from fastclip.switching import check


def test_agreement(capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main(["--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "fastclip agrees with torch and with fp64." in printed
    rows = [line for line in printed.splitlines() if line.startswith("cpu ")]
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        # Four orders, each with the norm and the gradients against fp64 and the gradients against torch; five more.
        assert sum(f" {dtype} " in row and row.endswith(" ok") for row in rows) == 17


@pytest.mark.parametrize("error", [1e-5, float("nan")])
def test_disagreement(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: float) -> None:
    def wrong(parameters: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        return right(parameters, *args, **kwargs) * (1 + error)

    right = clipping.clip_grad_norm_
    monkeypatch.setattr(clipping, "clip_grad_norm_", wrong)
    assert check.main(["--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "DISAGREES" in printed
    assert "fastclip agrees" not in printed


@pytest.mark.parametrize(("module", "function"), [(clipping, "clip_grad_value_"), (clip_by, "clip_by_norm_")])
def test_gradients_that_are_not_clipped_disagree(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, function: str
) -> None:
    monkeypatch.setattr(module, function, lambda *_: None)
    assert check.main(["--device", "cpu"]) == 1


@pytest.mark.parametrize("device", ["bogus", "meta"])
def test_a_device_that_cannot_be_checked(capsys: pytest.CaptureFixture[str], device: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        check.main(["--device", device])
    assert stopped.value.code == 2
    assert f"cannot check {device}" in capsys.readouterr().err
