"""Each trigger in a real training loop: when it fires, which parameter it names, and what its action does."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from legs import Leg
from torch import Tensor, nn

import fastclip
from fastclip import Above, Jump, NonFinite, Report, Vanishing
from fastclip.monitoring.interface import Trigger

RULE = fastclip.ClipByGlobalNorm(1.0)
STEPS = 60
AT = 45  # the step in which something is wrong

Sabotage = Callable[[nn.Module, Tensor], Tensor]
"""Spoils a step: takes the model and its loss, returns the loss to train with."""


def train(
    triggers: Sequence[Trigger],
    sabotage: Sabotage | None = None,
    *,
    at: Sequence[int] = (AT,),
    steps: int = STEPS,
    device: torch.device | str = "cpu",
    **options: Any,
) -> tuple[fastclip.Monitor, nn.Module, list[bool]]:
    """Train a small model; return the monitor, the model, and which steps were skipped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    monitor = fastclip.Monitor(model, triggers=triggers, **options)
    skipped = []
    for step in range(1, steps + 1):
        inputs = torch.randn(64, 4).to(device)
        loss = (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()
        if sabotage and step in at:
            loss = sabotage(model, loss)
        optimizer.zero_grad()
        loss.backward()
        skip = monitor.update(fastclip.clip_grads_(model, RULE), loss)
        skipped.append(bool(skip))
        if not skip:
            optimizer.step()
    return monitor, model, skipped


def explode(_: nn.Module, loss: Tensor) -> Tensor:
    return loss * 1e4


def spoil_loss(_: nn.Module, loss: Tensor) -> Tensor:
    return loss * math.nan


def spoil_a_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    bias: Tensor = model[2].bias  # type: ignore[index]
    bias.register_hook(lambda grad: grad * math.inf)  # type: ignore[no-untyped-call]
    return loss


def spoil_a_weight(model: nn.Module, loss: Tensor) -> Tensor:
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan  # type: ignore[index]
    return loss


def vanish(_: nn.Module, loss: Tensor) -> Tensor:
    return loss * 1e-12


# ---- What each trigger watches


@pytest.mark.parametrize(
    ("make", "sabotage", "worst"),
    [
        (lambda action: Jump("norm", z=6.0, action=action), explode, "2.weight"),
        (lambda action: Jump("norm", ratio=10.0, action=action), explode, "2.weight"),
        (lambda action: Jump("loss", z=6.0, ratio=3.0, action=action), explode, "2.weight"),
        (lambda action: Jump("loss", ratio=10.0, action=action), explode, "2.weight"),
        (lambda action: Above("norm", 1e3, action=action), explode, "2.weight"),
        (lambda action: Above("loss", 1e3, action=action), explode, "2.weight"),
        (lambda action: Above("loss", 1e3, action=action), spoil_loss, "0.weight"),
        (lambda action: Above("norm", 1e3, action=action), spoil_a_gradient, "2.bias"),
        (lambda action: NonFinite("loss", action=action), spoil_loss, "0.weight"),
        (lambda action: NonFinite("gradients", action=action), spoil_a_gradient, "2.bias"),
        (lambda action: NonFinite("weights", action=action), spoil_a_weight, "0.weight"),
        (lambda action: Vanishing(1e-6, steps=1, action=action), vanish, "2.weight"),
    ],
    ids=[
        *("norm z", "norm ratio", "loss z and ratio", "loss ratio"),
        *("norm above", "loss above", "loss NaN", "norm infinite"),
        *("loss", "gradients", "weights", "vanishing"),
    ],
)
@pytest.mark.parametrize("skips", [False, True], ids=["host", "device"])
def test_a_trigger_fires_in_its_step(make: Any, sabotage: Sabotage, worst: str, skips: bool) -> None:
    """On the host and on the device, and in no earlier step; the report names the parameter that caused it."""
    reports: list[Report] = []
    triggers = [make(reports.append), *([make("skip")] if skips else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        monitor, _, skipped = train(triggers, sabotage, weights=True, steps=AT)
    assert [report.step for report in reports] == [AT]
    assert reports[0].worst(1)[0].name == worst
    assert skipped == [skips and step == AT for step in range(1, AT + 1)]
    assert monitor.read().skipped.tolist() == skipped
    assert monitor.read().fired.any(axis=1).tolist() == [step == AT for step in range(1, AT + 1)]


@pytest.mark.legs("numpy", "torch", "interpreter")
def test_on_every_backend(leg: Leg) -> None:
    reports: list[Report] = []
    steps = 30 if leg.name == "interpreter" else AT
    train([NonFinite("gradients", action=reports.append)], spoil_a_gradient, at=[steps], steps=steps, device=leg.device)
    assert [report.step for report in reports] == [steps]
    assert reports[0].worst(1)[0].name == "2.bias"


def test_nothing_jumps_in_the_warm_up() -> None:
    reports: list[Report] = []
    triggers = [Jump("loss", z=0.5, action=reports.append), Jump("norm", ratio=1.01, action=reports.append)]
    train(triggers, explode, at=[3, 20], steps=25)
    assert reports == []
    train(triggers, explode, at=[26], steps=26)
    assert {report.step for report in reports} == {26}
    assert len(reports) == 2


def fed(trigger: Trigger, losses: Sequence[float | None], **options: Any) -> list[bool]:
    """The steps in which a trigger fires, for these losses (and norms of 1)."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.ones(1, 1)
    monitor = fastclip.Monitor(model, triggers=[trigger], **options)
    for loss in losses:
        monitor.update(fastclip.measure_grads(model), loss)
    fired: list[bool] = monitor.read().fired[:, 0].tolist()
    return fired


def ignore(_: Report) -> None:
    """An action that does nothing."""


def test_a_jump_is_one_upwards_of_finite_values() -> None:
    losses = [1.0, 1.2, 0.8, 1.0, -50.0, math.nan, math.inf, 50.0]
    assert fed(Jump("loss", z=6.0, action=ignore), losses, warmup=4) == [False] * 7 + [True]
    assert fed(Jump("loss", ratio=6.0, action=ignore), losses, warmup=4) == [False] * 7 + [True]


def test_a_ratio_is_none_to_a_mean_that_is_not_positive() -> None:
    assert not any(fed(Jump("loss", ratio=1.5, action=ignore), [-4.0] * 10 + [-1.0, 8.0], warmup=4))


def test_with_both_z_and_ratio_both_must_hold() -> None:
    steady = [1.0, 1.01, 0.99] * 5
    assert fed(Jump("loss", z=6.0, action=ignore), [*steady, 1.5], warmup=4)[-1]
    assert not fed(Jump("loss", z=6.0, ratio=2.0, action=ignore), [*steady, 1.5], warmup=4)[-1]
    noisy = [0.1, 3.0, 0.2] * 5
    assert fed(Jump("loss", ratio=2.0, action=ignore), [*noisy, 4.0], warmup=4)[-1]
    assert not fed(Jump("loss", z=6.0, ratio=2.0, action=ignore), [*noisy, 4.0], warmup=4)[-1]


def test_a_loss_that_is_missing_is_not_non_finite() -> None:
    assert fed(NonFinite("loss", action=ignore), [None, math.nan, 1.0, -math.inf, None]) == [
        False, True, False, True, False,
    ]  # fmt: skip


def test_a_gradient_that_is_missing_neither_is_non_finite_nor_vanishes() -> None:
    model = nn.Linear(2, 2)
    monitor = fastclip.Monitor(
        model, triggers=[NonFinite("gradients", action="raise"), Vanishing(1.0, 1, action="raise")]
    )
    monitor.update(fastclip.clip_grads_(model, RULE))
    model.weight.grad = torch.ones(2, 2)
    monitor.update(fastclip.clip_grads_(model, RULE))
    assert not monitor.read().fired.any()


def test_vanishing_takes_several_steps_in_a_row() -> None:
    reports: list[Report] = []
    train([Vanishing(1e-6, steps=3, action=reports.append)], vanish, at=[10, 11, 20, 21, 22, 23, 30], steps=31)
    assert [report.step for report in reports] == [22, 23]
    assert reports[0].limit == 1e-6
    assert reports[0].value < 1e-6
    assert not any(fed(Vanishing(0.1, steps=1, action=ignore), [1e-9] * 3))  # these are losses


# ---- What an action does


def test_skipping_leaves_the_weights_alone() -> None:
    trigger = Jump("norm", z=6.0, action="skip")
    with pytest.warns(RuntimeWarning, match=rf"steps skipped: 1, the last of them step {AT}, Jump\('norm', z=6.0\)"):
        _, model, skipped = train([trigger], explode, steps=AT, max_skipped=AT)
    assert skipped == [False] * (AT - 1) + [True]
    _, before, _ = train([trigger], steps=AT - 1)
    for mine, theirs in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("every", [1, 20])
def test_warning_once_a_run(every: int) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train([NonFinite("loss")], spoil_loss_only, at=[5, 6, 7, 12], steps=20, every=every)
    assert [str(warning.message).split(",")[0] for warning in caught] == ["step 5", "step 12"]
    assert {warning.category for warning in caught} == {RuntimeWarning}
    assert {warning.filename for warning in caught} == {__file__}


def spoil_loss_only(_: nn.Module, loss: Tensor) -> Tensor:
    """An infinite loss, with finite gradients."""
    return loss + (loss.detach() * 0 + math.inf)


def test_raising_before_the_weights_are_touched() -> None:
    with pytest.raises(fastclip.TriggerError, match=rf"step {AT}, NonFinite\('gradients'\)") as caught:
        train([NonFinite("gradients", action="raise")], spoil_a_gradient)
    report = caught.value.report
    assert report.step == AT
    assert report.value == 1
    assert report.worst(1)[0].name == "2.bias"
    assert isinstance(caught.value, RuntimeError)


def test_a_late_look_loses_nothing() -> None:
    """With `every=8` the reports come late, but all come, with their own steps; and errors come last."""
    reports: list[Report] = []
    triggers = [NonFinite("loss", action=reports.append), NonFinite("loss", action="raise")]
    with pytest.raises(fastclip.TriggerError, match="step 5,"):
        train(triggers, spoil_loss_only, at=[5, 7], every=8)
    assert [report.step for report in reports] == [5, 7]


def test_too_many_skipped_in_a_row_end_in_an_error() -> None:
    triggers = [NonFinite("loss", action="skip")]
    with pytest.warns(RuntimeWarning, match="steps skipped: 2, the last of them step 4"):
        _, _, skipped = train(triggers, spoil_loss_only, at=[3, 4], steps=12, max_skipped=4)
    assert sum(skipped) == 2
    with (
        pytest.warns(RuntimeWarning, match="steps skipped: 2, the last of them step 4"),
        pytest.raises(fastclip.TriggerError, match="steps skipped in a row: 4, the last of them step 6"),
    ):
        train(triggers, spoil_loss_only, at=range(3, 60), max_skipped=4)


def test_skipped_steps_that_are_not_in_a_row_are_no_error() -> None:
    with pytest.warns(RuntimeWarning, match="steps skipped"):
        _, _, skipped = train([NonFinite("loss", action="skip")], spoil_loss_only, at=range(1, 60, 2), max_skipped=2)
    assert sum(skipped) == 30


def test_a_trigger_that_does_something_else_skips_nothing() -> None:
    reports: list[Report] = []
    triggers = [NonFinite("gradients", action=reports.append), NonFinite("loss", action="skip")]
    _, _, skipped = train(triggers, spoil_a_gradient, steps=AT)
    assert [report.step for report in reports] == [AT]
    assert not any(skipped)


def test_skipping_in_an_optimizer() -> None:
    """`attach` asks the monitor, and skips the step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.Adam(model.parameters())
    monitor = fastclip.Monitor(model, triggers=[NonFinite("gradients", action="skip")], max_skipped=3)
    fastclip.attach(optimizer, RULE, monitor=monitor)
    seen = []
    for step in range(1, 4):
        optimizer.zero_grad()
        (model(torch.randn(8, 3)).square().mean() * (math.nan if step == 2 else 1.0)).backward()
        before = model.weight.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            optimizer.step()
        seen.append(not torch.equal(model.weight, before))
    assert seen == [True, False, True]
    assert monitor.read().skipped.tolist() == [False, True, False]


# ---- Reports


def report_on(norms: Sequence[float]) -> Report:
    names = [f"p{i}" for i in range(len(norms))]
    return Report(3, NonFinite("loss"), math.nan, math.inf, "the loss is nan", names, np.array(norms))


def test_shares_of_the_squared_norm() -> None:
    worst = report_on([3.0, 0.0, 4.0]).worst(2)
    assert [(share.name, share.norm, share.share) for share in worst] == [("p2", 4.0, 0.64), ("p0", 3.0, 0.36)]


def test_what_is_not_finite_is_worst() -> None:
    worst = report_on([3e200, math.nan, 4e200, math.inf]).worst(9)
    assert [share.name for share in worst] == ["p1", "p3", "p2", "p0"]
    assert [share.share for share in worst] == pytest.approx([math.nan, math.nan, 0.64, 0.36], nan_ok=True)


def test_shares_of_nothing() -> None:
    assert report_on([]).worst() == []
    assert [share.share for share in report_on([0.0, 0.0]).worst()] == [0.0, 0.0]


def test_a_report_in_print() -> None:
    lines = str(report_on([3.0, math.nan, 4.0, 0.1, 0.1, 0.1, 0.1])).splitlines()
    assert lines[0] == "step 3, NonFinite('loss'): the loss is nan"
    assert lines[2] == "  p1: norm nan"
    assert lines[3] == "  p2: norm 4, 63.9%"
    assert len(lines) == 2 + 5


@pytest.mark.parametrize(
    ("trigger", "printed"),
    [
        (Jump("norm", z=6.0), "Jump('norm', z=6.0)"),
        (Jump("loss", ratio=4, action="skip"), "Jump('loss', ratio=4)"),
        (Above("loss", 10.0, action="raise"), "Above('loss', limit=10.0)"),
        (NonFinite("weights", action=print), "NonFinite('weights')"),
        (Vanishing(1e-7), "Vanishing(1e-07)"),
        (Vanishing(1e-7, steps=2), "Vanishing(1e-07, steps=2)"),
    ],
)
def test_triggers_in_print(trigger: Trigger, printed: str) -> None:
    assert repr(trigger) == printed


def test_the_limit_itself_is_not_above_it() -> None:
    reports: list[Report] = []
    model = nn.Linear(1, 1, bias=False)
    monitor = fastclip.Monitor(model, triggers=[Above(of, 2, action=reports.append) for of in ("loss", "norm")])
    for value in (2.0, -3.0, 2.5, -math.inf, math.nan):
        model.weight.grad = torch.full((1, 1), value)
        monitor.update(fastclip.measure_grads(model), value)
    fired = [(report.step, report.trigger.of) for report in reports if isinstance(report.trigger, Above)]
    assert fired == [(2, "norm"), (3, "loss"), (3, "norm"), (4, "norm"), (5, "loss"), (5, "norm")]
    assert reports[1].message == "the loss is 2.5, and should be 2 at most"
    assert (reports[1].value, reports[1].limit) == (2.5, 2)
    assert reports[4].message == "the loss is nan, and should be 2 at most"


def test_what_is_missing_is_not_above_a_limit() -> None:
    monitor = fastclip.Monitor(
        [nn.Parameter(torch.zeros(1))],
        triggers=[Above("loss", -1.0, action="raise"), Above("norm", -1.0, action="raise")],
    )
    monitor.update(fastclip.measure_grads([nn.Parameter(torch.zeros(1))]))


def test_what_a_jump_was_compared_with() -> None:
    reports: list[Report] = []
    monitor = fastclip.Monitor(
        nn.Linear(1, 1, bias=False), triggers=[Jump("loss", z=3.0, action=reports.append)], warmup=2
    )
    model = nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.ones(1, 1)
    for loss in (1.0, 3.0, 50.0):
        monitor.update(fastclip.measure_grads(model), loss)
    s = math.sqrt(1 + 0.02**2)
    assert reports[0].value == 50
    assert reports[0].limit == pytest.approx(2 + 3 * s)
    assert reports[0].message == "the loss is 50, above 5.001; before it was 2 ± 1 (z = 48)"


# ---- Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Jump("norm"), r"Jump\('norm', z=6.0\)"),
        (lambda: Jump("gradients", z=3.0), "`of` must be one of 'loss', 'norm', not 'gradients'"),  # type: ignore[arg-type]
        (lambda: Jump("norm", z=-1.0), "`z` must be above 0"),
        (lambda: Jump("norm", ratio=0.5), "`ratio` must be above 1"),
        (lambda: Above("weights", 1.0), "`of` must be one of 'loss', 'norm'"),  # type: ignore[arg-type]
        (lambda: Above("norm", math.inf), "`limit` must be finite"),
        (lambda: Above("norm", math.nan), "`limit` must be finite"),
        (lambda: NonFinite("norm"), "'loss', 'gradients', 'weights', not 'norm'"),  # type: ignore[arg-type]
        (lambda: NonFinite("loss", action="stop"), "`action` must be 'warn', 'raise', 'skip' or"),  # type: ignore[arg-type]
        (lambda: Vanishing(0.0), "`below` must be above 0"),
        (lambda: Vanishing(1e-7, steps=0), "`steps` must be at least 1"),
    ],
)
def test_bad_triggers(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
