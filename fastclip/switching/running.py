"""Run a script or a module as Python does, with torch's clipping functions replaced.

The script must not notice any other difference. So this module does not import torch before the script does.
"""

import builtins
import importlib.util
import io
import os
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType, TracebackType

from fastclip.switching import at_import
from fastclip.switching.calls import Calls

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

    The script gets its own `__main__` module, `sys.argv` and `sys.path[0]`. Its exceptions pass through, including
    `SystemExit`; the traceback that Python prints for them begins in the script. Torch is patched in this process and
    in those that the script starts by `multiprocessing`, with any start method, but not in commands that it starts by
    `subprocess`. Nothing is undone afterwards, because threads and exit handlers of the script may still run.

    Args:
        target: The path of a script or, with `as_module`, the dotted name of a module or of a package with a
            `__main__`.
        arguments: What the script finds in `sys.argv[1:]`.
        as_module: Whether `target` is the name of a module.
        verbose: At the exit of each process, write to stderr how many calls went through fastclip. Processes started
            by `multiprocessing` write only if there were any.
        norm_dtype: The name in torch of the dtype of returned norms, see `fastclip.patch`.

    Returns:
        0 if the script ran to its end, 2 if there was nothing to run; stderr says why.
    """
    at_import.patch_at_import(Calls(os.getpid()) if verbose else None, norm_dtype)
    main = ModuleType("__main__")
    vars(main)["__builtins__"] = builtins
    sys.modules["__main__"] = main
    if "__mp_main__" in sys.modules:  # multiprocessing, once imported, holds the main module under this name too
        sys.modules["__mp_main__"] = main
    prepare = _prepare_module if as_module else _prepare_script
    try:
        code = prepare(main, target, arguments)
        exec(code, vars(main))  # noqa: S102 - this function exists to execute the user's script
    except _NothingToRunError as error:
        sys.stderr.write(f"python -m fastclip run: {error}\n")
        return _NOT_FOUND
    except BaseException:
        _hide_own_frames()
        raise
    return 0


class _NothingToRunError(Exception):
    """There is no such script or module, or it is not Python code."""


def _prepare_script(main: ModuleType, path: str, arguments: Sequence[str]) -> CodeType:
    """Set `sys.argv`, `sys.path[0]` and the main module as Python does for a script, and compile the script."""
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
    # Python started with -P or -I puts no folder into sys.path[0], neither for `-m fastclip` nor for a script.
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    # As for a script that Python starts, there is no spec: this tells multiprocessing to load the script by its path.
    vars(main).update(__file__=full_path, __loader__=SourceFileLoader("__main__", full_path), __cached__=None)
    # The script must not inherit this file's `from __future__` imports.
    return compile(source, full_path, "exec", dont_inherit=True)


def _prepare_module(main: ModuleType, name: str, arguments: Sequence[str]) -> CodeType:
    """Set `sys.argv` and the main module as Python does for `-m`, and return the module's code."""
    sys.argv = ["-m", *arguments]  # as Python sets it while it looks for the module
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
    """Replace `get_code` of a loader that does not have it: the module is not written in Python."""


def _find_module(name: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        # The missing module is a package above this one. Otherwise an import inside such a package failed.
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise
    except ValueError:  # a module without a spec, such as __main__
        return None


def _hide_own_frames() -> None:
    """Have the traceback of the current exception printed from the script's first frame on.

    This changes only what Python prints at the end: the new hook is set when the script has ended, and it calls the
    hook that the script may have set.
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
    """Return whether a frame belongs to Python's start of `-m fastclip` or to fastclip's start of the script."""
    filename = traceback.tb_frame.f_code.co_filename
    main = os.path.join(os.path.dirname(os.path.dirname(__file__)), "__main__.py")
    starters = (__file__, at_import.__file__, main, runpy.__file__, "<frozen runpy>", "<frozen importlib")
    return filename.startswith(starters)
