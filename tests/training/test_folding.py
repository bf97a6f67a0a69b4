"""A rule folded into a fused optimizer: the same step as with clipping before it, without a pass that writes."""

from __future__ import annotations

import copy
import functools
import io
import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from legs import Leg
from small_model import Training
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import fastclip

FUSED: dict[str, Callable[[Any], Optimizer]] = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, fused=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, fused=True),
}

RULES: dict[str, Callable[[], Any]] = {
    "clip_grad_norm": lambda: fastclip.ClipGradNorm(0.02),
    "clip_by_global_norm": lambda: fastclip.ClipByGlobalNorm(0.02),
    "at_threshold": lambda: fastclip.ClipAtThreshold(0.02),
    "function": lambda: fastclip.Rule(lambda norms: -0.01 / norms, by="global"),
}

# Clipping before the step rounds the coefficient and the product to fp32; folding rounds the divisor and the quotient.
FOLDING = 4 * 2.0**-24


def gradients(training: Training) -> list[Tensor]:
    return [p.grad.detach().clone() for p in training.model.parameters() if p.grad is not None]


def weights(training: Training) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in training.model.parameters()]


def follow(ours: Training, theirs: Training) -> None:
    """Copy the weights of one training to another, so that their next gradients are the same to the bit."""
    with torch.no_grad():
        for own, other in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
            own.copy_(other)


def assert_close(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype = torch.float32) -> None:
    tolerance = FOLDING + (0.0 if dtype.itemsize >= 4 else 2 * oracle.half_ulp(dtype))
    for own, other in zip(ours, theirs, strict=True):
        oracle.assert_close(own, oracle.as_numpy(other), tolerance)


