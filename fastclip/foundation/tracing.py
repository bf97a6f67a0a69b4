"""Whether torch records or replaces its operations, and how to keep out of `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

is_watched: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many modes see torch's operations (counters, tracers). Torch's function itself: a wrapper would cost a call."""

_tracing_state: Callable[[], object] = torch._C._get_tracing_state
_is_key_included: Callable[[Any], bool] = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch
_RECORDING = [getattr(torch._C._TorchDispatchModeKey, name) for name in ("PROXY", "FAKE", "FUNCTIONAL")]


def is_traced() -> bool:
    """Whether torch records its operations (make_fx, jit.trace), or replaces real tensors by others (fake ones).

    A kernel that works by address is not recorded: the graph would return the example's numbers for every input. A
    mode that only sees operations, such as a counter, changes nothing.
    """
    if is_watched() and any(torch._C._get_dispatch_mode(key) is not None for key in _RECORDING):
        return True
    return _tracing_state() is not None or _is_key_included(_PRE_DISPATCH)


_P = ParamSpec("_P")
_R = TypeVar("_R")


def cached_tensors(capacity: int) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Cache the tensors that a function makes, as `lru_cache`, except while torch replaces tensors by others.

    A tensor made under a mode or a function transform (a fake one, say) is useless outside, and the other way round.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        cached: Any = lru_cache(maxsize=capacity)(function)

        @wraps(function)
        def made(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            is_plain = not is_traced() and torch._C._functorch.peek_interpreter_stack() is None
            value: _R = (cached if is_plain else function)(*args, **kwargs)
            return value

        return made

    return decorate


_Function = TypeVar("_Function", bound=Callable[..., Any])

# The part of the compiler that is in C. It is there before the compiler is imported, which takes a second.
_frames: Any = torch._C._dynamo.eval_frame
_mark: Any = getattr(_frames, "set_code_exec_strategy", None)


def untraced(function: _Function) -> _Function:
    """Have `torch.compile` run a function, and all that it calls, as it is: a graph break instead of a trace.

    Plans depend on the gradients' addresses. A traced graph does not have them, and would be traced again whenever they
    change. Clipping takes two launches either way, so a trace would gain nothing.

    `torch.compiler.disable` does the same, but wraps the function in another one, which takes 5 µs with cold caches.
    """
    if _mark is None:
        return torch.compiler.disable(function)  # type: ignore[no-any-return,no-untyped-call]
    function._torchdynamo_disable = True  # type: ignore[attr-defined]  # do not trace the call
    skip = _frames._FrameAction.SKIP
    _mark(function.__code__, _frames._FrameExecStrategy(skip, skip))  # do not compile the function by itself either
    return function
