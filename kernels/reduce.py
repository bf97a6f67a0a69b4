r"""The norm of all gradients in one launch: every gradient is read once, and none is written.

.. math:: \|g\|_p = \Big(\sum_t \sum_i |g_{t,i}|^p\Big)^{1/p}

Each chunk's norm goes to a slot of its own in ``partials`` (fp64). The last program to finish, known by an integer
ticket, combines them in a fixed order and applies the rule of the global norm,
``coefficient = min(max_norm / (norm + 1e-6), 1)``; from gradients that carry a loss scale it takes that off. So the
result is the same to the bit however many programs run and in whatever order they finish.

Powers are summed in fp32 within a chunk (fp64 for fp64 gradients and for powers that need exp2 and log2), and chunks
are combined in fp64. A sum that left the range in which fp32 is right to rounding is done again, by the same loop, on
values scaled by a power of two. So finite gradients never have an infinite norm, and tiny ones never the norm 0.

torch's 0-norm of a set is the number of its tensors that have any nonzero element. So there ``partials`` holds counts:
a tensor's chunks add the numbers of their nonzero elements to its first slot, which is exact in any order. The last
program counts the slots that are not 0, and clears them for the next launch.

Launches: 1, and 1 more where the norm of each tensor is wanted. Bytes: 1R.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import (
    CHUNK_VECTORS,
    GROUP_TENSORS,
    NUMBERS,
    SMALL_ELEMENTS,
    TILE_VECTORS,
    at,
    body_of,
    edge_of,
    first_chunk,
    first_group,
    group_of,
    groups_of,
    locate,
    tile_of,
)

EPS = tl.constexpr(1e-6)  # torch's own: it keeps the coefficient finite where the norm is 0
UNCUT = tl.constexpr(
    1 << 26
)  # vectors: the limit of an array that is not cut into chunks (2**27 norms of chunks: 17 TB)

# The norms that differ in code: p = 2, 1, 0, inf ("max"), -inf ("min") and any other ("power"). Maximum and minimum are
# kept as the bits of |x|, whose order as integers is that of the numbers, with every NaN above infinity.


@triton.jit
def _load(pointers, mask, neutral, WIDE: tl.constexpr):
    return tl.load(pointers, mask=mask, other=neutral).to(WIDE)


@triton.jit
def _fold(x, p, KIND: tl.constexpr, BITS: tl.constexpr):
    """What a tile contributes, folded along each vector: [TILE_VECTORS]."""
    if KIND == "two":
        return tl.sum(x * x, 1)
    elif KIND == "one":
        return tl.sum(tl.abs(x), 1)
    elif KIND == "zero":
        return tl.sum((x != 0).to(x.dtype), 1)
    elif KIND == "max":
        return tl.max(tl.abs(x).to(BITS, bitcast=True), 1)
    elif KIND == "min":
        return tl.min(tl.where(x != x, -1, tl.abs(x).to(BITS, bitcast=True)), 1)  # -1 is a NaN's pattern too
    else:
        return tl.sum(tl.exp2(tl.log2(tl.abs(x)) * p), 1)


@triton.jit
def _merge(a, b, KIND: tl.constexpr):
    if KIND == "max":
        return tl.maximum(a, b)
    elif KIND == "min":
        return tl.minimum(a, b)
    else:
        return a + b


@triton.jit
def _collapse(folded, KIND: tl.constexpr):
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
def _leading(x, p, KIND: tl.constexpr):
    """Of each vector the magnitude whose power is the largest: the smallest for p < 0, which is returned negated."""
    magnitudes = tl.abs(x)
    if KIND == "power":
        magnitudes = tl.where(tl.full((), p, tl.float64) < 0, -magnitudes, magnitudes)
    return tl.max(magnitudes, 1)


@triton.jit
def _scale_for(peak, KIND: tl.constexpr, WIDE: tl.constexpr):
    """What brings the leading value `peak` near 1, and so its power into range.

    For a general power that is its inverse, since 2**p may be out of range. Otherwise it is the power of two whose
    exponent is minus that of `peak`, which scales without rounding: peak * scale < 4.
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
    else:  # of a power of two, by its exponent: a division takes registers that the loops need
        return ((2046 << 52) - scale.to(tl.int64, bitcast=True)).to(tl.float64, bitcast=True)


