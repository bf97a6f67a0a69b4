"""What an adaptive rule remembers: a row of numbers for each group, on the norms' device."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastclip.foundation.devices import for_graphs, index_of, is_capturing, upload
from fastclip.foundation.warn import warn_caller


class Memory:
    """The rows of an adaptive rule, one for each label.

    Args:
        first: The row of a group that nothing is known of.

    Attributes:
        labels: The groups' labels, in the order of the rows; None before the first step.
    """

    def __init__(self, first: Sequence[float]) -> None:
        self.labels: tuple[Hashable, ...] | None = None
        self._first = tuple(first)
        self._rows = torch.zeros(0, len(first), dtype=torch.float64)
        self._loaded: dict[Hashable, Tensor] | None = None  # rows of a checkpoint, until the labels are known

    def check(self, labels: Sequence[Hashable]) -> None:
        """Raise unless the labels are those of the steps before, or these and others, each once.

        Raises:
            ValueError: A group of the steps before is missing, or two groups have the same label.
        """
        if self.labels is labels or self.labels == labels:
            return
        given = set(labels)
        if len(given) < len(labels):
            double = next(label for i, label in enumerate(labels) if label in labels[:i])
            raise ValueError(
                f"two groups are called {double!r}, and an adaptive rule finds what it has learned by name: give names "
                "that differ, for example attach(..., names=model)"
            )
        if self.labels is None or self._loaded is not None:
            return  # what is loaded takes the place of what the steps before have left
        missing = [label for label in self.labels if label not in given]
        if missing:
            raise ValueError(
                f"the rule has learned the norms of other groups: {missing[0]!r} is not among the {len(labels)} of "
                "this call. Make one rule for each set of parameters"
            )

    def cold(self, count: int, like: Tensor) -> Tensor:
        """Return rows of groups that nothing is known of, [count, width], on the device of `like`."""
        return torch.tensor(self._first, dtype=like.dtype, device=like.device).repeat(count, 1)

    def rows(self, labels: tuple[Hashable, ...], like: Tensor) -> Tensor:
        """Return the rows of the groups, [groups, width], to be updated in place; their device is that of `like`.

        Raises:
            RuntimeError: A CUDA graph is being captured, and there are no rows yet.
            ValueError: See `check`.
        """
        if self.labels is not labels or self._rows.device != like.device or self._loaded is not None:
            self._arrange(labels, like)
        return for_graphs(self._rows)

    def _arrange(self, labels: tuple[Hashable, ...], like: Tensor) -> None:
        """Put the rows into the order of the labels, on the device of `like`. Groups that are new get the first row."""
        self.check(labels)
        if self.labels == labels and self._rows.device == like.device and self._loaded is None:
            self.labels = labels  # another tuple of the same labels
            return
        if is_capturing(like.device):
            raise RuntimeError(
                "a CUDA graph is being captured, and an adaptive rule has no state for these groups yet: make the same "
                "call once ahead of the capture"
            )
        known = dict(zip(self.labels or (), self._rows, strict=True))
        if self._loaded is not None:
            known = self._loaded
            _warn_of_others(known, labels)
        first = torch.tensor([self._first], dtype=like.dtype, device="cpu").numpy()  # `cold` would wait for a GPU
        rows = upload(first, like.device).repeat(len(labels), 1)
        places = [place for place, label in enumerate(labels) if label in known]
        if places:
            values = torch.stack([known[labels[place]] for place in places])
            rows.index_copy_(0, index_of(places, like.device), values.to(like.device, like.dtype))
        if self.labels == labels and rows.device == self._rows.device:
            self._rows.copy_(rows)  # in place: a CUDA graph may read them
        else:
            self._rows = rows
        self.labels, self._loaded = labels, None

    def state_dict(self) -> dict[str, Any]:
        """Return the labels and a copy of the rows."""
        if self._loaded is not None:
            return {"labels": list(self._loaded), "rows": torch.stack(list(self._loaded.values()))}
        return {"labels": list(self.labels or ()), "rows": self._rows.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of `state_dict`: at once if it is of the groups that are known, else at the next step.

        Raises:
            ValueError: `state` is not what a rule of the same settings returned.
        """
        labels, rows = state.get("labels"), state.get("rows")
        if not isinstance(rows, Tensor) or labels is None or rows.shape != (len(labels), len(self._first)):
            width = rows.shape[-1] if isinstance(rows, Tensor) and rows.dim() else "no"
            raise ValueError(
                "this is not what state_dict() of an adaptive rule with the same settings returned: it has rows of "
                f"{width} numbers, and this rule has rows of {len(self._first)}"
            )
        counts = rows[:, 0]
        if not (rows.is_floating_point() and (counts >= 0).all() and (counts == counts.floor()).all()):
            raise ValueError("the state of an adaptive rule is broken: a number of observations is no whole number")
        if not labels:  # it was saved before the first step
            self.labels, self._rows, self._loaded = None, rows.clone(), None
            return
        self._loaded = dict(zip(labels, rows.clone(), strict=True))
        if self.labels is not None and set(self.labels) == set(labels):
            self._arrange(self.labels, self._rows)


def _warn_of_others(loaded: Mapping[Hashable, object], labels: Sequence[Hashable]) -> None:
    """Warn if the groups of a checkpoint are not those that are clipped."""
    cold = [label for label in labels if label not in loaded]
    if cold:
        warn_caller(
            f"the checkpoint of an adaptive rule knows nothing of {len(cold)} of {len(labels)} groups, {cold[0]!r} "
            "first: they start cold"
        )
    given = set(labels)
    unused = [label for label in loaded if label not in given]
    if unused:
        warn_caller(
            f"the checkpoint of an adaptive rule has {len(unused)} groups that are not here, {unused[0]!r} first: what "
            "was learned of them is dropped"
        )
