"""Run every test and benchmark that needs a GPU, in one command of some ten minutes.

    make gpu PY=python3                          everything
    make gpu PY=python3 PARTS="check tests"      some parts, in their usual order
    python -m benchmarks.on_gpu --dry [PARTS]    the same on the CPU with tiny sizes, to test the command itself

The parts that test correctness come first, side by side, since they time nothing. Then come the benchmarks and NVIDIA's
tools, each alone. Each part has its own time limit, and writes its results as they come. A part that fails does not
stop the others. Without a GPU, each part reports that and ends at once. The results, at most eight files, are in --out
(default: $OUT or out/gpu): log.txt with all output, summary.txt with its end, gpu.csv, gpu.png, training.csv,
sweep.csv and ncu.csv.

In two calls of 3 and 6 minutes: PARTS="machine check tests memcheck compile", then "machine gpu training ncu sweep
optimizer counts racecheck". The exit status is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from benchmarks import profiled

PYTHON = sys.executable
PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout", "hypothesis", "matplotlib")
TOOLS = ("nvidia-smi", "nvcc", "ncu", "compute-sanitizer", "gcc")
SMI = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
TESTS = ("-q", "-p", "no:cacheprovider", "--maxfail", "40", "--durations", "5")
SANITIZER = ("compute-sanitizer", "--error-exitcode", "9", "--tool")
NCU = (
    *("ncu", "--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none", "--csv"),
    *("--target-processes", "all", "--metrics", ",".join(profiled.METRICS)),
)
DRY = {"OMP_NUM_THREADS": "1"}  # on a busy machine, threads that wait for each other take minutes


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    return (PYTHON, "-m", name, *arguments)


EVERY_KERNEL = _module("benchmarks.profiled", "every-kernel")


@dataclass(frozen=True)
class Part:
    """One test or benchmark.

    Attributes:
        seconds: Its time limit.
        command: The command to run.
        dry: The same with tiny sizes, on the CPU.
        shown: The number of lines of its output, from the end, that are printed.
        needs: A tool that may be missing.
        alone: Whether it runs alone, since it is timed.
        environment: Additional environment variables.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    dry: tuple[str, ...]
    shown: int = 3
    needs: str = ""
    alone: bool = True
    environment: dict[str, str] = field(default_factory=dict)


def parts(out: Path) -> Iterator[Part]:
    """Yield all parts, in the order in which they run."""
    yield from _side_by_side()
    yield from _one_by_one(out)