@triton.jit
def _neutral(p, KIND: tl.constexpr, TYPE: tl.constexpr):
    """What a masked lane holds, to leave the result as it is: inf**p is 0 for p < 0."""
    if KIND == "min":
        return float("inf")
    elif KIND == "power":
        return tl.where(tl.full((), p, tl.float64) < 0, float("inf"), 0.0).to(TYPE)
    else:
        return 0.0


@triton.jit
def _finished(total, scale, p, KIND: tl.constexpr, WIDE: tl.constexpr):
    """The norm, in fp64, from the total of powers of scaled values."""
    if KIND == "max" or KIND == "min":
        return total.to(WIDE, bitcast=True).to(tl.float64)
    else:
        return _root(total.to(tl.float64), p, KIND) * _inverse(scale.to(tl.float64), KIND)


@triton.jit
def _norm(address, numel, chunk, p, KIND: tl.constexpr, TYPE: tl.constexpr, LIMIT: tl.constexpr):
    """The norm, in fp64, of one chunk of a tensor: LIMIT vectors of its body, and its edge if it is chunk 0."""
    WIDE: tl.constexpr = tl.float64 if TYPE == tl.float64 or KIND == "power" else tl.float32
    BITS: tl.constexpr = tl.int64 if WIDE == tl.float64 else tl.int32
    BY_ORDER: tl.constexpr = KIND == "max" or KIND == "min"
    # Above TINY, what the chunk's 2**16 powers lost to subnormal rounding is under 2**-40 of their sum.
    TINY: tl.constexpr = 2.0**-85 if WIDE == tl.float32 else 2.0**-900
    body, vectors = body_of(address, numel, chunk, LIMIT, TYPE)
    edge, edge_mask = edge_of(address, numel, chunk, TYPE)
    scale = tl.full((), 1.0, WIDE)
    total = tl.full((), 0, BITS if BY_ORDER else WIDE)
    neutral = _neutral(p, KIND, TYPE)
    passes = tl.full((), 0, tl.int32)
    again = passes == 0
    while again:
        x = _load(edge, edge_mask, neutral, WIDE)
        peaks = _leading(x, p, KIND)
        folded = _fold(x * scale, p, KIND, BITS)
        pointers, mask = tile_of(body, vectors, 0, TYPE)
        x = tl.load(pointers, mask=mask, other=neutral)
        # Each tile is asked for before the one ahead of it is summed, which keeps enough bytes in flight. The step is
        # 1, which ptxas cannot know: it would unroll the loop, and put each load behind the sum of the tile before.
        for tile in range(1, tl.cdiv(vectors, TILE_VECTORS) + 1, tl.num_programs(1)):
            pointers, mask = tile_of(body, vectors, tile, TYPE)
            following = tl.load(pointers, mask=mask, other=neutral)
            wide = x.to(WIDE)
            peaks = tl.maximum(peaks, _leading(wide, p, KIND))
            folded = _merge(folded, _fold(wide * scale, p, KIND, BITS), KIND)
            x = following
        total = _collapse(folded, KIND)
        passes += 1
        again = passes == 0
        if not BY_ORDER and KIND != "zero":  # those need no scale
            peak = tl.abs(tl.max(peaks, 0))
            in_range = (total > TINY) & (total < float("inf"))
            again = (passes == 1) & (peak > 0) & (peak < float("inf")) & (in_range == 0)
            scale = tl.where(again, _scale_for(peak, KIND, WIDE), scale)
    return _finished(total, scale, p, KIND, WIDE)


@triton.jit
def _norms_of_group(pointers, mask, p, KIND: tl.constexpr, TYPE: tl.constexpr):
    """The norms, in fp64, of a group of small tensors, a row each. All of one is at hand, so it is scaled at once."""
    WIDE: tl.constexpr = tl.float64 if TYPE == tl.float64 or KIND == "power" else tl.float32
    BITS: tl.constexpr = tl.int64 if WIDE == tl.float64 else tl.int32
    x = _load(pointers, mask, _neutral(p, KIND, TYPE), WIDE)
    scale = tl.full((GROUP_TENSORS,), 1.0, WIDE)
    if KIND == "two" or KIND == "one" or KIND == "power":
        peak = tl.abs(_leading(x, p, KIND))
        scale = tl.where((peak > 0) & (peak < float("inf")), _scale_for(peak, KIND, WIDE), scale)
    return _finished(_fold(x * scale[:, None], p, KIND, BITS), scale, p, KIND, WIDE)


