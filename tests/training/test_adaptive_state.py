"""Adaptive rules attached to an optimizer: checkpoints in the middle of a run, overflows, and what a monitor shows."""

from __future__ import annotations

import copy
import gc
import io
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gradients import grad_of
from small_model import OPTIMIZERS, Training
from torch import Tensor, nn

import fastclip
from fastclip import ClipByEMA, ClipByNorm, ClipByQuantile, ClipByZScore

RULES: dict[str, Callable[..., Any]] = {
    "quantile": lambda **by: ClipByQuantile(0.4, 4, **by),
    "current": lambda **by: ClipByQuantile(0.5, 6, include_current=True, every=2, **by),
    "reciprocal": lambda **by: ClipByZScore(0.8, 0.1, warmup=3, relearn=4, **by),
    "max": lambda **by: ClipByZScore(0.8, 0.1, warmup=3, mode="max", **by),
    "average": lambda **by: ClipByEMA(1.01, 0.8, warmup=3, max_norm=8.0, **by),
}
GROUPINGS: dict[str, Any] = {
    "global": "global",
    "parameter": "parameter",
    "layer": "layer",
    "group": "group",
    "function": lambda name: name.rpartition(".")[2],
}
BEFORE, AFTER = 7, 6  # steps before and after a checkpoint; neither is a multiple of a window


def train(training: Training, steps: Iterable[int]) -> None:
    for step in steps:
        training.optimizer.zero_grad()
        training.backward(step % len(training.batches))
        training.optimizer.step()


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def resume(resumed: Training, whole: Training) -> None:
    """Load the checkpoint of a run, through a file, into another one, and let both go on."""
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state_dict(through_a_file(whole.optimizer.state_dict()))
    for training in (whole, resumed):
        train(training, range(BEFORE, BEFORE + AFTER))


