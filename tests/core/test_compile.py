"""A training step that clips, under `torch.compile`: the same numbers, and no recompilation in later steps."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastclip
from fastclip.foundation.tracing import untraced

pytestmark = [  # from torch's compiler itself
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

CALLS: dict[str, Callable[[nn.Module], object]] = {
    "clip_grad_norm_": lambda model: fastclip.clip_grad_norm_(model.parameters(), 0.1),
    "clip_grad_value_": lambda model: fastclip.clip_grad_value_(model.parameters(), 0.01),
    "two halves": lambda model: fastclip.clip_grads_with_norm_(
        model.parameters(), 0.1, fastclip.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    ),
    "clip_by_norm_": lambda model: fastclip.clip_by_norm_(model, 0.1),
    "clip_by_value_": lambda model: fastclip.clip_by_value_(model, -0.01, 0.02),
    "clip_by_global_norm_": lambda model: fastclip.clip_by_global_norm_(model, 0.1),
    "clip_grads_": lambda model: fastclip.clip_grads_(model, fastclip.ClipByNorm(0.1, by="layer")),
    "measure_grads": fastclip.measure_grads,
    "attached": lambda _: None,
    "folded": lambda _: None,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_compiled_step(call: str) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    assert losses(call, torch.compile(backend="eager")) == losses(call, lambda step: step)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch's default backend compiles with g++")
def test_a_step_compiled_by_torch_s_default_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._dynamo

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    plain = losses("clip_grad_norm_", lambda step: step)
    assert losses("clip_grad_norm_", torch.compile()) == pytest.approx(plain, rel=1e-5)  # it sums in another order


def test_a_compiled_step_that_calls_its_base_class_s_with_a_closure() -> None:
    import torch._dynamo

    class Derived(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch._dynamo.reset()
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)  # from now on torch calls the hooks of SGD, too
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = Derived([parameter], lr=1.0)
    fastclip.attach(optimizer, fastclip.Rule(lambda norms: torch.full_like(norms, 0.5), by="global"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = parameter.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    step = torch.compile(lambda: optimizer.step(closure), backend="eager")
    for i in range(3):
        step()
        assert parameter.item() == -0.5 * (i + 1)


def test_functions_that_are_met_one_after_another() -> None:
    """Neither is compiled, whichever other function was called before."""
    import torch._dynamo

    torch._dynamo.reset()
    seen: list[tuple[str, bool]] = []
    first, second = (untraced(lambda name=name: seen.append((name, torch.compiler.is_compiling()))) for name in "ab")

    def step(x: Tensor, function: Callable[[], None]) -> Tensor:
        y = x * 2
        function()
        return y

    for function in (first, first, second, second):
        assert torch.compile(step, backend="eager")(torch.ones(()), function).item() == 2.0
    assert seen == [("a", False), ("a", False), ("b", False), ("b", False)]


def losses(call: str, compiled: Any) -> list[float]:
    """The losses of a few steps; from the third step on, a recompilation raises."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.5, fused=call == "folded")
    if call == "attached":
        skip = fastclip.Jump("norm", z=6.0, action="skip")
        monitor = fastclip.Monitor(model, triggers=[skip])
        fastclip.attach(optimizer, clipnorm=0.1, monitor=monitor)
    if call == "folded":
        fastclip.attach(optimizer, global_clipnorm=0.1, fold=True)

    def plain_step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = (model(x) - y).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        CALLS[call](model)
        optimizer.step()
        return loss

    step = compiled(plain_step)
    seen = []
    for number in range(5):
        settled: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if number >= 2:
            settled = torch._dynamo.config.patch(error_on_recompile=True)
        with settled:
            loss = step(torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator))
        seen.append(loss.item())
    return seen
