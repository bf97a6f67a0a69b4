"""The experiments, with few steps: each still shows what it is about."""

from __future__ import annotations

import importlib
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import paths
import pytest
import torch

pytest.importorskip("matplotlib", reason="the examples draw pictures")
pytest.importorskip("sklearn", reason="the examples' data are scikit-learn's")

from matplotlib.image import imread

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """Import an example by its name. Examples set the number of threads, which is restored."""
    monkeypatch.syspath_prepend(paths.EXAMPLES)
    threads = torch.get_num_threads()
    yield importlib.import_module
    torch.set_num_threads(threads)


def check_picture(path: Path) -> None:
    picture = imread(path)
    assert min(picture.shape[:2]) > 500
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50  # a blank one has one colour


def test_regression(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "regression.png"
    assert load("regression").main(["--epochs", "5", "--out", str(out)]) == 0

    printed = capsys.readouterr().out
    rows = {line[:26].strip(): line[26:].split() for line in printed.split("\n\n")[1].splitlines()[1:]}
    assert rows["unclipped"][:2] == ["nan", "nan"]
    for name in ("by norm, 1.0", "by value, 3.0", "by global norm, 1.0", "unclipped, torch's Adam"):
        assert 1e25 < float(rows[name][0]) < 3e25
        assert float(rows[name][3]) > math.sqrt(torch.finfo(torch.float32).max)
        assert float(rows["unclipped, standardised"][1]) < float(rows[name][1])
    assert "Unclipped, the loss is NaN in step" in printed
    assert "Each way of clipping keeps the run alive" in printed
    assert "Standardised data need no clipping" in printed
    check_picture(out)


def test_keras_adam_is_adam_until_a_square_overflows(load: Load) -> None:
    weights = {name: torch.nn.Parameter(torch.ones(2)) for name in ("keras", "torch")}
    optimizers = (
        load("regression").KerasAdam([weights["keras"]], lr=0.1),
        torch.optim.Adam([weights["torch"]], lr=0.1),
    )

    def step(*gradient: float) -> None:
        for weight, optimizer in zip(weights.values(), optimizers, strict=True):
            weight.grad = torch.tensor(gradient)
            optimizer.step()

    for gradient in ((1.0, 2.0), (1e10, -3.0), (-5.0, 4.0)):
        step(*gradient)
        torch.testing.assert_close(weights["keras"], weights["torch"])
    step(2e19, 1.0)
    assert weights["keras"].isfinite().all()
    step(1.0, 1.0)
    assert weights["keras"].isnan().tolist() == [True, False]
    assert weights["torch"].isfinite().all()


def test_recurrent(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "recurrent.png"
    assert load("recurrent").main(["--steps", "100", "--out", str(out)]) == 0

    printed = capsys.readouterr().out
    assert "unclipped, step" in printed
    assert "NonFinite('gradients'): the gradients are not finite in 7 of 7 parameters" in printed
    jump = printed[printed.index("Jump('norm', ratio=10.0)") :].splitlines()
    assert jump[2].strip().startswith("rnn.weight_hh_l0: norm")
    lost = next(line.split() for line in printed.splitlines() if line.startswith("step in which the loss was lost"))
    assert lost[-2].isdigit()
    assert lost[-1] == "-"
    final = next(line.split() for line in printed.splitlines() if line.startswith("loss at the end"))
    assert final[-2] == "nan"
    assert float(final[-1]) < 3.5  # a network that guesses has log(256) = 5.5
    check_picture(out)


def test_spikes(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "spikes.png"
    assert load("spikes").main(["--steps", "600", "--out", str(out)]) == 0

    printed = capsys.readouterr().out
    columns = ("loss", "a spike", "the burst", "clipped", "after rise", "skipped")
    rows = {
        line[:18].strip(): dict(zip(columns, (float(cell.rstrip("%")) for cell in line[18:].split()), strict=True))
        for line in printed.split("\n\n")[1].splitlines()[1:]
    }
    protected = ("fixed, 1.5", "quantile", "z-score", "z-score, relearn", "z-score, max", "skip")
    for name in protected:
        assert rows[name]["the burst"] < 0.1 < rows["fixed, 10"]["the burst"] < rows["unclipped"]["the burst"]
    for name in ("fixed, 1.5", "fixed, 0.2", "z-score"):
        assert rows[name]["after rise"] > 95
    for name in ("quantile", "z-score, relearn", "z-score, max"):
        assert rows[name]["after rise"] < 20
        assert rows[name]["loss"] < rows["z-score"]["loss"] < rows["fixed, 0.2"]["loss"]
    assert rows["fixed, 0.2"]["clipped"] == 100
    assert all(rows[name]["clipped"] < 20 for name in protected)
    assert "The triggers skipped 4 of 4 single spikes" in printed
    assert all((row["skipped"] > 0) == (name == "skip") for name, row in rows.items())
    check_picture(out)


def test_spikes_skip_garbage_and_the_first_steps_of_the_rise(load: Load) -> None:
    spikes = load("spikes")
    plan, options = spikes.Plan(1200), spikes.parse([])
    torch.set_num_threads(1)
    with pytest.warns(RuntimeWarning, match="steps skipped"):
        run = spikes.train(spikes.SETTINGS[-1], spikes.read_text(), plan, options)
    skipped = set(run.skipped())
    assert skipped > set(plan.singles)
    assert plan.burst[0] in skipped
    assert not skipped >= set(plan.burst)  # those that were skipped widen the window's deviation
    clean = skipped - set(plan.garbage)
    assert plan.rise + 1 in clean
    assert clean <= set(range(plan.rise + 1, plan.rise + 11))


def test_classifier(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "classifier.png"
    assert load("classifier").main(["--steps", "1000", "--data", str(tmp_path), "--out", str(out)]) == 0

    printed = capsys.readouterr().out
    assert "1437 of scikit-learn's digits to learn from" in printed
    rows = {line[:40].strip(): line.split()[-3:] for line in printed.split("\n\n")[2].splitlines()[1:]}
    assert all(float(cell.rstrip("%")) > 70 for cell in rows["accuracy on images not trained on"])  # chance is 10 %
    plain, by_value, by_norm = (float(cell.rstrip("%")) for cell in rows["steps that were clipped"])
    assert plain == 0 < by_value < by_norm < 100
    check_picture(out)


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])  # the first is the name in CIFAR-10's own files
def test_classifier_reads_cifar10(
    load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str], rng: np.random.Generator, module: bytes
) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = rng.integers(0, 256, (8, 3072), dtype=np.uint8)
    batch = pickle.dumps({b"data": pixels, b"labels": list(range(8))}, protocol=3).replace(b"numpy._core", module)
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / name).write_bytes(batch)
    classifier = load("classifier")

    images = classifier.read_cifar10(folder)
    assert images.train.shape == (40, 3, 32, 32)
    assert images.train_classes.tolist() == [*range(8)] * 5
    red = pixels[3, 32:64].astype(np.float32) / 127.5 - 1  # the second row of an image's first channel
    np.testing.assert_allclose(images.test[3, 0, 1], red, rtol=1e-6)
    arguments = ["--steps", "100", "--data", str(tmp_path), "--out", str(tmp_path / "classifier.png")]
    assert classifier.main(arguments) == 0
    assert "40 of CIFAR-10 to learn from, 8 to test with" in capsys.readouterr().out


def test_classifier_refuses_a_pickle_that_calls_something(load: Load, tmp_path: Path) -> None:
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": print}))
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print is no part of a NumPy array"):
        load("classifier").read_cifar10(tmp_path)


@pytest.mark.parametrize(
    ("name", "option"),
    [("regression", "--epochs"), ("classifier", "--steps"), ("recurrent", "--steps"), ("spikes", "--steps")],
)
def test_refuses_options_without_a_result(load: Load, name: str, option: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        load(name).main([option, "0"])
    assert exit_.value.code == 2
