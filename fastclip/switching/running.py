"""Run a script, or a module, as Python does, with torch's clipping functions replaced from the start.

The script must not notice more than that, so torch is not imported for it: the patch is applied at the end of the
script's own `import torch`. What the script does before that import (setting `OMP_NUM_THREADS`, importing a library
that has to come first) works as it did, and a script that never imports torch does not wait for it.
"""

import atexit
import builtins
import contextlib
import importlib.util
import io
import os
import runpy
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from multiprocessing import spawn, util
from types import CodeType, ModuleType, TracebackType
from typing import Any

_NOT_FOUND = 2


def run(
    target: str,
    arguments: Sequence[str],
    *,
    as_module: bool = False,
    verbose: bool = False,
    norm_dtype: str | None = None,
) -> int:
    """Run `target` as the main program of this process, as `python target` or `python -m target` would.

    It gets its own `__main__` module, `sys.argv` and `sys.path[0]`. Its exceptions pass through, `SystemExit` too;
    the traceback that Python prints for them begins in the script. Torch is patched in this process, and in those
    that the script starts by `multiprocessing`, whatever the start method. Commands that it starts by `subprocess`
    are not reached. Nothing is undone afterwards, for threads and exit handlers of the script may still be at work.

    Args:
        target: path of a script or, with `as_module`, the dotted name of a module or of a package with a `__main__`.
        arguments: what the script finds in `sys.argv[1:]`.
        as_module: `target` is the name of a module.
        verbose: at the exit of each process, write to stderr how many calls went through fastclip. In processes
            started by `multiprocessing`, only if there were any.
        norm_dtype: the name in torch of the dtype of returned norms, see `fastclip.patch`.

    Returns:
        0 when the script came to its end, 2 when there was nothing to run; stderr says why.
    """
    _follow(_Calls(os.getpid()) if verbose else None, norm_dtype)
    main = ModuleType("__main__")
    vars(main)["__builtins__"] = builtins
    sys.modules["__main__"] = main
    if "__mp_main__" in sys.modules:  # as what multiprocessing, once imported, knows the main module by
        sys.modules["__mp_main__"] = main
    prepare = _prepare_module if as_module else _prepare_script
    try:
        code = prepare(main, target, arguments)
        exec(code, vars(main))  # noqa: S102 - to execute the user's script is what this function is for
    except _NothingToRunError as error:
        sys.stderr.write(f"python -m fastclip run: {error}\n")
        return _NOT_FOUND
    except BaseException:
        _hide_own_frames()
        raise
    return 0


class _NothingToRunError(Exception):
    pass


def _prepare_script(main: ModuleType, path: str, arguments: Sequence[str]) -> CodeType:
    full_path = os.path.abspath(path)
    try:
        with io.open_code(full_path) as file:
            source = file.read()
    except OSError as error:
        message = f"cannot open the script {path!r}: {error.strerror}"
        raise _NothingToRunError(message) from None
    if b"\0" in source:
        message = f"{path!r} is not Python source; of what Python runs, only that and modules (-m) can be run here"
        raise _NothingToRunError(message)
    sys.argv = [path, *arguments]
    # Python started with -P or -I put no folder there, and then puts none for a script either.
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    # No spec, as for a script that Python starts: that is how multiprocessing knows to load it by its path.
    vars(main).update(__file__=full_path, __loader__=SourceFileLoader("__main__", full_path), __cached__=None)
    # Without inheriting this file's own `from __future__` imports, should it get any.
    return compile(source, full_path, "exec", dont_inherit=True)


def _prepare_module(main: ModuleType, name: str, arguments: Sequence[str]) -> CodeType:
    sys.argv = ["-m", *arguments]  # what Python has there as long as it looks for the module
    spec = _find_module(name)
    if spec is not None and spec.submodule_search_locations is not None:
        spec = _find_module(f"{name}.__main__")
    code: CodeType | None = getattr(spec.loader, "get_code", _no_code)(spec.name) if spec is not None else None
    if spec is None or code is None:
        message = f"there is no module {name!r} that can be run"
        raise _NothingToRunError(message)
    sys.argv[0] = spec.origin or name
    vars(main).update(
        __file__=spec.origin, __cached__=spec.cached, __loader__=spec.loader, __package__=spec.parent, __spec__=spec
    )
    return code


def _no_code(name: str) -> None:
    """Stand for the method of a loader that has none: the module is not written in Python."""


