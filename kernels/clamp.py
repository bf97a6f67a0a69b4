"""Clamp all gradients in place to [minimum, maximum], in one pass.

Each element becomes ``min(max(g, minimum), maximum)``. A 16-byte vector is written only if one of its elements is out
of bounds. As in torch, a NaN element stays NaN, a NaN bound makes every element NaN, and if minimum > maximum every
element becomes the maximum.

Launches: 1. Bytes: 1R, plus 1W of the vectors that change.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import (
    CHUNK_VECTORS,
    TILE_VECTORS,
    UNSPECIALIZED,
    body_of,
    edge_of,
    first_chunk,
    first_group,
    group_of,
    groups_of,
    locate,
    pointer_to,
    tile_of,
)


@triton.jit
def _narrow(x, TYPE: tl.constexpr):
    """Convert x to the gradients' type, which represents it exactly: bf16 is the upper half of fp32, so no rounding."""
    if TYPE == tl.bfloat16:
        return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(TYPE, bitcast=True)
    else:
        return x.to(TYPE)


@triton.jit
def _clamp(pointers, mask, minimum, maximum, TYPE: tl.constexpr):
    """Clamp a tile. Return the mask of the vectors that had an element outside the bounds."""
    WIDE: tl.constexpr = minimum.dtype
    x = tl.load(pointers, mask=mask, other=0).to(WIDE)
    one = tl.where((minimum != minimum) | (maximum != maximum), float("nan"), 1.0)  # NaN if a bound is
    if WIDE == tl.float64:  # NVIDIA has no fp64 minimum instruction: comparisons take a third of the instructions
        outside = tl.max(((x < minimum) | (x > maximum)).to(tl.int32), 1)[:, None] != 0
        x = tl.where(x < minimum, minimum, x)
        x = tl.where(x > maximum, maximum, x) * one
    else:
        # A reduction within the thread gives the store's mask for less than a comparison of each element costs.
        outside = (tl.min(x, 1)[:, None] < minimum) | (tl.max(x, 1)[:, None] > maximum)
        x = tl.maximum(x, minimum, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, maximum, propagate_nan=tl.PropagateNan.ALL)
    everything = tl.full((TILE_VECTORS, 1), 1, WIDE) * one != 1
    tl.store(pointers, _narrow(x, TYPE), mask=mask & (outside | everything))
    return mask & outside  # False for a NaN, which does not change


@triton.jit
def _rounded_bounds(bounds, tensor, minimum, maximum, TYPE: tl.constexpr):
    """A tensor's bounds, its own or the common ones, rounded to the gradient's type as torch rounds them."""
    WIDE: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    low = tl.full((), minimum, tl.float64)
    high = tl.full((), maximum, tl.float64)
    if bounds is not None:
        low = tl.load(bounds + 2 * tensor)
        high = tl.load(bounds + 2 * tensor + 1)
    return low.to(WIDE).to(TYPE).to(WIDE), high.to(WIDE).to(TYPE).to(WIDE)


@triton.jit
def _clamp_chunks(chunks, rows, bounds, changed, begin, end, minimum, maximum, TYPE: tl.constexpr):
    """Clamp the chunks from `begin` to `end`. Return `changed`, which is set for the lanes that changed something."""
    for index in range(first_chunk(begin), end, tl.num_programs(0)):
        address, numel, tensor, chunk = locate(chunks, rows, index)
        lowest, highest = _rounded_bounds(bounds, tensor, minimum, maximum, TYPE)
        body, vectors = body_of(address, numel, chunk, CHUNK_VECTORS, TYPE)
        for tile in range(tl.cdiv(vectors, TILE_VECTORS)):
            pointers, mask = tile_of(body, vectors, tile, TYPE)
            changed |= _clamp(pointers, mask, lowest, highest, TYPE)
        pointers, mask = edge_of(address, numel, chunk, TYPE)
        changed |= _clamp(pointers, mask, lowest, highest, TYPE)
    return changed


@triton.jit
def _clamp_groups(chunks, rows, bounds, changed, begin, end, minimum, maximum, TYPE: tl.constexpr):
    """The same for groups of small tensors."""
    lane = tl.arange(0, TILE_VECTORS)[:, None]
    for group in range(first_group(begin), groups_of(begin, end), tl.num_programs(0)):
        pointers, mask, tensor = group_of(chunks, rows, begin, end, group, lane, TYPE)
        lowest, highest = _rounded_bounds(bounds, tensor, minimum, maximum, TYPE)
        changed |= _clamp(pointers, mask, lowest, highest, TYPE)
    return changed


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "bounds", "flags"])
def clamp_kernel(
    chunks,
    rows,
    bounds,
    flags,
    fp32_end: tl.int64,
    fp32_small_end: tl.int64,
    bf16_end: tl.int64,
    bf16_small_end: tl.int64,
    fp16_end: tl.int64,
    fp16_small_end: tl.int64,
    fp64_end: tl.int64,
    fp64_small_end: tl.int64,
    minimum: tl.float64,
    maximum: tl.float64,
):
    """Clamp every tensor to [minimum, maximum], or tensor t to ``bounds[t]`` if `bounds` (fp64, [tensors, 2]) is given.

    If `flags` (int32, one a program) is given, each program stores there whether an element was outside the bounds.
    """
    chunks, rows = pointer_to(chunks, tl.int64), pointer_to(rows, tl.int64)
    if bounds is not None:
        bounds = pointer_to(bounds, tl.float64)
    begin = fp32_end * 0
    changed = tl.full((TILE_VECTORS, 1), 0, tl.int1)
    changed = _clamp_chunks(chunks, rows, bounds, changed, begin, fp32_end, minimum, maximum, tl.float32)
    changed = _clamp_chunks(chunks, rows, bounds, changed, fp32_small_end, bf16_end, minimum, maximum, tl.bfloat16)
    changed = _clamp_chunks(chunks, rows, bounds, changed, bf16_small_end, fp16_end, minimum, maximum, tl.float16)
    changed = _clamp_chunks(chunks, rows, bounds, changed, fp16_small_end, fp64_end, minimum, maximum, tl.float64)
    changed = _clamp_groups(chunks, rows, bounds, changed, fp32_end, fp32_small_end, minimum, maximum, tl.float32)
    changed = _clamp_groups(chunks, rows, bounds, changed, bf16_end, bf16_small_end, minimum, maximum, tl.bfloat16)
    changed = _clamp_groups(chunks, rows, bounds, changed, fp16_end, fp16_small_end, minimum, maximum, tl.float16)
    changed = _clamp_groups(chunks, rows, bounds, changed, fp64_end, fp64_small_end, minimum, maximum, tl.float64)
    if flags is not None:
        tl.store(pointer_to(flags, tl.int32) + tl.program_id(0), tl.max(tl.max(changed.to(tl.int32), 1), 0))
