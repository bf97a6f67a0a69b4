"""Does fastclip agree with torch and with fp64, on this machine's own devices? A table, and a verdict.

python -m fastclip check [--device cuda:0]
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastclip.backends import choose
from fastclip.core import clipping
from fastclip.foundation import originals
from fastclip.rules import clip_by
from fastclip.switching.environment import info

ORDERS = (2.0, 1.0, 3.0, float("inf"))
SIZES = (1, 7, 1000, 70_001)  # elements: shorter than 16 bytes, odd, and longer than one chunk of the GPU's table

# The norm is claimed to be within 1e-6 of fp64's, and so is the coefficient: what a gradient may differ by beyond that
# is the rounding of one product to its dtype, half a unit in the last place. torch's own norm of 16-bit gradients is
# rounded to their dtype tensor by tensor, and its coefficient once more.
NORM_TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-6, torch.float16: 1e-6, torch.float64: 1e-12}


@dataclass(frozen=True)
class Row:
    """One comparison: the largest relative difference that was found, and the largest allowed."""

    device: str
    dtype: str
    what: str
    reference: str
    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the difference is within bounds; NaN is not."""
        return self.difference <= self.allowed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and print the table.

    Returns:
        0, or 1 on any disagreement.

    Raises:
        SystemExit: With status 2: there is no such device, or no backend for it.
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
    """Compare every function with torch and with fp64 on one device, on fresh random gradients."""
    for dtype in NORM_TOLERANCE:
        for p in ORDERS:
            yield from _compare_norm_clipping(device, dtype, p)
        yield from _compare_the_rest(device, dtype)


def _compare_norm_clipping(device: torch.device, dtype: torch.dtype, p: float) -> Iterator[Row]:
    rounding = torch.finfo(dtype).eps / 2
    gradients = _random_gradients(device, dtype)
    exact = [gradient.double().cpu() for gradient in gradients]
    exact_norm = torch.linalg.vector_norm(torch.cat(exact), p).item()
    max_norm = exact_norm / 3
    ours, theirs = _parameters(gradients), _parameters(gradients)
    norm = clipping.clip_grad_norm_(ours, max_norm, p, norm_dtype=torch.float64).item()
    originals.clip_grad_norm_(theirs, max_norm, p)
    clipped = [gradient * (max_norm / (exact_norm + 1e-6)) for gradient in exact]

    def row(what: str, reference: str, difference: float, allowed: float) -> Row:
        return Row(str(device), str(dtype).removeprefix("torch."), f"{what}, p = {p:g}", reference, difference, allowed)

    tolerance = NORM_TOLERANCE[dtype]
    yield row("norm", "fp64", abs(norm / exact_norm - 1), tolerance)
    yield row("clipped by norm", "fp64", _difference(ours, clipped), tolerance + 2 * rounding)
    theirs_clipped = [_gradient(parameter).double().cpu() for parameter in theirs]
    # torch's norm and coefficient are sums and quotients in fp32 at best, or rounded to the gradients' 16 bits. On one
    # thread its sums of n powers are rounded n times: by a random walk of up to sqrt(n) roundings, twice which is
    # allowed (3.2e-5 in fp32, where 300 draws came to 1.1e-5).
    walk = 2 * math.sqrt(sum(SIZES)) * torch.finfo(torch.promote_types(dtype, torch.float32)).eps / 2
    yield row("clipped by norm", "torch", _difference(ours, theirs_clipped), tolerance + walk + 6 * rounding)


def _compare_the_rest(device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    where = (str(device), str(dtype).removeprefix("torch."))

    def row(what: str, same: bool) -> Row:
        return Row(*where, what, "torch", 0.0 if same else float("inf"), 0.0)

    gradients = _random_gradients(device, dtype)
    untouched = _parameters(gradients)
    clipping.clip_grad_norm_(untouched, 1e6)
    clipping.clip_grad_norm_(untouched, float("inf"))
    yield row("nothing to clip", _identical(untouched, _parameters(gradients)))
    each = _parameters(gradients)
    clip_by.clip_by_norm_(each, 1.0)
    exact = [gradient.double().cpu() for gradient in gradients]
    clipped = [gradient / gradient.norm().clamp(min=1.0) for gradient in exact]
    allowed = NORM_TOLERANCE[dtype] + torch.finfo(dtype).eps
    yield Row(*where, "each clipped by its norm", "fp64", _difference(each, clipped), allowed)
    ours, theirs = _parameters(gradients), _parameters(gradients)
    clipping.clip_grad_value_(ours, 0.5)
    originals.clip_grad_value_(theirs, 0.5)
    yield row("clipped by value", _identical(ours, theirs))
    for name, special in (("NaN", float("nan")), ("infinity", float("inf"))):
        gradients[0].fill_(special)
        ours, theirs = _parameters(gradients), _parameters(gradients)
        clipping.clip_grad_norm_(ours, 1.0)
        originals.clip_grad_norm_(theirs, 1.0)
        yield row(f"{name} in a gradient", _identical(ours, theirs))


def _random_gradients(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Gradients at every alignment: views that begin one element into their memory."""
    return [torch.randn(size + 1, device=device, dtype=torch.float32).to(dtype)[1:] for size in SIZES]


def _parameters(gradients: Sequence[Tensor]) -> list[Tensor]:
    parameters = []
    for gradient in gradients:
        parameter = torch.zeros_like(gradient)
        parameter.grad = torch.cat([gradient[:1], gradient])[1:]  # a copy that keeps the odd offset
        parameters.append(parameter)
    return parameters


def _difference(parameters: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest relative difference of an element; below the smallest normal number, relative to that."""
    worst = 0.0
    for parameter, reference in zip(parameters, expected, strict=True):
        smallest = torch.finfo(parameter.dtype).tiny
        difference = (_gradient(parameter).double().cpu() - reference).abs() / reference.abs().clamp(min=smallest)
        worst = max(worst, difference.max().item()) if not difference.isnan().any() else float("nan")
    return worst


def _identical(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    pairs = ((_gradient(a), _gradient(b)) for a, b in zip(ours, theirs, strict=True))
    return all(torch.allclose(a, b, 0, 0, equal_nan=True) for a, b in pairs)


def _gradient(parameter: Tensor) -> Tensor:
    return parameter if parameter.grad is None else parameter.grad
