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
def _clamp(pointers, mask, minimum, maximum, TYPE: tl.constexpr, WIDE: tl.constexpr):
    x = tl.load(pointers, mask=mask, other=0).to(WIDE)
    # A reduction inside the thread, broadcast as the store's mask, costs less than a comparison an element. `== 0`
    # rather than the opposite comparisons, so that a NaN bound changes every vector.
    inside = (tl.min(x, 1) >= minimum) & (tl.max(x, 1) <= maximum)
    x = tl.maximum(x, minimum, propagate_nan=tl.PropagateNan.ALL)
    x = tl.minimum(x, maximum, propagate_nan=tl.PropagateNan.ALL)
    tl.store(pointers, x.to(TYPE), mask=mask & (inside == 0)[:, None])


@triton.jit
def _clamp_segment(chunks, rows, minimum, maximum, begin, end, TYPE: tl.constexpr):
    WIDE: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    # Rounded to the gradient's own type first, as torch rounds them.
    low = tl.full((), minimum, tl.float64).to(WIDE).to(TYPE).to(WIDE)
    high = tl.full((), maximum, tl.float64).to(WIDE).to(TYPE).to(WIDE)
    for index in range(first_chunk(begin), end, tl.num_programs(0)):
        address, numel, _, chunk = locate(chunks, rows, index)
        body, vectors = body_of(address, numel, chunk, CHUNK_VECTORS, TYPE)
        for tile in range(tl.cdiv(vectors, TILE_VECTORS)):
            pointers, mask = tile_of(body, vectors, tile, TYPE)
            _clamp(pointers, mask, low, high, TYPE, WIDE)
        pointers, mask = edge_of(address, numel, chunk, TYPE)
        _clamp(pointers, mask, low, high, TYPE, WIDE)


@triton.jit(do_not_specialize=["fp32_end", "bf16_end", "fp16_end", "fp64_end"])
def clamp_kernel(
    chunks,
    rows,
    fp32_end: tl.int64,
    bf16_end: tl.int64,
    fp16_end: tl.int64,
    fp64_end: tl.int64,
    minimum: tl.float64,
    maximum: tl.float64,
):
    """Clamp every tensor to [minimum, maximum]."""
    _clamp_segment(chunks, rows, minimum, maximum, fp32_end * 0, fp32_end, tl.float32)
    _clamp_segment(chunks, rows, minimum, maximum, fp32_end, bf16_end, tl.bfloat16)
    _clamp_segment(chunks, rows, minimum, maximum, bf16_end, fp16_end, tl.float16)
    _clamp_segment(chunks, rows, minimum, maximum, fp16_end, fp64_end, tl.float64)
