"""All that a GPU is asked, in one command and some ten minutes: is it right, how fast is it, what do the tools see.

    make gpu PY=python3                          everything
    make gpu PY=python3 PARTS="check tests"      some parts, in their usual order
    python -m benchmarks.on_gpu --dry [PARTS]    the same on the CPU with tiny sizes, to see that all of it runs

Correctness comes first, side by side, for nothing is timed there; then times, each part alone; then NVIDIA's tools.
Every part has a time limit of its own and a log; none stops the others, and what a part finds it writes as it comes.
Without a GPU each part says so and ends at once. The results, eight files at most, are in --out (default: $OUT or
out/gpu): log.txt with everything, summary.txt with the end of it, gpu.csv, gpu.png, training.csv, sweep.csv, ncu.csv.

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
NCU = ("ncu", "--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none", "--csv")
DRY = {"OMP_NUM_THREADS": "1"}  # threads that wait for each other take minutes beside other work


@dataclass(frozen=True)
class Part:
    """One thing to ask.

    Attributes:
        seconds: It is ended after so many.
        command: What is run; its last lines are shown.
        dry: The same with tiny sizes, on the CPU.
        shown: How many of its lines.
        needs: A tool that may be missing.
        alone: Whether nothing else may run beside it: it is timed.
        environment: Variables that it is run with.
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
    """All parts, in the order in which they are run."""

    def module(name: str, *arguments: str) -> tuple[str, ...]:
        return (PYTHON, "-m", name, *arguments)

    where = ("--out", str(out))
    csv_of_ncu = out / "ncu.csv"
    # Several at once, and none for ever, where pytest can do that.
    workers = ("-n", "8") if find_spec("xdist") else ()
    limits = ("--timeout", "120") if find_spec("pytest_timeout") else ()
    yield Part(
        "check", 120, module("fastclip", "check", "--device", "cuda"), module("fastclip", "check"), 12, alone=False
    )
    yield Part(
        "tests",
        170,
        module("pytest", *TESTS, "--leg", "gpu", *workers, *limits, "tests"),
        module("pytest", *TESTS, "--leg", "numpy", "tests/core/test_device.py"),
        8,
        alone=False,
    )
    every_kernel = module("benchmarks.profiled", "every-kernel")
    yield Part(
        "memcheck",
        150,
        (*SANITIZER, "memcheck", *every_kernel),
        every_kernel,
        needs="compute-sanitizer",
        alone=False,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )
    compile_ = module("benchmarks.sweep", "--compile")
    yield Part("compile", 150, compile_, compile_, alone=False)
    yield Part("gpu", 150, module("benchmarks.gpu", *where), module("benchmarks.gpu", "--small", *where), 6)
    yield Part(
        "training", 90, module("benchmarks.training", *where), module("benchmarks.training", "--small", *where), 2
    )
    clips = module("benchmarks.profiled", "clips")
    looked_at = (
        *NCU,
        "--target-processes",
        "all",
        "--metrics",
        ",".join(profiled.METRICS),
        "--log-file",
        str(csv_of_ncu),
    )
    yield Part("ncu", 90, (*looked_at, *clips), (*clips, "--small"), needs="ncu")
    yield Part("sweep", 90, module("benchmarks.sweep", *where), module("benchmarks.sweep", "--small", *where), 10)
    yield Part(
        "optimizer",
        60,
        module("benchmarks.optimizer", "--device", "cuda"),
        module("benchmarks.optimizer", "--rounds", "1", "--only", "150 x 1000"),
        32,
    )
    yield Part("counts", 60, module("benchmarks.counts", "1", "100", "2000"), module("benchmarks.counts", "1"), 22)
    yield Part("racecheck", 60, (*SANITIZER, "racecheck", *every_kernel), every_kernel, needs="compute-sanitizer")


# ---- Running them


class Session:
    """Runs parts, and writes what they say.

    Args:
        out: The folder of the results.
        limit: Seconds for everything.
        dry: Whether to run what a part has for the CPU.
    """

    def __init__(self, out: Path, limit: float, *, dry: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.dry = out, dry
        self.start = time.monotonic()
        self.end = self.start + limit
        self.log = (out / "log.txt").open("w")
        self.verdicts: dict[str, str] = {}

    def say(self, text: str) -> None:
        """Print, and write to the log."""
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def run(self, chosen: Sequence[Part]) -> None:
        """Run parts one after another, those that nothing is timed in side by side."""
        together = [part for part in chosen if not part.alone]
        for finish in [self._started(part) for part in together]:
            finish()
        for part in chosen:
            if part.alone:
                self._started(part)()

    def _started(self, part: Part) -> Callable[[], None]:
        """Start a part; what is returned waits for its end and reports it."""
        left = self.end - time.monotonic()
        missing = "" if self.dry or not part.needs or shutil.which(part.needs) else f"there is no {part.needs}"
        if not self.dry and not _gpu():
            missing = "torch sees no GPU"
        if missing or left < 1:
            return lambda: self._report(part, f"SKIPPED: {missing or 'no time left'}", 0.0, "")
        output = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed when it is reported
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
            os.killpg(process.pid, 9)  # what it has started, too
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
        """Write the summary; return the exit status."""
        summary = [f"{name}: {verdict}" for name, verdict in self.verdicts.items()]
        summary.append(f"all in {time.monotonic() - self.start:.0f} s")
        summary += summary_of(self.out)
        self.say("\n".join(["", "==== summary", *summary]))
        (self.out / "summary.txt").write_text("\n".join(summary) + "\n")
        self.log.close()
        return int(any(not verdict.startswith(("ok", "SKIPPED")) for verdict in self.verdicts.values()))


# ---- What they found


def summary_of(out: Path) -> Iterator[str]:
    """The figures that count, from the files that the parts have left."""
    yield from _clips(_table(out / "gpu.csv"))
    yield from _steps(_table(out / "training.csv"))
    if (out / "ncu.csv").exists():
        yield from profiled.summary(out / "ncu.csv")


def _table(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def _clips(rows: Sequence[dict[str, str]]) -> Iterator[str]:
    """A line for each workload: GPU time with a cold cache, host time, and how near fastclip comes to the floor."""
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
    """A line for each training: what each way to clip takes, and the step with it."""
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
    """What this machine is, and what is on it."""
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
