"""Warnings that point at the caller's own line, outside of fastclip and torch."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

# torch marks deprecated functions by typing_extensions, and `patched()` is a context manager of contextlib.
_OURS = frozenset({"fastclip", "torch", "typing_extensions", "contextlib"})


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line that is outside of fastclip and torch."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)
