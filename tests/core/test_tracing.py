"""A tracer records every operation of a clip, and nothing from a traced call is cached for later calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastclip
from fastclip.core import cache, prepare

Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


Owners = list[tuple[str, Tensor]]


def owners_of(first: Tensor, second: Tensor, *, gaps: bool = False) -> Owners:
    """Owners of gradients computed from two tensors: one of 16 bits, one missing and, if `gaps`, one with gaps."""
    grads = {
        "a.weight": first * 2,
        "a.bias": second[:, 0] if gaps else second * 3,
        "b.weight": (first[:1, :2] + 1).to(torch.bfloat16),
        "b.bias": None,
    }
    owners = []
    for name, grad in grads.items():
        owner = torch.zeros(1) if grad is None else torch.zeros_like(grad)
        owner.grad = grad
        owners.append((name, owner))
    return owners


def gradients(owners: Owners) -> tuple[Tensor, ...]:
    return tuple(owner.grad for _, owner in owners if owner.grad is not None)


def stepping(clip: Callable[[Owners], object], *, gaps: bool = False) -> Step:
    """A function from two tensors to the clipped gradients, and to the result of the call if that is a tensor."""

    def step(first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        owners = owners_of(first, second, gaps=gaps)
        found = clip(owners)
        return (*gradients(owners), *([found] if isinstance(found, Tensor) else []))

    return step


CALLS: dict[str, Step] = {
    "clip_grad_norm_": stepping(lambda owners: fastclip.clip_grad_norm_(owners, 0.5)),
    "with gaps": stepping(lambda owners: fastclip.clip_grad_norm_(owners, 0.5), gaps=True),
    "of another order": stepping(lambda owners: fastclip.clip_grad_norm_(owners, 0.5, 3.0)),
    "clip_grad_value_": stepping(lambda owners: fastclip.clip_grad_value_(owners, 0.5)),
    "get_total_norm": stepping(lambda owners: fastclip.get_total_norm(gradients(owners))),
    "clip_grads_with_norm_": stepping(
        lambda owners: fastclip.clip_grads_with_norm_(owners, 0.5, gradients(owners)[0].sum())
    ),
    "clip_by_norm_": stepping(lambda owners: fastclip.clip_by_norm_(owners, 0.5)),
    "by layer": stepping(lambda owners: fastclip.clip_by_norm_(owners, [0.5, 0.1], by="layer")),
    "clip_by_global_norm_": stepping(lambda owners: fastclip.clip_by_global_norm_(owners, 0.5)),
    "measure_grads": stepping(lambda owners: fastclip.measure_grads(owners).group_norms),
    "clip_grads_": stepping(lambda owners: fastclip.clip_grads_(owners, lambda norms: 1 / (1 + norms)).norm),
    "adaptive": stepping(lambda owners: fastclip.clip_grads_(owners, fastclip.ClipByZScore(cap=0.5)).thresholds),
    "by unit": stepping(lambda owners: fastclip.clip_grads_(owners, fastclip.ClipByWeightNorm(2.0, by="unit")).norm),
}

RECORDERS: dict[str, Callable[[Step, Tensor, Tensor], Step]] = {
    "make_fx, real": lambda step, *example: make_fx(step, tracing_mode="real")(*example),
    "make_fx, fake": lambda step, *example: make_fx(step, tracing_mode="fake")(*example),
    "make_fx, ahead of dispatch": lambda step, *example: make_fx(step, tracing_mode="real", pre_dispatch=True)(
        *example
    ),
    "make_fx, symbolic": lambda step, *example: make_fx(step, tracing_mode="symbolic")(*example),
    "jit.trace": lambda step, *example: torch.jit.trace(step, example),  # type: ignore[no-untyped-call]
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.trace"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # about sizes: a trace makes them constants
]


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, generator=generator), torch.randn(2, 2, generator=generator) * 10**seed


@pytest.mark.parametrize("first", [True, False], ids=["first", "after a call"])
@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("call", CALLS)
def test_a_recorded_step_is_right_for_other_inputs(
    call: str, recorder: str, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_cache", cache.Cache())
    step = CALLS[call]
    if not first:
        step(*inputs(0))
    recorded = RECORDERS[recorder](step, *inputs(0))
    for seed in (1, 2):
        for found, expected in zip(recorded(*inputs(seed)), step(*inputs(seed)), strict=True):
            torch.testing.assert_close(
                found, expected, rtol=2e-5 if expected.dtype != torch.bfloat16 else 2**-7, atol=0
            )


class Names(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Records which operations were called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **kwargs or {})


def test_a_mode_that_only_looks_does_not_change_what_is_done() -> None:
    """Otherwise a profiler would measure something else."""
    owner = torch.zeros(3)
    for _ in range(2):
        owner.grad = torch.tensor([3.0, 0.0, 4.0])
        with Names() as seen:
            fastclip.clip_grad_norm_(owner, 0.5)
        assert seen.names.isdisjoint({"linalg_vector_norm", "mul_", "copy_"})
        torch.testing.assert_close(owner.grad, torch.tensor([0.3, 0.0, 0.4]))


def test_fake_gradients_outside_of_their_mode() -> None:
    with FakeTensorMode():
        owner = torch.zeros(3)
        owner.grad = torch.ones(3)
    assert fastclip.clip_grad_norm_(owner, 1.0).shape == ()
    fastclip.clip_by_norm_(owner, 1.0)
    fastclip.clip_grad_value_(owner, 1.0)


@pytest.mark.parametrize("call", CALLS)
def test_no_fake_tensor_is_kept(call: str) -> None:
    """And a fake tensor is never combined with a cached real one."""
    step = CALLS[call]
    for _ in range(2):
        with FakeTensorMode():
            step(torch.zeros(2, 3), torch.zeros(2, 2))
        for found in step(*inputs(0)):
            assert type(found) is Tensor


@pytest.mark.parametrize(
    "rule",
    [fastclip.ClipByQuantile(include_current=True), fastclip.ClipByZScore(cap=0.5), fastclip.ClipByEMA(warmup=1)],
    ids=lambda rule: type(rule).__name__,
)
def test_an_adaptive_rule_learns_nothing_while_a_step_is_recorded(rule: Any) -> None:
    step = stepping(lambda owners: fastclip.clip_grads_(owners, rule))
    step(*inputs(0))
    before = rule.state_dict()["rows"]
    with FakeTensorMode():
        step(torch.zeros(2, 3), torch.zeros(2, 2))
    recorded = make_fx(step, tracing_mode="real")(*inputs(0))
    recorded(*inputs(1))
    assert torch.equal(rule.state_dict()["rows"], before)
    step(*inputs(1))
    assert not torch.equal(rule.state_dict()["rows"], before)
