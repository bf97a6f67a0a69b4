"""Compare fastclip with torch, Apex, Transformer Engine and a clip by hand on a GPU: correctness first.

    python -m benchmarks.gpu [--only NAME] [--small] [--out out]

A wrong result has no speed. `python -m fastclip check` must pass, and each contender's norm and clipped gradients must
be right for each workload that it is timed on. The benchmark times four operations: the norm alone (`norm`), clipping
by norm with a bound that changes nothing (`idle`) and with one that clips (`clipping`), and clipping by value with no
value outside (`value`). For each it reports:

- GPU time and host time, measured separately (`benchmarks.clock`), with as many gradients as fit in the L2 cache
  (`hot`), and with other data in the cache (`cold`);
- the floor: the time to read the gradients once, and to scale them in place if `clipping`, at the bandwidth that
  torch's own operations reach on one large tensor in the same run; and the floor as a share of GPU time.

Each row goes to a CSV file as soon as it is measured, with the device and all versions. A plot follows. Without a GPU,
small workloads run on the CPU, to test the benchmark itself. Both times are then wall-clock time.
"""

from __future__ import annotations

import argparse
import csv
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from importlib.util import find_spec
from itertools import chain, count
from pathlib import Path
from typing import Any, TextIO

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastclip
from benchmarks import by_hand
from benchmarks.clock import Ceilings, Clock, ceilings
from benchmarks.workloads import Workload, exact_norm, gradients_of, models, parameters_of, published, refill
from fastclip.switching import check

COMPILED_UP_TO = 10  # tensors: torch.compile takes half a minute for some hundred
LOOP_UP_TO = 1000  # tensors: the loop launches three kernels for each
SHRINK = 0.98  # the ratio of successive bounds that clip: after all calls, fp16 and bf16 values are still far from 0

Norm = Callable[[list[Tensor]], Tensor]
Clip = Callable[[list[nn.Parameter], float], Any]


@dataclass(frozen=True)
class Contender:
    """An implementation of the p-norm and of clipping, for one list of gradients.

    Attributes:
        norm: Returns the norm; None if there is no function for it.
        clip: Clips by the norm.
        value: Clips to [-bound, bound]; None if there is no function for it.
    """

    name: str
    norm: Norm | None
    clip: Clip
    value: Clip | None = None


def contenders(workload: Workload, params: list[nn.Parameter]) -> Iterator[Contender]:
    """Yield the implementations that are installed and support the workload, fastclip first."""
    p, tensors, device = workload.p, len(workload.shapes), params[0].device
    yield Contender(
        "fastclip",
        partial(fastclip.get_total_norm, norm_type=p),
        lambda params, bound: fastclip.clip_grad_norm_(params, bound, p),
        fastclip.clip_grad_value_,
    )
    yield _torch("torch foreach", p, foreach=True)
    if tensors <= LOOP_UP_TO:
        yield _torch("torch loop", p, foreach=False)
    if device.type == "cuda":
        yield from _on_gpu_only(p, params)
    if tensors <= COMPILED_UP_TO:  # last, since it takes longest
        yield _torch_compile(p, device)


def _torch(name: str, p: float, *, foreach: bool) -> Contender:
    utils = torch.nn.utils
    return Contender(
        name,
        partial(utils.get_total_norm, norm_type=p, foreach=foreach),
        partial(utils.clip_grad_norm_, norm_type=p, foreach=foreach),
        partial(utils.clip_grad_value_, foreach=foreach),
    )


def _torch_compile(p: float, device: torch.device) -> Contender:
    torch.compiler.reset()  # drops what was compiled for another workload
    # Compiling C++ takes long and tells nothing about a GPU. So the CPU only tests the tracing.
    compiler = "inductor" if device.type == "cuda" else "eager"
    utils = torch.nn.utils
    norm, clip = (torch.compile(f, backend=compiler) for f in (utils.get_total_norm, utils.clip_grad_norm_))
    # With the second bound, which comes before any timing, torch compiles again with the bound as an input.
    return Contender("torch.compile", partial(norm, norm_type=p), partial(clip, norm_type=p))


def _on_gpu_only(p: float, params: list[nn.Parameter]) -> Iterator[Contender]:
    if p == 2 and by_hand.supports(gradients_of(params)):
        hand = by_hand.ByHand(gradients_of(params))
        yield Contender("by hand, CUDA", lambda _: hand.norm(), lambda _, bound: hand.clip(bound))
    if find_spec("apex"):
        from apex.contrib.clip_grad import clip_grad_norm_ as apex_clip

        yield Contender("Apex", None, partial(apex_clip, norm_type=p))
    if find_spec("transformer_engine") and p == 2:
        yield _transformer_engine()


