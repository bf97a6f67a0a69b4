"""A pipeline of two stages, each sharded over two processes (FSDP2), clipped as one model.

    python examples/pipeline.py

No process has parameters of both stages, so none can compute the norm of all gradients alone. The example clips as
torchtitan does: `get_total_norm` computes the norm of a stage, one all-reduce combines the stages, and
`clip_grads_with_norm_` scales by the common norm. There are four processes on the CPU. The example compares the result
with the same model in one process, in fp64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from launch import Run, main, train_alone
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor

import fastclip

STAGES = 2
WIDTH = 24
BATCH = 16
MICROBATCHES = 2
LEARNING_RATE = 0.3
MAX_NORM = 0.5


def clip_grad_norm_over_stages_(
    parameters: Sequence[nn.Parameter], max_norm: float, norm_type: float, stages: DeviceMesh
) -> Tensor:
    """Clip the gradients of all stages by their common norm, and return it.

    Args:
        parameters: The parameters of this process's stage.
        max_norm: The largest norm allowed.
        norm_type: The order of the norm, above 0.
        stages: A mesh with one dimension that has one process of each stage.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = fastclip.get_total_norm(grads, norm_type, norm_dtype=torch.float64)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if math.isinf(norm_type):
        dist.all_reduce(norm, dist.ReduceOp.MAX, stages.get_group())
    else:
        norm = norm**norm_type
        dist.all_reduce(norm, dist.ReduceOp.SUM, stages.get_group())
        norm = norm ** (1 / norm_type)
    fastclip.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def make_stages(dtype: torch.dtype = torch.float32) -> list[nn.Sequential]:
    """Make the model in two stages, with the same weights in every process."""
    torch.manual_seed(0)
    sizes = ((3, WIDTH, WIDTH), (WIDTH, WIDTH, 1))
    return [nn.Sequential(nn.Linear(a, b), nn.Tanh(), nn.Linear(b, c)).to(dtype) for a, b, c in sizes]


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return the inputs, and the targets."""
    x = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.to(dtype), x.prod(1, keepdim=True).to(dtype)


def train(steps: int) -> Run:
    """Train on four processes: two stages of two processes each, which share its data and parameters."""
    mesh = init_device_mesh("cpu", (STAGES, 2), mesh_dim_names=("stages", "data"))
    here, share = mesh["stages"].get_local_rank(), mesh["data"].get_local_rank()
    module = make_stages()[here]
    fully_shard(module, mesh=mesh["data"])
    stage = PipelineStage(module, here, STAGES, torch.device("cpu"), group=mesh["stages"].get_group())
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=nn.functional.mse_loss)
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)
    x, target = (part.chunk(2)[share] for part in data())
    run = Run([], [])
    for _ in range(steps):
        optimizer.zero_grad()
        losses: list[Tensor] = []
        if here == 0:
            schedule.step(x)
        else:
            schedule.step(target=target, losses=losses)
        norm = clip_grad_norm_over_stages_(parameters, MAX_NORM, 2.0, mesh["stages"])
        optimizer.step()
        # Only the processes of the last stage know the loss.
        loss = torch.stack(losses).mean().detach() / 2 if losses else torch.zeros(())
        dist.all_reduce(loss)
        run.losses.append(loss.item())
        run.norms.append(norm.item())
    return run


def alone(steps: int) -> Run:
    """Train in this process, in fp64, with torch's own clipping."""
    model = nn.Sequential(*make_stages(torch.float64))
    return train_alone(model, data(torch.float64), LEARNING_RATE, MAX_NORM, steps)


if __name__ == "__main__":
    sys.exit(main(__doc__, train, alone, sys.argv[1:]))