@pytest.mark.parametrize("to_none", [True, False], ids=["zero_grad to None", "zero_grad to 0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", FUSED)
@pytest.mark.parametrize("rule", RULES)
def test_same_as_clipping_ahead(rule: str, optimizer: str, dtype: torch.dtype, to_none: bool) -> None:
    ours, theirs = Training(FUSED[optimizer], dtype=dtype), Training(FUSED[optimizer], dtype=dtype)
    clipper = fastclip.attach(ours.optimizer, RULES[rule](), fold=True)
    for batch in range(4):
        for training in (ours, theirs):
            training.optimizer.zero_grad(set_to_none=to_none)
            training.backward(batch)
        result = fastclip.clip_grads_(theirs.model, RULES[rule]())
        for training in (ours, theirs):
            training.optimizer.step()
        assert clipper.norm is not None
        assert clipper.norm.item() == pytest.approx(result.norm.item(), rel=oracle.NORM_TOLERANCE[dtype])
        assert clipper.clipped
        assert_close(gradients(ours), gradients(theirs), dtype)
        relative = max(4 * torch.finfo(dtype).eps, 1e-6)
        for own, other in zip(weights(ours), weights(theirs), strict=True):
            torch.testing.assert_close(own, other, rtol=relative, atol=0.1 * relative)  # a step is at most 0.1
        follow(ours, theirs)
    assert not hasattr(ours.optimizer, "grad_scale")


def test_on_every_leg(leg: Leg) -> None:
    ours, theirs = Training(FUSED["adamw"]), Training(FUSED["adamw"])
    for training in (ours, theirs):
        training.model.to(leg.device)
        training.batches = [(x.to(leg.device), y.to(leg.device)) for x, y in training.batches]
        training.backward(0)
    fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    ours.optimizer.step()
    fastclip.clip_grad_norm_(theirs.model, 0.02)
    theirs.optimizer.step()
    # The kernel computes the coefficient of clip_grad_norm_, and torch that of the rule: both in fp64.
    assert_close(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("optimizer", FUSED)
def test_nothing_to_clip_is_no_clipping_to_the_bit(optimizer: str) -> None:
    ours, plain = Training(FUSED[optimizer]), Training(FUSED[optimizer])
    clipper = fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(1e6), fold=True)
    for training in (ours, plain):
        training.steps()
    ours.assert_same_as(plain)
    assert not clipper.clipped


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Records the operations that write to gradients, and counts the numbers copied to the host: each is a sync."""

    def __init__(self, grads: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.addresses = {grad.data_ptr() for grad in grads}
        self.writing: list[str] = []
        self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.syncs += func is torch.ops.aten._local_scalar_dense.default
        for argument, schema in zip(args, func._schema.arguments, strict=False):
            tensors = argument if isinstance(argument, list) else [argument]
            written = schema.alias_info is not None and schema.alias_info.is_write
            if written and any(isinstance(t, Tensor) and t.data_ptr() in self.addresses for t in tensors):
                self.writing.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_only_the_optimizer_writes_gradients_and_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_BACKEND", "torch")  # a mode sees this backend's operations
    training = Training(FUSED["adamw"])
    fastclip.attach(training.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    training.steps()
    training.backward(0)
    with Operations([p.grad for p in training.model.parameters() if p.grad is not None]) as operations:
        training.optimizer.step()
    assert operations.writing == ["aten::_fused_adamw_"]
    assert operations.syncs == 0


def test_a_closure() -> None:
    """The gradients exist only inside the step."""
    ours, theirs = Training(FUSED["momentum"]), Training(FUSED["momentum"])
    clipper = fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    for training in (ours, theirs):

        def closure(training: Training = training) -> Tensor:
            training.optimizer.zero_grad()
            loss = training.backward(0)
            if training is theirs:
                fastclip.clip_grad_norm_(training.model, 0.02)
            return loss

        loss: Any = training.optimizer.step(closure)  # type: ignore[arg-type]  # torch says it returns a float
        assert loss.item() > 0
    assert clipper.clipped
    assert_close(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("culprit", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_spreads_as_it_does_ahead(culprit: float) -> None:
    ours, theirs = Training(FUSED["sgd"]), Training(FUSED["sgd"])
    fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    for training in (ours, theirs):
        training.backward(0)
        first = next(training.model.parameters()).grad
        assert first is not None
        first[0, 0] = culprit
    ours.optimizer.step()
    fastclip.clip_grad_norm_(theirs.model, 0.02)
    assert_close(gradients(ours), gradients(theirs))
    assert gradients(ours)[0].isnan().any()


@pytest.mark.parametrize("unscaled", [False, True], ids=["by step", "by unscale_"])
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "momentum", "adagrad"])
def test_grad_scaler(optimizer: str, unscaled: bool) -> None:
    """The scaler multiplies an existing `grad_scale` and deletes it afterwards; it skips a step with an infinity."""
    ours, theirs = Training(FUSED[optimizer]), Training(FUSED[optimizer])
    clipper = fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    scalers = {training: torch.amp.GradScaler("cpu", init_scale=2.0**10) for training in (ours, theirs)}
    for batch, expected in enumerate([1024.0, 1024.0, 512.0, 512.0]):
        for training, scaler in scalers.items():
            x, y = training.batches[batch]
            training.optimizer.zero_grad()
            scaler.scale((training.model(x) - y).square().mean()).backward()
            if batch == 2:
                first = next(training.model.parameters()).grad
                assert first is not None
                first[0] = math.inf
            before = weights(training)
            if training is theirs or unscaled:
                scaler.unscale_(training.optimizer)
            if training is theirs:
                fastclip.clip_grad_norm_(training.model, 0.02)
            scaler.step(training.optimizer)
            scaler.update()
            assert scaler.get_scale() == expected
            assert not hasattr(training.optimizer, "grad_scale")
            if batch == 2:
                for own, old in zip(weights(training), before, strict=True):
                    oracle.assert_same_bits(own, old)
        if batch != 2:
            assert clipper.clipped
            assert_close(gradients(ours), gradients(theirs))
            for own, other in zip(weights(ours), weights(theirs), strict=True):
                torch.testing.assert_close(own, other, rtol=1e-6, atol=1e-7)
        follow(ours, theirs)


def test_a_grad_scale_of_the_user_s_own_stays() -> None:
    ours, theirs = Training(FUSED["momentum"]), Training(FUSED["momentum"])
    clipper = fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    for training in (ours, theirs):
        training.backward(0)
    norm = fastclip.clip_grad_norm_(theirs.model, 0.02)
    theirs.optimizer.step()
    for parameter in ours.model.parameters():
        assert parameter.grad is not None
        parameter.grad *= 8.0
    ours.optimizer.grad_scale = own = torch.tensor(8.0)  # type: ignore[attr-defined]
    ours.optimizer.step()
    assert ours.optimizer.grad_scale is own  # type: ignore[attr-defined]
    assert clipper.norm is not None
    assert clipper.norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert_close(gradients(ours), gradients(theirs))


def test_the_optimizer_s_own_state_is_that_of_clipping_ahead() -> None:
    ours, theirs = Training(FUSED["adamw"]), Training(FUSED["adamw"])
    fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    fastclip.attach(theirs.optimizer, fastclip.ClipGradNorm(0.02))
    for training in (ours, theirs):
        training.steps()
    folded, ahead = ours.optimizer.state_dict(), theirs.optimizer.state_dict()
    assert folded.keys() == ahead.keys()
    assert folded["param_groups"] == ahead["param_groups"]
    assert folded["fastclip"].keys() == ahead["fastclip"].keys()
    torch.testing.assert_close(folded["state"], ahead["state"], rtol=1e-4, atol=1e-7)
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    plain = Training(FUSED["adamw"])
    plain.optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert plain.optimizer.state_dict().keys() == {"state", "param_groups"}
    ours.optimizer.load_state_dict(plain.optimizer.state_dict())
    ours.backward(0)
    ours.optimizer.step()


def test_detached() -> None:
    ours, plain = Training(FUSED["momentum"]), Training(FUSED["momentum"])
    fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(0.02), fold=True).detach()
    for training in (ours, plain):
        training.steps()
    ours.assert_same_as(plain)


@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
def test_a_monitor_skips_a_folded_step(optimizer: str) -> None:
    training = Training(FUSED[optimizer])
    skip = fastclip.NonFinite("gradients", action="skip")
    monitor = fastclip.Monitor(training.model, triggers=[skip])
    fastclip.attach(training.optimizer, fastclip.ClipGradNorm(0.02), monitor=monitor, fold=True)
    training.steps()
    before = weights(training)
    training.backward(0)
    first = next(training.model.parameters()).grad
    assert first is not None
    first[0] = math.nan
    training.optimizer.step()
    for own, old in zip(weights(training), before, strict=True):
        oracle.assert_same_bits(own, old)
    assert not hasattr(training.optimizer, "grad_scale")
    assert not hasattr(training.optimizer, "found_inf")


def test_a_step_that_raises_leaves_no_scale_to_the_next() -> None:
    ours, theirs = Training(FUSED["sgd"]), Training(FUSED["sgd"])
    fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    for training in (ours, theirs):
        training.backward(0)

    def fail(*_: object) -> None:
        raise MemoryError

    handle = ours.optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        ours.optimizer.step()
    handle.remove()
    ours.optimizer.step()
    fastclip.clip_grad_norm_(theirs.model, 0.02)
    assert_close(gradients(ours), gradients(theirs))


@pytest.mark.parametrize("ends", ["by unscale_", "by step, cleared", "by plain step, cleared", "detached"])
def test_a_step_that_raises_leaves_no_scale_to_the_scaler(ends: str) -> None:
    """The scaler would multiply its own scale by one that a failed step left, unless the caller clears that."""
    ours, theirs = Training(FUSED["sgd"]), Training(FUSED["sgd"])
    clipper = fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    scalers = {training: torch.amp.GradScaler("cpu", init_scale=2.0**10) for training in (ours, theirs)}

    def backward(training: Training, batch: int) -> None:
        x, y = training.batches[batch]
        training.optimizer.zero_grad()
        scalers[training].scale((training.model(x) - y).square().mean()).backward()
        if training is theirs or ends == "by unscale_":
            scalers[training].unscale_(training.optimizer)

    def fail(*_: object) -> None:
        raise MemoryError

    handle = ours.optimizer.register_step_pre_hook(fail)
    backward(ours, 0)
    if ends == "by plain step, cleared":
        with pytest.raises(MemoryError):
            ours.optimizer.step()
    else:
        with pytest.raises(MemoryError):
            scalers[ours].step(ours.optimizer)
        scalers[ours].update()
    handle.remove()
    if ends != "by unscale_":
        if ends == "detached":
            clipper.detach()
            assert ours.optimizer.grad_scale.item() == 2.0**10  # type: ignore[attr-defined]  # torch's own
            fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
        del ours.optimizer.grad_scale  # type: ignore[attr-defined]
    for training in (ours, theirs):
        backward(training, 1)
    fastclip.clip_grad_norm_(theirs.model, 0.02)
    for training in (ours, theirs):
        scalers[training].step(training.optimizer)
    assert_close(gradients(ours), gradients(theirs))
    assert not hasattr(ours.optimizer, "grad_scale")


@pytest.mark.parametrize(
    ("grad", "message"),
    [
        (torch.full((16,), 100.0)[:1].expand(8), r"has the strides \(0,\)"),
        (torch.full((16,), 100.0)[::2], r"has the strides \(2,\)"),
    ],
    ids=["expanded", "strided"],
)
def test_gradients_that_are_not_dense_are_refused_and_nothing_is_written(grad: Tensor, message: str) -> None:
    memory = torch.as_strided(grad, (16,), (1,))
    parameter = nn.Parameter(torch.zeros(8))
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=True)
    fastclip.attach(optimizer, fastclip.ClipGradNorm(1.0), fold=True)
    parameter.grad = grad
    with pytest.raises(RuntimeError, match=message):
        optimizer.step()
    assert memory.tolist() == [100.0] * 16
    assert not parameter.any()


def test_sparse_gradients_are_refused_by_torch() -> None:
    embedding = nn.Embedding(5, 2, sparse=True)
    before = embedding.weight.detach().clone()
    optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0, fused=True)
    fastclip.attach(optimizer, fastclip.ClipGradNorm(0.1), fold=True)
    embedding(torch.tensor([1, 1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.to_dense().sum().item() == 4.0
    oracle.assert_same_bits(embedding.weight.detach(), before)


def test_strides_of_dimensions_of_one_element_do_not_matter() -> None:
    parameter = nn.Parameter(torch.zeros(1, 3, 1))
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=True)
    fastclip.attach(optimizer, fastclip.ClipGradNorm(1.0), fold=True)
    parameter.grad = torch.full((3,), 5.0).as_strided((1, 3, 1), (7, 1, 9))
    optimizer.step()
    assert parameter.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_a_trigger_that_raises_leaves_nothing_lent() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=True)
    monitor = fastclip.Monitor([parameter], triggers=[fastclip.NonFinite("gradients", action="raise")])
    fastclip.attach(optimizer, fastclip.ClipGradNorm(1.0), monitor=monitor, fold=True)
    parameter.grad = torch.full((3,), math.nan)
    with pytest.raises(fastclip.TriggerError):
        optimizer.step()
    assert getattr(optimizer, "grad_scale", None) is None


class OwnStep(torch.optim.Adam):
    """Has torch's settings for a fused step, but its own step."""

    def step(self, closure: Any = None) -> Any:
        return closure


class WrappingStep(torch.optim.Adam):
    """Its own step has the name and attributes of torch's."""

    @functools.wraps(torch.optim.Adam.step)
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]  # mypy sees one of torch's overloads
        return closure


