"""Patch torch right after a program's own `import torch`, here and in child processes.

This module does not import torch. So whatever the program does before it imports torch still works (setting
`OMP_NUM_THREADS`, importing a library that has to come first), and a program without torch does not wait for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from multiprocessing import spawn
from types import ModuleType
from typing import Any

from fastclip.switching.calls import Calls


def patch_at_import(calls: Calls | None, norm_dtype: str | None) -> None:
    """Patch torch as soon as it is imported, here and in the processes that multiprocessing starts.

    Args:
        calls: Counts the calls that arrive, and reports them at exit; None does not count.
        norm_dtype: The name in torch of the dtype of returned norms, see `fastclip.patch`.
    """

    def patch() -> None:
        import torch

        from fastclip.switching import patching  # imports torch too

        dtype = None if norm_dtype is None else getattr(torch, norm_dtype)
        if calls is None:
            patching.patch(norm_dtype=dtype)
        else:
            patching.patch_counting(calls.count, norm_dtype=dtype)

    if "torch" in sys.modules:
        patch()
    else:
        sys.meta_path.insert(0, _AtTorchImport(patch))
    _patch_children(calls is not None, norm_dtype)
    if calls is not None:
        calls.report_at_exit()


class _AtTorchImport(MetaPathFinder):
    """Calls a function at the end of the first successful `import torch`."""

    def __init__(self, then: Callable[[], None]) -> None:
        self._then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        # This asks the other finders itself: importlib.util.find_spec would ask this finder again. The finder stays in
        # place until torch is imported, because a library may only look whether torch exists.
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
            self._then()

        # Only this loader object is changed, which loads nothing but torch. It keeps all its other methods.
        vars(loader)["exec_module"] = exec_module


def _patch_children(verbose: bool, norm_dtype: str | None) -> None:
    """Have the processes that multiprocessing starts patch torch too. Forked ones are patched anyway."""
    preparation_data: Callable[[str], dict[str, Any]] = spawn.get_preparation_data

    def with_patch(name: str) -> dict[str, Any]:
        # A new process unpickles this before it loads the script, and ignores keys that it does not know.
        return {**preparation_data(name), "fastclip": _PatchOnUnpickling(verbose, norm_dtype)}

    spawn.__dict__["get_preparation_data"] = with_patch


class _PatchOnUnpickling:
    """Patches torch in the process that unpickles it."""

    def __init__(self, verbose: bool, norm_dtype: str | None) -> None:
        self._arguments = (verbose, norm_dtype)

    def __reduce__(self) -> tuple[Callable[[bool, str | None], None], tuple[bool, str | None]]:
        return _patch_in_child, self._arguments


def _patch_in_child(verbose: bool, norm_dtype: str | None) -> None:
    patch_at_import(Calls(None) if verbose else None, norm_dtype)
