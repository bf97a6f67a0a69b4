"""`attach`: read the arguments, and raise here rather than in a step if they do not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from fastclip.core.owners import Owners
from fastclip.foundation.arguments import positive, real
from fastclip.rules.catalogue import AnyRule, AsRule, as_rule
from fastclip.rules.formulas import ClipByGlobalNorm, ClipByNorm, ClipByValue
from fastclip.training import folding
from fastclip.training.attachment import Attachment, check_is_free
from fastclip.training.members import Members
from fastclip.training.optimizers import check_is_optimizer

if TYPE_CHECKING:
    from fastclip.monitoring.monitor import Monitor


def attach(
    optimizer: Optimizer,
    rule: AsRule | None = None,
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

    The rule is an object such as `fastclip.ClipByNorm` (see `fastclip.rules.formulas`), or a function from norms to
    coefficients. Instead of `rule` you can give one of
    the arguments of Keras' optimizers:

    =====================  ===================================================================================
    ``clipnorm=c``         :math:`g_t \leftarrow g_t \cdot c / \max(\|g_t\|_2, c)`, each parameter by itself
    ``clipvalue=c``        :math:`g_i \leftarrow \min(\max(g_i, -c), c)`
    ``global_clipnorm=c``  :math:`g_t \leftarrow g_t \cdot \min(c / \|g\|_2, 1)`, all parameters together
    =====================  ===================================================================================

    As in Keras, 0 turns clipping off: norms are measured, and nothing is clipped.

    **What is clipped.** ``.grad`` itself: after the step it holds the gradients that the optimizer used. That is true
    with `fold`, too, which does not change ``.grad`` before the step. With `keep_grads` the step uses clipped copies,
    and afterwards ``.grad`` is what it was before the step, so that you can log it or accumulate further. This costs
    one more pass and, during the step, the gradients' bytes again. If the optimizer itself raises, the copies stay.

    **Folding.** With `fold` the optimizer itself scales the gradients. This costs one read of the gradients for the
    norm, and the write of torch's fused kernels, which store what they divide. Clipping before the step costs one read,
    and a second read and a write if there is something to clip. So folding pays if most steps are clipped.

    With `fold` the optimizer divides by ``1 / coefficient`` in fp32. So its gradients differ by rounding from those
    clipped before the step: at most by 4 * 2**-24 of their size, before they are rounded to a narrower dtype, and not
    at all if the coefficient is 1. If the divisor is beyond fp32 (a norm of 2**128 times the bound), gradients become
    0. Of torch's fused optimizers only Adam and AdamW accept DTensors; for a gradient with other placements than its
    parameter they divide a temporary, and not ``.grad``. Gradients that share memory are divided once for each of their
    parameters, when the optimizer comes to that parameter. ``load_state_dict`` rejects a state dict whose groups are
    not fused, before it loads any of it.

    **GradScaler.** With a `torch.amp.GradScaler`, fused optimizers get scaled gradients. Norms are measured without the
    scale.

    **Skipped steps.** A monitor may skip a step. Fused optimizers need no sync for this, because they read
    ``found_inf`` on the device (fused SGD only once it has its momentum). With any other optimizer the host waits for
    the device in each step.

    **Steps inside of backward.** An optimizer that steps inside of backward, in a hook on the accumulation of a
    gradient, can clip by parameter, by unit or by value. Any other rule, and `ClipByEMA`, whose warm-up needs the
    global norm, raises an error in the step.

    **Nested steps.** If the optimizer's own ``step`` calls that of its base class, gradients are clipped once, before
    the outer step. If the optimizer's own ``step`` makes a closure, the gradients of that closure are not clipped.

    **Steps that raise.** If a step raises after the rule was applied (in another hook, for example), the changes for
    that step are undone when the next step begins, or by ``detach()``. These changes are ``grad_scale``, ``found_inf``,
    and gradients removed to skip the step. But ``scaler.step`` runs before that. Unless ``scaler.unscale_`` was called,
    it multiplies its scale into the ``grad_scale`` that is still set: by `fold` or, with fastclip or without, by the
    scaler itself. So ``del optimizer.grad_scale`` first.

    **Checkpoints.** The optimizer's state dict holds the rule and the results of the last step, under the key
    ``"fastclip"``. Loading it restores them if the optimizer has an attachment. An optimizer without one ignores them,
    and so does ``torch.distributed.checkpoint``. (That fills the state of an optimizer that has not stepped yet by a
    step with gradients of 0, which is a step like any other to the rule and the monitor.) A copied or pickled optimizer
    has no attachment, because torch does not copy hooks.

    Args:
        optimizer: Any `torch.optim.Optimizer`.
        rule: What to clip by. None, with a monitor, only watches.
        clipnorm: As in Keras: above 0, or 0 for no clipping.
        clipvalue: As in Keras: above 0, or 0 for no clipping.
        global_clipnorm: As in Keras: above 0, or 0 for no clipping.
        monitor: Is told of every step, and may skip it.
        names: The model, or its ``named_parameters()``, for rules and messages that use names. It must have all of the
            optimizer's parameters. It is not needed if the optimizer was made from ``model.named_parameters()``, or the
            monitor from a model.
        fold: Let the optimizer scale the gradients. The optimizer is torch's Adam, AdamW, SGD or Adagrad with
            ``fused=True``, and the rule has one coefficient for all gradients.
        keep_grads: Do not change ``.grad``; clip copies for the step.

    Returns:
        The attachment: ``norm`` and ``clipped`` describe the last step, ``detach()`` ends it.

    Raises:
        RuntimeError: In a step: it is inside of backward, and the rule needs all gradients; or no
            gradient is left, because other optimizers have stepped there; or the rule is by value, and the gradients
            carry the scale of a GradScaler.
        TypeError: `optimizer` is not a `torch.optim.Optimizer`, or wraps one; `rule` is not a rule; or `monitor` is not
            a monitor.
        ValueError: Several rules are given, or neither a rule nor a monitor; the rule's bounds do not fit; `optimizer`
            already has an attachment; an adaptive rule is attached to another optimizer; `names` or the monitor does
            not have its parameters; or `fold` does not work with the optimizer or the rule. In
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
    hook_owners = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()]
    if any(isinstance(owner, Attachment) and owner.is_attached for owner in hook_owners):
        raise ValueError("the optimizer has a rule attached already: detach() it first")
    chosen, is_off = _read_rule(rule, clipnorm, clipvalue, global_clipnorm)
    if chosen is None and monitor is None and not is_off:
        raise ValueError("nothing to attach: give a rule, one of clipnorm, clipvalue, global_clipnorm, or a monitor")
    check_is_free(chosen)
    members = Members(names, None if monitor is None else monitor.owners)
    _, groups = members.find(optimizer, chosen)
    fold = fold and not is_off
    if fold:
        folding.check_optimizer(optimizer)
        folding.check_rule(chosen, groups)
    return Attachment(optimizer, chosen, monitor, members, fold=fold, keep_grads=keep_grads)


def _read_rule(
    rule: AsRule | None,
    clipnorm: float | None,
    clipvalue: float | None,
    global_clipnorm: float | None,
) -> tuple[AnyRule | None, bool]:
    """Return the only rule among the arguments, if there is one, and whether it is off: a bound of 0."""
    bounds = {"clipnorm": clipnorm, "clipvalue": clipvalue, "global_clipnorm": global_clipnorm}
    arguments: dict[str, Any] = {"rule": rule, **bounds}
    given = [name for name, value in arguments.items() if value is not None]
    if len(given) > 1:
        raise ValueError(f"only one rule can be attached, not {' and '.join(given)} together")
    if not given:
        return None, False
    if rule is not None:
        return as_rule(rule), False
    name = given[0]
    if real(name, bounds[name]) == 0:
        return None, True
    return _RULES_OF_KERAS[name](positive(name, bounds[name])), False


_RULES_OF_KERAS: dict[str, Callable[[float], AnyRule]] = {
    "clipnorm": ClipByNorm,
    "clipvalue": lambda bound: ClipByValue(-bound, bound),
    "global_clipnorm": ClipByGlobalNorm,
}
