"""Sharded gradients: the plans of the local parts, the all-reduces, and which ranks take part in them.

The processes and their process group are real: see `support/processes.py` and `support/ranks.py`.
"""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path

import pytest
import torch

pytest.importorskip("torch.distributed.tensor")
if not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

import ranks
from processes import Pool
from ranks import Item

import fastclip

INF = math.inf
ORDERS = (2.0, INF, -INF, 1.0, 0.0, 3.0, 0.5, -1.0)

# Even, uneven, and empty shards.
ROWS: list[Item] = [((8, 4), ("S0",)), ((5, 3), ("S0",)), ((3, 7), ("S1",)), ((2,), ("S0",)), ((4, 3), ("R",))]
GRID: list[Item] = [
    ((8, 6), ("S0", "S1")),
    ((5, 3), ("S1", "S0")),
    ((6, 2), ("S0", "S0")),
    ((8, 3), ("S0/2", "S0")),
    ((7,), ("S0", "R")),
    ((3, 5), ("R", "S1")),
    ((4,), ("R", "R")),
    ((1, 1), ("S0", "S1")),
]
CUBE: list[Item] = [((4, 6), ("S0", "R", "S1")), ((5, 3), ("R", "R", "S0")), ((3,), ("S0", "R", "R"))]
PENDING: list[Item] = [
    ((4, 4), ("P", "R")),
    ((6, 2), ("S0", "P")),
    ((5,), ("P", "P")),
    ((3,), ("A", "R")),
    ((8,), ("S0", "S0")),
]


def same(results: list[list[int]]) -> bool:
    """Whether all ranks have the same bits."""
    return all(result == results[0] for result in results)


@pytest.mark.parametrize("p", [2.0, INF, 3.0])
def test_those_who_count_collectives_see_those_of_dtensors(four: Pool, p: float) -> None:
    """While they are counted, they are functional ones; torch's own clip has no other kinds."""
    for ours, torchs, same_results in four.run(ranks.kinds_of_collectives, p):
        assert ours <= {"c10d_functional.all_reduce"}
        assert torchs <= ours
        assert all(same_results)


@pytest.mark.parametrize("p", ORDERS)
@pytest.mark.parametrize(
    ("shape", "items"),
    [((4,), ROWS), ((2, 2), GRID), ((4, 1), GRID), ((2, 1, 2), CUBE), ((2, 2), PENDING)],
    ids=["1-D", "2-D", "of-one", "3-D", "pending"],
)
def test_every_placement(four: Pool, shape: tuple[int, ...], items: list[Item], p: float) -> None:
    assert same(four.run(ranks.clip, shape, items, p))


@pytest.mark.parametrize("p", [2.0, INF, 1.0])
def test_two_processes(two: Pool, p: float) -> None:
    assert same(two.run(ranks.clip, (2,), ROWS, p))


