"""Python under gcc's ThreadSanitizer, in a separate process, to find races in kernels."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RACE_FOUND = 66  # the exit status of a process in which ThreadSanitizer reported a race


def run_under_sanitizer(arguments: Sequence[str], *, timeout: float = 1800) -> "subprocess.CompletedProcess[str]":
    """Run `python *arguments` under ThreadSanitizer; the status is `RACE_FOUND` if a race was reported.

    Kernels must be compiled for it in that process: `activate(sanitize="thread")` or `Kernel(..., sanitize="thread")`.
    The process can import this package. The timeout is for a process that never ends; a loaded machine does not reach
    it, as each of the tests' processes computes for about ten seconds at most.
    """
    environment = _environment()
    path = [str(Path(__file__).parent.parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(path)
    return subprocess.run(
        [*_prefix(), sys.executable, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "LD_PRELOAD": _library(),
        # Python's and torch's own threads are not instrumented, so that only kernels are reported.
        "TSAN_OPTIONS": f"exitcode={RACE_FOUND}:report_thread_leaks=0",
        "OMP_NUM_THREADS": "1",
    }


@functools.cache
def _library() -> str:
    gcc = shutil.which("gcc")
    if gcc is None:
        raise RuntimeError("the race detector is gcc's; install gcc (Debian, Ubuntu: apt install gcc)")
    found = subprocess.run(
        [gcc, "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():  # gcc prints only the name of a library that it does not have
        raise RuntimeError("gcc has no ThreadSanitizer; install libtsan (Debian, Ubuntu: libtsan2)")
    return found


@functools.cache
def _prefix() -> tuple[str, ...]:
    """The command to put before Python so that ThreadSanitizer starts.

    It needs some address ranges free, and does not start if the kernel randomises addresses too widely. `setarch -R`
    turns that off, if it is permitted.
    """
    attempts: list[str] = []
    setarch = shutil.which("setarch")
    for prefix in ((), (setarch, "-R")) if setarch else ((),):
        started = subprocess.run(
            [*prefix, sys.executable, "-c", "pass"], env=_environment(), capture_output=True, text=True, check=False
        )
        if started.returncode == 0:
            return prefix
        attempts.append(f"{' '.join(prefix)} status {started.returncode}: {started.stderr.strip()[:300]}")
    remedy = "try `sysctl vm.mmap_rnd_bits=28` on the host, or permit `personality` in the container"
    raise RuntimeError("\n".join((f"ThreadSanitizer does not start here; {remedy}", *attempts)))
