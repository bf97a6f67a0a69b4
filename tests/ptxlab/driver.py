"""Triton's NVIDIA driver with a stand-in for libcuda that runs launches on the CPU."""

import contextlib
import ctypes
import gc
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .kernel import Kernel, build

if TYPE_CHECKING:
    import torch

Range = tuple[int, int]  # address, bytes
Launched = tuple[str, tuple[int, int, int]]  # kernel, grid

_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *(ctypes.c_uint,) * 5, ctypes.POINTER(ctypes.c_void_p))
_PARAMETER_TYPES: dict[str, Any] = {
    **dict.fromkeys(("u64", "b64"), ctypes.c_uint64),
    **dict.fromkeys(("u32", "b32"), ctypes.c_uint32),
    **dict.fromkeys(("u16", "b16"), ctypes.c_uint16),
    **dict.fromkeys(("u8", "b8"), ctypes.c_uint8),
    "s64": ctypes.c_int64,
    "s32": ctypes.c_int32,
    "f32": ctypes.c_float,
    "f64": ctypes.c_double,
}


@dataclass
class _Options:
    """The arguments of the last `activate`."""

    bounds: str | Sequence[Range] | None = "live"
    sanitize: str = ""
    resident: int = 8
    jitter: int = 0
    seed: int = 0


@dataclass
class _State:
    """The state of the process."""

    library: ctypes.CDLL | None = None
    callback: Any = None  # the library holds its address, so it must live
    options: _Options = field(default_factory=_Options)
    drivers: dict[int, Any] = field(default_factory=dict)  # by capability
    compiled: dict[int, Any] = field(default_factory=dict)  # function handle to Triton's CompiledKernel
    kernels: dict[tuple[int, str], Kernel] = field(default_factory=dict)  # by function handle and sanitizer
    log: list[Launched] = field(default_factory=list)
    faults: list[BaseException] = field(default_factory=list)
    allowed: list["torch.Tensor"] = field(default_factory=list)


_state = _State()


def activate(
    capability: int = 90,
    *,
    execute: bool = True,
    bounds: str | Sequence[Range] | None = "live",
    sanitize: str = "",
    resident: int = 8,
    jitter: int = 0,
    seed: int = 0,
) -> None:
    """Let Triton compile and launch without a GPU, on CPU tensors. May be called again with other arguments.

    Not for a process that uses a real GPU: it replaces libcuda.

    Args:
        capability: The target of compilation: 75, 80, 90, 100, 120, ...
        execute: False counts launches only (to time the host's side).
        bounds: "live" (kernels may touch the memory of live CPU tensors), a list of (address, bytes), or None
            (unchecked).
        sanitize: "thread" compiles kernels with gcc's ThreadSanitizer; the process must run under it (see `races`).
        resident: Programs that run at once.
        jitter: Percentage of the synchronisation points at which a warp yields or sleeps.
        seed: The seed of the jitter; it changes with each launch.
    """
    if isinstance(bounds, str) and bounds != "live":
        raise ValueError(f'bounds is "live", None or a list of (address, bytes), not {bounds!r}')
    _state.options = _Options(bounds, sanitize, resident, jitter, seed)
    _state.faults.clear()
    _state.allowed.clear()
    if _state.library is None:
        _state.library = _load_library()
        _state.callback = _CALLBACK(_on_launch)
        _remember_compiled_kernels()
    _state.library.standin_configure(capability, _state.callback if execute else _CALLBACK())
    if capability not in _state.drivers:
        _state.drivers[capability] = _create_driver(capability)
    _triton().runtime.driver.set_active(_state.drivers[capability])


def deactivate() -> None:
    """Give Triton back the driver that it finds itself. Compiled kernels stay cached."""
    _triton().runtime.driver._active = None  # `reset_active()` would raise where there is no GPU
    _state.allowed.clear()


def allow(*tensors: "torch.Tensor") -> None:
    """Add memory to `bounds` that kernels may access until the next `activate`; keep the tensors alive."""
    _state.allowed.extend(tensors)


def launches() -> int:
    """The number of launches in this process so far."""
    return 0 if _state.library is None else int(_state.library.standin_launches())


def check() -> None:
    """Raise the first fault since the last check."""
    if _state.faults:
        first = _state.faults[0]
        _state.faults.clear()
        raise first


@contextlib.contextmanager
def recording() -> Iterator[list[Launched]]:
    """Yield a list that has, at the end, the (kernel, grid) of each launch inside; raise the first fault."""
    start = len(_state.log)
    launched: list[Launched] = []
    try:
        yield launched
    except RuntimeError as error:
        # Triton reports a fault as an error of the driver; the fault's own message says more.
        if _state.faults:
            fault = _state.faults[0]
            _state.faults.clear()
            raise fault from error
        raise
    finally:
        launched.extend(_state.log[start:])
    check()


