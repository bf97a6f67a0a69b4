"""Adaptive thresholds by torch's operations: from norms and earlier ones to coefficients.

The kernels `kernels/adapt.py` and `kernels/adapt.c` compute the same, and this is their reference. Each function
updates `state`, [groups, width], in place, and returns coefficients and thresholds, each [groups]. There is no
data-dependent branch, so nothing waits for the device. A norm that is no observation changes no state: one that is not
above 0, or beyond 1e150, or in a step whose total is not finite.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastclip.backends.coefficient import EPS
from fastclip.backends.interface import Adaptation


def adapt(adaptation: Adaptation, state: Tensor, norms: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    """See `fastclip.backends.interface`."""
    return _ADAPT[adaptation.kind](state, norms, total, *adaptation.numbers)


def _quantile(
    state: Tensor,
    x: Tensor,
    total: Tensor,
    window: float,
    q: float,
    factor: float,
    cap: float,
    warmup: float,
    every: float,
    includes_current: float,
) -> tuple[Tensor, Tensor]:
    """State: the number of observations, the threshold, the last `window` in turns, and the same sorted."""
    size = int(window)
    count, threshold = state[:, 0], state[:, 1]
    ring, ordered = state[:, 2 : 2 + size], state[:, 2 + size :]
    is_observed = _is_observed(x, total)
    _enter(ring, ordered, x, count, is_observed)
    count += is_observed
    quantile = _quantile_of(ordered, q, count.clamp(min=1, max=window) - 1)
    renewed = torch.where(count >= warmup, factor * quantile, torch.inf)
    before = threshold.clone()
    threshold.copy_(torch.where(is_observed & (count.remainder(every) == 0), renewed, before))
    used = (threshold if includes_current else before).clamp(max=cap)
    ratio = used / (x + EPS)
    return torch.where(ratio < 1, ratio, 1.0), used


def _enter(ring: Tensor, ordered: Tensor, x: Tensor, count: Tensor, is_observed: Tensor) -> None:
    """Put observations into the windows: the oldest leave `ring` and `ordered`. Free places hold infinity."""
    size = ring.shape[1]
    place = count.remainder(size).long().unsqueeze(1)
    oldest = torch.where(count >= size, ring.gather(1, place).squeeze(1), torch.inf).unsqueeze(1)
    new, enters = x.unsqueeze(1), is_observed.unsqueeze(1)
    # What lies between the place that is left and the one that is entered moves by one.
    left = (ordered < oldest).sum(1, keepdim=True)
    entered = (ordered <= new).sum(1, keepdim=True) - (oldest <= new).long()
    index = torch.arange(size, device=x.device)
    source = index - (index > entered).long()
    source = (source + (source >= left).long()).clamp(max=size - 1)
    moved = torch.where(index == entered, new, ordered.gather(1, source))
    ordered.copy_(torch.where(enters, moved, ordered))
    ring.scatter_(1, place, torch.where(enters, new, ring.gather(1, place)))


def _quantile_of(ordered: Tensor, q: float, last: Tensor) -> Tensor:
    """The quantiles of sorted windows whose last values are at `last`, with linear interpolation as NumPy's."""
    position = q * last
    below = position.floor()
    weight = position - below
    a = ordered.gather(1, below.long().unsqueeze(1)).squeeze(1)
    b = ordered.gather(1, torch.minimum(below + 1, last).long().unsqueeze(1)).squeeze(1)
    return torch.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1 - weight))


def _z_score(
    state: Tensor,
    x: Tensor,
    total: Tensor,
    alpha: float,
    z: float,
    warmup: float,
    cap: float,
    mode: float,
    factor: float,
    freeze: float,
    relearn: float,
) -> tuple[Tensor, Tensor]:
    """State: the number of observations, their mean and variance, and how many of the last were clipped in a row."""
    count, mean, variance, hits = state.unbind(1)
    is_observed = _is_observed(x, total)
    is_warm = count >= warmup
    deviation = variance.sqrt()
    score = (x - mean) / (deviation + EPS)
    limit = mean + z * (deviation if mode == 2 else deviation + EPS)
    is_hit = is_warm & ((x > limit) if mode == 2 else (score > z))
    target = (factor * (mean + z * z * deviation / score), mean, limit)[int(mode)]
    kept = torch.where(is_hit, target, x)
    used = kept.clamp(max=cap)
    coefficients = torch.where(x > used, used / (x + EPS), 1.0)
    thresholds = torch.where(is_warm, limit, torch.inf).clamp(max=cap)
    # Averages of all observations in the warm-up, exponentially weighted ones after it.
    distance = x - mean
    early = mean + distance / (count + 1)
    late = alpha * mean + (1 - alpha) * kept
    new_mean = torch.where(is_warm, late, early)
    new_variance = torch.where(
        is_warm,
        alpha * variance + (1 - alpha) * (kept - late).square(),
        variance + (distance * (x - early) - variance) / (count + 1),
    )
    moves = is_observed & ~is_hit if freeze else is_observed
    new_hits = torch.where(is_hit, hits + 1, 0.0)
    updated = torch.stack(
        [
            torch.where(is_observed, count + 1, count),
            torch.where(moves, new_mean, mean),
            torch.where(moves, new_variance, variance),
            torch.where(is_observed, new_hits, hits),
        ],
        1,
    )
    state.copy_(torch.where((updated[:, 3:] >= relearn), 0.0, updated))
    return coefficients, thresholds


def _ema(
    state: Tensor,
    x: Tensor,
    total: Tensor,
    ratio: float,
    beta: float,
    warmup: float,
    max_norm: float,
    is_global: float,
) -> tuple[Tensor, Tensor]:
    """State: the number of observations, and their average."""
    count, average = state.unbind(1)
    is_warm = count >= warmup
    shared = torch.where(total > max_norm, max_norm / (total + EPS), 1.0)
    limit = ratio * average
    is_hit = x > limit
    own = torch.where(is_hit, limit / (x + EPS), 1.0)
    early = x.clamp(max=max_norm) if is_global else x * shared
    late = torch.where(is_hit, limit, x)
    average_after = torch.where(is_warm, beta * average + (1 - beta) * late, torch.minimum(average, early))
    is_observed = _is_observed(x, total)
    coefficients = torch.where(is_warm, own, shared)
    thresholds = torch.where(is_warm, limit, max_norm if is_global else torch.inf)
    state.copy_(torch.stack([count + is_observed, torch.where(is_observed, average_after, average)], 1))
    return coefficients, thresholds


def _is_observed(x: Tensor, total: Tensor) -> Tensor:
    return (x > 0) & (x < _LARGEST) & total.isfinite()


_LARGEST = 1e150  # the square of an observation, and the sum of many, are finite

_ADAPT: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"quantile": _quantile, "z_score": _z_score, "ema": _ema}
