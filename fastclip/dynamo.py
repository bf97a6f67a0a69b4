"""What `torch.compile` makes of a call of fastclip: a graph break, rather than an attempt to trace it.

Plans rest on the gradients' addresses, which a traced graph does not have, and a trace would be taken anew whenever
they move. What clipping does takes two launches either way, so there would be nothing to gain.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_T = TypeVar("_T")


def _apply(function: Callable[_P, _T], *arguments: _P.args, **keywords: _P.kwargs) -> _T:
    return function(*arguments, **keywords)


_apply_untraced: list[Callable[..., Any]] = []
"""`_apply` as `torch.compile` leaves it, once that is there. One for all functions: of a variable of each, the compiler
would not notice that it is still to be set."""


def untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Have `torch.compile` leave a function, and all that it calls, as they are."""

    @functools.wraps(function)
    def call(*arguments: _P.args, **keywords: _P.kwargs) -> _T:
        if not _apply_untraced:
            # Nothing is being compiled where the compiler is not there; to import it takes a second.
            if "torch._dynamo" not in sys.modules:
                return function(*arguments, **keywords)
            _apply_untraced.append(torch.compiler.disable(_apply))  # type: ignore[no-untyped-call]
        result: _T = _apply_untraced[0](function, *arguments, **keywords)
        return result

    return call
