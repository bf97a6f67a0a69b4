"""What the caches keep of earlier calls, and when a call reuses it: never where a result could differ."""

from __future__ import annotations

import gc
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gradients import embedded, parameters, random_values, twin
from legs import Leg
from torch import Tensor

import fastclip
from fastclip import backends
from fastclip.backends import triton
from fastclip.core import cache, first_time, nonfinite, prepare
from fastclip.core.prepared import Prepared
from fastclip.foundation import devices


def some_gradients(rng: np.random.Generator, leg: Leg, offset: int = 0) -> list[Tensor]:
    """Gradients of the same sizes and types, at other addresses in each call."""
    kinds = ((torch.float32, 7), (torch.float64, 3), (torch.float32, 0), (torch.float16, 40), (torch.float32, 1500))
    values = [random_values(rng, (size,), dtype) for dtype, size in kinds]
    return [embedded(value, offset, device=leg.device) for value in values]


def assert_clipped(grads: list[Tensor]) -> None:
    """Clip the gradients, and compare with fp64."""
    exact = oracle.norm(grads, 2)
    originals = [twin(grad) for grad in grads]
    norm = fastclip.clip_grad_norm_(parameters(grads), exact / 2)
    assert norm.item() == pytest.approx(exact, rel=1e-6)
    for grad, original in zip(grads, originals, strict=True):
        factor = oracle.coefficient(exact, exact / 2)
        oracle.assert_close(grad, oracle.as_numpy(original) * factor, 4 * oracle.half_ulp(torch.float16))


