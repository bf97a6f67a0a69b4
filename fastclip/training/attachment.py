"""A rule given once to an optimizer, as Keras does it: every ``optimizer.step()`` clips first.

The clipping happens where the gradients are final: when `step` is called, or, for optimizers that evaluate a closure,
each time the closure returns. So gradients that are accumulated over several backward passes are clipped once. A step
that `torch.amp.GradScaler` leaves out is not clipped at all, but for fused optimizers, which it has leave it out
themselves.

torch's fused optimizers divide each gradient by their attribute ``grad_scale`` where they read it anyway, and write the
quotient back. Folded into them, clipping is no more than a norm, and that number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastclip.core.collect import gradients_of
from fastclip.core.owners import Owners, list_owners
from fastclip.foundation.arguments import positive, real
from fastclip.foundation.devices import on
from fastclip.foundation.tracing import untraced
from fastclip.rules.apply import ClipResult, apply_rule
from fastclip.rules.checkpoint import from_state, state_of
from fastclip.rules.formulas import AnyRule, ClipByGlobalNorm, ClipByNorm, ClipByValue, as_rule
from fastclip.rules.groups import Groups, group
from fastclip.training.optimizers import (
    check_divides,
    check_foldable,
    check_fused,
    check_fused_state,
    check_is_optimizer,
    check_layout,
    is_in_another_step,
    is_stepping,
    lend,
    lend_copies,
    skip_step,
)

if TYPE_CHECKING:
    from fastclip.monitoring.monitor import Monitor

_STATE = "fastclip"  # the key in the optimizer's state dict, which torch's `load_state_dict` passes over


def attach(
    optimizer: Optimizer,
    rule: AnyRule | Callable[[Tensor], Tensor] | None = None,
    *,
    clipnorm: float | None = None,
    clipvalue: float | None = None,
    global_clipnorm: float | None = None,
    monitor: Monitor | None = None,
    names: nn.Module | Iterable[tuple[str, Tensor]] | None = None,
    fold: bool = False,
    keep_grads: bool = False,
) -> Attachment:
    r"""Clip the gradients of an optimizer at each of its steps, by a rule that is given once.

    The rule is one of `fastclip.rules` or a function from norms to coefficients; or, as with Keras' optimizers, one of

    =====================  ===================================================================================
    ``clipnorm=c``         :math:`g_t \leftarrow g_t \cdot c / \max(\|g_t\|_2, c)`, each parameter by itself
    ``clipvalue=c``        :math:`g_i \leftarrow \min(\max(g_i, -c), c)`
    ``global_clipnorm=c``  :math:`g_t \leftarrow g_t \cdot \min(c / \|g\|_2, 1)`, all parameters together
    =====================  ===================================================================================

    where 0 is off, as with Keras: norms are taken, and nothing is clipped.

    The optimizer's state dict holds the rule and what it last found, under the key ``"fastclip"``. Loading it into an
    optimizer that has something attached restores them; one without passes over it, and so does
    ``torch.distributed.checkpoint`` (which fills the state of an optimizer that has not stepped yet by a step with
    gradients of 0: a step like others to the rule and to the monitor). A copy of the optimizer, or one that was
    pickled, has nothing attached: torch leaves its hooks behind.

    With a `torch.amp.GradScaler`, fused optimizers get their gradients scaled: norms are taken without the scale.

    To skip a step, as a monitor may ask, takes no sync with fused optimizers, which look at ``found_inf`` on the device
    (fused SGD once it has its momentum). With any other the host waits for the device in each step.

    An optimizer that steps inside of backward, in a hook on the accumulation of a gradient, can clip by parameter or by
    value. Any other rule is an error then.

    With `fold` the optimizer itself does the scaling. That costs a read of the gradients for the norm, and the write
    that torch's fused kernels make of what they divide; clipping ahead of the step costs a read, and a second read and
    a write where there is something to clip. So folding pays where most steps are clipped. The optimizer divides by
    ``1 / coefficient`` in fp32: gradients differ from those clipped ahead of the step by rounding, at most 4 * 2**-24
    of their size before they are rounded to a narrower dtype, and not at all where the coefficient is 1. Where the
    divisor is beyond fp32 (a norm of 2**128 times the bound), gradients become 0. Of torch's fused optimizers only Adam
    and AdamW take DTensors; of one that is placed otherwise than its parameter a temporary is divided, not ``.grad``.
    Gradients that share memory are divided for each of their parameters when it is that one's turn. A state dict whose
    groups are not fused is refused before any of it is loaded.

    What is clipped is ``.grad`` itself: once the step is over it holds what the optimizer was given. With `fold`, too,
    which leaves it as it was up to the step. With `keep_grads` the step is given copies, clipped, and ``.grad`` is as
    it was afterwards, to be logged or accumulated further: a pass more, and the gradients' bytes again for the time of
    the step. Where the optimizer itself raises, the copies stay.

    Where the optimizer's own ``step`` calls that of its base class, it is the outer one that is clipped; the gradients
    of a closure that it makes itself are not.

    Where a step raises once the rule has been applied (in another hook, say), what was set for that step
    (``grad_scale``, ``found_inf``, the gradients that were taken away from a step to be skipped) is put back when the
    next step begins, or by ``detach()``. ``scaler.step`` is ahead of that: it multiplies its scale into the
    ``grad_scale`` that is still there (that of `fold`, or, with fastclip or without, its own), unless
    ``scaler.unscale_`` has been called. So ``del optimizer.grad_scale`` first.

    Args:
        optimizer: Any `torch.optim.Optimizer`.
        rule: What to clip by; None, where a monitor is given, watches only.
        clipnorm: As in Keras, above 0, or 0 for nothing.
        clipvalue: As in Keras, above 0, or 0 for nothing.
        global_clipnorm: As in Keras, above 0, or 0 for nothing.
        monitor: Is told of every step, and may skip it.
        names: The model, or its ``named_parameters()``, for rules and messages that go by names; all of the optimizer's
            parameters must be there. The optimizer knows them itself if it was made from ``model.named_parameters()``,
            and so does a monitor made from a model.
        fold: Have the optimizer apply the coefficient: torch's Adam, AdamW, SGD or Adagrad with ``fused=True``, and a
            rule that has one coefficient for all gradients.
        keep_grads: Leave ``.grad`` as it is, and clip copies for the step.

    Returns:
        The attachment: ``norm`` and ``clipped`` tell of the last step, ``detach()`` ends it.

    Raises:
        RuntimeError: In a step: it is inside of backward, and the rule is neither by parameter nor by value; or no
            gradient is left, because other optimizers have stepped there; or values are clipped, and carry the scale of
            a GradScaler.
        TypeError: `optimizer` is no `torch.optim.Optimizer`, or wraps one; `rule` is no rule, or `monitor` no monitor.
        ValueError: Not exactly one rule is given, its bounds do not fit, the optimizer has an attachment already,
            `names` or the monitor has not its parameters, or the optimizer or the rule is none for `fold`. In
            ``optimizer.load_state_dict``: with `fold`, a group of the state dict is not fused.

    Example:
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> clipper = fastclip.attach(optimizer, global_clipnorm=1.0)
        >>> loss.backward()
        >>> optimizer.step()
        >>> print(clipper.norm, clipper.clipped)
    """
    check_is_optimizer(optimizer)
    if monitor is not None and not isinstance(getattr(monitor, "owners", None), Owners):
        raise TypeError(f"`monitor` must be a fastclip.Monitor, not {monitor!r}")
    owners_of_hooks = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()]
    if any(isinstance(owner, Attachment) and owner.is_attached for owner in owners_of_hooks):
        raise ValueError("the optimizer has a rule attached already: detach() it first")
    chosen = _one_of(rule, clipnorm, clipvalue, global_clipnorm)
    is_off = chosen is None and any(bound is not None for bound in (clipnorm, clipvalue, global_clipnorm))
    if chosen is None and monitor is None and not is_off:
        raise ValueError("nothing to attach: give a rule, one of clipnorm, clipvalue, global_clipnorm, or a monitor")
    return Attachment(optimizer, chosen, monitor, names, fold=fold and not is_off, keep_grads=keep_grads)


class Attachment:
    """A rule at work in an optimizer; made by `attach`.

    Attributes:
        rule: The rule; None where a monitor only watches.
        monitor: The monitor that is told of every step, if any.
        norm: The 2-norm of all gradients at the last step, before clipping: 0-dim, fp64, on their device. None before
            the first step. To look at the number is to wait for the device.
        result: All that the last step found; None before the first step, and when it was restored from a state dict.
        is_attached: Whether it still clips.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: AnyRule | None,
        monitor: Monitor | None,
        names: nn.Module | Iterable[tuple[str, Tensor]] | None,
        *,
        fold: bool,
        keep_grads: bool,
    ) -> None:
        self.rule = rule
        self.monitor = monitor
        self.norm: Tensor | None = None
        self.result: ClipResult | None = None
        self._kind = type(optimizer).__name__
        self._names = _names_by_id(names)
        self._folds = fold
        self._keeps_grads = keep_grads
        self._members: tuple[list[list[int]], Owners, Groups] | None = None
        self._clipped: Tensor | None = None  # as it was restored
        self._undo: list[Callable[[], None]] = []
        self._give_back: Callable[[], None] | None = None  # of the gradients, where the step has copies
        self._restored: dict[str, Any] | None = None
        self._stepping: Optimizer | None = None  # stays where a step raises
        self._calls_another = False  # whether a step was seen to call that of a base class
        self.is_attached = True
        _, groups = self._find_members(optimizer)  # what does not fit is refused here rather than at the first step
        if fold:
            check_divides(optimizer)
            check_foldable(rule, groups)
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._take),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]

    @property
    def clipped(self) -> Tensor | None:
        """Whether the last step was clipped: 0-dim bool, on the device. None before the first step."""
        return self._clipped if self.result is None else self.result.clipped

    def __repr__(self) -> str:
        state = "attached to" if self.is_attached else "detached from"
        return f"<{self.rule or self.monitor or 'nothing'} {state} {self._kind}>"

    def detach(self) -> None:
        """End it: the optimizer steps as before. What the last step found stays readable."""
        self.is_attached = False
        if self._stepping is not None and is_stepping(self._stepping):
            return  # torch is going through its hooks: they stay, put back what was lent, and do nothing
        self._give_back = None
        self._end_step()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Clip; or, where there is a closure, have the gradients clipped that it will leave."""
        if self._stepping is not None and is_in_another_step(optimizer):
            self._calls_another = True
            return None  # the gradients were clipped ahead of the outer step
        self._give_back = None  # since a step that raised there may have been another backward
        self._end_step()  # which it did not get to
        self._stepping = optimizer
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if not callable(closure):
            self._clip(optimizer)
            return None

        def clipped_closure() -> Any:
            self._put_back()  # an optimizer may evaluate it several times a step
            loss = closure()
            if self.is_attached and self.monitor is not None and loss is not None:
                self.monitor.record_loss(loss)
            self._clip(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], clipped_closure, *args[2:]), kwargs
        return args, {**kwargs, "closure": clipped_closure}

    @untraced
    @torch.no_grad()
    def _clip(self, optimizer: Optimizer) -> None:
        if not self.is_attached:
            return
        owners, groups = self._find_members(optimizer)
        rule = None if isinstance(self.rule, ClipByValue) else self.rule
        if rule is not None and rule.by != "parameter" and torch._C._current_graph_task_id() >= 0:
            raise RuntimeError(
                f"{rule} is attached to an optimizer that steps inside of backward, where the other gradients are "
                "not there yet: attach a rule by parameter (clipnorm=1.0) or by value (clipvalue=1.0), or step after "
                "backward"
            )
        scale = getattr(optimizer, "grad_scale", None)  # as GradScaler sets it for fused optimizers
        if scale is not None and isinstance(self.rule, ClipByValue):
            raise RuntimeError(
                f"{self.rule} is attached, but the gradients still carry the scale of GradScaler: call "
                "scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        if not self._keeps_grads:
            self._apply(optimizer, owners, groups, scale)
            return
        self._give_back = lend_copies(owners)
        try:
            self._apply(optimizer, owners, groups, scale)
        except BaseException:
            self._put_back()
            raise

    def _apply(self, optimizer: Optimizer, owners: Owners, groups: Groups, scale: Tensor | None) -> None:
        grads = gradients_of(owners)
        if self._folds:
            check_fused(optimizer)
            check_foldable(self.rule, groups)
            check_layout(grads)
        each = self.monitor is not None
        result = apply_rule(grads, self.rule, groups, each=each, scale=scale, write=not self._folds)
        self.result, self.norm = result, result.norm
        skip = None if self.monitor is None else self.monitor.update(result)  # which may raise: nothing is lent yet
        if self._folds and result.coefficients is not None:
            divisor = (1.0 if scale is None else on(result.norm.device, scale)) / result.coefficients[0]
            self._undo.append(lend(optimizer, "grad_scale", divisor.float()))
        if skip is not None and self.monitor is not None and self.monitor.skips:
            self._undo += skip_step(optimizer, owners, skip)

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        if not (self._calls_another and is_in_another_step(optimizer)):
            self._end_step()

    def _end_step(self) -> None:
        self._stepping = None
        self._put_back()

    @untraced
    def _put_back(self) -> None:
        """Put back what was changed for the step."""
        while self._undo:
            self._undo.pop()()
        if self._give_back is not None:
            self._give_back()
            self._give_back = None

    def _find_members(self, optimizer: Optimizer) -> tuple[Owners, Groups]:
        """The optimizer's parameters and their groups; found anew only where the optimizer has other parameters."""
        ids = [list(map(id, group_["params"])) for group_ in optimizer.param_groups]
        if self._members is None or self._members[0] != ids:
            owners = list_owners(optimizer.param_groups, "optimizer.param_groups")
            if self._names:
                owners = owners._replace(names=_named(owners.tensors, self._names))
            if self.monitor is not None:
                owners = _in_order_of(self.monitor.owners, owners)
            self._members = (ids, owners, _grouped(owners, self.rule))
        return self._members[1:]

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        if not self.is_attached:
            return
        state: dict[str, Any] = {"norm": self.norm, "clipped": self.clipped}
        if self.rule is not None:
            state["rule"] = state_of(self.rule, self._find_members(optimizer)[1].labels)
        if self.monitor is not None:
            state["monitor"] = self.monitor.state_dict()
        state_dict[_STATE] = state

    def _take(self, _: Optimizer, state_dict: dict[str, Any]) -> None:
        if self._folds and self.is_attached:
            check_fused_state(state_dict)
        self._restored = state_dict.get(_STATE)

    def _load(self, optimizer: Optimizer) -> None:
        """Restore, now that torch has found nothing wrong with the rest of the state."""
        state, self._restored = self._restored, None
        if state is None or not self.is_attached:
            return
        owners, groups = self._find_members(optimizer)
        if self.rule is not None and "rule" in state:
            rule = from_state(self.rule, groups.labels, state["rule"])
            groups = _grouped(owners, rule)  # raises where it does not fit
            if self._folds:
                check_foldable(rule, groups)
            self.rule = rule
        if self.monitor is not None and "monitor" in state:
            self.monitor.load_state_dict(state["monitor"])
        self.norm, self._clipped, self.result = state["norm"], state["clipped"], None
        self._members = None  # the groups are those of the restored rule


