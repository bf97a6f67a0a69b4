"""The command that measures clipping together with the optimizer's step."""

import importlib
from types import ModuleType

import paths
import pytest
import torch


@pytest.fixture
def optimizer(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(paths.ROOT)
    module = importlib.import_module("benchmarks.optimizer")
    monkeypatch.setattr(module, "WORKLOADS", {"2 x 3": [3, 3]})
    return module


def test_a_row_for_every_optimizer_and_the_unscaling(optimizer: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert optimizer.main(["--rounds", "1"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == 2 * (len(optimizer.OPTIMIZERS) + 1)
    for row in rows:
        differs = [float(value) for value in row.split("differs")[1].split(",")]
        assert max(differs) < 8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("rounds", ["0", "-3"])
def test_no_rounds(optimizer: ModuleType, rounds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        optimizer.main([f"--rounds={rounds}"])
    assert f"--rounds must be at least 1, not {rounds}" in capsys.readouterr().err
