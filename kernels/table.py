"""The chunk table: how one launch finds every gradient.

Two arrays describe a list of tensors to the kernels:

- ``chunks``, one int64 a chunk: ``tensor << 32 | chunk within the tensor``. It depends on sizes and element types
  only, so it outlives the gradients' moving about. Chunks are sorted by element type, in the order of
  `ELEMENT_SIZES`; ``ends`` tells where each type's segment of the map ends.
- ``rows``, two int64 a tensor: its address and its number of elements. Only they change when gradients move.

A tensor of n elements owns ``ceil(n * itemsize / CHUNK_BYTES)`` chunks. The kernels themselves find its first 16-byte
boundary: the *head* before it and the *tail* behind the last whole vector (each shorter than 16 bytes) are the *edge*,
read by chunk 0; the *body* between them is cut into chunks of whole vectors. So every access to a body is 128 bits
wide at any address, there is no slow path for odd offsets, and counting the chunks needs no address.
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
LAUNCH_OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
"""For every kernel. Fusion is pinned, since its default changes between Triton's versions, and results with it."""

CHUNK_BYTES = CHUNK_VECTORS.value * VECTOR_BYTES.value
ELEMENT_SIZES = (4, 2, 2, 8)
"""Bytes an element in each segment of the map: float32, bfloat16, float16, float64."""


@dataclass(frozen=True)
class Layout:
    """Where the chunks of each tensor lie.

    Attributes:
        chunks: The map, shape [chunks].
        ends: Where each segment ends in the map, one int for each of `ELEMENT_SIZES`.
        slices: First chunk and number of chunks of each tensor, shape [tensors, 2].
    """

    chunks: Int64s
    ends: tuple[int, ...]
    slices: Int64s


def lay_out(numels: Int64s, segments: Int64s) -> Layout:
    """Lay out tensors of `numels` elements, the type of each given by its position in `ELEMENT_SIZES`."""
    counts = -(-numels * np.asarray(ELEMENT_SIZES)[segments] // CHUNK_BYTES)
    order = np.argsort(segments, kind="stable")
    ordered = counts[order]
    firsts = np.cumsum(ordered) - ordered
    chunks = np.repeat(order << 32, ordered) + np.arange(ordered.sum()) - np.repeat(firsts, ordered)
    slices = np.empty((len(numels), 2), dtype=np.int64)
    slices[order, 0] = firsts
    slices[:, 1] = counts
    ends = np.cumsum([counts[segments == segment].sum() for segment in range(len(ELEMENT_SIZES))])
    return Layout(chunks, tuple(ends.tolist()), slices)


@triton.jit
def first_chunk(begin):
    """The first chunk from `begin` on that this program owns: chunk i belongs to program i modulo their number."""
    programs = tl.num_programs(0)
    return begin + (tl.program_id(0) + programs - begin % programs) % programs


@triton.jit
def locate(chunks, rows, index):
    """Address and element count of the chunk's tensor, the tensor's index, and the chunk's index within it."""
    entry = tl.load(chunks + index)
    tensor = entry >> 32
    return tl.load(rows + 2 * tensor), tl.load(rows + 2 * tensor + 1), tensor, entry & 0xFFFFFFFF


@triton.jit
def body_of(address, numel, chunk, LIMIT: tl.constexpr, TYPE: tl.constexpr):
    """The chunk's part of the tensor's body: a 16-byte aligned pointer, and how many vectors (int32, at most LIMIT)."""
    SIZE: tl.constexpr = TYPE.primitive_bitwidth // 8
    PER_VECTOR: tl.constexpr = VECTOR_BYTES // SIZE
    head = tl.minimum((-address & (VECTOR_BYTES - 1)) // SIZE, numel)
    vectors = (numel - head) // PER_VECTOR - chunk * LIMIT
    start = address + head * SIZE + chunk * (LIMIT * VECTOR_BYTES)
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