def _one_of(
    rule: AnyRule | Callable[[Tensor], Tensor] | None,
    clipnorm: float | None,
    clipvalue: float | None,
    global_clipnorm: float | None,
) -> AnyRule | None:
    """The one rule that is given, in whichever way; None where there is none, or it is off."""
    given: dict[str, Any] = {
        "rule": rule,
        "clipnorm": clipnorm,
        "clipvalue": clipvalue,
        "global_clipnorm": global_clipnorm,
    }
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"only one rule can be attached, not {' and '.join(named)} together")
    if rule is not None:
        return as_rule(rule)
    for name in named:  # the only one
        bound = given[name]
        return None if real(name, bound) == 0 else _RULES_OF_KERAS[name](positive(name, bound))
    return None


_RULES_OF_KERAS: dict[str, Callable[[float], AnyRule]] = {
    "clipnorm": ClipByNorm,
    "clipvalue": lambda bound: ClipByValue(-bound, bound),
    "global_clipnorm": ClipByGlobalNorm,
}


def _grouped(owners: Owners, rule: AnyRule | None) -> Groups:
    """The groups of a rule, which its bounds fit."""
    groups = group(owners, "global" if rule is None else rule.by)
    if rule is not None:
        rule.for_groups(groups.labels)
    return groups


def _names_by_id(names: nn.Module | Iterable[tuple[str, Tensor]] | None) -> dict[int, str]:
    if names is None:
        return {}
    owners = list_owners(names, "names")
    if owners.names is None:
        raise TypeError("`names` must be a model or its named_parameters()")
    return {id(tensor): name for tensor, name in zip(owners.tensors, owners.names, strict=True)}


