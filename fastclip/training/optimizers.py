"""Steps of torch's optimizers: whether one is under way, and what it makes of the attributes that it is lent.

torch's fused optimizers divide each gradient by their attribute ``grad_scale``, and change nothing where ``found_inf``
is set. Both are lent for one step, and what GradScaler had put there is put back after it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from fastclip.core.gradients import Gradients
from fastclip.core.owners import Owners
from fastclip.foundation.tracing import untraced
from fastclip.rules.formulas import AnyRule, ClipByValue
from fastclip.rules.groups import Groups

_DIVIDING = (Adam, AdamW, SGD, Adagrad)
"""Those whose steps divide gradients by ``grad_scale``, as long as they are fused."""


def is_stepping(optimizer: Optimizer) -> bool:
    """Whether a thread is inside of a step of the optimizer."""
    return any(_steps_on(frame, optimizer) for frame in sys._current_frames().values())


@untraced
def is_in_another_step(optimizer: Optimizer) -> bool:
    """Whether the step whose hooks ask was called by another step of the optimizer."""
    return _steps_on(sys._getframe(), optimizer) > 1


def _steps_on(frame: FrameType | None, optimizer: Optimizer) -> int:
    """How many of a frame, and of those that led to it, are steps of the optimizer with the hooks around them."""
    count = 0
    while frame is not None:
        count += _is_step_with_hooks(frame.f_code) and any(value is optimizer for value in frame.f_locals.values())
        frame = frame.f_back
    return count


def _is_step_with_hooks(code: CodeType | None) -> bool:
    """Whether it is what torch puts around each class's step, to call the hooks ahead of it and after it.

    It is told by its place in torch: `torch.compile` makes other code of it, of the same place.
    """
    return code is not None and (code.co_name, code.co_filename, code.co_firstlineno) == _PLACE_OF_HOOKS


_step_with_hooks = Optimizer.profile_hook_step(lambda: None).__code__
_PLACE_OF_HOOKS = (_step_with_hooks.co_name, _step_with_hooks.co_filename, _step_with_hooks.co_firstlineno)


def check_is_optimizer(optimizer: object) -> None:
    """Refuse what is no optimizer, or one by its type only.

    Raises:
        TypeError: It is none; or it wraps one, as accelerate's does, and steps that one, whose hooks and scaler do not
            know of it.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if "_optimizer_step_pre_hooks" not in vars(optimizer):
        raise TypeError(
            f"`optimizer` is a {type(optimizer).__name__} that torch.optim.Optimizer never initialized, a wrapper: "
            "pass the optimizer that it wraps (with accelerate, optimizer.optimizer)"
        )


def check_divides(optimizer: Optimizer) -> None:
    """Refuse an optimizer that would not divide by ``grad_scale``.

    Raises:
        ValueError: It is so. Of torch's optimizers those that are not fused fail with ``grad_scale`` set, or, like
            RMSprop, take no notice of it; and so may a subclass with a step of its own.
    """
    kind = type(optimizer)
    has_torch_s_step = any(_step_itself(kind) is _step_itself(dividing) for dividing in _DIVIDING)
    if not has_torch_s_step or not all(group.get("fused") for group in optimizer.param_groups):
        raise ValueError(
            "fold=True takes torch's own Adam, AdamW, SGD or Adagrad, made with fused=True: their steps divide the "
            f"gradients by `grad_scale`, and that of this {kind.__name__} does not. Without fold=True, fastclip scales "
            "them ahead of the step"
        )


def _step_itself(kind: type[Optimizer]) -> Callable[..., Any]:
    """The step of a class without torch's hooks, which a step of its own may be wrapped to look like."""
    step: Any = kind.step
    while _is_step_with_hooks(getattr(step, "__code__", None)):
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]


def check_fused(optimizer: Optimizer) -> None:
    """Refuse parameter groups that were changed since `check_divides`.

    Raises:
        ValueError: One is not fused.
    """
    index = _first_not_fused(optimizer.param_groups)
    if index is not None:
        raise ValueError(
            f"param_groups[{index}] of the optimizer is not fused, but a rule is attached with fold=True, which only "
            f'fused steps apply: set optimizer.param_groups[{index}]["fused"] = True, or attach the rule without it'
        )


def check_fused_state(state_dict: Mapping[str, Any]) -> None:
    """Refuse a state dict whose parameter groups would end that the optimizer's are fused.

    Raises:
        ValueError: One is not fused.
    """
    index = _first_not_fused(state_dict.get("param_groups", ()))
    if index is not None:
        raise ValueError(
            f"param_groups[{index}] of the state dict is not fused, and load_state_dict takes that over, but a rule is "
            "attached with fold=True, which only fused steps apply. Nothing was loaded: set "
            f'state_dict["param_groups"][{index}]["fused"] = True before loading it, or attach the rule without fold'
        )


