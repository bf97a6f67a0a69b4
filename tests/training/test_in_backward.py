"""Optimizers that step inside backward: each gradient is clipped there, or a later clip raises or warns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from small_model import Training
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

import fastclip
from fastclip.rules.catalogue import AnyRule


def on_accumulation(parameter: Tensor, hook: Callable[[Tensor], object]) -> RemovableHandle:
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    return handle


def step_in_backward(
    training: Training,
    clip: Callable[[Tensor], object] = lambda _: None,
    attach: Callable[[Optimizer], object] = lambda _: None,
) -> None:
    """Give each parameter an optimizer that steps as soon as its gradient is ready, and frees the gradient."""
    for parameter in training.model.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.5)
        attach(optimizer)

        def hook(parameter: Tensor, optimizer: Optimizer = optimizer) -> None:
            clip(parameter)
            optimizer.step()
            optimizer.zero_grad()

        on_accumulation(parameter, hook)


def after_backward() -> Training:
    """The same training, but each parameter is clipped and stepped after backward."""
    training = Training(lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    training.steps(lambda: [fastclip.clip_grad_norm_(p, 0.01) for p in training.model.parameters()])
    return training


CLIPPING: dict[str, Callable[[nn.Module], object]] = {
    "clip_grad_norm_": lambda model: fastclip.clip_grad_norm_(model.parameters(), 1.0),
    "clip_grad_norm_ of a module": lambda model: fastclip.clip_grad_norm_(model, 1.0),
    "clip_grad_value_": lambda model: fastclip.clip_grad_value_(model.parameters(), 1.0),
    "clip_grads_with_norm_": lambda model: fastclip.clip_grads_with_norm_(model.parameters(), 1.0, torch.ones(())),
    "clip_by_norm_": lambda model: fastclip.clip_by_norm_(model, 1.0),
    "measure_grads": fastclip.measure_grads,
}


NOTHING_LEFT = r"4 of 4 parameters .* steps inside of backward .*Clip each gradient in its"


@pytest.mark.filterwarnings("ignore:`torch.jit.* is deprecated:DeprecationWarning")  # from torch's own import
@pytest.mark.parametrize("call", CLIPPING)
def test_clipping_behind_torch_s_optimizers_in_backward_is_an_error(call: str) -> None:
    from torch.distributed.optim.apply_optimizer_in_backward import _apply_optimizer_in_backward

    training = Training()
    _apply_optimizer_in_backward(torch.optim.SGD, training.model.parameters(), {"lr": 0.5})
    training.backward(0)
    with pytest.raises(RuntimeError, match=NOTHING_LEFT):
        CLIPPING[call](training.model)


@pytest.mark.parametrize("call", CLIPPING)
def test_clipping_behind_hooks_that_step_warns(call: str) -> None:
    """It is no error, as it is unknown what a hook does: it may step a profiler."""
    training = Training()
    step_in_backward(training)
    training.backward(0)
    with pytest.warns(UserWarning, match=NOTHING_LEFT) as caught:
        CLIPPING[call](training.model)
    assert caught[0].filename == __file__


def test_a_rule_attached_to_an_optimizer_that_steps_afterwards_warns() -> None:
    training = Training()
    step_in_backward(training)
    fastclip.attach(training.optimizer, global_clipnorm=1.0)
    training.backward(0)
    with pytest.warns(UserWarning, match="nothing is left to clip"):
        training.optimizer.step()


@pytest.mark.parametrize("steps", [False, True], ids=["frees", "steps"])
def test_where_some_step_it_warns_and_clips_the_rest(steps: bool) -> None:
    training = Training()
    hooked, *others = training.model.parameters()
    optimizer = torch.optim.SGD([hooked], lr=0.5)

    def step(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    on_accumulation(hooked, step if steps else lambda parameter: setattr(parameter, "grad", None))
    training.backward(0)
    exact = oracle.norm([p.grad for p in others if p.grad is not None], 2)
    with pytest.warns(UserWarning, match="1 of 4 parameters have no gradient, but a hook") as caught:
        norm = fastclip.clip_grad_norm_(training.model.parameters(), 1.0)
    assert caught[0].filename == __file__
    assert norm.item() == pytest.approx(exact, rel=1e-5)


def test_hooks_that_leave_the_gradient_and_parameters_without_one_are_nothing_to_warn_of() -> None:
    training = Training()
    first, second, *_ = training.model.parameters()
    on_accumulation(first, lambda _: None)
    handle = on_accumulation(second, lambda _: None)
    training.backward(0)
    handle.remove()
    second.grad = None
    assert fastclip.clip_grad_norm_(training.model.parameters(), 1.0).item() > 0
    assert fastclip.clip_grad_norm_([second], 1.0).item() == 0.0
    frozen = first.requires_grad_(False)
    frozen.grad = None
    assert fastclip.clip_grad_norm_([frozen, second], 1.0).item() == 0.0


def log_on_accumulation(training: Training, log: Callable[[Tensor], object] = lambda _: None) -> None:
    for parameter in training.model.parameters():
        on_accumulation(parameter, log)


@pytest.mark.parametrize("call", CLIPPING)
def test_hooks_that_only_look_are_no_error_before_backward(call: str) -> None:
    """It is also unknown whether they leave the gradients, so the call warns."""
    training = Training()
    log_on_accumulation(training)
    with pytest.warns(UserWarning, match=r"4 of 4 parameters .* Either no backward has reached them") as caught:
        CLIPPING[call](training.model)
    assert caught[0].filename == __file__


class Profiler:
    """Has a `step`, but is no optimizer."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1


