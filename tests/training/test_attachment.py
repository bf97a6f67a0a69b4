"""A rule attached to an optimizer: the same steps as clipping by hand, for every optimizer and training loop."""

from __future__ import annotations

import collections
import contextlib
import copy
import io
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gradients import grad_of
from legs import Leg
from small_model import OPTIMIZERS, Syncs, Training
from torch import Tensor, nn
from torch.optim import Optimizer

import fastclip
from fastclip.core.owners import Owners, list_owners

RULES: dict[str, Callable[[], Any]] = {
    "clip_by_norm": lambda: fastclip.ClipByNorm(0.01),
    "clip_by_global_norm": lambda: fastclip.ClipByGlobalNorm(0.02),
    "clip_grad_norm": lambda: fastclip.ClipGradNorm(0.02),
    "at_threshold": lambda: fastclip.ClipAtThreshold(0.02),
    "by_value": lambda: fastclip.ClipByValue(-0.001, 0.002),
    "by_layer": lambda: fastclip.ClipByNorm({"0": 0.01, "2": 0.02}, by="layer"),
    "function": lambda: lambda norms: torch.where(norms > 0.01, 0.3, 1.0),
}


class StubMonitor:
    """The part of a monitor that an attachment uses; it skips the given steps."""

    def __init__(self, model: nn.Module, *skipped: int) -> None:
        self.owners: Owners = list_owners(model, "parameters")
        self.skips = bool(skipped)
        self.skipped = skipped
        self.norms: list[Tensor] = []
        self.losses: list[Tensor] = []

    def record_loss(self, loss: Tensor) -> None:
        self.losses.append(loss)

    def update(self, result: fastclip.ClipResult) -> Tensor:
        assert result.norms is not None
        self.norms.append(result.norms)
        return torch.tensor(len(self.norms) - 1 in self.skipped)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": len(self.norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.norms = [torch.zeros(0)] * state["steps"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("rule", RULES)
def test_same_as_by_hand(rule: str, optimizer: str) -> None:
    ours, theirs, plain = (Training(OPTIMIZERS[optimizer]) for _ in range(3))
    clipper = fastclip.attach(ours.optimizer, RULES[rule]())
    ours.steps()
    theirs.steps(lambda: fastclip.clip_grads_(theirs.model, RULES[rule]()))
    plain.steps()
    ours.assert_same_as(theirs)
    with pytest.raises(AssertionError):  # otherwise the rule would have changed nothing
        ours.assert_same_as(plain)
    assert clipper.clipped


@pytest.mark.parametrize(
    ("keras", "clip"),
    [
        ({"clipnorm": 0.01}, lambda model: fastclip.clip_by_norm_(model, 0.01)),
        ({"clipvalue": 0.001}, lambda model: fastclip.clip_by_value_(model, -0.001, 0.001)),
        ({"global_clipnorm": 0.02}, lambda model: fastclip.clip_by_global_norm_(model, 0.02)),
    ],
    ids=["clipnorm", "clipvalue", "global_clipnorm"],
)
def test_the_arguments_of_keras(keras: dict[str, float], clip: Callable[[nn.Module], object]) -> None:
    ours, theirs = Training(), Training()
    fastclip.attach(ours.optimizer, **keras)  # type: ignore[arg-type]
    ours.steps()
    theirs.steps(lambda: clip(theirs.model))
    ours.assert_same_as(theirs)


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", ["clipnorm", "clipvalue", "global_clipnorm"])
def test_0_is_off_as_with_keras(name: str, fold: bool) -> None:
    """Training is the same as without clipping; the norm can still be logged."""
    ours, plain = Training(), Training()
    clipper = fastclip.attach(ours.optimizer, fold=fold, **{name: 0})  # type: ignore[arg-type]
    assert repr(clipper) == "<nothing attached to SGD>"
    ours.steps()
    plain.steps()
    ours.assert_same_as(plain)
    assert clipper.norm is not None
    assert clipper.norm.item() == pytest.approx(oracle.norm([grad_of(p) for p in ours.model.parameters()], 2), rel=1e-6)
    assert clipper.clipped is not None
    assert not clipper.clipped
    ours.optimizer.load_state_dict(ours.optimizer.state_dict())


KEEPING: dict[str, tuple[Callable[[Any], Optimizer], dict[str, Any]]] = {
    "SGD": (lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9), {}),
    "fused": (lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True), {}),
    "folded": (lambda parameters: torch.optim.AdamW(parameters, lr=0.1, fused=True), {"fold": True}),
    "closure": (lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=3), {}),
}


@pytest.mark.parametrize("kind", KEEPING)
def test_gradients_that_are_kept(kind: str) -> None:
    """The step uses clipped gradients; afterwards `.grad` are the same tensors as before, with the same values."""
    make, options = KEEPING[kind]
    ours, theirs = Training(make), Training(make)
    clipper = fastclip.attach(ours.optimizer, global_clipnorm=0.02, keep_grads=True, **options)
    fastclip.attach(theirs.optimizer, global_clipnorm=0.02, **options)
    before: list[tuple[Tensor, Tensor]] = []

    def closure_of(training: Training, batch: int) -> Callable[[], Any]:
        def closure() -> Any:
            training.optimizer.zero_grad()
            loss = training.backward(batch)
            if training is ours:
                before[:] = [(grad_of(p), grad_of(p).clone()) for p in ours.model.parameters()]
            return loss

        return closure

    for batch in range(3):
        for training in (ours, theirs):
            closure = closure_of(training, batch)
            if kind == "closure":
                training.optimizer.step(closure)
            else:
                closure()
                training.optimizer.step()
        for parameter, (grad, values) in zip(ours.model.parameters(), before, strict=True):
            assert parameter.grad is grad
            oracle.assert_same_bits(grad, values)
    ours.assert_same_as(theirs)
    assert clipper.clipped
    assert clipper.norm is not None
    assert clipper.norm.item() == pytest.approx(oracle.norm([grad for grad, _ in before], 2), rel=1e-6)


