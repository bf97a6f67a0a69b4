"""Replace torch's clipping functions by fastclip's in a running program, and put them back.

`patch()` replaces the names in `torch.nn.utils` and in `torch.nn.utils.clip_grad`, where torch's code looks them up.
This reaches every caller that looks the name up at each call: `torch.nn.utils.clip_grad_norm_(...)`,
`from torch.nn.utils import clip_grad` and then `clip_grad.clip_grad_norm_(...)`, and the deprecated
`torch.nn.utils.clip_grad_norm`.

It does not reach these:

- A module that ran `from torch.nn.utils import clip_grad_norm_` before `patch()`: it holds torch's function itself.
  `patch()` warns about the modules that it finds. Patch first, or use `python -m fastclip run`, which patches before
  the script can import the function.
- Code with its own clipping: Megatron-LM, DeepSpeed's ZeRO optimizers, and the method `clip_grad_norm_` of FSDP1
  (`FullyShardedDataParallel`).
- Other processes. A forked process inherits the patch; a newly started one has to call `patch()` itself.
"""

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch

from fastclip.core import clipping
from fastclip.foundation import originals
from fastclip.foundation.arguments import check_norm_dtype
from fastclip.foundation.tracing import untraced
from fastclip.foundation.warn import warn_caller

_Function = Callable[..., Any]


class _Replaced(NamedTuple):
    before: object
    ours: object


# Reentrant: a warning may run the program's own code (`warnings.showwarning`), which may call functions of this module.
_lock = threading.RLock()
# Torch stays patched while this has an entry: _EXPLICIT for `patch()`, and one object for each `with patched()` that is
# entered. The value is the `norm_dtype` that torch is patched with.
_holders: dict[object, torch.dtype | None] = {}
_EXPLICIT = "patch()"
_replaced: dict[tuple[ModuleType, str], _Replaced] = {}


def patch(*, norm_dtype: torch.dtype | None = None) -> None:
    """Replace torch's four clipping functions by fastclip's, in `torch.nn.utils` and `torch.nn.utils.clip_grad`.

    A second call does nothing. The patch holds for every thread of the process.

    Args:
        norm_dtype: The dtype of the norms that `clip_grad_norm_` and `get_total_norm` return to callers that do not ask
            for one. The default is torch's dtype, in which a norm of bf16 gradients has two to three digits.

    Raises:
        RuntimeError: Torch is already patched with another `norm_dtype`.
        TypeError: `norm_dtype` is not a floating-point dtype.

    Warns:
        UserWarning: Modules outside torch and fastclip already hold torch's functions, by an earlier
            `from torch.nn.utils import ...`, and will go on to call them. The warning names the modules.
    """
    _hold(_EXPLICIT, norm_dtype)


def unpatch() -> None:
    """Put back the functions that `patch()` replaced, also inside a `with patched():` block.

    Each name gets the same object that `patch()` found there: torch's function or another library's. A name that
    someone else replaced after `patch()` is left alone. When that replacement is gone, another `unpatch()` restores the
    name. Without a patch, this does nothing.

    Warns:
        UserWarning: A name was left alone, because someone else replaced it after `patch()`. The warning says which
            name, and what it holds.
    """
    with _lock:
        _holders.clear()
        left = _restore()
    _warn_of_left(left)


