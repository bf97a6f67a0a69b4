"""Real training steps on several processes: functions that `processes.Pool` runs on every rank."""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import paths
import torch
import torch.distributed as dist
from gradients import grads_of
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

import fastclip

STEPS = 6
BOUND = 0.1  # of the norm; every step clips
BATCH, LENGTH, WIDTH, HIDDEN = 8, 4, 10, 20  # HIDDEN divides by four ranks, as torch requires; WIDTH does not


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Transform activations, [batch, length, width]."""
        y: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return y


class Net(nn.Module):
    """Two blocks, and a head whose only bias is on one rank."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(2)])
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Transform activations, [batch, length, width]."""
        for block in self.blocks:
            x = x + block(x)
        y: Tensor = self.head(x)
        return y


def _fsdp(net: nn.Module, mesh: DeviceMesh, **policies: Any) -> nn.Module:
    for block in net.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh, **policies)
    fully_shard(net, mesh=mesh, **policies)
    return net


_PLAN: dict[str, Any] = {
    "norm": SequenceParallel(),  # without FSDP, it leaves the gradients as pending sums over ranks
    "up": ColwiseParallel(input_layouts=Shard(1)),
    "down": RowwiseParallel(output_layouts=Shard(1)),
}


def _tensor_parallel(net: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Shard a model over its width; between layers, activations are sharded along their length."""
    for block in net.blocks:  # type: ignore[union-attr]
        parallelize_module(block, mesh, dict(_PLAN))
    parallelize_module(net, mesh, {"head": SequenceParallel(use_local_output=True)})
    return net


def _two_dimensional(net: nn.Module, data: str | tuple[str, str], mesh: DeviceMesh) -> nn.Module:
    return _fsdp(_tensor_parallel(net, mesh["t"]), mesh[data])


def _mesh(*shape: int, names: str) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple(names))


class Kind(NamedTuple):
    """A way to distribute a model.

    Attributes:
        shape: The number of ranks over the batch, and the number over the length of activations.
        make: Distributes the model.
    """

    shape: tuple[int, int]
    make: Callable[[nn.Module], nn.Module]


