"""The legs: all the ways to run fastclip, a backend on a device each. Every leg runs the same tests.

A test with the fixture `leg` becomes one test for each leg. Two legs need a separate process:

- ``interpreter``: `triton.jit` decides whether it interprets when a module that uses it is imported, also in
  `triton.language`. (Older versions of Triton also leave `triton.language` patched after a kernel was interpreted.)
- ``ptx``: `ptxlab` replaces the GPU's driver, and a faulty kernel may crash its process.

So a plain ``pytest`` starts a worker for each of them: another pytest, which runs the tests of its leg while the main
process runs the rest. The main process reports the worker's tests as if they were its own. Selection, ``-x``, ``--lf``,
counts and durations work as usual.
"""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import pytest
import torch

_LEG = "FASTCLIP_TEST_LEG"
_ADDRESS = "FASTCLIP_TEST_ADDRESS"
_KEY = "FASTCLIP_TEST_KEY"

_START_LIMIT = 120  # seconds in which a worker must connect
_TEST_LIMIT = 300  # seconds in which a worker must report the next test: to compile a kernel for ptx takes 10

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Leg:
    """One way to run fastclip.

    Attributes:
        name: Its name in the tests' ids.
        backend: The value of `FASTCLIP_BACKEND`.
        device: The device of the gradients.
        environment: Environment variables of its worker; None if it runs in the main process.
    """

    name: str
    backend: str
    device: torch.device = CPU
    environment: tuple[tuple[str, str], ...] | None = None

    @property
    def obstacle(self) -> str:
        """Why it cannot run with the installed versions of packages, or an empty string."""
        if self.name == "interpreter" and _is_at_least("numpy", 2, 4) and not _is_at_least("triton", 3, 7):
            packages = " ".join(f"{name} {version(name)}" for name in ("triton", "numpy"))
            return f"{packages}: this interpreter makes numbers of arrays of one element, which this NumPy refuses"
        return ""

    @property
    def truncates_bfloat16(self) -> bool:
        """Whether fp32 is truncated to bfloat16, not rounded: Triton's interpreter truncates, a GPU rounds."""
        return self.name == "interpreter"

    @property
    def keeps_plans(self) -> bool:
        """Whether plans are cached for later gradients of the same kind; other plans hold their gradients."""
        return self.backend in {"triton", "native"}

    def check(self) -> None:
        """Raise the faults that the leg itself found: under ptxlab, out-of-bounds, misaligned or divergent accesses."""
        if self.name == "ptx":
            import ptxlab

            ptxlab.check()

    @contextlib.contextmanager
    def unbounded(self) -> Iterator[None]:
        """Do not check bounds: ptxlab cannot know that memory belongs to a sparse tensor's values."""
        if self.name != "ptx":
            yield
            return
        import ptxlab

        ptxlab.activate(90, bounds=None)
        try:
            yield
            self.check()
        finally:
            ptxlab.activate(90)

    def prepare(self, config: pytest.Config) -> None:
        """Prepare this process, the leg's worker."""
        if self.name == "interpreter":
            # The interpreter computes with NumPy, which warns of infinities and NaNs; on a GPU these are no fault.
            for message in (r"(divide by zero|overflow|invalid value) encountered", "All-NaN slice encountered"):
                config.addinivalue_line("filterwarnings", f"ignore:{message}:RuntimeWarning")
        if self.name == "ptx":
            import ptxlab

            ptxlab.activate(90)


def _is_at_least(package: str, *least: int) -> bool:
    return tuple(int(part) for part in version(package).split(".")[: len(least)]) >= least


_HAS_TRITON = find_spec("triton") is not None

AVAILABLE = tuple(
    leg
    for leg, is_available in (
        (Leg("native", "native"), find_spec("fastclip.kernels.native") is not None),
        (Leg("numpy", "numpy"), True),
        (Leg("torch", "torch"), True),
        (Leg("gpu", "triton", torch.device("cuda")), torch.cuda.is_available() and _HAS_TRITON),
        (Leg("interpreter", "triton", environment=(("TRITON_INTERPRET", "1"),)), _HAS_TRITON),
        (Leg("ptx", "triton", environment=()), _HAS_TRITON and bool(shutil.which("gcc")) and bool(find_spec("ptxlab"))),
    )
    if is_available
)


def parameters(*names: str) -> list[Any]:
    """The parameters for `leg`: the available legs of these names, or all available legs."""
    return [pytest.param(leg, id=leg.name) for leg in AVAILABLE if not names or leg.name in names]


def names_of(parametrize: pytest.Mark) -> Sequence[str]:
    """The names of the arguments that a `parametrize` mark sets."""
    names = parametrize.args[0]
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else names


def has_no_leg(item: pytest.Item) -> bool:
    """Whether no leg is available for the test: pytest makes one skipped test of an empty list of parameters."""
    return not isinstance(_parameters_of(item).get("leg", AVAILABLE[0]), Leg)


def leg_of(item: pytest.Item) -> Leg | None:
    """The leg that the test runs on; None if it has no fixture `leg`."""
    leg = _parameters_of(item).get("leg")
    return leg if isinstance(leg, Leg) else None


def _parameters_of(item: pytest.Item) -> dict[str, Any]:
    callspec = getattr(item, "callspec", None)
    return dict(callspec.params) if callspec else {}


def _worker_leg_of(item: pytest.Item) -> Leg | None:
    leg = leg_of(item)
    return leg if leg is not None and leg.environment is not None else None