def _find_module(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        # A package above the module is missing; anything else is the package's own failing import.
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise
    except ValueError:  # the name of a module that has no spec, such as __main__
        return None


def _hide_own_frames() -> None:
    """Let the traceback of the exception in flight be printed from the script's first frame on.

    Only what Python prints at the end is changed: the hook is set when the script is over already, and calls the one
    that the script may have set.
    """
    hook = sys.excepthook

    def print_without_own_frames(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        shown = traceback
        while shown is not None and _is_own(shown):
            shown = shown.tb_next
        hook(kind, error.with_traceback(shown), shown)

    sys.excepthook = print_without_own_frames


def _is_own(traceback: TracebackType) -> bool:
    """Say whether a frame is Python's start of `-m fastclip` or fastclip's start of the script."""
    filename = traceback.tb_frame.f_code.co_filename
    main = os.path.join(os.path.dirname(os.path.dirname(__file__)), "__main__.py")
    starters = (__file__, main, runpy.__file__, "<frozen runpy>", "<frozen importlib")
    return filename.startswith(starters)


def _follow(calls: "_Calls | None", norm_dtype: str | None) -> None:
    """Patch torch here as soon as it is imported, and do the same in the processes that multiprocessing starts."""
    apply = _patcher(calls, norm_dtype)
    if "torch" in sys.modules:
        apply()
    else:
        sys.meta_path.insert(0, _AtTorchImport(apply))

    preparation_data: Callable[[str], dict[str, Any]] = spawn.get_preparation_data

    def with_patch(name: str) -> dict[str, Any]:
        # The new process unpickles this before it loads the script, and ignores keys that it does not know.
        return {**preparation_data(name), "fastclip": _InNewProcess(calls is not None, norm_dtype)}

    spawn.__dict__["get_preparation_data"] = with_patch
    if calls is not None:
        calls.report_at_exit()


def _patcher(calls: "_Calls | None", norm_dtype: str | None) -> Callable[[], None]:
    def apply() -> None:
        import torch

        from fastclip.switching import patching  # imports torch, too

        dtype = None if norm_dtype is None else getattr(torch, norm_dtype)
        if calls is None:
            patching.patch(norm_dtype=dtype)
        else:
            patching.patch_counting(calls.count, norm_dtype=dtype)

    return apply


class _InNewProcess:
    """Unpickled in a new process, sets it up as this one is."""

    def __init__(self, verbose: bool, norm_dtype: str | None) -> None:
        self.verbose = verbose
        self.norm_dtype = norm_dtype

    def __reduce__(self) -> tuple[Callable[[bool, str | None], None], tuple[bool, str | None]]:
        return _start_child, (self.verbose, self.norm_dtype)


def _start_child(verbose: bool, norm_dtype: str | None) -> None:
    _follow(_Calls(None) if verbose else None, norm_dtype)


class _AtTorchImport(MetaPathFinder):
    """Calls a function at the end of the first successful `import torch`."""

    def __init__(self, then: Callable[[], None]) -> None:
        self.then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        # The other finders are asked here, not by importlib.util.find_spec, which would ask this one again. It stays
        # in place until torch is imported, since a library may only look whether torch is there.
        for finder in sys.meta_path:
            ask = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if ask is None else ask(fullname, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    self._wrap(spec.loader)
                return spec
        return None

    def _wrap(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            del vars(loader)["exec_module"]
            execute(module)
            with contextlib.suppress(ValueError):
                sys.meta_path.remove(self)
            self.then()

        # On this one loader object, which is torch's alone, so that it keeps all its other methods.
        vars(loader)["exec_module"] = exec_module


class _Calls:
    """Counts calls for `--verbose`, by process: a forked one inherits the counts, and must not report them again."""

    def __init__(self, main_process: int | None) -> None:
        self.main_process = main_process
        self.lock = threading.Lock()
        self.counts: Counter[tuple[int, str]] = Counter()
        self.reported: set[int] = set()

    def count(self, name: str) -> None:
        with self.lock:
            self.counts[os.getpid(), name] += 1

    def report_at_exit(self) -> None:
        atexit.register(self.report)
        # A process of multiprocessing leaves without atexit's functions, and drops the finalizers it inherited.
        util.register_after_fork(self, lambda calls: util.Finalize(None, calls.report, exitpriority=0))

    def report(self) -> None:
        process = os.getpid()
        counts = {name: count for (counted_in, name), count in sorted(self.counts.items()) if counted_in == process}
        if process in self.reported or not (counts or process == self.main_process):
            return
        self.reported.add(process)
        if counts or "torch" in sys.modules:
            each = ", ".join(f"{name} {count}" for name, count in counts.items())
            text = f"calls of torch's clipping functions that went through fastclip: {each or 'none'}"
        else:
            text = "the script did not import torch"
        sys.stderr.write(f"fastclip[{process}]: {text}\n")
