"""Adaptive thresholds in one launch: from norms and earlier ones to coefficients.

The arithmetic (to rounding), and the order of the arguments in `n0` to `n7`, are those of
`fastclip/backends/thresholds.py`. All of it is fp64. The number of observations is in the state, on the device, so a
CUDA graph does not freeze it.

Launches: 1. Bytes: for a quantile, 2 windows read and at most 1 written a group; otherwise a few numbers a group.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .reduce import EPS
from .table import TILE_VECTORS, pointer_to

GROUPS = tl.constexpr(TILE_VECTORS.value)  # groups that a program takes at a time, a lane each: see `edge_of`
INF = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(1e150)  # an observation's square is finite
NUMBERS = [f"n{i}" for i in range(8)]
"""The parameters of the kernel that are settings of the rule; those that it does not have are 0."""


@triton.jit
def _flag(number):
    """A setting as the condition of `tl.where`. Triton's interpreter passes settings as Python's numbers."""
    return tl.full((), number, tl.float64) != 0


@triton.jit
def _is_observed(x, total):
    x = tl.where(tl.abs(total) < INF, x, 0.0)
    return (x > 0) & (x < LARGEST)


@triton.jit
def _enter(ring, ordered, x, count, size, window, LANES: tl.constexpr):
    """Put a norm into the window: the oldest leaves `ring` and `ordered`. Free places hold infinity."""
    place = ring + (count - tl.floor(count / window) * window).to(tl.int64)
    oldest = tl.where(count >= window, tl.load(place), INF)
    lane = tl.arange(0, LANES)
    values = tl.load(ordered + lane, mask=lane < size, other=INF)
    # What lies between the place that is left and the one that is entered moves by one. Both depend on all values, so
    # every load is done before the first store.
    left = tl.sum((values < oldest).to(tl.int32), 0)
    entered = tl.sum((values <= x).to(tl.int32), 0) - (oldest <= x).to(tl.int32)
    rank = lane - (lane > left).to(tl.int32)
    rank += (rank >= entered).to(tl.int32)
    tl.store(ordered + rank, values, mask=(lane < size) & (lane != left))
    tl.store(ordered + entered, x)
    tl.store(place, x)
    tl.debug_barrier()  # the stores happen before the loads of `_quantile_of`


@triton.jit
def _quantile_of(ordered, q, last):
    """The quantile of a sorted window whose last value is at `last`, with linear interpolation."""
    position = q * last
    below = tl.floor(position)
    weight = position - below
    a = tl.load(ordered + below.to(tl.int64))
    b = tl.load(ordered + tl.minimum(below + 1, last).to(tl.int64))
    return tl.where(weight < 0.5, a + weight * (b - a), b - (b - a) * (1 - weight))


@triton.jit
def _adapt_quantile(
    state, width, x, total, window, q, factor, cap, warmup, every, includes_current, LANES: tl.constexpr
):
    """Update the state of one group. Return its coefficient and its threshold."""
    # All warps have loaded these when one of them stores, as `_enter` has barriers.
    count, before = tl.load(state), tl.load(state + 1)
    after = before
    if _is_observed(x, total):
        size = width // 2 - 1  # the window: a state has two numbers and two windows
        ordered = state + 2 + size
        _enter(state + 2, ordered, x, count, size, window, LANES)
        count += 1
        if count == tl.floor(count / every) * every:
            after = tl.where(count >= warmup, factor * _quantile_of(ordered, q, tl.minimum(count, window) - 1), INF)
        tl.store(state, count)
        tl.store(state + 1, after)
    used = tl.minimum(tl.where(_flag(includes_current), after, before), cap)
    ratio = used / (x + EPS)
    return tl.where(ratio < 1, ratio, 1.0), used


@triton.jit
def _adapt_z_score(state, mask, x, total, alpha, z, warmup, cap, mode, factor, freeze, relearn):
    """Update the state of some groups. Return their coefficients and thresholds."""
    count = tl.load(state, mask=mask, other=0.0)
    mean = tl.load(state + 1, mask=mask, other=0.0)
    variance = tl.load(state + 2, mask=mask, other=0.0)
    hits = tl.load(state + 3, mask=mask, other=0.0)
    is_observed = _is_observed(x, total)
    is_warm = count >= warmup
    is_max, is_mean = _flag(mode == 2), _flag(mode == 1)
    deviation = tl.sqrt(variance)
    score = (x - mean) / (deviation + EPS)
    limit = mean + z * tl.where(is_max, deviation, deviation + EPS)
    is_hit = is_warm & tl.where(is_max, x > limit, score > z)
    target = tl.where(is_max, limit, tl.where(is_mean, mean, factor * (mean + z * z * deviation / score)))
    kept = tl.where(is_hit, target, x)
    used = tl.where(kept > cap, cap, kept)
    coefficients = tl.where(x > used, used / (x + EPS), 1.0)
    thresholds = tl.minimum(tl.where(is_warm, limit, INF), cap)
    # Averages of all observations in the warm-up, exponentially weighted ones after it.
    distance = x - mean
    early = mean + distance / (count + 1)
    late = alpha * mean + (1 - alpha) * kept
    early_variance = variance + (distance * (x - early) - variance) / (count + 1)
    late_variance = alpha * variance + (1 - alpha) * ((kept - late) * (kept - late))
    moves = is_observed & (tl.where(is_hit, freeze, 0.0) == 0)
    hits = tl.where(is_observed, tl.where(is_hit, hits + 1, 0.0), hits)
    keeps = (hits >= relearn) == 0
    count += is_observed.to(tl.float64)
    mean = tl.where(moves, tl.where(is_warm, late, early), mean)
    variance = tl.where(moves, tl.where(is_warm, late_variance, early_variance), variance)
    tl.store(state, tl.where(keeps, count, 0.0), mask=mask)
    tl.store(state + 1, tl.where(keeps, mean, 0.0), mask=mask)
    tl.store(state + 2, tl.where(keeps, variance, 0.0), mask=mask)
    tl.store(state + 3, tl.where(keeps, hits, 0.0), mask=mask)
    return coefficients, thresholds


@triton.jit
def _adapt_ema(state, mask, x, total, ratio, beta, warmup, max_norm, is_global):
    """Update the state of some groups. Return their coefficients and thresholds."""
    count = tl.load(state, mask=mask, other=0.0)
    average = tl.load(state + 1, mask=mask, other=INF)
    is_warm = count >= warmup
    shared = tl.where(total > max_norm, max_norm / (total + EPS), 1.0)
    limit = ratio * average
    is_hit = x > limit
    early = tl.where(_flag(is_global), tl.minimum(x, max_norm), x * shared)
    late = tl.where(is_hit, limit, x)
    after = tl.where(is_warm, beta * average + (1 - beta) * late, tl.minimum(average, early))
    is_observed = _is_observed(x, total)
    tl.store(state, count + is_observed.to(tl.float64), mask=mask)
    tl.store(state + 1, tl.where(is_observed, after, average), mask=mask)
    own = tl.where(is_hit, limit / (x + EPS), 1.0)
    return tl.where(is_warm, own, shared), tl.where(is_warm, limit, tl.where(_flag(is_global), max_norm, INF))


@triton.jit(do_not_specialize=["state", "norms", "total", "results", "groups", "width", *NUMBERS])
def adapt_kernel(
    state,
    norms,
    total,
    results,
    groups: tl.int64,
    width: tl.int64,
    n0: tl.float64,
    n1: tl.float64,
    n2: tl.float64,
    n3: tl.float64,
    n4: tl.float64,
    n5: tl.float64,
    n6: tl.float64,
    n7: tl.float64,
    KIND: tl.constexpr,
    LANES: tl.constexpr,
):
    """Store each group's coefficient in ``results[:groups]`` and its threshold after them; update ``state``.

    `total` is the norm of all gradients. LANES is a power of two, at least a quantile's window and GROUPS.
    """
    state, norms = pointer_to(state, tl.float64), pointer_to(norms, tl.float64)
    results, total = pointer_to(results, tl.float64), tl.load(pointer_to(total, tl.float64))
    if KIND == "quantile":
        for group in range(tl.program_id(0), groups, tl.num_programs(0)):
            coefficient, threshold = _adapt_quantile(
                state + group * width, width, tl.load(norms + group), total, n0, n1, n2, n3, n4, n5, n6, LANES
            )
            tl.store(results + group, coefficient)
            tl.store(results + groups + group, threshold)
    else:
        for first in range(tl.program_id(0) * GROUPS, groups, tl.num_programs(0) * GROUPS):
            group = first + tl.arange(0, GROUPS)
            mask = group < groups
            own, x = state + width * group, tl.load(norms + group, mask=mask, other=0.0)
            if KIND == "z_score":
                coefficients, thresholds = _adapt_z_score(own, mask, x, total, n0, n1, n2, n3, n4, n5, n6, n7)
            else:
                coefficients, thresholds = _adapt_ema(own, mask, x, total, n0, n1, n2, n3, n4)
            tl.store(results + group, coefficients, mask=mask)
            tl.store(results + groups + group, thresholds, mask=mask)
