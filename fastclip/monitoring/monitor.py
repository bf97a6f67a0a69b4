"""The monitor: records each step of training from the norms that clipping has computed anyway.

    ClipResult, loss --update--> a vector on the device --sync--> averages, triggers, record, sinks on the host

A step costs one concatenation. A *sync* reads all steps since the last sync: one transfer, one wait for the device.
Averages and triggers are computed then. If a trigger skips steps, they are computed in the step instead, by the same
operations on the device.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastclip.core.checks import check_whole
from fastclip.core.collect import as_gradients
from fastclip.core.gradients import Gradients
from fastclip.core.owners import Parameters
from fastclip.core.prepare import prepare
from fastclip.foundation.arguments import check_count, check_real
from fastclip.foundation.tracing import untraced
from fastclip.monitoring.averages import Averages
from fastclip.monitoring.history import History, Row
from fastclip.monitoring.interface import Trigger
from fastclip.monitoring.judge import Judge
from fastclip.monitoring.logs import Log, write_all
from fastclip.monitoring.reactions import Reactions
from fastclip.monitoring.record import Record
from fastclip.monitoring.sinks import Sink, as_sink
from fastclip.monitoring.steps import Layout, Step, measured
from fastclip.monitoring.windows import Windows
from fastclip.rules.apply import ClipResult
from fastclip.rules.groups import By, group

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Monitor:
    """Watches training: records norms, losses and what was clipped, and reports what is unusual.

    Give it the result of each clipping step::

        monitor = Monitor(model, triggers=[Jump("norm", z=6.0, action="skip"), NonFinite("loss", action="raise")])
        for batch in batches:
            ...
            result = fastclip.clip_grads_(model, rule)
            if not monitor.update(result, loss):
                optimizer.step()
        print(monitor.read())

    or let ``fastclip.attach(optimizer, rule, monitor=monitor)`` give it each step of the optimizer.

    **When it syncs.** Most steps do not wait for the device; a sync waits once. The monitor syncs every `every` steps
    if a trigger warns, raises or calls a function; every `max_skipped` steps if a trigger skips; every N steps with
    ``log_to(sink, every=N)``; when it is read; and every `history` steps, to bound the memory on the device. So with
    ``every=10`` a trigger acts up to 9 steps late, but on every step in which it fired. Two more syncs are not the
    monitor's: ``if not monitor.update(...)`` reads the answer in each step, and so does `fastclip.attach` if a trigger
    skips and the optimizer does not take ``found_inf``.

    Args:
        parameters: The parameters that are clipped, as in `fastclip.clip_grads_` and in the same order. Reports use
            their names, if given.
        triggers: What to watch for, see `fastclip.monitoring.triggers`.
        by: The groups in histories, sinks and pictures: see `fastclip.rules.groups.By`. The default is layers if the
            parameters have names, else single parameters. Reports of triggers always name single parameters.
        weights: Whether to take the norms of the parameters too, before each step. This reads the parameters once more.
        decay: The decay of the running averages, see `fastclip.monitoring.averages`; 0.97 remembers about 30 steps.
        warmup: Steps before the first z-score. A `Jump` without a window cannot fire before.
        window: Over how many steps the clip rate is taken.
        history: How many steps are kept.
        every: Sync after every so many steps, if a trigger warns, raises or calls a function.
        max_skipped: After this many skipped steps in a row the next sync raises an error: at the latest in the
            ``2 * max_skipped - 1``-th of them.

    Raises:
        TypeError: `parameters` holds something other than tensors, a trigger is not a `Trigger`, or a setting is not a
            number.
        ValueError: A number is out of range; there are no parameters; `by` needs names or groups that the parameters
            do not have; or a trigger watches weights, but `weights` is False.
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
        _check_options(decay, warmup=warmup, window=window, history=history, every=every, max_skipped=max_skipped)
        self._parameters = _checked_parameters(parameters)
        self.owners = self._parameters.owners
        default: By = "layer" if self.owners.names else "parameter"
        self.groups = group(self.owners, default if by is None else by)
        self.names = self.owners.names or [f"parameters[{i}]" for i in range(len(self.owners.tensors))]
        self.weights = weights
        if weights:
            _check_have_norms(self.owners.tensors, self.names)
        self.triggers = tuple(sorted(_checked(triggers, weights=weights), key=lambda trigger: not trigger.skips))
        """Those that skip come first."""
        self.steps = 0
        """How many steps the monitor has seen, including those before a checkpoint that was loaded."""
        self.history = history
        self.every = every
        self.max_skipped = max_skipped
        averages = Averages(decay, warmup)
        windows = Windows(trigger.compares_with for trigger in self.triggers if trigger.compares_with is not None)
        layout = Layout(len(self.names), len(self.triggers), len(windows.lengths), weights=weights)
        self._judge = Judge(self.triggers, self.names, averages, windows, layout)
        self._record = Record(self.names, self.groups, self.triggers, averages, layout, size=history, window=window)
        self._reactions = Reactions(self._judge)
        self._logs: list[Log] = []
        self._loss: Tensor | float | None = None  # of the next step
        self._unread: list[Step] = []  # steps since the last sync

    def __repr__(self) -> str:
        return f"<Monitor of {len(self.names)} parameters after {self.steps} steps>"

    @property
    def skips(self) -> bool:
        """Whether a trigger can ask to skip a step."""
        return self._judge.skipping > 0

    @untraced
    def record_loss(self, loss: Tensor | float) -> None:
        """Record the loss of the next step; a later call replaces it. No sync.

        Args:
            loss: One number.

        Raises:
            TypeError: `loss` is not a real number.
            ValueError: `loss` has more than one element.
        """
        if isinstance(loss, Tensor):
            _check_loss(loss)
            self._loss = loss.detach().clone()  # the caller may change it in place before the step
        else:
            check_real("loss", loss)
            self._loss = float(loss)

    @untraced
    def update(self, result: ClipResult, loss: Tensor | float | None = None) -> Tensor:
        """Record a step. Call it after the gradients are clipped, and before the optimizer changes the weights.

        Args:
            result: The result of `fastclip.clip_grads_` or `fastclip.measure_grads`.
            loss: The loss, if there is one and `record_loss` did not get it.

        Returns:
            Whether to skip the step because a trigger with ``action="skip"`` fired: 0-dim bool on the result's device.

        Raises:
            TypeError: `result` is not a `ClipResult`, or the loss is not a real number.
            ValueError: The result does not have the norms of these parameters, or the loss is not one number.
            TriggerError: The monitor synced, and either a trigger that raises had fired, or too many steps in a row
                were skipped.
        """
        norms = _norms_of(result, len(self.names))
        if loss is not None:
            self.record_loss(loss)
        with torch.no_grad():
            weights = prepare(self._parameters.refreshed(), in_place=False).norms() if self.weights else None
            step = measured(self.steps + 1, result, norms, self._loss, weights)
            if self.skips:
                step = self._judge.judge(step)
                skip = self._judge.asks_to_skip(step)
            else:
                skip = torch.zeros((), dtype=torch.bool, device=step.numbers.device)
        if self._unread and self._unread[0].numbers.device != skip.device:
            self._sync()  # one transfer needs one device
        self._unread.append(step)
        self.steps = step.number
        self._loss = None
        if self._is_sync_due():
            self._sync()
        return skip

    def read(self) -> History:
        """Sync, and return the last steps, at most `history` of them.

        Raises:
            TriggerError: As in `update`.
        """
        self._sync()
        return self._record.history()

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Sync, and draw the loss, the global norm and the norms of the groups over the steps.

        Args:
            path: Where to save the picture; the file's suffix sets the format.

        Returns:
            The figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            TriggerError: As in `update`.
            ValueError: There were no steps.
        """
        from fastclip.monitoring.picture import draw

        figure = draw(self.read())
        if path is not None:
            figure.savefig(path)
        return figure

    def log_to(self, sink: Sink | Callable[[Row], object], every: int = 100) -> None:
        """Write every step from now on to a sink, as a dict (see `History.rows`), several steps at a time.

        Args:
            sink: One of `fastclip.monitoring.sinks`, or a function that takes a dict, such as ``wandb.log``.
            every: How many steps to write at a time, at most the monitor's `history`. Call `flush` at the end of
                training to write the remaining steps.

        Raises:
            TypeError: `sink` is neither a sink nor a function, or `every` is not a whole number.
            ValueError: `every` is below 1.
        """
        check_count("every", every)
        self._logs.append(Log(as_sink(sink), min(every, self.history), self.steps))

    def flush(self) -> None:
        """Sync, and write to each sink the steps that it does not have yet.

        Raises:
            TriggerError: As in `update`.
        """
        self._sync()
        errors = write_all(self._logs, self._record)
        if errors:
            raise errors[0]

    def state_dict(self) -> dict[str, Any]:
        """Sync, and return step count, averages and counters, so that a resumed run causes no false alarm.

        Raises:
            TriggerError: As in `update`.
        """
        self._sync()
        return {
            "steps": self.steps,
            "averages": self._judge.state.cpu(),
            "windows": self._judge.recent.cpu(),
            "skipped": self._reactions.skipped,
            "held": self._judge.held.cpu(),
            "recent": torch.tensor(list(self._record.recent), dtype=torch.bool),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`, and forget the steps seen before.

        Raises:
            ValueError: `state` is not the state of a monitor.
        """
        averages = state.get("averages")
        if "steps" not in state or not isinstance(averages, Tensor) or averages.shape != self._judge.state.shape:
            raise ValueError("this is not what Monitor.state_dict() returned")
        self.steps = state["steps"]
        nothing = torch.zeros(0)
        self._judge.restore(averages, state.get("windows", nothing), state.get("held", nothing))
        self._reactions.restore(state.get("skipped", 0))
        self._record.restore(state.get("recent", nothing))
        self._unread.clear()
        for log in self._logs:
            log.written = self.steps

    def _is_sync_due(self) -> bool:
        intervals = [log.every for log in self._logs]
        if self.skips:
            intervals.append(self.max_skipped)
        if len(self.triggers) > self._judge.skipping:
            intervals.append(self.every)
        return len(self._unread) >= self.history or any(self.steps % interval == 0 for interval in intervals)

    def _sync(self) -> None:
        """Transfer the unread steps to the host, and record, log and react to them there."""
        if not self._unread:
            return
        steps = self._transferred()
        self._record.add(steps)
        errors = write_all([log for log in self._logs if self.steps % log.every == 0], self._record)
        raised = self._reactions.react(steps, self.max_skipped)
        if raised:  # the run may end here, so the other sinks get their steps now
            errors += raised + write_all([log for log in self._logs if self.steps % log.every], self._record)
        if errors:
            raise errors[0]

    def _transferred(self) -> list[Step]:
        """Transfer the unread steps in one copy, and judge them if the device has not done so."""
        steps, self._unread = self._unread, []
        numbers = torch.stack([step.numbers for step in steps]).to("cpu", torch.float64)
        steps = [step._replace(numbers=row) for step, row in zip(steps, numbers, strict=True)]
        return steps if self.skips else [self._judge.judge(step) for step in steps]