def test_kept_gradients_come_back_at_once_where_a_trigger_raises() -> None:
    """The user wants to see them then."""
    training = Training()
    monitor = fastclip.Monitor(training.model, triggers=[fastclip.Above("norm", 1e-9, action="raise")])
    fastclip.attach(training.optimizer, global_clipnorm=0.02, keep_grads=True, monitor=monitor)
    training.backward(0)
    before = [(grad_of(p), grad_of(p).clone()) for p in training.model.parameters()]
    with pytest.raises(fastclip.TriggerError):
        training.optimizer.step()
    for parameter, (grad, values) in zip(training.model.parameters(), before, strict=True):
        assert parameter.grad is grad
        oracle.assert_same_bits(grad, values)


def test_a_rule_that_is_assigned_later_has_its_own_groups() -> None:
    training = Training()
    clipper = fastclip.attach(training.optimizer, global_clipnorm=0.02)
    training.backward(0)
    training.optimizer.step()
    clipper.rule = fastclip.ClipByNorm(0.02)
    training.optimizer.zero_grad()
    training.backward(1)
    norms = [grad_of(parameter).norm().item() for parameter in training.model.parameters()]
    training.optimizer.step()
    assert clipper.result is not None
    assert clipper.result.group_norms.tolist() == pytest.approx(norms, rel=1e-6)


def test_a_state_dict_brings_the_names_that_its_rule_needs() -> None:
    saved, loaded = (nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)) for _ in range(2))
    named = torch.optim.SGD(saved.named_parameters(), lr=0.5)
    fastclip.attach(named, fastclip.ClipByNorm(0.1, by="layer"))
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.5)
    clipper = fastclip.attach(optimizer, global_clipnorm=0.1)
    with pytest.warns(UserWarning, match="takes the place of"):
        optimizer.load_state_dict(named.state_dict())
    loaded(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert clipper.result is not None
    assert clipper.result.groups.labels == ("0", "1")


def test_kept_gradients_do_not_come_back_over_what_the_step_has_put_there() -> None:
    class Freeing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.zero_grad()

    training = Training(lambda parameters: Freeing(parameters, lr=0.5))
    fastclip.attach(training.optimizer, global_clipnorm=0.02, keep_grads=True)
    training.backward(0)
    training.optimizer.step()
    assert all(parameter.grad is None for parameter in training.model.parameters())


def test_kept_gradients_of_a_step_that_raised_do_not_come_back_over_new_ones() -> None:
    training = Training()
    fastclip.attach(training.optimizer, global_clipnorm=0.02, keep_grads=True)

    def fail(*_: object) -> None:
        raise KeyError

    training.backward(0)
    handle = training.optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyError):
        training.optimizer.step()
    handle.remove()
    training.optimizer.zero_grad(set_to_none=False)
    training.backward(1)  # this adds to the clipped copies
    after = [grad_of(p).clone() for p in training.model.parameters()]
    training.optimizer.step()
    for parameter, grad in zip(training.model.parameters(), after, strict=True):
        oracle.assert_same_bits(grad_of(parameter), grad)


def test_accumulated_gradients_are_clipped_once() -> None:
    ours, theirs = Training(), Training()
    clipper = fastclip.attach(ours.optimizer, global_clipnorm=0.02)
    for training in (ours, theirs):
        training.backward(0)
        training.backward(1)
    assert clipper.norm is None
    exact = oracle.norm([p.grad for p in theirs.model.parameters() if p.grad is not None], 2)
    fastclip.clip_by_global_norm_(theirs.model, 0.02)
    for training in (ours, theirs):
        training.optimizer.step()
    ours.assert_same_as(theirs)
    assert clipper.norm is not None
    assert clipper.norm.item() == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("by_keyword", [False, True])
@pytest.mark.parametrize(
    "make",
    [OPTIMIZERS["momentum"], lambda parameters: torch.optim.LBFGS(parameters, lr=0.1, max_iter=4)],
    ids=["sgd", "lbfgs"],
)
def test_closure(make: Callable[[Any], Optimizer], by_keyword: bool) -> None:
    """The gradients exist only inside the step, and LBFGS evaluates the closure several times in one."""

    def train(training: Training, clip: Callable[[], object]) -> list[float]:
        losses = []
        for batch in range(4):

            def closure(batch: int = batch) -> Tensor:
                training.optimizer.zero_grad()
                loss = training.backward(batch)
                clip()
                return loss

            step: Any = training.optimizer.step
            loss = step(closure=closure) if by_keyword else step(closure)
            losses.append(loss.item())
        return losses

    ours, theirs = (Training(lambda p: make([tensor for _, tensor in p])) for _ in range(2))
    monitor = StubMonitor(ours.model)
    clipper = fastclip.attach(ours.optimizer, clipvalue=0.001, monitor=monitor)  # type: ignore[arg-type]
    our_losses = train(ours, lambda: None)
    their_losses = train(theirs, lambda: fastclip.clip_by_value_(theirs.model, -0.001, 0.001))
    assert our_losses == their_losses
    ours.assert_same_as(theirs)
    assert clipper.clipped
    assert our_losses[0] == monitor.losses[0].item()
    assert len(monitor.losses) == len(monitor.norms)


def test_read_afterwards() -> None:
    training = Training()
    clipper = fastclip.attach(training.optimizer, global_clipnorm=1e6)
    assert clipper.norm is None
    assert clipper.clipped is None
    assert clipper.result is None
    training.steps()
    assert clipper.norm is not None
    exact = oracle.norm([p.grad for p in training.model.parameters() if p.grad is not None], 2)
    assert clipper.norm.item() == pytest.approx(exact, rel=1e-6)
    assert not clipper.clipped
    assert clipper.result is not None
    assert clipper.result.coefficients is not None
    assert clipper.result.coefficients.tolist() == [1.0]


