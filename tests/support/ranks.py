"""The work of each process in the tests of sharded gradients: functions that `processes.Pool` runs on every rank.

Placements are written in a short form like torch's: R, S0, S1, P (a pending sum), A (a pending average), and S0/2 for a
strided shard with a split factor of 2; one for each dimension of the mesh.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import oracle
import pytest
import torch
import torch.distributed as dist
from gradients import GradHolder, grads_of
from processes import join
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

import fastclip
from fastclip.core.collect import collect
from fastclip.core.dtensors import local_parts

Item = tuple[tuple[int, ...], tuple[str, ...]]
"""A gradient: its shape, and its placements on the mesh; without placements it is a plain tensor."""

Bits = list[int]

NAMES = ("a", "b", "c")


@cache
def mesh_of(*shape: int) -> DeviceMesh:
    """A mesh of this shape over the first ranks."""
    ranks = torch.arange(math.prod(shape)).reshape(shape)
    if ranks.numel() == dist.get_world_size():
        return init_device_mesh("cpu", shape, mesh_dim_names=NAMES[: len(shape)])
    return DeviceMesh("cpu", ranks, mesh_dim_names=NAMES[: len(shape)])


def placement(text: str) -> Placement:
    """A placement from its short form."""
    if text[0] == "S":
        dim, _, factor = text[1:].partition("/")
        return _StridedShard(int(dim), split_factor=int(factor)) if factor else Shard(int(dim))
    return {"R": Replicate(), "P": Partial(), "A": Partial("avg"), "M": Partial("max")}[text]


def distributed(full: Tensor, mesh: DeviceMesh, short: Sequence[str]) -> DTensor:
    """A DTensor of `full`, which every rank has; pending sums and averages have unequal parts on the ranks."""
    placements = [placement(text) for text in short]
    settled = [Replicate() if p.is_partial() else p for p in placements]
    local = distribute_tensor(full, mesh, settled).to_local()
    for dim, text in enumerate(short):
        if text in ("P", "A"):
            size, rank = mesh.size(dim), mesh.get_local_rank(dim)
            weights = torch.arange(1.0, size + 1, dtype=torch.float64) / (size * (size + 1) / 2)
            local = (local * weights[rank] * (size if text == "A" else 1)).to(full.dtype)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=full.shape, stride=full.contiguous().stride()
    )


def parameter_of(full: Tensor, mesh: DeviceMesh, short: Sequence[str]) -> nn.Parameter:
    """A parameter with this gradient; where a sum is pending, the parameter is replicated, as in tensor parallelism."""
    if not short:
        made = nn.Parameter(torch.zeros_like(full))
        made.grad = full.clone()
        return made
    own = ["R" if placement(text).is_partial() else text for text in short]
    made = nn.Parameter(distributed(torch.zeros_like(full), mesh, own))
    made.grad = distributed(full, mesh, short)
    return made


def values(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """The same random values on every rank."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale).to(dtype)


