"""Gradient clipping that replaces torch's without a change in the caller's code, and is faster.

>>> import fastclip
>>> norm = fastclip.clip_grad_norm_(model.parameters(), max_norm=1.0)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastclip.amp import clip_scaled_grad_norm_, unscale_and_clip_grad_norm_
    from fastclip.attachment import Attachment, attach
    from fastclip.clip_by import (
        ClipResult,
        clip_by_global_norm_,
        clip_by_norm_,
        clip_by_value_,
        clip_grads_,
        measure_grads,
    )
    from fastclip.clipping import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
    from fastclip.environment import info, warm_up
    from fastclip.functional import clip_by_global_norm
    from fastclip.history import History
    from fastclip.monitor import Monitor
    from fastclip.patching import patch, patched, unpatch
    from fastclip.rules import ClipAtThreshold, ClipByGlobalNorm, ClipByNorm, ClipByValue, ClipGradNorm, Rule
    from fastclip.sinks import CSVFile, JSONLines, Sink, TensorBoard
    from fastclip.triggers import Above, Jump, NonFinite, Report, TriggerError, Vanishing

__version__ = "0.1.0"

# Imported when they are first asked for, because they import torch: `python -m fastclip run` must not do that before
# the script does.
_HOMES = {
    "Above": "fastclip.triggers",
    "Attachment": "fastclip.attachment",
    "CSVFile": "fastclip.sinks",
    "ClipAtThreshold": "fastclip.rules",
    "ClipByGlobalNorm": "fastclip.rules",
    "ClipByNorm": "fastclip.rules",
    "ClipByValue": "fastclip.rules",
    "ClipGradNorm": "fastclip.rules",
    "ClipResult": "fastclip.clip_by",
    "History": "fastclip.history",
    "JSONLines": "fastclip.sinks",
    "Jump": "fastclip.triggers",
    "Monitor": "fastclip.monitor",
    "NonFinite": "fastclip.triggers",
    "Report": "fastclip.triggers",
    "Rule": "fastclip.rules",
    "Sink": "fastclip.sinks",
    "TensorBoard": "fastclip.sinks",
    "TriggerError": "fastclip.triggers",
    "Vanishing": "fastclip.triggers",
    "attach": "fastclip.attachment",
    "clip_by_global_norm": "fastclip.functional",
    "clip_by_global_norm_": "fastclip.clip_by",
    "clip_by_norm_": "fastclip.clip_by",
    "clip_by_value_": "fastclip.clip_by",
    "clip_grad_norm_": "fastclip.clipping",
    "clip_grad_value_": "fastclip.clipping",
    "clip_grads_": "fastclip.clip_by",
    "clip_grads_with_norm_": "fastclip.clipping",
    "clip_scaled_grad_norm_": "fastclip.amp",
    "get_total_norm": "fastclip.clipping",
    "info": "fastclip.environment",
    "measure_grads": "fastclip.clip_by",
    "patch": "fastclip.patching",
    "patched": "fastclip.patching",
    "unpatch": "fastclip.patching",
    "unscale_and_clip_grad_norm_": "fastclip.amp",
    "warm_up": "fastclip.environment",
}

__all__ = [
    "Above",
    "Attachment",
    "CSVFile",
    "ClipAtThreshold",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByValue",
    "ClipGradNorm",
    "ClipResult",
    "History",
    "JSONLines",
    "Jump",
    "Monitor",
    "NonFinite",
    "Report",
    "Rule",
    "Sink",
    "TensorBoard",
    "TriggerError",
    "Vanishing",
    "attach",
    "clip_by_global_norm",
    "clip_by_global_norm_",
    "clip_by_norm_",
    "clip_by_value_",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_",
    "clip_grads_with_norm_",
    "clip_scaled_grad_norm_",
    "get_total_norm",
    "info",
    "measure_grads",
    "patch",
    "patched",
    "unpatch",
    "unscale_and_clip_grad_norm_",
    "warm_up",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