@pytest.mark.legs("torch", "interpreter", "ptx", "gpu")
@pytest.mark.parametrize("rule", RULES)
def test_no_sync_until_asked(leg: Leg, rule: str) -> None:
    training = Training(OPTIMIZERS["sgd"])
    training.model.to(leg.device)
    clipper = fastclip.attach(training.optimizer, RULES[rule]())
    for parameter in training.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    training.optimizer.step()
    with Syncs() as syncs:
        training.optimizer.step()
        assert syncs.count == 0
        assert clipper.norm is not None
        assert clipper.norm.item() > 0
        assert syncs.count == 1


def test_detached() -> None:
    ours, plain = Training(), Training()
    clipper = fastclip.attach(ours.optimizer, global_clipnorm=0.02)
    clipper.detach()
    clipper.detach()
    ours.steps()
    plain.steps()
    ours.assert_same_as(plain)
    assert "fastclip" not in ours.optimizer.state_dict()
    assert "detached" in repr(clipper)
    fastclip.attach(ours.optimizer, clipnorm=1.0)


def test_repr_names_rule_and_optimizer() -> None:
    assert repr(fastclip.attach(Training().optimizer, clipnorm=2.0)) == (
        "<ClipByNorm(clip_norm=2.0, by='parameter') attached to SGD>"
    )


def saved_and_loaded(state: dict[str, Any]) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_saved_and_restored() -> None:
    first, second = Training(), Training()
    rule = fastclip.ClipByNorm({"0": 0.01, "2": 0.02}, by="layer")
    before = fastclip.attach(first.optimizer, rule, monitor=StubMonitor(first.model))  # type: ignore[arg-type]
    first.steps()
    monitor = StubMonitor(second.model)
    after = fastclip.attach(second.optimizer, fastclip.ClipByGlobalNorm(5.0), monitor=monitor)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"ClipByNorm\(.*'0': 0.01.*takes the place of ClipByGlobalNorm"):
        second.optimizer.load_state_dict(saved_and_loaded(first.optimizer.state_dict()))
    assert after.rule == rule
    assert after.norm is not None
    assert before.norm is not None
    assert after.norm.item() == before.norm.item()
    assert after.clipped
    assert len(monitor.norms) == 4
    second.model.load_state_dict(first.model.state_dict())
    first.steps()
    second.steps()
    second.assert_same_as(first)


def test_bounds_with_a_default_are_saved_as_plain_numbers() -> None:
    ours, theirs = Training(), Training()
    for training, rest in ((ours, 0.02), (theirs, 0.03)):
        bounds = collections.defaultdict(lambda rest=rest: rest, {"0": 0.01})  # type: ignore[misc]
        clipper = fastclip.attach(training.optimizer, fastclip.ClipByNorm(bounds, by="layer"))
    state = saved_and_loaded(ours.optimizer.state_dict())
    ours.optimizer.load_state_dict(state)  # the same rule: no warning
    with pytest.warns(UserWarning, match="takes the place"):
        theirs.optimizer.load_state_dict(state)
    assert clipper.rule == fastclip.ClipByNorm({"0": 0.01, "2": 0.02}, by="layer")


def test_state_dict_of_an_attached_optimizer_is_a_plain_one_s_too() -> None:
    ours, plain = Training(), Training()
    fastclip.attach(ours.optimizer, clipnorm=0.01)
    ours.steps()
    plain.optimizer.load_state_dict(saved_and_loaded(ours.optimizer.state_dict()))
    plain_state = plain.optimizer.state_dict()
    assert plain_state.keys() == {"state", "param_groups"}
    ours.optimizer.load_state_dict(saved_and_loaded(plain_state))  # and in the other direction
    assert ours.optimizer.state_dict()["fastclip"]["rule"]["name"] == "ClipByNorm"


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    ours, other = Training(), Training(lambda _: torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    clipper = fastclip.attach(ours.optimizer, clipnorm=0.01)
    fastclip.attach(other.optimizer, clipnorm=5.0)
    with pytest.raises(ValueError, match="doesn't match the size"):
        ours.optimizer.load_state_dict(other.optimizer.state_dict())
    assert clipper.rule == fastclip.ClipByNorm(0.01)
    ours.optimizer.load_state_dict(Training().optimizer.state_dict())  # nothing of the failed state was kept
    assert clipper.rule == fastclip.ClipByNorm(0.01)


class RunningMean:
    """A rule with state: it clips to the mean of the norms so far."""

    def __init__(self) -> None:
        self.total = torch.zeros((), dtype=torch.float64)
        self.count = 0

    def __call__(self, norms: Tensor) -> Tensor:
        self.total += norms.norm()
        self.count += 1
        coefficient: Tensor = (self.total / self.count / norms.norm()).clamp(max=1.0)
        return coefficient

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.count = state["total"].clone(), state["count"]


def test_the_state_of_a_rule_of_one_s_own() -> None:
    first, second = Training(), Training()
    fastclip.attach(first.optimizer, RunningMean())
    first.steps()
    fastclip.attach(second.optimizer, RunningMean())
    second.optimizer.load_state_dict(saved_and_loaded(first.optimizer.state_dict()))
    second.model.load_state_dict(first.model.state_dict())
    first.steps()
    second.steps()
    second.assert_same_as(first)
    other = Training()
    fastclip.attach(other.optimizer, clipnorm=1.0)
    with pytest.raises(ValueError, match="made with a rule of its own"):
        other.optimizer.load_state_dict(first.optimizer.state_dict())


def test_distributed_checkpoints_pass_over_it() -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    training = Training(OPTIMIZERS["adam"])
    clipper = fastclip.attach(training.optimizer, clipnorm=0.01)
    training.steps()
    state = copy.deepcopy(get_optimizer_state_dict(training.model, training.optimizer))
    set_optimizer_state_dict(training.model, training.optimizer, state)
    assert clipper.rule == fastclip.ClipByNorm(0.01)


@pytest.mark.parametrize("unscaled", [False, True], ids=["by step", "by unscale_"])
@pytest.mark.parametrize("optimizer", ["adam", "fused_adamw", "fused_sgd"])
@pytest.mark.parametrize("infinite", [False, True], ids=["finite", "inf"])
def test_grad_scaler(optimizer: str, unscaled: bool, infinite: bool) -> None:
    """With and without `unscale_` before the step; without it, fused optimizers get scaled gradients."""
    ours, theirs = Training(OPTIMIZERS[optimizer]), Training(OPTIMIZERS[optimizer])
    clipper = fastclip.attach(ours.optimizer, fastclip.ClipByGlobalNorm(0.02))
    for training in (ours, theirs):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for batch in range(3):
            x, y = training.batches[batch]
            training.optimizer.zero_grad()
            scaler.scale((training.model(x) - y).square().mean()).backward()
            weight = next(training.model.parameters())
            if infinite and batch == 1:
                assert weight.grad is not None
                weight.grad[0] = math.inf
            if training is theirs or unscaled:
                scaler.unscale_(training.optimizer)
            if training is theirs:
                norm = fastclip.clip_by_global_norm_(training.model, 0.02)
            scaler.step(training.optimizer)
            scaler.update()
    for own, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        # The scale is a power of two, but the coefficient is rounded to fp32 once with the scale and once without it.
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)
    assert clipper.norm is not None
    assert clipper.norm.item() == pytest.approx(norm.item(), rel=1e-6)


