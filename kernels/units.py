r"""Clip units, the rows of gradients, by the norms of the same rows of the weights.

Rows are those of dimension 0. With x the norm of a unit and w that of its weights,

.. math:: T = \text{ratio} \cdot \max(w, \text{eps}), \qquad g \leftarrow g \cdot T / \max(x, 10^{-6}) \text{ if } x > T

A program takes one unit at a time, however small: it reads the weights and the gradient for their norms, chunk by
chunk, and scales the gradient only if it has to, while the caches still hold it. Chunks are combined in fp64. No unit
needs another one, so there is no workspace but the flags.

Launches: 1. Bytes: 2R, and 1R from the cache + 1W where a unit is scaled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .apply import factors_of, scale_chunk
from .reduce import norm_of_chunk
from .table import CHUNK_VECTORS, VECTOR_BYTES, first_chunk, locate, pointer_to


@triton.jit
def _norm_of_unit(address, numel, chunks, TYPE: tl.constexpr):
    norm = tl.full((), 0.0, tl.float64)
    for chunk in range(chunks):
        other = norm_of_chunk(address, numel, chunk, 2.0, "two", TYPE, CHUNK_VECTORS)
        largest = tl.maximum(norm, other)
        scale = tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)  # no square overflows
        norm = tl.sqrt((norm / scale) * (norm / scale) + (other / scale) * (other / scale)) * scale
    return norm


@triton.jit
def _clip_units(units, rows, weights, counts, ratios, eps, changed, begin, end, TYPE: tl.constexpr):
    """Clip the units from `begin` to `end`. Return `changed`, which is set if one was scaled."""
    SIZE: tl.constexpr = TYPE.primitive_bitwidth // 8
    for index in range(first_chunk(begin), end, tl.num_programs(0)):
        address, numel, tensor, unit = locate(units, rows, index)
        columns = numel // tl.load(counts + tensor)
        offset = columns * unit * SIZE
        chunks = tl.cdiv(columns * SIZE, CHUNK_VECTORS * VECTOR_BYTES).to(tl.int32)
        weight = _norm_of_unit(tl.load(weights + 2 * tensor) + offset, columns, chunks, TYPE)
        norm = _norm_of_unit(address + offset, columns, chunks, TYPE)
        limit = tl.load(ratios + tensor) * tl.where(weight < eps, eps, weight)
        if norm > limit:
            factor, power = factors_of(limit / tl.where(norm > 1e-6, norm, 1e-6), TYPE)
            for chunk in range(chunks):
                scale_chunk(address + offset, columns, chunk, factor, power, CHUNK_VECTORS, TYPE)
            changed = 1
    return changed


@triton.jit(
    do_not_specialize=[
        *("units", "rows", "weights", "counts", "ratios", "flags"),
        *("fp32_end", "bf16_end", "fp16_end", "fp64_end"),
    ]
)
def clip_units_kernel(
    units,
    rows,
    weights,
    counts,
    ratios,
    flags,
    fp32_end: tl.int64,
    bf16_end: tl.int64,
    fp16_end: tl.int64,
    fp64_end: tl.int64,
    eps: tl.float64,
):
    """Clip the units of every tensor; each program stores in `flags` (int32) whether it scaled one.

    `weights` has the weights' rows as `rows` has the gradients'; ``counts[t]`` (int64) is the number of tensor t's
    units, and ``ratios[t]`` (fp64) its ratio.
    """
    units, rows, weights = pointer_to(units, tl.int64), pointer_to(rows, tl.int64), pointer_to(weights, tl.int64)
    counts, ratios = pointer_to(counts, tl.int64), pointer_to(ratios, tl.float64)
    changed = tl.full((), 0, tl.int32)
    begin = fp32_end * 0
    changed = _clip_units(units, rows, weights, counts, ratios, eps, changed, begin, fp32_end, tl.float32)
    changed = _clip_units(units, rows, weights, counts, ratios, eps, changed, fp32_end, bf16_end, tl.bfloat16)
    changed = _clip_units(units, rows, weights, counts, ratios, eps, changed, bf16_end, fp16_end, tl.float16)
    changed = _clip_units(units, rows, weights, counts, ratios, eps, changed, fp16_end, fp64_end, tl.float64)
    tl.store(pointer_to(flags, tl.int32) + tl.program_id(0), changed)