def test_gradients_that_moved_are_not_grouped_again(
    leg: Leg, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept_alive = [some_gradients(rng, leg) for _ in range(4)]
    assert_clipped(kept_alive[0])
    if leg.keeps_plans:  # the other legs cache nothing: their plans would keep the gradients alive
        monkeypatch.setattr(backends.Backend, "plan", None)  # to make a new plan would fail
    for grads in kept_alive[1:]:
        assert_clipped(grads)
    assert_clipped(kept_alive[1])  # and at earlier addresses again


def test_gradients_that_moved_by_less_than_a_vector(leg: Leg, rng: np.random.Generator) -> None:
    for offset in range(5):
        assert_clipped(some_gradients(rng, leg, offset))


def test_gradients_that_moved_off_their_element_s_boundary(leg: Leg) -> None:
    """No kernel can read a gradient at such an address."""
    if leg.device.type == "cuda":
        pytest.skip("a GPU has no such gradients: torch cannot copy them there")
    for offset in (4, 1, 8):
        memory = bytearray(offset + 40)
        grad = torch.frombuffer(memory, dtype=torch.float32, count=9, offset=offset).fill_(2.0)
        norm = fastclip.clip_grad_norm_(parameters([grad, torch.ones(13, device=leg.device)]), 3.5)
        assert norm.item() == pytest.approx(7)
        assert grad.tolist() == pytest.approx([1.0] * 9)


def test_an_inference_tensor_that_was_measured_is_still_refused_by_clipping(leg: Leg) -> None:
    with torch.inference_mode():
        grad = torch.full((9,), 2.0, device=leg.device)
    assert fastclip.get_total_norm([grad]).item() == 6
    with pytest.raises(RuntimeError, match="inference"):
        fastclip.clip_grads_with_norm_(parameters([grad]), 1.0, torch.tensor(6.0, device=leg.device))
    assert grad.tolist() == [2.0] * 9


def test_lists_that_begin_alike_are_kept_both(leg: Leg, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (torch.ones(8, device=leg.device) for _ in range(3))
    pairs = [first, second], [first, third]
    for pair in pairs:
        fastclip.get_total_norm(pair)
    if leg.keeps_plans:
        monkeypatch.setattr(prepare, "plan", None)
    for pair in pairs:
        assert fastclip.get_total_norm(pair).item() == 4


@pytest.mark.parametrize(
    ("sizes", "starts", "overlap"),
    [
        ((8, 8, 8, 8, 8), (32, 24, 0, 8, 16), False),
        ((8, 8, 8, 8, 8), (0, 24, 48, 32, 7), True),
        ((4, 20), (30, 10), False),
        ((4, 20), (29, 10), True),
        ((20, 0, 4, 6), (0, 13, 30, 9), True),
        ((4, 0, 4), (0, 2, 4), False),
    ],
)
def test_gradients_that_moved_next_to_one_another_or_into_one_another(
    leg: Leg, sizes: tuple[int, ...], starts: tuple[int, ...], overlap: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cached plan is used for adjacent gradients. Those that overlap are scaled one after another, as torch does."""
    monkeypatch.setattr(prepare, "_cache", cache.Cache())
    anew = []
    prepare_anew = first_time.plan

    def noted(*arguments: Any, **keywords: Any) -> Prepared:
        anew.append(arguments)
        return prepare_anew(*arguments, **keywords)

    monkeypatch.setattr(prepare, "plan", noted)
    fastclip.clip_grad_norm_(parameters([torch.ones(size, device=leg.device) for size in sizes]), 1.0)
    assert len(anew) == 1
    memory = torch.linspace(1, 2, 60, device=leg.device)
    reference = memory.clone()
    mine, theirs = (
        parameters([flat[start : start + size] for size, start in zip(sizes, starts, strict=True)])
        for flat in (memory, reference)
    )
    norm = fastclip.clip_grad_norm_(mine, 1.0)
    assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, 1.0).item(), rel=1e-6)
    assert memory.tolist() == pytest.approx(reference.tolist(), rel=1e-6)
    assert len(anew) == 1 + overlap or not leg.keeps_plans


def test_gradients_that_moved_and_are_negated_views_now(leg: Leg) -> None:
    """Their memory holds the negated values, so bounds that are not symmetric would act on the wrong side."""
    values = torch.tensor([-5.0, -1.0, 1.0, 5.0], device=leg.device)
    fastclip.clip_by_value_(parameters([values.clone()]), -2.0, 3.0)
    negated = torch._neg_view(-values)
    fastclip.clip_by_value_(parameters([negated]), -2.0, 3.0)
    assert negated.tolist() == [-2.0, -1.0, 1.0, 3.0]


def test_gradients_without_memory_now(leg: Leg) -> None:
    assert fastclip.get_total_norm([torch.ones(5, device=leg.device)]).item() == pytest.approx(5**0.5)
    nothing = torch._efficientzerotensor((5,), device=leg.device)
    assert fastclip.get_total_norm([nothing]).item() == 0


def test_without_torch_s_guards_nothing_is_kept(
    leg: Leg, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "TensorGuards", None)
    monkeypatch.setattr(prepare, "_cache", cache.Cache())
    grads = some_gradients(rng, leg)
    for _ in range(2):
        assert_clipped(grads)
    assert not prepare._cache.entries


def test_measuring_and_clipping_in_turns_keeps_both(
    leg: Leg, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchtitan does."""
    made = parameters(some_gradients(rng, leg))

    def halves() -> None:
        norm = fastclip.get_total_norm([p.grad for p in made if p.grad is not None])
        fastclip.clip_grads_with_norm_(made, 1.0, norm)

    halves()
    if leg.keeps_plans:
        monkeypatch.setattr(prepare, "plan", None)
    halves()


LIKE: dict[str, Callable[[], Tensor]] = {
    "dtype": lambda: torch.ones(8, dtype=torch.int16).view(torch.float16),
    "size": lambda: torch.ones(7),
    "strides": lambda: torch.ones(16)[::2],
    "shape": lambda: torch.ones(2, 4),
    "order": lambda: torch.ones(4, 2).t(),
}


@pytest.mark.parametrize("change", LIKE)
def test_other_gradients_at_the_same_address(leg: Leg, change: str) -> None:
    """A tensor over the same memory that differs in dtype, size, strides, shape or order is no cache hit."""
    memory = torch.zeros(64, dtype=torch.uint8, device=leg.device)
    memory.view(torch.float32).fill_(1.0)
    pattern = LIKE[change]()
    fastclip.get_total_norm([memory.view(torch.float32)[:8]])
    for _ in range(2):
        other = memory.view(pattern.dtype).as_strided(pattern.shape, pattern.stride())
        assert fastclip.get_total_norm([other], norm_dtype=torch.float64).item() == pytest.approx(
            oracle.norm([other], 2), rel=1e-6
        )


def test_what_is_kept_knows_its_settings(leg: Leg, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is forced between two calls is used in the second."""
    grads = [torch.ones(8, device=leg.device), torch.ones(3, device=leg.device)]
    fastclip.get_total_norm(grads)
    monkeypatch.setenv("FASTCLIP_BACKEND", "none of them")
    with pytest.raises(RuntimeError, match="names no backend"):
        fastclip.get_total_norm(grads)
    with pytest.raises(RuntimeError, match="names no backend"):
        fastclip.get_total_norm([grad.clone() for grad in grads])


@pytest.mark.legs("interpreter")
def test_a_launch_that_was_interrupted_leaves_nothing_behind(leg: Leg, monkeypatch: pytest.MonkeyPatch) -> None:
    """In particular the ticket, whose count tells a program that it is the last one."""
    grads = [torch.full((9,), 2.0, device=leg.device), torch.ones(13, device=leg.device)]
    assert fastclip.get_total_norm(grads).item() == 7
    assert fastclip.get_total_norm(grads, 0.0).item() == 2

    def interrupted(*arguments: Any, **_options: object) -> None:
        partials, ticket = arguments[2:4]
        ticket += 1
        partials += 1
        raise KeyboardInterrupt

    for p, expected in ((2.0, 7), (0.0, 2)):
        with monkeypatch.context() as context:
            context.setattr(triton, "_kernel", lambda _: defaultdict(lambda: interrupted))
            with pytest.raises(KeyboardInterrupt):
                fastclip.get_total_norm(grads, p)
        assert fastclip.get_total_norm(grads, p).item() == expected


# ---- CUDA graphs. Capture and replay are imitated: a replay launches again what was launched in the capture


class Graph:
    """Records the launches inside the block; `replay` repeats them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.launches: list[tuple[Any, ...]] = []

    def __enter__(self) -> Graph:
        from fastclip.backends.triton import TritonPlan

        launch = self._launch = TritonPlan._launch

        def record(*arguments: Any) -> None:
            self.launches.append(arguments)
            launch(*arguments)

        self.monkeypatch.setattr(TritonPlan, "_launch", record)
        for module in (devices, cache, prepare, nonfinite):
            self.monkeypatch.setattr(module, "is_capturing", lambda _: True)
        return self

    def __exit__(self, *_: object) -> None:
        self.monkeypatch.undo()

    def replay(self, steps: slice = slice(None)) -> None:
        for arguments in self.launches[steps]:
            self._launch(*arguments)


@pytest.mark.legs("interpreter", "ptx")
def test_a_captured_call_replays_on_what_the_gradients_hold_by_then(leg: Leg, rng: np.random.Generator) -> None:
    grads, others = some_gradients(rng, leg), some_gradients(rng, leg)
    made = parameters(grads)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("FASTCLIP_BACKEND", "triton")
        fastclip.clip_grad_norm_(made, 1e9)
        fastclip.clip_grad_norm_(parameters(others), 1e9)
        with Graph(monkeypatch) as graph:
            norm = fastclip.clip_grad_norm_(made, 1.0)
            assert len(graph.launches) == 2
    prepare._cache.__init__()  # type: ignore[misc]  # the graph outlives the cache
    for _ in range(3):
        for grad in grads:
            grad.copy_(random_values(rng, grad.shape, grad.dtype) * 3)
        exact = oracle.norm(grads, 2)
        originals = [twin(grad) for grad in grads]
        graph.replay(slice(0, 1))
        fastclip.clip_grad_norm_(parameters(others), 1e-3)  # on another stream, this could run now
        graph.replay(slice(1, 2))
        assert norm.item() == pytest.approx(exact, rel=1e-6)
        for grad, original in zip(grads, originals, strict=True):
            expected = oracle.as_numpy(original) * oracle.coefficient(exact, 1.0)
            oracle.assert_close(grad, expected, 4 * oracle.half_ulp(torch.float16))


@pytest.mark.legs("interpreter", "ptx")
def test_what_a_graph_reads_lives_on(leg: Leg, rng: np.random.Generator) -> None:
    """Tables and bounds stay alive, whatever is clipped before the replay; the plan is on the stream of the capture."""
    grads = some_gradients(rng, leg)
    groups = [{"params": parameters(grads[:2])}, {"params": parameters(grads[2:])}]

    def clip(highest: float) -> None:
        fastclip.clip_by_value_(groups, -1.0, [1.0, highest], by="group")

    clip(2.0)
    with pytest.MonkeyPatch.context() as monkeypatch, Graph(monkeypatch) as graph:
        monkeypatch.setattr(triton, "stream_of", lambda _: 5)
        clip(2.0)
    [(plan, _, _, _, arguments)] = graph.launches
    assert plan.tables.stream == 5
    memory = set(arguments[:3])  # the addresses of chunks, rows and bounds
    alive = [made for made in gc.get_objects() if type(made) is Tensor and made.data_ptr() in memory]
    assert {made.data_ptr() for made in alive} == memory
    read = [weakref.ref(made) for made in alive]
    del alive
    graph.launches.clear()
    del plan, arguments
    for i in range(20):
        clip(3.0 + i)
    prepare._cache.__init__()  # type: ignore[misc]
    gc.collect()
    assert all(reference() is not None for reference in read)


@pytest.mark.legs("interpreter", "ptx")
def test_a_capture_of_what_was_not_prepared_is_refused(
    leg: Leg, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    grads = some_gradients(rng, leg)
    before = [twin(grad) for grad in grads]
    with Graph(monkeypatch), pytest.raises(RuntimeError, match="once ahead of the capture"):
        fastclip.clip_grad_norm_(parameters(grads), 1e-3)
    for grad, original in zip(grads, before, strict=True):
        oracle.assert_same_bits(grad, original)


@pytest.mark.legs("interpreter", "ptx")
def test_a_capture_that_would_wait_is_refused(leg: Leg, monkeypatch: pytest.MonkeyPatch) -> None:
    made = parameters([torch.ones(4, device=leg.device)])
    fastclip.clip_grad_norm_(made, 1.0)
    with Graph(monkeypatch), pytest.raises(RuntimeError, match="`error_if_nonfinite` waits for the device"):
        fastclip.clip_grad_norm_(made, 1.0, error_if_nonfinite=True)
