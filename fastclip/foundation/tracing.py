"""What torch does with its operations instead of running them, or while it does: modes, traces, compilation."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")

_R = TypeVar("_R")

is_watched: Callable[[], int] = torch._C._len_torch_dispatch_stack
"""How many modes look at torch's operations, or count them. Not a function of ours, for whose call there is no time."""

_trace: Callable[[], object] = torch._C._get_tracing_state

_includes: Callable[[Any], bool] = torch._C._dispatch_tls_is_dispatch_key_included

_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch

_RECORDING = [getattr(torch._C._TorchDispatchModeKey, name) for name in ("PROXY", "FAKE", "FUNCTIONAL")]


def is_traced() -> bool:
    """Whether torch records its operations (make_fx, jit.trace), or has other tensors in the place of real ones.

    What kernels do by address is not recorded: the graph would return the example's numbers for every input. A mode of
    anyone else, which looks at operations or counts them, is no reason to take other ones.
    """
    if is_watched() and any(torch._C._get_dispatch_mode(key) is not None for key in _RECORDING):
        return True
    return _trace() is not None or _includes(_PRE_DISPATCH)


def kept(most: int) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Have a function keep the tensors that it made last, but neither make nor use them where tensors are others.

    Those of a mode or a function transform (fake ones, say) must not be met outside of it, nor the other way round.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        keeping: Any = lru_cache(maxsize=most)(function)

        @wraps(function)
        def made(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            is_plain = not is_traced() and torch._C._functorch.peek_interpreter_stack() is None
            value: _R = (keeping if is_plain else function)(*args, **kwargs)
            return value

        return made

    return decorate


_Function = TypeVar("_Function", bound=Callable[..., Any])

# The compiler's own part in C, which is there without the compiler: to import that takes a second.
_frames: Any = torch._C._dynamo.eval_frame
_mark: Any = getattr(_frames, "set_code_exec_strategy", None)


def untraced(function: _Function) -> _Function:
    """Have `torch.compile` leave a function, and all that it calls, as they are.

    As `torch.compiler.disable` does, of which the function would become a wrapper that takes 5 µs among cold caches.
    """
    if _mark is None:
        return torch.compiler.disable(function)  # type: ignore[no-any-return,no-untyped-call]
    function._torchdynamo_disable = True  # type: ignore[attr-defined]  # what it calls is not looked into
    skip = _frames._FrameAction.SKIP
    _mark(function.__code__, _frames._FrameExecStrategy(skip, skip))  # nor compiled, once it is called
    return function
