"""What only a GPU can show: large sizes, streams, threads, graphs, memory that is reused before the GPU has read it.

On the CPU the same tests run with tiny sizes and without the GPU's part, which shows that they run.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import oracle
import pytest
import ranks
import torch
from gradients import grad_of
from legs import Leg
from processes import Pool
from torch import Tensor, nn

import fastclip

pytestmark = pytest.mark.legs("gpu", "numpy")

FP64 = torch.float64


class Device:
    """The operations of the leg's device that tests need; on the CPU they do as little as possible."""

    def __init__(self, leg: Leg) -> None:
        self.device = leg.device
        self.is_gpu = leg.device.type == "cuda"

    def size(self, on_gpu: int, on_cpu: int) -> int:
        """A size: the GPU's, or a smaller one for the CPU."""
        return on_gpu if self.is_gpu else on_cpu

    def lag(self) -> None:
        """Keep the GPU busy for half a second."""
        if self.is_gpu:
            torch.cuda._sleep(1_000_000_000)  # type: ignore[no-untyped-call]

    def synchronize(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()

    def new_stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def stream_of_its_own(self) -> Iterator[None]:
        with torch.cuda.stream(self.new_stream()) if self.is_gpu else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Make torch raise if the host waits for the device."""
        if self.is_gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if self.is_gpu:
                torch.cuda.set_sync_debug_mode("default")

    def captured(self, work: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        """The result of work captured in a CUDA graph, and a function that replays it; the CPU repeats the work."""
        if not self.is_gpu:
            result = work()
            return result, lambda: result.copy_(work())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = work()
        return result, graph.replay

    def parameters(self, *numels: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
        """Parameters that need almost no memory, with gradients from a normal distribution."""
        made = []
        for numel in numels:
            parameter = nn.Parameter(torch.empty(1, dtype=dtype, device=self.device).expand(numel))
            parameter.grad = torch.empty(numel, dtype=dtype, device=self.device).normal_()
            made.append(parameter)
        return made


@pytest.fixture
def device(leg: Leg) -> Device:
    torch.manual_seed(0)
    return Device(leg)


def exact_norm(parameters: list[nn.Parameter]) -> float:
    """The norm in fp64, in pieces, so that no temporary is large."""
    pieces = [piece for parameter in parameters for piece in torch.split(grad_of(parameter), 1 << 27)]
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p, dtype=FP64) for p in pieces])))


def near(exact: float) -> object:
    return pytest.approx(exact, rel=oracle.NORM_TOLERANCE[torch.float32])


def test_more_than_2_31_elements(device: Device) -> None:
    made = device.parameters(device.size((1 << 31) + 12_345, 70_000), dtype=torch.bfloat16)
    grad = grad_of(made[0])
    exact = exact_norm(made)
    assert fastclip.clip_grad_norm_(made, exact / 2, norm_dtype=FP64).item() == near(exact)
    assert exact_norm(made) == pytest.approx(exact / 2, rel=2.0**-8)  # the rounding of bfloat16
    grad[-1] = 9.0
    fastclip.clip_grad_value_(made, 0.125)
    assert grad[-1].item() == 0.125
    assert grad.max().item() == 0.125
    assert grad.min().item() == -0.125


def test_pinned_memory_is_not_reused_while_the_gpu_lags(device: Device) -> None:
    """Each call has gradients at new addresses. A table that is overwritten before it is copied makes norms wrong."""
    held, norms, exact = [], [], []
    device.lag()
    for i in range(60):
        made = device.parameters(1000, 7, 40_000)
        for parameter in made:
            grad_of(parameter).fill_(1.0 + i)
        held.append(made)
        norms.append(fastclip.clip_grad_norm_(made, 1e9, norm_dtype=FP64))
        exact.append((1.0 + i) * math.sqrt(41_007))
    assert [norm.item() for norm in norms] == [near(value) for value in exact]


def adaptive_rules(by: Literal["global", "parameter"]) -> list[Any]:
    """One of each kind, after a short warm-up."""
    return [
        fastclip.ClipByQuantile(0.5, 10, by=by),
        fastclip.ClipByZScore(warmup=2, by=by),
        fastclip.ClipByEMA(warmup=2, by=by),
    ]


def test_nothing_waits(device: Device) -> None:
    """For gradients at the same addresses, at new addresses, and of new sizes."""

    def call(*numels: int) -> None:
        made = device.parameters(*numels)
        weight = nn.Parameter(torch.ones(6, numels[0], device=device.device))
        weight.grad = torch.ones(6, numels[0], device=device.device)
        rules = [*adaptive_rules("global"), *adaptive_rules("parameter"), fastclip.ClipByWeightNorm()]
        for _ in range(2):
            for rule in rules:
                fastclip.clip_grads_(made, rule)
            fastclip.clip_grads_([weight], fastclip.ClipByWeightNorm(by="unit"))
            fastclip.clip_grad_norm_(made, 1.0)
            fastclip.clip_grad_value_(made, 0.5)
            fastclip.clip_by_norm_(made, 0.1)
            fastclip.clip_grads_(made, fastclip.ClipByGlobalNorm(0.1))

    call(5, 70)
    with device.no_sync():
        call(5, 70)
        call(6, 71, 9)


def test_a_graph_clips_what_is_there_at_its_replay(device: Device) -> None:
    made = device.parameters(3, 64, 1000, device.size(10_000_000, 70_000))
    fastclip.clip_grad_norm_(made, 1e9, norm_dtype=FP64)
    fastclip.clip_grad_value_(made, 1e9)

    def work() -> Tensor:
        norm = fastclip.clip_grad_norm_(made, 1.0, norm_dtype=FP64)
        fastclip.clip_grad_value_(made, 0.5)
        return norm

    norm, replay = device.captured(work)
    for i in range(3):
        for parameter in made:
            grad_of(parameter).normal_(std=1 + i)
        exact = exact_norm(made)
        norm.fill_(math.nan)
        replay()
        assert norm.item() == near(exact)
        assert exact_norm(made) == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("by", ["global", "parameter"])
def test_a_graph_goes_on_learning(device: Device, by: Literal["global", "parameter"]) -> None:
    """Each replay enters its norms: the count of observations is on the device."""
    made, again = device.parameters(3, 64, 1000), device.parameters(3, 64, 1000)
    for captured, eager in zip(adaptive_rules(by), adaptive_rules(by), strict=True):
        results, thresholds = [], []

        def work(rule: Any = captured) -> Tensor:
            thresholds = fastclip.clip_grads_(made, rule).thresholds
            assert thresholds is not None
            return thresholds

        for step in range(7):
            for parameter, other in zip(made, again, strict=True):
                grad_of(parameter).normal_(std=1 + step)
                grad_of(other).copy_(grad_of(parameter))
            if step == 0:
                work()
            elif step == 1 and device.is_gpu:
                state = captured.state_dict()
                result, replay = device.captured(work)
                oracle.assert_same_bits(captured.state_dict()["rows"], state["rows"])  # a capture runs nothing
                replay()
            elif step == 1:
                result, replay = device.captured(work)
            else:
                result.fill_(math.nan)
                replay()
            if step:
                results.append(result.tolist())
            expected = fastclip.clip_grads_(again, eager).thresholds
            assert expected is not None
            thresholds.append(expected.tolist())
        assert results == thresholds[1:]
        oracle.assert_same_bits(captured.state_dict()["rows"], eager.state_dict()["rows"])


def test_a_graph_clips_units(device: Device) -> None:
    weight = nn.Parameter(torch.ones(50, 400, device=device.device))
    weight.grad = torch.ones(50, 400, device=device.device)
    rule = fastclip.ClipByWeightNorm(0.5, by="unit")

    def work() -> Tensor:
        return fastclip.clip_grads_([weight], rule).norm

    work()
    norm, replay = device.captured(work)
    for value in (3.0, 0.25, 7.0):
        weight.grad.fill_(value)
        norm.fill_(math.nan)
        replay()
        assert norm.item() == pytest.approx(value * math.sqrt(20_000))
        torch.testing.assert_close(weight.grad, torch.full_like(weight.grad, min(value, 0.5)))


def test_a_rule_without_state_is_refused_in_a_capture(device: Device) -> None:
    made = device.parameters(64)
    fastclip.clip_grads_(made, fastclip.ClipByQuantile())
    if not device.is_gpu:
        return  # nothing is captured on the CPU
    with pytest.raises(RuntimeError, match="once ahead of the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fastclip.clip_grads_(made, fastclip.ClipByQuantile())


def test_a_capture_of_what_was_not_prepared_is_refused(device: Device) -> None:
    if not device.is_gpu:
        with device.stream_of_its_own():
            fastclip.clip_grad_norm_(device.parameters(777), 1.0)  # nothing is captured on the CPU
        return
    made = device.parameters(777)
    with pytest.raises(RuntimeError, match="once ahead of the capture"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        fastclip.clip_grad_norm_(made, 1.0)


def test_two_streams_at_once(device: Device) -> None:
    """Each stream has its own tables and scratch memory."""
    lists = [device.parameters(*[device.size(1 << 20, 999)] * 40) for _ in range(2)]
    exact = [exact_norm(made) for made in lists]
    streams = [device.new_stream() if device.is_gpu else None for _ in lists]
    found: list[list[Tensor]] = [[], []]
    device.synchronize()
    for _ in range(40):
        for made, stream, norms in zip(lists, streams, found, strict=True):
            with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
                norms.append(fastclip.clip_grad_norm_(made, 1e9, norm_dtype=FP64))
    device.synchronize()
    for norms, right in zip(found, exact, strict=True):
        assert norms[0].item() == near(right)
        assert {norm.item() for norm in norms} == {norms[0].item()}


def test_threads_with_streams_of_their_own(device: Device) -> None:
    failures: list[str] = []

    def work(factor: float) -> None:
        try:
            with device.stream_of_its_own():
                for i in range(30):
                    made = device.parameters(50_000 + i)
                    grad_of(made[0]).fill_(factor)
                    norm = fastclip.clip_grad_norm_(made, 1.0, norm_dtype=FP64).item()
                    assert norm == near(factor * math.sqrt(50_000 + i))
        except BaseException as error:  # noqa: BLE001 - the test reports every kind
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(1.0 + i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_the_same_bits_every_time(device: Device) -> None:
    made = device.parameters(*[64, 2_359_296, 4096, device.size(5_000_000, 5000)] * 10)
    grads = [grad_of(parameter) for parameter in made]
    norms = {fastclip.get_total_norm(grads, norm_dtype=FP64).item() for _ in range(device.size(50, 3))}
    assert len(norms) == 1
    assert norms.pop() == near(exact_norm(made))


def test_unscaled_and_clipped_in_one(device: Device) -> None:
    values = [torch.randn(numel, device=device.device) * 1024 for numel in (3000, 5, 100_000)]
    results = []
    for ours in (True, False):
        made = [nn.Parameter(torch.zeros_like(value)) for value in values]
        for parameter, value in zip(made, values, strict=True):
            parameter.grad = value.clone()
        optimizer = torch.optim.SGD(made, lr=0.1)
        scaler = torch.amp.GradScaler(device.device.type, init_scale=1024.0)
        scaler.scale(torch.zeros((), device=device.device))
        if ours:
            norm = fastclip.unscale_and_clip_grad_norm_(scaler, optimizer, 1.0)
        else:
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(made, 1.0)
        scaler.step(optimizer)
        scaler.update()
        results.append((norm, made))
    (norm, mine), (torchs, theirs) = results
    assert norm.item() == pytest.approx(torchs.item(), rel=oracle.TORCH_NORM_ERROR[torch.float32])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * oracle.TORCH_NORM_ERROR[torch.float32], atol=1e-12)


def test_attached_and_folded_into_a_fused_optimizer(device: Device) -> None:
    results = []
    for way in ("torch", "attached", "folded"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)).to(device.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        if way != "torch":
            fastclip.attach(optimizer, fastclip.ClipGradNorm(0.05), fold=way == "folded")
        x, y = torch.randn(512, 64, device=device.device), torch.randn(512, 8, device=device.device)
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            if way == "torch":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for other in results[1:]:
        # Adam divides by the root of squares: where a gradient is close to 0, rounding decides its direction.
        torch.testing.assert_close(other, results[0], rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:steps skipped. 1:RuntimeWarning")
def test_a_monitor_that_skips(device: Device) -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)).to(device.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    monitor = fastclip.Monitor(model, triggers=[fastclip.NonFinite("gradients", action="skip")])
    fastclip.attach(optimizer, global_clipnorm=1.0, monitor=monitor)
    for step in range(12):
        optimizer.zero_grad()
        x = torch.full((128, 64), math.nan if step == 7 else 1.0, device=device.device)
        model(x).square().mean().backward()
        optimizer.step()
    norms = monitor.read().norm
    assert [math.isfinite(norm) for norm in norms] == [step != 7 for step in range(12)]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_dtensors_of_two_processes_on_one_device(device: Device, two: Pool) -> None:
    bits = two.run(ranks.clip_on, device.device.type)
    assert bits[0] == bits[1]
