"""What a monitor records, how it averages, and that it waits for the device only when it reads."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from legs import Leg
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastclip
from fastclip.rules.apply import ClipResult
from fastclip.rules.groups import Groups

CPU = torch.device("cpu")
RULE = fastclip.ClipByGlobalNorm(1.0)


class Transfers(TorchDispatchMode):  # type: ignore[no-untyped-call]  # as torch has it
    """Counts the copies from the meta device to the CPU; its tensors have no values, so a copy is zeros.

    Code that runs there without a copy needs no value, so it would not wait for a GPU either: torch raises where a meta
    tensor is made a number or a condition.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == CPU:
            self.shapes.append(tuple(args[0].shape))
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype", args[0].dtype))
        return func(*args, **kwargs)


def named(*sizes: int) -> list[tuple[str, Tensor]]:
    """Parameters without gradients: layer0.weight, layer0.bias, layer1.weight, and so on."""
    return [(f"layer{i // 2}.{('weight', 'bias')[i % 2]}", nn.Parameter(torch.zeros(n))) for i, n in enumerate(sizes)]


def result_of(norms: Sequence[float], *, present: Sequence[int] | None = None) -> ClipResult:
    """The result of clipping gradients with these norms."""
    vector = torch.tensor(norms, dtype=torch.float64)
    norm = vector.norm()
    groups = Groups(("all",), (0,) * len(norms))
    coefficients = (1 / norm).clamp(max=1).reshape(1)
    return ClipResult(
        norm, vector, range(len(norms)) if present is None else present, groups, norm.reshape(1), coefficients
    )


def series(monitor: fastclip.Monitor, norms: Sequence[float], losses: Sequence[float | None] | None = None) -> None:
    """Do steps of a monitor of one parameter."""
    for norm, loss in zip(norms, losses or [None] * len(norms), strict=True):
        monitor.update(result_of([norm]), loss)


def reference(values: Sequence[float], decay: float, warmup: int) -> list[tuple[float, float, float]]:
    """Mean, s and z before each value, by the formulas."""
    mean = variance = 0.0
    count = 0
    rows = []
    for x in values:
        s = math.sqrt(variance + (0.01 * mean) ** 2)
        ready = count >= warmup and math.isfinite(x) and s > 0
        z = (x - mean) / s if ready else math.nan
        rows.append((mean if count else math.nan, s if count else math.nan, z))
        if not math.isfinite(x):
            continue
        count += 1
        weight = max(1 - decay, 1 / count)
        distance = max(-3 * s, min(3 * s, x - mean)) if ready else x - mean
        mean += weight * distance
        variance = (1 - weight) * (variance + weight * distance**2)
    return rows


# ---- Averages


@pytest.mark.parametrize("skips", [False, True], ids=["at the look", "in the step"])
def test_averages_are_those_of_the_formulas(rng: np.random.Generator, skips: bool) -> None:
    norms = np.exp(rng.standard_normal(200)).tolist()
    losses = (rng.standard_normal(200) * 3 - 1).tolist()
    norms[60], losses[50], losses[90], losses[3], norms[100] = 1e6, math.nan, -math.inf, math.nan, math.inf
    triggers = [fastclip.Jump("norm", z=1e9, action="skip")] if skips else []
    monitor = fastclip.Monitor(named(1), triggers=triggers, decay=0.9, warmup=7)
    series(monitor, norms, losses)
    history = monitor.read()
    for column, values in enumerate((losses, norms)):
        expected = np.array(reference(values, 0.9, 7))
        for i, what in enumerate((history.mean, history.s, history.z)):
            np.testing.assert_allclose(what[:, column], expected[:, i], rtol=1e-9, atol=1e-12)
    assert np.isnan(history.z[:7]).all()
    assert np.isfinite(history.z[8:50]).all()


