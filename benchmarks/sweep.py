"""Time the kernels with other tiles, chunks, warps and numbers of programs: are the derived constants the best here?

    python -m benchmarks.sweep [--small] [--compile] [--out out]

Each configuration is a copy of `kernels/` with other constants. The reduction and a scaling that writes run on lists of
`benchmarks.workloads`, with cold caches. Each row goes to sweep.csv as soon as it is measured. Most of the time is
compilation. `--compile` only compiles, in four processes at once, so that a later run finds everything in Triton's
cache. Without a GPU, with or without `--small`, it only makes the copies of two configurations, and compiles nothing.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from benchmarks.clock import Clock
from benchmarks.workloads import exact_norm, gradients_of, models, parameters_of, published, refill
from fastclip.backends.interface import ELEMENT_TYPES
from fastclip.backends.triton import PROGRAMS_PER_SM, prime_below
from fastclip.foundation.devices import stream_of

KERNELS = Path(str(importlib.import_module("fastclip.kernels").__file__)).parent
FOLDER = Path(tempfile.gettempdir()) / f"fastclip-sweep-{os.getuid()}"  # fixed: Triton's cache key includes it

LISTS = ("GPT 1.3B bf16", "2000 x 1024x1024 fp32", "ResNet-50 fp32", "2000 x 64 fp32", "10000 x 4 fp32")


@dataclass(frozen=True)
class Configuration:
    """The constants of `kernels/table.py` that a copy of the kernels has."""

    tile: int = 512
    chunk: int = 8192
    warps: int = 8

    def modules(self) -> dict[str, ModuleType]:
        """Import a copy of the kernels with these constants."""
        name = f"kernels_{self.tile}_{self.chunk}_{self.warps}"
        package, text = FOLDER / name, self._table()
        if not package.exists() or (package / "table.py").read_text() != text:
            shutil.copytree(KERNELS, package, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
            (package / "table.py").write_text(text)
        if str(FOLDER) not in sys.path:
            sys.path.insert(0, str(FOLDER))
        return {module: importlib.import_module(f"{name}.{module}") for module in ("table", "reduce", "apply")}

    def _table(self) -> str:
        """The source of `kernels/table.py` with these constants."""
        text = (KERNELS / "table.py").read_text()
        for pattern, replacement in (
            (r"TILE_VECTORS = tl\.constexpr\(\d+\)", f"TILE_VECTORS = tl.constexpr({self.tile})"),
            (r"CHUNK_VECTORS = tl\.constexpr\(\d+\)", f"CHUNK_VECTORS = tl.constexpr({self.chunk})"),
            (r'"num_warps": \d+', f'"num_warps": {self.warps}'),
        ):
            text, count = re.subn(pattern, replacement, text)
            if count != 1:
                raise RuntimeError(f"{count} places in table.py look like {pattern}")
        return text


CONFIGURATIONS = (
    Configuration(),
    *(Configuration(chunk=chunk) for chunk in (2048, 4096, 16_384, 32_768)),
    *(Configuration(tile=tile, warps=warps) for tile, warps in ((256, 4), (256, 8), (512, 4), (512, 16), (1024, 8))),
)
PER_SM = (1, 2, 3, 4, 5, 6, 8)


class Launches:
    """The reduction and the scaling of a list of gradients, by any number of programs."""

    def __init__(self, configuration: Configuration, grads: Sequence[Tensor]) -> None:
        modules = configuration.modules()
        table, device = modules["table"], grads[0].device
        layout = table.lay_out(
            np.array([grad.numel() for grad in grads]), np.array([ELEMENT_TYPES[grad.dtype] for grad in grads])
        )
        self.chunks = torch.from_numpy(layout.chunks).to(device)
        self.rows = torch.tensor([[grad.data_ptr(), grad.numel()] for grad in grads], device=device)
        self.partials = torch.empty(len(self.chunks), dtype=torch.float64, device=device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self.state = torch.empty(2, dtype=torch.float64, device=device)
        self.norm = torch.empty((), dtype=torch.float64, device=device)
        tables = (self.chunks.data_ptr(), self.rows.data_ptr())
        scratch = [memory.data_ptr() for memory in (self.partials, self.ticket, self.state, self.norm)]
        idle = float("inf")
        self._reduce = (*tables, *scratch, *layout.ends, 2.0, idle, "two", table.TYPES[3], None, None)
        self._apply = (*tables, self.state[1:].data_ptr(), 0, *layout.ends)
        self._compiled = [
            kernel[1, 1, 1](*arguments, **table.LAUNCH_OPTIONS)
            for kernel, arguments in (
                (modules["reduce"].reduce_kernel, self._reduce),
                (modules["apply"].apply_kernel, self._apply),
            )
        ]
        self.registers: int = self._compiled[0].n_regs

    def by(self, programs: int) -> tuple[Callable[[], object], Callable[[], object]]:
        """Return the two launches, by at most `programs` programs."""
        grid = (min(programs, len(self.chunks)), 1, 1)
        stream = stream_of(self.chunks.device)
        reduce, apply = (compiled[grid] for compiled in self._compiled)
        return partial(reduce, *self._reduce, stream=stream), partial(apply, *self._apply, stream=stream)


@dataclass(frozen=True)
class Row:
    """A line of the CSV file: one configuration on one list, GPU time in µs."""

    tile: int
    chunk: int
    warps: int
    programs_per_sm: int
    registers: int
    workload: str
    reduce_us: float
    scale_us: float


def rows(clock: Clock) -> Iterator[Row]:
    """Time all configurations on all lists.

    Raises:
        RuntimeError: A configuration computes a wrong norm.
    """
    processors = torch.cuda.get_device_properties(clock.device).multi_processor_count
    lists = {workload.name: workload for workload in chain(models(), published())}
    for name in LISTS:
        grads = gradients_of(parameters_of(lists[name], clock.device))
        exact = exact_norm(grads)
        for configuration in CONFIGURATIONS:
            refill(grads)  # scaling has reduced them by one part in ten thousand
            launches = Launches(configuration, grads)
            for per_sm in PER_SM:
                reduce, scale = launches.by(prime_below(processors * per_sm))
                launches.norm.fill_(torch.nan)
                reduce()
                if not abs(launches.norm.item() / exact - 1) < 1e-3:
                    raise RuntimeError(f"{configuration} finds {launches.norm.item()}, not {exact}")
                reduce_us = clock.time(reduce, cold=True).gpu_ms * 1e3
                launches.state.fill_(1 - 2.0**-20)  # scaling writes, and hardly changes the values
                scale_us = clock.time(scale, cold=True).gpu_ms * 1e3
                constants = (configuration.tile, configuration.chunk, configuration.warps)
                yield Row(*constants, per_sm, launches.registers, name, reduce_us, scale_us)
        del grads


def best(found: Sequence[Row]) -> Iterator[str]:
    """Yield the best configuration for each list, and the kernels' own."""
    for name in dict.fromkeys(row.workload for row in found):
        mine = [row for row in found if row.workload == name]
        for what, kernel in (("reduce_us", "reduce_kernel"), ("scale_us", "apply_kernel")):
            now = Configuration()
            usual = (now.tile, now.chunk, now.warps, PROGRAMS_PER_SM[kernel])
            current = next(r for r in mine if (r.tile, r.chunk, r.warps, r.programs_per_sm) == usual)
            fastest = min(mine, key=lambda row: getattr(row, what))
            yield (
                f"{name:24} {what:9} now {getattr(current, what):9.1f}, best {getattr(fastest, what):9.1f} with tile "
                f"{fastest.tile}, chunk {fastest.chunk}, {fastest.warps} warps, {fastest.programs_per_sm} an SM"
            )


