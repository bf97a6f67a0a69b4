"""Torch's own four clipping functions, also while `torch.nn.utils` holds others.

A call that fastclip cannot do itself goes back to torch. It must not look torch's function up in `torch.nn.utils`:
after `fastclip.patch()` it would find fastclip's there, and recurse forever. Nor is it enough to store the functions
when fastclip is imported. Torch's `clip_grad_norm_` looks up two helpers in its module, `torch.nn.utils.clip_grad`, at
each call, and would find fastclip's helpers there. And if torch is already patched at the import, by somebody else or
by an earlier copy of fastclip, what is stored is not torch's.

So torch's file is executed a second time, as a module that nobody else has. The functions have torch's code, names and
source lines, but they are other objects than those in `torch.nn.utils`: compare what they do, not their identity.
"""

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]


def _own_copy() -> ModuleType:
    """Execute torch's file of clipping functions as a module outside of `sys.modules`."""
    spec = importlib.util.find_spec("torch.nn.utils.clip_grad")
    if spec is None or spec.loader is None:
        message = f"fastclip needs torch.nn.utils.clip_grad, which torch {torch.__version__} does not have"
        raise ImportError(message)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _function(module: ModuleType, name: str) -> Callable[..., Any]:
    """Return the function `torch.nn.utils.<name>`. In its module two of them have a leading underscore."""
    function: Callable[..., Any] | None = getattr(module, name, None) or getattr(module, f"_{name}", None)
    if function is None:
        message = f"fastclip needs torch 2.8 or later: torch {torch.__version__} has no torch.nn.utils.{name}"
        raise ImportError(message)
    return function


_copy = _own_copy()

clip_grad_norm_: Callable[..., torch.Tensor] = _function(_copy, "clip_grad_norm_")
clip_grad_value_: Callable[..., None] = _function(_copy, "clip_grad_value_")
clip_grads_with_norm_: Callable[..., None] = _function(_copy, "clip_grads_with_norm_")
get_total_norm: Callable[..., torch.Tensor] = _function(_copy, "get_total_norm")
