"""An attached rule: the hooks before and after each step, and the optimizer's state dict.

Gradients are clipped when they are final: when `step` is called or, if it evaluates a closure, each time the closure
returns. So gradients that several backward passes accumulate are clipped once. If `torch.amp.GradScaler` skips a step,
it does not call `step`, and nothing is clipped. Only a fused optimizer is called then, and skips its update itself.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from fastclip.core.collect import gradients_of
from fastclip.core.owners import Owners
from fastclip.foundation.tracing import untraced
from fastclip.rules.adaptive import AdaptiveRule, ClipByEMA
from fastclip.rules.apply import ClipResult, apply_rule
from fastclip.rules.catalogue import AnyRule
from fastclip.rules.checkpoint import from_state, load_state, state_of
from fastclip.rules.formulas import ClipByValue
from fastclip.rules.groups import Groups
from fastclip.rules.memory import Memory
from fastclip.training import folding
from fastclip.training.members import Members
from fastclip.training.step import Step

if TYPE_CHECKING:
    from fastclip.monitoring.monitor import Monitor

_STATE_KEY = "fastclip"
"""The key in the optimizer's state dict. torch's `load_state_dict` ignores it."""


class Attachment:
    """A rule that clips at each step of an optimizer; made by `attach`.

    Attributes:
        rule: The rule; None if a monitor only watches, or the bound is 0.
        monitor: The monitor that is told of every step, if any.
        norm: The 2-norm of all gradients at the last step, before clipping: 0-dim, fp64, on the gradients' device. None
            before the first step. Reading its value on the host waits for the device.
        result: All results of the last step; None before the first step, and after a state dict was loaded.
        is_attached: Whether it still clips.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: AnyRule | None,
        monitor: Monitor | None,
        members: Members,
        *,
        fold: bool,
        keep_grads: bool,
    ) -> None:
        self.rule = rule
        self.monitor = monitor
        self.norm: Tensor | None = None
        self.result: ClipResult | None = None
        self.is_attached = True
        self._kind = type(optimizer).__name__
        self._members = members
        self._folds = fold
        self._keeps_grads = keep_grads
        self._step = Step()
        self._loading: dict[str, Any] | None = None  # from a state dict that is being loaded
        self._loaded_clipped: Tensor | None = None
        self._hold(optimizer)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]

    def _hold(self, optimizer: Optimizer) -> None:
        """Remember where an adaptive rule is attached."""
        if isinstance(self.rule, AdaptiveRule):
            _holders[self.rule.memory] = ref(optimizer), ref(self)

    @property
    def clipped(self) -> Tensor | None:
        """Whether the last step was clipped: 0-dim bool, on the device. None before the first step."""
        return self._loaded_clipped if self.result is None else self.result.clipped

    def __repr__(self) -> str:
        state = "attached to" if self.is_attached else "detached from"
        return f"<{self.rule or self.monitor or 'nothing'} {state} {self._kind}>"

    def detach(self) -> None:
        """Stop clipping: the optimizer steps as before `attach`. The results of the last step stay readable."""
        self.is_attached = False
        if self._step.is_running():
            return  # torch iterates over its hooks now: ours stay, undo the changes for this step, and then do nothing
        self._step.abandon()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Clip; or, if the step has a closure, replace it by one that clips."""
        if not self._step.begin(optimizer):
            return None  # the gradients were clipped before the outer step
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self._clip(optimizer)
            return None
        clipping = self._with_clipping(closure, optimizer)
        if len(args) > 1:
            return (args[0], clipping, *args[2:]), kwargs
        return args, {**kwargs, "closure": clipping}

    def _with_clipping(self, closure: Callable[[], Any], optimizer: Optimizer) -> Callable[[], Any]:
        """Return a closure that calls this one, tells the monitor its loss, and clips."""

        def clipping() -> Any:
            self._step.undo()  # those of the last call: an optimizer may evaluate a closure several times a step
            loss = closure()
            if self.is_attached and self.monitor is not None and loss is not None:
                self.monitor.record_loss(loss)
            self._clip(optimizer)
            return loss

        return clipping

    @untraced
    @torch.no_grad()
    def _clip(self, optimizer: Optimizer) -> None:
        if not self.is_attached:
            return
        owners, groups = self._members.find(optimizer, self.rule)
        loss_scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler for fused optimizers
        _check_applies_now(self.rule, loss_scale)
        if self._keeps_grads:
            self._step.copy_gradients(owners)
        try:
            self._apply(optimizer, owners, groups, loss_scale)
        except BaseException:
            self._step.undo()
            raise

    def _apply(self, optimizer: Optimizer, owners: Owners, groups: Groups, loss_scale: Tensor | None) -> None:
        grads = gradients_of(owners)
        if self._folds:
            folding.check_step(optimizer, self.rule, groups, grads)
        each = self.monitor is not None
        result = apply_rule(grads, self.rule, groups, each=each, scale=loss_scale, write=not self._folds)
        self.result, self.norm = result, result.norm
        if self.monitor is not None:
            skip = self.monitor.update(result)
            if self.monitor.skips:
                self._step.skip(optimizer, owners, skip)
        if self._folds and result.coefficients is not None:
            self._step.set_attribute(optimizer, "grad_scale", folding.divisor(result.coefficients, loss_scale))

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        self._step.end(optimizer)

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        """Add the attachment's state to the optimizer's state dict."""
        if not self.is_attached:
            return
        state: dict[str, Any] = {"norm": self.norm, "clipped": self.clipped}
        if self.rule is not None:
            _, groups = self._members.find(optimizer, self.rule)
            state["rule"] = state_of(self.rule, groups.labels)
        if self.monitor is not None:
            state["monitor"] = self.monitor.state_dict()
        state_dict[_STATE_KEY] = state

    def _before_load(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        if self._folds and self.is_attached:
            folding.check_state_dict(state_dict)
        self._loading = state_dict.get(_STATE_KEY)

    def _load(self, optimizer: Optimizer) -> None:
        """Load the attachment's state, after torch has loaded the rest of the state dict without an error."""
        state, self._loading = self._loading, None
        if state is None or not self.is_attached:
            return
        _, groups = self._members.find(optimizer, self.rule)
        if self.rule is not None and "rule" in state:
            rule = from_state(self.rule, groups.labels, state["rule"])
            _, groups = self._members.find(optimizer, rule)  # raises if the rule does not fit
            if self._folds:
                folding.check_rule(rule, groups)
            load_state(rule, state["rule"])
            self.rule = rule
            self._hold(optimizer)
        if self.monitor is not None and "monitor" in state:
            self.monitor.load_state_dict(state["monitor"])
        self.norm, self._loaded_clipped, self.result = state["norm"], state["clipped"], None
        self._members.forget()  # the state dict may have brought other names


