"""fastclip beside torch, Apex and Transformer Engine on a GPU: one command, correctness first.

    python -m benchmarks.gpu [--only NAME] [--small] [--out out]

No speed is reported on a red gate: `python -m fastclip check` must agree, and each contender's norm and its clipped
gradients must be right for the workload that it is timed on. Then, for the norm alone and for norm and clipping, when
nothing is to be clipped and when all is:

- GPU time, by events, with the GPU kept busy until the host has issued everything: no gaps are in it;
- host time, until the call returns, with the GPU idle before it;
- GB/s of what the contender itself has to move, and how much that is of a copy's in the same run.

It leaves a CSV with the device and all versions, a table and a plot. Without a GPU it runs small workloads on the CPU,
by whatever backend serves there, so that it is known to run: those times are both the wall clock's, and tell little.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastclip
from fastclip import check

COMPILED_UP_TO = 256  # tensors: torch.compile takes minutes for thousands
SMALL = 1 << 12  # by this much `--small` divides the tensors' sizes, and 50 is the most of them

Norm = Callable[[list[Tensor]], Tensor]
Clip = Callable[[list[nn.Parameter], float], Any]


@dataclass(frozen=True)
class Workload:
    """Gradients as someone has, or has published times for.

    Attributes:
        shapes: Elements and dtype of each gradient.
        source: Where the workload is from.
    """

    name: str
    shapes: list[tuple[int, torch.dtype]]
    source: str
    p: float = 2.0


def workloads() -> Iterator[Workload]:
    """Those with published numbers."""
    fp32, bf16 = torch.float32, torch.bfloat16
    yield Workload("2000 x 1024x1024 fp32", [(1 << 20, fp32)] * 2000, "pytorch #133586")
    for count in (10, 100, 1000, 10_000):
        for numel in (4, 65_536):
            yield Workload(f"{count} x {numel} fp32", [(numel, fp32)] * count, "pytorch #91846")
    yield Workload("256 x 1M fp32, inf norm", [(1 << 20, fp32)] * 256, "pytorch #120623", float("inf"))
    yield Workload("10.26 B in 500 bf16", [(20_520_000, bf16)] * 500, "Automodel #3815")
    yield Workload("225 M in 500 mixed", [(450_363, dtype) for dtype in (fp32, bf16)] * 250, "Automodel #3685")
    yield Workload("6000261x256 bf16", [(6_000_261 * 256, bf16)], "Automodel #3685")


# ---- Contenders


@dataclass(frozen=True)
class Contender:
    """A way to take the norm, and to clip.

    Attributes:
        always_writes: Whether gradients are written even if nothing is to be clipped.
        limit: The most tensors that it is tried with.
        norm: None where it offers no norm alone.
    """

    name: str
    norm: Callable[[float], Norm] | None
    clip: Callable[[float], Clip]
    always_writes: bool = True
    limit: int = sys.maxsize


def contenders(device: torch.device) -> list[Contender]:
    """Those that are installed, fastclip first."""
    utils = torch.nn.utils
    found = [
        Contender(
            "fastclip",
            lambda p: lambda grads: fastclip.get_total_norm(grads, p),
            lambda p: lambda params, bound: fastclip.clip_grad_norm_(params, bound, p),
            always_writes=False,
        )
    ]
    for name, foreach in (("torch foreach", True), ("torch loop", False)):
        found.append(
            Contender(
                name,
                lambda p, foreach=foreach: lambda grads: utils.get_total_norm(grads, p, foreach=foreach),  # type: ignore[misc]
                lambda p, foreach=foreach: (
                    lambda params, bound: utils.clip_grad_norm_(params, bound, p, foreach=foreach)
                ),  # type: ignore[misc]
            )
        )
    torch.compiler.reset()  # whatever was compiled for another workload
    # Compiling C++ takes long, and says nothing of a GPU: on the CPU only the tracing is tried.
    compiler = "inductor" if device.type == "cuda" else "eager"
    norm = torch.compile(utils.get_total_norm, backend=compiler)
    clip = torch.compile(utils.clip_grad_norm_, backend=compiler)
    found.append(
        Contender(
            "torch.compile",
            lambda p: lambda grads: norm(grads, p),
            # The bound changes from call to call: as a tensor it is an input, and not compiled in.
            lambda p: lambda params, bound: clip(params, torch.tensor(bound, device=device), p),  # type: ignore[arg-type]
            limit=COMPILED_UP_TO,
        )
    )
    if device.type == "cuda" and find_spec("apex"):
        from apex.contrib.clip_grad import clip_grad_norm_ as apex_clip

        found.append(Contender("Apex", None, lambda p: lambda params, bound: apex_clip(params, bound, p)))
    if device.type == "cuda" and find_spec("transformer_engine"):
        found.append(_transformer_engine())
    return found


def _transformer_engine() -> Contender:
    """As Megatron-LM uses it: one launch a dtype, and the coefficient on the host."""
    from transformer_engine.pytorch.optimizers import multi_tensor_applier, multi_tensor_l2norm, multi_tensor_scale

    def by_dtype(grads: Iterable[Tensor]) -> list[list[Tensor]]:
        groups: dict[torch.dtype, list[Tensor]] = {}
        for grad in grads:
            groups.setdefault(grad.dtype, []).append(grad)
        return list(groups.values())

    def norm(grads: list[Tensor]) -> Tensor:
        flag = torch.zeros(1, dtype=torch.int32, device="cuda")
        norms = [multi_tensor_applier(multi_tensor_l2norm, flag, [group], False)[0] for group in by_dtype(grads)]
        total: Tensor = torch.linalg.vector_norm(torch.cat(norms))
        return total

    def clip(params: list[nn.Parameter], bound: float) -> Tensor:
        grads = gradients_of(params)
        total = norm(grads)
        coefficient = min(bound / (total.item() + 1e-6), 1.0)
        flag = torch.zeros(1, dtype=torch.int32, device="cuda")
        if coefficient < 1:
            for group in by_dtype(grads):
                multi_tensor_applier(multi_tensor_scale, flag, [group, group], coefficient)
        return total

    return Contender("Transformer Engine", lambda _: norm, lambda _: clip, always_writes=False)


# ---- The gate


def gradients_of(params: Sequence[nn.Parameter]) -> list[Tensor]:
    """The parameters' gradients."""
    return [param.grad for param in params if param.grad is not None]