class PlainSubclass(torch.optim.Adam):
    """Has torch's step."""


def _parameter() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.optim.Adam(_parameter()),
        lambda: torch.optim.AdamW(_parameter(), foreach=True),
        lambda: torch.optim.SGD(_parameter(), lr=0.1),
        lambda: torch.optim.Adagrad(_parameter()),
        lambda: torch.optim.RMSprop(_parameter()),
        lambda: torch.optim.Adafactor(_parameter()),
        lambda: torch.optim.LBFGS(_parameter()),
        lambda: OwnStep(_parameter(), fused=True),
        lambda: WrappingStep(_parameter(), fused=True),
    ],
    ids=["adam", "adamw", "sgd", "adagrad", "rmsprop", "adafactor", "lbfgs", "own step", "wrapping step"],
)
def test_optimizers_that_do_not_divide_are_refused(make: Callable[[], Optimizer]) -> None:
    optimizer = make()
    message = rf"fused=True: .* that of this {type(optimizer).__name__} does not"
    with pytest.raises(ValueError, match=message):
        fastclip.attach(optimizer, fastclip.ClipGradNorm(1.0), fold=True)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_subclass_with_torch_s_own_step_is_taken() -> None:
    ours, theirs = Training(lambda named: PlainSubclass(named, lr=0.01, fused=True)), Training(FUSED["adam"])
    fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    for training in (ours, theirs):
        training.backward(0)
    fastclip.clip_grad_norm_(theirs.model, 0.02)
    for training in (ours, theirs):
        training.optimizer.step()
    assert_close(gradients(ours), gradients(theirs))


