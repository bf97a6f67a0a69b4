r"""Adaptive rules: each finds its bound from the norms of the steps before.

    norms, state of earlier steps --rule--> coefficients, state

A group's state is a row of fp64 numbers on the gradients' device, the number of observations among them. A step reads
and writes it there: no sync, one launch on a GPU, and a CUDA graph that replays the step counts on.

*An observation is a norm above 0 in a step whose gradients are all finite* (and below 1e150, so that its square is
finite, too): nothing else enters the state. So neither a NaN, nor an overflow of `torch.amp.GradScaler`, nor a
parameter without gradient leaves a trace. If a norm is infinite and there is a threshold, its group becomes 0
(infinite elements NaN); if it is NaN, the group stays as it is: add `fastclip.NonFinite` with ``action="skip"``.

The state lives in the rule. So each set of parameters needs a rule of its own: two models that `clip_grads_` clips by
one rule are told apart by the labels of their groups, and by the global norm not at all. `fastclip.attach` saves and
restores the state with the optimizer's; without it, call ``state_dict`` and ``load_state_dict``. Every process of a
distributed training sees the same norms, so the states stay equal without communication.

Below, x is a group's norm, T its threshold, k its coefficient: :math:`g \leftarrow k g`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastclip.backends import GENERAL, for_each_step
from fastclip.backends.interface import Adaptation
from fastclip.foundation.arguments import check_count, check_flag, check_real, positive
from fastclip.foundation.tracing import is_traced
from fastclip.rules.formulas import Decision, Measured
from fastclip.rules.groups import By
from fastclip.rules.memory import Memory

_MODES = ("reciprocal", "mean", "max")


@dataclass(frozen=True)
class AdaptiveRule(ABC):
    """The base of the adaptive rules. Copies made by `copy.copy` share the state; those of `copy.deepcopy` do not."""

    memory: Memory = field(init=False, repr=False, compare=False)
    if TYPE_CHECKING:  # the last field of every rule

        @property
        def by(self) -> By:
            """What a group is."""

    def __post_init__(self) -> None:
        self._check()
        for entry in fields(self):
            value = getattr(self, entry.name, None)
            if isinstance(value, np.generic):  # a checkpoint can hold Python's numbers, but not NumPy's
                object.__setattr__(self, entry.name, value.item())
        object.__setattr__(self, "memory", Memory(self._first_row()))

    @abstractmethod
    def _check(self) -> None:
        """Raise if a setting is out of range."""

    @abstractmethod
    def _first_row(self) -> Sequence[float]:
        """The state of a group that nothing is known of."""

    @abstractmethod
    def _as_numbers(self) -> Adaptation:
        """Return the settings as numbers for `fastclip.backends`."""

    @cached_property
    def _adaptation(self) -> Adaptation:
        return self._as_numbers()

    def decide(self, measured: Measured) -> Decision:
        """Return coefficients and thresholds, and enter the norms into the state.

        While torch records its operations or replaces tensors by fake ones, nothing is known and nothing is learned.
        """
        labels, norms, total, _ = measured
        if is_traced():
            return Decision(*GENERAL.adapt(self._adaptation, self.memory.cold(len(labels), norms), norms, total))
        rows = self.memory.rows(labels, norms)
        return Decision(*for_each_step(norms.device).adapt(self._adaptation, rows, norms, total))

    def for_groups(self, labels: Sequence[Hashable]) -> AdaptiveRule:
        """Return the rule itself, after a check that its state belongs to these groups.

        Raises:
            ValueError: The rule has learned the norms of other groups.
        """
        self.memory.check(labels)
        return self

    def settings(self, labels: Sequence[Hashable]) -> dict[str, Any]:  # noqa: ARG002 - the signature is that of other rules
        """Return the fields as plain data for a checkpoint. `by` is left out if it is a function."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}
        return {name: value for name, value in values.items() if not callable(value)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state: the groups' labels, and a row for each. `attach` saves it with the optimizer's."""
        return {"rule": type(self).__name__, **self.memory.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`. Groups are found by label; unknown ones start cold, with a warning.

        Raises:
            ValueError: `state` is not the state of a rule with the same settings.
        """
        if state.get("rule") != type(self).__name__:
            raise ValueError(
                "this is not what state_dict() of an adaptive rule with the same settings returned: it is of "
                f"{state.get('rule')}, and this is a {type(self).__name__}"
            )
        self.memory.load_state_dict(state)


@dataclass(frozen=True)
class ClipByQuantile(AdaptiveRule):
    r"""Clip each group to a quantile of its last norms (AutoClip); by default all gradients are one group.

    .. math::
        T = \min\big(\text{cap},\; \text{factor} \cdot Q_q(\text{last window observations})\big), \qquad
        k = \min\Big(\frac{T}{x + 10^{-6}},\; 1\Big)

    Q interpolates linearly, as NumPy's ``quantile``. Before `warmup` observations only `cap` clips.

    It follows any change of the norms within a window, at the price that a share of about 1 - q of all steps is clipped
    (with ``factor=1``), however calm the training is.

    ==================  =================================================================================
    AutoClip (2020)     ``q=0.1, window=10_000, include_current=True``; the authors keep all norms
    package autoclip    ``q=0.9, window=1000``
    TRELLIS             ``q=0.95, window=1000, warmup=1000, cap=1.0``
    icefall             ``q=0.5, window=100, factor=2, include_current=True, every=100``; icefall also sets T
                        early, to twice as much, at steps 10, 20 and 40
    ==================  =================================================================================

    Args:
        q: The quantile, from 0 to 1.
        window: How many observations it is taken of, at most 16384.
        factor: What it is multiplied by, above 0.
        cap: The largest threshold; also what clips during the warm-up. None is no cap.
        include_current: Whether the norm of this step is one of the observations.
        warmup: The number of observations before the first threshold.
        every: Renew the threshold after every so many observations.
        by: What a group is.

    Raises:
        TypeError: A setting is not a number.
        ValueError: A setting is out of range.

    References:
        Seetharaman, Wichern, Pardo, Le Roux, "AutoClip: Adaptive Gradient Clipping for Source Separation Networks",
        2020, arXiv:2007.14469.
    """

    q: float = 0.9
    window: int = 1000
    _: KW_ONLY
    factor: float = 1.0
    cap: float | None = None
    include_current: bool = False
    warmup: int = 1
    every: int = 1
    by: By = "global"

    def _check(self) -> None:
        _check_numbers(q=self.q, factor=self.factor, cap=self.cap)
        check_flag("include_current", self.include_current)
        if not 0 <= self.q <= 1:
            raise ValueError(f"`q` must be from 0 to 1, not {self.q}")
        for name in ("window", "warmup", "every"):
            check_count(name, getattr(self, name))
        if self.window > _LARGEST_WINDOW:
            raise ValueError(f"`window` must be at most {_LARGEST_WINDOW}, not {self.window}")
        positive("factor", self.factor)
        _check_cap("cap", self.cap)

    def _first_row(self) -> Sequence[float]:
        return [0.0, *[math.inf] * (1 + 2 * self.window)]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """As that of every adaptive rule. Kernels trust the windows: the sorted one must be the other one, sorted."""
        rows = state.get("rows")
        if isinstance(rows, Tensor) and rows.shape[1:] == (2 + 2 * self.window,):
            windows = rows[:, 2:].reshape(-1, 2, self.window)
            if not torch.equal(windows[:, 0].sort(1).values, windows[:, 1]):
                raise ValueError("the state of a ClipByQuantile is broken: its sorted window is not that of its window")
        super().load_state_dict(state)

    def _as_numbers(self) -> Adaptation:
        numbers = (self.window, self.q, self.factor, _or_inf(self.cap), self.warmup, self.every, self.include_current)
        return Adaptation("quantile", tuple(map(float, numbers)))


@dataclass(frozen=True)
class ClipByZScore(AdaptiveRule):
    r"""Clip a group whose norm is an outlier among its last norms (ZClip); by default all gradients are one group.

    With mean m and variance v of the observations before, and :math:`\zeta = (x - m) / (\sqrt v + 10^{-6})`:

    .. math::
        T = \begin{cases}
            \text{factor} \cdot (m + z^2 \sqrt v / \zeta) & \text{if } \zeta > z \text{ ("reciprocal")} \\
            m & \text{if } \zeta > z \text{ ("mean")} \\
            m + z \sqrt v & \text{if } x > m + z \sqrt v \text{ ("max")} \\
            x & \text{else}
        \end{cases}, \qquad
        k = \frac{T'}{x + 10^{-6}} \text{ if } x > T' = \min(T, \text{cap}), \text{ else } 1

    The statistics are those of the first `warmup` observations, in which only `cap` clips. After it

    .. math:: m \leftarrow \alpha m + (1 - \alpha) T, \qquad v \leftarrow \alpha v + (1 - \alpha) (T - m)^2

    with the new m in the second; `freeze` leaves both after an outlier, which is a norm of the first three lines.

    **A lasting rise.** In the modes "reciprocal" and "mean" the statistics see clipped norms only, and may never
    follow: of norms that doubled, with 10 % noise, all were still clipped 2,800 steps later. "max" recovers (in 22
    steps there), but with `freeze` no mode does. With `relearn`, after so many outliers in a row the rule forgets all
    and warms up again.

    ====================  ===============================================================================
    ZClip (2025)          ``cap=1.0``; the authors' code clips at 1.0 whatever else it finds
    Open-Sora Plan 1.5    ``mode="max", z=3.0, alpha=0.99, freeze=True``
    ====================  ===============================================================================

    Args:
        alpha: The share of the old averages' weight that remains after a step, from 0 to below 1.
        z: From how many standard deviations above the mean on a norm is an outlier, above 0.
        warmup: The number of observations before the first threshold.
        cap: The largest threshold; also what clips during the warm-up. None is no cap.
        mode: What an outlier is clipped to: "reciprocal" is the lower the larger it is; "mean"; "max" is the largest
            norm that is no outlier.
        factor: What T is multiplied by in the mode "reciprocal".
        freeze: Leave the statistics as they are after an outlier.
        relearn: After so many outliers in a row, warm up again. None never does, as the authors.
        by: What a group is.

    Raises:
        TypeError: A setting is not a number.
        ValueError: A setting is out of range.

    References:
        Kumar, Owen, Chowdhury, Güra, "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025, arXiv:2504.02507.
    """

    alpha: float = 0.97
    z: float = 2.5
    _: KW_ONLY
    warmup: int = 25
    cap: float | None = None
    mode: Literal["reciprocal", "mean", "max"] = "reciprocal"
    factor: float = 1.0
    freeze: bool = False
    relearn: int | None = None
    by: By = "global"

    def _check(self) -> None:
        _check_numbers(alpha=self.alpha, z=self.z, cap=self.cap, factor=self.factor)
        check_flag("freeze", self.freeze)
        _check_decay("alpha", self.alpha)
        positive("z", self.z)
        check_count("warmup", self.warmup)
        _check_cap("cap", self.cap)
        if self.mode not in _MODES:
            raise ValueError(f"`mode` must be one of {', '.join(map(repr, _MODES))}, not {self.mode!r}")
        if positive("factor", self.factor) != 1 and self.mode != "reciprocal":
            raise ValueError(f"`factor` is for the mode 'reciprocal' only, not for {self.mode!r}")
        if self.relearn is not None:
            check_count("relearn", self.relearn)

    def _first_row(self) -> Sequence[float]:
        return [0.0] * 4

    def _as_numbers(self) -> Adaptation:
        mode, relearn = _MODES.index(self.mode), _or_inf(self.relearn)
        numbers = (self.alpha, self.z, self.warmup, _or_inf(self.cap), mode, self.factor, self.freeze, relearn)
        return Adaptation("z_score", tuple(map(float, numbers)))


@dataclass(frozen=True)
class ClipByEMA(AdaptiveRule):
    r"""Clip each group relative to the average of its own clipped norms (AdaGC); by default each parameter is a group.

    In the first `warmup` observations of a group, it is clipped by the norm X of all gradients, and the average
    :math:`\gamma` is the smallest norm that this left:

    .. math::
        k = \min\Big(\frac{\text{max\_norm}}{X + 10^{-6}},\; 1\Big), \qquad \gamma \leftarrow \min(\gamma,\; k x)

    (by the global norm: :math:`\min(\gamma, X, \text{max\_norm})`.) After that

    .. math::
        T = \text{ratio} \cdot \gamma, \qquad k = \frac{T}{x + 10^{-6}} \text{ if } x > T, \text{ else } 1, \qquad
        \gamma \leftarrow \beta \gamma + (1 - \beta) \min(x, T)

    So the average rises by at most a share (1 - beta)(ratio - 1) a step: by default 0.04 %, and it takes 1,733 steps to
    double. It clips often: of norms with 10 % noise every second one, and 3 % with ``ratio=1.2``.

    Args:
        ratio: What the average is multiplied by, at least 1.
        beta: The share of the old average's weight that remains after a step, from 0 to below 1.
        warmup: The number of observations of a group before its first own threshold.
        max_norm: The largest global norm in the warm-up, above 0.
        by: What a group is.

    Raises:
        TypeError: A setting is not a number.
        ValueError: A setting is out of range.

    References:
        Wang et al., "AdaGC: Improving Training Stability for Large Language Model Pretraining", 2025, arXiv:2502.11034.
    """

    ratio: float = 1.04
    beta: float = 0.99
    _: KW_ONLY
    warmup: int = 100
    max_norm: float = 1.0
    by: By = "parameter"

    def _check(self) -> None:
        _check_numbers(ratio=self.ratio, beta=self.beta, max_norm=self.max_norm)
        if not 1 <= self.ratio < math.inf:
            raise ValueError(f"`ratio` must be at least 1 and finite, not {self.ratio}")
        _check_decay("beta", self.beta)
        check_count("warmup", self.warmup)
        positive("max_norm", self.max_norm)

    def _first_row(self) -> Sequence[float]:
        return [0.0, math.inf]

    def _as_numbers(self) -> Adaptation:
        numbers = (self.ratio, self.beta, self.warmup, self.max_norm, self.by == "global")
        return Adaptation("ema", tuple(map(float, numbers)))


_LARGEST_WINDOW = 1 << 14


def _check_numbers(**settings: float | None) -> None:
    for name, value in settings.items():
        if value is not None or name != "cap":
            check_real(name, value)


def _check_cap(name: str, cap: float | None) -> None:
    if cap is not None:
        positive(name, cap)


def _check_decay(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"`{name}` must be from 0 to below 1, not {value}")


def _or_inf(number: float | None) -> float:
    return math.inf if number is None else number
