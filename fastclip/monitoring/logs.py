"""Writes a monitor's record to its sinks: each sink gets every step once, at its own interval."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastclip.monitoring.record import Record
from fastclip.monitoring.sinks import Sink


@dataclass
class Log:
    """A sink, and which steps it has.

    Attributes:
        sink: The sink.
        every: After how many steps it gets the steps since the last write.
        written: The number of the last step that it has.
    """

    sink: Sink
    every: int
    written: int

    def write(self, record: Record) -> None:
        """Write the steps that the sink does not have yet. If it raises, the next call writes them again."""
        history = record.history(after=self.written)
        if len(history.steps):
            self.sink.write(list(history.rows()))
            self.written = int(history.steps[-1])


def write_all(logs: Iterable[Log], record: Record) -> list[Exception]:
    """Write the record to each log, and return the errors: the triggers act before one is raised."""
    errors: list[Exception] = []
    for log in logs:
        try:
            log.write(record)
        except Exception as error:  # noqa: BLE001, PERF203 - a sink may raise anything
            errors.append(error)
    return errors