def _transformer_engine() -> Contender:
    """Clip as Megatron-LM does with Transformer Engine: one launch a dtype, and the coefficient on the host."""
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

    return Contender("Transformer Engine", norm, clip)


# ---- Correctness


def errors_of(contender: Contender, workload: Workload, params: list[nn.Parameter]) -> list[str]:
    """Return what is wrong with the contender's results. Afterwards the gradients are clipped."""
    grads, p, found = gradients_of(params), workload.p, []
    exact = exact_norm(grads, p)
    # Other libraries sum in fp32. If they return a norm of 16 bits, they compute the coefficient from it.
    tolerance = max(1e-4, 4 * max(torch.finfo(dtype).eps for _, dtype in workload.shapes))

    def compare(what: str, value: float, right: float) -> None:
        if not abs(value / right - 1) <= tolerance:
            found.append(f"{what} is {value:.7g}, not {right:.7g}")

    if contender.norm:
        compare("the norm", float(contender.norm(grads)), exact)
    compare("the norm with nothing to clip", float(contender.clip(params, exact * 2)), exact)
    if exact_norm(grads, p) != exact:
        found.append("with nothing to clip the gradients changed")
    contender.clip(params, exact / 2)
    compare("the norm of what was clipped", exact_norm(grads, p), exact / 2)
    if contender.value:
        largest = exact_norm(grads, float("inf"))
        contender.value(params, largest / 2)
        compare("the largest value that was clipped", exact_norm(grads, float("inf")), largest / 2)
    return found


# ---- Timing


@dataclass(frozen=True)
class Row:
    """A line of the CSV file. Times are in milliseconds; see `benchmarks.clock.Timing`."""

    workload: str
    tensors: int
    gradient_bytes: int
    operation: str
    cache: str
    contender: str
    gpu_p20_ms: float
    gpu_ms: float
    gpu_p80_ms: float
    host_ms: float
    has_gaps: bool
    floor_ms: float
    percent_of_floor: float


OPERATIONS = ("norm", "idle", "clipping", "value")