def test_a_hook_that_steps_something_else_is_no_error_before_backward() -> None:
    training, profiler = Training(), Profiler()
    log_on_accumulation(training, lambda _: profiler.step())
    with pytest.warns(UserWarning, match="Either no backward has reached them"):
        assert fastclip.clip_grad_norm_(training.model, 1.0).item() == 0
    training.backward(0)
    assert profiler.steps == 4
    assert fastclip.clip_grad_norm_(training.model, 1.0).item() > 0


@pytest.mark.parametrize("call", CLIPPING)
def test_a_call_inside_of_backward_takes_what_is_there_and_says_so(call: str) -> None:
    """For example for a log. It is unknown there whether the other gradients are still to come."""
    ours = Training()
    *others, first = ours.model.parameters()  # backward starts with the last parameter
    calls = []

    def log(parameter: Tensor) -> None:
        if parameter is first:
            CLIPPING[call](ours.model)
            CLIPPING[call](nn.ParameterList(others))
            calls.append(parameter)

    log_on_accumulation(ours, log)
    with pytest.warns(UserWarning, match="inside of backward") as caught:
        ours.backward(0)
    assert calls
    messages = [str(warning.message) for warning in caught]
    assert ["3 of 4 parameters" in messages[0], "3 of 3 parameters" in messages[1], len(messages)] == [True, True, 2]
    assert all("inside of backward" in message and "nothing is left" not in message for message in messages)


def test_clipped_in_the_hook() -> None:
    ours = Training()
    step_in_backward(ours, lambda parameter: fastclip.clip_grad_norm_(parameter, 0.01))
    for batch in range(len(ours.batches)):
        ours.backward(batch)
    ours.assert_same_as(after_backward())


@pytest.mark.parametrize("rule", [fastclip.ClipGradNorm(0.01, by="parameter")], ids=str)
def test_a_rule_by_parameter_attached_to_each_optimizer(rule: Any) -> None:
    ours = Training()
    step_in_backward(ours, attach=lambda optimizer: fastclip.attach(optimizer, rule))
    for batch in range(len(ours.batches)):
        ours.backward(batch)
    reference = after_backward()
    for own, other in zip(ours.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-8)


def test_a_rule_by_value_attached_to_each_optimizer() -> None:
    ours, theirs = Training(), Training(lambda parameters: torch.optim.SGD(parameters, lr=0.5))
    step_in_backward(ours, attach=lambda optimizer: fastclip.attach(optimizer, clipvalue=0.001))
    for batch in range(len(ours.batches)):
        ours.backward(batch)
    theirs.steps(lambda: fastclip.clip_grad_value_(theirs.model.parameters(), 0.001))
    ours.assert_same_as(theirs)


@pytest.mark.parametrize(
    "rule", [fastclip.ClipByGlobalNorm(1.0), fastclip.ClipByNorm(1.0, by="group"), fastclip.ClipByNorm(1.0, by=["one"])]
)
def test_a_rule_that_takes_gradients_together_is_an_error_there(rule: AnyRule) -> None:
    ours = Training()
    before = [parameter.detach().clone() for parameter in ours.model.parameters()]
    step_in_backward(ours, attach=lambda optimizer: fastclip.attach(optimizer, rule))
    with pytest.raises(RuntimeError, match=r"ClipBy.*Norm.* steps inside of backward, where the other gradients"):
        ours.backward(0)
    for parameter, old in zip(ours.model.parameters(), before, strict=True):
        oracle.assert_same_bits(parameter.detach(), old)