def _named(tensors: list[Tensor], names: dict[int, str]) -> list[str]:
    missing = [position for position, tensor in enumerate(tensors) if id(tensor) not in names]
    if missing:
        shape = tuple(tensors[missing[0]].shape)
        raise ValueError(f"`names` has no name for the optimizer's parameter {missing[0]}, of shape {shape}")
    return [names[id(tensor)] for tensor in tensors]


def _in_order_of(watched: Owners, owners: Owners) -> Owners:
    """The optimizer's parameters in the order in which a monitor watches them, by the names it knows."""
    positions = {id(tensor): position for position, tensor in enumerate(owners.tensors)}
    others = [position for position, tensor in enumerate(watched.tensors) if id(tensor) not in positions]
    if others or len(watched.tensors) != len(owners.tensors):
        culprit = "some of the optimizer's are missing"
        if others:
            name = watched.names[others[0]] if watched.names else f"parameters[{others[0]}]"
            culprit = f"{name!r} is not the optimizer's"
        raise ValueError(
            f"the monitor watches {len(watched.tensors)} parameters, which are not the {len(owners.tensors)} of the "
            f"optimizer: {culprit}. Make the monitor from just those that are optimized, for example "
            "[(name, p) for name, p in model.named_parameters() if p.requires_grad]"
        )
    order = [positions[id(tensor)] for tensor in watched.tensors]
    groups = None if owners.groups is None else [owners.groups[i] for i in order]
    names = watched.names or (None if owners.names is None else [owners.names[i] for i in order])
    return Owners(watched.tensors, names, groups, owners.group_count)