def test_values_that_carry_a_scale_are_refused() -> None:
    training = Training(OPTIMIZERS["fused_adamw"])
    fastclip.attach(training.optimizer, clipvalue=0.1)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(training.backward(0).detach().requires_grad_() * 1.0).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match=r"unscale_\(optimizer\)"):
        scaler.step(training.optimizer)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skipped_steps_change_nothing(optimizer: str) -> None:
    """Neither the weights nor the optimizer's state change, and the gradients stay."""
    ours, theirs = Training(OPTIMIZERS[optimizer]), Training(OPTIMIZERS[optimizer])
    monitor = StubMonitor(ours.model, 0, 2)
    fastclip.attach(ours.optimizer, clipnorm=0.01, monitor=monitor)  # type: ignore[arg-type]
    for batch in range(4):
        for training in (ours, theirs):
            training.optimizer.zero_grad()
            training.backward(batch)
        ours.optimizer.step()
        assert all(parameter.grad is not None for parameter in ours.model.parameters())
        assert not hasattr(ours.optimizer, "found_inf")
        if batch not in monitor.skipped:
            fastclip.clip_by_norm_(theirs.model, 0.01)
            theirs.optimizer.step()
    ours.assert_same_as(theirs)


def test_fused_optimizers_skip_without_a_sync() -> None:
    training = Training(OPTIMIZERS["fused_adamw"])
    monitor = StubMonitor(training.model, 1)
    fastclip.attach(training.optimizer, monitor=monitor)  # type: ignore[arg-type]
    training.backward(0)
    training.optimizer.step()
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    with Syncs() as syncs:
        training.optimizer.step()
    assert syncs.count == 0
    for parameter, old in zip(training.model.parameters(), before, strict=True):
        oracle.assert_same_bits(parameter.detach(), old)


def test_skipping_leaves_what_the_scaler_found() -> None:
    """A step is skipped if the monitor or the scaler asks for it."""
    training = Training(OPTIMIZERS["fused_adamw"])
    fastclip.attach(training.optimizer, monitor=StubMonitor(training.model, 99))  # type: ignore[arg-type]
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    training.backward(0)
    training.optimizer.found_inf = found = torch.ones(())  # type: ignore[attr-defined]
    training.optimizer.step()
    assert training.optimizer.found_inf is found  # type: ignore[attr-defined]
    for parameter, old in zip(training.model.parameters(), before, strict=True):
        oracle.assert_same_bits(parameter.detach(), old)


def two_groups(parameters: Iterator[tuple[str, Tensor]]) -> Optimizer:
    named: Any = list(parameters)
    return torch.optim.SGD([{"params": named[2:]}, {"params": named[:2], "lr": 0.1}], lr=0.5)


def test_parameter_groups_and_the_monitor_s_order() -> None:
    """The monitor has the parameters in the model's order, the optimizer in the order of its groups."""
    ours, theirs = Training(two_groups), Training(two_groups)
    monitor = StubMonitor(ours.model)
    rule = fastclip.ClipByNorm([0.03, 0.01], by="group")
    clipper = fastclip.attach(ours.optimizer, rule, monitor=monitor)  # type: ignore[arg-type]
    ours.steps()
    theirs.steps(lambda: fastclip.clip_grads_(theirs.optimizer.param_groups, rule))
    ours.assert_same_as(theirs)
    assert clipper.result is not None
    assert clipper.result.groups.labels == (0, 1)
    assert clipper.result.groups.of == (1, 1, 0, 0)
    last = fastclip.measure_grads(ours.model).norms
    assert last is not None
    layers = [math.hypot(*last[:2].tolist()), math.hypot(*last[2:].tolist())]
    assert layers == pytest.approx([0.01, 0.03], rel=1e-6)


def test_names_from_the_model() -> None:
    training = Training(named=False)
    with pytest.raises(ValueError, match="goes by names"):
        fastclip.attach(training.optimizer, fastclip.ClipByNorm(1.0, by="layer"))
    clipper = fastclip.attach(training.optimizer, fastclip.ClipByNorm(1.0, by="layer"), names=training.model)
    training.steps()
    assert clipper.result is not None
    assert clipper.result.groups.labels == ("0", "2")