@triton.jit
def _reduce_chunks(chunks, rows, partials, begin, end, p, KIND: tl.constexpr, TYPE: tl.constexpr):
    for index in range(first_chunk(begin), end, tl.num_programs(0)):
        address, numel, _, chunk = locate(chunks, rows, index)
        norm = _norm(address, numel, chunk, p, KIND, TYPE, CHUNK_VECTORS)
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


@triton.jit(do_not_specialize=[*NUMBERS, "partials", "ticket", "state", "norm", "inv_scale", "found_inf"])
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
    """Leave each chunk's norm in `partials`, (norm, coefficient) in `state`, and the norm as a NORM in `norm`.

    For the 0-norm `partials` is all 0 before and after. Unless `inv_scale` (fp32) is None, the norm is that of the
    gradients times it, the coefficient multiplies by it, and `found_inf` (fp32) becomes 1 where one is not finite.
    """
    chunks, rows, partials = at(chunks, tl.int64), at(rows, tl.int64), at(partials, tl.float64)
    ticket, state = at(ticket, tl.int32), at(state, tl.float64)
    begin = fp32_end * 0
    _reduce_chunks(chunks, rows, partials, begin, fp32_end, p, KIND, tl.float32)
    _reduce_chunks(chunks, rows, partials, fp32_small_end, bf16_end, p, KIND, tl.bfloat16)
    _reduce_chunks(chunks, rows, partials, bf16_small_end, fp16_end, p, KIND, tl.float16)
    _reduce_chunks(chunks, rows, partials, fp16_small_end, fp64_end, p, KIND, tl.float64)
    _reduce_groups(chunks, rows, partials, fp32_end, fp32_small_end, p, KIND, tl.float32)
    _reduce_groups(chunks, rows, partials, bf16_end, bf16_small_end, p, KIND, tl.bfloat16)
    _reduce_groups(chunks, rows, partials, fp16_end, fp16_small_end, p, KIND, tl.float16)
    _reduce_groups(chunks, rows, partials, fp64_end, fp64_small_end, p, KIND, tl.float64)
    # acq_rel: each program's partials happen before its ticket, and every ticket before the last program's loads.
    if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        total = _norm(partials.to(tl.int64), fp64_small_end, begin, p, KIND, tl.float64, UNCUT)
        if inv_scale is not None:
            tl.store(at(found_inf, tl.float32), 1.0, mask=(total < float("inf")) == 0)
            total *= tl.load(at(inv_scale, tl.float32)).to(tl.float64)
        coefficient = max_norm / (total + EPS)
        # A NaN stays one; but under an infinite bound nothing is clipped, whatever the norm.
        coefficient = tl.where((coefficient > 1) | (max_norm == float("inf")), 1.0, coefficient)
        if inv_scale is not None:
            coefficient *= tl.load(at(inv_scale, tl.float32)).to(tl.float64)
        tl.store(state, total)
        tl.store(state + 1, coefficient)
        if NORM == tl.float64:
            tl.store(at(norm, NORM), total)
        else:  # by way of fp32, from which every narrower type can be rounded to
            tl.store(at(norm, NORM), total.to(tl.float32).to(NORM))
        tl.store(ticket, 0)  # for the next launch
        if KIND == "zero":
            for start in range(0, fp64_small_end, TILE_VECTORS):
                slots = start + tl.arange(0, TILE_VECTORS)
                tl.store(partials + slots, 0.0, mask=slots < fp64_small_end)


@triton.jit(do_not_specialize=["partials", "slices", "norms", "tensors"])
def tensor_norms_kernel(partials, slices, norms, tensors: tl.int64):
    """Leave the 2-norm of each tensor in `norms` (fp64), from the chunks' norms that `reduce_kernel` left."""
    slices, norms = at(slices, tl.int64), at(norms, tl.float64)
    for tensor in range(tl.program_id(0), tensors, tl.num_programs(0)):
        first = tl.load(slices + 2 * tensor)
        count = tl.load(slices + 2 * tensor + 1)
        address = partials.to(tl.int64) + 8 * first
        tl.store(norms + tensor, _norm(address, count, 0, 2.0, "two", tl.float64, UNCUT))