KINDS: dict[str, Kind] = {
    "fsdp": Kind((4, 1), lambda net: _fsdp(net, _mesh(4, names="d"))),
    "hsdp": Kind((4, 1), lambda net: _fsdp(net, _mesh(2, 2, names="rd"))),
    "tensor": Kind((1, 4), lambda net: _tensor_parallel(net, _mesh(4, names="t"))),
    "fsdp + tensor": Kind((2, 2), lambda net: _two_dimensional(net, "d", _mesh(2, 2, names="dt"))),
    "hsdp + tensor": Kind((4, 2), lambda net: _two_dimensional(net, ("r", "d"), _mesh(2, 2, 2, names="rdt"))),
    "offloaded": Kind(
        (4, 1), lambda net: _fsdp(net, _mesh(4, names="d"), offload_policy=CPUOffloadPolicy(pin_memory=False))
    ),
    "half": Kind(
        (4, 1),
        lambda net: _fsdp(net, _mesh(4, names="d"), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    ),
    "ddp": Kind((4, 1), DistributedDataParallel),
    "ddp, views": Kind((4, 1), lambda net: DistributedDataParallel(net, gradient_as_bucket_view=True)),
    "fsdp1": Kind((4, 1), lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu"))),
    "fsdp1, originals": Kind(
        (4, 1), lambda net: FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    ),
}


def _by_halves(parameters: list[nn.Parameter], p: float) -> Tensor:
    """Clip as torchtitan does."""
    total = fastclip.get_total_norm(grads_of(parameters), p)
    if isinstance(total, DTensor):
        total = total.full_tensor()
    fastclip.clip_grads_with_norm_(parameters, BOUND, total)
    return total


def _by_rule(parameters: list[nn.Parameter], _: float) -> Tensor:
    return fastclip.clip_grads_(parameters, fastclip.ClipGradNorm(BOUND)).norm


def _by_value(function: Callable[..., None]) -> Callable[[list[nn.Parameter], float], Tensor]:
    def clip(parameters: list[nn.Parameter], _: float) -> Tensor:
        function(parameters, BOUND / 10)
        return torch.zeros(())

    return clip


CLIPS: dict[str, Callable[[list[nn.Parameter], float], Tensor]] = {
    "torch": lambda parameters, p: torch.nn.utils.clip_grad_norm_(parameters, BOUND, p),
    "fastclip": lambda parameters, p: fastclip.clip_grad_norm_(parameters, BOUND, p),
    "halves": _by_halves,
    "rule": _by_rule,
    "torch, by value": _by_value(torch.nn.utils.clip_grad_value_),
    "fastclip, by value": _by_value(fastclip.clip_grad_value_),
    "attached": lambda parameters, p: torch.zeros(()),  # noqa: ARG005 - the optimizer does it
}


class Run(NamedTuple):
    """The result of a training.

    Attributes:
        losses: The loss over the data of all ranks, before each step.
        norms: The norm that clipping returned, for each step.
    """

    losses: list[float]
    norms: list[float]


def _data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, LENGTH, WIDTH, generator=generator)
    return x.to(dtype), (3 * x.sum(-1, keepdim=True).sin()).to(dtype)


def _net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def single(clip: str, p: float = 2.0) -> Run:
    """Train in this process alone, in fp64."""
    net = _net(torch.float64)
    x, target = _data(torch.float64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean()
        loss.backward()
        norms.append(CLIPS[clip](list(net.parameters()), p).item())
        optimizer.step()
        losses.append(loss.item())
    return Run(losses, norms)


def train(kind: str, clip: str, p: float = 2.0) -> Run:
    """Train on all ranks: each has a part of the batch and of its length."""
    (over_batch, over_length), make = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own warnings
        net = make(_net())
    x, target = (
        part.chunk(over_batch)[dist.get_rank() // over_length].chunk(over_length, dim=1)[dist.get_rank() % over_length]
        for part in _data(torch.float32)
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    if clip == "attached":
        fastclip.attach(optimizer, fastclip.ClipGradNorm(BOUND))
    losses, norms = [], []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = (net(x) - target).square().mean() / over_length
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loss.backward()
            if isinstance(net, FullyShardedDataParallel):
                norm = net.clip_grad_norm_(BOUND, p)
            else:
                norm = CLIPS[clip](list(net.parameters()), p)
        optimizer.step()
        losses.append(_over_all(loss.detach()) / over_batch)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
    return Run(losses, norms)


def _over_all(loss: Tensor) -> float:
    total = loss.to(torch.float64)
    dist.all_reduce(total)
    return total.item()


def patched(kind: str) -> tuple[Run, Run]:
    """FSDP1's own clipping, with torch's functions patched and unpatched."""
    with fastclip.patched():
        replaced = train(kind, "its own")
    return replaced, train(kind, "its own")


def _fsdp1(strategy: ShardingStrategy, *, originals: bool) -> tuple[nn.Module, float]:
    """A model of FSDP1 after a backward pass, and the true norm of its gradients."""
    nets: list[nn.Module] = []
    for shard in (True, False):
        net: nn.Module = _net()
        if shard:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                net = FullyShardedDataParallel(
                    net, device_id=torch.device("cpu"), sharding_strategy=strategy, use_orig_params=originals
                )
        x, target = _data(torch.float32)  # the same on each process: the average of the gradients is the gradient
        (net(x) - target).square().mean().backward()
        nets.append(net)
    return nets[0], torch.nn.utils.get_total_norm(grads_of(nets[1].parameters())).item()


def _step_attached(net: nn.Module) -> None:
    optimizer = torch.optim.SGD(net.parameters())
    fastclip.attach(optimizer, global_clipnorm=BOUND)
    optimizer.step()


PASSED: dict[str, Callable[[nn.Module], object]] = {
    "the model": lambda net: fastclip.clip_grad_norm_(net, BOUND),
    "its parameters": lambda net: fastclip.clip_grad_norm_(net.parameters(), BOUND),
    "their names, too": lambda net: fastclip.clip_by_norm_(net.named_parameters(), BOUND),
    "an optimizer's": lambda net: fastclip.measure_grads(torch.optim.SGD(net.parameters()).param_groups),
    "patched": fastclip.patched()(lambda net: torch.nn.utils.clip_grad_norm_(net.parameters(), BOUND)),
    "attached": _step_attached,
}


def _message_of(call: Callable[[nn.Module], object], net: nn.Module) -> str:
    try:
        call(net)
    except TypeError as error:
        return str(error)
    return "nothing"


def refused(strategy: str, originals: bool) -> dict[str, str]:
    """The error messages for a model of FSDP1 or its sharded parameters, and whether a gradient was changed."""
    net, _ = _fsdp1(ShardingStrategy[strategy], originals=originals)
    # Plans that these calls cache for gradients like these must not avoid the error.
    fastclip.clip_grad_value_(net, 1e9)
    fastclip.get_total_norm(grads_of(net.parameters()))
    alike = [parameter.detach().clone() for parameter in net.parameters() if parameter.grad is not None]
    for parameter, grad in zip(alike, grads_of(net.parameters()), strict=True):
        parameter.grad = grad.clone()
    fastclip.clip_grad_norm_(alike, 1e9)
    fastclip.clip_by_norm_(alike, 1e9)
    before = [None if parameter.grad is None else parameter.grad.clone() for parameter in net.parameters()]
    messages = {name: _message_of(call, net) for name, call in PASSED.items()}
    after = [parameter.grad for parameter in net.parameters()]
    same = all(a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return {**messages, "changed": str(not same)}


def by_value(strategy: str, originals: bool) -> float:
    """The largest gradient of this process after FSDP1's parts were clipped by value, which is allowed, and scaled."""
    net, _ = _fsdp1(ShardingStrategy[strategy], originals=originals)
    fastclip.clip_grad_value_(net, 2e-3)
    fastclip.clip_by_value_(net.parameters(), -1e-3, 1e-3)
    fastclip.clip_grads_with_norm_(net.parameters(), 1.0, torch.tensor(2.0))
    return max((p.grad.abs().max().item() for p in net.parameters() if p.grad is not None), default=0.0)


def not_sharded(originals: bool) -> tuple[float, float, float]:
    """For FSDP1 without sharding: the norm that clipping returns, the true norm, and the norm after clipping."""
    net, true = _fsdp1(ShardingStrategy.NO_SHARD, originals=originals)
    norm = fastclip.clip_grad_norm_(net.parameters(), BOUND).item()
    return norm, true, fastclip.clip_grad_norm_(net, math.inf).item()


def example(name: str, steps: int) -> tuple[Run, Run]:
    """Train as an example does: on all ranks, and in this process alone."""
    folder = str(paths.EXAMPLES)
    if folder not in sys.path:
        sys.path.append(folder)
    module = importlib.import_module(name)
    return Run(*module.train(steps)), Run(*module.alone(steps))