def test_parameters_that_come_later() -> None:
    training = Training()
    clipper = fastclip.attach(training.optimizer, clipnorm=0.5)
    training.steps()
    late = nn.Parameter(torch.zeros(3))
    training.optimizer.add_param_group({"params": [("late", late)]})
    late.grad = torch.full((3,), 2.0)
    training.optimizer.step()
    assert late.grad.norm().item() == pytest.approx(0.5)
    assert clipper.result is not None
    assert clipper.result.groups.labels[-1] == "late"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "nothing to attach"),
        ({"clipnorm": 1.0, "clipvalue": 1.0}, ValueError, "only one rule can be attached, not clipnorm and clipvalue"),
        ({"rule": fastclip.ClipByNorm(1.0), "global_clipnorm": 1.0}, ValueError, "rule and global_clipnorm"),
        ({"clipnorm": 0.0, "clipvalue": 0.0}, ValueError, "only one rule can be attached"),
        ({"clipnorm": -1.0}, ValueError, "above 0"),
        ({"clipnorm": False}, TypeError, "`clipnorm` must be a real number"),
        ({"clipvalue": -1.0}, ValueError, "`clipvalue` must be above 0"),
        ({"clipvalue": "a lot"}, TypeError, "`clipvalue` must be a real number"),
        ({"clipnorm": [1.0]}, TypeError, "`clipnorm` must be a real number"),
        ({"global_clipnorm": math.nan}, ValueError, "above 0"),
        ({"rule": 1.0}, TypeError, "`rule` must be a rule"),
        ({"rule": fastclip.ClipByNorm([1.0, 2.0], by="group")}, ValueError, "2 bounds for 1 groups"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    training = Training()
    with pytest.raises(error, match=message):
        fastclip.attach(training.optimizer, **arguments)
    fastclip.attach(training.optimizer, clipnorm=1.0)  # nothing was attached


def test_not_an_optimizer() -> None:
    with pytest.raises(TypeError, match=r"`optimizer` must be a torch.optim.Optimizer, not Linear"):
        fastclip.attach(nn.Linear(1, 1), clipnorm=1.0)  # type: ignore[arg-type]


def test_attached_twice() -> None:
    training = Training()
    fastclip.attach(training.optimizer, clipnorm=1.0)
    with pytest.raises(ValueError, match="attached already"):
        fastclip.attach(training.optimizer, clipnorm=1.0)


def test_a_monitor_of_another_model() -> None:
    with pytest.raises(ValueError, match="not the 4 of the optimizer"):
        fastclip.attach(Training().optimizer, monitor=StubMonitor(nn.Linear(1, 1)))  # type: ignore[arg-type]


# ---- With a real monitor


def backward(training: Training, batch: int, factor: float = 1.0) -> None:
    """A backward pass that multiplies the gradients by a factor."""
    training.optimizer.zero_grad()
    training.backward(batch)
    for parameter in training.model.parameters():
        assert parameter.grad is not None
        parameter.grad *= factor


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "fused_adamw"])
def test_a_jump_is_skipped_and_named(optimizer: str) -> None:
    ours, theirs = Training(OPTIMIZERS[optimizer]), Training(OPTIMIZERS[optimizer])
    jump = fastclip.Jump("norm", z=20.0, action="skip")
    monitor = fastclip.Monitor(ours.model, triggers=[jump], warmup=3, max_skipped=2)
    clipper = fastclip.attach(ours.optimizer, global_clipnorm=0.02, monitor=monitor)
    for step in range(8):
        for training in (ours, theirs):
            backward(training, step % 4, 1e6 if step == 5 else 1.0)
        if step == 5:
            with pytest.warns(
                RuntimeWarning, match=r"steps skipped: 1.*Jump\('norm', z=20.0\)(.|\n)*\.weight"
            ) as caught:
                ours.optimizer.step()
            assert caught[0].filename == __file__
        else:
            ours.optimizer.step()
            fastclip.clip_by_global_norm_(theirs.model, 0.02)
            theirs.optimizer.step()
    ours.assert_same_as(theirs)
    assert monitor.read().skipped.tolist() == [False] * 5 + [True] + [False] * 2
    assert clipper.clipped


def test_a_run_of_skipped_steps_ends_in_an_error() -> None:
    training = Training(OPTIMIZERS["fused_adamw"])
    monitor = fastclip.Monitor(training.model, triggers=[fastclip.NonFinite("gradients", action="skip")], max_skipped=3)
    fastclip.attach(training.optimizer, monitor=monitor)
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    for batch in range(3):
        backward(training, batch, math.inf)
        ends = pytest.raises(fastclip.TriggerError, match="steps skipped in a row: 3")
        with ends if batch == 2 else contextlib.nullcontext():
            training.optimizer.step()
    assert monitor.steps == 3
    for parameter, old in zip(training.model.parameters(), before, strict=True):
        oracle.assert_same_bits(parameter.detach(), old)


def test_the_monitor_gets_the_closure_s_loss() -> None:
    training = Training()
    monitor = fastclip.Monitor(training.model)
    fastclip.attach(training.optimizer, clipnorm=0.01, monitor=monitor)
    losses = []
    for batch in range(4):

        def closure(batch: int = batch) -> Tensor:
            training.optimizer.zero_grad()
            loss = training.backward(batch)
            losses.append(loss.item())
            return loss

        training.optimizer.step(closure)  # type: ignore[arg-type]  # torch's type is narrower than its documentation
    history = monitor.read()
    assert history.loss.tolist() == losses
    assert history.share_clipped == 1.0


def test_the_monitor_is_saved_with_the_optimizer() -> None:
    first, second = Training(), Training()
    monitors = [fastclip.Monitor(training.model) for training in (first, second)]
    for training, monitor in zip((first, second), monitors, strict=True):
        fastclip.attach(training.optimizer, clipnorm=0.01, monitor=monitor)
    first.steps()
    second.optimizer.load_state_dict(saved_and_loaded(first.optimizer.state_dict()))
    second.model.load_state_dict(first.model.state_dict())
    first.steps()
    second.steps()
    histories = [monitor.read() for monitor in monitors]
    assert histories[1].steps.tolist() == [5, 6, 7, 8]
    assert histories[1].mean[:, 1].tolist() == histories[0].mean[4:, 1].tolist()


def test_a_monitor_without_names_watches_parameters() -> None:
    monitor = fastclip.Monitor(Training().model.parameters())
    assert monitor.groups.labels == (0, 1, 2, 3)


# ---- Defects that a review found


