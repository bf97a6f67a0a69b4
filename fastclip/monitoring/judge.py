"""Judges steps: compares each with the running averages, and decides which triggers fire."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastclip.foundation.devices import on
from fastclip.monitoring.averages import SERIES, Averages, Comparison
from fastclip.monitoring.interface import Observation, Report, Trigger
from fastclip.monitoring.steps import Layout, Step
from fastclip.monitoring.windows import Windows


class Judge:
    """Decides which triggers fire in a step, on the host or on the device, without a sync.

    Args:
        triggers: The triggers; those that skip come first.
        names: The names of the parameters.
        averages: The arithmetic of the running averages.
        windows: The arithmetic of the windows that triggers compare with.
        layout: The layout of the steps' numbers.

    Attributes:
        triggers: The triggers.
        skipping: How many triggers skip.
        state: The state of the averages, [3, series].
        recent: The state of the windows, [longest window, series].
        held: For how many steps in a row each trigger's condition held, up to the last step, [triggers].
    """

    def __init__(
        self, triggers: Sequence[Trigger], names: Sequence[str], averages: Averages, windows: Windows, layout: Layout
    ) -> None:
        self.triggers = triggers
        self.skipping = sum(trigger.skips for trigger in triggers)
        self.state = torch.zeros(3, len(SERIES), dtype=torch.float64)
        self.recent = windows.first()
        self.held = torch.zeros(len(triggers))
        self._patience = torch.tensor([float(trigger.patience) for trigger in triggers])
        self._names = names
        self._averages = averages
        self._windows = windows
        self._layout = layout

    def judge(self, step: Step) -> Step:
        """Add a measured step to averages and windows. Return it with `before`, `windows` and `fired` appended."""
        values, norms, weights = self._layout.split_measured(step)
        before = on(values.device, self.state)
        comparison = self._averages.compare(before, values)
        self.state = self._averages.add(before, values, comparison)
        recent = on(values.device, self.recent)
        windows = self._windows.compare(recent, values)
        self.recent = self._windows.add(recent, values)
        parts = [step.numbers, before.flatten(), *(part for window in windows.values() for part in window[:2])]
        if self.triggers:
            parts.append(self._fired(Observation(values, step.known, comparison, windows, norms, weights)))
        return step._replace(numbers=torch.cat(parts))

    def _fired(self, step: Observation) -> Tensor:
        device = step.values.device
        holds = torch.stack([trigger.holds(step) for trigger in self.triggers])
        self.held = (on(device, self.held) + 1) * holds
        self._patience = on(device, self._patience)
        return self.held >= self._patience

    def asks_to_skip(self, step: Step) -> Tensor:
        """Return whether a trigger that skips fired in a judged step: 0-dim bool on the step's device."""
        return self._layout.split(step).fired[: self.skipping].any()

    def fired(self, step: Step) -> list[int]:
        """Return the positions of the triggers that fired in a judged step on the host."""
        positions: list[int] = np.flatnonzero(self._layout.split(step).fired.numpy()).tolist()
        return positions

    def report(self, step: Step, trigger: Trigger) -> Report:
        """Return the report of a trigger that fired in a judged step on the host."""
        parts = self._layout.split(step)
        comparison = self._averages.compare(parts.before.reshape(3, -1), parts.values)
        statistics = parts.windows.reshape(-1, 2, len(SERIES))
        windows = {
            length: Comparison(mean, s, (parts.values - mean) / s)
            for length, (mean, s) in zip(self._windows.lengths, statistics, strict=True)
        }
        observation = Observation(parts.values, step.known, comparison, windows, parts.norms, parts.weights)
        value, limit, message = trigger.explain(observation)
        which = list(range(len(self._names)) if trigger.watches_weights else step.present)
        norms = (parts.weights if trigger.watches_weights else parts.norms).numpy()[which]
        return Report(step.number, trigger, value, limit, message, [self._names[i] for i in which], norms)

    def restore(self, state: Tensor, recent: Tensor, held: Tensor) -> None:
        """Continue from the averages' state, the windows' and `held` of a checkpoint.

        Of windows of another length the last values are taken; `held` is ignored if it belongs to other triggers.
        """
        self.state = state.clone()
        self.recent = self._windows.restored(recent)
        self.held = held.clone() if held.shape == self.held.shape else torch.zeros_like(self.held)
