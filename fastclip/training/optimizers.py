"""torch's optimizers: whether an object is one, and whether one of its steps is running.

torch's optimizers do not record that a step is running. So it is looked up on the stack: torch wraps the `step` of each
class in a function that calls the hooks before and after it, and each running step has a frame of that function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from torch.optim import Optimizer


def check_is_optimizer(optimizer: object) -> None:
    """Raise unless the object is an optimizer that calls its own hooks.

    Raises:
        TypeError: It is not a `torch.optim.Optimizer`; or it wraps one and calls that one's step, as accelerate's does.
            Then neither the hooks of the inner optimizer nor its scaler know the wrapper.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"`optimizer` must be a torch.optim.Optimizer, not {type(optimizer).__name__}")
    if "_optimizer_step_pre_hooks" not in vars(optimizer):
        raise TypeError(
            f"`optimizer` is a {type(optimizer).__name__} that torch.optim.Optimizer never initialized, a wrapper: "
            "pass the optimizer that it wraps (with accelerate, optimizer.optimizer)"
        )


def is_stepping(optimizer: Optimizer) -> bool:
    """Whether a step of the optimizer is running in any thread."""
    return any(_count_steps(frame, optimizer) for frame in sys._current_frames().values())


def is_in_another_step(optimizer: Optimizer) -> bool:
    """Whether another step of the optimizer has called the step in whose hook this runs."""
    return _count_steps(sys._getframe(), optimizer) > 1


def _count_steps(frame: FrameType | None, optimizer: Optimizer) -> int:
    """Count the steps of the optimizer in a frame and its callers."""
    count = 0
    while frame is not None:
        count += _calls_hooks(frame.f_code) and any(value is optimizer for value in frame.f_locals.values())
        frame = frame.f_back
    return count


def step_without_hooks(kind: type[Optimizer]) -> Callable[..., Any]:
    """Return the `step` of a class without torch's wrappers; a subclass's own step may be wrapped, too."""
    step: Any = kind.step
    while _calls_hooks(getattr(step, "__code__", None)):
        step = step.__wrapped__
    return step  # type: ignore[no-any-return]


def _calls_hooks(code: CodeType | None) -> bool:
    """Whether the code is torch's wrapper of a step, which calls the hooks before and after it.

    Its place in torch's source identifies it: `torch.compile` makes another code object of the same place.
    """
    return code is not None and (code.co_name, code.co_filename, code.co_firstlineno) == _PLACE_OF_WRAPPER


_wrapper = Optimizer.profile_hook_step(lambda: None).__code__
_PLACE_OF_WRAPPER = (_wrapper.co_name, _wrapper.co_filename, _wrapper.co_firstlineno)