@pytest.mark.parametrize("optimizer", ["momentum", "fused_adamw"])
def test_detached_by_a_trigger_inside_of_a_step(optimizer: str) -> None:
    """The step is still skipped, everything is restored, and later steps do not clip."""
    ours, plain = Training(OPTIMIZERS[optimizer]), Training(OPTIMIZERS[optimizer])
    skip = fastclip.NonFinite("gradients", action="skip")
    detach = fastclip.NonFinite("gradients", action=lambda _: clipper.detach())
    monitor = fastclip.Monitor(ours.model, triggers=[skip, detach])
    clipper = fastclip.attach(ours.optimizer, clipnorm=1e-3, monitor=monitor)
    other_hooks = []
    ours.optimizer.register_step_pre_hook(lambda *_: other_hooks.append("pre"))
    backward(ours, 0, math.inf)
    with pytest.warns(RuntimeWarning, match="steps skipped: 1"):
        ours.optimizer.step()
    assert all(parameter.grad is not None for parameter in ours.model.parameters())
    assert not hasattr(ours.optimizer, "found_inf")
    assert "fastclip" not in ours.optimizer.state_dict()
    for training in (ours, plain):
        training.steps()
    ours.assert_same_as(plain)
    assert len(other_hooks) == 5
    fastclip.attach(ours.optimizer, clipnorm=1.0)


class Raising(torch.optim.Adam):
    """An optimizer whose step raises if `fails`, as when memory runs out."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise MemoryError
        return super().step(closure)


def test_a_step_that_raised_leaves_the_scaler_s_next_one_alone() -> None:
    def make(parameters: Any) -> Optimizer:
        return Raising(parameters, lr=0.1, fused=True)

    training = Training(make)
    never = fastclip.NonFinite("loss", action="skip")
    fastclip.attach(training.optimizer, monitor=fastclip.Monitor(training.model, triggers=[never]))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)

    def step(factor: float = 1.0) -> None:
        training.optimizer.zero_grad()
        x, y = training.batches[0]
        scaler.scale((training.model(x) - y).square().mean() * factor).backward()
        scaler.step(training.optimizer)

    step()
    scaler.update()
    training.optimizer.fails = True  # type: ignore[attr-defined]
    with pytest.raises(MemoryError):
        step()
    scaler.update()
    training.optimizer.fails = False  # type: ignore[attr-defined]
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    step(math.inf)  # the scaler skips it
    for parameter, old in zip(training.model.parameters(), before, strict=True):
        oracle.assert_same_bits(parameter.detach(), old)


def test_names_that_do_not_cover_the_optimizer_are_refused() -> None:
    training = Training(named=False)
    with pytest.raises(ValueError, match=r"no name for the optimizer's parameter 0, of shape \(7, 5\)"):
        fastclip.attach(training.optimizer, clipnorm=1.0, names=nn.Linear(2, 2))


def test_a_monitor_of_more_than_is_optimized_names_what_is_not() -> None:
    training = Training(lambda named: torch.optim.SGD(list(named)[1:], lr=0.1))
    with pytest.raises(ValueError, match=r"'0.weight' is not the optimizer's.*requires_grad"):
        fastclip.attach(training.optimizer, monitor=fastclip.Monitor(training.model))
    with pytest.raises(TypeError, match=r"`monitor` must be a fastclip\.Monitor, not 3"):
        fastclip.attach(training.optimizer, monitor=3)  # type: ignore[arg-type]


def test_saving_leaves_a_defaultdict_as_it_is() -> None:
    bounds = collections.defaultdict(lambda: 1.0, {"0": 2.0})
    training = Training()
    fastclip.attach(training.optimizer, fastclip.ClipByNorm(bounds, by="layer"))
    assert training.optimizer.state_dict()["fastclip"]["rule"]["settings"]["clip_norm"] == {"0": 2.0, "2": 1.0}
    assert dict(bounds) == {"0": 2.0}


def test_a_rule_that_works_in_place_leaves_the_norms_as_they_are() -> None:
    training = Training()
    training.backward(0)
    expected = fastclip.measure_grads(training.model).norms
    result = fastclip.clip_grads_(training.model, lambda norms: norms.clamp_(min=0.5).reciprocal_().mul_(0.5))
    assert result.norms is not None
    assert expected is not None
    assert result.norms.tolist() == expected.tolist()


def test_labels_of_numpy_s_are_saved_as_python_s() -> None:
    training = Training()
    labels = [np.str_("a"), np.str_("a"), np.int64(3), np.int64(3)]
    fastclip.attach(training.optimizer, fastclip.ClipByNorm({"a": 1.0, 3: 2.0}, by=labels))
    state = saved_and_loaded({"rule": training.optimizer.state_dict()["fastclip"]["rule"]["settings"]["clip_norm"]})
    assert state["rule"] == {"a": 1.0, 3: 2.0}


def test_a_rule_that_does_not_fit_is_not_restored() -> None:
    named = fastclip.ClipByNorm({"0": 1.0, "2": 2.0}, by=lambda name: name[0])
    first, second = Training(), Training()
    fastclip.attach(first.optimizer, named)
    clipper = fastclip.attach(second.optimizer, clipnorm=1.0)  # by parameter, as the function cannot be saved
    takes_the_place = pytest.warns(UserWarning, match="takes the place")
    with takes_the_place, pytest.raises(ValueError, match="no group"):
        second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert clipper.rule == fastclip.ClipByNorm(1.0)
    second.steps()


def test_parameters_that_change_their_group() -> None:
    training = Training(two_groups)
    clipper = fastclip.attach(training.optimizer, fastclip.ClipByNorm([0.03, 0.01], by="group"))
    training.steps()
    first, second = training.optimizer.param_groups
    for key in ("params", "param_names"):
        first[key].append(second[key].pop(0))
    training.steps()
    assert clipper.result is not None
    assert clipper.result.groups.of == (0, 0, 0, 1)


# ---- A step that raises, and one that calls another


class Calling(torch.optim.AdamW):
    """An optimizer whose step calls its base class's; after an instance of that class, torch runs hooks there, too."""

    def step(self, closure: Any = None) -> Any:
        try:
            return super().step(closure)
        except MemoryError:
            return super().step(closure)


