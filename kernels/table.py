"""The chunk table: how one launch finds every gradient.

Two arrays describe a list of tensors to the kernels:

- ``chunks``, the chunk map: one int64 a chunk, ``tensor << 32 | chunk within the tensor``. It depends only on sizes and
  element types, so it stays valid when gradients move. Chunks are sorted by element type, in the order of
  `ELEMENT_SIZES`; within a type, chunks of small tensors come last. ``ends`` holds the end of each of these segments.
- ``rows``, two int64 a tensor: its address and its number of elements. Only the addresses change when gradients move.

The kernels take all memory as integer addresses, and `pointer_to` turns an address into a pointer. For a tensor
argument, Triton's launcher would ask the driver on every launch whether the device can read that address.

A tensor of n elements has ``ceil(n * itemsize / CHUNK_BYTES)`` chunks. The kernels find its first 16-byte boundary
themselves. The *head* lies before that boundary and the *tail* after the last whole vector, each shorter than 16 bytes.
Head and tail are the *edge*, which chunk 0 reads. The *body* between them is cut into chunks of whole vectors. So every
access to a body is 128 bits wide at any address, misaligned tensors need no slow path, and the number of chunks does
not depend on the address.

A chunk costs three dependent loads (its map entry, its tensor's row, its elements) and a reduction by the whole
program: some microseconds, whatever its size. So *small* tensors, of at most `SMALL_ELEMENTS`, are processed in groups,
one element a lane: a program handles `GROUP_TENSORS` of them in the time of one chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

Int64s: TypeAlias = npt.NDArray[np.int64]

VECTOR_BYTES = tl.constexpr(16)  # one 128-bit access
TILE_VECTORS = tl.constexpr(512)  # 8 KB, which a program reads at a time: 8 warps of 32 lanes, 2 vectors a lane
CHUNK_VECTORS = tl.constexpr(8192)  # 128 KB: long enough to amortise a chunk's start, short enough to balance load
SMALL_ELEMENTS = tl.constexpr(64)  # the size limit of a small tensor
GROUP_TENSORS = tl.constexpr(TILE_VECTORS.value // SMALL_ELEMENTS.value)  # a group has one element a lane
LAUNCH_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
"""For every kernel. Fusion is pinned: its default differs between Triton versions, and results differ with it."""

CHUNK_BYTES = CHUNK_VECTORS.value * VECTOR_BYTES.value
ELEMENT_SIZES = (4, 2, 2, 8)
TYPES = (tl.float32, tl.bfloat16, tl.float16, tl.float64)
"""The bytes of an element, and Triton's type for it, in the order of the map's segments."""

UNSPECIALIZED = [f"{name}_end" for dtype in ("fp32", "bf16", "fp16", "fp64") for name in (dtype, f"{dtype}_small")]
UNSPECIALIZED += ["chunks", "rows"]
"""The parameters of every kernel that Triton must not specialise on: `Layout.ends`, in its order, and both tables."""


@dataclass(frozen=True)
class Layout:
    """The chunk map of a list of tensors.

    Attributes:
        chunks: The map, shape [chunks].
        ends: The end of each segment in the map: for each of `ELEMENT_SIZES`, first large tensors, then small ones.
        slices: The first chunk and the number of chunks of each tensor, shape [tensors, 2].
    """

    chunks: Int64s
    ends: tuple[int, ...]
    slices: Int64s


def lay_out(numels: Int64s, segments: Int64s) -> Layout:
    """Build the map for tensors of `numels` elements; `segments` holds each one's position in `ELEMENT_SIZES`."""
    counts = -(-numels * np.asarray(ELEMENT_SIZES)[segments] // CHUNK_BYTES)
    parts = 2 * segments + (numels <= SMALL_ELEMENTS.value)
    order = np.argsort(parts, kind="stable")
    chunks, firsts = _map(order, counts[order])
    slices = np.empty((len(numels), 2), dtype=np.int64)
    slices[order, 0] = firsts
    slices[:, 1] = counts
    ends = np.cumsum([counts[parts == part].sum() for part in range(2 * len(ELEMENT_SIZES))])
    return Layout(chunks, tuple(ends.tolist()), slices)


def lay_out_units(counts: Int64s, segments: Int64s) -> tuple[Int64s, tuple[int, ...]]:
    """Build a map as `Layout.chunks` whose chunks are units, ``counts[i]`` of tensor i. Return it and its four ends."""
    order = np.argsort(segments, kind="stable")
    units, _ = _map(order, counts[order])
    return units, tuple(np.cumsum([counts[segments == i].sum() for i in range(len(ELEMENT_SIZES))]).tolist())


def _map(order: Int64s, counts: Int64s) -> tuple[Int64s, Int64s]:
    """Return the map of tensors in an order, given the number of chunks of each, and the first chunk of each."""
    firsts = np.cumsum(counts) - counts
    return np.repeat(order << 32, counts) + np.arange(counts.sum()) - np.repeat(firsts, counts), firsts


@triton.jit
def pointer_to(address, TYPE: tl.constexpr):
    """Turn an address into a pointer to elements of a type."""
    return address.to(tl.int64).to(tl.pointer_type(TYPE))


@triton.jit
def first_chunk(begin):
    """The first chunk from `begin` on that this program owns. Program k owns each chunk i with i % programs == k."""
    programs = tl.num_programs(0)
    return begin + (tl.program_id(0) + programs - begin % programs) % programs


@triton.jit
def first_group(begin):
    """The first group that this program owns in the segment of small tensors that begins at `begin` (int32)."""
    return (first_chunk(begin) - begin).to(tl.int32)


@triton.jit
def groups_of(begin, end):
    """The number of groups in a segment of small tensors (int32)."""
    return tl.cdiv(end - begin, GROUP_TENSORS).to(tl.int32)


@triton.jit
def group_of(chunks, rows, begin, end, group, lane, TYPE: tl.constexpr):
    """Pointers to the elements of a group of small tensors, their mask, and the tensor of each lane.

    `lane` holds 0 to TILE_VECTORS - 1, SMALL_ELEMENTS lanes a tensor. All results have its shape.
    """
    slot = group * GROUP_TENSORS + lane // SMALL_ELEMENTS
    is_valid = slot < end - begin
    tensor = (tl.load(chunks + begin + slot, mask=is_valid, other=0) >> 32).to(tl.int32)
    address = tl.load(rows + 2 * tensor)
    numel = tl.load(rows + 2 * tensor + 1).to(tl.int32)
    element = lane % SMALL_ELEMENTS
    return address.to(tl.pointer_type(TYPE)) + element, is_valid & (element < numel), tensor


@triton.jit
def locate(chunks, rows, index):
    """The address and element count of a chunk's tensor, the tensor's index, and the chunk's index within it."""
    entry = tl.load(chunks + index)
    tensor = entry >> 32
    return tl.load(rows + 2 * tensor), tl.load(rows + 2 * tensor + 1), tensor.to(tl.int32), entry.to(tl.int32)


@triton.jit
def body_of(address, numel, chunk, LIMIT: tl.constexpr, TYPE: tl.constexpr):
    """The part of a tensor's body in a chunk: a 16-byte aligned pointer, and the vectors (int32, at most LIMIT)."""
    SIZE: tl.constexpr = TYPE.primitive_bitwidth // 8
    PER_VECTOR: tl.constexpr = VECTOR_BYTES // SIZE
    head = tl.minimum((-address & (VECTOR_BYTES - 1)) // SIZE, numel)
    before = tl.full((), chunk, tl.int64) * LIMIT
    vectors = (numel - head) // PER_VECTOR - before
    start = address + head * SIZE + before * VECTOR_BYTES
    return tl.multiple_of(start.to(tl.pointer_type(TYPE)), VECTOR_BYTES), tl.minimum(vectors, LIMIT).to(tl.int32)


@triton.jit
def tile_of(body, vectors, tile, TYPE: tl.constexpr):
    """Pointers to one tile of a body, [TILE_VECTORS, elements a vector], and the mask of its vectors.

    The mask is constant along a vector. Only so does the compiler keep the access 128 bits wide.
    """
    PER_VECTOR: tl.constexpr = VECTOR_BYTES // (TYPE.primitive_bitwidth // 8)
    vector = tile * TILE_VECTORS + tl.arange(0, TILE_VECTORS)
    return body + (vector[:, None] * PER_VECTOR + tl.arange(0, PER_VECTOR)[None, :]), (vector < vectors)[:, None]


@triton.jit
def edge_of(address, numel, chunk, TYPE: tl.constexpr):
    """Pointers to a tensor's edge, [TILE_VECTORS, 1], and their mask: head and tail in one access, for chunk 0 only.

    There are at least as many lanes as threads. With fewer, Triton replicates lanes, and their stores race.
    """
    SIZE: tl.constexpr = TYPE.primitive_bitwidth // 8
    PER_VECTOR: tl.constexpr = VECTOR_BYTES // SIZE
    lane = tl.arange(0, TILE_VECTORS)[:, None]
    head = tl.minimum((-address & (VECTOR_BYTES - 1)) // SIZE, numel)
    tail = (numel - head) % PER_VECTOR
    offset = tl.where(lane < PER_VECTOR, lane, numel - tail + (lane - PER_VECTOR))
    in_head = lane < tl.where(chunk == 0, head, 0)
    in_tail = (lane >= PER_VECTOR) & (lane - PER_VECTOR < tl.where(chunk == 0, tail, 0))
    return address.to(tl.pointer_type(TYPE)) + offset, in_head | in_tail
