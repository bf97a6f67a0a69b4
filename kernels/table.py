"""The chunk table: how one launch finds every gradient.

Two arrays describe a list of tensors to the kernels:

- ``chunks``, one int64 a chunk: ``tensor << 32 | chunk within the tensor``. It depends on sizes and element types
  only, so it outlives the gradients' moving about. Chunks are sorted by element type, in the order of
  `ELEMENT_SIZES`, and within it those of small tensors come last; ``ends`` tells where in the map each of these
  segments ends.
- ``rows``, two int64 a tensor: its address and its number of elements. Only they change when gradients move.

The kernels take the tables, and all memory, as addresses: numbers, as which a launch hands them on unseen, where of a
tensor Triton would ask the driver each time whether the device can read there. `at` makes a pointer of an address.

A tensor of n elements owns ``ceil(n * itemsize / CHUNK_BYTES)`` chunks. The kernels themselves find its first 16-byte
boundary: the *head* before it and the *tail* behind the last whole vector (each shorter than 16 bytes) are the *edge*,
read by chunk 0; the *body* between them is cut into chunks of whole vectors. So every access to a body is 128 bits
wide at any address, there is no slow path for odd offsets, and counting the chunks needs no address.

A chunk costs three loads that wait for each other (its entry, its tensor's row, its elements) and a reduction by the
whole program, some microseconds whatever its size. So *small* tensors, of `SMALL_ELEMENTS` at most, are worked on by
the group, element by element: a program takes `GROUP_TENSORS` of them in the time of one chunk.
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
TILE_VECTORS = tl.constexpr(512)  # 8 KB, what a program reads at a time: 8 warps of 32 lanes, 2 vectors each
CHUNK_VECTORS = tl.constexpr(8192)  # 128 KB: long enough to amortise a chunk's start, short enough to balance the load
SMALL_ELEMENTS = tl.constexpr(64)
GROUP_TENSORS = tl.constexpr(TILE_VECTORS.value // SMALL_ELEMENTS.value)  # as many elements as an edge has lanes
LAUNCH_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
"""For every kernel. Fusion is pinned, since its default changes between Triton's versions, and results with it."""

CHUNK_BYTES = CHUNK_VECTORS.value * VECTOR_BYTES.value
ELEMENT_SIZES = (4, 2, 2, 8)
TYPES = (tl.float32, tl.bfloat16, tl.float16, tl.float64)
"""Bytes an element, and Triton's name of its type, in the order of the map's segments."""

NUMBERS = [f"{name}_end" for dtype in ("fp32", "bf16", "fp16", "fp64") for name in (dtype, f"{dtype}_small")]
NUMBERS += ["chunks", "rows"]
"""Parameters of every kernel that are never specialised: those for `Layout.ends`, in that order, and the two tables."""


@dataclass(frozen=True)
class Layout:
    """Where the chunks of each tensor lie.

    Attributes:
        chunks: The map, shape [chunks].
        ends: Where segments end in the map: for each of `ELEMENT_SIZES` the chunks', then that of small tensors.
        slices: First chunk and number of chunks of each tensor, shape [tensors, 2].
    """

    chunks: Int64s
    ends: tuple[int, ...]
    slices: Int64s


def lay_out(numels: Int64s, segments: Int64s) -> Layout:
    """Lay out tensors of `numels` elements, the type of each given by its position in `ELEMENT_SIZES`."""
    counts = -(-numels * np.asarray(ELEMENT_SIZES)[segments] // CHUNK_BYTES)
    parts = 2 * segments + (numels <= SMALL_ELEMENTS.value)
    order = np.argsort(parts, kind="stable")
    ordered = counts[order]
    firsts = np.cumsum(ordered) - ordered
    chunks = np.repeat(order << 32, ordered) + np.arange(ordered.sum()) - np.repeat(firsts, ordered)
    slices = np.empty((len(numels), 2), dtype=np.int64)
    slices[order, 0] = firsts
    slices[:, 1] = counts
    ends = np.cumsum([counts[parts == part].sum() for part in range(2 * len(ELEMENT_SIZES))])
    return Layout(chunks, tuple(ends.tolist()), slices)


@triton.jit
def at(address, TYPE: tl.constexpr):
    """The pointer to elements of a type at an address."""
    return address.to(tl.int64).to(tl.pointer_type(TYPE))


@triton.jit
def first_chunk(begin):
    """The first chunk from `begin` on that this program owns: chunk i belongs to program i modulo their number."""
    programs = tl.num_programs(0)
    return begin + (tl.program_id(0) + programs - begin % programs) % programs


@triton.jit
def first_group(begin):
    """The first group of small tensors that this program owns, of those whose chunks begin at `begin` in the map."""
    return (first_chunk(begin) - begin).to(tl.int32)


@triton.jit
def groups_of(begin, end):
    """The number of groups of small tensors whose chunks lie there in the map (int32)."""
    return tl.cdiv(end - begin, GROUP_TENSORS).to(tl.int32)


@triton.jit
def group_of(chunks, rows, begin, end, group, lane, TYPE: tl.constexpr):
    """Pointers to the elements of a group of small tensors, their mask, and each lane's tensor, in the shape of `lane`.

    The lanes are 0 to TILE_VECTORS - 1: SMALL_ELEMENTS for each tensor.
    """
    slot = group * GROUP_TENSORS + lane // SMALL_ELEMENTS
    is_there = slot < end - begin
    tensor = (tl.load(chunks + begin + slot, mask=is_there, other=0) >> 32).to(tl.int32)
    address = tl.load(rows + 2 * tensor)
    numel = tl.load(rows + 2 * tensor + 1).to(tl.int32)
    element = lane % SMALL_ELEMENTS
    return address.to(tl.pointer_type(TYPE)) + element, is_there & (element < numel), tensor


@triton.jit
def locate(chunks, rows, index):
    """Address and element count of the chunk's tensor, the tensor's index, and the chunk's index within it."""
    entry = tl.load(chunks + index)
    tensor = entry >> 32
    return tl.load(rows + 2 * tensor), tl.load(rows + 2 * tensor + 1), tensor.to(tl.int32), entry.to(tl.int32)


@triton.jit
def body_of(address, numel, chunk, LIMIT: tl.constexpr, TYPE: tl.constexpr):
    """The chunk's part of the tensor's body: a 16-byte aligned pointer, and how many vectors (int32, at most LIMIT)."""
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

    The mask is constant along a vector, which is what lets the compiler keep the access 128 bits wide.
    """
    PER_VECTOR: tl.constexpr = VECTOR_BYTES // (TYPE.primitive_bitwidth // 8)
    vector = tile * TILE_VECTORS + tl.arange(0, TILE_VECTORS)
    return body + (vector[:, None] * PER_VECTOR + tl.arange(0, PER_VECTOR)[None, :]), (vector < vectors)[:, None]


@triton.jit
def edge_of(address, numel, chunk, TYPE: tl.constexpr):
    """Pointers to the tensor's edge, [TILE_VECTORS, 1], and their mask: head and tail in one access, for chunk 0 only.

    There are at least as many lanes as the program has threads: fewer would be replicated, and their stores would race.
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