def test_averages_begin_as_plain_ones() -> None:
    monitor = fastclip.Monitor(named(1), decay=0.97)
    series(monitor, [1.0, 2.0, 6.0, 7.0])
    history = monitor.read()
    assert history.mean[3, 1] == pytest.approx(3.0)
    assert history.s[3, 1] ** 2 == pytest.approx(np.var([1.0, 2.0, 6.0]) + 0.03**2)


def test_an_outlier_is_forgotten_soon() -> None:
    monitor = fastclip.Monitor(named(1))
    series(monitor, [1.0, 1.2, 0.8, 1.0] * 10 + [1e9] + [1.0, 1.2, 0.8, 1.0] * 2)
    history = monitor.read()
    assert history.z[40, 1] > 1e9
    assert history.mean[-1, 1] < 1.1
    assert history.s[-1, 1] < 2 * history.s[40, 1]


@pytest.mark.parametrize("start", [1.0, 0.0])
def test_a_new_level_is_followed(start: float) -> None:
    """The average of a constant series, even one of zeros, follows a new level."""
    monitor = fastclip.Monitor(named(1))
    series(monitor, [start] * 50 + [1000.0] * 150)
    history = monitor.read()
    assert history.mean[-1, 1] == pytest.approx(1000, rel=0.5)
    assert history.z[-1, 1] < 3


def test_huge_values_do_not_spoil_the_averages() -> None:
    monitor = fastclip.Monitor(named(1), warmup=2)
    series(monitor, [1.0, 2.0, 1e200, 1.5, 1.0])
    assert np.isfinite(monitor.read().mean[-1, 1])
    assert monitor.read().mean[-1, 1] < 2


# ---- What is recorded


def test_norms_of_a_model(leg: Leg, rng: np.random.Generator) -> None:
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(leg.device)
    monitor = fastclip.Monitor(model, weights=True)
    found = []
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.from_numpy(rng.standard_normal(parameter.shape)).to(parameter)
        if step == 1:
            model[0].bias.grad = None
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        found.append([math.nan if g is None else oracle.norm([g], 2) for g in grads])
        monitor.update(fastclip.clip_grads_(model, RULE), torch.tensor(float(step)))
    history = monitor.read()
    np.testing.assert_allclose(history.norms, found, rtol=1e-5)
    assert history.present.tolist() == [[True] * 4, [True, False, True, True], [True] * 4]
    np.testing.assert_allclose(history.norm, np.sqrt(np.nansum(np.square(found), axis=1)), rtol=1e-5)
    np.testing.assert_allclose(history.coefficient, np.minimum(1 / history.norm, 1), rtol=1e-5)
    layers = np.sqrt(np.nansum(np.square(found).reshape(3, 2, 2), axis=2))
    np.testing.assert_allclose(history.group_norms, layers, rtol=1e-5)
    assert history.groups.labels == ("0", "1")
    weights = [oracle.norm([p.detach()], 2) for p in model.parameters()]
    np.testing.assert_allclose(history.weights, [weights] * 3, rtol=1e-5)
    assert history.loss.tolist() == [0.0, 1.0, 2.0]
    assert history.steps.tolist() == [1, 2, 3]


def test_weights_that_lie_elsewhere_by_the_next_step() -> None:
    """Their memory is replaced by that of a checkpoint, say; the old one stays, with other values."""
    weights = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(3))]
    monitor = fastclip.Monitor(weights, weights=True)
    monitor.update(fastclip.measure_grads(weights))
    old = weights[0].data
    weights[0].data = torch.full((4,), 3.0)
    monitor.update(fastclip.measure_grads(weights))
    assert old.tolist() == [1.0] * 4
    assert monitor.read().weights == pytest.approx(np.array([[2.0, 3**0.5], [6.0, 3**0.5]]))