def exact_norm(params: Sequence[nn.Parameter], p: float) -> float:
    """The norm in fp64, tensor by tensor."""
    norms = [torch.linalg.vector_norm(grad, p, dtype=torch.float64) for grad in gradients_of(params)]
    return float(torch.linalg.vector_norm(torch.stack(norms), p))


def objections(contender: Contender, workload: Workload, params: list[nn.Parameter]) -> list[str]:
    """What is wrong with the contender's results. Leaves the gradients clipped."""
    p, found = workload.p, []
    exact = exact_norm(params, p)
    # Peers sum in fp32, and those that return 16 bits take the coefficient from them.
    tolerance = max(1e-4, 4 * max(torch.finfo(dtype).eps for _, dtype in workload.shapes))

    def compare(what: str, value: float, right: float) -> None:
        if not abs(value / right - 1) <= tolerance:
            found.append(f"{what} is {value:.7g}, not {right:.7g}")

    if contender.norm:
        compare("the norm", float(contender.norm(p)(gradients_of(params))), exact)
    compare("the norm with nothing to clip", float(contender.clip(p)(params, exact * 2)), exact)
    if exact_norm(params, p) != exact:
        found.append("with nothing to clip the gradients changed")
    contender.clip(p)(params, exact / 2)
    compare("the norm of what was clipped", exact_norm(params, p), exact / 2)
    return found


# ---- Timing


@dataclass(frozen=True)
class Timing:
    """Milliseconds: 20th, 50th and 80th percentile of the GPU's, and the median of the host's."""

    gpu_p20_ms: float
    gpu_ms: float
    gpu_p80_ms: float
    host_ms: float


