"""What `torch.compile` makes of a call of fastclip: a graph break, rather than an attempt to trace it.

Plans rest on the gradients' addresses, which a traced graph does not have, and a trace would be taken anew whenever
they move. What clipping does takes two launches either way, so there would be nothing to gain.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


def untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Have `torch.compile` leave a function, and all that it calls, as they are."""
    disabled: Callable[_P, _T] | None = None

    @functools.wraps(function)
    def call(*arguments: _P.args, **keywords: _P.kwargs) -> _T:
        nonlocal disabled
        if disabled is None:
            # Nothing is being compiled where the compiler is not there; to import it takes a second.
            if "torch._dynamo" not in sys.modules:
                return function(*arguments, **keywords)
            disabled = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
        return disabled(*arguments, **keywords)

    return call
