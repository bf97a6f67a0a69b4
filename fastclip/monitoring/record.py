"""The last steps that the host has read, from which every `History` is made."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from fastclip.monitoring.averages import SERIES, Averages
from fastclip.monitoring.history import Array, History
from fastclip.monitoring.interface import Trigger
from fastclip.monitoring.steps import Layout, Parts, Step
from fastclip.rules.groups import Groups


class Record:
    """Holds the last judged steps, and the clip rate up to each.

    Args:
        names: The names of the parameters.
        groups: The groups that a history shows.
        triggers: The triggers.
        averages: The arithmetic of the running averages.
        layout: The layout of the steps' numbers.
        size: How many steps to hold.
        window: Over how many steps the clip rate is taken.

    Attributes:
        recent: Whether anything was clipped, for each of the last `window` steps.
    """

    def __init__(
        self,
        names: Sequence[str],
        groups: Groups,
        triggers: Sequence[Trigger],
        averages: Averages,
        layout: Layout,
        *,
        size: int,
        window: int,
    ) -> None:
        self.recent: deque[bool] = deque(maxlen=window)
        self._steps: deque[tuple[Step, float]] = deque(maxlen=size)  # each with its clip rate
        self._window = window
        self._names = names
        self._groups = groups
        self._triggers = triggers
        self._averages = averages
        self._layout = layout

    def add(self, steps: Sequence[Step]) -> None:
        """Append judged steps, which are on the host."""
        for step in steps:
            self.recent.append(bool(self._layout.split(step).clipped > 0))
            self._steps.append((step, sum(self.recent) / len(self.recent)))

    def restore(self, recent: Tensor) -> None:
        """Forget all steps, and continue from `recent` of a checkpoint."""
        self._steps.clear()
        self.recent = deque(recent.tolist(), maxlen=self._window)

    def history(self, after: int = 0) -> History:
        """Return the steps with a number larger than `after`."""
        chosen = [(step, rate) for step, rate in self._steps if step.number > after]
        steps = [step for step, _ in chosen]
        parts = self._layout.stack(steps)
        present = np.zeros((len(steps), len(self._names)), dtype=bool)
        for row, step in zip(present, steps, strict=True):
            row[list(step.present)] = True
        fired = parts.fired.numpy() > 0
        skipping = np.array([trigger.skips for trigger in self._triggers], dtype=bool)
        return History(
            self._names,
            self._groups,
            [str(trigger) for trigger in self._triggers],
            window=self._window,
            present=present,
            norms=np.where(present, parts.norms.numpy(), math.nan),
            clip_rate=np.array([rate for _, rate in chosen], dtype=np.float64),
            fired=fired,
            skipped=np.any(fired[:, skipping], axis=1),
            **_facts(steps),
            **_numbers(parts),
            **_averages(parts, self._averages),
        )


def _facts(steps: Sequence[Step]) -> dict[str, Array]:
    """The fields of a history that the host knew at each step."""
    return {
        "steps": np.array([step.number for step in steps], dtype=np.int64),
        "has_loss": np.array([step.has_loss for step in steps], dtype=bool),
        "has_coefficient": np.array([step.has_coefficient for step in steps], dtype=bool),
        "has_clipped_norm": np.array([step.has_clipped_norm for step in steps], dtype=bool),
    }


def _numbers(parts: Parts) -> dict[str, Array]:
    """The fields of a history that the steps' numbers contain as they are."""
    return {
        "loss": parts.values[:, 0].numpy(),
        "norm": parts.values[:, 1].numpy(),
        "coefficient": parts.coefficient[:, 0].numpy(),
        "clipped": parts.clipped[:, 0].numpy() > 0,
        "clipped_norm": parts.clipped_norm[:, 0].numpy(),
        "threshold": parts.threshold[:, 0].numpy(),
        "weights": parts.weights.numpy(),
    }


def _averages(parts: Parts, averages: Averages) -> dict[str, Array]:
    """The fields of a history about the averages before each step; NaN before the first value."""
    before = parts.before.reshape(-1, 3, len(SERIES))
    mean, s, z = (part.numpy() for part in averages.compare(before, parts.values))
    is_first = before[:, 2].numpy() == 0
    return {"mean": np.where(is_first, math.nan, mean), "s": np.where(is_first, math.nan, s), "z": z}
