"""Sinks write what the monitor recorded: each step once, whenever they get it."""

from __future__ import annotations

import csv
import json
import math
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch
from torch import nn

import fastclip
from fastclip.monitoring.history import Row

KEYS = [
    *("step", "loss", "loss_mean", "loss_s", "loss_z", "grad_norm", "grad_norm_mean", "grad_norm_s", "grad_norm_z"),
    *("clipped_grad_norm", "threshold", "coefficient", "clipped", "clip_rate", "skipped", "nonfinite"),
    *("grad_norm/0", "grad_norm/1"),
]


class Run:
    """A model of two layers, with steps in which all elements of a gradient are the same number."""

    def __init__(self, **options: Any) -> None:
        self.model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        self.monitor = fastclip.Monitor(self.model, **options)

    def step(self, value: float, loss: float | None = 1.0, *, second: bool = True) -> None:
        first_weight, second_weight = self.model.parameters()
        first_weight.grad = torch.full((2, 2), value)
        second_weight.grad = torch.full((2, 2), value) if second else None
        self.monitor.update(fastclip.clip_grads_(self.model, fastclip.ClipByGlobalNorm(1.0)), loss)


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_BACKEND", "numpy")
    rows: list[Row] = []
    run = Run()
    run.monitor.log_to(rows.append, every=2)
    run.step(2.0, 3.0)
    assert rows == []
    run.step(0.125, None, second=False)
    assert [list(row) for row in rows] == [KEYS, KEYS]
    assert rows[0] | {"grad_norm": None, "coefficient": None} == dict.fromkeys(KEYS) | {
        "step": 1,
        "loss": 3.0,
        "clipped_grad_norm": pytest.approx(1.0),
        "threshold": 1.0,
        "clipped": True,
        "clip_rate": 1.0,
        "skipped": False,
        "nonfinite": 0,
        "grad_norm/0": 4.0,
        "grad_norm/1": 4.0,
    }
    assert rows[0]["grad_norm"] == pytest.approx(math.sqrt(32))
    assert rows[0]["coefficient"] == pytest.approx(1 / math.sqrt(32))
    assert rows[1] == dict.fromkeys(KEYS) | {
        "step": 2,
        "loss_mean": 3.0,
        "loss_s": pytest.approx(0.03),
        "grad_norm": 0.25,
        "grad_norm_mean": rows[0]["grad_norm"],
        "grad_norm_s": pytest.approx(0.01 * math.sqrt(32)),
        "clipped_grad_norm": 0.25,
        "threshold": 1.0,
        "coefficient": 1.0,
        "clipped": False,
        "clip_rate": 0.5,
        "skipped": False,
        "nonfinite": 0,
        "grad_norm/0": 0.25,
    }


def test_rows_with_weights() -> None:
    rows: list[Row] = []
    run = Run(weights=True)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.fill_(1.0)
        list(run.model.parameters())[1][0, 0] = math.nan
    run.monitor.log_to(rows.append, every=1)
    run.step(1.0)
    assert list(rows[0]) == [*KEYS, "nonfinite_weights", "weight_norm/0", "weight_norm/1"]
    assert rows[0]["nonfinite_weights"] == 1
    assert rows[0]["weight_norm/0"] == 2.0
    assert math.isnan(rows[0]["weight_norm/1"] or 0)


