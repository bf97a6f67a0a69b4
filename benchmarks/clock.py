"""GPU time and host time, measured separately, and the bandwidth that a GPU's memory reaches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CYCLES_PER_S = 2e9  # a GPU's clock rate, approximately
LONGEST_S = 0.25  # the longest time that the GPU sleeps to wait for the host


@dataclass(frozen=True)
class Timing:
    """Times in milliseconds: the 20th, 50th and 80th percentile on the GPU, and the median on the host.

    Attributes:
        has_gaps: Whether the GPU waited for the host during the measurement. GPU time is then about host time.
    """

    gpu_p20_ms: float
    gpu_ms: float
    gpu_p80_ms: float
    host_ms: float
    has_gaps: bool


class Clock:
    """Times a function. On the CPU both times are wall-clock time.

    Events measure GPU time. The GPU sleeps until the host has issued all launches, so that there are no gaps between
    them. There are gaps all the same if the host takes longer, or issues more launches than the driver's queue holds
    (about a thousand). `Timing.has_gaps` reports that. Host time is the time until the call returns, on an idle GPU.

    Args:
        device: The device of the work.
        rounds: How often GPU time and host time are measured.
    """

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device = device
        self.rounds = rounds
        is_gpu = device.type == "cuda"
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if is_gpu else 1 << 20
        self._other = torch.ones(self.cache_bytes, device=device)  # fp32: four times the L2 cache

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, work: Callable[[], object], *, cold: bool = False) -> Timing:
        """Time `2 * rounds + 1` calls of `work`. If `cold`, the GPU's L2 cache holds other data before each call."""
        work()
        host = self._host_times(work)
        if self.device.type != "cuda":
            return self._timing(host, host, has_gaps=False)
        gpu, gaps = self._gpu_times(work, host, cold=cold)
        return self._timing(gpu, host, has_gaps=2 * gaps > self.rounds)

    def _host_times(self, work: Callable[[], object]) -> list[float]:
        times = []
        for _ in range(self.rounds):
            self.synchronize()
            start = time.perf_counter()
            work()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def _gpu_times(self, work: Callable[[], object], host: list[float], *, cold: bool) -> tuple[list[float], int]:
        """The times of all rounds, and how many of them began before the host had issued all launches."""
        # The third quartile: one slow host round must not lengthen every sleep.
        seconds = min(2.5e-3 * statistics.quantiles(host, n=4)[2] + 2e-5, LONGEST_S)
        times, gaps = [], 0
        for _ in range(self.rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            if cold:
                self._other.sum()
            torch.cuda._sleep(int(seconds * CYCLES_PER_S))  # type: ignore[no-untyped-call]
            begin.record()
            work()
            gaps += begin.query()  # type: ignore[no-untyped-call]
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        return times, gaps

    @staticmethod
    def _timing(gpu: list[float], host: list[float], *, has_gaps: bool) -> Timing:
        cuts = statistics.quantiles(gpu, n=5)
        return Timing(cuts[0], statistics.median(gpu), cuts[3], statistics.median(host), has_gaps)


@dataclass(frozen=True)
class Ceilings:
    """The bandwidth of torch's own operations on one large tensor, in GB/s; reads and writes both count."""

    copy: float
    read: float
    scale: float

    def floor_ms(self, nbytes: int, *, writes: bool) -> float:
        """The least time to clip `nbytes` bytes: a read and, if it `writes`, a scaling in place."""
        return (nbytes / self.read + writes * 2 * nbytes / self.scale) / 1e6


def ceilings(clock: Clock, nbytes: int) -> Ceilings:
    """Measure the ceilings on tensors of `nbytes` bytes."""
    source = torch.ones(nbytes // 4, device=clock.device)
    target = torch.empty_like(source)

    def speed(passes: int, work: Callable[[], object]) -> float:
        return passes * source.nbytes / clock.time(work).gpu_ms / 1e6

    return Ceilings(
        copy=speed(2, lambda: target.copy_(source)),
        read=max(speed(1, source.sum), speed(1, lambda: torch.linalg.vector_norm(source, torch.inf))),
        scale=speed(2, lambda: target.mul_(1.0)),
    )
