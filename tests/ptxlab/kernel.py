"""A PTX kernel as a shared library for this machine: compiled by gcc, cached, launched on threads."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .parse import Instruction, parse
from .translate import PARAMETER_BYTES, translate

# Per user, and shared by all processes: files are renamed into it when they are complete.
CACHE = Path(tempfile.gettempdir()) / f"ptxlab-{os.getuid()}"

# PTX's integers wrap; a .rn operation is never contracted; registers are read as other types than written.
_C_FLAGS = ("-g1", "-w", "-fwrapv", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared", "-pthread")
# A fused multiply-add in hardware: without it gcc calls a function for each.
_MACHINE_FLAGS = {"x86_64": ("-mfma",)}.get(platform.machine(), ())


class PtxError(RuntimeError):
    """A fault in a kernel: its kind, address, program, warp, and the PTX instruction with its place in the source."""


class _Launch(ctypes.Structure):
    """`Launch` of simt.c."""

    _fields_ = (
        ("parameters", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_int32),
        ("resident", ctypes.c_int32),
        ("jitter", ctypes.c_int32),
        ("range_count", ctypes.c_int32),
        ("starts", ctypes.c_void_p),
        ("ends", ctypes.c_void_p),
        ("seed", ctypes.c_uint64),
    )


class _Fault(ctypes.Structure):
    """`Fault` of simt.c."""

    _fields_ = (
        ("reason", ctypes.c_char * 64),
        ("address", ctypes.c_uint64),
        ("program", ctypes.c_uint32 * 3),
        ("warp", ctypes.c_int32),
        ("instruction", ctypes.c_int32),
    )


def build(source: str, name: str, flags: Sequence[str], *, libraries: Sequence[str] = ()) -> Path:
    """Compile C to a shared library in the cache, unless it is there already; return its path.

    The path is `<hash>/<name>`, so the name can be one that the dynamic loader looks for.
    """
    compiler = shutil.which("gcc")
    if compiler is None:
        raise RuntimeError(
            "ptxlab compiles kernels with gcc, and found none on PATH; install it (Debian, Ubuntu: apt install gcc)"
        )
    key = hashlib.sha256("\0".join((compiler, *flags, *libraries, source)).encode()).hexdigest()[:20]
    folder = CACHE / key
    library = folder / name
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        code, built = Path(scratch) / "kernel.c", Path(scratch) / name
        code.write_text(source)
        # Without the sanitizer that this process may run under (see `races`): with it, gcc takes several times as long.
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        command = [compiler, *flags, "-o", str(built), str(code), *libraries]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"gcc failed for {name}:\n{done.stderr[:4000]}")
        code.replace(folder / "source.c")  # for a debugger, or to read a translation
        built.replace(library)
    return library


class Kernel:
    """A kernel that runs on threads, a thread for each warp."""

    def __init__(self, ptx: str, shared_bytes: int = 0, *, sanitize: str = "", optimize: str = "-O1") -> None:
        """Translate and compile the only kernel in `ptx`.

        Args:
            ptx: A PTX module.
            shared_bytes: The size of the shared memory of a launch.
            sanitize: "thread" for gcc's ThreadSanitizer, which must be in the process (see `races`).
            optimize: The optimisation option for gcc.
        """
        self.parsed = parse(ptx)
        flags = (optimize, *_C_FLAGS, *_MACHINE_FLAGS, *([f"-fsanitize={sanitize}"] if sanitize else []))
        source = translate(self.parsed, shared_bytes)
        library = ctypes.CDLL(str(build(source, f"{self.parsed.name[:100]}.so", flags, libraries=["-lm"])))
        self._run_grid = library.run_grid
        self._run_grid.restype = ctypes.c_int
        self._run_grid.argtypes = (ctypes.POINTER(_Launch), ctypes.POINTER(_Fault))

    @property
    def name(self) -> str:
        """The name of the kernel's entry point."""
        return self.parsed.name

    def launch(
        self,
        grid: Sequence[int],
        arguments: Sequence[float],
        ranges: Sequence[tuple[int, int]] | None = None,
        *,
        resident: int = 8,
        seed: int = 0,
        jitter: int = 0,
    ) -> None:
        """Run the kernel to its end; raise `PtxError` on the first fault.

        Args:
            grid: Programs in up to three dimensions.
            arguments: One integer, address or float for each parameter; those missing at the end are 0.
            ranges: The memory that the kernel may access, as addresses and sizes in bytes; None: not checked.
            resident: Programs that run at once.
            seed: The seed of the jitter.
            jitter: Percentage of the synchronisation points at which a warp yields or sleeps.
        """
        parameters = self._parameters(arguments)
        merged = merge(ranges or ())
        starts = (ctypes.c_uint64 * (len(merged) + 1))(*(start for start, _ in merged))
        ends = (ctypes.c_uint64 * (len(merged) + 1))(*(end for _, end in merged))
        launch = _Launch(
            ctypes.addressof(parameters),
            (ctypes.c_uint32 * 3)(*grid, *(1,) * (3 - len(grid))),
            self.parsed.threads,
            resident,
            jitter,
            -1 if ranges is None else len(merged),
            ctypes.addressof(starts),
            ctypes.addressof(ends),
            seed,
        )
        fault = _Fault()
        status = self._run_grid(ctypes.byref(launch), ctypes.byref(fault))
        if status == 1:
            raise PtxError(self._describe(fault))
        if status:
            raise MemoryError("the kernel's threads could not be started")

    def _parameters(self, arguments: Sequence[float]) -> ctypes.Array[ctypes.c_char]:
        """The parameters in the format of simt.c, each at the start of its slot."""
        buffer = ctypes.create_string_buffer(PARAMETER_BYTES * (len(self.parsed.parameters) + 1))
        for i, ((_, kind), argument) in enumerate(zip(self.parsed.parameters, arguments, strict=False)):
            place = ctypes.addressof(buffer) + i * PARAMETER_BYTES
            if kind == "f32":
                ctypes.c_float.from_address(place).value = argument
            elif kind == "f64":
                ctypes.c_double.from_address(place).value = argument
            else:
                ctypes.c_uint64.from_address(place).value = int(argument) % 2**64
        return buffer

    def _describe(self, fault: _Fault) -> str:
        item = self.parsed.body[fault.instruction]
        instruction = str(item) if isinstance(item, Instruction) else ""
        return (
            f"{fault.reason.decode()} at {fault.address:#x}, program {tuple(fault.program)}, warp {fault.warp}: "
            f"{instruction}"
        )


def merge(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The sorted starts and ends of the memory in `ranges` (address, bytes); ranges that overlap are merged.

    Adjacent ranges are not merged: an access across the border of two tensors is a fault.
    """
    merged: list[tuple[int, int]] = []
    for start, size in sorted(ranges):
        if merged and start < merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], start + size))
        elif size:
            merged.append((start, start + size))
    return merged
