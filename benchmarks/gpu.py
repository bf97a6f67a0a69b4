"""fastclip beside torch, Apex, Transformer Engine and a clip by hand on a GPU: correctness first.

    python -m benchmarks.gpu [--only NAME] [--small] [--out out]

No speed is reported on a red gate: `python -m fastclip check` must agree, and each contender's norm and its clipped
gradients must be right for the workload that it is timed on. Then, for the norm alone, for norm and clipping where
nothing is to be clipped (`idle`) and where all is (`clipping`), and for clipping by value with nothing outside:

- GPU time and host time, apart from each other (`benchmarks.clock`), with the gradients in the L2 cache as far as it
  holds them (`hot`) and with other data there (`cold`);
- the floor: what reading them once, and scaling them in place where all is clipped, takes at the speed that torch's
  own operations reach on one large tensor in the same run; and how much of the GPU time that is.

Rows are written as they come, to a CSV with the device and all versions; a plot follows. Without a GPU it runs small
workloads on the CPU, by whatever backend serves there, so that it is known to run: those times are both the wall
clock's, and tell little.
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
LOOP_UP_TO = 1000  # tensors: it launches three kernels for each
LESS_EACH_TIME = 0.98  # each bound that clips, of the one before: so many calls leave fp16 and bf16 far from 0

Norm = Callable[[list[Tensor]], Tensor]
Clip = Callable[[list[nn.Parameter], float], Any]


@dataclass(frozen=True)
class Contender:
    """A way to take the norm, and to clip, of one list of gradients by the p-norm.

    Attributes:
        norm: None where it offers no norm alone.
        clip: By the norm.
        value: Clips to [-bound, bound]; None where it does not.
    """

    name: str
    norm: Norm | None
    clip: Clip
    value: Clip | None = None


def contenders(workload: Workload, params: list[nn.Parameter]) -> Iterator[Contender]:
    """Those that are installed and can serve the workload, fastclip first."""
    utils, p, tensors = torch.nn.utils, workload.p, len(workload.shapes)
    device = params[0].device
    yield Contender(
        "fastclip",
        partial(fastclip.get_total_norm, norm_type=p),
        lambda params, bound: fastclip.clip_grad_norm_(params, bound, p),
        fastclip.clip_grad_value_,
    )
    for name, foreach, most in (("torch foreach", True, sys.maxsize), ("torch loop", False, LOOP_UP_TO)):
        if tensors <= most:
            yield Contender(
                name,
                partial(utils.get_total_norm, norm_type=p, foreach=foreach),
                partial(utils.clip_grad_norm_, norm_type=p, foreach=foreach),
                partial(utils.clip_grad_value_, foreach=foreach),
            )
    if device.type == "cuda" and p == 2 and by_hand.serves(gradients_of(params)):
        hand = by_hand.ByHand(gradients_of(params))
        yield Contender("by hand, CUDA", lambda _: hand.norm(), lambda _, bound: hand.clip(bound))
    if device.type == "cuda" and find_spec("apex"):
        from apex.contrib.clip_grad import clip_grad_norm_ as apex_clip

        yield Contender("Apex", None, partial(apex_clip, norm_type=p))
    if device.type == "cuda" and find_spec("transformer_engine") and p == 2:
        yield _transformer_engine()
    if tensors <= COMPILED_UP_TO:  # last, since it takes longest
        torch.compiler.reset()  # whatever was compiled for another workload
        # Compiling C++ takes long, and says nothing of a GPU: on the CPU only the tracing is tried.
        compiler = "inductor" if device.type == "cuda" else "eager"
        norm, clip = (torch.compile(f, backend=compiler) for f in (utils.get_total_norm, utils.clip_grad_norm_))
        # The bound becomes an input as soon as it is another one, which it is before anything is timed.
        yield Contender("torch.compile", partial(norm, norm_type=p), partial(clip, norm_type=p))


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

    return Contender("Transformer Engine", norm, clip)


# ---- The gate


def objections(contender: Contender, workload: Workload, params: list[nn.Parameter]) -> list[str]:
    """What is wrong with the contender's results. Leaves the gradients clipped."""
    grads, p, found = gradients_of(params), workload.p, []
    exact = exact_norm(grads, p)
    # Peers sum in fp32, and those that return 16 bits take the coefficient from them.
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
    """A line of the CSV; times in milliseconds, see `benchmarks.clock.Timing`."""

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
    """The operations of a contender, each as something to call."""
    grads, p = gradients_of(params), workload.p
    exact = exact_norm(grads, p)
    largest = exact_norm(grads, float("inf"))
    norm, value = contender.norm, contender.value
    if norm:
        yield "norm", lambda: norm(grads)
    yield "idle", lambda: contender.clip(params, 2 * exact)
    if value:
        yield "value", lambda: value(params, 2 * largest)
    # Each bound is below the norm that the one before it left, so that every call clips.
    bounds = (exact * LESS_EACH_TIME**i for i in count(1))
    yield "clipping", lambda: contender.clip(params, next(bounds))


def time_contender(
    contender: Contender, workload: Workload, params: list[nn.Parameter], clock: Clock, limits: Ceilings
) -> Iterator[Row]:
    """Time each operation, with a hot and, where it makes a difference, a cold cache."""
    drives_itself_out = workload.nbytes >= 4 * clock.cache_bytes
    for operation, work in works(contender, workload, params):
        floor = limits.floor_ms(workload.nbytes, writes=operation == "clipping")
        for cache in ("cold",) if drives_itself_out else ("hot", "cold"):
            timing = clock.time(work, cold=cache == "cold" and not drives_itself_out)
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
    """The device and the versions, in a line."""
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
        if device.type == "cuda":
            gc.collect()  # the gradients of the one before
            torch.cuda.empty_cache()
            if workload.nbytes * 1.2 > torch.cuda.mem_get_info(device)[0]:
                print(f"{workload.name:28} skipped: {workload.nbytes / 1e9:.1f} GB of gradients do not fit")
                continue
        params = parameters_of(workload, device)
        for contender in contenders(workload, params):
            refill(gradients_of(params))
            try:
                wrong = objections(contender, workload, params)
                if not wrong:
                    for row in time_contender(contender, workload, params, clock, limits):
                        print(_line(row), flush=True)
                        writer.writerow({"environment": environment, **asdict(row)})
                        file.flush()
                        rows.append(row)
            except Exception as error:  # noqa: BLE001 - one that cannot do it does not keep the others from being timed
                wrong = [f"{type(error).__name__}: {error}"]
            if wrong:
                print(f"{workload.name:28} {contender.name:18} WRONG, and not timed: {'; '.join(wrong)}", flush=True)
                is_right &= contender.name != "fastclip"
        del params
    return rows, is_right


def _line(row: Row) -> str:
    return (
        f"{row.workload:28} {row.contender:18} {row.operation:8} {row.cache:4} {row.gpu_ms:9.3f} {row.host_ms:9.3f} "
        f"{row.percent_of_floor:11.0f}%{', with gaps' if row.has_gaps else ''}"
    )


def _plot(path: Path, environment: str, rows: Sequence[Row]) -> None:
    """GPU and host time of each workload with a cold cache, a panel for each operation."""
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