EVEN: list[Item] = [
    ((8, 4), ("S0", "S1")),
    ((4, 2), ("S1", "S0")),
    ((6,), ("S0", "R")),
    ((3, 2), ("R", "S1")),
    ((4,), ("R", "R")),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("p", [2.0, 1.0, INF])
def test_like_torch(four: Pool, p: float, dtype: torch.dtype) -> None:
    four.run(ranks.like_torch, (2, 2), EVEN, p, dtype)


@pytest.mark.parametrize("p", [-INF, 3.0, 0.5])
def test_like_torch_on_one_dimension(four: Pool, p: float) -> None:
    four.run(ranks.like_torch, (4,), [((8, 2), ("S0",)), ((4,), ("S0",)), ((2, 8), ("S1",))], p, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(four: Pool, dtype: torch.dtype) -> None:
    assert same(four.run(ranks.clip, (2, 2), GRID, 2.0, dtype))


@pytest.mark.parametrize(
    ("scale", "p", "dtype"),
    [
        (1e30, 2.0, torch.float32),
        (1e-30, 2.0, torch.float32),
        (1e200, 2.0, torch.float64),
        (1e-200, 2.0, torch.float64),
        (1e20, 20.0, torch.float32),
        (1e-20, 20.0, torch.float32),
        (1e-20, -20.0, torch.float32),
        (1e250, 3.0, torch.float64),
        (1e300, 1.0, torch.float64),
        (1.0, 1000.0, torch.float64),
    ],
)
def test_powers_neither_overflow_nor_underflow(four: Pool, scale: float, p: float, dtype: torch.dtype) -> None:
    assert same(four.run(ranks.clip, (2, 2), EVEN, p, dtype, scale))


@pytest.mark.parametrize("p", ORDERS)
def test_several_meshes(four: Pool, p: float) -> None:
    """Torch raises here (pytorch#180346). Three meshes, but two all-reduces: over the world, and over the rows."""
    results = four.run(ranks.mixed, p)
    assert same([norm for norm, *_ in results])
    for _, grads, kind, count in results:
        assert kind == "Tensor"
        assert grads == results[0][1]
        assert count == 2


@pytest.mark.parametrize("p", [2.0, INF, 0.0])
def test_beside_tensors_that_are_none(four: Pool, p: float) -> None:
    results = four.run(ranks.beside_plain, p)
    assert same([norm for norm, _ in results])
    assert {kind for _, kind in results} == {"DTensor"}


@pytest.mark.parametrize("p", [2.0, INF, 0.0])
@pytest.mark.parametrize(
    "absent",
    [{}, {1: (0,)}, {0: (0, 1, 2)}, {0: (0,), 1: (1,), 2: (2,), 3: (0, 1)}],
    ids=["none", "one", "all", "many"],
)
def test_ranks_without_gradients_take_part(four: Pool, absent: dict[int, tuple[int, ...]], p: float) -> None:
    results = four.run(ranks.missing, absent, p)
    assert same([norm for norm, _ in results])
    assert [[i for i, gone in enumerate(own) if gone] for _, own in results] == [
        list(absent.get(r, ())) for r in range(4)
    ]


@pytest.mark.parametrize("value", [1.0, INF, math.nan])
def test_an_infinite_bound_measures_only(four: Pool, value: float) -> None:
    for norm, changed in four.run(ranks.measured, value, 2):
        assert math.isfinite(norm) == math.isfinite(value)
        assert not changed


@pytest.mark.parametrize("p", [2.0, INF, 0.0])
def test_holders_of_sharded_gradients_need_not_be_tensors(four: Pool, p: float) -> None:
    assert four.run(ranks.of_holders, p) == [True] * 4


@pytest.mark.parametrize("p", [2.0, INF, -INF, 1.0])
@pytest.mark.parametrize("rank", [0, 3])
def test_error_if_nonfinite_raises_on_all_ranks(four: Pool, p: float, rank: int) -> None:
    messages = four.run(ranks.nonfinite, p, math.nan, rank)
    for other, message in enumerate(messages):
        assert message.startswith(f"The total norm of order {p} for gradients from `parameters` is non-finite")
        culprit = "parameters[1] 'layer.1' of shape (12,) (1 NaN, 0 inf)" if other == rank else "What this process has"
        assert culprit in message


@pytest.mark.parametrize("p", [2.0, INF, 3.0])
def test_error_of_an_infinity(four: Pool, p: float) -> None:
    assert ["(0 NaN, 1 inf)" in message for message in four.run(ranks.nonfinite, p, -INF, 1)] == [
        False,
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("p", [2.0, INF, -INF, 1.0, 3.0])
def test_nan_poisons_all(four: Pool, p: float) -> None:
    for norm, are_nan in four.run(ranks.poisoned, p, math.nan):
        assert math.isnan(norm)
        assert are_nan == [True] * 3


def test_infinity_zeroes_what_is_finite(four: Pool) -> None:
    assert four.run(ranks.poisoned, 2.0, INF) == [(INF, [False] * 3)] * 4


def test_replicas_that_came_apart(four: Pool) -> None:
    assert same([list(chain(*norms)) for norms in four.run(ranks.of_narrow_replicas)])


def test_ranks_outside_a_mesh(four: Pool) -> None:
    results = four.run(ranks.outsiders)
    for norm, each, of_mesh in results[:2]:
        assert norm == pytest.approx(5.0)
        assert each == pytest.approx([4.0, 3.0])
        assert of_mesh == pytest.approx(4.0)
    for norm, each, of_mesh in results[2:]:
        assert norm == each
        assert "parameters[1] is no DTensor, beside DTensors on a mesh that this process is not in" in norm
        assert of_mesh == 0.0


def test_meshes_of_other_processes_are_refused_by_all(four: Pool) -> None:
    for messages in four.run(ranks.meshes_of_other_processes):
        assert len(messages) == 3
        for message in messages:
            assert (
                "parameters[0] lies on a mesh of the processes [0, 1], and parameters[1] on one of [0, 1, 2, 3]"
                in message
            )


def test_a_gradient_on_another_mesh_is_refused(four: Pool) -> None:
    for message in four.run(ranks.gradient_on_another_mesh):
        assert "the gradient of parameters[0] lies on another mesh" in message


def test_stages_apart(four: Pool) -> None:
    results = four.run(ranks.apart)
    assert [norm for norm, _ in results] == [2.0, 2.0, 4.0, 4.0]
    for _, grad in results:
        assert grad == pytest.approx([0.5] * 4, rel=1e-6)


def test_what_is_refused(four: Pool) -> None:
    maximum = (
        "the gradient of parameters[1] has the placement Partial(max): of reductions that are yet to be made, only "
    )
    pending = (
        "parameters[1] of shape (4, 4) is a sum yet to be made (a DTensor with a Partial placement), and to clamp "
    )
    misplaced = "parameters[1] of shape (4, 4) has a gradient placed by (Partial(sum), Replicate()), and not as it is"
    cut = (
        "parameters[1] of shape (4, 4) is placed by (Shard(dim=1), Replicate()), which cuts its units into parts: shard"
    )
    for messages in four.run(ranks.refused):
        for message, beginning in zip(messages, (maximum, pending, pending, misplaced, cut), strict=True):
            assert message.startswith(beginning)


def test_nothing_is_written_where_nothing_is_clipped(four: Pool) -> None:
    assert four.run(ranks.untouched) == [True] * 4


@pytest.mark.parametrize("p", [2.0, INF])
def test_part_of_a_mesh(eight: Pool, p: float) -> None:
    """As in pipelines: an all-reduce for each dimension, or one for both if they have a group; and one for the sum."""
    results = eight.run(ranks.flattened, p)
    assert {(before, after) for before, after, _ in results} == {(3, 2)}
    assert same([norm for *_, norm in results[:4]])
    assert same([norm for *_, norm in results[4:]])


@pytest.mark.parametrize(
    ("shape", "items", "p", "count"),
    [
        ((4,), ROWS, 2.0, 1),
        ((4,), ROWS, INF, 1),
        ((4,), ROWS * 50, 0.0, 1),
        ((2, 2), GRID * 20, 2.0, 1),
        ((2, 2), GRID, 3.0, 1),
        ((2, 2), [((4, 4), ("R", "S0"))] * 9, 2.0, 1),
        ((2, 2), [((4, 4), ("R", "R"))], 2.0, 0),
        ((4, 1), [((4, 4), ("R", "S0"))], 2.0, 0),
        ((4, 1), [((8, 4), ("S0", "P"))], 2.0, 1),
        ((2, 2), [((4, 4), ("P", "R")), ((2,), ("P", "R")), ((8,), ("S0", "P"))], 2.0, 3),
    ],
)
def test_number_of_collectives(four: Pool, shape: tuple[int, ...], items: list[Item], p: float, count: int) -> None:
    assert four.run(ranks.counted, shape, items, p) == [count] * 4


def test_parameters_that_are_no_dtensors(four: Pool) -> None:
    assert same(four.run(ranks.of_plain_parameters))


def test_gradients_under_way(four: Pool) -> None:
    assert all(four.run(ranks.under_way))


def test_process_groups_that_ended(four_anew: Pool, tmp_path: Path) -> None:
    assert same(four_anew.run(ranks.restarted, str(tmp_path / "store")))


LAYERS: list[Item] = [
    ((8, 6), ("S0", "S1")),
    ((5,), ("S0", "R")),
    ((1, 1), ("S0", "S1")),
    ((3, 4), ("R", "S1")),
    ((4,), ("R", "R")),
]


@pytest.mark.parametrize(
    "rule",
    [
        fastclip.ClipByNorm(0.5),
        fastclip.ClipByNorm([0.5, 0.1, 2.0], by="layer"),
        fastclip.ClipByGlobalNorm(0.5),
        fastclip.ClipGradNorm(0.5, by="layer"),
        fastclip.ClipAtThreshold(1.0, by="parameter"),
        fastclip.ClipByValue(-0.5, 0.25),
        fastclip.ClipByValue([-0.1, -1.0, -0.5], 2.0, by="layer"),
        fastclip.Rule(ranks.halve_the_largest),
        fastclip.ClipByNorm({"layer0": 0.1, "layer1": 1.0, "layer2": 0.2}, by="layer"),
        fastclip.ClipByQuantile(0.5, 10, factor=0.5, include_current=True, by="parameter"),
        fastclip.ClipByZScore(cap=0.5, by="layer"),
        fastclip.ClipByEMA(max_norm=0.3),
    ],
    ids=repr,
)
def test_rules(four: Pool, rule: object) -> None:
    assert same(four.run(ranks.by_rule, (2, 2), LAYERS, rule))


@pytest.mark.parametrize("by", ["parameter", "unit"])
def test_rules_by_weights(four: Pool, by: str) -> None:
    """By unit, shards of dimension 0 keep units whole; a bias is one unit, whose norm is that of all its shards."""
    items: list[Item] = [
        ((8, 6), ("S0", "R")),
        ((5,), ("S0", "R")),
        ((3, 4), ("S0", "S0")),
        ((7, 1), ("S0", "R")),
        ((4, 2), ("R", "R")),
        ((6, 2, 3), ("R", "S0")),
    ]
    rule = fastclip.ClipByWeightNorm(0.3, by=by)
    results = four.run(ranks.by_weights, (2, 2), items, rule)
    assert all(result == results[0] for result in results)
    compared, _ = results[0]
    assert (compared[0], compared[1], compared[3]) == (
        1,
        0,
        1,
    )  # all processes know of the unit that one of them clipped


@pytest.mark.parametrize("by", ["global", "parameter", "unit"])
def test_rules_by_weights_whose_gradients_are_not_everywhere(two: Pool, by: str) -> None:
    results = two.run(ranks.by_weights_of_some, by)
    assert all(bits == results[0][0] for bits, _ in results)
    for _, (norm, expected) in results:
        assert norm == pytest.approx(expected, rel=1e-6)


def test_rules_with_sums_that_are_pending(four: Pool) -> None:
    assert same(four.run(ranks.by_rule, (2, 2), PENDING, fastclip.ClipByNorm(0.5)))


def test_value_rules_tell_all_ranks_of_a_change_on_one(four: Pool) -> None:
    items: list[Item] = [((4,), ("S0", "S0"))]  # only one value is above 1, on one rank
    assert same(four.run(ranks.by_rule, (2, 2), items, fastclip.ClipByValue(-3.0, 1.0)))


def test_functions_of_tensorflow(four: Pool) -> None:
    assert same(four.run(ranks.tensorflows, LAYERS))


def test_monitor(four: Pool) -> None:
    results = four.run(ranks.monitored, LAYERS)
    for skipped, rows in results:
        assert skipped == [False] * 5 + [True, True, False]
        assert rows[4] == results[0][1][4]
