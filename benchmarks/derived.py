"""The tables of `docs/performance.md`: derived, not measured, times of clipping on four GPUs.

    python -m benchmarks.derived

The command writes the tables into the document, which explains the assumptions.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.counts import foreach_launches
from benchmarks.workloads import Workload, published

DOCUMENT = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- derived: begin -->\n", "<!-- derived: end -->\n"

TB_PER_S = {"A100": 2.04, "H100": 3.35, "B200": 8.0, "MI300X": 5.3}
"""Memory bandwidth as the makers state it, for the SXM and OAM modules (A100: the one with 80 GB)."""

LAUNCH_US = 2.0  # GPU time that a launch adds if many are queued: one launch drains and the next one fills the GPU
PUBLISHED_FROM = 100  # tensors: with fewer, the fixed cost of a call matters, and nobody has published it
CUDA_12, CUDA_13 = (110, 320), (770, 2240)  # the most tensors and blocks of a launch of multi_tensor_apply


@dataclass(frozen=True)
class Peer:
    """A way to clip.

    Attributes:
        passes: The passes over the bytes of the gradients, reads and writes.
        host_us: Host time of a call, and of each tensor. None if nobody has published it.
    """

    name: str
    passes: int
    host_us: tuple[float, float] | None

    def launches(self, workload: Workload) -> int:
        """The number of launches of one call."""
        shapes = workload.shapes
        dtypes = len({dtype for _, dtype in shapes})
        if self.name.startswith("fastclip"):
            return 2
        if self.name == "torch loop":
            return 2 * len(shapes) + -(-len(shapes) // 128) + 7
        if self.name == "torch foreach, CUDA 12":
            return foreach_launches(shapes, *CUDA_12)
        if self.name == "torch foreach, CUDA 13":
            return foreach_launches(shapes, *CUDA_13)
        if self.name == "Automodel #3685":  # one launch for the norm of each dtype, then torch's scaling
            return dtypes + foreach_launches(shapes, *CUDA_13) // 2
        # Apex and Transformer Engine: their own multi_tensor_apply for each dtype, and no stack.
        each = [[shape for shape in shapes if shape[1] == dtype] for dtype in {dtype for _, dtype in shapes}]
        return sum(foreach_launches(group, *CUDA_12) - -(-len(group) // 128) - 7 for group in each) + 4

    def gpu_ms(self, workload: Workload, gpu: str) -> float:
        """Bytes over bandwidth, plus the cost of the launches."""
        return self.passes * workload.nbytes / TB_PER_S[gpu] / 1e9 + self.launches(workload) * LAUNCH_US / 1e3

    def host_ms(self, workload: Workload) -> float | None:
        """Host time until all launches are issued; None if nothing is published for so few tensors."""
        few = self.host_us and not self.host_us[0] and len(workload.shapes) < PUBLISHED_FROM
        return (self.host_us[0] + self.host_us[1] * len(workload.shapes)) / 1e3 if self.host_us and not few else None


PEERS = (
    Peer("fastclip, nothing to clip", 1, (20, 0.25)),
    Peer("fastclip, clipping", 3, (20, 0.25)),
    Peer("Transformer Engine, Apex", 3, (0, 1.0)),
    Peer("Automodel #3685", 3, None),
    Peer("torch foreach, CUDA 13", 3, (0, 2.2)),
    Peer("torch foreach, CUDA 12", 3, (0, 2.2)),
    Peer("torch loop", 3, (0, 9.7)),
)


def markdown() -> str:
    """Return all tables: the GPU time for each GPU, then launches and host time, which are the same for all."""
    chosen = [workload for workload in published() if not workload.name.startswith(("10 x", "100 x"))]
    lines: list[str] = []
    for gpu, speed in TB_PER_S.items():
        lines += [f"### {gpu}, {speed} TB/s: GPU time in ms (derived)", "", *_table(chosen, gpu), ""]
    lines += ["### Launches, and host time in ms (derived)", "", *_hosts(chosen), ""]
    return "\n".join(lines)


def _table(chosen: list[Workload], gpu: str) -> Iterator[str]:
    yield "| gradients | GB | " + " | ".join(peer.name for peer in PEERS) + " |"
    yield "|---|--:|" + "--:|" * len(PEERS)
    for workload in chosen:
        size = workload.nbytes / 1e9
        times = (f"{peer.gpu_ms(workload, gpu):.3g}" for peer in PEERS)
        yield f"| {workload.name} | {size:.3g} | " + " | ".join(times) + " |"


def _hosts(chosen: list[Workload]) -> Iterator[str]:
    peers = PEERS[1:]
    yield "| gradients | " + " | ".join(peer.name.removesuffix(", clipping") for peer in peers) + " |"
    yield "|---|" + "--:|" * len(peers)
    for workload in chosen:
        cells = []
        for peer in peers:
            host = peer.host_ms(workload)
            cells.append(f"{peer.launches(workload)}, " + ("?" if host is None else f"{host:.2g} ms"))
        yield f"| {workload.name} | " + " | ".join(cells) + " |"


def renewed(document: str) -> str:
    """Return the document with new tables."""
    head, _, rest = document.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{markdown()}\n{END}{tail}"


if __name__ == "__main__":
    DOCUMENT.write_text(renewed(DOCUMENT.read_text()))
    sys.stdout.write(f"{DOCUMENT} is up to date\n")