def measure(work: Callable[[], object], device: torch.device, rounds: int) -> Timing:
    """Time a piece of work on the GPU and on the host, apart from each other."""
    host, gpu = [], []
    work()
    for _ in range(rounds):
        _synchronize(device)
        start = time.perf_counter()
        work()
        host.append((time.perf_counter() - start) * 1e3)
    if device.type == "cuda":
        busy = int(2 * max(host) * 2e6)  # cycles at about 2 GHz: twice what the host needs to issue the work
        for _ in range(rounds):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            torch.cuda._sleep(busy)  # type: ignore[no-untyped-call]
            begin.record()
            work()
            end.record()
            end.synchronize()
            gpu.append(begin.elapsed_time(end))
    cuts = statistics.quantiles(gpu or host, n=5)
    return Timing(cuts[0], statistics.median(gpu or host), cuts[3], statistics.median(host))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device, size: int, rounds: int) -> float:
    """GB/s of a copy, what it reads and what it writes both counted."""
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / measure(lambda: target.copy_(source), device, rounds).gpu_ms / 1e6


@dataclass(frozen=True)
class Row:
    """A line of the CSV."""

    workload: str
    tensors: int
    gradient_bytes: int
    operation: str
    contender: str
    gpu_p20_ms: float
    gpu_ms: float
    gpu_p80_ms: float
    host_ms: float
    gb_per_s: float
    percent_of_copy: float


OPERATIONS = ("norm", "idle", "clipping")


def time_contender(
    contender: Contender, workload: Workload, params: list[nn.Parameter], copy_speed: float, rounds: int
) -> Iterator[Row]:
    """Time the norm alone, clipping where nothing is to be clipped, and clipping where everything is."""
    device = params[0].device
    grads = gradients_of(params)
    size = sum(grad.nbytes for grad in grads)
    for operation in OPERATIONS:
        bound = exact_norm(params, workload.p) * (2 if operation == "idle" else 0.95)
        if operation == "norm":
            if not contender.norm:
                continue
            norm = contender.norm(workload.p)
            timing = measure(lambda norm=norm: norm(grads), device, rounds)  # type: ignore[misc]
        else:
            clip = contender.clip(workload.p)
            # Each bound is below the norm that the one before it left, so that every call clips.
            bounds = iter([bound * (0.95**i if operation == "clipping" else 1) for i in range(2 * rounds + 1)])
            timing = measure(lambda clip=clip, bounds=bounds: clip(params, next(bounds)), device, rounds)  # type: ignore[misc]
        writes = operation == "clipping" or (operation == "idle" and contender.always_writes)
        speed = size * (3 if writes else 1) / timing.gpu_ms / 1e6
        yield Row(
            workload.name,
            len(grads),
            size,
            operation,
            contender.name,
            timing.gpu_p20_ms,
            timing.gpu_ms,
            timing.gpu_p80_ms,
            timing.host_ms,
            speed,
            100 * speed / copy_speed,
        )


# ---- The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, time, and write what was found.

    Returns:
        1 if fastclip is wrong anywhere, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="the workloads whose names contain this")
    parser.add_argument("--small", action="store_true", help="small sizes and few rounds, as without a GPU")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for gpu.csv and gpu.png (default: out)")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = options.small or device.type == "cpu"
    if check.main(["--device", str(device)]):
        print("No speed is reported: fastclip is wrong here.")
        return 1
    chosen = [_shrink(workload) if small else workload for workload in workloads() if options.only in workload.name]
    rows, is_right = _run(chosen, device, rounds=5 if small else 25, copied=1 << (22 if small else 30))
    options.out.mkdir(parents=True, exist_ok=True)
    environment = _environment(device)
    _write_csv(options.out / "gpu.csv", environment, rows)
    _plot(options.out / "gpu.png", environment, rows)
    print(f"\n{options.out / 'gpu.csv'}, {options.out / 'gpu.png'}")
    return 0 if is_right else 1