def _check_options(decay: float, **counts: int) -> None:
    for name, count in counts.items():
        check_count(name, count)
    check_real("decay", decay)
    if not 0 <= decay < 1:
        raise ValueError(f"`decay` must be from 0 to below 1, not {decay}")


def _checked_parameters(parameters: Parameters) -> Gradients:
    """Return the parameters in the place of gradients, so that their norms can be taken."""
    checked = as_gradients(parameters)
    check_whole(checked)
    if not checked.owners.tensors:
        raise ValueError("there are no parameters to monitor: an iterator that was used before is empty")
    return checked


def _check_have_norms(parameters: Sequence[Tensor], names: Sequence[str]) -> None:
    for name, tensor in zip(names, parameters, strict=True):
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(
                f"{name!r} is of {tensor.dtype} and has no norm to watch: make the monitor from the "
                "others, for example [(name, p) for name, p in model.named_parameters() if p.requires_grad]"
            )


def _checked(triggers: Iterable[Trigger], *, weights: bool) -> list[Trigger]:
    """Return the triggers as a list. `weights` says whether the norms of the parameters are taken."""
    if isinstance(triggers, Trigger):
        raise TypeError(f"`triggers` must be a list of triggers: [{triggers!r}]")
    given = list(triggers)
    for trigger in given:
        if not isinstance(trigger, Trigger):
            raise TypeError(f"`triggers` must hold Jump, Above, NonFinite or Vanishing, not {trigger!r}")
        if trigger.watches_weights and not weights:
            raise ValueError(f"{trigger} needs the norms of the weights: Monitor(..., weights=True)")
    return given


def _check_loss(loss: Tensor) -> None:
    if loss.numel() != 1:
        raise ValueError(f"the loss must be one number, not a tensor of shape {tuple(loss.shape)}")
    if loss.is_complex() or loss.dtype == torch.bool:
        raise TypeError(f"the loss must be a real number, not of {loss.dtype}")


def _norms_of(result: ClipResult, parameters: int) -> Tensor:
    """Return the norms in a result of clipping; raise unless there is one for each of the monitor's parameters."""
    if not isinstance(result, ClipResult):
        raise TypeError(
            f"a monitor takes what clip_grads_ or measure_grads returns, not a {type(result).__name__}; attach() "
            "hands it on by itself"
        )
    if result.norms is None:
        raise ValueError("a monitor needs the norm of each parameter: take it with clip_grads_ or measure_grads")
    if len(result.norms) != parameters:
        raise ValueError(
            f"the monitor was made for {parameters} parameters, and {len(result.norms)} were clipped: make it "
            "from what is clipped"
        )
    return result.norms
