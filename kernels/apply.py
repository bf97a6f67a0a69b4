"""Scale all gradients in place by a coefficient that lies on the device: ``g <- g * coefficient``.

Where the coefficient is exactly 1 nothing is read and nothing written. NaN and inf keep their meaning: a NaN
coefficient poisons every gradient, and the coefficient 0 of an infinite norm makes inf * 0 = NaN of the culprit.

Launches: 1. Bytes: 1R + 1W, or none. The chunks are walked backwards, so that what the reduction read last, and the L2
cache still holds, is read first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import CHUNK_VECTORS, TILE_VECTORS, body_of, edge_of, first_chunk, locate, tile_of


@triton.jit
def _scale(pointers, mask, factor, power, TYPE: tl.constexpr):
    x = tl.load(pointers, mask=mask, other=0)
    tl.store(pointers, (x.to(factor.dtype) * factor * power).to(TYPE), mask=mask)


@triton.jit
def _apply_segment(chunks, rows, coefficients, stride, begin, end, TYPE: tl.constexpr):
    WIDE: tl.constexpr = tl.float64 if TYPE == tl.float64 else tl.float32
    # A coefficient this small is split in two factors, so that none is subnormal: norms reach far beyond 2**126.
    SMALL: tl.constexpr = 2.0**-100 if WIDE == tl.float32 else 2.0**-900
    for reverse in range(first_chunk(begin), end, tl.num_programs(0)):
        address, numel, tensor, chunk = locate(chunks, rows, begin + end - 1 - reverse)
        coefficient = tl.load(coefficients + tensor * stride)
        power = tl.where(tl.abs(coefficient) < SMALL, SMALL, 1.0)
        factor = (coefficient / power).to(WIDE)
        if factor * power.to(WIDE) != 1:
            body, vectors = body_of(address, numel, chunk, CHUNK_VECTORS, TYPE)
            for tile in range(tl.cdiv(vectors, TILE_VECTORS)):
                pointers, mask = tile_of(body, vectors, tile, TYPE)
                _scale(pointers, mask, factor, power.to(WIDE), TYPE)
            pointers, mask = edge_of(address, numel, chunk, TYPE)
            _scale(pointers, mask, factor, power.to(WIDE), TYPE)


@triton.jit(do_not_specialize=["coefficients", "stride", "fp32_end", "bf16_end", "fp16_end", "fp64_end"])
def apply_kernel(
    chunks,
    rows,
    coefficients,
    stride: tl.int64,
    fp32_end: tl.int64,
    bf16_end: tl.int64,
    fp16_end: tl.int64,
    fp64_end: tl.int64,
):
    """Scale tensor t by ``coefficients[t * stride]`` (fp64): stride 0 takes one coefficient for all."""
    _apply_segment(chunks, rows, coefficients, stride, fp16_end, fp64_end, tl.float64)
    _apply_segment(chunks, rows, coefficients, stride, bf16_end, fp16_end, tl.float16)
    _apply_segment(chunks, rows, coefficients, stride, fp32_end, bf16_end, tl.bfloat16)
    _apply_segment(chunks, rows, coefficients, stride, fp32_end * 0, fp32_end, tl.float32)
