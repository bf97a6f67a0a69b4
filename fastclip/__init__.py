"""Gradient clipping that replaces torch's without changes in the caller's code, and is faster.

>>> import fastclip
>>> norm = fastclip.clip_grad_norm_(model.parameters(), max_norm=1.0)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastclip.core.clipping import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
    from fastclip.monitoring.history import History
    from fastclip.monitoring.interface import Report, TriggerError
    from fastclip.monitoring.monitor import Monitor
    from fastclip.monitoring.sinks import CSVFile, JSONLines, Sink, TensorBoard
    from fastclip.monitoring.triggers import Above, Jump, NonFinite, Vanishing
    from fastclip.rules.adaptive import ClipByEMA, ClipByQuantile, ClipByZScore
    from fastclip.rules.apply import ClipResult
    from fastclip.rules.by_weight import ClipByWeightNorm
    from fastclip.rules.clip_by import clip_by_global_norm_, clip_by_norm_, clip_by_value_, clip_grads_, measure_grads
    from fastclip.rules.formulas import ClipAtThreshold, ClipByGlobalNorm, ClipByNorm, ClipByValue, ClipGradNorm, Rule
    from fastclip.rules.out_of_place import clip_by_global_norm
    from fastclip.switching.environment import info, warm_up
    from fastclip.switching.patching import patch, patched, unpatch
    from fastclip.training.amp import clip_scaled_grad_norm_, unscale_and_clip_grad_norm_
    from fastclip.training.attach import attach
    from fastclip.training.attachment import Attachment

__version__ = "0.1.0"

# The module of each public name, imported when the name is first used. These modules import torch, and
# `python -m fastclip run` must not do that before the script does.
_HOMES = {
    "Above": "fastclip.monitoring.triggers",
    "Attachment": "fastclip.training.attachment",
    "CSVFile": "fastclip.monitoring.sinks",
    "ClipAtThreshold": "fastclip.rules.formulas",
    "ClipByEMA": "fastclip.rules.adaptive",
    "ClipByGlobalNorm": "fastclip.rules.formulas",
    "ClipByNorm": "fastclip.rules.formulas",
    "ClipByQuantile": "fastclip.rules.adaptive",
    "ClipByValue": "fastclip.rules.formulas",
    "ClipByWeightNorm": "fastclip.rules.by_weight",
    "ClipByZScore": "fastclip.rules.adaptive",
    "ClipGradNorm": "fastclip.rules.formulas",
    "ClipResult": "fastclip.rules.apply",
    "History": "fastclip.monitoring.history",
    "JSONLines": "fastclip.monitoring.sinks",
    "Jump": "fastclip.monitoring.triggers",
    "Monitor": "fastclip.monitoring.monitor",
    "NonFinite": "fastclip.monitoring.triggers",
    "Report": "fastclip.monitoring.interface",
    "Rule": "fastclip.rules.formulas",
    "Sink": "fastclip.monitoring.sinks",
    "TensorBoard": "fastclip.monitoring.sinks",
    "TriggerError": "fastclip.monitoring.interface",
    "Vanishing": "fastclip.monitoring.triggers",
    "attach": "fastclip.training.attach",
    "clip_by_global_norm": "fastclip.rules.out_of_place",
    "clip_by_global_norm_": "fastclip.rules.clip_by",
    "clip_by_norm_": "fastclip.rules.clip_by",
    "clip_by_value_": "fastclip.rules.clip_by",
    "clip_grad_norm_": "fastclip.core.clipping",
    "clip_grad_value_": "fastclip.core.clipping",
    "clip_grads_": "fastclip.rules.clip_by",
    "clip_grads_with_norm_": "fastclip.core.clipping",
    "clip_scaled_grad_norm_": "fastclip.training.amp",
    "get_total_norm": "fastclip.core.clipping",
    "info": "fastclip.switching.environment",
    "measure_grads": "fastclip.rules.clip_by",
    "patch": "fastclip.switching.patching",
    "patched": "fastclip.switching.patching",
    "unpatch": "fastclip.switching.patching",
    "unscale_and_clip_grad_norm_": "fastclip.training.amp",
    "warm_up": "fastclip.switching.environment",
}

__all__ = [
    "Above",
    "Attachment",
    "CSVFile",
    "ClipAtThreshold",
    "ClipByEMA",
    "ClipByGlobalNorm",
    "ClipByNorm",
    "ClipByQuantile",
    "ClipByValue",
    "ClipByWeightNorm",
    "ClipByZScore",
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
