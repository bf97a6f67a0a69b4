"""What the host does about triggers that fired: warn, raise, call a function, count skips."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fastclip.foundation.warn import warn_caller
from fastclip.monitoring.interface import Report, Trigger, TriggerError
from fastclip.monitoring.judge import Judge
from fastclip.monitoring.steps import Step


class Reactions:
    """Reacts to judged steps, in order.

    Args:
        judge: The judge of the steps.

    Attributes:
        skipped: How many steps in a row were skipped, up to the last step.
    """

    def __init__(self, judge: Judge) -> None:
        self.skipped = 0
        self._judge = judge
        self._fired: list[int] = []  # positions of the triggers that fired in the last step

    def restore(self, skipped: int) -> None:
        """Continue from `skipped` of a checkpoint."""
        self.skipped = skipped
        self._fired = []

    def react(self, steps: Sequence[Step], max_skipped: int) -> list[Exception]:
        """React to steps on the host. Return errors instead of raising the first, so that every trigger can act.

        Args:
            steps: The judged steps since the last call.
            max_skipped: From this many skipped steps in a row on, each skipped step is an error.
        """
        errors: list[Exception] = []
        skips: list[Report] = []
        for step in steps:
            fired_before, self._fired = self._fired, self._judge.fired(step)
            skip = self._count_skip(step)
            if skip is not None:
                skips.append(skip)
                if self.skipped >= max_skipped:
                    message = f"steps skipped in a row: {self.skipped}, the last of them {skip}"
                    errors.append(TriggerError(message, skip))
            errors += self._act(step, fired_before)
        if skips and not errors:
            warn_caller(f"steps skipped: {len(skips)}, the last of them {skips[-1]}", RuntimeWarning)
        return errors

    def _count_skip(self, step: Step) -> Report | None:
        """Update `skipped`, and return the report of the first trigger that skipped the step."""
        skipping = [i for i in self._fired if self._judge.triggers[i].skips]
        self.skipped = self.skipped + 1 if skipping else 0
        return self._judge.report(step, self._judge.triggers[skipping[0]]) if skipping else None

    def _act(self, step: Step, fired_before: Collection[int]) -> list[Exception]:
        """Take the actions of the triggers that do not skip, and return their errors."""
        errors: list[Exception] = []
        for i in self._fired:
            trigger = self._judge.triggers[i]
            if trigger.skips:
                continue
            try:
                _take_action(trigger, self._judge.report(step, trigger), began=i not in fired_before)
            except Exception as error:  # noqa: BLE001 - the monitor raises it after the other triggers have acted
                errors.append(error)
        return errors


def _take_action(trigger: Trigger, report: Report, *, began: bool) -> None:
    """Take the action of a trigger that fired, and does not skip; warn only if it did not fire in the step before."""
    if callable(trigger.action):
        trigger.action(report)
    elif trigger.action == "raise":
        raise TriggerError(str(report), report)
    elif began:
        warn_caller(str(report), RuntimeWarning)
