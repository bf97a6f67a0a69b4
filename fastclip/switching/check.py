"""Compare fastclip with torch and with fp64 on the devices of this machine; print a table.

python -m fastclip check [--device cuda:0]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from fastclip.backends import choose
from fastclip.core import clipping
from fastclip.foundation import originals
from fastclip.rules import clip_by
from fastclip.switching.environment import info

ORDERS = (2.0, 1.0, 3.0, float("inf"))
SIZES = (1, 7, 1000, 70_001)  # elements: shorter than 16 bytes, odd, and longer than one chunk of the GPU's table

# fastclip's norm is within 1e-6 of the norm in fp64, and so is the coefficient. A clipped gradient may differ by one
# more rounding, that of a product to its dtype: half a unit in the last place. torch rounds the norm of each 16-bit
# gradient to its dtype, and the coefficient once more.
NORM_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-12}

_Comparison: TypeAlias = tuple[str, str, float, float]
"""What was compared, with what, the difference and the allowed difference."""


@dataclass(frozen=True)
class Row:
    """One comparison: the largest relative difference that was found, and the largest allowed difference."""

    device: str
    dtype: str
    what: str
    reference: str
    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is within bounds; a NaN is not."""
        return self.difference <= self.allowed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and print the table.

    Returns:
        0, or 1 on any disagreement.

    Raises:
        SystemExit: There is no such device, or no backend for it (status 2).
    """
    parser = argparse.ArgumentParser(prog="python -m fastclip check", description=__doc__.splitlines()[0])
    parser.add_argument("--device", action="append", help="a device to check (default: the CPU and every GPU)")
    options = parser.parse_args(arguments)
    environment = info()
    devices = options.device or [entry.device for entry in environment.devices]
    try:
        for device in devices:
            choose(torch.empty(1, device=device).cpu().to(device).device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        parser.error(f"cannot check {', '.join(devices)}: {str(error).splitlines()[0]}")
    sys.stdout.write(f"{environment}\n\n")
    sys.stdout.write(f"{'device':8} {'dtype':9} {'what':24} {'against':8} {'difference':>10} {'allowed':>9}\n")
    agree = True
    for row in (row for device in devices for row in compare(torch.device(device))):
        agree = agree and row.agrees
        numbers = f"{row.difference:10.1e} {row.allowed:9.1e}"
        verdict = "ok" if row.agrees else "DISAGREES"
        sys.stdout.write(f"{row.device:8} {row.dtype:9} {row.what:24} {row.reference:8} {numbers}  {verdict}\n")
    sys.stdout.write("\nfastclip agrees with torch and with fp64.\n" if agree else "\nfastclip DISAGREES: see above.\n")
    return 0 if agree else 1


def compare(device: torch.device) -> Iterator[Row]:
    """Compare every function with torch and with fp64 on one device, on new random gradients."""
    for dtype in NORM_TOLERANCE:
        for comparison in _compare(device, dtype):
            yield Row(str(device), str(dtype).removeprefix("torch."), *comparison)


def _compare(device: torch.device, dtype: torch.dtype) -> Iterator[_Comparison]:
    for p in ORDERS:
        yield from _compare_norm_clipping(_random_gradients(device, dtype), p)
    gradients = _random_gradients(device, dtype)
    yield _compare_nothing_to_clip(gradients)
    yield _compare_clipping_by_parameter(gradients)
    yield _compare_clipping_by_value(gradients)
    yield _compare_not_finite(gradients, "NaN", float("nan"))
    yield _compare_not_finite(gradients, "infinity", float("inf"))


def _compare_norm_clipping(gradients: Sequence[Tensor], p: float) -> Iterator[_Comparison]:
    dtype = gradients[0].dtype
    tolerance, rounding = NORM_TOLERANCE[dtype], torch.finfo(dtype).eps / 2
    exact = _in_fp64(gradients)
    exact_norm = torch.linalg.vector_norm(torch.cat(exact), p).item()
    max_norm = exact_norm / 3
    ours, theirs = _parameters(gradients), _parameters(gradients)
    norm = clipping.clip_grad_norm_(ours, max_norm, p, norm_dtype=torch.float64).item()
    originals.clip_grad_norm_(theirs, max_norm, p)
    yield f"norm, p = {p:g}", "fp64", abs(norm / exact_norm - 1), tolerance
    what = f"clipped by norm, p = {p:g}"
    clipped = [gradient * (max_norm / (exact_norm + 1e-6)) for gradient in exact]
    yield what, "fp64", _difference(ours, clipped), tolerance + 2 * rounding
    theirs_clipped = _in_fp64([_gradient(parameter) for parameter in theirs])
    # torch computes norm and coefficient in fp32 at best, or rounds them to the gradients' 16 bits. On one thread it
    # rounds its sums of n powers n times: a random walk of up to sqrt(n) roundings. Twice that is allowed (3.2e-5 in
    # fp32; the largest of 300 draws was 1.1e-5).
    walk = 2 * math.sqrt(sum(SIZES)) * torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    yield what, "torch", _difference(ours, theirs_clipped), tolerance + walk + 6 * rounding


def _compare_nothing_to_clip(gradients: Sequence[Tensor]) -> _Comparison:
    untouched = _parameters(gradients)
    clipping.clip_grad_norm_(untouched, 1e6)
    clipping.clip_grad_norm_(untouched, float("inf"))
    return "nothing to clip", "torch", _exact_difference(untouched, _parameters(gradients)), 0.0


def _compare_clipping_by_parameter(gradients: Sequence[Tensor]) -> _Comparison:
    dtype = gradients[0].dtype
    each = _parameters(gradients)
    clip_by.clip_by_norm_(each, 1.0)
    clipped = [gradient / gradient.norm().clamp(min=1.0) for gradient in _in_fp64(gradients)]
    allowed = NORM_TOLERANCE[dtype] + torch.finfo(dtype).eps
    return "each clipped by its norm", "fp64", _difference(each, clipped), allowed


def _compare_clipping_by_value(gradients: Sequence[Tensor]) -> _Comparison:
    ours, theirs = _parameters(gradients), _parameters(gradients)
    clipping.clip_grad_value_(ours, 0.5)
    originals.clip_grad_value_(theirs, 0.5)
    return "clipped by value", "torch", _exact_difference(ours, theirs), 0.0


def _compare_not_finite(gradients: Sequence[Tensor], name: str, value: float) -> _Comparison:
    gradients = [torch.full_like(gradients[0], value), *gradients[1:]]
    ours, theirs = _parameters(gradients), _parameters(gradients)
    clipping.clip_grad_norm_(ours, 1.0)
    originals.clip_grad_norm_(theirs, 1.0)
    return f"{name} in a gradient", "torch", _exact_difference(ours, theirs), 0.0


def _random_gradients(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Return gradients that are aligned to one element only: views that begin one element into their memory."""
    return [torch.randn(size + 1, device=device, dtype=torch.float32).to(dtype)[1:] for size in SIZES]


def _parameters(gradients: Sequence[Tensor]) -> list[Tensor]:
    parameters = []
    for gradient in gradients:
        parameter = torch.zeros_like(gradient)
        parameter.grad = torch.cat([gradient[:1], gradient])[1:]  # a copy with the same alignment
        parameters.append(parameter)
    return parameters


def _in_fp64(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.double().cpu() for tensor in tensors]


def _difference(parameters: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of an element, relative to it or at least to the smallest normal number."""
    worst = 0.0
    for parameter, reference in zip(parameters, expected, strict=True):
        smallest = torch.finfo(parameter.dtype).tiny
        gradient = _gradient(parameter).double().cpu()
        difference = (gradient - reference).abs() / reference.abs().clamp(min=smallest)
        worst = max(worst, difference.max().item()) if not difference.isnan().any() else float("nan")
    return worst


def _exact_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Return 0 if all gradients are equal, NaNs included, and infinity otherwise."""
    pairs = ((_gradient(a), _gradient(b)) for a, b in zip(ours, theirs, strict=True))
    return 0.0 if all(torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in pairs) else float("inf")


def _gradient(parameter: Tensor) -> Tensor:
    return parameter if parameter.grad is None else parameter.grad