_holders: WeakKeyDictionary[Memory, tuple[ref[Optimizer], ref[Attachment]]] = WeakKeyDictionary()
"""Where each adaptive rule was attached last."""


def check_is_free(rule: AnyRule | None) -> None:
    """Raise if an adaptive rule is attached to another optimizer: it would learn the norms of both as of one.

    Raises:
        ValueError: It is.
    """
    if isinstance(rule, AdaptiveRule) and _is_held(rule):
        gc.collect()  # an optimizer that nobody holds any more may be in reference cycles
        if _is_held(rule):
            raise ValueError(
                f"{rule} is attached to another optimizer, and learns the norms there: make another rule for this one, "
                "or detach() it there first"
            )


def _is_held(rule: AdaptiveRule) -> bool:
    known = _holders.get(rule.memory)
    optimizer, attachment = (None, None) if known is None else (known[0](), known[1]())
    if optimizer is None or attachment is None or not attachment.is_attached:
        return False
    return isinstance(attachment.rule, AdaptiveRule) and attachment.rule.memory is rule.memory


def _check_applies_now(rule: AnyRule | None, loss_scale: Tensor | None) -> None:
    """Raise if the rule needs gradients that are not there yet, or gradients without a loss scale.

    Raises:
        RuntimeError: The step is inside of backward and the rule needs all gradients; or the rule is by value and the
            gradients carry a loss scale.
    """
    if isinstance(rule, ClipByValue):
        if loss_scale is not None:
            raise RuntimeError(
                f"{rule} is attached, but the gradients still carry the scale of GradScaler: call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
    elif rule is not None and torch._C._current_graph_task_id() >= 0 and _needs_all(rule):
        raise RuntimeError(
            f"{rule} is attached to an optimizer that steps inside of backward, where the other gradients are "
            "not there yet: attach a rule by parameter (clipnorm=1.0) or by value (clipvalue=1.0), or step after "
            "backward"
        )


def _needs_all(rule: AnyRule) -> bool:
    """Whether a rule needs the gradients of several parameters at once; an EMA's warm-up needs their global norm."""
    return isinstance(rule, ClipByEMA) or rule.by not in ("parameter", "unit")
