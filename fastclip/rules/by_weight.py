"""Adaptive gradient clipping (AGC): a bound relative to the norm of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from fastclip.foundation.arguments import check_real, positive
from fastclip.rules.bounds import Bound, as_tensor
from fastclip.rules.formulas import Decision, Measured, RuleWithBounds
from fastclip.rules.groups import By


@dataclass(frozen=True)
class ClipByWeightNorm(RuleWithBounds):
    r"""Scale each group whose norm is too large for that of its weights (AGC); by default each parameter is a group.

    .. math::
        T = \text{clipping} \cdot \max(\|w\|_2,\; \text{eps}), \qquad
        g \leftarrow g \cdot \frac{T}{\max(\|g\|_2,\; 10^{-6})} \text{ if } \|g\|_2 > T

    It has no state. It reads the weights once more in each step. A NaN leaves its group as it is; an infinite element
    zeroes its group and becomes NaN itself.

    ``by="unit"`` is the rule of the authors: each output of a layer, that is each row of dimension 0 of its weight, is
    clipped by itself. A parameter with at most one dimension above 1 (a bias, a gain) is one unit. By any other
    grouping, the weights of a group are all its parameters that have a gradient or require one.

    ==============  =========================================================================================
    NFNets          ``clipping=0.01, by="unit"``; not on the classifier, so leave it out or give it a large bound
    DreamerV3       ``clipping=0.3``
    ==============  =========================================================================================

    The default 0.01 is that of NFNets, which SGD trains. It is far too low for transformers under AdamW or Lion (one
    report: wandb/senpai, pull request 2962).

    Args:
        clipping: The largest ratio of the norms of gradient and weights, above 0; a number, or one for each group.
        eps: The least norm of weights that counts, above 0: weights that start at 0 could never move without it.
        by: What a group is, or "unit".

    Raises:
        TypeError: A bound is not a number.
        NotImplementedError: In a call, by unit: a gradient is sparse, or sharded other than by dimension 0.
        ValueError: A bound or `eps` is not above 0 and finite.

    References:
        Brock, De, Smith, Simonyan, "High-Performance Large-Scale Image Recognition Without Normalization", 2021,
        arXiv:2102.06171.
    """

    clipping: Bound = 0.01
    eps: float = 1e-3
    by: By | Literal["unit"] = "parameter"
    bounds = ("clipping",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("eps", self.eps)
        object.__setattr__(self, "eps", positive("eps", self.eps))

    def ratios(self, norms: Tensor) -> Tensor:
        """Return `clipping` for each group, in the shape of `norms` and on their device. See `for_groups`."""
        return as_tensor(cast("float | tuple[float, ...]", self.clipping), norms)

    def decide(self, measured: Measured) -> Decision:
        """Return the coefficients, and the largest norms that the weights allow."""
        norms = measured.norms
        thresholds = self.ratios(norms) * cast("Tensor", measured.weights).clamp(min=self.eps)
        return Decision(torch.where(norms > thresholds, thresholds / norms.clamp(min=1e-6), 1.0), thresholds)