def test_a_gradient_that_is_missing_is_neither_zero_nor_non_finite() -> None:
    monitor = fastclip.Monitor(named(1, 1, 1))
    monitor.update(result_of([3.0, 0.0, 4.0], present=[0, 2]))
    monitor.update(result_of([3.0, math.nan, 0.0], present=[0, 1]))
    monitor.update(result_of([0.0, 0.0, 0.0], present=[]))
    history = monitor.read()
    assert history.nonfinite.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(history.group_norms, [[3, 4], [math.nan, math.nan], [math.nan, math.nan]])
    assert history.group_present.tolist() == [[True, True], [True, False], [False, False]]
    assert history.has_norm.tolist() == [True, True, False]
    assert math.isnan(history.norm[2])
    rows = list(history.rows())
    assert [row["grad_norm"] for row in rows][::2] == [5.0, None]
    assert [row["grad_norm/layer1"] for row in rows] == [4.0, None, None]


def test_a_parameter_group_without_parameters() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    groups: list[dict[str, Any]] = [{"params": [first]}, {"params": []}, {"params": [second]}]
    monitor = fastclip.Monitor(groups, by="group")
    monitor.update(result_of([3.0, 4.0]))
    np.testing.assert_array_equal(monitor.read().group_norms, [[3.0, math.nan, 4.0]])


def test_a_step_without_any_gradient_is_no_zero_to_the_averages() -> None:
    model = nn.Linear(2, 1)
    monitor = fastclip.Monitor(model)
    series_of_grads: list[float | None] = [2.0, None, 2.0]
    for value in series_of_grads:
        for parameter in model.parameters():
            parameter.grad = None if value is None else torch.full_like(parameter, value)
        monitor.update(fastclip.clip_grads_(model, RULE))
    assert monitor.read().mean[2, 1] == pytest.approx(math.sqrt(12))


def test_share_clipped_and_the_smallest_coefficient() -> None:
    model = nn.Linear(2, 2)
    monitor = fastclip.Monitor(model)
    for scale in (10.0, 0.01, 4.0, 0.02):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, scale)
        monitor.update(fastclip.clip_grads_(model, fastclip.ClipByNorm(1.0)))
    history = monitor.read()
    assert history.clipped.tolist() == [True, False, True, False]
    assert history.share_clipped == 0.5
    assert history.coefficient.tolist() == pytest.approx([1 / 20, 1, 1 / 8, 1])  # the weight's norm is 2 * scale


AFTERWARDS: dict[str, Any] = {
    "global": RULE,
    "parameters": fastclip.ClipByNorm(1.0),
    "layers": fastclip.ClipByNorm([1.0, 7.0], by="layer"),
    "torch's": fastclip.ClipGradNorm(0.5),
    "a function": lambda norms: -0.5 * torch.ones_like(norms),
    "nothing to clip": fastclip.ClipByGlobalNorm(1e9),
}


