"""Warnings that point at the caller's own line, however deep inside of fastclip or torch they come up."""

from __future__ import annotations

import sys
import warnings
from types import FrameType

_OURS = frozenset({"fastclip", "torch", "typing_extensions"})  # by the last torch marks what is deprecated


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn of the line, outside of fastclip and torch, that led here."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _OURS:
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level)
