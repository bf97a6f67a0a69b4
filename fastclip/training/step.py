"""One step of an optimizer: what is changed for it, and undone after it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip.core.owners import Owners
from fastclip.foundation.tracing import untraced
from fastclip.training.optimizers import is_in_another_step, is_stepping

_MISSING = object()


class Step:
    """The step that an optimizer is in. Each change for it is stored with what undoes it."""

    def __init__(self) -> None:
        self._optimizer: Optimizer | None = None  # stays after a step that raised, until the next one begins
        self._has_nested = False  # whether a step has ever called that of a base class
        self._undos: list[Callable[[], None]] = []
        self._restore_originals: Callable[[], None] | None = None  # of the gradients, if the step uses copies

    @untraced
    def begin(self, optimizer: Optimizer) -> bool:
        """Begin a step, in its hook. Return False if another step of the optimizer has called it: that one goes on."""
        if self._optimizer is not None and is_in_another_step(optimizer):
            self._has_nested = True
            return False
        self.abandon()
        self._optimizer = optimizer
        return True

    @untraced
    def end(self, optimizer: Optimizer) -> None:
        """End the step, in its hook, unless another step of the optimizer has called it."""
        if not (self._has_nested and is_in_another_step(optimizer)):
            self._optimizer = None
            self.undo()

    def is_running(self) -> bool:
        """Whether the step has begun, and has neither ended nor raised."""
        return self._optimizer is not None and is_stepping(self._optimizer)

    def abandon(self) -> None:
        """Undo the changes for a step that raised. Copies stay: there may have been another backward since then."""
        self._optimizer = None
        self._restore_originals = None
        self.undo()

    @untraced
    def undo(self) -> None:
        """Undo all changes, the last one first."""
        while self._undos:
            self._undos.pop()()
        if self._restore_originals is not None:
            self._restore_originals()
            self._restore_originals = None

    def copy_gradients(self, owners: Owners) -> None:
        """Replace the gradients by copies. `undo` puts the originals back, unless the step has replaced a copy."""
        originals = [parameter.grad for parameter in owners.tensors]
        copies = [None if grad is None else grad.clone() for grad in originals]
        for parameter, copy in zip(owners.tensors, copies, strict=True):
            parameter.grad = copy

        def restore() -> None:
            for parameter, original, copy in zip(owners.tensors, originals, copies, strict=True):
                if parameter.grad is copy:
                    parameter.grad = original

        self._restore_originals = restore

    def set_attribute(self, optimizer: Optimizer, name: str, value: Tensor) -> None:
        """Set an attribute of the optimizer. `undo` restores the value that GradScaler had set, if any."""
        before = vars(optimizer).get(name, _MISSING)
        setattr(optimizer, name, value)

        def restore() -> None:
            if getattr(optimizer, name, None) is not value:
                return  # the step raised, and GradScaler has changed the attribute since then
            if before is _MISSING:
                delattr(optimizer, name)
            else:
                setattr(optimizer, name, before)

        self._undos.append(restore)

    def skip(self, optimizer: Optimizer, owners: Owners, flag: Tensor) -> None:
        """Let the step change nothing if the flag, 0-dim bool, is true.

        Fused optimizers read ``found_inf`` on the device. With any other optimizer the host waits for the device, and
        removes the gradients: torch's optimizers leave parameters whose gradient is None as they are.
        """
        if _supports_found_inf(optimizer):
            own = flag.to(torch.float32)
            found = getattr(optimizer, "found_inf", None)  # set by GradScaler
            both = own if found is None else torch.maximum(found, own.to(found.device))
            self.set_attribute(optimizer, "found_inf", both)
        elif flag:
            self._remove_gradients(owners)

    def _remove_gradients(self, owners: Owners) -> None:
        grads = [parameter.grad for parameter in owners.tensors]
        for parameter in owners.tensors:
            parameter.grad = None

        def restore() -> None:
            if any(parameter.grad is not None for parameter in owners.tensors):
                return  # the step raised, and there has been another backward since then
            for parameter, grad in zip(owners.tensors, grads, strict=True):
                parameter.grad = grad

        self._undos.append(restore)


def _supports_found_inf(optimizer: Optimizer) -> bool:
    """Whether the step works with ``found_inf`` set.

    torch raises if a state dict has brought groups that are not fused. Fused SGD that has no momentum yet allocates it
    even in a step that it skips, and uses that uninitialised memory in the next one.
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
