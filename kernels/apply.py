"""Scale all gradients in place by a coefficient in device memory: ``g <- g * coefficient``.

Where the coefficient is exactly 1, the kernel neither reads nor writes the gradient. NaN and inf keep their meaning: a
NaN coefficient makes every gradient NaN. An infinite norm gives the coefficient 0, and inf * 0 = NaN marks the element
that caused it.

Launches: 1. Bytes: 1R + 1W, or none; if one coefficient for all is 1, not even the table is read. Programs walk the
chunks backwards: the reduction read the last chunks last, so the L2 cache still holds them.
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
def _scale(pointers, mask, factor, power, TYPE: tl.constexpr):
    x = tl.load(pointers, mask=mask, other=0)
    tl.store(pointers, (x.to(factor.dtype) * factor * power).to(TYPE), mask=mask)


@triton.jit
def scale_chunk(address, numel, chunk, factor, power, LIMIT: tl.constexpr, TYPE: tl.constexpr):
    """Scale one chunk of a tensor: at most LIMIT vectors of its body and, for chunk 0, its edge."""
    body, vectors = body_of(address, numel, chunk, LIMIT, TYPE)
    for tile in range(tl.cdiv(vectors, TILE_VECTORS)):
        pointers, mask = tile_of(body, vectors, tile, TYPE)
        _scale(pointers, mask, factor, power, TYPE)
    pointers, mask = edge_of(address, numel, chunk, TYPE)
    _scale(pointers, mask, factor, power, TYPE)


@triton.jit
def factors_of(coefficient, TYPE: tl.constexpr):
    """Split a coefficient into two factors of the type of the product, neither of them subnormal.

    A norm far above 2**126 gives a coefficient that is subnormal in fp32.
    """
    WIDE: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    SMALL: tl.constexpr = 2.0**-100 if WIDE == tl.float32 else 2.0**-900
    is_small = tl.abs(coefficient) < SMALL
    return (coefficient * tl.where(is_small, 1 / SMALL, 1.0)).to(WIDE), tl.where(is_small, SMALL, 1.0).to(WIDE)


@triton.jit
def _apply_groups(chunks, rows, coefficients, stride, begin, end, TYPE: tl.constexpr):
    lane = tl.arange(0, TILE_VECTORS)[:, None]
    for group in range(first_group(begin), groups_of(begin, end), tl.num_programs(0)):
        pointers, mask, tensor = group_of(chunks, rows, begin, end, group, lane, TYPE)
        factor, power = factors_of(tl.load(coefficients + tensor * stride), TYPE)
        _scale(pointers, mask & (factor * power != 1), factor, power, TYPE)


@triton.jit
def _apply_chunks(chunks, rows, coefficients, stride, begin, end, TYPE: tl.constexpr):
    for reverse in range(first_chunk(begin), end, tl.num_programs(0)):
        address, numel, tensor, chunk = locate(chunks, rows, begin + end - 1 - reverse)
        factor, power = factors_of(tl.load(coefficients + tensor * stride), TYPE)
        if factor * power != 1:
            scale_chunk(address, numel, chunk, factor, power, CHUNK_VECTORS, TYPE)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "coefficients", "stride"])
def apply_kernel(
    chunks,
    rows,
    coefficients,
    stride: tl.int64,
    fp32_end: tl.int64,
    fp32_small_end: tl.int64,
    bf16_end: tl.int64,
    bf16_small_end: tl.int64,
    fp16_end: tl.int64,
    fp16_small_end: tl.int64,
    fp64_end: tl.int64,
    fp64_small_end: tl.int64,
):
    """Scale tensor t by ``coefficients[t * stride]`` (fp64). Stride 0 means one coefficient for all."""
    chunks, rows = pointer_to(chunks, tl.int64), pointer_to(rows, tl.int64)
    coefficients = pointer_to(coefficients, tl.float64)
    if (stride != 0) | (tl.load(coefficients) != 1):
        _apply_groups(chunks, rows, coefficients, stride, fp64_end, fp64_small_end, tl.float64)
        _apply_groups(chunks, rows, coefficients, stride, fp16_end, fp16_small_end, tl.float16)
        _apply_groups(chunks, rows, coefficients, stride, bf16_end, bf16_small_end, tl.bfloat16)
        _apply_groups(chunks, rows, coefficients, stride, fp32_end, fp32_small_end, tl.float32)
        _apply_chunks(chunks, rows, coefficients, stride, fp16_small_end, fp64_end, tl.float64)
        _apply_chunks(chunks, rows, coefficients, stride, bf16_small_end, fp16_end, tl.float16)
        _apply_chunks(chunks, rows, coefficients, stride, fp32_small_end, bf16_end, tl.bfloat16)
        _apply_chunks(chunks, rows, coefficients, stride, fp32_end * 0, fp32_end, tl.float32)
