"""Time on a GPU and on the host, apart from each other, and what the memory of a GPU can do at most."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

CYCLES_PER_S = 2e9  # of a GPU's clock, about
LONGEST_S = 0.25  # that the GPU is kept waiting for the host


@dataclass(frozen=True)
class Timing:
    """Milliseconds: 20th, 50th and 80th percentile of the GPU's, and the median of the host's.

    Attributes:
        has_gaps: Whether the GPU had to wait for the host all the same: its time then is about the host's.
    """

    gpu_p20_ms: float
    gpu_ms: float
    gpu_p80_ms: float
    host_ms: float
    has_gaps: bool


class Clock:
    """Times a piece of work. On the CPU both times are the wall clock's.

    The GPU's time is taken by events, while the GPU sleeps until the host has issued everything, so that no gaps are in
    it. A host that is slower than that, or that has issued more than the driver's queue holds (about a thousand
    launches), leaves some: the timing says so. The host's is taken until the call returns, with the GPU idle before it.

    Args:
        device: Where the work is done.
        rounds: How often each is taken.
    """

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device = device
        self.rounds = rounds
        is_gpu = device.type == "cuda"
        self.cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size if is_gpu else 1 << 20
        self._other = torch.ones(self.cache_bytes, device=device)  # fp32: four times the L2 cache

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, work: Callable[[], object], *, cold: bool = False) -> Timing:
        """Time a piece of work, `2 * rounds + 1` calls; if `cold`, the GPU's L2 cache has other data before each."""
        host, gpu = [], []
        work()
        for _ in range(self.rounds):
            self.synchronize()
            start = time.perf_counter()
            work()
            host.append((time.perf_counter() - start) * 1e3)
        if self.device.type != "cuda":
            return self._timing(host, host, has_gaps=False)
        # By the third quartile: one hiccup of the host must not multiply every sleep.
        seconds = min(2.5e-3 * statistics.quantiles(host, n=4)[2] + 2e-5, LONGEST_S)
        gaps = 0
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
            gpu.append(begin.elapsed_time(end))
        return self._timing(gpu, host, has_gaps=2 * gaps > self.rounds)

    @staticmethod
    def _timing(gpu: list[float], host: list[float], *, has_gaps: bool) -> Timing:
        cuts = statistics.quantiles(gpu, n=5)
        return Timing(cuts[0], statistics.median(gpu), cuts[3], statistics.median(host), has_gaps)


@dataclass(frozen=True)
class Ceilings:
    """GB/s of torch's own operations on one large tensor, reads and writes both counted."""

    copy: float
    read: float
    scale: float

    def floor_ms(self, nbytes: int, *, writes: bool) -> float:
        """What clipping so many bytes takes at least: a read, and if it `writes` a scaling in place."""
        return (nbytes / self.read + writes * 2 * nbytes / self.scale) / 1e6


def ceilings(clock: Clock, nbytes: int) -> Ceilings:
    """Measure them, by tensors of so many bytes."""
    source = torch.ones(nbytes // 4, device=clock.device)
    target = torch.empty_like(source)

    def speed(passes: int, work: Callable[[], object]) -> float:
        return passes * source.nbytes / clock.time(work).gpu_ms / 1e6

    return Ceilings(
        copy=speed(2, lambda: target.copy_(source)),
        read=max(speed(1, source.sum), speed(1, lambda: torch.linalg.vector_norm(source, torch.inf))),
        scale=speed(2, lambda: target.mul_(1.0)),
    )