def _compile_all() -> bool:
    """Compile in several processes, since Triton's compiler holds the GIL. Return whether all succeeded."""
    code = "from benchmarks import sweep; import sys, torch; c = sweep.CONFIGURATIONS[int(sys.argv[1])]; "
    code += "sweep.Launches(c, [torch.ones(100, device='cuda')])"
    waiting = list(range(len(CONFIGURATIONS)))
    running: list[subprocess.Popen[bytes]] = []
    succeeded = True
    while waiting or running:
        while waiting and len(running) < 4:
            running.append(subprocess.Popen([sys.executable, "-c", code, str(waiting.pop())]))  # noqa: S603
        succeeded &= running.pop(0).wait() == 0
    return succeeded


def main(arguments: Sequence[str] | None = None) -> int:
    """Time all configurations, write the rows and print the best.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", action="store_true", help="without a GPU: make two copies of the kernels")
    parser.add_argument("--compile", action="store_true", help="only compile")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for sweep.csv (default: out)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        for configuration in CONFIGURATIONS[:2]:
            names = [module.__name__ for module in configuration.modules().values()]
            print(f"No GPU: {', '.join(names)} import, and are not launched")
        return 0
    if options.compile:
        return 0 if _compile_all() else 1
    options.out.mkdir(parents=True, exist_ok=True)
    found: list[Row] = []
    with (options.out / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows(Clock(torch.device("cuda"), rounds=7)):
            writer.writerow(asdict(row))
            file.flush()
            found.append(row)
    print(*best(found), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