def _side_by_side() -> Iterator[Part]:
    """The parts that are not timed, and run at the same time."""
    check = _module("fastclip", "check")
    yield Part("check", 120, (*check, "--device", "cuda"), check, 12, alone=False)
    # Parallel workers, and a time limit for each test, if pytest has the plugins.
    workers = ("-n", "8") if find_spec("xdist") else ()
    limits = ("--timeout", "120") if find_spec("pytest_timeout") else ()
    tests = _module("pytest", *TESTS, "--leg", "gpu", *workers, *limits, "tests")
    dry_tests = _module("pytest", *TESTS, "--leg", "numpy", "tests/core/test_device.py")
    yield Part("tests", 170, tests, dry_tests, 8, alone=False)
    yield Part(
        "memcheck",
        150,
        (*SANITIZER, "memcheck", *EVERY_KERNEL),
        EVERY_KERNEL,
        needs="compute-sanitizer",
        alone=False,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    compile_ = _module("benchmarks.sweep", "--compile")
    yield Part("compile", 150, compile_, compile_, alone=False)


def _one_by_one(out: Path) -> Iterator[Part]:
    """The parts that run alone: those that are timed, and racecheck."""
    to_out = ("--out", str(out))
    for name, seconds, shown in (("gpu", 150, 6), ("training", 90, 2)):
        command = _module(f"benchmarks.{name}", *to_out)
        yield Part(name, seconds, command, (*command, "--small"), shown)
    clips = _module("benchmarks.profiled", "clips")
    ncu = (*NCU, "--log-file", str(out / "ncu.csv"))
    yield Part("ncu", 90, (*ncu, *clips), (*clips, "--small"), needs="ncu")
    sweep = _module("benchmarks.sweep", *to_out)
    yield Part("sweep", 90, sweep, (*sweep, "--small"), 10)
    optimizer = _module("benchmarks.optimizer")
    dry_optimizer = (*optimizer, "--rounds", "1", "--only", "150 x 1000")
    yield Part("optimizer", 60, (*optimizer, "--device", "cuda"), dry_optimizer, 32)
    counts = _module("benchmarks.counts", "1")
    yield Part("counts", 60, (*counts, "100", "2000"), counts, 22)
    yield Part("racecheck", 60, (*SANITIZER, "racecheck", *EVERY_KERNEL), EVERY_KERNEL, needs="compute-sanitizer")


# ---- Running the parts


class Session:
    """Runs parts, and logs their output.

    Args:
        out: The folder of the results.
        limit: The time limit for all parts, in seconds.
        dry: Whether to run each part's command for the CPU.
    """

    def __init__(self, out: Path, limit: float, *, dry: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.dry = out, dry
        self.start = time.monotonic()
        self.end = self.start + limit
        self.log = (out / "log.txt").open("w")
        self.verdicts: dict[str, str] = {}

    def say(self, text: str) -> None:
        """Print a text, and write it to the log."""
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def run(self, chosen: Sequence[Part]) -> None:
        """Run the parts that are not timed side by side, then the others one after another."""
        together = [part for part in chosen if not part.alone]
        for finish in [self._start(part) for part in together]:
            finish()
        for part in chosen:
            if part.alone:
                self._start(part)()

    def _start(self, part: Part) -> Callable[[], None]:
        """Start a part. Return a function that waits for its end and reports it."""
        left = self.end - time.monotonic()
        missing = "" if self.dry or not part.needs or shutil.which(part.needs) else f"there is no {part.needs}"
        if not self.dry and not _gpu():
            missing = "torch sees no GPU"
        if missing or left < 1:
            return lambda: self._report(part, f"SKIPPED: {missing or 'no time left'}", 0.0, "")
        output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - `_finish` closes it
        command = part.dry if self.dry else part.command
        start = time.monotonic()
        process = subprocess.Popen(  # noqa: S603 - the commands are above
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **part.environment, **(DRY if self.dry else {})},
            start_new_session=True,
        )
        return lambda: self._finish(part, process, output, start, start + min(part.seconds, left))

    def _finish(self, part: Part, process: subprocess.Popen[bytes], output: IO[str], start: float, end: float) -> None:
        verdict = "ok"
        try:
            status = process.wait(max(0.1, end - time.monotonic()))
            if status:
                verdict = f"FAILED with {status}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)  # with its child processes
            process.wait()
            verdict = "TIMED OUT"
        output.seek(0)
        self._report(part, verdict, time.monotonic() - start, output.read())
        output.close()

    def _report(self, part: Part, verdict: str, seconds: float, said: str) -> None:
        self.verdicts[part.name] = verdict
        lines = said.rstrip().splitlines()
        failed = [line for line in lines if line.startswith(("FAILED ", "ERROR ")) or "WRONG, " in line][:25]
        shown = lines[-part.shown if verdict == "ok" else -30 :]
        self.log.write(f"\n######## {part.name}\n{said}\n")
        self.say(f"== {part.name}: {verdict}, {seconds:.0f} s")
        for line in [*failed, *shown]:
            print(line[:240], flush=True)

    def close(self) -> int:
        """Write the summary, and return the exit status."""
        summary = [f"{name}: {verdict}" for name, verdict in self.verdicts.items()]
        summary.append(f"all in {time.monotonic() - self.start:.0f} s")
        summary += summary_of(self.out)
        self.say("\n".join(["", "==== summary", *summary]))
        (self.out / "summary.txt").write_text("\n".join(summary) + "\n")
        self.log.close()
        return int(any(not verdict.startswith(("ok", "SKIPPED")) for verdict in self.verdicts.values()))


# ---- The summary


def summary_of(out: Path) -> Iterator[str]:
    """Yield the most important figures, from the files of the parts."""
    yield from _clips(_table(out / "gpu.csv"))
    yield from _steps(_table(out / "training.csv"))
    if (out / "ncu.csv").exists():
        yield from profiled.summary(out / "ncu.csv")


def _table(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def _clips(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """Yield a line for each workload: GPU time with a cold cache, host time, and the floor as a share of GPU time."""
    found = {(r["workload"], r["operation"], r["contender"]): r for r in rows if r["cache"] == "cold"}
    if rows:
        yield f"\nus of the GPU / of the host, cold cache; {rows[0]['environment']}"
        others = f"{'torch':>16}{'by hand':>9}"
        yield f"{'':28}{'idle: fastclip':>24}{others}{'clipping: fastclip':>28}{others}"
    for workload in dict.fromkeys(r["workload"] for r in rows):
        cells = []
        for operation, width in (("idle", 24), ("clipping", 28)):
            mine = found.get((workload, operation, "fastclip"))
            share = f" ({float(mine['percent_of_floor']):.0f}%)" if mine else ""
            cells.append(f"{_times(mine) + share:>{width}}")
            cells.append(f"{_times(found.get((workload, operation, 'torch foreach'))):>16}")
            cells.append(f"{_times(found.get((workload, operation, 'by hand, CUDA'))).split(' ')[0]:>9}")
        yield f"{workload[:28]:28}{''.join(cells)}"


def _times(row: dict[str, str] | None) -> str:
    return f"{1e3 * float(row['gpu_ms']):.0f} / {1e3 * float(row['host_ms']):.0f}" if row else "-"


def _steps(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """Yield a line for each training: the times of each way to clip, and of the step with it."""
    if rows:
        yield "\nin a training step, ms: the clip on the GPU / on the host, in a step of"
    cases: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        cases.setdefault((row["precision"], row["gradients"], row["bound"]), []).append(row)
    for case, ways in cases.items():
        cells = (
            f"{r['way']} {float(r['clip_gpu']):.3f} / {float(r['clip_host']):.3f} in {float(r['step']):.2f}"
            for r in ways
        )
        moved = max(float(r["moved"]) for r in ways)
        yield f"{', '.join(case)} (moved in {100 * moved:.0f}% of the steps): {'; '.join(cells)}"


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def machine() -> Iterator[str]:
    """Yield lines about the machine, its tools and its packages."""
    yield f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()} at {PYTHON}"
    commit = subprocess.run(["git", "log", "-1", "--format=%H %s"], capture_output=True, text=True, check=False)  # noqa: S607
    yield f"commit {commit.stdout.strip() or 'unknown'}"
    installed = {each.name.lower().replace("_", "-"): each.version for each in metadata.distributions() if each.name}
    yield from (f"{package} {installed.get(package, 'is absent')}" for package in PACKAGES)
    for tool in TOOLS:
        yield f"{tool}: {shutil.which(tool) or 'absent'}"
    if shutil.which("nvidia-smi"):
        smi = ["nvidia-smi", f"--query-gpu={SMI}", "--format=csv"]
        yield subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip()  # noqa: S603
    import fastclip

    yield str(fastclip.info())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts.

    Returns:
        The exit status: 1 if a part failed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", nargs="*", help="some parts only")
    parser.add_argument("--dry", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--limit", type=float, default=560, help="seconds for everything (default: 560)")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "out/gpu"))
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    every = list(parts(out))
    unknown = set(options.part) - {"machine", *(part.name for part in every)}
    if unknown:
        parser.error(f"there is no part {sorted(unknown)[0]!r}, but machine, {', '.join(part.name for part in every)}")
    session = Session(out, options.limit, dry=options.dry)
    for line in machine():
        session.say(line)
    session.run([part for part in every if part.name in options.part or not options.part])
    return session.close()


if __name__ == "__main__":
    sys.exit(main())
