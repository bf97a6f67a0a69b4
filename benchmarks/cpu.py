"""Compare fastclip with torch on the CPU in a hot loop: the same gradients and the same threads, in one run.

    python -m benchmarks.cpu [-k "GPT-2 and idle"] [any other option of pytest]

`benchmarks.steps` measures what a user waits for: the clip in a training step, with cold caches. Here a loop does
nothing but clip. That shows how near each kind of gradients comes to the bandwidth of memory.

pytest-benchmark measures. The contenders take turns, so that other load on the machine affects all of them. The first
table has the medians over all turns, their ratio (torch's time over fastclip's), the target ratio (`bar`), and the time
in which the same threads read the same bytes and do nothing else. The second table has the time of each step of
fastclip's clip. The picture, `out/cpu.png`, shows the ratios. The exit status tells whether everything ran, not how
fast, since machines differ.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import count, pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor

import fastclip
from benchmarks.workloads import Shape, gpt, gradients_of, resnet50
from fastclip.core.collect import collect
from fastclip.core.prepare import prepare

TURNS = 5
ROUNDS = 7  # in a turn
PICTURE = Path("out/cpu.png")
LARGE = 1 << 20  # elements: lists with fewer are not compared with a pure read
READ = 1 << 20  # bytes that one NumPy call reads


def _gpt2(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return _normal(gpt(layers=12, width=768), dtype)


def _resnet50() -> list[Tensor]:
    return _normal(resnet50())


def _demo() -> list[Tensor]:
    """The 52 tensors of the demo's GPT, 1.06 M elements."""
    layer = [(144,), (144,), (432, 144), (432,), (144, 144), (144,)]
    layer += [(144,), (144,), (576, 144), (576,), (144, 576), (144,)]
    return _normal([(256, 144), (64, 144), *layer * 4, (144,), (144,)])


