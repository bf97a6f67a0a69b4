"""Folding: the optimizer's own step scales the gradients. Its checks and its divisor.

torch's fused optimizers divide each gradient by their attribute ``grad_scale`` when they read it, and write the
quotient back. So folded clipping computes only the norm, and sets that attribute.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from fastclip.core.gradients import Gradients
from fastclip.foundation.devices import on
from fastclip.rules.catalogue import AnyRule
from fastclip.rules.formulas import ClipByValue
from fastclip.rules.groups import Groups
from fastclip.training.optimizers import step_without_hooks

_DIVIDING = (Adam, AdamW, SGD, Adagrad)
"""The optimizers whose steps divide gradients by ``grad_scale`` if they are fused."""


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise unless the optimizer's step divides by ``grad_scale``.

    Raises:
        ValueError: The step ignores ``grad_scale``, as RMSprop's does, or fails if it is set, as those of torch's
            optimizers that are not fused do; or it is a subclass's own step, which may do either.
    """
    kind = type(optimizer)
    has_torch_s_step = any(step_without_hooks(kind) is step_without_hooks(dividing) for dividing in _DIVIDING)
    if not has_torch_s_step or _first_not_fused(optimizer.param_groups) is not None:
        raise ValueError(
            "fold=True takes torch's own Adam, AdamW, SGD or Adagrad, made with fused=True: their steps divide the "
            f"gradients by `grad_scale`, and that of this {kind.__name__} does not. Without fold=True, fastclip scales "
            "them ahead of the step"
        )


def check_rule(rule: AnyRule | None, groups: Groups) -> None:
    """Raise unless the rule has one coefficient for all gradients.

    Raises:
        ValueError: There is no rule, the rule clips by value or by unit, or it has several groups.
    """
    if rule is None or isinstance(rule, ClipByValue) or rule.by == "unit" or not groups.is_one:
        raise ValueError(
            f"fold=True hands the optimizer one coefficient for all gradients, which {rule} does not have: give a rule "
            "by the global norm, such as global_clipnorm=1.0, or leave fold=True out"
        )


def check_state_dict(state_dict: Mapping[str, Any]) -> None:
    """Raise if loading the state dict would make a parameter group not fused.

    Raises:
        ValueError: A group of the state dict is not fused.
    """
    index = _first_not_fused(state_dict.get("param_groups", ()))
    if index is not None:
        raise ValueError(
            f"param_groups[{index}] of the state dict is not fused, and load_state_dict takes that over, but a rule is "
            "attached with fold=True, which only fused steps apply. Nothing was loaded: set "
            f'state_dict["param_groups"][{index}]["fused"] = True before loading it, or attach the rule without fold'
        )


def check_step(optimizer: Optimizer, rule: AnyRule | None, groups: Groups, grads: Gradients) -> None:
    """Raise unless the step that follows divides these gradients; groups and strides may change between steps.

    Raises:
        RuntimeError: The strides of a gradient differ from those of its parameter.
        ValueError: A parameter group is not fused, or the rule has several coefficients.
    """
    _check_fused(optimizer)
    check_rule(rule, groups)
    _check_strides(grads)


def _check_fused(optimizer: Optimizer) -> None:
    index = _first_not_fused(optimizer.param_groups)
    if index is not None:
        raise ValueError(
            f"param_groups[{index}] of the optimizer is not fused, but a rule is attached with fold=True, which only "
            f'fused steps apply: set optimizer.param_groups[{index}]["fused"] = True, or attach the rule without it'
        )


def _first_not_fused(groups: Sequence[Mapping[str, Any]]) -> int | None:
    return next((index for index, group in enumerate(groups) if not group.get("fused")), None)


def _check_strides(grads: Gradients) -> None:
    """Raise if a fused optimizer would divide other memory: it assumes that a gradient has its parameter's strides."""
    for index, (grad, position) in enumerate(zip(grads.tensors, grads.positions, strict=True)):
        parameter = grads.owners.tensors[position]
        if grad.layout is not torch.strided:
            continue  # sparse: torch raises for it
        if grad.stride() != parameter.stride() and any(
            size > 1 and own != other
            for size, own, other in zip(grad.shape, grad.stride(), parameter.stride(), strict=True)
        ):
            raise RuntimeError(
                f"{grads.label(index)} has the strides {grad.stride()}, its parameter {parameter.stride()}: a "
                "fused optimizer would divide other memory than the gradient's. Assign a contiguous gradient, or "
                "attach the rule without fold=True"
            )


def divisor(coefficients: Tensor, loss_scale: Tensor | None) -> Tensor:
    """Return what the optimizer divides by: the loss scale, or 1, over the only coefficient. 0-dim, fp32."""
    scale = 1.0 if loss_scale is None else on(coefficients.device, loss_scale)
    return (scale / coefficients[0]).float()
