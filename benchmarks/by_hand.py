"""A clip written by hand in CUDA: a reference for the best speed, without Triton, edges or mixed dtypes.

It has the same two kernels as fastclip. All gradients have one dtype, fp32 or bf16, and consist of whole 16-byte
vectors at 16-byte aligned addresses. torch's NVRTC compiles it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

THREADS = 512
BLOCKS_PER_SM = 2
CHUNK_VECTORS = 8192

SOURCE = r"""
__device__ double sum_of_block(double s, double* sums) {  // to thread 0, of 16 warps
  for (int d = 16; d; d /= 2) s += __shfl_xor_sync(~0u, s, d);
  __syncthreads();
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = s;
  __syncthreads();
  if (threadIdx.x == 0) for (int i = 1; i < 16; i++) s += sums[i];
  return s;
}

extern "C" __global__ void __launch_bounds__(512, 2) reduce_by_hand(
    const long long* table, int chunks, int is_bf16, double* partials, unsigned* ticket, double* state, double bound) {
  __shared__ double sums[16];
  __shared__ int is_last;
  float total = 0;
  for (int c = blockIdx.x; c < chunks; c += gridDim.x) {
    const uint4* p = (const uint4*)table[2 * c];
    int n = (int)table[2 * c + 1];
    for (int i = threadIdx.x; i < n; i += 4 * 512) {
      uint4 v[4];
      for (int k = 0; k < 4; k++) v[k] = i + k * 512 < n ? p[i + k * 512] : make_uint4(0, 0, 0, 0);
      for (int k = 0; k < 4; k++) {
        unsigned w[4] = {v[k].x, v[k].y, v[k].z, v[k].w};
        for (int j = 0; j < 4; j++) {
          float a = __uint_as_float(is_bf16 ? w[j] & 0xffff0000u : w[j]);
          float b = is_bf16 ? __uint_as_float(w[j] << 16) : 0.f;
          total += a * a + b * b;
        }
      }
    }
  }
  double s = sum_of_block(total, sums);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = s;
    __threadfence();
    is_last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last) {
    __threadfence();
    s = sum_of_block(threadIdx.x < gridDim.x ? ((volatile double*)partials)[threadIdx.x] : 0.0, sums);
    if (threadIdx.x == 0) {
      state[0] = sqrt(s);
      state[1] = fmin(bound / (state[0] + 1e-6), 1.0);
      *ticket = 0;
    }
  }
}

extern "C" __global__ void __launch_bounds__(512, 2) scale_by_hand(
    const long long* table, int chunks, int is_bf16, const double* state) {
  float f = (float)state[1];
  if (f == 1.f) return;
  for (int c = chunks - 1 - blockIdx.x; c >= 0; c -= gridDim.x) {
    uint4* p = (uint4*)table[2 * c];
    int n = (int)table[2 * c + 1];
    for (int i = threadIdx.x; i < n; i += 4 * 512) {
      uint4 v[4];
      for (int k = 0; k < 4; k++) if (i + k * 512 < n) v[k] = p[i + k * 512];
      for (int k = 0; k < 4; k++) {
        unsigned* w = &v[k].x;
        for (int j = 0; j < 4; j++)
          if (is_bf16) {
            unsigned a = __float_as_uint(__uint_as_float(w[j] & 0xffff0000u) * f);
            unsigned b = __float_as_uint(__uint_as_float(w[j] << 16) * f);
            a += 0x7fffu + ((a >> 16) & 1);
            b += 0x7fffu + ((b >> 16) & 1);
            w[j] = (a & 0xffff0000u) | (b >> 16);
          } else {
            w[j] = __float_as_uint(__uint_as_float(w[j]) * f);
          }
      }
      for (int k = 0; k < 4; k++) if (i + k * 512 < n) p[i + k * 512] = v[k];
    }
  }
}
"""


def supports(grads: list[Tensor]) -> bool:
    """Whether `ByHand` supports these gradients."""
    are_whole = all(grad.nbytes % 16 == 0 and grad.data_ptr() % 16 == 0 for grad in grads)
    return are_whole and {grad.dtype for grad in grads} in ({torch.float32}, {torch.bfloat16})


@cache
def _kernels() -> list[Any]:
    return [torch.cuda._compile_kernel(SOURCE, name) for name in ("reduce_by_hand", "scale_by_hand")]


class ByHand:
    """The clip of a list of gradients, with a table that is built once."""

    def __init__(self, grads: list[Tensor]) -> None:
        device = grads[0].device
        rows = [
            (grad.data_ptr() + 16 * first, min(CHUNK_VECTORS, grad.nbytes // 16 - first))
            for grad in grads
            for first in range(0, grad.nbytes // 16, CHUNK_VECTORS)
        ]
        self.blocks = min(len(rows), BLOCKS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count)
        self.list = [torch.tensor(rows, device=device), len(rows), int(grads[0].dtype == torch.bfloat16)]
        self.partials = torch.zeros(self.blocks, dtype=torch.float64, device=device)
        self.ticket = torch.zeros(1, dtype=torch.int32, device=device)
        self.state = torch.zeros(2, dtype=torch.float64, device=device)

    def norm(self, bound: float = 1e30) -> Tensor:
        """Return the norm of all gradients."""
        arguments = [*self.list, self.partials, self.ticket, self.state, bound]
        _kernels()[0]((self.blocks, 1, 1), (THREADS, 1, 1), arguments)
        return self.state[0]

    def clip(self, bound: float) -> Tensor:
        """Clip all gradients by their norm, and return it."""
        norm = self.norm(bound)
        _kernels()[1]((self.blocks, 1, 1), (THREADS, 1, 1), [*self.list, self.state])
        return norm