def _normal(shapes: Sequence[Shape], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def _norm_bounds(p: float) -> Callable[[list[Tensor], bool], Iterator[float]]:
    """Bounds that never clip or, if `clips`, clip every time: each is below the norm after the previous clip."""

    def bounds(grads: list[Tensor], clips: bool) -> Iterator[float]:
        norm = fastclip.get_total_norm(grads, p, norm_dtype=torch.float64).item()
        return (norm * 0.95**i if clips else norm * 2 for i in count(1))

    return bounds


_EUCLIDEAN = _norm_bounds(2.0)


def _value_bounds(grads: list[Tensor], clips: bool) -> Iterator[float]:
    """Bounds with no value outside or, if `clips`, with 1 % of them outside: each bound is a little smaller."""
    magnitudes = torch.cat([grad.flatten() for grad in grads]).abs_()
    bound = magnitudes.kthvalue(int(len(magnitudes) * 0.99)).values.item()
    return (bound * (1 - 1e-4 * i) if clips else magnitudes.max().item() * 2 for i in count(1))


@dataclass(frozen=True)
class Workload:
    """A row of the table.

    Attributes:
        gradients: Makes the gradients.
        idle: The target ratio if nothing is clipped; 0 for none.
        clipping: The same if something is clipped.
        function: The name of the function to call.
        more: Its arguments after parameters and bound.
        bounds: Makes a bound for each round.
        moves: Whether the gradients move between rounds.
    """

    gradients: Callable[[], list[Tensor]]
    idle: float
    clipping: float
    function: str = "clip_grad_norm_"
    more: tuple[float, ...] = ()
    bounds: Callable[[list[Tensor], bool], Iterator[float]] = _EUCLIDEAN
    moves: bool = False


WORKLOADS = {
    "GPT-2 124M, fp32": Workload(_gpt2, 2.4, 1.2),
    "GPT-2 124M, fp32, inf norm": Workload(_gpt2, 10, 5, more=(np.inf,), bounds=_norm_bounds(np.inf)),
    "GPT-2 124M, fp32, by value": Workload(_gpt2, 2.5, 1.3, "clip_grad_value_", bounds=_value_bounds),
    "GPT-2 124M, bf16": Workload(lambda: _gpt2(torch.bfloat16), 4, 2),
    "GPT-2 124M, fp16": Workload(lambda: _gpt2(torch.float16), 2.6, 1.6),
    "GPT-2 124M, fp32, 3-norm": Workload(_gpt2, 2, 2, more=(3.0,), bounds=_norm_bounds(3.0)),
    "GPT-2 124M, fp32, 1-norm": Workload(_gpt2, 2, 2, more=(1.0,), bounds=_norm_bounds(1.0)),
    "ResNet-50 25.6M, fp32": Workload(_resnet50, 3, 1.6),
    "the demo's model, 1M": Workload(_demo, 2.3, 1.2),
    "2000 x 64": Workload(lambda: _normal([(64,)] * 2000), 6.8, 5.9),
    "10000 x 4": Workload(lambda: _normal([(4,)] * 10_000), 7.1, 6.5),
    "1 x 64": Workload(lambda: _normal([(64,)]), 3, 3),
    "400 x 4000": Workload(lambda: _normal([(4000,)] * 400), 0, 0),
    "400 x 4000, bf16": Workload(lambda: _normal([(4000,)] * 400, torch.bfloat16), 0, 0),
    "40 x 200000": Workload(lambda: _normal([(200_000,)] * 40), 0, 0),
    "40 x 200000, bf16": Workload(lambda: _normal([(200_000,)] * 40, torch.bfloat16), 0, 0),
    "1 x 64, moved": Workload(lambda: _normal([(64,)]), 0, 0, moves=True),
    "10 of 64 to 640, moved": Workload(lambda: _normal([(64 * i,) for i in range(1, 11)]), 0, 0, moves=True),
}


def _read(parameters: list[Tensor]) -> Callable[..., object]:
    """Return a function that reads the gradients' bytes by as many threads as torch has, and does little else."""
    words = [grad.flatten().view(torch.uint8).numpy() for grad in gradients_of(parameters)]
    words = [array[: array.nbytes // 8 * 8].view(np.uint64) for array in words]
    pieces = [array[i : i + READ // 8] for array in words for i in range(0, len(array), READ // 8)]
    ends = np.cumsum([len(piece) for piece in pieces])
    threads = torch.get_num_threads()
    cuts = [0, *(np.searchsorted(ends, [ends[-1] * (i + 1) // threads for i in range(threads)]) + 1).tolist()]
    shares = [pieces[start:end] for start, end in pairwise(cuts)]
    pool = ThreadPoolExecutor(threads)

    def share(own: list[Any]) -> None:
        for piece in own:
            np.bitwise_or.reduce(piece)

    return lambda *_: list(pool.map(share, shares))


CONTENDERS: dict[str, Callable[[Workload, list[Tensor]], Callable[..., object]]] = {
    "torch": lambda workload, _: getattr(torch.nn.utils, workload.function),
    "fastclip": lambda workload, _: getattr(fastclip, workload.function),
    "read": lambda _, parameters: _read(parameters),
}


_old_grads: list[Any] = []  # alive until the end, so that no moved gradient gets the address of an earlier one


@cache
def _parameters(workload: str) -> list[Tensor]:
    _parameters.cache_clear()  # one workload at a time: the largest takes half a gigabyte
    torch.manual_seed(0)
    parameters = []
    for gradient in WORKLOADS[workload].gradients():
        parameter = torch.empty_like(gradient)
        parameter.grad = gradient
        parameters.append(parameter)
    return parameters


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("turn", range(TURNS))
@pytest.mark.parametrize("clips", [False, True], ids=["idle", "clipping"])
@pytest.mark.parametrize("workload", WORKLOADS)
def test_call(benchmark: Any, workload: str, clips: bool, turn: int, contender: str) -> None:
    """Measure one turn of a cell of the table. `benchmark` is pytest-benchmark's fixture."""
    benchmark.extra_info["turn"] = turn
    row = WORKLOADS[workload]
    parameters = _parameters(workload)
    if contender == "read" and (clips or sum(p.numel() for p in parameters) < LARGE):
        pytest.skip("a read is compared only with large gradients that are not clipped")
    bounds = row.bounds(gradients_of(parameters), clips)
    call = CONTENDERS[contender](row, parameters)

    def setup() -> tuple[tuple[Any, ...], dict[str, Any]]:
        for parameter in parameters if row.moves else ():
            _old_grads.append(parameter.grad)
            parameter.grad = _old_grads[-1].clone()
        return (parameters, next(bounds), *row.more), {}

    benchmark.pedantic(call, setup=setup, rounds=ROUNDS, warmup_rounds=2)


def main(arguments: list[str]) -> int:
    """Run the benchmarks, print the tables and draw the ratios.

    Returns:
        pytest's exit status.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "benchmark.json"
        options = [
            "-q",
            "-rN",
            "--benchmark-only",
            "--benchmark-disable-gc",
            "--benchmark-quiet",
            "-Wignore::pytest_benchmark.logger.PytestBenchmarkWarning",  # that nothing was measured: the status tells
            f"--benchmark-json={report}",
        ]
        status = pytest.main([__file__, *options, *arguments])
        if report.exists():
            lines = list(_lines(json.loads(report.read_text())["benchmarks"]))
            sys.stdout.write(f"\n{_versions()}\n{_table(lines)}\n{_profile({line.workload for line in lines})}")
            _draw(lines, PICTURE)
            sys.stdout.write(f"{PICTURE}\n")
    return int(status)


@dataclass(frozen=True)
class Line:
    """The measured times of one workload, in ms, and the target ratio."""

    workload: str
    clips: bool
    bar: float
    torch: float
    fastclip: float
    read: float | None

    @property
    def ratio(self) -> float:
        """The ratio of torch's time to fastclip's."""
        return self.torch / self.fastclip

    @property
    def what(self) -> str:
        """Whether it clipped, in a word."""
        return "clipping" if self.clips else "idle"


def _lines(benchmarks: list[dict[str, Any]]) -> Iterator[Line]:
    times: dict[tuple[Any, ...], list[float]] = {}
    for entry in benchmarks:
        cell = tuple(entry["params"][name] for name in ("workload", "clips", "contender"))
        times.setdefault(cell, []).extend(1e3 * seconds for seconds in entry["stats"]["data"])
    medians = {cell: median(of_all_turns) for cell, of_all_turns in times.items()}
    for workload, row in WORKLOADS.items():
        for clips in (False, True):
            theirs, ours, read = (medians.get((workload, clips, contender)) for contender in CONTENDERS)
            if theirs and ours:
                yield Line(workload, clips, row.clipping if clips else row.idle, theirs, ours, read)


def _versions() -> str:
    return (
        f"torch {torch.__version__}, NumPy {np.__version__}, Python {platform.python_version()}, "
        f"{torch.get_num_threads()} threads"
    )


def _table(lines: Sequence[Line]) -> str:
    head = f"{'gradients':27}{'':9}{'torch':>10} {'fastclip':>10} {'ratio':>6} {'bar':>5} {'a read':>10} {'of it':>6}\n"
    rows = []
    for line in lines:
        read = f"{line.read:7.3f} ms {line.read / line.fastclip:6.0%}" if line.read else ""
        bar = f"{line.bar or '':5}" + ("" if line.ratio >= line.bar else " missed")
        times = f"{line.torch:7.3f} ms {line.fastclip:7.3f} ms {line.ratio:6.2f}"
        rows.append(f"{line.workload:27}{line.what:9}{times} {bar} {read}".rstrip() + "\n")
    return head + "".join(rows)


def _profile(workloads: Collection[str]) -> str:
    """A table of the steps of a clip by the 2-norm."""
    text = f"{'us':27}{'collect':>10} {'prepare':>10} {'reduce':>10} {'scale':>10}\n"
    for name, row in WORKLOADS.items():
        if name not in workloads or row.bounds is not _EUCLIDEAN or row.moves:
            continue
        parameters = _parameters(name)
        grads = collect(parameters)
        prepared = prepare(grads, in_place=True)
        steps: list[Callable[[], object]] = [
            lambda: collect(parameters),  # noqa: B023 - called before the next turn
            lambda: prepare(grads, in_place=True),  # noqa: B023
            lambda: prepared.reduce(2.0, 1.0, prepared.dtype),  # noqa: B023
            lambda: prepared.scale_(grads, 0.999),  # noqa: B023
        ]
        rounds = [[_microseconds(step) for step in steps] for _ in range(TURNS * ROUNDS)]
        text += f"{name:27}" + " ".join(f"{median(times):10.1f}" for times in zip(*rounds, strict=True)) + "\n"
    return text


def _microseconds(step: Callable[[], object]) -> float:
    start = perf_counter()
    step()
    return 1e6 * (perf_counter() - start)


def _draw(lines: Sequence[Line], path: Path) -> None:
    """Draw the ratios, with a mark at each target ratio."""
    figure = Figure(figsize=(9, 1.2 + 0.32 * len(lines)), layout="constrained")
    axes = figure.subplots()
    places = range(len(lines), 0, -1)
    colours = ["#c8553d" if line.clips else "#1b3a5c" for line in lines]
    axes.barh(places, [line.ratio for line in lines], color=colours, height=0.6)
    axes.plot([line.bar or np.nan for line in lines], places, "|", color="black", markersize=14, label="target ratio")
    axes.axvline(1, color="gray", linestyle=":", label="torch")
    axes.set_yticks(places, [f"{line.workload}, {line.what}" for line in lines])
    axes.set(title=_versions(), xlabel="torch's time / fastclip's time", xlim=(0, None))
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
