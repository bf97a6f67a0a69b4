"""Where a monitor's rows are written: CSV, JSON lines, TensorBoard, or any function."""

from __future__ import annotations

import csv
import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastclip.monitoring.history import Row


class Sink(ABC):
    """Writes rows of a monitor, several at a time."""

    @abstractmethod
    def write(self, rows: Sequence[Row]) -> None:
        """Write at least one row; all rows are written when this returns."""


class CSVFile(Sink):
    """A CSV file with one line for each step and one column for each key. Missing values are blank; NaN is nan.

    Args:
        path: The file. Lines are appended if the file exists, so a resumed run continues it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def write(self, rows: Sequence[Row]) -> None:
        """Append a line for each row; write the header first if the file is new.

        Raises:
            ValueError: The file has other columns.
        """
        columns = list(rows[0])
        is_truncated = _is_truncated(self.path)
        with self.path.open("a+", newline="", encoding="utf-8") as file:
            file.seek(0)
            header = next(csv.reader(file), None)
            if header not in (None, columns):
                raise ValueError(f"{self.path} has other columns than this monitor's rows: write to another file")
            if is_truncated:
                file.write("\n")
            writer = csv.DictWriter(file, columns)
            if header is None:
                writer.writeheader()
            writer.writerows(rows)


class JSONLines(Sink):
    """A file with one JSON object on each line, for each step.

    JSON has no numbers that are not finite. They become the strings "NaN", "Infinity" and "-Infinity", which Python's
    ``float`` and JavaScript's ``Number`` read.

    Args:
        path: The file. Lines are appended if the file exists, so a resumed run continues it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def write(self, rows: Sequence[Row]) -> None:
        """Append a line for each row."""
        lines = [json.dumps({key: _as_json(value) for key, value in row.items()}, allow_nan=False) for row in rows]
        separator = "\n" if _is_truncated(self.path) else ""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(separator + "".join(f"{line}\n" for line in lines))


class TensorBoard(Sink):
    """Scalars in TensorBoard. Their tags are the rows' keys: "grad_norm/encoder.0" and so on.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``. The caller closes it.

    Raises:
        TypeError: `writer` has no method ``add_scalar``.
    """

    def __init__(self, writer: Any) -> None:
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(f"TensorBoard takes a torch.utils.tensorboard.SummaryWriter, not {writer!r}")
        self.writer = writer

    def write(self, rows: Sequence[Row]) -> None:
        """Add a scalar for each number that is not missing."""
        for row in rows:
            for tag, value in row.items():
                if tag != "step" and value is not None:
                    self.writer.add_scalar(tag, value, row["step"])
        self.writer.flush()


@dataclass
class _Function(Sink):
    """Calls a function with each row."""

    function: Callable[[Row], object]

    def write(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.function(row)


def as_sink(sink: object) -> Sink:
    """Return a sink as it is, and a function as a sink that calls it with each row.

    Raises:
        TypeError: `sink` is neither a sink nor a function.
    """
    if isinstance(sink, Sink):
        return sink
    if callable(sink):
        return _Function(sink)
    raise TypeError(f"a sink must be CSVFile, JSONLines, TensorBoard or a function that takes a dict, not {sink!r}")


def _is_truncated(path: Path) -> bool:
    """Whether a file's last line has no newline, because the run that wrote it was killed."""
    if not path.exists() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _as_json(value: float | None) -> float | str | None:
    if value is None or math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