@pytest.mark.parametrize(
    "rule",
    [{"clipnorm": 1.0}, {"clipvalue": 1.0}, {"rule": fastclip.ClipGradNorm([1.0, 2.0], by="parameter")}],
    ids=["by parameter", "by value", "several bounds"],
)
def test_rules_of_several_coefficients_are_refused(rule: dict[str, Any]) -> None:
    optimizer = torch.optim.Adam(_parameter(), fused=True)
    with pytest.raises(ValueError, match="one coefficient for all gradients, which Clip"):
        fastclip.attach(optimizer, **rule, fold=True)


def test_a_monitor_alone_cannot_be_folded() -> None:
    training = Training(FUSED["adam"])
    with pytest.raises(ValueError, match="give a rule by the global norm"):
        fastclip.attach(training.optimizer, monitor=fastclip.Monitor(training.model), fold=True)


def test_a_state_of_another_rule_is_refused() -> None:
    ours = Training(FUSED["adam"])
    clipper = fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    other = Training(FUSED["adam"])
    fastclip.attach(other.optimizer, clipnorm=1.0)
    with (
        pytest.warns(UserWarning, match="takes the place"),
        pytest.raises(ValueError, match="one coefficient for all gradients"),
    ):
        ours.optimizer.load_state_dict(other.optimizer.state_dict())
    assert clipper.rule == fastclip.ClipGradNorm(0.02)