def works(
    contender: Contender, workload: Workload, params: list[nn.Parameter]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the operations of a contender by name, as functions without arguments."""
    grads, p = gradients_of(params), workload.p
    exact = exact_norm(grads, p)
    largest = exact_norm(grads, float("inf"))
    norm, value = contender.norm, contender.value
    if norm:
        yield "norm", lambda: norm(grads)
    yield "idle", lambda: contender.clip(params, 2 * exact)
    if value:
        yield "value", lambda: value(params, 2 * largest)
    # Each bound is below the norm after the previous clip, so that every call clips.
    bounds = (exact * SHRINK**i for i in count(1))
    yield "clipping", lambda: contender.clip(params, next(bounds))


def time_contender(
    contender: Contender, workload: Workload, params: list[nn.Parameter], clock: Clock, limits: Ceilings
) -> Iterator[Row]:
    """Time each operation with a hot and a cold cache. Large gradients leave the cache cold by themselves."""
    is_always_cold = workload.nbytes >= 4 * clock.cache_bytes
    for operation, work in works(contender, workload, params):
        floor = limits.floor_ms(workload.nbytes, writes=operation == "clipping")
        for cache in ("cold",) if is_always_cold else ("hot", "cold"):
            timing = clock.time(work, cold=cache == "cold" and not is_always_cold)
            yield Row(
                workload.name,
                len(workload.shapes),
                workload.nbytes,
                operation,
                cache,
                contender.name,
                **asdict(timing),
                floor_ms=floor,
                percent_of_floor=100 * floor / timing.gpu_ms,
            )


# ---- The command


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and time all contenders, and write the results.

    Returns:
        1 if fastclip is wrong anywhere, else 0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only workloads with this in their names")
    parser.add_argument("--small", action="store_true", help="small sizes and few rounds, as without a GPU")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for gpu.csv and gpu.png (default: out)")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = options.small or device.type == "cpu"
    if check.main(["--device", str(device)]):
        print("No speed is reported: fastclip is wrong here.")
        return 1
    chosen = [workload for workload in chain(models(), published()) if options.only in workload.name]
    if small:
        chosen = [workload.shrunk() for workload in chosen]
    options.out.mkdir(parents=True, exist_ok=True)
    environment = environment_of(device)
    with (options.out / "gpu.csv").open("w", newline="") as file:
        rows, is_right = _run(chosen, device, environment, file, rounds=5 if small else 15)
    _plot(options.out / "gpu.png", environment, rows)
    print(f"\n{options.out / 'gpu.csv'}, {options.out / 'gpu.png'}")
    return 0 if is_right else 1


def environment_of(device: torch.device) -> str:
    """Return the device and all versions in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    packages = {**fastclip.info().versions, "fastclip": fastclip.__version__, "CUDA": str(torch.version.cuda)}
    return "; ".join([name, *(f"{package} {version}" for package, version in packages.items())])


def _run(
    chosen: Sequence[Workload], device: torch.device, environment: str, file: TextIO, rounds: int
) -> tuple[list[Row], bool]:
    writer = csv.DictWriter(file, ["environment", *(field.name for field in fields(Row))])
    writer.writeheader()
    clock = Clock(device, rounds)
    limits = ceilings(clock, 1 << (30 if device.type == "cuda" else 22))
    print(f"\n{environment}\nGB/s: copy {limits.copy:.0f}, read {limits.read:.0f}, scale {limits.scale:.0f}\n")
    print(f"{'':28} {'':18} {'':8} {'':4} {'GPU ms':>9} {'host ms':>9} {'of the floor':>12}")
    rows: list[Row] = []
    is_right = True
    for workload in chosen:
        if not _fits(workload, device):
            print(f"{workload.name:28} skipped: {workload.nbytes / 1e9:.1f} GB of gradients do not fit")
            continue
        params = parameters_of(workload, device)
        for contender in contenders(workload, params):
            refill(gradients_of(params))
            try:
                wrong = errors_of(contender, workload, params)
                for row in () if wrong else time_contender(contender, workload, params, clock, limits):
                    print(_line(row), flush=True)
                    writer.writerow({"environment": environment, **asdict(row)})
                    file.flush()
                    rows.append(row)
            except Exception as error:  # noqa: BLE001 - one contender's error must not stop the others
                wrong = [f"{type(error).__name__}: {error}"]
            if wrong:
                print(f"{workload.name:28} {contender.name:18} WRONG, and not timed: {'; '.join(wrong)}", flush=True)
                is_right &= contender.name != "fastclip"
        del params
    return rows, is_right


def _fits(workload: Workload, device: torch.device) -> bool:
    """Whether the device has memory for the gradients, after those of the previous workload are freed."""
    if device.type != "cuda":
        return True
    gc.collect()
    torch.cuda.empty_cache()
    return workload.nbytes * 1.2 <= torch.cuda.mem_get_info(device)[0]


def _line(row: Row) -> str:
    return (
        f"{row.workload:28} {row.contender:18} {row.operation:8} {row.cache:4} {row.gpu_ms:9.3f} {row.host_ms:9.3f} "
        f"{row.percent_of_floor:11.0f}%{', with gaps' if row.has_gaps else ''}"
    )


def _plot(path: Path, environment: str, rows: Sequence[Row]) -> None:
    """Draw GPU and host time of each workload with a cold cache, one panel for each operation."""
    names = list(dict.fromkeys(row.contender for row in rows))
    order = list(dict.fromkeys(row.workload for row in rows))
    figure = Figure(figsize=(20, 2 + 0.4 * len(order)), layout="constrained")
    panels = figure.subplots(1, len(OPERATIONS), sharey=True)
    for panel, operation in zip(panels, OPERATIONS, strict=True):
        shown = [row for row in rows if row.operation == operation and row.cache == "cold"]
        for i, name in enumerate(names):
            mine = [row for row in shown if row.contender == name]
            places = [order.index(row.workload) + (i + 0.5) / len(names) * 0.8 - 0.4 for row in mine]
            color = mpl.color_sequences["tab10"][i]
            panel.barh(places, [row.gpu_ms for row in mine], 0.8 / len(names), color=color, label=name)
            panel.plot([row.host_ms for row in mine], places, "|", color="black")
        floors = {order.index(row.workload): row.floor_ms for row in shown}
        for place, floor in floors.items():
            panel.plot([floor, floor], [place - 0.4, place + 0.4], ":", color="black", linewidth=1)
        panel.set(xscale="log", xlabel="ms: bars GPU, marks host, dots the floor", title=operation)
        panel.xaxis.set_minor_formatter("")
    panels[0].set_yticks(range(len(order)), order)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.suptitle(environment, fontsize="small", wrap=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
