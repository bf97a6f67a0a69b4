"""What `torch.compile` makes of a call of fastclip: a graph break, rather than an attempt to trace it.

Plans rest on the gradients' addresses, which a traced graph does not have, and a trace would be taken anew whenever
they move. What clipping does takes two launches either way, so there would be nothing to gain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

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
