"""Count the calls that arrive at fastclip, and report them when the process exits."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections import Counter
from multiprocessing import util


class Calls:
    """The calls of each function, by process: a forked process inherits the counts, and must not report them again.

    Args:
        main_process: The id of the process that reports even if no call arrived; None in a child process.
    """

    def __init__(self, main_process: int | None) -> None:
        self._main_process = main_process
        self._lock = threading.Lock()
        self._counts: Counter[tuple[int, str]] = Counter()
        self._reported: set[int] = set()

    def count(self, name: str) -> None:
        """Count a call of the function with this name in the current process."""
        with self._lock:
            self._counts[os.getpid(), name] += 1

    def report_at_exit(self) -> None:
        """Have this process, and those that are forked from it, report when they exit."""
        atexit.register(self._report)
        # A process of multiprocessing does not run atexit's functions, and drops the finalizers that it inherited.
        util.register_after_fork(self, lambda calls: util.Finalize(None, calls._report, exitpriority=0))

    def _report(self) -> None:
        process = os.getpid()
        counts = {name: count for (counted_in, name), count in sorted(self._counts.items()) if counted_in == process}
        if process in self._reported or not (counts or process == self._main_process):
            return
        self._reported.add(process)
        if counts or "torch" in sys.modules:
            each = ", ".join(f"{name} {count}" for name, count in counts.items())
            text = f"calls of torch's clipping functions that went through fastclip: {each or 'none'}"
        else:
            text = "the script did not import torch"
        sys.stderr.write(f"fastclip[{process}]: {text}\n")
