"""A mixture of experts with the experts on their own mesh, clipped together with the rest of the model.

    python examples/experts.py

Four processes train the model. The layers that all tokens pass are sharded over all four (FSDP2). The experts are
distributed over two processes (expert parallelism), and each expert is sharded over the two processes that have it. So
the list of all parameters has DTensors on two meshes, for which torch's `clip_grad_norm_` raises. fastclip's supports
it, with one all-reduce for each process group. The example compares the result with the same model in one process, in
fp64.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from launch import PROCESSES, Run, main, train_alone
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastclip

EXPERTS = 4
WIDTH = 24
BATCH = 64
LEARNING_RATE = 0.5
MAX_NORM = 0.2


class Experts(nn.Module):
    """A linear map for each expert. On a mesh, each process has some of the experts."""

    def __init__(self) -> None:
        """Make all experts."""
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH) / WIDTH**0.5)
        self.mesh: DeviceMesh | None = None

    def distribute(self, mesh: DeviceMesh) -> None:
        """Distribute the experts over the processes of a mesh with one dimension."""
        self.mesh = mesh
        self.weight = nn.Parameter(distribute_tensor(self.weight.detach(), mesh, [Shard(0)]))

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        """Map tokens, [tokens, width], by the experts, weighted by `shares`, [tokens, experts]."""
        if self.mesh is None:
            return _mapped(x, shares, self.weight)
        # The processes of the mesh have different tokens. Each process gathers all tokens and maps them by its own
        # experts. Then the processes add up the results, and each receives those of its own tokens.
        everything = torch.cat([x, shares], dim=1)
        gathered = DTensor.from_local(everything, self.mesh, [Shard(0)], run_check=False).redistribute(
            placements=[Replicate()]
        )
        x, shares = torch.split(gathered.to_local(grad_placements=[Partial()]), [WIDTH, EXPERTS], dim=1)
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        mine = shares.chunk(self.mesh.size(), dim=1)[self.mesh.get_local_rank()]
        added = DTensor.from_local(_mapped(x, mine, weight), self.mesh, [Partial()], run_check=False)
        return added.redistribute(placements=[Shard(0)]).to_local().clone()  # FSDP2 warns of a view


def _mapped(x: Tensor, shares: Tensor, weight: Tensor) -> Tensor:
    mapped: Tensor = torch.einsum("td,te,edf->tf", x, shares, weight)
    return mapped


class Model(nn.Module):
    """An input layer, a router that picks an expert for each token, the experts, and an output layer."""

    def __init__(self) -> None:
        """Make the layers."""
        super().__init__()
        self.into = nn.Linear(3, WIDTH)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.experts = Experts()
        self.out = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens, [tokens, 3], to a number each."""
        hidden = torch.tanh(self.into(x))
        probabilities = self.router(hidden).softmax(1)
        best = probabilities == probabilities.amax(1, keepdim=True)
        y: Tensor = self.out(torch.tanh(hidden + self.experts(hidden, probabilities * best)))
        return y


def make_model(dtype: torch.dtype = torch.float32) -> Model:
    """Make the model, with the same weights in every process."""
    torch.manual_seed(0)
    return Model().to(dtype)


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return the tokens, and the targets."""
    x = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype), x.prod(1, keepdim=True).to(dtype)


def distribute(model: Model) -> None:
    """Shard the experts over both dimensions of a mesh, and all else over a mesh with one dimension."""
    everyone = init_device_mesh("cpu", (PROCESSES,), mesh_dim_names=("data",))
    grid = init_device_mesh("cpu", (PROCESSES // 2, 2), mesh_dim_names=("shards", "experts"))
    model.experts.distribute(grid["experts"])
    fully_shard(model.experts, mesh=grid["shards"], shard_placement_fn=lambda _: Shard(1))
    # An expert sees the tokens of all processes, but by default its gradient is divided by the number of its shards.
    model.experts.set_gradient_divide_factor(PROCESSES)  # type: ignore[operator]  # `fully_shard` makes it an FSDPModule
    model.experts.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo has no scaled sum
    fully_shard(model, mesh=everyone)


def train(steps: int) -> Run:
    """Train on four processes, each with a quarter of the tokens."""
    model = make_model()
    distribute(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    x, target = (part.chunk(PROCESSES)[dist.get_rank()] for part in data())
    run = Run([], [])
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = fastclip.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        total = loss.detach() / PROCESSES
        dist.all_reduce(total)
        run.losses.append(total.item())
        run.norms.append(norm.item())
    return run


def alone(steps: int) -> Run:
    """Train in this process, in fp64, with torch's own clipping."""
    model = make_model(torch.float64)
    return train_alone(model, data(torch.float64), LEARNING_RATE, MAX_NORM, steps)


if __name__ == "__main__":
    sys.exit(main(__doc__, train, alone, sys.argv[1:]))