@pytest.mark.parametrize("rule", AFTERWARDS)
@pytest.mark.parametrize("scale", [3.0, 1e200], ids=str)
def test_the_norm_after_clipping(rule: str, scale: float) -> None:
    """The same as if the gradients were read again."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    monitor = fastclip.Monitor(model)
    monitor.update(fastclip.clip_grads_(model, AFTERWARDS[rule]))
    exact = oracle.norm([parameter.grad for parameter in model.parameters() if parameter.grad is not None], 2)
    history = monitor.read()
    assert history.clipped_norm[0] == pytest.approx(exact, rel=1e-12)
    assert next(history.rows())["clipped_grad_norm"] == history.clipped_norm[0]


def test_the_norm_after_clipping_where_there_is_none() -> None:
    model = nn.Linear(2, 2)
    monitor = fastclip.Monitor(model)
    monitor.update(fastclip.clip_grads_(model, RULE))  # without gradients
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 5.0)
    monitor.update(fastclip.measure_grads(model))
    monitor.update(fastclip.clip_grads_(model, fastclip.ClipByValue(-1, 1)))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    monitor.update(fastclip.clip_grads_(model, RULE))
    assert math.isnan(monitor.read().clipped_norm[0])
    rows = [row["clipped_grad_norm"] for row in monitor.read().rows()]
    assert rows[:3] == [None, pytest.approx(math.sqrt(6 * 25)), None]
    assert math.isnan(rows[3] or 0)


@pytest.mark.parametrize("skips", [False, True], ids=["at the look", "in the step"])
def test_the_clip_rate_is_of_the_last_steps(skips: bool) -> None:
    """However many steps are read at once, and also after a checkpoint."""
    triggers = [fastclip.NonFinite("loss", action="skip")] if skips else []
    norms = [0.5, 2.0, 3.0, 0.1, 0.2, 4.0, 0.3]
    expected = [0, 1 / 2, 2 / 3, 2 / 4, 2 / 4, 2 / 4, 1 / 4]

    def rates(*spans: int) -> list[float]:
        """The clip rates of a monitor that is saved and restored after each span, and read in the middle of it."""
        found, state, left = [], None, list(norms)
        for span in spans:
            monitor = fastclip.Monitor(named(1), triggers=triggers, window=4)
            if state is not None:
                monitor.load_state_dict(state)
            series(monitor, left[: span // 2])
            monitor.read()
            series(monitor, left[span // 2 : span])
            found += monitor.read().clip_rate.tolist()
            state, left = monitor.state_dict(), left[span:]
        return found

    assert rates(7) == pytest.approx(expected)
    assert rates(3, 4) == pytest.approx(expected)
    monitor = fastclip.Monitor(named(1), window=4)
    series(monitor, norms)
    assert [row["clip_rate"] for row in monitor.read().rows()] == pytest.approx(expected)
    assert str(monitor.read()).startswith("steps 1 to 7: 42.9% clipped (25.0% of the last 4), 0 skipped")


@pytest.mark.parametrize("rule", [None, fastclip.ClipByValue(-1, 1)])
def test_without_coefficients(rule: Any) -> None:
    model = nn.Linear(2, 2)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 5.0)
    monitor = fastclip.Monitor(model)
    monitor.update(fastclip.measure_grads(model) if rule is None else fastclip.clip_grads_(model, rule))
    history = monitor.read()
    assert history.clipped.tolist() == [rule is not None]
    assert next(history.rows())["coefficient"] is None


@pytest.mark.parametrize("loss", [torch.tensor(2.5), torch.tensor([2.5], dtype=torch.bfloat16), 2.5])
def test_the_loss_may_come_either_way(loss: Tensor | float) -> None:
    monitor = fastclip.Monitor(named(1))
    monitor.update(result_of([1.0]), loss)
    monitor.record_loss(9.0)
    monitor.record_loss(loss)
    monitor.update(result_of([1.0]))
    monitor.update(result_of([1.0]))
    history = monitor.read()
    assert history.loss[:2].tolist() == [2.5, 2.5]
    assert history.has_loss.tolist() == [True, True, False]
    assert [row["loss"] for row in history.rows()] == [2.5, 2.5, None]


def test_nothing_holds_on_to_the_graph() -> None:
    weight = nn.Parameter(torch.ones(3))
    monitor = fastclip.Monitor([("w", weight)], weights=True, triggers=[fastclip.NonFinite("loss", action="skip")])
    loss = weight.square().sum()
    monitor.record_loss(loss)
    assert isinstance(monitor._loss, Tensor)
    assert not monitor._loss.requires_grad
    torch.autograd.backward(loss)
    skip = monitor.update(fastclip.clip_grads_([("w", weight)], RULE), loss)
    assert not skip.requires_grad
    assert not any(step.numbers.requires_grad for step in monitor._unread)


def test_what_is_kept_is_bounded() -> None:
    monitor = fastclip.Monitor(named(1), history=5)
    for step in range(12):
        monitor.update(result_of([1.0 + step]))
        assert len(monitor._unread) < 5
    assert monitor.read().steps.tolist() == [8, 9, 10, 11, 12]
    assert monitor.read().norm.tolist() == [8, 9, 10, 11, 12]
    assert monitor.read().mean[-1, 1] == pytest.approx(np.mean(np.arange(1, 12)))


# ---- Waiting for the device


TRIGGERS = [
    fastclip.Jump("norm", z=6.0, ratio=2.0, action="skip"),
    fastclip.NonFinite("weights", action="skip"),
    fastclip.Vanishing(1e-9, action="skip"),
]


@pytest.mark.parametrize("triggers", [[], TRIGGERS], ids=["idle", "skipping"])
@pytest.mark.parametrize("rule", [RULE, fastclip.ClipByNorm(1.0, by="layer")], ids=["global", "by layer"])
def test_a_step_never_waits_and_a_reading_transfers_once(triggers: list[Any], rule: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)).to("meta")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model[1].bias.grad = None
    monitor = fastclip.Monitor(model, triggers=triggers, weights=True, max_skipped=100)
    with Transfers() as transfers:
        for _ in range(40):
            skip = monitor.update(fastclip.clip_grads_(model, rule), torch.ones((), device="meta"))
            assert skip.is_meta
        assert transfers.shapes == []
        assert len(monitor.read().steps) == 40
        assert [shape[0] for shape in transfers.shapes] == [40]
        monitor.read()  # nothing is new
        assert len(transfers.shapes) == 1
    monitor.update(fastclip.clip_grads_(model, rule))
    with pytest.raises(NotImplementedError, match="meta"):  # so this test would notice a wait
        monitor.read()


def test_steps_on_several_devices() -> None:
    """A step without any gradient is on the CPU, and a model may move to another device."""
    model = nn.Linear(2, 1).to("meta")
    monitor = fastclip.Monitor(model)
    with Transfers():
        for grads in (True, False, True):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) if grads else None
            monitor.update(fastclip.clip_grads_(model, RULE))
        history = monitor.read()
    assert history.has_norm.tolist() == [True, False, True]
    assert history.steps.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "looks"),
    [
        ({}, []),
        ({"history": 8}, [8]),
        ({"triggers": [fastclip.NonFinite("loss")], "every": 5}, [5, 10]),
        ({"triggers": [fastclip.NonFinite("loss")]}, list(range(1, 13))),
        ({"triggers": [fastclip.NonFinite("loss", action="skip")], "max_skipped": 6}, [6, 12]),
    ],
)
def test_when_the_host_looks(options: Any, looks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monitor = fastclip.Monitor(named(1), **options)
    seen = []
    sync = monitor._sync

    def noted() -> None:
        seen.append(monitor.steps)
        sync()

    monkeypatch.setattr(monitor, "_sync", noted)
    series(monitor, [1.0] * 12)
    assert seen == looks


# ---- Resuming


def test_a_resumed_run_goes_on_without_a_false_alarm(rng: np.random.Generator) -> None:
    norms = np.exp(0.1 * rng.standard_normal(80)).tolist()
    losses = rng.standard_normal(80).tolist()
    whole = fastclip.Monitor(named(1))
    series(whole, norms, losses)
    first, second = fastclip.Monitor(named(1)), fastclip.Monitor(named(1))
    series(first, norms[:50], losses[:50])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    series(second, [100.0] * 3)  # loading drops these steps
    second.load_state_dict(torch.load(file, weights_only=True))
    series(second, norms[50:], losses[50:])
    np.testing.assert_array_equal(second.read().z, whole.read().z[50:])
    assert second.read().steps.tolist() == list(range(51, 81))


def test_a_state_does_not_change_with_the_monitor() -> None:
    monitor = fastclip.Monitor(named(1))
    series(monitor, [1.0, 2.0])
    state = monitor.state_dict()
    averages = state["averages"].clone()
    series(monitor, [5.0, 6.0])
    monitor.read()
    assert torch.equal(state["averages"], averages)


@pytest.mark.parametrize("state", [{}, {"steps": 3}, {"steps": 3, "averages": torch.zeros(2)}])
def test_a_foreign_state(state: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="state_dict"):
        fastclip.Monitor(named(1)).load_state_dict(state)


# ---- Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"history": 0}, "`history` must be at least 1"),
        ({"every": 0}, "`every` must be at least 1"),
        ({"warmup": 0}, "`warmup` must be at least 1"),
        ({"max_skipped": 0}, "`max_skipped` must be at least 1"),
        ({"decay": 1.0}, "`decay` must be from 0 to below 1"),
        ({"triggers": [fastclip.NonFinite("weights")]}, "weights=True"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fastclip.Monitor(named(1), **options)


def test_bad_triggers() -> None:
    with pytest.raises(TypeError, match="Jump, Above, NonFinite or Vanishing, not 'loss'"):
        fastclip.Monitor(named(1), triggers=["loss"])  # type: ignore[list-item]


def test_bad_parameters() -> None:
    with pytest.raises(ValueError, match="no parameters to monitor"):
        fastclip.Monitor([])
    with pytest.raises(ValueError, match=r"model.named_parameters\(\)"):
        fastclip.Monitor(nn.Linear(1, 1).parameters(), by="layer")


def test_parameters_without_names() -> None:
    monitor = fastclip.Monitor(nn.Linear(1, 1).parameters())
    assert monitor.names == ["parameters[0]", "parameters[1]"]
    assert monitor.groups.of == (0, 1)


def test_bad_results() -> None:
    monitor = fastclip.Monitor(named(1, 1))
    with pytest.raises(ValueError, match="made for 2 parameters, and 3 were clipped"):
        monitor.update(result_of([1.0, 2.0, 3.0]))
    without = ClipResult(torch.tensor(1.0), None, range(2), Groups(("all",), (0, 0)), torch.ones(1))
    with pytest.raises(ValueError, match="needs the norm of each parameter"):
        monitor.update(without)
    with pytest.raises(ValueError, match=r"not a tensor of shape \(2,\)"):
        monitor.update(result_of([1.0, 2.0]), torch.ones(2))
    assert monitor.read().steps.size == 0


# ---- In print


def test_a_monitor_in_print() -> None:
    monitor = fastclip.Monitor(named(1, 1))
    monitor.update(result_of([1.0, 2.0]))
    assert repr(monitor) == "<Monitor of 2 parameters after 1 steps>"


def test_a_summary() -> None:
    monitor = fastclip.Monitor(named(1, 1, 1))
    assert str(monitor.read()) == "no steps"
    monitor.update(result_of([0.3, 0.4, 0.0]), 4.0)
    monitor.update(result_of([math.nan, 0.4, 0.1]), 2.0)
    first, loss, norm, last = str(monitor.read()).splitlines()
    assert first == "steps 1 to 2: 50.0% clipped, 0 skipped, 1 with non-finite gradients"
    assert loss == "loss 2 after a mean of 4 ± 0.04, largest 4 at step 1"
    assert norm == "norm nan after a mean of 0.5 ± 0.005, largest 0.5 at step 1"
    assert last == "largest norms at the last step: layer0 nan, layer1 0.1"


# ---- Defects that a review found


def steps(monitor: fastclip.Monitor, model: nn.Module, *norms: float) -> None:
    """Do a step for each global norm."""
    for norm in norms:
        for i, parameter in enumerate(model.parameters()):
            parameter.grad = torch.zeros_like(parameter)
            if i == 0:
                parameter.grad.view(-1)[0] = norm
        monitor.update(fastclip.measure_grads(model))


def test_triggers_from_a_generator() -> None:
    monitor = fastclip.Monitor(nn.Linear(2, 1), triggers=(fastclip.NonFinite(of) for of in ("loss", "gradients")))
    assert len(monitor.triggers) == 2
    with pytest.raises(TypeError, match="must be a list of triggers"):
        fastclip.Monitor(nn.Linear(2, 1), triggers=fastclip.NonFinite("loss"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "loss", ["1.0", (1.0,), [1.0], {}, 1j, True, np.array(3.0), torch.tensor(1j), torch.tensor(True)]
)
def test_a_loss_that_is_no_number_is_refused_before_the_step(loss: Any) -> None:
    monitor = fastclip.Monitor(nn.Linear(2, 1))
    with pytest.raises(TypeError, match="loss"):
        monitor.record_loss(loss)
    assert monitor.steps == 0


def test_a_loss_that_is_changed_in_place_afterwards() -> None:
    model = nn.Linear(2, 1)
    monitor = fastclip.Monitor(model)
    loss = torch.tensor(3.0)
    monitor.record_loss(loss)
    loss.zero_()
    steps(monitor, model, 1.0)
    assert monitor.read().loss.tolist() == [3.0]


def test_a_sink_that_fails_keeps_no_trigger_from_acting() -> None:
    model = nn.Linear(2, 1)
    seen: list[int] = []

    def full(row: dict[str, Any]) -> None:
        seen.append(row["step"])
        if len(seen) == 1:
            raise OSError("disk full")

    reports: list[fastclip.Report] = []
    monitor = fastclip.Monitor(model, triggers=[fastclip.NonFinite("gradients", action=reports.append)], every=2)
    monitor.log_to(full, every=2)
    with pytest.raises(OSError, match="disk full"):
        steps(monitor, model, 1.0, math.nan)
    assert [report.step for report in reports] == [2]
    monitor.flush()
    assert seen == [1, 1, 2]


def test_a_callback_that_fails_keeps_no_other_trigger_from_acting() -> None:
    model = nn.Linear(2, 1)

    def fail(_: fastclip.Report) -> None:
        raise KeyError("mine")

    reports: list[fastclip.Report] = []
    both = [fastclip.NonFinite("gradients", action=fail), fastclip.NonFinite("gradients", action=reports.append)]
    monitor = fastclip.Monitor(model, triggers=both, every=3)
    with pytest.raises(KeyError, match="mine"):
        steps(monitor, model, math.nan, 1.0, math.inf)
    assert [report.step for report in reports] == [1, 3]


@pytest.mark.filterwarnings("ignore:steps skipped")
def test_a_run_of_skipped_steps_goes_on_behind_a_checkpoint() -> None:
    model = nn.Linear(2, 1)

    def resumed(state: dict[str, Any] | None) -> dict[str, Any]:
        skip = fastclip.NonFinite("gradients", action="skip")
        monitor = fastclip.Monitor(model, triggers=[skip], max_skipped=10)
        if state is not None:
            monitor.load_state_dict(state)
        steps(monitor, model, *[math.nan] * 4)
        return monitor.state_dict()

    state = resumed(resumed(None))
    with pytest.raises(fastclip.TriggerError, match="in a row: 10"):
        resumed(state)


def test_integer_weights_are_refused_when_weights_are_watched() -> None:
    model = nn.Linear(2, 1)
    model.register_parameter("quantised", nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False))
    with pytest.raises(ValueError, match=r"'quantised' is of torch\.int8 and has no norm to watch"):
        fastclip.Monitor(model, weights=True)


def test_what_clip_grad_norm_returns_is_no_result() -> None:
    with pytest.raises(TypeError, match="not a Tensor"):
        fastclip.Monitor(nn.Linear(2, 1)).update(torch.ones(()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make",
    [
        lambda: fastclip.Monitor(nn.Linear(2, 1), history="x"),  # type: ignore[arg-type]
        lambda: fastclip.Monitor(nn.Linear(2, 1), every=2.5),  # type: ignore[arg-type]
        lambda: fastclip.Monitor(nn.Linear(2, 1), decay="x"),  # type: ignore[arg-type]
        lambda: fastclip.Monitor(nn.Linear(2, 1)).log_to(print, every=2.5),  # type: ignore[arg-type]
        lambda: fastclip.Jump("norm", z="6"),  # type: ignore[arg-type]
        lambda: fastclip.Jump("norm", ratio="6"),  # type: ignore[arg-type]
        lambda: fastclip.Vanishing("x"),  # type: ignore[arg-type]
        lambda: fastclip.Vanishing(1e-7, steps=2.5),  # type: ignore[arg-type]
    ],
)
def test_numbers_that_are_none(make: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=r"`\w+` must be a (real|whole) number, not"):
        make()


def test_trigger_errors_can_be_pickled() -> None:
    model = nn.Linear(2, 1)
    monitor = fastclip.Monitor(model, triggers=[fastclip.NonFinite("gradients", action="raise")])
    with pytest.raises(fastclip.TriggerError) as raised:
        steps(monitor, model, math.nan)
    copy = pickle.loads(pickle.dumps(raised.value))  # noqa: S301 - our own pickle
    assert str(copy) == str(raised.value)
    assert copy.report.step == 1


def test_a_coefficient_that_is_nan_is_not_missing() -> None:
    model = nn.Linear(2, 1)
    monitor = fastclip.Monitor(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.inf)
    monitor.update(fastclip.measure_grads(model))
    monitor.update(fastclip.clip_grads_(model, fastclip.ClipByGlobalNorm(1.0)))
    missing, found = [row["coefficient"] for row in monitor.read().rows()]
    assert missing is None
    assert isinstance(found, float)
    assert math.isnan(found)


def test_a_group_of_an_infinity_and_a_nan_has_no_norm() -> None:
    model = nn.Linear(2, 1)
    monitor = fastclip.Monitor(model, by="global")
    for parameter, value in zip(model.parameters(), (math.inf, math.nan), strict=True):
        parameter.grad = torch.full_like(parameter, value)
    monitor.update(fastclip.measure_grads(model))
    assert math.isnan(monitor.read().group_norms[0, 0])


def test_a_sink_that_fails_is_called_once_a_look() -> None:
    model = nn.Linear(2, 1)
    calls: list[Any] = []
    others: list[Any] = []

    def full(row: dict[str, Any]) -> None:
        calls.append(row["step"])
        raise OSError("disk full")

    monitor = fastclip.Monitor(model, triggers=[fastclip.NonFinite("gradients", action="raise")])
    monitor.log_to(full, every=1)
    monitor.log_to(lambda row: others.append(row["step"]), every=100)
    with pytest.raises(OSError, match="disk full"):
        steps(monitor, model, math.nan)
    assert calls == [1]
    assert others == [1]  # an error ends the run: each sink gets all rows


def test_a_warning_that_is_an_error_keeps_no_other_trigger_from_acting() -> None:
    """Warnings are errors in these tests, as in some programs."""
    model = nn.Linear(2, 1)
    reports: list[fastclip.Report] = []
    both = [fastclip.NonFinite("gradients"), fastclip.NonFinite("gradients", action=reports.append)]
    monitor = fastclip.Monitor(model, triggers=both)
    with pytest.raises(RuntimeWarning, match="not finite"):
        steps(monitor, model, math.nan)
    assert [report.step for report in reports] == [1]


def test_what_triggers_have_seen_goes_on_behind_a_checkpoint() -> None:
    model = nn.Linear(2, 1)
    reports: list[fastclip.Report] = []

    def monitor() -> fastclip.Monitor:
        return fastclip.Monitor(model, triggers=[fastclip.Vanishing(1e-3, steps=5, action=reports.append)])

    first, second = monitor(), monitor()
    steps(first, model, *[1e-6] * 3)
    second.load_state_dict(first.state_dict())
    steps(second, model, 1e-6)
    assert not reports
    steps(second, model, 1e-6)
    assert [report.step for report in reports] == [5]