def two_groups(fused: bool) -> Callable[[Any], Optimizer]:
    def make(parameters: Any) -> Optimizer:
        first, *others = parameters
        return torch.optim.Adam([{"params": [first], "fused": True}, {"params": others}], lr=0.01, fused=fused)

    return make


def test_a_state_that_is_not_fused_is_refused_before_any_of_it_is_restored() -> None:
    """Torch's state dict has `fused` of each group, so loading one may switch it off."""
    ours, plain = Training(two_groups(True)), Training(two_groups(False))
    clipper = fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    fastclip.attach(plain.optimizer, fastclip.ClipGradNorm(0.02))
    for training in (ours, plain):
        training.steps()
    before = copy.deepcopy(ours.optimizer.state_dict())
    norm = clipper.norm
    state = copy.deepcopy(plain.optimizer.state_dict())  # otherwise the two would share it
    message = r"param_groups\[1\] of the state dict .* load_state_dict .*\[1\]\[\"fused\"\] = True"
    with pytest.raises(ValueError, match=message):
        ours.optimizer.load_state_dict(state)
    after = ours.optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    assert clipper.norm is norm
    ours.steps()
    state["param_groups"][1]["fused"] = True
    ours.optimizer.load_state_dict(state)
    follow(ours, plain)
    for training in (ours, plain):
        training.steps()
    for own, other in zip(weights(ours), weights(plain), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


def test_a_state_without_fused_loads_once_detached() -> None:
    """Also if it was detached inside a step, during which the hooks stay."""
    ours, plain = Training(FUSED["adam"]), Training(lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    clipper = fastclip.attach(ours.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    handle = ours.optimizer.register_step_pre_hook(lambda *_: clipper.detach())
    ours.optimizer.step()
    handle.remove()
    ours.optimizer.load_state_dict(plain.optimizer.state_dict())
    for training in (ours, plain):
        training.steps()
    ours.assert_same_as(plain)


def test_a_group_that_is_no_longer_fused_is_named_at_the_step() -> None:
    training = Training(two_groups(True))
    fastclip.attach(training.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    training.optimizer.param_groups[1]["fused"] = False
    training.backward(0)
    before = [*gradients(training), *weights(training)]
    with pytest.raises(ValueError, match=r"param_groups\[1\] of the optimizer"):
        training.optimizer.step()
    for own, old in zip([*gradients(training), *weights(training)], before, strict=True):
        oracle.assert_same_bits(own, old)


def test_a_step_without_gradients_does_nothing() -> None:
    training = Training(FUSED["momentum"])
    before = weights(training)
    clipper = fastclip.attach(training.optimizer, fastclip.ClipGradNorm(0.02), fold=True)
    training.optimizer.step()
    assert clipper.norm is not None
    assert clipper.norm.item() == 0.0
    for own, old in zip(weights(training), before, strict=True):
        oracle.assert_same_bits(own, old)
