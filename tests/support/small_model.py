"""A small model to train, for tests of a training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "fused_adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "fused_sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
}


class Training:
    """A small model on random data, the same for every instance."""

    def __init__(
        self,
        make: Callable[[Any], Optimizer] = OPTIMIZERS["momentum"],
        *,
        named: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))
        for parameter in self.model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator).to(dtype)
        self.batches = [
            (torch.randn(8, 5, generator=generator).to(dtype), torch.randn(8, 1, generator=generator).to(dtype))
            for _ in "abcd"
        ]
        self.optimizer = make(self.model.named_parameters() if named else self.model.parameters())

    def backward(self, batch: int) -> Tensor:
        """Add a batch's gradients to the present ones; return the loss."""
        x, y = self.batches[batch]
        loss: Tensor = (self.model(x) - y).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    def steps(self, clip: Callable[[], object] = lambda: None) -> None:
        """Train on every batch; call `clip` before each step."""
        for batch in range(len(self.batches)):
            self.optimizer.zero_grad()
            self.backward(batch)
            clip()
            self.optimizer.step()

    def assert_same_as(self, other: Training) -> None:
        """Check that the weights are the same as the other's, to the bit."""
        for own, theirs in zip(self.model.parameters(), other.model.parameters(), strict=True):
            oracle.assert_same_bits(own.detach(), theirs.detach())


class Syncs(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it so
    """Counts the numbers that are copied to the host: on a GPU each is a sync."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))