class CallingLBFGS(torch.optim.LBFGS):
    """The same for an optimizer that evaluates its closure several times."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)  # type: ignore[no-untyped-call]  # torch leaves it so


CALLING: dict[str, tuple[Callable[[Any], Optimizer], Callable[[Any], Optimizer]]] = {
    "adamw": (lambda named: Calling(named, lr=0.01), lambda named: torch.optim.AdamW(named, lr=0.01)),
    "fused_adamw": (lambda named: Calling(named, lr=0.01, fused=True), OPTIMIZERS["fused_adamw"]),
    "lbfgs": (
        lambda named: CallingLBFGS([tensor for _, tensor in named], lr=0.1, max_iter=4),
        lambda named: torch.optim.LBFGS([tensor for _, tensor in named], lr=0.1, max_iter=4),
    ),
}


@pytest.mark.parametrize(
    ("optimizer", "has_closure"),
    [("adamw", False), ("adamw", True), ("fused_adamw", False), ("fused_adamw", True), ("lbfgs", True)],
)
def test_a_step_that_calls_another_is_clipped_once(optimizer: str, has_closure: bool) -> None:
    calling, plain = CALLING[optimizer]
    theirs, ours = Training(plain), Training(calling)
    monitor = StubMonitor(ours.model)
    evaluations = []
    fastclip.attach(ours.optimizer, lambda norms: torch.full_like(norms, 0.5), monitor=monitor)  # type: ignore[arg-type]
    for batch in range(4):
        for training in (ours, theirs):

            def closure(training: Training = training, batch: int = batch) -> Tensor:
                training.optimizer.zero_grad()
                loss = training.backward(batch)
                if training is theirs:
                    evaluations.append(batch)
                    fastclip.clip_grads_(training.model, lambda norms: torch.full_like(norms, 0.5))
                return loss

            if has_closure:
                training.optimizer.step(closure)  # type: ignore[arg-type]
            else:
                closure()
                training.optimizer.step()
    ours.assert_same_as(theirs)
    assert len(monitor.norms) == len(evaluations)
    assert len(monitor.losses) == (len(evaluations) if has_closure else 0)


@pytest.mark.parametrize("optimizer", ["adamw", "fused_adamw"])
def test_a_step_that_calls_another_is_skipped_as_a_whole(optimizer: str) -> None:
    calling, plain = CALLING[optimizer]
    theirs, ours = Training(plain), Training(calling)
    fastclip.attach(ours.optimizer, clipnorm=0.01, monitor=StubMonitor(ours.model, 1))  # type: ignore[arg-type]
    for batch in range(4):
        for training in (ours, theirs):
            backward(training, batch)
        ours.optimizer.step()
        assert all(parameter.grad is not None for parameter in ours.model.parameters())
        assert not hasattr(ours.optimizer, "found_inf")
        if batch != 1:
            fastclip.clip_by_norm_(theirs.model, 0.01)
            theirs.optimizer.step()
    ours.assert_same_as(theirs)


class Twice(torch.optim.AdamW):
    """An optimizer that evaluates its closure twice, if it has one, and then steps twice."""

    def step(self, closure: Any = None) -> Any:
        for _ in range(0 if closure is None else 2):
            with torch.enable_grad():
                closure()
        for _ in range(2):
            super().step()


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_a_step_that_calls_another_twice(fused: bool) -> None:
    theirs = Training(lambda named: torch.optim.AdamW(named, fused=fused))
    ours = Training(lambda named: Twice(named, fused=fused))
    monitor = StubMonitor(ours.model, 1)
    fastclip.attach(ours.optimizer, lambda norms: torch.full_like(norms, 0.5), monitor=monitor)  # type: ignore[arg-type]
    for batch in range(3):
        for training in (ours, theirs):
            backward(training, batch)
        ours.optimizer.step()
        if batch != 1:
            fastclip.clip_grads_(theirs.model, lambda norms: torch.full_like(norms, 0.5))
            theirs.optimizer.step()
            theirs.optimizer.step()
    assert len(monitor.norms) == 3
    ours.assert_same_as(theirs)


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_only_the_last_evaluation_of_a_closure_says_whether_the_step_is_skipped(fused: bool) -> None:
    theirs = Training(lambda named: torch.optim.AdamW(named, fused=fused))
    ours = Training(lambda named: Twice(named, fused=fused))
    fastclip.attach(ours.optimizer, clipnorm=0.01, monitor=StubMonitor(ours.model, 0))  # type: ignore[arg-type]
    ours.optimizer.step(lambda: ours.backward(0))  # type: ignore[arg-type, return-value]  # as the other closures
    for _ in range(2):
        theirs.backward(0)
        fastclip.clip_by_norm_(theirs.model, 0.01)
    for _ in range(2):
        theirs.optimizer.step()
    ours.assert_same_as(theirs)


class Failing:
    """A hook that raises the next `times` times, after the rule was applied, as when memory runs out."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.times = 0
        self.handle = optimizer.register_step_pre_hook(self)

    def __call__(self, *_: object) -> None:
        if self.times:
            self.times -= 1
            raise MemoryError


def test_a_step_that_calls_another_again_where_that_raised() -> None:
    calling, plain = CALLING["fused_adamw"]
    theirs, ours = Training(plain), Training(calling)
    monitor = StubMonitor(ours.model, 99)
    fastclip.attach(ours.optimizer, lambda norms: torch.full_like(norms, 0.5), monitor=monitor)  # type: ignore[arg-type]
    raised: list[int] = []

    def fails_inside(*_: object) -> None:
        raised.append(len(raised))
        if len(raised) == 2:  # inside the base class's step
            raise MemoryError

    handle = ours.optimizer.register_step_pre_hook(fails_inside)
    for training in (ours, theirs):
        backward(training, 0)
    fastclip.clip_grads_(theirs.model, lambda norms: torch.full_like(norms, 0.5))
    for training in (ours, theirs):
        training.optimizer.step()
    handle.remove()
    assert len(monitor.norms) == 1
    ours.assert_same_as(theirs)
    assert not hasattr(ours.optimizer, "found_inf")