@contextlib.contextmanager
def patched(*, norm_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Patch torch inside a `with` block or, as a decorator, inside a function.

    Blocks may be nested, and may overlap in several threads: torch's functions come back when the last one ends, also
    by an exception. They stay replaced if `patch()` was called before the block or inside it.

    Args:
        norm_dtype: As in `patch`.

    Yields:
        None.

    Raises:
        RuntimeError: As in `patch`.
        TypeError: As in `patch`.

    Warns:
        UserWarning: As `patch()` does at the start, and as `unpatch()` does at the end.
    """
    holder = object()
    _hold(holder, norm_dtype)
    try:
        yield
    finally:
        _release(holder)


def patch_counting(count: Callable[[str], None], *, norm_dtype: torch.dtype | None = None) -> None:
    """Patch as `patch()` does, and call `count` with the function's name at each call that arrives.

    Only `python -m fastclip run --verbose` uses it, because the wrapper that counts makes every call a little slower.

    Args:
        count: Called before the function, in the caller's thread.
        norm_dtype: As in `patch`.
    """
    _hold(_EXPLICIT, norm_dtype, lambda name, function: _counted(name, function, count))


def _fastclip_functions(norm_dtype: torch.dtype | None) -> dict[str, _Function]:
    functions = {name: getattr(clipping, name) for name in originals.__all__}
    if norm_dtype is not None:
        for name in ("clip_grad_norm_", "get_total_norm"):
            functions[name] = _with_norm_dtype(functions[name], norm_dtype)
    return functions


def _with_norm_dtype(function: _Function, norm_dtype: torch.dtype) -> _Function:
    """Return the function with this default for `norm_dtype`. A dtype that the caller passes takes precedence."""
    names = list(inspect.signature(function).parameters)

    @untraced
    @functools.wraps(function)
    def with_norm_dtype(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("dtype") is None and given.get("norm_dtype") is None:
            kwargs["norm_dtype"] = norm_dtype
        return function(*args, **kwargs)

    return with_norm_dtype


def _counted(name: str, function: _Function, count: Callable[[str], None]) -> _Function:
    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        count(name)
        return function(*args, **kwargs)

    return counted


def _places() -> Iterator[tuple[ModuleType, str, str]]:
    """Yield the module and attribute of each place to patch, and the name of the function that belongs there.

    Some versions of torch have a name with an underscore, some without one, and some do not have it at all.
    """
    for module in (torch.nn.utils, torch.nn.utils.clip_grad):
        for name in originals.__all__:
            for attribute in (name, f"_{name}"):
                if attribute in vars(module):
                    yield module, attribute, name


def _hold(
    holder: object,
    norm_dtype: torch.dtype | None,
    wrap: Callable[[str, _Function], _Function] = lambda _, function: function,
) -> None:
    check_norm_dtype(norm_dtype)
    with _lock:
        in_force = next(iter(_holders.values()), norm_dtype)
        if norm_dtype not in (None, in_force):
            raise RuntimeError(
                f"torch is patched already, with norm_dtype={in_force}, which cannot become {norm_dtype}: call "
                "fastclip.unpatch() before"
            )
        if not _holders:
            # Warn before anything is changed: if warnings are errors, a failed patch() must leave torch as it was.
            _warn_of_early_binding()
            _replace({name: wrap(name, function) for name, function in _fastclip_functions(norm_dtype).items()})
        _holders[holder] = in_force


def _release(holder: object) -> None:
    with _lock:
        if holder not in _holders:  # unpatch() was called in the meantime
            return
        del _holders[holder]
        left = [] if _holders else _restore()
    _warn_of_left(left)


def _replace(functions: dict[str, _Function]) -> None:
    for module, attribute, name in _places():
        current = vars(module)[attribute]
        known = _replaced.get((module, attribute))
        # Our function may be here since an earlier patch(): unpatch() had to leave it below another replacement, which
        # is gone now. Then the function to put back is the one that the earlier patch() found.
        before = known.before if known is not None and current is known.ours else current
        _replaced[module, attribute] = _Replaced(before, functions[name])
        setattr(module, attribute, functions[name])


def _restore() -> list[str]:
    """Put back what was replaced. Return a description of each place that someone else has replaced since."""
    left = []
    for (module, attribute), replaced in list(_replaced.items()):
        current = vars(module).get(attribute)
        if current is not replaced.ours and current is not replaced.before:
            left.append(f"{module.__name__}.{attribute} (now {_describe(current)})")
            continue
        setattr(module, attribute, replaced.before)
        del _replaced[module, attribute]
    return left


def _describe(function: object) -> str:
    name = getattr(function, "__qualname__", None)
    return repr(function) if name is None else f"{getattr(function, '__module__', None)}.{name}"


def _warn_of_left(left: list[str]) -> None:
    if left:
        message = (
            f"fastclip.unpatch() did not put back {', '.join(left)}: something else was put there after "
            "fastclip.patch(), and was left in place. Undo that, then call fastclip.unpatch() again."
        )
        warn_caller(message)


def _warn_of_early_binding() -> None:
    found = [f"{name} ({', '.join(attributes)})" for name, attributes in _early_bindings()]
    if found:
        message = (
            f"fastclip.patch() came too late for {', '.join(found)}: by `from torch.nn.utils import ...` it holds "
            "torch's own function already, and will go on to call it. Call fastclip.patch() before that import, or "
            "start the script by `python -m fastclip run`."
        )
        warn_caller(message)


def _early_bindings() -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each module that holds a function about to be replaced, and its attributes that hold one."""
    about_to_go = {id(vars(module)[attribute]) for module, attribute, _ in _places()}
    modules = list(sys.modules.items())
    # Report each module under its first name: multiprocessing gives the main module a second one.
    first_names = {id(module): name for name, module in reversed(modules)}
    for name, module in modules:
        if not isinstance(module, ModuleType) or name.partition(".")[0] in {"torch", "fastclip"}:
            continue
        if first_names[id(module)] != name:
            continue
        # Compare by identity, so that no `__eq__` of the program runs.
        attributes = dict(vars(module))
        if not about_to_go.isdisjoint(map(id, attributes.values())):  # faster than the comprehension below
            yield name, [attribute for attribute, value in attributes.items() if id(value) in about_to_go]