def _triton() -> Any:
    """Import Triton only here: hand-written PTX needs neither Triton nor torch, and starts faster without them."""
    return importlib.import_module("triton")


def _load_library() -> ctypes.CDLL:
    """Build and load the stand-in; afterwards `dlopen("libcuda.so.1")` also returns it."""
    include = Path(_triton().__file__).parent / "backends" / "nvidia" / "include"
    flags = ("-O1", "-w", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1")
    path = build(Path(__file__).with_name("driver.c").read_text(), "libcuda.so.1", flags)
    with contextlib.suppress(FileExistsError):
        path.with_name("libcuda.so").symlink_to(path.name)  # for -lcuda, in Triton's older releases
    os.environ["TRITON_LIBCUDA_PATH"] = str(path.parent)
    library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    library.standin_configure.argtypes = (ctypes.c_int, _CALLBACK)
    library.standin_configure.restype = None
    library.standin_launches.restype = ctypes.c_uint64
    library.standin_set_error.argtypes = (ctypes.c_char_p,)
    library.standin_set_error.restype = None
    return library


def _remember_compiled_kernels() -> None:
    """Add a hook where Triton loads a kernel, as a launch has only the kernel's handle."""
    compiled_kernel = importlib.import_module("triton.compiler.compiler").CompiledKernel
    original = compiled_kernel._init_handles

    def init_handles(compiled: Any) -> None:
        fresh = compiled.module is None
        original(compiled)
        if fresh and isinstance(compiled.asm.get("ptx"), str):
            _state.compiled[int(compiled.function)] = compiled

    compiled_kernel._init_handles = init_handles


def _create_driver(capability: int) -> Any:
    import torch

    driver = importlib.import_module("triton.backends.nvidia.driver").CudaDriver()
    # Triton caches compiled kernels by device. With a device for each capability, none gets the kernel of another.
    driver.get_current_device = lambda: capability
    driver.set_current_device = lambda _device: None
    driver.get_current_stream = lambda _device: 0
    driver.get_device_capability = lambda _device=0: divmod(capability, 10)
    driver.get_active_torch_device = lambda: torch.device("cpu")
    return driver


def _on_launch(
    function: int, grid_x: int, grid_y: int, grid_z: int, _threads: int, _shared_bytes: int, parameters: Any
) -> int:
    """Run a kernel that Triton launches. Return 0, or 1 and store the reason for `check`."""
    try:
        _execute(function, (grid_x, grid_y, grid_z), parameters)
    except BaseException as error:  # noqa: BLE001 - no exception may cross the C boundary
        _state.faults.append(error)
        if _state.library is not None:
            _state.library.standin_set_error(f"{type(error).__name__}: {error}".encode())
        return 1
    return 0


def _execute(function: int, grid: tuple[int, int, int], parameters: Any) -> None:
    options = _state.options
    kernel = _state.kernels.get((function, options.sanitize))
    if kernel is None:
        compiled = _state.compiled[function]
        kernel = Kernel(compiled.asm["ptx"], compiled.metadata.shared, sanitize=options.sanitize)
        _state.kernels[function, options.sanitize] = kernel
    _state.log.append((kernel.name, grid))
    arguments = [
        _PARAMETER_TYPES[kind].from_address(parameters[i]).value for i, (_, kind) in enumerate(kernel.parsed.parameters)
    ]
    kernel.launch(grid, arguments, _ranges(), resident=options.resident, seed=options.seed, jitter=options.jitter)
    options.seed += 1


def _ranges() -> list[Range] | None:
    bounds = _state.options.bounds
    if bounds is None:
        return None
    ranges = _live_tensors() if isinstance(bounds, str) else list(bounds)
    return ranges + [extent for tensor in _state.allowed if (extent := _extent(tensor))]


def _live_tensors() -> list[Range]:
    """The memory of every CPU tensor that Python can reach."""
    import torch
    from torch._subclasses import FakeTensor  # it has no memory, and warns when asked for its address

    kinds = _family(torch.Tensor) - _family(FakeTensor)
    # An instance refers to its type. `gc.get_objects` would find tensors, too, but it refers to every object for a
    # moment: an object that another thread is just making (a tuple from an iterator) must have no second reference
    # then. `type` is used as some proxies run code when asked for `__class__`.
    tensors = [thing for thing in gc.get_referrers(*kinds) if type(thing) in kinds]
    return [extent for tensor in tensors if (extent := _extent(tensor))]


def _family(kind: type) -> set[type]:
    """A class and all its subclasses."""
    return {kind}.union(*map(_family, kind.__subclasses__()))


def _extent(tensor: "torch.Tensor") -> Range | None:
    """The memory from a tensor's first element to its last; None if it has none on the CPU."""
    import torch

    try:
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or not tensor.numel():
            return None
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return tensor.data_ptr(), (last + 1) * tensor.element_size()
    except (RuntimeError, NotImplementedError):  # wrappers without storage (fake tensors, functorch)
        return None