@pytest.mark.parametrize("optimizer", ["momentum", "fused_adamw"])
def test_detached_after_a_step_that_raised(optimizer: str) -> None:
    """Attributes, gradients and hooks are as if there had been no attachment."""
    training = Training(OPTIMIZERS[optimizer])
    clipper = fastclip.attach(training.optimizer, clipnorm=0.01, monitor=StubMonitor(training.model, 0))  # type: ignore[arg-type]
    failing = Failing(training.optimizer)
    failing.times = 1
    training.backward(0)
    grads = [parameter.grad for parameter in training.model.parameters()]
    with pytest.raises(MemoryError):
        training.optimizer.step()
    clipper.detach()
    failing.handle.remove()
    assert not hasattr(training.optimizer, "found_inf")
    assert [parameter.grad for parameter in training.model.parameters()] == grads
    assert not training.optimizer._optimizer_step_pre_hooks
    assert not training.optimizer._optimizer_step_post_hooks
    assert "fastclip" not in training.optimizer.state_dict()


def test_gradients_of_a_step_that_raised_do_not_come_back_beside_new_ones() -> None:
    """The caller continued with another backward, which reached only some parameters."""
    training = Training()
    fastclip.attach(training.optimizer, clipnorm=1.0, monitor=StubMonitor(training.model, 0))  # type: ignore[arg-type]
    Failing(training.optimizer).times = 1
    training.backward(0)
    with pytest.raises(MemoryError):
        training.optimizer.step()
    training.optimizer.zero_grad()
    first, *others = training.model.parameters()
    before = [parameter.detach().clone() for parameter in others]
    first.grad = torch.ones_like(first)
    training.optimizer.step()
    assert all(parameter.grad is None for parameter in others)
    for parameter, old in zip(others, before, strict=True):
        oracle.assert_same_bits(parameter.detach(), old)


def test_a_step_is_skipped_where_a_state_dict_brought_groups_that_are_not_fused() -> None:
    """Torch's step raises for such groups if `found_inf` is set."""
    training = Training(OPTIMIZERS["fused_adamw"])
    fastclip.attach(training.optimizer, monitor=StubMonitor(training.model, 0))  # type: ignore[arg-type]
    not_fused = Training(lambda named: torch.optim.AdamW(named, lr=0.01))
    training.optimizer.load_state_dict(not_fused.optimizer.state_dict())
    for step in range(2):
        training.backward(0)
        before = [parameter.detach().clone() for parameter in training.model.parameters()]
        training.optimizer.step()
        is_same = [torch.equal(p, old) for p, old in zip(training.model.parameters(), before, strict=True)]
        assert is_same == [step == 0] * 4


class OwnFused(Optimizer):
    """An optimizer of the user that reads `found_inf` as torch's fused ones do."""

    _step_supports_amp_scaling = True
    found_inf: Tensor

    def step(self, *_: object) -> None:  # type: ignore[override]
        self.seen = self.found_inf.item()


def test_other_optimizers_that_look_at_found_inf_are_left_to_do_so() -> None:
    training = Training(lambda named: OwnFused([tensor for _, tensor in named], {}))
    fastclip.attach(training.optimizer, monitor=StubMonitor(training.model, 1))  # type: ignore[arg-type]
    for step in range(2):
        training.backward(0)
        training.optimizer.step()
        assert training.optimizer.seen == step  # type: ignore[attr-defined]


class Averaging(torch.optim.SGD):
    """An optimizer that wraps another one, with the same parameters."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__(inner.param_groups[0]["params"], lr=0.1)
        self.inner = inner

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_a_step_inside_of_another_optimizer_s_is_clipped_also_after_one_that_raised() -> None:
    training = Training()
    clipper = fastclip.attach(training.optimizer, clipnorm=0.01)
    Failing(training.optimizer).times = 1
    outer = Averaging(training.optimizer)
    training.backward(0)
    with pytest.raises(MemoryError):
        outer.step()
    backward(training, 1)
    outer.step()
    assert clipper.norm is not None
    norms = fastclip.measure_grads(training.model, by="parameter").norms
    assert norms is not None
    assert norms.max().item() == pytest.approx(0.01, rel=1e-6)


def test_a_step_that_raised_keeps_nothing_of_its_caller_s() -> None:
    """Otherwise the memory of a failed attempt would stay in use during the next one."""
    training = Training()
    fastclip.attach(training.optimizer, clipnorm=0.01)
    Failing(training.optimizer).times = 1

    def attempt() -> weakref.ref[Tensor]:
        activations = torch.zeros(3)
        try:
            training.optimizer.step()
        except MemoryError:
            return weakref.ref(activations)
        raise AssertionError

    assert attempt()() is None


def test_detached_by_another_thread_inside_of_a_step() -> None:
    """Torch is calling its hooks then: they are removed when the step has ended."""
    ours, plain = Training(OPTIMIZERS["fused_adamw"]), Training(OPTIMIZERS["fused_adamw"])
    clipper = fastclip.attach(ours.optimizer, clipnorm=0.01, monitor=StubMonitor(ours.model, 0))  # type: ignore[arg-type]

    def detach(*_: object) -> None:
        thread = threading.Thread(target=clipper.detach)
        thread.start()
        thread.join()

    handle = ours.optimizer.register_step_pre_hook(detach)
    before = [parameter.detach().clone() for parameter in ours.model.parameters()]
    ours.backward(0)
    ours.optimizer.step()  # it was to be skipped, from before `detach`
    handle.remove()
    for parameter, old in zip(ours.model.parameters(), before, strict=True):
        oracle.assert_same_bits(parameter.detach(), old)
    assert not hasattr(ours.optimizer, "found_inf")
    for training in (ours, plain):
        training.steps()


def test_a_wrapper_is_refused() -> None:
    """As accelerate's: an optimizer by its type that calls the step of another."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    wrapper = Wrapper(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(TypeError, match=r"is a Wrapper that .* pass the optimizer that it wraps"):
        fastclip.attach(wrapper, clipnorm=1.0)
    with pytest.raises(TypeError, match=r"is a Wrapper that .* pass the optimizer that it wraps"):
        fastclip.unscale_and_clip_grad_norm_(scaler, wrapper, 1.0)