def _shrink(workload: Workload) -> Workload:
    shapes = [(-(-numel // SMALL), dtype) for numel, dtype in workload.shapes[:50]]
    return Workload(f"{workload.name}, small", shapes, workload.source, workload.p)


def _run(chosen: Sequence[Workload], device: torch.device, rounds: int, copied: int) -> tuple[list[Row], bool]:
    speed = copy_bandwidth(device, copied, rounds)
    print(f"\n{_environment(device)}\ncopy: {speed:.0f} GB/s\n")
    print(f"{'':28} {'':18} {'':8} {'GPU ms':>9} {'host ms':>9} {'GB/s':>7} {'of copy':>7}")
    rows: list[Row] = []
    is_right = True
    for workload in chosen:
        size = sum(numel * dtype.itemsize for numel, dtype in workload.shapes)
        if device.type == "cuda" and size * 1.2 > torch.cuda.mem_get_info(device)[0]:
            print(f"{workload.name:28} skipped: {size / 1e9:.1f} GB of gradients do not fit")
            continue
        for contender in contenders(device):
            if len(workload.shapes) > contender.limit:
                continue
            params = _parameters(workload, device)
            wrong = objections(contender, workload, params)
            if wrong:
                print(f"{workload.name:28} {contender.name:18} WRONG, and not timed: {'; '.join(wrong)}")
                is_right &= contender.name != "fastclip"
                continue
            for row in time_contender(contender, workload, params, speed, rounds):
                print(
                    f"{row.workload:28} {row.contender:18} {row.operation:8} {row.gpu_ms:9.3f} {row.host_ms:9.3f} "
                    f"{row.gb_per_s:7.1f} {row.percent_of_copy:6.0f}%",
                    flush=True,
                )
                rows.append(row)
    return rows, is_right


def _parameters(workload: Workload, device: torch.device) -> list[nn.Parameter]:
    """Parameters without memory of their own, and normal gradients, the same for every contender."""
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for numel, dtype in workload.shapes:
        grad = torch.empty(numel, dtype=dtype, device=device).normal_(generator=generator)
        param = nn.Parameter(torch.empty(1, dtype=dtype, device=device).expand(numel))
        param.grad = grad
        params.append(param)
    return params


def _environment(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    packages = {**fastclip.info().versions, "CUDA": str(torch.version.cuda)}
    return "; ".join([name, *(f"{package} {version}" for package, version in packages.items())])


def _write_csv(path: Path, environment: str, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["environment", *(field.name for field in fields(Row))])
        writer.writeheader()
        writer.writerows({"environment": environment, **asdict(row)} for row in rows)


def _plot(path: Path, environment: str, rows: Sequence[Row]) -> None:
    """GPU and host time of each workload, a panel for each operation."""
    names = list(dict.fromkeys(row.contender for row in rows))
    order = list(dict.fromkeys(row.workload for row in rows))
    figure = Figure(figsize=(15, 2 + 0.4 * len(order)), layout="constrained")
    panels = figure.subplots(1, len(OPERATIONS), sharey=True)
    for panel, operation in zip(panels, OPERATIONS, strict=True):
        for i, name in enumerate(names):
            mine = [row for row in rows if row.operation == operation and row.contender == name]
            places = [order.index(row.workload) + (i + 0.5) / len(names) * 0.8 - 0.4 for row in mine]
            color = mpl.color_sequences["tab10"][i]
            panel.barh(places, [row.gpu_ms for row in mine], 0.8 / len(names), color=color, label=name)
            panel.plot([row.host_ms for row in mine], places, "|", color="black")
        panel.set(xscale="log", xlabel="ms: bars GPU, marks host", title=operation)
        panel.xaxis.set_minor_formatter("")
    panels[0].set_yticks(range(len(order)), order)
    panels[0].invert_yaxis()
    panels[-1].legend(*panels[0].get_legend_handles_labels())
    figure.suptitle(environment, fontsize="small", wrap=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