def _first_not_fused(groups: Sequence[Mapping[str, Any]]) -> int | None:
    return next((index for index, group in enumerate(groups) if not group.get("fused")), None)


def check_foldable(rule: AnyRule | None, groups: Groups) -> None:
    """Refuse a rule that is not one number, to be divided by.

    Raises:
        ValueError: It is so.
    """
    if rule is None or isinstance(rule, ClipByValue) or not groups.is_one:
        raise ValueError(
            f"fold=True hands the optimizer one coefficient for all gradients, which {rule} does not have: give a rule "
            "by the global norm, such as global_clipnorm=1.0, or leave fold=True out"
        )


def check_layout(grads: Gradients) -> None:
    """Refuse gradients that a fused optimizer would not divide where they are: it takes their memory for dense.

    Raises:
        RuntimeError: One lies otherwise than its parameter.
    """
    for index, (grad, position) in enumerate(zip(grads.tensors, grads.positions, strict=True)):
        parameter = grads.owners.tensors[position]
        if grad.layout is not torch.strided:
            continue  # sparse: torch refuses it
        if grad.stride() != parameter.stride() and any(
            size > 1 and own != other
            for size, own, other in zip(grad.shape, grad.stride(), parameter.stride(), strict=True)
        ):
            raise RuntimeError(
                f"{grads.label(index)} has the strides {grad.stride()}, its parameter {parameter.stride()}: a "
                "fused optimizer would divide other memory than the gradient's. Assign a contiguous gradient, or "
                "attach the rule without fold=True"
            )


def lend(optimizer: Optimizer, name: str, value: Tensor) -> Callable[[], None]:
    """Give an optimizer an attribute for the step that follows; return what puts back what GradScaler had there."""
    before = vars(optimizer).get(name, lend)  # which it never is
    setattr(optimizer, name, value)

    def put_back() -> None:
        if getattr(optimizer, name, None) is not value:
            return  # GradScaler has been here since, after a step that raised
        if before is lend:
            delattr(optimizer, name)
        else:
            setattr(optimizer, name, before)

    return put_back


def lend_copies(owners: Owners) -> Callable[[], None]:
    """Put copies in the gradients' place for the step that follows; return what puts the gradients back."""
    grads = [parameter.grad for parameter in owners.tensors]
    copies = [None if grad is None else grad.clone() for grad in grads]
    for parameter, copy in zip(owners.tensors, copies, strict=True):
        parameter.grad = copy

    def give_back() -> None:
        for parameter, grad, copy in zip(owners.tensors, grads, copies, strict=True):
            if parameter.grad is copy:  # and not what the step has put there
                parameter.grad = grad

    return give_back


def skip_step(optimizer: Optimizer, owners: Owners, skip: Tensor) -> list[Callable[[], None]]:
    """Have the step that follows change nothing where `skip` is set; return what puts things back after it.

    Fused optimizers look at ``found_inf`` on the device. Any other has to be kept from stepping by the host, which
    waits for the device: every torch optimizer passes over parameters whose gradient is None.
    """
    if _takes_found_inf(optimizer):
        found = getattr(optimizer, "found_inf", None)  # GradScaler's
        flag = skip.to(torch.float32)
        return [lend(optimizer, "found_inf", flag if found is None else torch.maximum(found, flag.to(found.device)))]
    if not skip:
        return []
    grads = [parameter.grad for parameter in owners.tensors]
    for parameter in owners.tensors:
        parameter.grad = None

    def give_back() -> None:
        if any(parameter.grad is not None for parameter in owners.tensors):
            return  # after a step that raised there has been another backward
        for parameter, grad in zip(owners.tensors, grads, strict=True):
            parameter.grad = grad

    return [give_back]


def _takes_found_inf(optimizer: Optimizer) -> bool:
    """Whether the step is right with ``found_inf`` set.

    Torch fails where a state dict has brought groups that are not fused. Fused SGD is not right as long as it has no
    momentum: it would keep the memory that it just allocated for it.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    return all(group.get("fused", True) for group in optimizer.param_groups) and all(
        "momentum_buffer" in optimizer.state.get(parameter, ())
        for group in optimizer.param_groups
        if group.get("momentum")
        for parameter in group["params"]
        if parameter.grad is not None
    )
