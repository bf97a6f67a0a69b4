"""Torch's own four clipping functions, which stay torch's own whatever `torch.nn.utils` holds.

fastclip hands a call that it cannot do itself back to torch. It must not look torch's function up in
`torch.nn.utils` for that: after `fastclip.patch()` it would find itself there, and call itself for ever. To keep the
functions found at import is not enough either. Torch's `clip_grad_norm_` calls two helpers which it looks up in its
module, `torch.nn.utils.clip_grad`, at each call, so with these replaced a call handed back would come in again by the
helpers; and if fastclip is imported while torch is patched, by somebody else or by an earlier copy of fastclip, what
it finds is not torch's.

So torch's file is executed a second time, as a module of fastclip's own which nobody else holds. The functions have
torch's code, names and source lines, but they are other objects than those in `torch.nn.utils`: compare what they do,
not what they are.
"""

import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

__all__ = ["clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm"]


def _own_copy() -> ModuleType:
    """Execute torch's file of clipping functions as a module that is not in `sys.modules`."""
    spec = importlib.util.find_spec("torch.nn.utils.clip_grad")
    if spec is None or spec.loader is None:
        message = f"fastclip needs torch.nn.utils.clip_grad, which torch {torch.__version__} does not have"
        raise ImportError(message)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _function(module: ModuleType, name: str) -> Callable[..., Any]:
    """Return the function that torch offers as `torch.nn.utils.<name>`; two have an underscore before it at home."""
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
