"""Clamp all gradients in place to [minimum, maximum], in one pass: ``g <- min(max(g, minimum), maximum)``.

A 16-byte vector is written only if one of its elements lies outside the bounds. As in torch a NaN element stays NaN,
a NaN bound makes NaN of everything, and where minimum > maximum everything becomes the maximum.

Launches: 1. Bytes: 1R, and the vectors that change.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import CHUNK_VECTORS, TILE_VECTORS, body_of, edge_of, first_chunk, locate, tile_of


@triton.jit
def _narrowed(x, TYPE: tl.constexpr):
    """To the gradients' type, which represents x exactly: bf16 is the upper half of fp32, and needs no rounding."""
    if TYPE == tl.bfloat16:
        return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(TYPE, bitcast=True)
    else:
        return x.to(TYPE)


@triton.jit
def _clamp(pointers, mask, minimum, maximum, TYPE: tl.constexpr, WIDE: tl.constexpr):
    """Clamp a tile, and tell of which vectors an element was outside."""
    x = tl.load(pointers, mask=mask, other=0).to(WIDE)
    one = tl.where((minimum != minimum) | (maximum != maximum), float("nan"), 1.0)  # a NaN bound makes all NaN
    if WIDE == tl.float64:  # NVIDIA has no fp64 minimum: comparisons take a third of the instructions
        outside = tl.max(((x < minimum) | (x > maximum)).to(tl.int32), 1)[:, None] != 0
        x = tl.where(x < minimum, minimum, x)
        x = tl.where(x > maximum, maximum, x) * one
    else:
        # A reduction inside the thread, broadcast as the store's mask, costs less than a comparison an element.
        outside = (tl.min(x, 1)[:, None] < minimum) | (tl.max(x, 1)[:, None] > maximum)
        x = tl.maximum(x, minimum, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, maximum, propagate_nan=tl.PropagateNan.ALL)
    everything = tl.full((TILE_VECTORS, 1), 1, WIDE) * one != 1
    tl.store(pointers, _narrowed(x, TYPE), mask=mask & (outside | everything))
    return mask & outside  # not for a NaN, which stays one


@triton.jit
def _clamp_segment(chunks, rows, bounds, changed, begin, end, minimum, maximum, TYPE: tl.constexpr):
    """Clamp the chunks of one element type; return `changed`, set for the lanes that changed something."""
    WIDE: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    low = tl.full((), minimum, tl.float64)
    high = tl.full((), maximum, tl.float64)
    for index in range(first_chunk(begin), end, tl.num_programs(0)):
        address, numel, tensor, chunk = locate(chunks, rows, index)
        if bounds is not None:
            low = tl.load(bounds + 2 * tensor)
            high = tl.load(bounds + 2 * tensor + 1)
        # Rounded to the gradient's own type first, as torch rounds them.
        lowest = low.to(WIDE).to(TYPE).to(WIDE)
        highest = high.to(WIDE).to(TYPE).to(WIDE)
        body, vectors = body_of(address, numel, chunk, CHUNK_VECTORS, TYPE)
        for tile in range(tl.cdiv(vectors, TILE_VECTORS)):
            pointers, mask = tile_of(body, vectors, tile, TYPE)
            changed |= _clamp(pointers, mask, lowest, highest, TYPE, WIDE)
        pointers, mask = edge_of(address, numel, chunk, TYPE)
        changed |= _clamp(pointers, mask, lowest, highest, TYPE, WIDE)
    return changed


@triton.jit(do_not_specialize=["fp32_end", "bf16_end", "fp16_end", "fp64_end"])
def clamp_kernel(
    chunks,
    rows,
    bounds,
    flags,
    fp32_end: tl.int64,
    bf16_end: tl.int64,
    fp16_end: tl.int64,
    fp64_end: tl.int64,
    minimum: tl.float64,
    maximum: tl.float64,
):
    """Clamp every tensor to [minimum, maximum], or tensor t to ``bounds[t]`` (fp64, [tensors, 2]) unless that is None.

    Unless `flags` (int32, one a program) is None, each program leaves there whether any element was outside.
    """
    seen = tl.full((TILE_VECTORS, 1), 0, tl.int1)
    seen = _clamp_segment(chunks, rows, bounds, seen, fp32_end * 0, fp32_end, minimum, maximum, tl.float32)
    seen = _clamp_segment(chunks, rows, bounds, seen, fp32_end, bf16_end, minimum, maximum, tl.bfloat16)
    seen = _clamp_segment(chunks, rows, bounds, seen, bf16_end, fp16_end, minimum, maximum, tl.float16)
    seen = _clamp_segment(chunks, rows, bounds, seen, fp16_end, fp64_end, minimum, maximum, tl.float64)
    if flags is not None:
        tl.store(flags + tl.program_id(0), tl.max(tl.max(seen.to(tl.int32), 1), 0))