class Relay:
    """The plugin of the main process: starts the workers, and reports their tests."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.workers: dict[str, _Worker] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Put the workers' tests last, sorted by leg: they run while the main process runs its own."""
        order = {leg: position for position, leg in enumerate(AVAILABLE, start=1)}
        items.sort(key=lambda item: order[leg] if (leg := _worker_leg_of(item)) else 0)

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Start a worker for each leg that has tests and needs one; end the workers before coverage is combined."""
        options = self.config.option
        if not options.collectonly and (options.continue_on_collection_errors or not session.testsfailed):
            for leg in AVAILABLE:
                mine = [item for item in session.items if _worker_leg_of(item) is leg]
                if mine:
                    self.workers[leg.name] = _Worker(self.config, leg, mine)
        try:
            return (yield)
        finally:
            for worker in self.workers.values():
                worker.end()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        """Report a worker's test instead of running it."""
        leg = _worker_leg_of(item)
        if leg is None:
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for report in self.workers[leg.name].reports_on(item):
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True


class _Worker:
    """A pytest process that runs the tests of one leg, in the order in which the main process reports them."""

    def __init__(self, config: pytest.Config, leg: Leg, items: Sequence[pytest.Item]) -> None:
        self.config = config
        self.leg = leg
        self.connection: Connection | None = None
        self.death = ""
        self.unreported = len(items)
        self.log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - open as long as the worker runs
        key = secrets.token_bytes(16)
        with Listener(authkey=key) as listener:
            address = (
                listener.address
                if isinstance(listener.address, str)
                else f"{listener.address[0]}:{listener.address[1]}"
            )
            variables = {_LEG: leg.name, _ADDRESS: address, _KEY: key.hex(), **dict(leg.environment or ())}
            files = sorted({str(item.path) for item in items})
            command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={config.rootpath}", *files]
            if config.inipath:
                command[3:3] = ["-c", str(config.inipath)]
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **variables},
                cwd=config.invocation_params.dir,
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
            )
            self._accept(listener)
        if self.connection:
            self.connection.send([item.nodeid for item in items])

    def _accept(self, listener: Listener) -> None:
        from multiprocessing.connection import wait

        accepted = wait([listener._listener._socket], timeout=_START_LIMIT)  # type: ignore[attr-defined]
        if accepted:
            self.connection = listener.accept()

    def reports_on(self, item: pytest.Item) -> list[pytest.TestReport]:
        """Wait for the worker's reports on a test; if the worker died, its remaining tests fail."""
        self.unreported -= 1
        reports: list[pytest.TestReport] = []
        while not (reports and reports[-1].when == "teardown"):
            data = self._receive()
            if data is None:
                lost = f"the worker of the leg {self.leg.name} ended before this test did: {self.death}"
                reports.append(_failure(item, lost))
                return reports
            report = self.config.hook.pytest_report_from_serializable(config=self.config, data=data)
            if report.nodeid != item.nodeid:
                self._die(f"it reported {report.nodeid} where {item.nodeid} was due")
                continue
            reports.append(report)
        return reports

    def _receive(self) -> dict[str, Any] | None:
        if self.death or self.connection is None:
            self.death = self.death or self._epitaph("it did not start")
            return None
        try:
            if self.connection.poll(_TEST_LIMIT):
                data: dict[str, Any] = self.connection.recv()
                return data
            self._die(f"no word from it for {_TEST_LIMIT} s")
        except (EOFError, OSError):
            self.process.wait()
            self._die(f"exit status {self.process.returncode}")
        return None

    def _die(self, reason: str) -> None:
        self.process.kill()
        self.process.wait()
        self.death = self._epitaph(reason)

    def _epitaph(self, reason: str) -> str:
        self.log.seek(0)
        return f"{reason}. The end of its output:\n{self.log.read()[-4000:]}"

    def end(self) -> None:
        """Wait for the process to end, or kill it if some of its tests were not reported."""
        if self.unreported:
            self.process.kill()
        try:
            self.process.wait(_START_LIMIT)  # it may still write its coverage data
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.connection:
            self.connection.close()
        self.log.close()


def _failure(item: pytest.Item, reason: str) -> pytest.TestReport:
    return pytest.TestReport(item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", reason, "call")


def worker_plugin(config: pytest.Config) -> WorkerPlugin | None:
    """The plugin of a worker; None in the main process."""
    name = os.environ.get(_LEG)
    return WorkerPlugin(config, next(leg for leg in AVAILABLE if leg.name == name)) if name else None


class WorkerPlugin:
    """The plugin of a worker: runs the tests that the main process asks for, and sends it every report."""

    def __init__(self, config: pytest.Config, leg: Leg) -> None:
        self.config = config
        address = os.environ[_ADDRESS]
        host, colon, port = address.rpartition(":")
        where = (host, int(port)) if colon and port.isdigit() else address
        self.connection = Client(where, authkey=bytes.fromhex(os.environ[_KEY]))
        self.node_ids: list[str] = self.connection.recv()
        leg.prepare(config)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the tests asked for, in the order asked for."""
        found = {item.nodeid: item for item in items}
        items[:] = [found[node_id] for node_id in self.node_ids]

    def pytest_collection_finish(self) -> None:
        """Hide pytest's own objects from the search: at every launch, ptxlab looks for tensors in all other objects."""
        gc.collect()
        gc.freeze()

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Send a report to the main process."""
        self.connection.send(self.config.hook.pytest_report_to_serializable(config=self.config, report=report))

    def pytest_sessionfinish(self) -> None:
        """Close the connection: no more reports follow."""
        self.connection.close()