def made(
    mesh: DeviceMesh, items: Sequence[Item], dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> list[nn.Parameter]:
    """A parameter for each item."""
    return [parameter_of(values(shape, i, dtype, scale), mesh, short) for i, (shape, short) in enumerate(items)]


def whole(tensor: Tensor) -> Tensor:
    """A copy of the whole tensor, by torch's own functions."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def bits(tensor: Tensor) -> Bits:
    """The bits of the whole tensor, to compare them between ranks."""
    result: Bits = oracle.bits(whole(tensor)).tolist()
    return result


def local_bits(parameters: Sequence[Tensor]) -> list[Bits]:
    """The bits of this rank's part of each gradient."""
    return [oracle.bits(g.to_local() if isinstance(g, DTensor) else g).tolist() for g in grads_of(parameters)]


def clip(
    shape: tuple[int, ...], items: Sequence[Item], p: float, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> Bits:
    """Clip to a tenth of the norm, compare with fp64 on whole gradients, and return the norm's bits."""
    mesh = mesh_of(*shape)
    parameters = made(mesh, items, dtype, scale)
    before = [whole(grad) for grad in grads_of(parameters)]
    exact = oracle.norm(before, p)
    bound = exact / 10
    norm = fastclip.clip_grad_norm_(parameters, bound, p, norm_dtype=torch.float64)
    assert isinstance(norm, DTensor)
    assert norm.placements == (Replicate(),) * mesh.ndim
    got = norm.full_tensor().item()
    # A pending sum of 16-bit values is rounded during the addition, which torch does in another order.
    tolerance = oracle.NORM_TOLERANCE[dtype] + oracle.half_ulp(dtype) * 4 * any("P" in s or "A" in s for _, s in items)
    assert math.isclose(got, exact, rel_tol=tolerance), (got, exact)
    coefficient = oracle.coefficient(exact, bound)
    for grad, full in zip(grads_of(parameters), before, strict=True):
        expected = oracle.as_numpy(full) * coefficient
        oracle.assert_close(whole(grad), expected, tolerance + 4 * oracle.half_ulp(dtype))
    return bits(norm)


def like_torch(shape: tuple[int, ...], items: Sequence[Item], p: float, dtype: torch.dtype) -> None:
    """All four functions do the same as torch's, for inputs that torch accepts; also types, dtypes and devices."""
    mesh = mesh_of(*shape)
    ours, theirs = made(mesh, items, dtype), made(mesh, items, dtype)
    tolerance = oracle.TORCH_NORM_ERROR[dtype] * 4

    def compare(result: Tensor | None, expected: Tensor | None) -> None:
        if isinstance(expected, Tensor):
            assert isinstance(result, Tensor)
            assert type(result) is type(expected)
            assert (result.dtype, result.device, result.shape) == (expected.dtype, expected.device, expected.shape)
            torch.testing.assert_close(whole(result), whole(expected), rtol=tolerance, atol=0.0)
        for own, other in zip(grads_of(ours), grads_of(theirs), strict=True):
            assert type(own) is type(other)
            assert getattr(own, "placements", None) == getattr(other, "placements", None)
            torch.testing.assert_close(whole(own), whole(other), rtol=tolerance, atol=1e-6)

    torchs = torch.nn.utils
    compare(fastclip.clip_grad_norm_(ours, 2.0, p), torchs.clip_grad_norm_(theirs, 2.0, p))
    totals = fastclip.get_total_norm(grads_of(ours), p), torchs.get_total_norm(grads_of(theirs), p)
    compare(*totals)
    fastclip.clip_grads_with_norm_(ours, 0.5, totals[0])
    torchs.clip_grads_with_norm_(theirs, 0.5, totals[1])
    compare(None, None)
    fastclip.clip_grad_value_(ours, 0.01)
    torchs.clip_grad_value_(theirs, 0.01)
    compare(None, None)


def collectives(function: Callable[[], Any]) -> int:
    """The number of collectives in a call."""
    with CommDebugMode() as counts:  # type: ignore[no-untyped-call]
        function()
    return int(counts.get_total_counts())


def kinds_of_collectives(p: float) -> tuple[set[str], set[str], list[bool]]:
    """The kinds of collectives that are counted in fastclip's clip and in torch's, and whether the results agree."""
    items: list[Item] = [((8, 4), ("S0",)), ((4, 3), ("S0",)), ((6,), ("R",))]  # torch takes no empty shards
    seen, results = [], []
    for clip_ in (fastclip.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        parameters = made(mesh_of(4), items, torch.float32)
        with CommDebugMode() as counts:  # type: ignore[no-untyped-call]
            norm = clip_(parameters, 0.5, p)
        seen.append({str(kind) for kind in counts.get_comm_counts()})
        results.append([whole(norm), *(whole(grad) for grad in grads_of(parameters))])
    return seen[0], seen[1], [torch.allclose(ours, theirs, rtol=1e-5) for ours, theirs in zip(*results, strict=True)]


def counted(shape: tuple[int, ...], items: Sequence[Item], p: float = 2.0, dtype: torch.dtype = torch.float32) -> int:
    """The number of collectives in a clip by norm."""
    parameters = made(mesh_of(*shape), items, dtype)
    return collectives(lambda: fastclip.clip_grad_norm_(parameters, 1.0, p))


def mixed(p: float) -> tuple[Bits, list[Bits], str, int]:
    """DTensors on three meshes and a plain tensor: one norm, a plain tensor, and one all-reduce for each group."""
    grid = mesh_of(2, 2)
    meshes = [mesh_of(4), grid, grid["a"]]
    on_meshes: list[list[Item]] = [
        [((5, 3), ("S0",)), ((2,), ("S0",))],
        [((4, 6), ("S0", "S1")), ((3,), ("R", "S0"))],
        [((6,), ("S0",)), ((2, 2), ("R",))],
    ]
    parameters = [parameter_of(values((3, 3), 9), grid, ())]
    for offset, (mesh, items) in enumerate(zip(meshes, on_meshes, strict=True)):
        parameters += [
            parameter_of(values(shape, 10 * offset + i), mesh, short) for i, (shape, short) in enumerate(items)
        ]
    before = [whole(grad) for grad in grads_of(parameters)]
    exact = oracle.norm(before, p)
    count = collectives(lambda: fastclip.get_total_norm(grads_of(parameters), p))
    norm = fastclip.clip_grad_norm_(parameters, exact / 4, p, norm_dtype=torch.float64)
    assert math.isclose(whole(norm).item(), exact, rel_tol=oracle.NORM_TOLERANCE[torch.float32])
    for grad, full in zip(grads_of(parameters), before, strict=True):
        oracle.assert_close(whole(grad), oracle.as_numpy(full) * oracle.coefficient(exact, exact / 4), 2.0**-20)
    return bits(norm), [bits(grad) for grad in grads_of(parameters)], type(norm).__name__, count


def beside_plain(p: float) -> tuple[Bits, str]:
    """A plain tensor counts once, with the values of the first process, so that all have the same norm."""
    mesh = mesh_of(4)
    parameters = made(mesh, [((8, 3), ("S0",)), ((5,), ()), ((4,), ("R",))])
    before = [whole(grad) for grad in grads_of(parameters)]
    norm = fastclip.clip_grad_norm_(parameters, 0.5, p)
    exact = oracle.norm(before, p)
    assert math.isclose(whole(norm).item(), exact, rel_tol=2.0**-20)
    for grad, full in zip(grads_of(parameters), before, strict=True):
        oracle.assert_close(whole(grad), oracle.as_numpy(full) * oracle.coefficient(exact, 0.5), 2.0**-20)
    diverged = parameters[1].grad
    assert diverged is not None
    diverged.fill_(math.nan if dist.get_rank() == 3 else 2.0)
    return bits(fastclip.clip_grad_norm_(parameters, 0.5, p, error_if_nonfinite=True)), type(norm).__name__


def missing(absent: dict[int, tuple[int, ...]], p: float) -> tuple[Bits, list[bool]]:
    """Some ranks have no gradient for some or all parameters: the others' parts are clipped."""
    parameters = made(mesh_of(2, 2), [((8, 6), ("S0", "S1")), ((5, 3), ("S1", "S0")), ((7,), ("S0", "S0"))])
    gone = absent.get(dist.get_rank(), ())
    for i in gone:  # zeros and missing parts give the same norm
        grad = parameters[i].grad
        assert isinstance(grad, DTensor)
        grad.to_local().zero_()
    before = [whole(grad) for grad in grads_of(parameters)]
    for i in gone:
        parameters[i].grad = None
    exact = oracle.norm(before, p)
    norm = fastclip.clip_grad_norm_(parameters, exact / 3, p)
    assert isinstance(norm, DTensor)
    assert norm.dtype == torch.float32
    assert math.isclose(norm.full_tensor().item(), exact, rel_tol=2.0**-20)
    fastclip.clip_grad_value_(parameters, 0.1)
    result = fastclip.measure_grads(parameters)
    assert result.norms is not None
    assert len(result.norms) == len(parameters)
    assert result.present == list(range(len(parameters)))
    return bits(norm) + bits(result.norms), [parameter.grad is None for parameter in parameters]


def nonfinite(p: float, value: float, rank: int) -> str:
    """One rank's part has a value that is not finite: all ranks raise, and none changes anything."""
    parameters = made(mesh_of(4), ROWS_OF_FOUR)
    if dist.get_rank() == rank:
        grad = parameters[1].grad
        assert isinstance(grad, DTensor)
        grad.to_local().view(-1)[0] = value
    before = local_bits(parameters)
    named = [(f"layer.{i}", parameter) for i, parameter in enumerate(parameters)]
    try:
        fastclip.clip_grad_norm_(named, 1.0, p, error_if_nonfinite=True)
    except RuntimeError as error:
        assert local_bits(parameters) == before
        return str(error)
    return "nothing"


def measured(value: float, rank: int) -> tuple[float, bool]:
    """The norm under an infinite bound, and whether the call changed a part or its version counter."""
    parameters = made(mesh_of(4), ROWS_OF_FOUR)
    if dist.get_rank() == rank:
        grad = parameters[1].grad
        assert isinstance(grad, DTensor)
        grad.to_local().view(-1)[0] = value
    before = local_bits(parameters), [grad._version for grad in grads_of(parameters)]
    norm = fastclip.clip_grad_norm_(parameters, math.inf)
    fastclip.clip_grads_with_norm_(parameters, math.inf, norm)
    return whole(norm).item(), (local_bits(parameters), [grad._version for grad in grads_of(parameters)]) != before


def of_holders(p: float) -> bool:
    """Whether objects that are no tensors are clipped as parameters are."""
    parameters = made(mesh_of(4), ROWS_OF_FOUR)
    holders: Any = [GradHolder(None), *[GradHolder(grad.clone()) for grad in grads_of(parameters)], GradHolder(None)]
    calls: list[Callable[[Any], Any]] = [
        lambda given: fastclip.clip_grad_norm_(given, 0.5, p),
        lambda given: fastclip.clip_by_norm_(given, 0.3, by="global"),
        lambda given: fastclip.clip_grads_with_norm_(given, 0.5, torch.tensor(2.0)),
        lambda given: fastclip.clip_grad_value_(given, 0.01),
    ]
    for call in calls:
        call(holders)
        call(parameters)
    clipped = [holder.grad for holder in holders if holder.grad is not None]
    return [bits(grad) for grad in clipped] == [bits(grad) for grad in grads_of(parameters)]


ROWS_OF_FOUR: list[Item] = [((8, 2), ("S0",)), ((12,), ("S0",)), ((3, 3), ("R",))]


def poisoned(p: float, value: float) -> tuple[float, list[bool]]:
    """A value that is not finite has torch's effect on all ranks: the norm, and which gradients become NaN."""
    parameters = made(mesh_of(4), ROWS_OF_FOUR)
    if dist.get_rank() == 2:
        grad = parameters[1].grad
        assert isinstance(grad, DTensor)
        grad.to_local()[0] = value
    norm = fastclip.clip_grad_norm_(parameters, 1.0, p)
    return whole(norm).item(), [bool(whole(grad).isnan().all()) for grad in grads_of(parameters)]


def of_narrow_replicas() -> list[Bits]:
    """Replicas that differ do not lead to different norms: in every sum the first replica counts."""
    mesh = mesh_of(2, 2)
    parameters = made(mesh, [((4, 4), ("S0", "S1")), ((3,), ("R", "S0")), ((2,), ("R", "R"))])
    for grad in grads_of(parameters):
        assert isinstance(grad, DTensor)
        grad.to_local().mul_(1 + 2.0**-20 * dist.get_rank())
    return [bits(fastclip.clip_grad_norm_(parameters, 1.0, p)) for p in (2.0, math.inf, 0.0)]


def outsiders() -> tuple[float | str, list[float] | str, float]:
    """Ranks outside a mesh and ranks inside it do not wait for each other."""
    parameters = [*made(mesh_of(2), [((4,), ("S0",))]), parameter_of(torch.full((4,), 1.5), mesh_of(2), ())]
    grad = parameters[0].grad
    assert isinstance(grad, DTensor)
    grad.to_local().fill_(2.0)
    norms: float | str
    each: list[float] | str
    try:
        norms = whole(fastclip.clip_grad_norm_(parameters, 100.0)).item()
        found = fastclip.measure_grads(parameters).norms
        assert found is not None
        each = found.tolist()
    except RuntimeError as error:
        norms = each = str(error)
    return norms, each, fastclip.measure_grads(parameters[:1]).norm.item()


def meshes_of_other_processes() -> list[str]:
    """All ranks raise the same error where only some could take the norm; nothing is changed, and none waits."""
    parameters = [*made(mesh_of(2), [((4,), ("S0",))]), *made(mesh_of(4), [((8,), ("S0",))])]
    before = local_bits(parameters)
    messages = []
    calls: list[Callable[[], object]] = [
        lambda: fastclip.clip_grad_norm_(parameters, 1e-3),
        lambda: fastclip.measure_grads(parameters),
        lambda: fastclip.clip_by_norm_(parameters, 1e-3),
    ]
    for call in calls:
        with pytest.raises(RuntimeError) as raised:
            call()
        messages.append(str(raised.value))
    assert local_bits(parameters) == before
    return messages


def gradient_on_another_mesh() -> str:
    """It raises: the gradient would count as replicated over the parameter's mesh."""
    [parameter], [other] = made(mesh_of(2, 2), [((4, 4), ("S0", "S0"))]), made(mesh_of(4), [((4, 4), ("S0",))])
    parameter.grad = other.grad
    try:
        fastclip.clip_grad_norm_([parameter], 1.0)
    except RuntimeError as error:
        return str(error)
    return ""


def apart() -> tuple[float, list[float]]:
    """Each half of the ranks clips its own parameters, as the stages of a pipeline do."""
    stage = dist.get_rank() // 2
    meshes = [DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [2, 3])]
    parameters = [nn.Parameter(distribute_tensor(torch.zeros(4), meshes[stage], [Shard(0)]))]
    parameters[0].grad = DTensor.from_local(torch.full((2,), 1.0 + stage), meshes[stage], [Shard(0)], run_check=False)
    norm = fastclip.clip_grad_norm_(parameters, 1.0)
    return whole(norm).item(), whole(grads_of(parameters)[0]).tolist()


def refused() -> list[str]:
    """What cannot be clipped raises before anything is changed."""
    mesh = mesh_of(2, 2)
    messages = []

    def by_unit(parameters: list[nn.Parameter]) -> None:
        fastclip.clip_grads_(parameters, fastclip.ClipByWeightNorm(by="unit"))

    calls: list[tuple[str, Callable[[list[nn.Parameter]], object]]] = [
        ("M", lambda parameters: fastclip.clip_grad_norm_(parameters, 1.0)),
        ("P", lambda parameters: fastclip.clip_grad_value_(parameters, 0.1)),
        ("P", lambda parameters: fastclip.clip_grads_(parameters, fastclip.ClipByValue(-0.1, 0.1))),
        ("P", by_unit),
        ("S1", by_unit),
    ]
    for short, call in calls:
        parameters = made(mesh, [((4, 4), ("S0", "R")), ((4, 4), (short, "R"))])
        before = local_bits(parameters)
        try:
            call(parameters)
        except (RuntimeError, NotImplementedError) as error:
            messages.append(str(error))
        assert local_bits(parameters) == before
    return messages


def untouched() -> bool:
    """Where nothing is clipped, nothing is written; but the version counters of autograd increase."""
    parameters = made(mesh_of(2, 2), [((4, 4), ("S0", "S1")), ((4, 4), ("P", "R")), ((3,), ("R", "R"))])
    before, versions = local_bits(parameters), [grad._version for grad in grads_of(parameters)]
    fastclip.clip_grad_norm_(parameters, 1e6)
    assert [grad._version for grad in grads_of(parameters)] == [version + 1 for version in versions]
    return local_bits(parameters) == before


def of_plain_parameters() -> Bits:
    """Torch allows a plain parameter with a DTensor as gradient: the gradient's own placements count."""
    grad = distributed(values((8, 2), 0), mesh_of(4), ("S0",))
    parameter = nn.Parameter(torch.zeros(8, 2))
    parameter.grad = grad
    exact = oracle.norm([values((8, 2), 0)], 2.0)
    norm = fastclip.clip_grad_norm_([parameter], 1.0)
    assert isinstance(norm, DTensor)
    assert math.isclose(whole(norm).item(), exact, rel_tol=2.0**-20)
    oracle.assert_close(whole(grad), oracle.as_numpy(values((8, 2), 0)) * oracle.coefficient(exact, 1.0), 2.0**-20)
    return bits(norm)


def under_way() -> bool:
    """Gradients may be the results of unfinished collectives: fastclip waits for them."""
    mesh = mesh_of(4)
    parameters = made(mesh, [((64, 64), ("P",)), ((64, 64), ("P",))])
    for parameter, placement_ in zip(parameters, (Replicate(), Shard(0)), strict=True):
        grad = parameter.grad
        assert isinstance(grad, DTensor)
        parameter.grad = grad.redistribute(placements=[placement_], async_op=True)
    kinds = [type(grad._local_tensor).__name__ for grad in grads_of(parameters)]  # type: ignore[attr-defined]
    assert set(map(type, local_parts(collect(parameters)).tensors)) == {Tensor}  # the faster backends take these
    exact = oracle.norm([values((64, 64), i) for i in range(2)], 2.0)
    norm = fastclip.clip_grad_norm_(parameters, 1.0)
    assert math.isclose(whole(norm).item(), exact, rel_tol=2.0**-20)
    after = oracle.norm([whole(grad) for grad in grads_of(parameters)], 2.0)
    assert math.isclose(after, 1.0, rel_tol=2.0**-18)
    return "AsyncCollectiveTensor" in kinds


def restarted(store: str) -> Bits:
    """Nothing cached for a mesh of an ended process group is used for an equal mesh of the next one."""
    before = clip((2, 2), [((8, 6), ("S0", "S1")), ((5,), ("S0", "R"))], 2.0)
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.destroy_process_group()
    mesh_of.cache_clear()
    join(store, rank, size)
    after = clip((2, 2), [((8, 6), ("S0", "S1")), ((5,), ("S0", "R"))], 2.0)
    assert before == after
    return after


def flattened(p: float) -> tuple[int, int, Bits]:
    """The number of all-reduces of a norm on part of a mesh, before and after its dimensions are flattened to one."""
    cube = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pipe", "data", "tensor"))
    mesh = cube["data", "tensor"]
    parameters = made(mesh, [((4, 6), ("S0", "S1")), ((5,), ("S0", "R")), ((3,), ("P", "S0"))])
    exact = oracle.norm([whole(grad) for grad in grads_of(parameters)], p)
    counts, norms = [], []
    for _ in range(2):
        counts.append(collectives(lambda: norms.append(fastclip.get_total_norm(grads_of(parameters), p))))
        mesh._flatten("data_tensor")
    for norm in norms:
        assert math.isclose(whole(norm).item(), exact, rel_tol=2.0**-20)
    return counts[0], counts[1], bits(norms[0]) + bits(norms[1])


Pair = tuple[str, nn.Parameter]


def named_pairs(mesh: DeviceMesh, items: Sequence[Item], scale: float = 1.0) -> tuple[list[Pair], list[Pair]]:
    """Sharded parameters with these gradients, and plain ones with the same gradients."""
    sharded, single = made(mesh, items, scale=scale), []
    for parameter in sharded:
        single.append(nn.Parameter(whole(parameter)))
        if parameter.grad is not None:
            single[-1].grad = whole(parameter.grad)
    names = [f"layer{i // 2}.{i % 2}" for i in range(len(items))]
    return list(zip(names, sharded, strict=True)), list(zip(names, single, strict=True))


def halve_the_largest(norms: Tensor) -> Tensor:
    """A function as a rule."""
    return torch.where(norms == norms.max(), 0.5, 1.0)


def by_rule(shape: tuple[int, ...], items: Sequence[Item], rule: Any) -> Bits:
    """A rule does the same with sharded gradients as with whole ones; all ranks have the same plain results."""
    sharded, single = named_pairs(mesh_of(*shape), items)
    result, expected = fastclip.clip_grads_(sharded, rule), fastclip.clip_grads_(single, copy.deepcopy(rule))
    compared = [
        (result.norm, expected.norm),
        (result.norms, expected.norms),
        (result.group_norms, expected.group_norms),
        (result.coefficients, expected.coefficients),
        (result.thresholds, expected.thresholds),
        (result.clipped, expected.clipped),
    ]
    for own, other in compared:
        assert type(own) is type(other)
        if own is not None:
            torch.testing.assert_close(own, other, rtol=2.0**-18, atol=0.0)
    for (_, own), (_, other) in zip(sharded, single, strict=True):
        torch.testing.assert_close(
            whole(grads_of([own])[0]), grads_of([other])[0], rtol=2.0**-18, atol=2.0**-24, equal_nan=True
        )
    return [bit for own, _ in compared if own is not None for bit in bits(own)]


def by_weights(shape: tuple[int, ...], items: Sequence[Item], rule: fastclip.ClipByWeightNorm) -> tuple[Bits, int]:
    """The rule does the same with shards as with whole tensors; the results' bits, and the number of collectives."""
    mesh = mesh_of(*shape)
    sharded, single = [], []
    for i, (own, short) in enumerate(items):
        weight, grad = values(own, i), values(own, 100 + i)
        sharded.append(nn.Parameter(distributed(weight, mesh, short)))
        sharded[-1].grad = distributed(grad, mesh, short)
        single.append(nn.Parameter(weight))
        single[-1].grad = grad.clone()
    expected = fastclip.clip_grads_(single, rule)
    count = collectives(lambda: fastclip.clip_grads_(sharded, rule))
    for own_parameter, other in zip(sharded, single, strict=True):
        grads = grads_of([own_parameter, other])
        torch.testing.assert_close(whole(grads[0]), grads[1], rtol=2.0**-18, atol=0.0)
    compared = [int(expected.clipped.item())]
    local = local_parts(collect(sharded)).tensors[2]
    local.mul_(2 if dist.get_rank() == 1 else 1)
    for bound in (1e3, 0.45):  # nothing is above the first, one unit of one process above the second
        result = fastclip.clip_grads_(sharded, fastclip.ClipByWeightNorm(bound, by=rule.by))
        compared += [int(result.clipped.item()), *bits(result.norm)]
    return [*compared, *(bit for grad in grads_of(sharded) for bit in bits(grad))], count


def by_weights_of_some(by: Any) -> tuple[Bits, list[float]]:
    """A plain bias has a gradient on the first rank only, one weight has none at all, and a gradient is transposed."""
    mesh = mesh_of(2)
    rule = fastclip.ClipByWeightNorm(0.1, by=by)
    weights = [values((4, 6), 1), values((6, 4), 2), values((5,), 3), values((4, 4), 4)]
    grads = [values((4, 6), 5), values((4, 6), 6).t(), values((5,), 7)]
    sharded = [nn.Parameter(distributed(weight, mesh, ["S0"])) for weight in weights]
    sharded[2] = nn.Parameter(weights[2].clone())
    single = [nn.Parameter(weight.clone()) for weight in weights]
    for i, grad in enumerate(grads):
        single[i].grad = grad.clone()
        if i < 2:
            local = distributed(grad, mesh, ["S0"]).to_local()
            sharded[i].grad = DTensor.from_local(local.t().contiguous().t(), mesh, [Shard(0)], run_check=False)
        elif dist.get_rank() == 0:
            sharded[i].grad = grad.clone()
    expected, result = fastclip.clip_grads_(single, rule), fastclip.clip_grads_(sharded, rule)
    for own, other in zip(sharded, single, strict=True):
        if own.grad is not None:
            torch.testing.assert_close(whole(own.grad), grads_of([other])[0], rtol=2.0**-18, atol=0.0)
    if result.thresholds is not None and expected.thresholds is not None:
        torch.testing.assert_close(result.thresholds, expected.thresholds, rtol=2.0**-18, atol=0.0)
    return bits(result.norm), [result.norm.item(), expected.norm.item()]


def tensorflows(items: Sequence[Item]) -> Bits:
    """TensorFlow's functions; `use_norm` is also a DTensor, as `get_total_norm` returns it."""
    sharded, single = named_pairs(mesh_of(2, 2), items)
    norms = fastclip.clip_by_norm_(sharded, 0.5)
    torch.testing.assert_close(norms, fastclip.clip_by_norm_(single, 0.5), rtol=2.0**-18, atol=0.0)
    norm = fastclip.clip_by_global_norm_(sharded, 0.4)
    torch.testing.assert_close(norm, fastclip.clip_by_global_norm_(single, 0.4), rtol=2.0**-18, atol=0.0)
    known = fastclip.get_total_norm(grads_of([parameter for _, parameter in sharded]))
    assert isinstance(known, DTensor)
    used = fastclip.clip_by_global_norm_(sharded, 0.3, use_norm=known)
    assert not isinstance(used, DTensor)
    fastclip.clip_by_global_norm_(single, 0.3)
    fastclip.clip_by_value_(sharded, -0.01, 0.02)
    fastclip.clip_by_value_(single, -0.01, 0.02)
    measured = fastclip.measure_grads(sharded, by="layer")
    for (_, own), (_, other) in zip(sharded, single, strict=True):
        torch.testing.assert_close(whole(grads_of([own])[0]), grads_of([other])[0], rtol=2.0**-18, atol=2.0**-24)
    return bits(norms) + bits(norm) + bits(used) + bits(measured.group_norms)


def monitored(items: Sequence[Item]) -> tuple[list[bool], list[dict[str, Any]]]:
    """A monitor records the same for sharded gradients as for whole ones, and every rank skips the same steps."""
    sharded, single = named_pairs(mesh_of(2, 2), items)
    monitors, answers = [], []
    for parameters in (sharded, single):
        triggers = [
            fastclip.Jump("norm", ratio=10.0, action="skip"),
            fastclip.NonFinite("gradients", action="skip"),
        ]
        monitors.append(fastclip.Monitor(parameters, triggers=triggers, weights=True, warmup=3))
    for step in range(8):
        scale = {5: 1e4, 6: math.nan}.get(step, 1.0 + 0.1 * step)
        skip = []
        for monitor, parameters in zip(monitors, (sharded, single), strict=True):
            for i, (_, parameter) in enumerate(parameters):
                full = values(items[i][0], 10 * step + i) * (scale if i == 1 else 1.0)
                grad = distributed(full, mesh_of(2, 2), items[i][1]) if isinstance(parameter, DTensor) else full
                # On ranks 1 and 2 the part of parameter 2 is empty, so a missing one changes nothing.
                parameter.grad = None if i == 2 and dist.get_rank() in (1, 2) and parameters is sharded else grad
            skip.append(bool(monitor.update(fastclip.measure_grads(parameters), loss=1.0)))
        assert skip[0] == skip[1]
        answers.append(skip[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about skipped steps
        rows, expected = (list(monitor.read().rows()) for monitor in monitors)
    for own, other in zip(rows, expected, strict=True):
        assert own == {key: _if_close(own[key], value) for key, value in other.items()}
    return answers, rows


def _if_close(value: float | None, expected: float | None) -> float | None:
    """`value` if it is close to `expected`, otherwise `expected`; a NaN is returned as the same object."""
    if value is None or expected is None:
        return expected
    if math.isnan(expected) and math.isnan(value):
        return value
    return value if math.isclose(value, expected, rel_tol=2.0**-16, abs_tol=2.0**-16) else expected


def clip_on(device: str) -> Bits:
    """Clip DTensors on a device that all ranks share, compare with fp64, and return the norm's bits."""
    if device == "cuda":
        torch.cuda.set_device(0)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    rank, size = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    whole_ones = [torch.randn(rows, 33, generator=generator) for rows in (8, 64, 6)]
    parameters, parts = [], []
    for index, full in enumerate(whole_ones):
        shard = Shard(0) if index < 2 else Replicate()
        parts.append(full.chunk(size)[rank] if index < 2 else full)
        local = parts[-1].to(device)
        parameters.append(nn.Parameter(DTensor.from_local(torch.zeros_like(local), mesh, [shard], run_check=False)))
        parameters[-1].grad = DTensor.from_local(local.clone(), mesh, [shard], run_check=False)
    exact = oracle.norm(whole_ones, 2.0)
    norm = fastclip.clip_grad_norm_(parameters, exact / 10, norm_dtype=torch.float64)
    assert isinstance(norm, DTensor)
    assert norm.full_tensor().item() == pytest.approx(exact, rel=oracle.NORM_TOLERANCE[torch.float32])
    for parameter, part in zip(parameters, parts, strict=True):
        assert isinstance(parameter.grad, DTensor)
        clipped = parameter.grad.to_local().cpu()
        torch.testing.assert_close(clipped, part / 10, rtol=oracle.NORM_TOLERANCE[torch.float32], atol=1e-12)
    return bits(norm)
