"""Lists of gradients, of real models or with published times, and their exact norm in fp64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

SMALLER = 1 << 12  # `shrunk` divides the tensors' sizes by this
SHRUNK_TENSORS = 50  # the most tensors of a list that was shrunk

FP32, BF16 = torch.float32, torch.bfloat16

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Workload:
    """A list of gradients, and the order of the norm to clip by.

    Attributes:
        shapes: The number of elements and the dtype of each gradient.
        source: The source of the workload.
    """

    name: str
    shapes: list[tuple[int, torch.dtype]]
    source: str
    p: float = 2.0

    @property
    def nbytes(self) -> int:
        """The bytes of all gradients."""
        return sum(numel * dtype.itemsize for numel, dtype in self.shapes)

    def shrunk(self) -> Workload:
        """Return a small workload of the same kind."""
        shapes = [(-(-numel // SMALLER), dtype) for numel, dtype in self.shapes[:SHRUNK_TENSORS]]
        return replace(self, name=f"{self.name}, small", shapes=shapes)


def models() -> Iterator[Workload]:
    """Yield the workloads of real models, and two of small tensors."""
    yield Workload("GPT-2 124M fp32", _of(gpt(12, 768), FP32), "OpenAI's GPT-2")
    yield Workload("GPT-2 124M bf16", _of(gpt(12, 768), BF16), "OpenAI's GPT-2")
    yield Workload("GPT 1.3B bf16", _of(gpt(24, 2048), BF16), "GPT-3 XL")
    yield Workload("ResNet-50 fp32", _of(resnet50(), FP32), "torchvision")
    yield Workload("1 x 64 fp32", [(64, FP32)], "the fixed cost of a call")
    yield Workload("2000 x 64 fp32", [(64, FP32)] * 2000, "the cost of a tensor")


def published() -> Iterator[Workload]:
    """Yield the workloads with published times."""
    yield Workload("2000 x 1024x1024 fp32", [(1 << 20, FP32)] * 2000, "pytorch #133586")
    for count in (10, 100, 1000, 10_000):
        for numel in (4, 65_536):
            yield Workload(f"{count} x {numel} fp32", [(numel, FP32)] * count, "pytorch #91846")
    yield Workload("256 x 1M fp32, inf norm", [(1 << 20, FP32)] * 256, "pytorch #120623", float("inf"))
    yield Workload("10.26 B in 500 bf16", [(20_520_000, BF16)] * 500, "Automodel #3815")
    yield Workload("225 M in 500 mixed", [(450_363, dtype) for dtype in (FP32, BF16)] * 250, "Automodel #3685")
    yield Workload("6000261x256 bf16", [(6_000_261 * 256, BF16)], "Automodel #3685")


def gpt(layers: int, width: int) -> list[Shape]:
    """Return the shapes of a GPT-2's tensors. With 12 layers of width 768 there are 148, with 124 M elements."""
    layer: list[Shape] = [(width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,)]
    layer += [(width,), (width,), (width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50_257, width), (1024, width), *layer * layers, (width,), (width,)]


def resnet50() -> list[Shape]:
    """Return the shapes of ResNet-50's 161 tensors, 25.6 M elements: convolutions, batch norms, a linear layer."""
    convolutions: list[Shape] = [(64, 3, 7, 7)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions += [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            convolutions += [(4 * width, inputs, 1, 1)] * (block == 0)
            inputs = 4 * width
    layers = [shape for convolution in convolutions for shape in (convolution, convolution[:1], convolution[:1])]
    return [*layers, (1000, 2048), (1000,)]


def _of(shapes: Sequence[Shape], dtype: torch.dtype) -> list[tuple[int, torch.dtype]]:
    return [(math.prod(shape), dtype) for shape in shapes]


def parameters_of(workload: Workload, device: torch.device) -> list[nn.Parameter]:
    """Make parameters without memory of their own, with gradients that `refill` has filled."""
    made = []
    for numel, dtype in workload.shapes:
        parameter = nn.Parameter(torch.empty(1, dtype=dtype, device=device).expand(numel))
        parameter.grad = torch.empty(numel, dtype=dtype, device=device)
        made.append(parameter)
    refill(gradients_of(made))
    return made


def refill(grads: Sequence[Tensor]) -> None:
    """Fill gradients with normal values, the same in each call."""
    generator = torch.Generator(grads[0].device).manual_seed(0)
    for grad in grads:
        grad.normal_(generator=generator)


def gradients_of(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters' gradients."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def exact_norm(grads: Sequence[Tensor], p: float = 2.0) -> float:
    """Compute the norm in fp64, piece by piece to avoid a large temporary."""
    pieces = (piece for grad in grads for piece in torch.split(grad.view(-1), 1 << 27))
    norms = [torch.linalg.vector_norm(piece, p, dtype=torch.float64) for piece in pieces]
    return float(torch.linalg.vector_norm(torch.stack(norms), p))
