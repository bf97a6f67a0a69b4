r"""The norm of all gradients in one launch, which reads every gradient once and writes none.

.. math:: \|g\|_p = \Big(\sum_t \sum_i |g_{t,i}|^p\Big)^{1/p}

Each chunk has its own slot in ``partials`` (fp64), and its norm is stored there. An integer ticket counts the programs
that are done. The last one combines the slots in a fixed order and computes the coefficient,
``coefficient = min(max_norm / (norm + 1e-6), 1)``. If the gradients carry a loss scale, it also removes that from both.
So the result has the same bits for any number of programs, in whatever order they finish.

Within a chunk, powers are summed in fp32 (fp64 for fp64 gradients, and for powers that need exp2 and log2). Chunks are
combined in fp64. If a sum is outside the range in which fp32 sums are accurate to rounding, the same loop runs again on
values scaled by a power of two. So finite gradients never have an infinite norm, and tiny ones never have the norm 0.

As in torch, the 0-norm of a set is the number of tensors that have a nonzero element. There ``partials`` holds counts:
each chunk of a tensor adds its number of nonzero elements to the tensor's first slot, which is exact in any order. The
last program counts the slots that are not 0, and clears them for the next launch.

Launches: 1, plus 1 for the norm of each tensor. Bytes: 1R.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import (
    CHUNK_VECTORS,
    GROUP_TENSORS,
    SMALL_ELEMENTS,
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

EPS = tl.constexpr(1e-6)  # torch's value: it keeps the coefficient finite if the norm is 0
MAX_VECTORS = tl.constexpr(1 << 26)  # the limit of an array that is not cut into chunks: 2**27 chunk norms are 17 TB

# KIND is the norm: "two", "one", "zero", "max" (p = inf), "min" (p = -inf), or "power" (any other p). "max" and "min"
# compare the bits of |x| as integers. These have the same order as the numbers, and every NaN is above infinity.


@triton.jit
def _load(pointers, mask, neutral, WIDE: tl.constexpr):
    return tl.load(pointers, mask=mask, other=neutral).to(WIDE)


@triton.jit
def _reduce_vectors(x, p, KIND: tl.constexpr, BITS: tl.constexpr):
    """Reduce the elements of a tile within each vector: the sum of powers, or the extreme, [TILE_VECTORS]."""
    if KIND == "two":
        return tl.sum(x * x, 1)
    elif KIND == "one":
        return tl.sum(tl.abs(x), 1)
    elif KIND == "zero":
        return tl.sum((x != 0).to(x.dtype), 1)
    elif KIND == "max":
        return tl.max(tl.abs(x).to(BITS, bitcast=True), 1)
    elif KIND == "min":
        return tl.min(tl.where(x != x, -1, tl.abs(x).to(BITS, bitcast=True)), 1)  # -1 is a NaN's bits, too
    else:
        return tl.sum(tl.exp2(tl.log2(tl.abs(x)) * p), 1)


@triton.jit
def _combine(a, b, KIND: tl.constexpr):
    if KIND == "max":
        return tl.maximum(a, b)
    elif KIND == "min":
        return tl.minimum(a, b)
    else:
        return a + b


@triton.jit
def _reduce_tile(folded, KIND: tl.constexpr):
    if KIND == "max":
        return tl.max(folded, 0)
    elif KIND == "min":
        return tl.min(folded, 0)
    else:
        return tl.sum(folded, 0)


@triton.jit
def _root(total, p, KIND: tl.constexpr):
    if KIND == "two":
        return tl.sqrt(total)
    elif KIND == "power":
        return tl.exp2(tl.log2(total) / p)
    else:
        return total


@triton.jit
def _vector_peaks(x, p, KIND: tl.constexpr):
    """The magnitude of each vector with the largest power: the maximum or, for p < 0, the minimum, negated."""
    magnitudes = tl.abs(x)
    if KIND == "power":
        magnitudes = tl.where(tl.full((), p, tl.float64) < 0, -magnitudes, magnitudes)
    return tl.max(magnitudes, 1)


@triton.jit
def _scale_to_one(peak, KIND: tl.constexpr, WIDE: tl.constexpr):
    """The scale that brings `peak`, the magnitude with the largest power, near 1 and so its power into range.

    For a general power it is 1 / peak, since 2**p may be out of range. Otherwise it is the power of two whose exponent
    is minus that of `peak`, which scales without rounding: peak * scale < 4.
    """
    if KIND == "power":
        return 1.0 / tl.maximum(peak, 2.0**-1022)
    elif WIDE == tl.float64:
        exponent = tl.maximum(tl.minimum(peak.to(tl.int64, bitcast=True) >> 52, 2045), 1)
        return ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = tl.minimum(peak.to(tl.int32, bitcast=True) >> 23, 253)
        return ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(scale, KIND: tl.constexpr):
    if KIND == "power":
        return 1.0 / scale
    else:  # a power of two is inverted by its exponent: a division would take registers that the loops need
        return ((2046 << 52) - scale.to(tl.int64, bitcast=True)).to(tl.float64, bitcast=True)


@triton.jit
def _neutral(p, KIND: tl.constexpr, TYPE: tl.constexpr):
    """The value of a masked lane, which does not change the result: inf**p is 0 for p < 0."""
    if KIND == "min":
        return float("inf")
    elif KIND == "power":
        return tl.where(tl.full((), p, tl.float64) < 0, float("inf"), 0.0).to(TYPE)
    else:
        return 0.0


@triton.jit
def _norm_from_total(total, scale, p, KIND: tl.constexpr, WIDE: tl.constexpr):
    """The norm (fp64) from the total of the powers of scaled values."""
    if KIND == "max" or KIND == "min":
        return total.to(WIDE, bitcast=True).to(tl.float64)
    else:
        return _root(total.to(tl.float64), p, KIND) * _inverse(scale.to(tl.float64), KIND)


@triton.jit
def _reduce_chunk(edge, edge_mask, body, vectors, scale, neutral, p, KIND: tl.constexpr, TYPE: tl.constexpr):
    """One pass over a chunk: the total of the powers of its values times `scale`, and its peaks, [TILE_VECTORS]."""
    WIDE: tl.constexpr = scale.dtype
    BITS: tl.constexpr = tl.int64 if WIDE == tl.float64 else tl.int32
    x = _load(edge, edge_mask, neutral, WIDE)
    peaks = _vector_peaks(x, p, KIND)
    folded = _reduce_vectors(x * scale, p, KIND, BITS)
    pointers, mask = tile_of(body, vectors, 0, TYPE)
    x = tl.load(pointers, mask=mask, other=neutral)
    # Each tile is loaded before the previous one is summed, to keep enough bytes in flight. The step is 1, but ptxas
    # cannot know that. With a literal 1 it unrolls the loop and moves each load behind the previous tile's sum.
    for tile in range(1, tl.cdiv(vectors, TILE_VECTORS) + 1, tl.num_programs(1)):
        pointers, mask = tile_of(body, vectors, tile, TYPE)
        next_x = tl.load(pointers, mask=mask, other=neutral)
        wide = x.to(WIDE)
        peaks = tl.maximum(peaks, _vector_peaks(wide, p, KIND))
        folded = _combine(folded, _reduce_vectors(wide * scale, p, KIND, BITS), KIND)
        x = next_x
    return _reduce_tile(folded, KIND), peaks


@triton.jit
def norm_of_chunk(address, numel, chunk, p, KIND: tl.constexpr, TYPE: tl.constexpr, LIMIT: tl.constexpr):
    """The norm (fp64) of one chunk of a tensor: at most LIMIT vectors of its body and, for chunk 0, its edge."""
    WIDE: tl.constexpr = tl.float64 if TYPE == tl.float64 or KIND == "power" else tl.float32
    BITS: tl.constexpr = tl.int64 if WIDE == tl.float64 else tl.int32
    BY_ORDER: tl.constexpr = KIND == "max" or KIND == "min"
    # Above TINY, subnormal rounding of the chunk's 2**16 powers costs less than 2**-40 of their sum.
    TINY: tl.constexpr = 2.0**-85 if WIDE == tl.float32 else 2.0**-900
    body, vectors = body_of(address, numel, chunk, LIMIT, TYPE)
    edge, edge_mask = edge_of(address, numel, chunk, TYPE)
    scale = tl.full((), 1.0, WIDE)
    total = tl.full((), 0, BITS if BY_ORDER else WIDE)
    neutral = _neutral(p, KIND, TYPE)
    passes = tl.full((), 0, tl.int32)
    again = passes == 0
    while again:
        total, peaks = _reduce_chunk(edge, edge_mask, body, vectors, scale, neutral, p, KIND, TYPE)
        passes += 1
        again = passes == 0
        if not BY_ORDER and KIND != "zero":  # these need no scale
            peak = tl.abs(tl.max(peaks, 0))
            in_range = (total > TINY) & (total < float("inf"))
            again = (passes == 1) & (peak > 0) & (peak < float("inf")) & (in_range == 0)
            scale = tl.where(again, _scale_to_one(peak, KIND, WIDE), scale)
    return _norm_from_total(total, scale, p, KIND, WIDE)


@triton.jit
def _norms_of_group(pointers, mask, p, KIND: tl.constexpr, TYPE: tl.constexpr):
    """The norms (fp64) of a group of small tensors, one a row. All elements are loaded, so one scaled pass suffices."""
    WIDE: tl.constexpr = tl.float64 if TYPE == tl.float64 or KIND == "power" else tl.float32
    BITS: tl.constexpr = tl.int64 if WIDE == tl.float64 else tl.int32
    x = _load(pointers, mask, _neutral(p, KIND, TYPE), WIDE)
    scale = tl.full((GROUP_TENSORS,), 1.0, WIDE)
    if KIND == "two" or KIND == "one" or KIND == "power":
        peak = tl.abs(_vector_peaks(x, p, KIND))
        scale = tl.where((peak > 0) & (peak < float("inf")), _scale_to_one(peak, KIND, WIDE), scale)
    return _norm_from_total(_reduce_vectors(x * scale[:, None], p, KIND, BITS), scale, p, KIND, WIDE)


@triton.jit
def _reduce_chunks(chunks, rows, partials, begin, end, p, KIND: tl.constexpr, TYPE: tl.constexpr):
    for index in range(first_chunk(begin), end, tl.num_programs(0)):
        address, numel, _, chunk = locate(chunks, rows, index)
        norm = norm_of_chunk(address, numel, chunk, p, KIND, TYPE, CHUNK_VECTORS)
        if KIND == "zero":
            tl.atomic_add(partials + (index - chunk), norm, sem="relaxed")
        else:
            tl.store(partials + index, norm)


@triton.jit
def _reduce_groups(chunks, rows, partials, begin, end, p, KIND: tl.constexpr, TYPE: tl.constexpr):
    lane = tl.arange(0, GROUP_TENSORS)[:, None] * SMALL_ELEMENTS + tl.arange(0, SMALL_ELEMENTS)[None, :]
    for group in range(first_group(begin), groups_of(begin, end), tl.num_programs(0)):
        pointers, mask, _ = group_of(chunks, rows, begin, end, group, lane, TYPE)
        slots = group * GROUP_TENSORS + tl.arange(0, GROUP_TENSORS)
        tl.store(partials + begin + slots, _norms_of_group(pointers, mask, p, KIND, TYPE), mask=slots < end - begin)


@triton.jit
def _store_results(total, state, norm, inv_scale, found_inf, max_norm, NORM: tl.constexpr):
    """Compute the coefficient from the norm `total`, and store both; see `reduce_kernel`."""
    if inv_scale is not None:
        tl.store(pointer_to(found_inf, tl.float32), 1.0, mask=(total < float("inf")) == 0)
        total *= tl.load(pointer_to(inv_scale, tl.float32)).to(tl.float64)
    coefficient = max_norm / (total + EPS)
    # A NaN stays NaN. But an infinite bound clips nothing, whatever the norm.
    coefficient = tl.where((coefficient > 1) | (max_norm == float("inf")), 1.0, coefficient)
    if inv_scale is not None:
        coefficient *= tl.load(pointer_to(inv_scale, tl.float32)).to(tl.float64)
    tl.store(state, total)
    tl.store(state + 1, coefficient)
    if NORM == tl.float64:
        tl.store(pointer_to(norm, NORM), total)
    else:  # via fp32, which converts to every narrower type
        tl.store(pointer_to(norm, NORM), total.to(tl.float32).to(NORM))


@triton.jit
def _clear(partials, count):
    for start in range(0, count, TILE_VECTORS):
        slots = start + tl.arange(0, TILE_VECTORS)
        tl.store(partials + slots, 0.0, mask=slots < count)


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "partials", "ticket", "state", "norm", "inv_scale", "found_inf"])
def reduce_kernel(
    chunks,
    rows,
    partials,
    ticket,
    state,
    norm,
    fp32_end: tl.int64,
    fp32_small_end: tl.int64,
    bf16_end: tl.int64,
    bf16_small_end: tl.int64,
    fp16_end: tl.int64,
    fp16_small_end: tl.int64,
    fp64_end: tl.int64,
    fp64_small_end: tl.int64,
    p: tl.float64,
    max_norm: tl.float64,
    KIND: tl.constexpr,
    NORM: tl.constexpr,
    inv_scale=None,
    found_inf=None,
):
    """Store each chunk's norm in `partials`, (norm, coefficient) in `state`, and the norm as a NORM in `norm`.

    For the 0-norm, `partials` is all 0 before and after. If `inv_scale` (fp32) is given, both norm and coefficient are
    multiplied by it, and `found_inf` (fp32) becomes 1 if a gradient is not finite.
    """
    chunks, rows, partials = pointer_to(chunks, tl.int64), pointer_to(rows, tl.int64), pointer_to(partials, tl.float64)
    ticket, state = pointer_to(ticket, tl.int32), pointer_to(state, tl.float64)
    begin = fp32_end * 0
    _reduce_chunks(chunks, rows, partials, begin, fp32_end, p, KIND, tl.float32)
    _reduce_chunks(chunks, rows, partials, fp32_small_end, bf16_end, p, KIND, tl.bfloat16)
    _reduce_chunks(chunks, rows, partials, bf16_small_end, fp16_end, p, KIND, tl.float16)
    _reduce_chunks(chunks, rows, partials, fp16_small_end, fp64_end, p, KIND, tl.float64)
    _reduce_groups(chunks, rows, partials, fp32_end, fp32_small_end, p, KIND, tl.float32)
    _reduce_groups(chunks, rows, partials, bf16_end, bf16_small_end, p, KIND, tl.bfloat16)
    _reduce_groups(chunks, rows, partials, fp16_end, fp16_small_end, p, KIND, tl.float16)
    _reduce_groups(chunks, rows, partials, fp64_end, fp64_small_end, p, KIND, tl.float64)
    # acq_rel: a program's stores happen before its ticket, and every ticket before the last program's loads.
    if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        total = norm_of_chunk(partials.to(tl.int64), fp64_small_end, begin, p, KIND, tl.float64, MAX_VECTORS)
        _store_results(total, state, norm, inv_scale, found_inf, max_norm, NORM)
        tl.store(ticket, 0)  # for the next launch
        if KIND == "zero":
            _clear(partials, fp64_small_end)


@triton.jit(do_not_specialize=["partials", "slices", "norms", "tensors"])
def tensor_norms_kernel(partials, slices, norms, tensors: tl.int64):
    """Store the 2-norm of each tensor in `norms` (fp64), from the chunk norms that `reduce_kernel` stored."""
    slices, norms = pointer_to(slices, tl.int64), pointer_to(norms, tl.float64)
    for tensor in range(tl.program_id(0), tensors, tl.num_programs(0)):
        first = tl.load(slices + 2 * tensor)
        count = tl.load(slices + 2 * tensor + 1)
        address = partials.to(tl.int64) + 8 * first
        tl.store(norms + tensor, norm_of_chunk(address, count, 0, 2.0, "two", tl.float64, MAX_VECTORS))