def rows_of(clipper: Any) -> Tensor:
    rows: Tensor = clipper.rule.state_dict()["rows"]
    return rows


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("by", GROUPINGS)
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_uninterrupted_one(rule: str, by: str, optimizer: str) -> None:
    """To the bit; and without the rule's state it would not be."""
    whole, resumed, forgetful = (Training(OPTIMIZERS[optimizer]) for _ in range(3))
    clippers: list[Any] = [
        fastclip.attach(t.optimizer, RULES[rule](by=GROUPINGS[by])) for t in (whole, resumed, forgetful)
    ]
    train(whole, range(BEFORE))
    saved = through_a_file({"model": whole.model.state_dict(), "optimizer": whole.optimizer.state_dict()})
    for training in (resumed, forgetful):
        training.model.load_state_dict(saved["model"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    del saved["optimizer"]["fastclip"]
    forgetful.optimizer.load_state_dict(saved["optimizer"])
    for training in (whole, resumed, forgetful):
        train(training, range(BEFORE, BEFORE + AFTER))
    resumed.assert_same_as(whole)
    oracle.assert_same_bits(rows_of(clippers[1]), rows_of(clippers[0]))
    assert clippers[1].rule.state_dict()["labels"] == clippers[0].rule.state_dict()["labels"]
    with pytest.raises(AssertionError):
        forgetful.assert_same_as(whole)


def test_a_state_that_is_loaded_can_be_saved_before_the_next_step() -> None:
    first, second, third = (Training() for _ in range(3))
    clippers = [fastclip.attach(t.optimizer, RULES["quantile"](by="layer")) for t in (first, second, third)]
    train(first, range(BEFORE))
    second.optimizer.load_state_dict(through_a_file(first.optimizer.state_dict()))
    third.optimizer.load_state_dict(through_a_file(second.optimizer.state_dict()))
    third.model.load_state_dict(first.model.state_dict())
    for training in (first, third):
        train(training, range(BEFORE, BEFORE + AFTER))
    third.assert_same_as(first)
    oracle.assert_same_bits(rows_of(clippers[2]), rows_of(clippers[0]))


def test_a_state_replaces_what_the_rule_has_learned() -> None:
    """A run goes back to its last checkpoint, in the same process."""
    training, whole = Training(), Training()
    for each in (training, whole):
        fastclip.attach(each.optimizer, RULES["reciprocal"](by="parameter"))
        train(each, range(BEFORE))
    saved = copy.deepcopy((training.model.state_dict(), training.optimizer.state_dict()))
    train(training, [3, 2, 1])
    training.model.load_state_dict(saved[0])
    training.optimizer.load_state_dict(saved[1])
    for each in (training, whole):
        train(each, range(BEFORE, BEFORE + AFTER))
    training.assert_same_as(whole)


def attached(
    training: Training, rule: Any, order: Callable[[list[tuple[str, Tensor]]], list[tuple[str, Tensor]]]
) -> Any:
    """Attach a rule to an optimizer that has its parameters in another order, or with other names.

    The names are given to `attach`: torch overwrites those of an optimizer by those of a state dict, place by place.
    """
    named = order(list(training.model.named_parameters()))
    training.optimizer = torch.optim.SGD([parameter for _, parameter in named], lr=0.5)
    return fastclip.attach(training.optimizer, rule, names=named)


def renamed(named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    return [("new.weight", named[0][1]), *named[1:]]


@pytest.mark.parametrize("by", ["parameter", "layer"])
@pytest.mark.parametrize("rule", RULES)
def test_groups_are_found_by_label_in_another_order(rule: str, by: str) -> None:
    """The sums of norms are rounded in another order then."""
    whole, resumed = Training(OPTIMIZERS["sgd"]), Training()
    clippers: list[Any] = [
        fastclip.attach(whole.optimizer, RULES[rule](by=by)),
        attached(resumed, RULES[rule](by=by), lambda named: named[::-1]),
    ]
    train(whole, range(BEFORE))
    resume(resumed, whole)
    states = [clipper.rule.state_dict() for clipper in clippers]
    assert states[1]["labels"] == states[0]["labels"][::-1]
    torch.testing.assert_close(states[1]["rows"].flip(0), states[0]["rows"], rtol=1e-5, atol=1e-9)
    for own, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_the_names_of_a_checkpoint_are_those_of_its_rule() -> None:
    """An optimizer without names takes over those of the state dict, and so the groups' labels."""
    whole, resumed = Training(), Training(named=False)
    clippers: list[Any] = [fastclip.attach(t.optimizer, RULES["quantile"](by="parameter")) for t in (whole, resumed)]
    train(whole, range(BEFORE))
    resume(resumed, whole)
    resumed.assert_same_as(whole)
    assert clippers[1].rule.state_dict()["labels"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_labels_that_the_checkpoint_does_not_know_start_cold_with_a_warning() -> None:
    whole, other = Training(OPTIMIZERS["sgd"]), Training()
    rules = [RULES["quantile"](by="parameter") for _ in "ab"]
    clippers: list[Any] = [fastclip.attach(whole.optimizer, rules[0]), attached(other, rules[1], renamed)]
    train(whole, range(BEFORE))
    other.model.load_state_dict(whole.model.state_dict())
    other.optimizer.load_state_dict(through_a_file(whole.optimizer.state_dict()))
    with (
        pytest.warns(UserWarning, match="knows nothing of 1 of 4 groups, 'new.weight' first: they start cold"),
        pytest.warns(UserWarning, match="has 1 groups that are not here, '0.weight' first"),
    ):
        train(other, [0])
    train(whole, [0])
    assert rows_of(clippers[1])[:, 0].tolist() == [1, *[BEFORE + 1] * 3]
    oracle.assert_same_bits(rows_of(clippers[1])[1:], rows_of(clippers[0])[1:])
    result = clippers[1].result
    assert result is not None
    assert result.thresholds is not None
    assert result.thresholds.isinf().tolist() == [True, False, False, False]


OTHERS: dict[str, Callable[[], Any]] = {
    "window": lambda: ClipByQuantile(0.4, 5),
    "cap": lambda: ClipByQuantile(0.4, 4, cap=1.0),
    "by": lambda: ClipByQuantile(0.4, 4, by="parameter"),
    "kind": ClipByZScore,
    "not adaptive": lambda: ClipByNorm(1.0),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_rule_with_other_settings_is_replaced_with_a_warning(other: str) -> None:
    """As every setting of an optimizer is; the rule that was attached learns nothing."""
    whole, resumed = Training(), Training()
    own = OTHERS[other]()
    fastclip.attach(whole.optimizer, RULES["quantile"]())
    clipper = fastclip.attach(resumed.optimizer, own)
    train(whole, range(BEFORE))
    resumed.model.load_state_dict(whole.model.state_dict())
    with pytest.warns(UserWarning, match=r"the checkpoint's rule ClipByQuantile\(.*takes the place of ClipBy"):
        resumed.optimizer.load_state_dict(through_a_file(whole.optimizer.state_dict()))
    assert clipper.rule == RULES["quantile"]()
    for training in (whole, resumed):
        train(training, range(BEFORE, BEFORE + AFTER))
    resumed.assert_same_as(whole)
    if other != "not adaptive":
        assert own.state_dict()["labels"] == []


def test_a_function_that_groups_stays_where_settings_are_replaced() -> None:
    """A checkpoint does not hold functions."""
    whole, resumed = Training(), Training()
    fastclip.attach(whole.optimizer, ClipByQuantile(0.4, 4, by=GROUPINGS["function"]))
    clipper: Any = fastclip.attach(resumed.optimizer, ClipByQuantile(0.4, 5, by=GROUPINGS["function"]))
    train(whole, range(BEFORE))
    resumed.model.load_state_dict(whole.model.state_dict())
    with pytest.warns(UserWarning, match="takes the place of"):
        resumed.optimizer.load_state_dict(through_a_file(whole.optimizer.state_dict()))
    for training in (whole, resumed):
        train(training, range(BEFORE, BEFORE + AFTER))
    resumed.assert_same_as(whole)
    assert clipper.rule == ClipByQuantile(0.4, 4, by=GROUPINGS["function"])
    assert clipper.rule.state_dict()["labels"] == ["weight", "bias"]


def test_a_checkpoint_of_another_rule_ends_an_adaptive_one() -> None:
    plain, adaptive = Training(), Training()
    fastclip.attach(plain.optimizer, ClipByNorm(0.01))
    clipper = fastclip.attach(adaptive.optimizer, RULES["average"]())
    for training in (plain, adaptive):
        train(training, range(3))
    adaptive.model.load_state_dict(plain.model.state_dict())
    with pytest.warns(UserWarning, match=r"rule ClipByNorm\(.*takes the place of ClipByEMA"):
        adaptive.optimizer.load_state_dict(through_a_file(plain.optimizer.state_dict()))
    assert clipper.rule == ClipByNorm(0.01)
    for training in (plain, adaptive):
        train(training, range(3))
    adaptive.assert_same_as(plain)


def test_a_state_of_another_width_is_an_error() -> None:
    training = Training()
    clipper = fastclip.attach(training.optimizer, RULES["quantile"]())
    train(training, range(3))
    state = training.optimizer.state_dict()
    before = rows_of(clipper)
    state["fastclip"]["rule"]["state"] = ClipByQuantile(0.4, 5).state_dict()
    with pytest.raises(ValueError, match="adaptive rule with the same settings"):
        training.optimizer.load_state_dict(state)
    oracle.assert_same_bits(rows_of(clipper), before)


def test_a_rule_belongs_to_one_set_of_parameters() -> None:
    first, second = Training(), Training()
    rule = RULES["quantile"](by="parameter")
    clipper = fastclip.attach(first.optimizer, rule)
    with pytest.raises(ValueError, match=r"attached to another optimizer.* or detach\(\) it there first"):
        attached(second, rule, renamed)
    clipper.detach()
    attached(second, rule, renamed)  # nothing is learned yet
    with pytest.raises(ValueError, match="attached to another optimizer"):
        fastclip.attach(first.optimizer, rule)
    for _ in range(2):
        first.backward(0)
        fastclip.clip_grads_(first.model, rule)
    second.backward(0)
    before = [p.grad.clone() for p in second.model.parameters() if p.grad is not None]
    weights = [p.detach().clone() for p in second.model.parameters()]
    with pytest.raises(ValueError, match=r"learned the norms of other groups: '0\.weight'"):
        second.optimizer.step()
    for parameter, grad, weight in zip(second.model.parameters(), before, weights, strict=True):
        oracle.assert_same_bits(grad_of(parameter), grad)
        oracle.assert_same_bits(parameter.detach(), weight)


def test_a_rule_outlives_its_optimizer() -> None:
    """The optimizer is made anew, and goes on with what was learned."""
    training, rule = Training(), RULES["quantile"](by="parameter")
    gc.disable()
    try:
        for step in range(3):
            made: Any = torch.optim.SGD(training.model.parameters(), lr=0.1)
            made.itself = training.optimizer = made  # a reference cycle, as the first steps of a process leave
            clipper = fastclip.attach(training.optimizer, rule)  # the one before still is in the variable
            train(training, [step])
            assert clipper.is_attached
    finally:
        gc.enable()
    assert rule.state_dict()["rows"][:, 0].tolist() == [3.0] * 4


# ---- Folding


@pytest.mark.parametrize("rule", RULES)
def test_folded(rule: str) -> None:
    """The same thresholds and steps as with clipping ahead of the step, up to rounding to fp32."""
    ours, theirs = Training(OPTIMIZERS["fused_sgd"]), Training(OPTIMIZERS["fused_sgd"])
    folded = fastclip.attach(ours.optimizer, RULES[rule](by="global"), fold=True)
    ahead = fastclip.attach(theirs.optimizer, RULES[rule](by="global"))
    clipped = 0
    for step in range(BEFORE + AFTER):
        for training in (ours, theirs):
            train(training, [step])
        assert folded.result is not None
        assert ahead.result is not None
        clipped += bool(folded.clipped)
        for name in ("thresholds", "coefficients"):
            own, other = getattr(folded.result, name), getattr(ahead.result, name)
            torch.testing.assert_close(own, other, rtol=1e-5, atol=0.0)
        for own, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
            own.data.copy_(other)  # rounding does not add up
    assert 0 < clipped < BEFORE + AFTER
    torch.testing.assert_close(rows_of(folded), rows_of(ahead), rtol=1e-5, atol=1e-9)


def test_folding_takes_one_group() -> None:
    for by in ("parameter", "layer"):
        with pytest.raises(ValueError, match="one coefficient for all gradients"):
            fastclip.attach(Training(OPTIMIZERS["fused_adamw"]).optimizer, RULES["quantile"](by=by), fold=True)


def test_a_folded_run_resumes() -> None:
    whole, resumed = Training(OPTIMIZERS["fused_adamw"]), Training(OPTIMIZERS["fused_adamw"])
    for training in (whole, resumed):
        fastclip.attach(training.optimizer, RULES["quantile"](), fold=True)
    train(whole, range(BEFORE))
    resume(resumed, whole)
    resumed.assert_same_as(whole)


# ---- Steps that are no observations


@pytest.mark.parametrize("unscaled", [False, True], ids=["by step", "by unscale_"])
@pytest.mark.parametrize("optimizer", ["momentum", "fused_adamw"])
@pytest.mark.parametrize("rule", RULES)
def test_overflows_of_a_grad_scaler_are_no_observations(rule: str, optimizer: str, unscaled: bool) -> None:
    """The state is that of a training without a loss scale and without the steps that overflowed, to the bit.

    Loss scales are powers of two, so all norms are the same.
    """
    ours, plain = Training(OPTIMIZERS[optimizer]), Training(OPTIMIZERS[optimizer])
    clippers = [fastclip.attach(t.optimizer, RULES[rule](by="global")) for t in (ours, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(BEFORE + AFTER):
        for value in (math.nan, math.inf, None)[step % 2 :]:  # one or two overflows before each step
            ours.optimizer.zero_grad()
            x, y = ours.batches[step % 4]
            scaler.scale((ours.model(x) - y).square().mean()).backward()
            if value is not None:
                grad_of(next(ours.model.parameters()))[0] = value
            if unscaled:
                scaler.unscale_(ours.optimizer)
            scaler.step(ours.optimizer)
            scaler.update()
        train(plain, [step])
        oracle.assert_same_bits(rows_of(clippers[0]), rows_of(clippers[1]))
    assert scaler.get_scale() < 2.0**-4
    ours.assert_same_as(plain)


def test_a_parameter_without_gradient_learns_nothing_until_it_has_one() -> None:
    training = Training()
    clipper = fastclip.attach(training.optimizer, RULES["quantile"](by="parameter"))
    frozen = training.model.get_parameter("0.bias").requires_grad_(False)
    train(training, range(5))
    assert rows_of(clipper)[:, 0].tolist() == [5, 0, 5, 5]
    assert clipper.result is not None
    assert clipper.result.thresholds is not None
    assert clipper.result.thresholds.isinf().tolist() == [False, True, False, False]
    frozen.requires_grad_(True)
    train(training, range(2))
    assert rows_of(clipper)[:, 0].tolist() == [7, 2, 7, 7]
    assert clipper.result.thresholds.isfinite().all()


def test_distributed_checkpoints_do_not_teach_zeros() -> None:
    """They make a step with gradients of zeros, so that the optimizer has a state to be saved."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    training = Training(OPTIMIZERS["adam"])
    clipper = fastclip.attach(training.optimizer, RULES["average"]())
    get_optimizer_state_dict(training.model, training.optimizer)
    assert clipper.norm is not None
    assert clipper.norm.item() == 0
    assert rows_of(clipper).tolist() == [[0.0, math.inf]] * 4


# ---- What a monitor shows


def monitored(rule: Any, **options: Any) -> tuple[fastclip.Monitor, list[Any]]:
    """A monitor of a training with the rule, and the results of its steps."""
    training = Training()
    monitor = fastclip.Monitor(training.model, **options)
    clipper = fastclip.attach(training.optimizer, rule, monitor=monitor)
    results = []
    for step in range(BEFORE + AFTER):
        train(training, [step])
        results.append(clipper.result)
    return monitor, results


@pytest.mark.parametrize("rule", RULES)
def test_the_history_has_threshold_and_clip_rate(rule: str) -> None:
    monitor, results = monitored(RULES[rule](by="global"), window=4)
    history = monitor.read()
    assert history.threshold.tolist() == [result.thresholds.item() for result in results]
    assert history.coefficient.tolist() == [result.coefficients.item() for result in results]
    clipped = [bool(result.clipped) for result in results]
    assert history.clipped.tolist() == clipped
    assert set(clipped) == {True, False}
    assert history.clip_rate.tolist() == [np.mean(clipped[max(0, i - 3) : i + 1]) for i in range(len(clipped))]
    assert len(set(history.threshold.tolist())) > 3
    for i, row in enumerate(history.rows()):
        assert row["threshold"] == history.threshold[i]
        assert row["clip_rate"] == history.clip_rate[i]
        assert row["clipped"] is clipped[i]


def test_several_thresholds_are_none_of_all_gradients() -> None:
    monitor, _ = monitored(RULES["quantile"](by="layer"))
    history = monitor.read()
    assert np.isnan(history.threshold).all()
    assert history.clipped.any()
    assert {row["threshold"] for row in history.rows()} == {None}


def test_the_picture_draws_the_threshold() -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, and it is not installed")
    monitor, results = monitored(RULES["quantile"](by="global"))
    figure = monitor.plot()
    expected = [result.thresholds.item() for result in results]
    assert expected[0] == math.inf
    (axes,) = (axes for axes in figure.axes if axes.get_ylabel() == "global norm")
    (line,) = (line for line in axes.get_lines() if line.get_color() == "C3")
    steps, drawn = line.get_xdata(), line.get_ydata()
    np.testing.assert_array_equal(steps, np.arange(1, len(expected) + 1))
    np.testing.assert_array_equal(drawn, [math.nan, *expected[1:]])
    assert "threshold" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_picture_of_several_thresholds_has_no_line() -> None:
    pytest.importorskip("matplotlib", reason="pictures need matplotlib, and it is not installed")
    monitor, _ = monitored(RULES["quantile"](by="layer"))
    assert "threshold" not in [text.get_text() for text in monitor.plot().legends[0].get_texts()]


# ---- Rules that a checkpoint replaces, and rules that need all gradients


def test_a_rule_of_a_checkpoint_is_attached_and_the_one_before_is_free() -> None:
    first, second, third = Training(), Training(), Training()
    mine = ClipByQuantile(0.4, 4)
    fastclip.attach(first.optimizer, ClipByQuantile(0.5, 4))
    clipper = fastclip.attach(second.optimizer, mine)
    train(first, [0])
    with pytest.warns(UserWarning, match="takes the place of"):
        second.optimizer.load_state_dict(first.optimizer.state_dict())
    replaced: Any = clipper.rule
    with pytest.raises(ValueError, match="attached to another optimizer"):
        fastclip.attach(third.optimizer, replaced)
    fastclip.attach(third.optimizer, mine)


def test_a_state_that_cannot_be_folded_changes_nothing() -> None:
    by_parameter, folded = Training(OPTIMIZERS["fused_sgd"]), Training(OPTIMIZERS["fused_sgd"])
    fastclip.attach(by_parameter.optimizer, ClipByQuantile(0.5, 4, by="parameter"))
    clipper = fastclip.attach(folded.optimizer, ClipByQuantile(0.5, 4), fold=True)
    for training in (by_parameter, folded):
        train(training, range(2))
    before = rows_of(clipper)
    with (
        pytest.warns(UserWarning, match="takes the place of"),
        pytest.raises(ValueError, match="fold=True hands the optimizer one coefficient"),
    ):
        folded.optimizer.load_state_dict(by_parameter.optimizer.state_dict())
    oracle.assert_same_bits(rows_of(clipper), before)


def test_units_cannot_be_folded() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.SGD([weight], lr=0.1, fused=True)
    with pytest.raises(ValueError, match="fold=True hands the optimizer one coefficient"):
        fastclip.attach(optimizer, fastclip.ClipByWeightNorm(by="unit"), fold=True)


@pytest.mark.parametrize("rule", [ClipByEMA(), ClipByQuantile(by="parameter"), ClipByZScore(by="parameter")], ids=repr)
def test_inside_of_backward(rule: Any) -> None:
    """An average needs the global norm in its warm-up, which is not known there."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    fastclip.attach(optimizer, copy.deepcopy(rule))

    def step(_: Tensor) -> None:
        optimizer.step()

    weight.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
    if isinstance(rule, ClipByEMA):
        with pytest.raises(RuntimeError, match="steps inside of backward"):
            weight.sum().backward()  # type: ignore[no-untyped-call]
        return
    weight.sum().backward()  # type: ignore[no-untyped-call]
    assert not torch.equal(weight.detach(), torch.ones(3))


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_is_learned_of_a_step_that_a_scaler_skips(fused: bool) -> None:
    """Not by the groups whose own gradients are finite, either."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    clipper = fastclip.attach(optimizer, ClipByQuantile(0.5, 10, by="parameter"), names=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(5):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(2, 3)).square().sum()).backward()
        if step == 3:
            grad_of(model.get_parameter("0.weight"))[0, 0] = math.inf
            grad_of(model.get_parameter("1.weight")).mul_(1e4)
        scaler.step(optimizer)
        scaler.update()
    rows = rows_of(clipper)
    assert rows[:, 0].tolist() == [4.0] * 4
    assert rows[rows.isfinite()].max().item() < 1e3