def test_each_sink_gets_each_step_once() -> None:
    """Also if other sinks, triggers or `read` fetch the steps."""
    run = Run(triggers=[fastclip.NonFinite("loss")])
    run.step(1.0)  # before there are sinks
    seen: dict[int, list[Any]] = {3: [], 5: []}

    def note(every: int, row: Row) -> None:
        seen[every].append(row["step"])

    for every in seen:
        run.monitor.log_to(partial(note, every), every=every)
    for step in range(2, 9):
        run.step(1.0)
        run.monitor.read()
        assert seen[3] == list(range(2, step // 3 * 3 + 1))
        assert seen[5] == list(range(2, step // 5 * 5 + 1))
    run.monitor.flush()
    run.monitor.flush()
    assert seen == {3: list(range(2, 9)), 5: list(range(2, 9))}


def test_a_short_history_hands_on_in_time() -> None:
    steps: list[Any] = []
    run = Run(history=2, triggers=[fastclip.NonFinite("loss")])
    run.monitor.log_to(lambda row: steps.append(row["step"]), every=100)
    for _ in range(5):
        run.step(1.0)
    run.monitor.flush()
    assert steps == [1, 2, 3, 4, 5]


def test_an_error_is_seen_in_the_sinks() -> None:
    rows: list[Row] = []
    run = Run(triggers=[fastclip.NonFinite("loss", action="raise")])
    run.monitor.log_to(rows.append, every=100)
    run.step(1.0)
    with pytest.raises(fastclip.TriggerError):
        run.step(1.0, math.inf)
    assert [row["loss"] for row in rows] == [1.0, math.inf]


def test_a_resumed_run_does_not_repeat_steps() -> None:
    rows: list[Row] = []
    first, second = Run(), Run()
    first.step(1.0)
    first.step(1.0)
    second.monitor.log_to(rows.append, every=1)
    second.monitor.load_state_dict(first.monitor.state_dict())
    second.step(1.0)
    assert [row["step"] for row in rows] == [3]


def test_a_run_that_was_rolled_back_writes_its_steps_again() -> None:
    rows: list[Row] = []
    run = Run()
    run.monitor.log_to(rows.append, every=1)
    run.step(1.0)
    state = run.monitor.state_dict()
    run.step(1.0)
    run.monitor.load_state_dict(state)
    run.step(4.0)
    assert [(row["step"], row["grad_norm/0"]) for row in rows] == [(1, 2.0), (2, 2.0), (2, 8.0)]


# ---- Files


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    for start in (1, 3):  # resumed
        run = Run()
        run.monitor.load_state_dict(run.monitor.state_dict() | {"steps": start - 1})
        run.monitor.log_to(fastclip.CSVFile(path), every=2)
        run.step(1.0, math.nan)
        run.step(1.0, None, second=False)
        with path.open(newline="") as file:  # rows are in the file as soon as the sink got them
            assert len(file.readlines()) == 1 + start + 1
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == KEYS
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [row["loss"] for row in rows] == ["nan", "", "nan", ""]
    assert [row["grad_norm/1"] for row in rows] == ["2.0", "", "2.0", ""]
    assert rows[0]["clipped"] == "True"


def test_csv_of_another_monitor(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step,accuracy\r\n1,0.5\r\n")
    run = Run()
    run.monitor.log_to(fastclip.CSVFile(path))
    run.step(1.0)
    with pytest.raises(ValueError, match=r"log\.csv has other columns"):
        run.monitor.flush()
    assert path.read_text().count("\n") == 2


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for start in (1, 4):
        run = Run()
        run.monitor.load_state_dict(run.monitor.state_dict() | {"steps": start - 1})
        run.monitor.log_to(fastclip.JSONLines(str(path)), every=3)
        run.step(1.0, math.nan)
        run.step(math.inf, -math.inf)
        run.step(0.125, None, second=False)

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert [list(row) for row in rows] == [KEYS] * 6
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows[:3]] == ["NaN", "-Infinity", None]
    assert [row["grad_norm/1"] for row in rows[:3]] == [2.0, "Infinity", None]
    assert rows[0]["clipped"] is True
    assert rows[2]["clipped"] is False
    assert rows[1]["nonfinite"] == 2


# ---- TensorBoard


def test_tensorboard(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard", reason="there is no TensorBoard to write for")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    run = Run()
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        run.monitor.log_to(fastclip.TensorBoard(writer), every=3)
        run.step(1.0, 3.0)
        run.step(1.0, math.nan)
        run.step(0.125, None, second=False)
        written = accumulator.EventAccumulator(str(tmp_path)).Reload()  # the file has them before the writer is closed
    assert set(written.Tags()["scalars"]) == set(KEYS) - {"step", "loss_z", "grad_norm_z"}

    def scalars(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in written.Scalars(tag)]

    assert scalars("grad_norm/0") == [(1, 2.0), (2, 2.0), (3, 0.25)]
    assert scalars("grad_norm/1") == [(1, 2.0), (2, 2.0)]
    assert scalars("clipped") == [(1, 1.0), (2, 1.0), (3, 0.0)]
    assert scalars("loss") == [(1, 3.0), (2, pytest.approx(math.nan, nan_ok=True))]


def test_tensorboard_is_told_to_write_when_rows_are_handed_on() -> None:
    writer = Mock()
    run = Run()
    run.monitor.log_to(fastclip.TensorBoard(writer), every=2)
    run.step(1.0)
    run.step(1.0)
    assert {scalar.args[2] for scalar in writer.add_scalar.call_args_list} == {1, 2}
    assert writer.method_calls[-1] == call.flush()


# ---- Bad input


def test_bad_sinks() -> None:
    monitor = Run().monitor
    with pytest.raises(
        TypeError, match=r"CSVFile, JSONLines, TensorBoard or a function that takes a dict, not 'x\.csv'"
    ):
        monitor.log_to("x.csv")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`every` must be at least 1, not 0"):
        monitor.log_to(print, every=0)
    with pytest.raises(TypeError, match=r"SummaryWriter, not 'runs/1'"):
        fastclip.TensorBoard("runs/1")


@pytest.mark.parametrize("kind", [fastclip.CSVFile, fastclip.JSONLines])
def test_a_line_that_was_cut_off_is_ended(tmp_path: Path, kind: Any) -> None:
    path = tmp_path / "rows"
    kind(path).write([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}])
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])
    kind(path).write([{"step": 3, "loss": 0.125}])
    *_, cut_off, last = path.read_text().splitlines()
    assert "0.125" not in cut_off
    assert "0.125" in last
