"""A monitor: what every step of training looked like, from the vector of norms that clipping leaves anyway.

    ClipResult, loss --update--> a row of numbers on the device --look--> averages, triggers, history, sinks on the host

A step costs one concatenation. The host *looks* at the rows of all steps since it last did: one transfer, one wait for
the device. Averages and triggers are worked out then, unless one of them has to skip steps: then they are worked out in
the step, by the same operations on the device.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastclip.core.gradients import Parameters, as_gradients, check_whole
from fastclip.core.sharding import prepare
from fastclip.foundation.arguments import check_count, check_real
from fastclip.foundation.devices import on
from fastclip.foundation.tracing import untraced
from fastclip.foundation.warn import warn_caller
from fastclip.monitoring.averages import Averages
from fastclip.monitoring.history import History, Row
from fastclip.monitoring.sinks import Sink, as_sink
from fastclip.monitoring.triggers import SERIES, Moment, Report, Trigger, TriggerError
from fastclip.rules.apply import ClipResult
from fastclip.rules.groups import By, group

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Step(NamedTuple):
    """A step as it is kept: on the device until the host has looked.

    Attributes:
        number: The step's number.
        has_loss: Whether there was a loss.
        has_coefficient: Whether gradients were clipped by norm.
        has_clipped_norm: Whether it is known what their norm was afterwards.
        present: The positions of the parameters that had a gradient.
        numbers: All else, as one vector: see `_Parts`.
        clip_rate: The share of the steps up to this one in which anything was clipped; known once the host has looked.
    """

    number: int
    has_loss: bool
    has_coefficient: bool
    has_clipped_norm: bool
    present: Sequence[int]
    numbers: Tensor
    clip_rate: float = math.nan


class _Parts(NamedTuple):
    """The parts of a step's numbers, or, [steps, ...], of several steps'.

    Attributes:
        values: Loss and norm, [2].
        coefficient: The smallest of the groups', [1].
        clipped: 1 or 0, [1].
        clipped_norm: The norm after clipping, [1].
        norms: Those of the gradients, [parameters].
        weights: The norms of the parameters, [parameters], or [0] where they are not taken.
        before: The state of the averages before the step, [3 x 2].
        fired: Which triggers fired, 1 or 0, [triggers].
    """

    values: Tensor
    coefficient: Tensor
    clipped: Tensor
    clipped_norm: Tensor
    norms: Tensor
    weights: Tensor
    before: Tensor
    fired: Tensor


@dataclass
class _Log:
    """A sink, how often rows are handed to it, and the last step it was given."""

    sink: Sink
    every: int
    until: int


class Monitor:
    """Watches training: norms, losses, what was clipped; calls attention to what is unusual.

    It takes the result of each clipping step::

        monitor = Monitor(model, triggers=[Jump("norm", z=6.0, action="skip"), NonFinite("loss", action="raise")])
        for batch in batches:
            ...
            result = fastclip.clip_grads_(model, rule)
            if not monitor.update(result, loss):
                optimizer.step()
        print(monitor.read())

    or, with ``fastclip.attach(optimizer, rule, monitor=monitor)``, of each step of the optimizer.

    **When it waits for the device.** In no step but those in which the host looks, and then once: every `every` steps
    if a trigger warns, raises or calls a function; every `max_skipped` steps if one skips; every N steps with
    ``log_to(sink, every=N)``; when it is read; and every `history` steps, so that the device's memory does not fill. A
    trigger whose host looks every 10 steps acts up to 9 steps late, on every step that it fired in. What is not the
    monitor's: ``if not monitor.update(...)`` looks at the answer in each step, and so does `fastclip.attach` where a
    trigger skips and the optimizer does not take ``found_inf``.

    Args:
        parameters: What is clipped, as in `fastclip.clip_grads_`, in the same order; with names, which reports use.
        triggers: What to watch for, see `fastclip.triggers`.
        by: Whose norms histories, sinks and pictures show: see `fastclip.groups.By`. By default the layers', where the
            parameters have names, else every parameter's. Triggers name single parameters.
        weights: Whether to take the norms of the parameters too, before the step. It reads them once more.
        decay: Of the running averages, see `fastclip.averages`; 0.97 remembers some 30 steps.
        warmup: Steps before the first z-score, and so before a `Jump` may fire.
        window: The number of steps of which the clip rate is the share that was clipped.
        history: The number of steps that are kept.
        every: How many steps the host waits before it looks, for triggers that warn, raise or call a function.
        max_skipped: How many steps in a row may be skipped, before an error says so at the next look: at the latest
            ``2 * max_skipped - 1`` steps into the run.

    Raises:
        TypeError: `parameters` holds something other than tensors, or a trigger is none.
        ValueError: A number is out of its range; there are no parameters; `by` does not fit what is known of them; or a
            trigger watches weights, which are not taken.
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        triggers: Iterable[Trigger] = (),
        by: By | None = None,
        weights: bool = False,
        decay: float = 0.97,
        warmup: int = 25,
        window: int = 100,
        history: int = 1000,
        every: int = 1,
        max_skipped: int = 10,
    ) -> None:
        counts = {
            "warmup": warmup,
            "window": window,
            "history": history,
            "every": every,
            "max_skipped": max_skipped,
        }
        for name, count in counts.items():
            check_count(name, count)
        check_real("decay", decay)
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` must be from 0 to below 1, not {decay}")
        self._parameters = as_gradients(parameters)
        check_whole(self._parameters)
        self.owners = self._parameters.owners
        if not self.owners.tensors:
            raise ValueError("there are no parameters to monitor: an iterator that was used before is empty")
        default: By = "layer" if self.owners.names else "parameter"
        self.groups = group(self.owners, default if by is None else by)
        self.names = self.owners.names or [f"parameters[{i}]" for i in range(len(self.owners.tensors))]
        self.weights = weights
        if weights:
            self._check_weights()
        self.triggers = tuple(sorted(self._checked(triggers), key=lambda trigger: trigger.action != "skip"))
        """Those that skip come first."""
        self.steps = 0
        """How many steps it has seen, those before a resumed checkpoint included."""
        self.history = history
        self.every = every
        self.max_skipped = max_skipped
        self._loss: Tensor | float | None = None
        self._averages = Averages(decay, warmup)
        self._state = torch.zeros(3, len(SERIES), dtype=torch.float64)
        self._held = torch.zeros(len(self.triggers))  # for how many steps in a row, up to the last that was judged
        self._patience = torch.tensor([float(trigger.patience) for trigger in self.triggers])
        count = len(self.names)
        self._widths = [len(SERIES), 1, 1, 1, count, count if weights else 0, self._state.numel(), len(self.triggers)]
        self._skipping = sum(trigger.action == "skip" for trigger in self.triggers)  # how many do
        self._unread: list[_Step] = []
        self._seen: deque[_Step] = deque(maxlen=history)
        self._logs: list[_Log] = []
        self._recent: deque[bool] = deque(maxlen=window)  # whether anything was clipped, in the last steps looked at
        self._skipped = 0  # steps in a row, up to the last that was looked at
        self._fired = np.zeros(len(self.triggers), dtype=bool)  # in the last step that was looked at

    def _checked(self, triggers: Iterable[Trigger]) -> list[Trigger]:
        if isinstance(triggers, Trigger):
            raise TypeError(f"`triggers` must be a list of triggers: [{triggers!r}]")
        given = list(triggers)
        for trigger in given:
            if not isinstance(trigger, Trigger):
                raise TypeError(f"`triggers` must hold Jump, Above, NonFinite or Vanishing, not {trigger!r}")
            if trigger.watches_weights and not self.weights:
                raise ValueError(f"{trigger} needs the norms of the weights: Monitor(..., weights=True)")
        return given

    def _check_weights(self) -> None:
        for name, tensor in zip(self.names, self.owners.tensors, strict=True):
            if not (tensor.is_floating_point() or tensor.is_complex()):
                raise ValueError(
                    f"{name!r} is of {tensor.dtype} and has no norm to watch: make the monitor from the "
                    "others, for example [(name, p) for name, p in model.named_parameters() if p.requires_grad]"
                )

    def __repr__(self) -> str:
        return f"<Monitor of {len(self.names)} parameters after {self.steps} steps>"

    @property
    def skips(self) -> bool:
        """Whether a trigger may ask for a step to be skipped."""
        return self._skipping > 0

    @untraced
    def record_loss(self, loss: Tensor | float) -> None:
        """Remember the loss of the step to come; the last one counts. No sync.

        Args:
            loss: One number.

        Raises:
            TypeError: It is not a real number.
            ValueError: It has more than one element.
        """
        if not isinstance(loss, Tensor):
            check_real("loss", loss)
            self._loss = float(loss)
            return
        if loss.numel() != 1:
            raise ValueError(f"the loss must be one number, not a tensor of shape {tuple(loss.shape)}")
        if loss.is_complex() or loss.dtype == torch.bool:
            raise TypeError(f"the loss must be a real number, not of {loss.dtype}")
        self._loss = loss.detach().clone()  # it may be changed in place before the step

    @untraced
    def update(self, result: ClipResult, loss: Tensor | float | None = None) -> Tensor:
        """Take a step: after the gradients were clipped, before the optimizer changes the weights.

        Args:
            result: What clipping or `fastclip.measure_grads` returned.
            loss: The loss, unless `record_loss` was given it, or there is none.

        Returns:
            Whether to skip the step, because a trigger with ``action="skip"`` fired: 0-dim bool on the result's device.

        Raises:
            TypeError: `result` is no `ClipResult`, or the loss no real number.
            ValueError: The result has not the norms of these parameters, or the loss is not one number.
            TriggerError: The host looked, and a trigger that raises had fired, or too many steps in a row were skipped.
        """
        if not isinstance(result, ClipResult):
            raise TypeError(
                f"a monitor takes what clip_grads_ or measure_grads returns, not a {type(result).__name__}; attach() "
                "hands it on by itself"
            )
        if result.norms is None:
            raise ValueError("a monitor needs the norm of each parameter: take it with clip_grads_ or measure_grads")
        if len(result.norms) != len(self.names):
            raise ValueError(
                f"the monitor was made for {len(self.names)} parameters, and {len(result.norms)} were clipped: make it "
                "from what is clipped"
            )
        if loss is not None:
            self.record_loss(loss)
        with torch.no_grad():
            has = (self._loss is not None, result.coefficients is not None, _clipped_norm(result) is not None)
            step = _Step(self.steps + 1, *has, result.present, self._facts(result, result.norms))
            if self.skips:
                step = self._judged(step)
                skip = self._parts(step.numbers).fired[: self._skipping].any()
            else:
                skip = torch.zeros((), dtype=torch.bool, device=step.numbers.device)
        if self._unread and self._unread[0].numbers.device != skip.device:
            self._look()  # what is transferred together must be together
        self._unread.append(step)
        self.steps = step.number
        self._loss = None
        if self._look_is_due():
            self._look()
        return skip

    def read(self) -> History:
        """Look, and return the last steps, at most `history` of them. Waits for the device once.

        Raises:
            TriggerError: As in `update`.
        """
        self._look()
        return self._history(list(self._seen))

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Look, and draw the norms of the groups over time, below the loss and the global norm.

        Args:
            path: Where to save the picture; its ending says in which format.

        Returns:
            The figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            ValueError: There were no steps.
        """
        from fastclip.monitoring.picture import draw

        figure = draw(self.read())
        if path is not None:
            figure.savefig(path)
        return figure

    def log_to(self, sink: Sink | Callable[[Row], object], every: int = 100) -> None:
        """Hand every step from now on to a sink, as a dict (see `History.rows`), several at a time.

        Args:
            sink: One of `fastclip.sinks`, or a function that takes a dict, as ``wandb.log``.
            every: How many steps at a time, at most the monitor's `history`. Call `flush` when training ends, for those
                that are left over.

        Raises:
            TypeError: `sink` is neither.
            ValueError: `every` is below 1.
        """
        check_count("every", every)
        self._logs.append(_Log(as_sink(sink), min(every, self.history), self.steps))

    def flush(self) -> None:
        """Look, and hand to the sinks all that they have not got yet.

        Raises:
            TriggerError: As in `update`.
        """
        self._look()
        errors = self._hand_on(self._logs)
        if errors:
            raise errors[0]

    def state_dict(self) -> dict[str, Any]:
        """Look, and return the number of steps and the averages, so that a resumed run goes on without a false alarm.

        Raises:
            TriggerError: As in `update`.
        """
        self._look()
        held = self._held.cpu()
        recent = torch.tensor(list(self._recent), dtype=torch.bool)
        averages = self._state.cpu()
        return {"steps": self.steps, "averages": averages, "skipped": self._skipped, "held": held, "recent": recent}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of `state_dict`, and forget the steps seen before.

        Raises:
            ValueError: It is not the state of a monitor.
        """
        averages = state.get("averages")
        if "steps" not in state or not isinstance(averages, Tensor) or averages.shape != self._state.shape:
            raise ValueError("this is not what Monitor.state_dict() returned")
        self.steps = state["steps"]
        self._state = averages.clone()
        held = state.get("held", torch.zeros(0))
        # For other triggers than before, what they have seen says nothing.
        self._held = held.clone() if held.shape == self._held.shape else torch.zeros_like(self._held)
        self._skipped = state.get("skipped", 0)
        self._recent = deque(state.get("recent", torch.zeros(0)).tolist(), maxlen=self._recent.maxlen)
        self._fired[:] = False
        self._unread.clear()
        self._seen.clear()
        for log in self._logs:
            log.until = self.steps

    # ---- in the step

    def _facts(self, result: ClipResult, norms: Tensor) -> Tensor:
        """What was found in a step: its numbers without the last two parts."""
        like = result.norm
        parts = [
            _number(self._loss, like),
            _number(like if result.present else None, like),
            _number(None if result.coefficients is None else result.coefficients.min(), like),
            result.clipped.reshape(1),
            _number(_clipped_norm(result), like),
            norms,
        ]
        if self.weights:
            parts.append(on(like.device, prepare(self._parameters, in_place=False).norms()))
        return torch.cat(parts)

    def _judged(self, step: _Step) -> _Step:
        """The step with the rest of its numbers: enter it into the averages, and see which triggers fire."""
        values, _, _, _, norms, weights = torch.split(step.numbers, self._widths[:6])
        before = on(values.device, self._state)
        standing = self._averages.compare(before, values)
        self._state = self._averages.enter(before, values, standing)
        parts = [step.numbers, before.flatten()]
        if self.triggers:
            moment = Moment(values, (step.has_loss, bool(step.present)), standing, norms, weights)
            holds = torch.stack([trigger.holds(moment) for trigger in self.triggers])
            self._held = (on(values.device, self._held) + 1) * holds
            self._patience = on(values.device, self._patience)
            parts.append(self._held >= self._patience)
        return step._replace(numbers=torch.cat(parts))

    def _parts(self, numbers: Tensor) -> _Parts:
        return _Parts(*torch.split(numbers, self._widths, dim=-1))

    # ---- on the host

    def _look_is_due(self) -> bool:
        cadences = [log.every for log in self._logs]
        if self.skips:
            cadences.append(self.max_skipped)
        if any(trigger.action != "skip" for trigger in self.triggers):
            cadences.append(self.every)
        return len(self._unread) >= self.history or any(self.steps % cadence == 0 for cadence in cadences)

    def _look(self) -> None:
        """Fetch what is unread, by one transfer, and do what is due."""
        if not self._unread:
            return
        steps, self._unread = self._unread, []
        numbers = torch.stack([step.numbers for step in steps]).to("cpu", torch.float64)
        steps = [step._replace(numbers=row) for step, row in zip(steps, numbers, strict=True)]
        if not self.skips:
            steps = [self._judged(step) for step in steps]
        steps = [step._replace(clip_rate=self._rate(step)) for step in steps]
        self._seen.extend(steps)
        due = [log for log in self._logs if self.steps % log.every == 0]
        errors = self._hand_on(due)
        asked_for = self._react(steps)
        if asked_for:  # the run may end here: the other sinks get what they have not got yet
            errors += asked_for + self._hand_on([log for log in self._logs if log not in due])
        if errors:
            raise errors[0]

    def _rate(self, step: _Step) -> float:
        """The clip rate, of which a step is now the last."""
        self._recent.append(bool(self._parts(step.numbers).clipped > 0))
        return sum(self._recent) / len(self._recent)

    def _hand_on(self, logs: Sequence[_Log]) -> list[Exception]:
        """Hand rows to sinks, and return what went wrong; the rows of a write that failed are handed on again."""
        errors: list[Exception] = []
        for log in logs:
            steps = [step for step in self._seen if step.number > log.until]
            try:
                if steps:
                    log.sink.write(list(self._history(steps).rows()))
                log.until = self.steps
            except Exception as error:  # noqa: BLE001 - whatever it is, the triggers come first
                errors.append(error)
        return errors

    def _react(self, steps: Sequence[_Step]) -> list[Exception]:
        """Do what the triggers ask for; return errors, so that nothing else is lost."""
        errors: list[Exception] = []
        skipped: list[Report] = []
        for step in steps:
            fired = self._parts(step.numbers).fired.numpy() > 0
            began, self._fired = fired & ~self._fired, fired
            asking = np.flatnonzero(fired[: self._skipping])
            self._skipped = self._skipped + 1 if asking.size else 0
            if asking.size:
                skipped.append(self._report(step, self.triggers[asking[0]]))
            if self._skipped >= self.max_skipped:
                message = f"steps skipped in a row: {self._skipped}, the last of them {skipped[-1]}"
                errors.append(TriggerError(message, skipped[-1]))
            for i in np.flatnonzero(fired[self._skipping :]) + self._skipping:
                try:
                    _act(self.triggers[i], self._report(step, self.triggers[i]), began=bool(began[i]))
                except Exception as error:  # noqa: BLE001, PERF203 - it is raised once the other triggers have acted
                    errors.append(error)
        if skipped and not errors:
            warn_caller(f"steps skipped: {len(skipped)}, the last of them {skipped[-1]}", RuntimeWarning)
        return errors

    def _report(self, step: _Step, trigger: Trigger) -> Report:
        parts = self._parts(step.numbers)
        standing = self._averages.compare(parts.before.reshape(3, -1), parts.values)
        known = (step.has_loss, bool(step.present))
        value, limit, message = trigger.explain(Moment(parts.values, known, standing, parts.norms, parts.weights))
        which = list(range(len(self.names)) if trigger.watches_weights else step.present)
        norms = (parts.weights if trigger.watches_weights else parts.norms).numpy()[which]
        return Report(step.number, trigger, value, limit, message, [self.names[i] for i in which], norms)

    def _history(self, steps: Sequence[_Step]) -> History:
        width = sum(self._widths)
        rows = torch.stack([step.numbers for step in steps]) if steps else torch.zeros(0, width, dtype=torch.float64)
        parts = self._parts(rows)
        before = parts.before.reshape(-1, 3, len(SERIES))
        mean, s, z = (part.numpy() for part in self._averages.compare(before, parts.values))
        is_new = before[:, 2].numpy() == 0
        present = np.zeros(parts.norms.shape, dtype=bool)
        for row, step in zip(present, steps, strict=True):
            row[list(step.present)] = True
        fired = parts.fired.numpy() > 0
        return History(
            self.names,
            self.groups,
            [str(trigger) for trigger in self.triggers],
            steps=np.array([step.number for step in steps], dtype=np.int64),
            has_loss=np.array([step.has_loss for step in steps], dtype=bool),
            has_coefficient=np.array([step.has_coefficient for step in steps], dtype=bool),
            has_clipped_norm=np.array([step.has_clipped_norm for step in steps], dtype=bool),
            present=present,
            loss=parts.values[:, 0].numpy(),
            norm=parts.values[:, 1].numpy(),
            coefficient=parts.coefficient[:, 0].numpy(),
            clipped=parts.clipped[:, 0].numpy() > 0,
            clipped_norm=parts.clipped_norm[:, 0].numpy(),
            clip_rate=np.array([step.clip_rate for step in steps], dtype=np.float64),
            window=self._recent.maxlen or 0,
            norms=np.where(present, parts.norms.numpy(), math.nan),
            weights=parts.weights.numpy(),
            mean=np.where(is_new, math.nan, mean),
            s=np.where(is_new, math.nan, s),
            z=z,
            fired=fired,
            skipped=np.any(fired[:, : self._skipping], axis=1),
        )


def _act(trigger: Trigger, report: Report, *, began: bool) -> None:
    """Do on the host what a trigger that fired asks for."""
    if callable(trigger.action):
        trigger.action(report)
    elif trigger.action == "raise":
        raise TriggerError(str(report), report)
    elif began:
        warn_caller(str(report), RuntimeWarning)


def _clipped_norm(result: ClipResult) -> Tensor | None:
    """The norm after clipping, where there are gradients and it is known."""
    return result.clipped_norm if result.present else None


def _number(number: Tensor | float | None, like: Tensor) -> Tensor:
    """A number as a vector of one element; None is NaN. What the host knows is filled in, for a copy would wait."""
    if isinstance(number, Tensor):
        return on(like.device, number).reshape(1)
    return torch.full((1,), math.nan if number is None else number, dtype=like.dtype, device=like.device)
