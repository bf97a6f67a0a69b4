"""The right results: an fp64 reference that shares no code with fastclip, and the tolerances of a comparison."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from legs import Leg
from torch import Tensor

Array: TypeAlias = npt.NDArray[Any]

EPS = 1e-6  # torch adds it to the norm

# The relative error allowed in a norm, by the gradients' dtype, before it is rounded to the dtype of the result.
# - Sums of fp32 terms: a value passes through at most about 40 additions in fp32 (a vector of 8, 16 tiles, and 9 levels
#   of a tree over 512 lanes on the GPU; 32 rounds over the lanes of a SIMD row of 1024 on the CPU); then the sum goes
#   on in fp64. Each addition rounds by at most 2**-24. Roundings differ in sign: real errors are far below the bound.
#   Values of fp16 and bf16 are exact in fp32.
# - fp64 throughout: 65536 additions in a piece or chunk with 2**-53 each, and, for p other than 1 and 2, the error of
#   log2 and exp2, amplified by the exponent; 2**-40 is generous for that.
NORM_TOLERANCE = {
    torch.float32: 40 * 2.0**-24,
    torch.bfloat16: 40 * 2.0**-24,
    torch.float16: 40 * 2.0**-24,
    torch.float64: 2.0**-37,
    torch.complex64: 40 * 2.0**-24,
    torch.complex128: 2.0**-37,
}

# torch sums fp32 in lanes of 8 to 32 over the whole tensor: up to 2**17 / 8 terms one after another. Their rounding
# errors grow as the square root: 2**7 * 2**-24, once for the norm of a tensor and once for the norm of these norms. To
# 16 bits it rounds the norm of each tensor, the norm of these, 1e-6 + norm, their quotient, and the product.
TORCH_NORM_ERROR = {
    torch.float32: 2 * 2.0**-17,
    torch.bfloat16: 2 * 2.0**-8,
    torch.float16: 2 * 2.0**-11,
    torch.float64: 2.0**-37,
    torch.complex64: 2 * 2.0**-17,
    torch.complex128: 2.0**-37,
}
TORCH_ROUNDINGS = 4


def half_ulp(dtype: torch.dtype) -> float:
    """The relative error of rounding to a dtype: 2**-24 for fp32, 2**-11 for fp16, 2**-8 for bf16, 2**-53 for fp64."""
    return torch.finfo(dtype).eps / 2


def rounding(leg: Leg, dtype: torch.dtype) -> float:
    """The relative error of storing a value in a dtype: half a unit in the last place, or one if the leg truncates."""
    return half_ulp(dtype) * (2 if leg.truncates_bfloat16 and dtype == torch.bfloat16 else 1)


def as_numpy(tensor: Tensor) -> Array:
    """The values in fp64 or complex128, exactly."""
    wide = torch.complex128 if tensor.dtype.is_complex else torch.float64
    array: Array = tensor.detach().cpu().to(wide).resolve_neg().resolve_conj().numpy()
    return array


def norm(tensors: Sequence[Tensor], p: float) -> float:
    """The p-norm of all elements in fp64, scaled by a power of two so that no power overflows or underflows."""
    arrays = [np.abs(as_numpy(tensor)).ravel() for tensor in tensors]
    if p == 0:
        return float(sum(bool(array.any()) for array in arrays))
    x = np.concatenate([*arrays, np.empty(0)])
    if x.size == 0:
        return 0.0
    if math.isinf(p):
        return float(x.max() if p > 0 else x.min())
    if np.isnan(x).any():
        return math.nan
    finite = x[np.isfinite(x) & (x > 0)]
    exponent = int(np.frexp(finite.max() if p > 0 else finite.min())[1]) if finite.size else 0
    with np.errstate(divide="ignore", over="ignore", under="ignore"):
        total = np.sum(np.ldexp(x, -exponent) ** p)  # pairwise: 2**17 terms lose less than 2**-48
        return float(np.ldexp(total ** (1 / p), exponent))


def coefficient(total: float, max_norm: float) -> float:
    """``min(max_norm / (total + 1e-6), 1)``, NaN for a norm of NaN; 1 under an infinite bound, for any norm."""
    if max_norm == math.inf:
        return 1.0
    quotient = max_norm / (total + EPS)
    return 1.0 if quotient > 1 else quotient


def rule(name: str, total: float, bound: float) -> float:
    """The coefficient of the rule with this name for a norm."""
    if name == "ClipGradNorm":
        return coefficient(total, bound)
    if name == "ClipAtThreshold":  # as the article says: if the norm reaches the threshold, c / norm
        return bound / total if total >= bound else 1.0
    if math.isnan(total):
        return math.nan
    if name == "ClipByGlobalNorm" and math.isinf(total):
        return math.nan
    return bound / total if total > bound else 1.0


def assert_norm(result: Tensor, exact: float, dtypes: Sequence[torch.dtype], leg: Leg) -> None:
    """`result` is `exact`, the norm of gradients of these dtypes, rounded to the dtype of `result`."""
    assert result.dim() == 0
    tolerance = max(NORM_TOLERANCE[dtype] for dtype in dtypes) + rounding(leg, result.dtype)
    got = result.double().item()
    with np.errstate(over="ignore"):
        beyond = exact * (1 - tolerance) > torch.finfo(result.dtype).max
        close = np.isclose(got, exact, rtol=tolerance, atol=_smallest(result.dtype), equal_nan=True)
    may_overflow = exact * (1 + tolerance) > torch.finfo(result.dtype).max * (1 + half_ulp(result.dtype))
    assert (math.isinf(got) and got > 0) if beyond else (close or (may_overflow and math.isinf(got)))


def assert_close(result: Tensor, expected: Array, tolerance: float, leg: Leg | None = None) -> None:
    """Each element is within a relative tolerance; below the normal numbers, within one subnormal step."""
    steps = 0.0 if result.dtype.is_complex else _smallest(result.dtype)
    if leg and leg.truncates_bfloat16 and result.dtype == torch.bfloat16:  # and reads subnormals as 0
        steps = torch.finfo(torch.bfloat16).smallest_normal
    np.testing.assert_allclose(as_numpy(result), expected, rtol=tolerance, atol=steps, equal_nan=True)


def _smallest(dtype: torch.dtype) -> float:
    """The smallest subnormal number."""
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def bits(tensor: Tensor) -> Tensor:
    """The elements' bit patterns, which differ for -0.0 and 0.0, and for different NaNs."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}
    return tensor.detach().cpu().contiguous().reshape(-1).view(integers[tensor.element_size()])


def assert_same_bits(result: Tensor, expected: Tensor) -> None:
    """`result` is the same as `expected`, to the bit."""
    assert result.dtype == expected.dtype
    assert result.shape == expected.shape
    assert torch.equal(bits(result), bits(expected))
