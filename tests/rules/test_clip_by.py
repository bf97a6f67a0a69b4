"""Clipping by rules, on every leg: every grouping, layout and dtype against fp64, and what must not change."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gradients import assert_untouched_around, embedded, grad_of, parameters, random_values, twin
from legs import AVAILABLE, Leg
from torch import Tensor, nn

import fastclip
from fastclip import ClipAtThreshold, ClipByGlobalNorm, ClipByNorm, ClipByValue, ClipGradNorm, ClipResult, Rule
from fastclip.core.collect import collect
from fastclip.rules.apply import apply_rule
from fastclip.rules.groups import group

INF = math.inf
NAN = math.nan
KINDS: dict[str, Any] = {kind.__name__: kind for kind in (ClipByNorm, ClipByGlobalNorm, ClipGradNorm, ClipAtThreshold)}
DTYPES = {"fp32": (torch.float32,), "mixed": (torch.bfloat16, torch.float32, torch.float16, torch.float64)}


def named(grads: dict[str, Tensor | None]) -> list[tuple[str, nn.Parameter]]:
    """Named parameters with these gradients."""
    made = [
        (name, nn.Parameter(torch.ones_like(grad) if grad is not None else torch.ones(2)))
        for name, grad in grads.items()
    ]
    for (_, parameter), grad in zip(made, grads.values(), strict=True):
        parameter.grad = grad
    return made


def draw(leg: Leg, rng: np.random.Generator, dtypes: Sequence[torch.dtype]) -> dict[str, Tensor | None]:
    """Gradients of four layers: of every layout, of any scale, without elements, all zero, and missing."""
    cycle = itertools.cycle(dtypes)

    def make(*shape: int, scale: float = 1.0, **layout: Any) -> Tensor:
        return embedded(random_values(rng, shape, next(cycle)) * scale, device=leg.device, **layout)

    return {
        "a.transposed": make(12, 7, strides=(1, 12), offset=1),
        "a.small": make(5, scale=30.0),
        "b.with_gaps": make(9, 6, strides=(13, 2)),  # torch's operations do these
        "b.missing": None,
        "b.channels_last": make(2, 3, 5, 4, strides=(60, 1, 12, 3), offset=3),
        "a.empty": make(0),
        "c.long": make(1500, scale=0.01, offset=1),
        "c.scalar": make(),
        "d.zeros": make(3, scale=0.0),
        "d.empty": make(3, 0, 2),
        "e.missing": None,
        "c.tiny": make(2, scale=1e-3),
    }


GROUPINGS: dict[str, Any] = {
    "global": "global",
    "parameter": "parameter",
    "layer": "layer",
    "labels": [i % 3 for i in range(12)],
    "function": lambda name: name[0] in "ad",
}


def members_of(names: Sequence[str], by: str) -> dict[Any, list[str]]:
    """The names in each group, computed without fastclip."""
    labels: dict[str, Callable[[int, str], Any]] = {
        "global": lambda _, name: "all",  # noqa: ARG005
        "parameter": lambda _, name: name,
        "layer": lambda _, name: name.split(".")[0],
        "labels": lambda i, _: i % 3,
        "function": lambda _, name: name[0] in "ad",
    }
    members: dict[Any, list[str]] = {}
    for i, name in enumerate(names):
        members.setdefault(labels[by](i, name), []).append(name)
    return members


def _matrix() -> Iterator[Any]:
    for leg, kind, dtype, by in itertools.product(AVAILABLE, KINDS, DTYPES, GROUPINGS):
        # Rules differ only in torch's operations, so a slow leg runs one rule by every grouping, the others by layer.
        if leg.environment is None or (kind == "ClipByNorm" and dtype == "mixed") or (by, dtype) == ("layer", "mixed"):
            yield pytest.param(leg, kind, dtype, by, id=f"{leg.name}-{kind}-{dtype}-{by}")


@pytest.mark.parametrize(("leg", "kind", "dtype", "by"), list(_matrix()), indirect=["leg"])
def test_rules_by_groups(leg: Leg, kind: str, dtype: str, by: str, rng: np.random.Generator) -> None:
    """Every other group is clipped; the rest does not change, to the bit."""
    grads = draw(leg, rng, DTYPES[dtype])
    originals = {name: None if grad is None else twin(grad) for name, grad in grads.items()}
    members = members_of(list(grads), by)
    there = {label: [g for n in names if (g := originals[n]) is not None] for label, names in members.items()}
    exact = {label: oracle.norm(tensors, 2) for label, tensors in there.items()}
    bounds = {
        label: norm * 0.3 if i % 2 == 0 and norm else norm * 2 + 1 for i, (label, norm) in enumerate(exact.items())
    }
    versions = {name: grad._version for name, grad in grads.items() if grad is not None}

    result = fastclip.clip_grads_(named(grads), KINDS[kind](bounds, by=GROUPINGS[by]))

    assert result.groups.labels == tuple(members)
    assert list(result.present) == [i for i, grad in enumerate(grads.values()) if grad is not None]
    assert result.clipped.item() is True
    assert result.norms is not None
    assert result.coefficients is not None
    for tensor in (result.norm, result.norms, result.group_norms, result.coefficients):
        assert (tensor.dtype, tensor.device.type) == (torch.float64, leg.device.type)
    loosest = max(oracle.NORM_TOLERANCE[d] for d in DTYPES[dtype])
    everything = [grad for grad in originals.values() if grad is not None]
    assert result.norm.item() == pytest.approx(oracle.norm(everything, 2), rel=loosest)
    for norm, original in zip(result.norms.tolist(), originals.values(), strict=True):
        assert norm == pytest.approx(oracle.norm([original], 2) if original is not None else 0, rel=loosest)
    assert result.group_norms.tolist() == pytest.approx(list(exact.values()), rel=loosest)
    expected = {label: oracle.rule(kind, exact[label], bounds[label]) for label in members}
    assert result.coefficients.tolist() == pytest.approx(list(expected.values()), rel=2 * loosest)
    for label, names in members.items():
        for name in names:
            grad, original = grads[name], originals[name]
            if grad is None or original is None:
                continue
            assert grad._version > versions[name]
            assert_untouched_around(grad, original)
            if expected[label] == 1:
                oracle.assert_same_bits(grad, original)
                continue
            wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
            tolerance = loosest + 2 * oracle.half_ulp(wide) + oracle.rounding(leg, grad.dtype)
            oracle.assert_close(grad, oracle.as_numpy(original) * expected[label], tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays_within_its_group(leg: Leg, kind: str) -> None:
    values = {
        "nan.a": [NAN, 1.0, 0.0],
        "inf.a": [INF, 2.0, -0.0],
        "fine.a": [30.0, -40.0],
        "nan.b": [5.0, -50.0],
        "inf.b": [0.0, 3.0],
        "small.a": [-0.0, 0.25],
    }
    grads = {name: torch.tensor(each, device=leg.device) for name, each in values.items()}
    originals = {name: grad.clone() for name, grad in grads.items()}
    result = fastclip.clip_grads_(named({**grads}), KINDS[kind](5.0, by="layer"))
    norms = {"nan": NAN, "inf": INF, "fine": 50.0, "small": 0.25}
    assert result.group_norms.tolist() == pytest.approx(list(norms.values()), nan_ok=True)
    assert math.isnan(result.norm.item())
    assert result.coefficients is not None
    for name, grad in grads.items():
        coefficient = oracle.rule(kind, norms[name.split(".")[0]], 5.0)
        if coefficient == 1:
            oracle.assert_same_bits(grad, originals[name])
            continue
        with np.errstate(invalid="ignore"):
            oracle.assert_close(grad, oracle.as_numpy(originals[name]) * coefficient, 4 * 2.0**-24)


def test_a_bound_that_is_not_a_power_of_two_leaves_fp64_below_it_alone(leg: Leg) -> None:
    """A coefficient of bound / bound is 1, whatever the bound."""
    count = 9 if leg.environment is None else 2
    grads = {f"{i}": torch.tensor([0.1 * i, 0.7], dtype=torch.float64, device=leg.device) for i in range(count)}
    originals = [grad.clone() for grad in grads.values()]
    for bound in (3.7, 1.1, 49.0, [1.1 + 0.1 * i for i in range(count)]):
        for kind in (ClipByNorm, ClipByGlobalNorm, ClipAtThreshold):
            result = fastclip.clip_grads_(named({**grads}), kind(bound, by="parameter"))
            assert result.clipped.item() is False
            for grad, original in zip(grads.values(), originals, strict=True):
                oracle.assert_same_bits(grad, original)


# ---- The functions by name


def test_clip_by_norm(leg: Leg) -> None:
    made = parameters([torch.tensor(v, device=leg.device) for v in ([3.0, -4.0], [0.5], [12.0, 0.0])])
    norms = fastclip.clip_by_norm_(made, 2.5)
    assert norms.tolist() == [5.0, 0.5, 12.0]
    assert [grad_of(p).tolist() for p in made] == [[1.5, -2.0], [0.5], [2.5, 0.0]]
    assert fastclip.clip_by_norm_(made, [1.25, 1.0], by=["x", "x", "y"]).tolist() == pytest.approx([6.5**0.5, 2.5])
    assert fastclip.clip_by_norm_(made[0], 0.5).shape == (1,)


def test_clip_by_global_norm(leg: Leg) -> None:
    made = parameters([torch.tensor(v, device=leg.device) for v in ([3.0, 0.0], [4.0])])
    for call, (clip_norm, use_norm) in enumerate([(5.0, None), (2.5, None), (2.0, 4.0), (1.0, torch.tensor([[0.5]]))]):
        norm = fastclip.clip_by_global_norm_(made, clip_norm, use_norm)
        assert (norm.shape, norm.dtype, norm.device.type) == ((), torch.float64, leg.device.type)
        assert norm.item() == pytest.approx([5.0, 5.0, 4.0, 0.5][call])
        scale = [1.0, 0.5, 0.25, 0.25][call]
        assert [grad_of(p).tolist() for p in made] == [[3.0 * scale, 0.0], [4.0 * scale]]


@pytest.mark.parametrize("use_norm", ["5", object(), torch.ones(2), torch.ones(0), [1.0, 2.0]], ids=repr)
def test_use_norm_that_is_no_number(use_norm: Any) -> None:
    made = parameters([torch.tensor([3.0])])
    with pytest.raises((TypeError, ValueError), match="`use_norm` must be one number"):
        fastclip.clip_by_global_norm_(made, 1.0, use_norm)
    assert grad_of(made[0]).item() == 3


@pytest.mark.parametrize("given", [[], [nn.Parameter(torch.ones(3))], nn.Linear(2, 2)], ids=["none", "one", "module"])
def test_no_gradients(given: Any) -> None:
    listed = list(given.parameters()) if isinstance(given, nn.Module) else given
    for rule in (ClipByNorm(1.0), ClipByGlobalNorm(1.0), ClipByValue(-1.0, 1.0), Rule(torch.ones_like), None):
        result = fastclip.measure_grads(given) if rule is None else fastclip.clip_grads_(given, rule)
        assert result.norm.item() == 0
        assert result.norms is not None
        assert result.norms.tolist() == [0.0] * len(listed)
        assert not result.clipped
        assert list(result.present) == []
    fastclip.clip_by_value_(given, -1.0, 1.0)
    assert fastclip.clip_by_norm_(given, 1.0).tolist() == [0.0] * len(listed)
    for use_norm in (5, torch.tensor([5.0])):
        norm = fastclip.clip_by_global_norm_(given, 1.0, use_norm)
        assert (norm.item(), norm.shape, norm.dtype) == (5.0, (), torch.float64)
    assert fastclip.clip_by_global_norm_(given, 1.0).item() == 0


def test_gradients_without_elements(leg: Leg) -> None:
    for rule in (
        ClipByNorm(1.0),
        ClipByGlobalNorm(1.0),
        ClipByValue(-1.0, 1.0),
        ClipByValue(0.5, [1.0, 2.0], "parameter"),
    ):
        made = parameters([torch.zeros(0, device=leg.device), torch.zeros(3, 0, 2, device=leg.device)])
        result = fastclip.clip_grads_(made, rule)
        assert result.group_norms.tolist() == [0.0] * len(result.groups.labels)
        assert result.clipped.item() is False
        assert result.norm.item() == 0


class Tower(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)
        self.head = nn.Linear(2, 1)


def test_modules_and_parameter_groups(leg: Leg) -> None:
    model = Tower().to(leg.device)
    optimizer = torch.optim.SGD([{"params": model.head.parameters()}, {"params": model.body.parameters()}], lr=0.1)
    for given, rule in (
        (model, ClipByNorm({"head": 0.5, "body": 2.0}, by="layer")),
        (optimizer.param_groups, ClipByNorm([0.5, 2.0], by="group")),
        (iter(optimizer.param_groups), ClipByNorm({0: 0.5, 1: 2.0}, by="group")),
    ):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        fastclip.clip_grads_(given, rule)
        for module, bound in ((model.head, 0.5), (model.body, 2.0)):
            norm = math.sqrt(sum(grad_of(p).norm().item() ** 2 for p in module.parameters()))
            assert norm == pytest.approx(bound, rel=1e-6)


# ---- Measuring


def test_measuring_writes_nothing(leg: Leg, rng: np.random.Generator) -> None:
    grads = draw(leg, rng, DTYPES["mixed"])
    originals = {name: None if grad is None else twin(grad) for name, grad in grads.items()}
    versions = [grad._version for grad in grads.values() if grad is not None]
    made = named(grads)
    for by in GROUPINGS.values():
        result = fastclip.measure_grads(made, by=by)
        assert result.coefficients is None
        assert result.clipped.item() is False
        again = fastclip.measure_grads(made, by=by)
        oracle.assert_same_bits(again.group_norms, result.group_norms)  # the second call did not overwrite the first
    for grad, original in zip(grads.values(), originals.values(), strict=True):
        if grad is not None and original is not None:
            oracle.assert_same_bits(grad, original)
            assert_untouched_around(grad, original)
    assert [grad._version for grad in grads.values() if grad is not None] == versions


def test_results_outlive_the_next_call(leg: Leg) -> None:
    """A later call does not write to the memory of an earlier result."""
    made = parameters([torch.tensor([3.0, 4.0], device=leg.device), torch.tensor([1.0], device=leg.device)])
    first = fastclip.clip_grads_(made, ClipByValue(-2.0, 2.0))
    kept = fastclip.clip_by_global_norm_(made, 100.0)
    before = [first.norm.item(), first.group_norms.tolist(), first.clipped.item(), kept.item()]
    for parameter in made:
        grad_of(parameter).fill_(0.5)
    fastclip.clip_grads_(made, ClipByValue(-2.0, 2.0))
    fastclip.clip_by_global_norm_(made, 100.0)
    assert [first.norm.item(), first.group_norms.tolist(), first.clipped.item(), kept.item()] == before
    assert before[2] is True


# ---- By value


LOW, HIGH = (-0.5, -INF, -2.0, 0.25, 0.0), (0.25, 0.5, INF, 1.0, 0.0)
"""Bounds that every dtype represents exactly: Triton's interpreter rounds others wrongly to bfloat16."""


@pytest.mark.parametrize("way", ["each", "one", "result"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_by_value(leg: Leg, way: str, dtype: str, rng: np.random.Generator) -> None:
    """The same as torch's clamp of each gradient between its own bounds."""
    grads = draw(leg, rng, DTYPES[dtype])
    for grad in grads.values():
        if grad is not None and grad.numel() > 4:
            row = grad[(0,) * (grad.dim() - 1)]
            row[:4] = torch.tensor([INF, -INF, NAN, -0.0], dtype=grad.dtype)
    originals = [None if grad is None else twin(grad) for grad in grads.values()]
    lows, highs = ([bounds[i % 5] for i in range(len(grads))] for bounds in (LOW, HIGH))
    if way == "each":
        fastclip.clip_by_value_(named(grads), lows, highs, by="parameter")
    elif way == "one":
        lows, highs = ([-0.5] * len(grads), [0.25] * len(grads))
        fastclip.clip_by_value_(named(grads), -0.5, 0.25)
    else:
        result = fastclip.clip_grads_(named(grads), ClipByValue(lows, dict(enumerate(highs)), by=range(len(grads))))
        assert result.clipped.item() is True
        assert result.coefficients is None
    for grad, original, low, high in zip(grads.values(), originals, lows, highs, strict=True):
        if grad is None or original is None:
            continue
        expected = oracle.as_numpy(original.clamp(low, high))
        np.testing.assert_array_equal(oracle.as_numpy(grad), expected)
        assert grad._version > 0
        assert_untouched_around(grad, original)


FLAGS: list[tuple[list[float], float, float, bool]] = [
    ([-0.5, 0.25], -0.5, 0.25, False),
    ([-0.5 - 2.0**-6], -0.5, 0.25, True),
    ([0.25 + 2.0**-6], -0.5, 0.25, True),
    ([NAN], -0.5, 0.25, False),
    ([NAN] * 40, -0.5, 0.25, False),
    ([NAN] * 8 + [0.5] + [NAN] * 8, -0.5, 0.25, True),
    ([NAN, 0.25, NAN, -0.5], -0.5, 0.25, False),
    ([0.5, NAN], -0.5, 0.25, True),
    ([NAN, -1.0], -0.5, 0.25, True),
    ([INF], -0.5, 0.25, True),
    ([-INF], -0.5, 0.25, True),
    ([INF, -INF, 1e4], -INF, INF, False),
    ([-0.0, 0.0], 0.0, 0.0, False),
    ([2.0], 0.5, 1.0, True),
    ([0.5, 1.0], 0.5, 1.0, False),  # masked lanes have 0, which is outside these bounds
    ([], -0.5, 0.25, False),
]


@pytest.mark.parametrize(("values", "low", "high", "expected"), FLAGS, ids=lambda v: repr(v)[:24])
@pytest.mark.parametrize("shared", [True, False])
def test_whether_anything_was_clipped(
    leg: Leg, values: list[float], low: float, high: float, expected: bool, shared: bool
) -> None:
    """For each dtype alone, in a vector of 16 bytes and in the rest that fills no vector."""
    for dtype in DTYPES["mixed"]:
        inside = torch.full((40,), low if math.isfinite(low) else 0.0, dtype=dtype)
        at = [0, 16, 40 - len(values)] if len(values) <= 4 else [0]
        grads = [
            torch.cat([inside[:begin], torch.tensor(values).to(dtype), inside[begin + len(values) :]]) for begin in at
        ]
        made = parameters([embedded(grad, offset=1, device=leg.device) for grad in grads])
        rule = ClipByValue(low, high) if shared else ClipByValue(low, [high] * len(made), by="parameter")
        result = fastclip.clip_grads_(made, rule)
        assert result.clipped.item() is expected
        assert result.clipped.shape == ()
        for parameter, grad in zip(made, grads, strict=True):
            np.testing.assert_array_equal(oracle.as_numpy(grad_of(parameter)), oracle.as_numpy(grad.clamp(low, high)))


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("outside", [(), (0,), (59,), (31,), (3, 30, 59)], ids=str)
def test_one_gradient_of_many_is_outside(leg: Leg, outside: tuple[int, ...], each: bool) -> None:
    """The result says that one is outside, and all of them are clamped."""
    for dtypes in DTYPES.values() if leg.environment is None else (DTYPES["mixed"],):
        grads = [
            torch.full((3 + 40 * (i % 2),), 0.5, dtype=dtypes[i % len(dtypes)], device=leg.device) for i in range(60)
        ]
        for position in outside:
            grads[position][-1] = -7.0
        bounds = [1.0 + i % 5 for i in range(60)]
        rule = ClipByValue([-b for b in bounds], bounds, by="parameter") if each else ClipByValue(-1.0, 1.0)
        result = fastclip.clip_grads_(parameters(grads), rule)
        assert result.clipped.item() is bool(outside)
        for i, grad in enumerate(grads):
            last = -(bounds[i] if each else 1.0) if i in outside else 0.5
            assert grad.tolist() == [0.5] * (len(grad) - 1) + [last]


@pytest.mark.legs("gpu", "numpy", "torch", "ptx")  # Triton's interpreter rounds wrongly to bfloat16
@pytest.mark.parametrize("each", [True, False])
def test_a_value_at_the_bound_as_its_dtype_has_it_is_not_clipped(leg: Leg, each: bool) -> None:
    """Bounds are rounded to the gradient's dtype; a value equal to the rounded bound is not outside."""
    bounds = (0.1, 0.3, 0.7, 1e-3) if leg.environment is None else (0.3,)
    for dtype, bound in itertools.product(DTYPES["mixed"], bounds):
        at = torch.tensor(bound, dtype=torch.float64).to(dtype)
        beyond = at.nextafter(torch.tensor(1.0, dtype=dtype))
        for value, clipped in ((at, False), (beyond, True)):
            for sign in (1, -1):
                made = parameters(
                    [torch.stack([value * sign] * 3).to(leg.device), torch.zeros(2, dtype=dtype, device=leg.device)]
                )
                rule = ClipByValue([-bound, -2.0], [bound, 2.0], by="parameter") if each else ClipByValue(-bound, bound)
                assert fastclip.clip_grads_(made, rule).clipped.item() is clipped
                oracle.assert_same_bits(grad_of(made[0]).cpu(), torch.stack([at * sign] * 3))


def test_bounds_beyond_a_dtype(leg: Leg) -> None:
    """Such a bound raises before anything is changed. It is allowed in a group without gradients of the dtype."""

    def make() -> list[nn.Parameter]:
        return parameters(
            [torch.tensor([9e5], device=leg.device), torch.tensor([60000.0, -1.0], device=leg.device).half()]
        )

    for low, high in ((-1.0, 70000.0), (-70000.0, 1.0), ([-1.0, -7e4], [1.0, 1.0]), ([-1.0, -1.0], [1.0, 7e4])):
        for call in (
            lambda made, low=low, high=high: fastclip.clip_by_value_(made, low, high, by="parameter"),
            lambda made, low=low, high=high: fastclip.clip_grads_(made, ClipByValue(low, high, by="parameter")),
        ):
            made = make()
            with pytest.raises(RuntimeError, match=r"70000.0 cannot be converted to torch.float16 .* parameters\[1\]"):
                call(made)
            assert [grad_of(p).tolist() for p in made] == [[9e5], [60000.0, -1.0]]
            assert [grad_of(p)._version for p in made] == [grad_of(p)._version for p in make()]
    made = make()
    fastclip.clip_by_value_(made, [-8e5, -1.0], [8e5, INF], by="parameter")
    assert [grad_of(p).tolist() for p in made] == [[8e5], [60000.0, -1.0]]


# ---- Gradients for torch's operations


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_complex_gradients(leg: Leg, dtype: torch.dtype) -> None:
    values = {"a": [3 + 4j, 0j], "b": [complex(INF, 1), complex(-0.0, -0.0)], "c": [complex(1, -0.0), complex(NAN, 2)]}
    grads = {name: torch.tensor(each, dtype=dtype, device=leg.device) for name, each in values.items()}
    grads["d"] = torch.tensor([6 - 8j], dtype=dtype, device=leg.device).conj()
    originals = {name: grad.clone() for name, grad in grads.items()}
    result = fastclip.clip_grads_(named({**grads}), lambda _: torch.tensor([0.5, 1.0, 1.0, 0.25]))
    assert result.group_norms.tolist() == pytest.approx([5.0, INF, NAN, 10.0], nan_ok=True)
    assert grads["a"].tolist() == [1.5 + 2j, 0j]
    assert grads["d"].tolist() == [1.5 + 2j]
    for untouched in ("b", "c"):
        oracle.assert_same_bits(torch.view_as_real(grads[untouched]), torch.view_as_real(originals[untouched]))
    with pytest.raises(NotImplementedError, match=r"clamp is not supported for complex types"):
        fastclip.clip_by_value_(named({"real": torch.tensor([9.0]), **grads}), -1.0, 1.0)


def sparse(leg: Leg) -> Tensor:
    """[[4, 0], [0, 0], [0, 3]], the 4 in two parts."""
    made = torch.sparse_coo_tensor(
        torch.tensor([[0, 2, 0], [0, 1, 0]]),
        torch.tensor([1.0, 3.0, 3.0]),
        (3, 2),
        device=leg.device,
        check_invariants=True,
    )
    assert not made.is_coalesced()
    return made


def test_sparse_gradients(leg: Leg) -> None:
    with leg.unbounded():
        parameter = nn.Parameter(torch.zeros(3, 2, device=leg.device))
        other = nn.Parameter(torch.zeros(2, device=leg.device))
        parameter.grad, other.grad = sparse(leg), torch.tensor([0.0, 12.0], device=leg.device)
        measured = fastclip.measure_grads([parameter, other])
        assert measured.group_norms.tolist() == [5.0, 12.0]
        assert not grad_of(parameter).is_coalesced()  # to coalesce would be a write
        result = fastclip.clip_grads_([parameter, other], ClipByNorm(2.5))
        assert (result.norm.item(), result.group_norms.tolist()) == (13.0, [5.0, 12.0])
        assert grad_of(parameter).layout == torch.sparse_coo
        assert grad_of(parameter).to_dense().tolist() == [[2.0, 0.0], [0.0, 0.0], [0.0, 1.5]]
        assert other.grad.tolist() == [0.0, 2.5]
        result = fastclip.clip_grads_([parameter, other], ClipByValue([0.0, -1.0], [1.75, 9.0], by="parameter"))
        assert result.clipped.item() is True
        assert grad_of(parameter).to_dense().tolist() == [[1.75, 0.0], [0.0, 0.0], [0.0, 1.5]]
        assert other.grad.tolist() == [0.0, 2.5]


def test_gradients_that_share_memory(leg: Leg) -> None:
    """Each is counted and scaled separately: memory that two of them share is scaled twice, as by torch."""
    shared = torch.tensor([3.0, 4.0], device=leg.device)
    result = fastclip.clip_grads_(parameters([shared, shared]), ClipByNorm([2.5, 10.0]))
    assert result.group_norms.tolist() == [5.0, 5.0]
    assert result.norm.item() == pytest.approx(50**0.5)
    assert shared.tolist() == [1.5, 2.0]
    fastclip.clip_by_norm_(parameters([shared, shared]), 1.25)
    assert shared.tolist() == [0.375, 0.5]
    flat = torch.full((6,), 2.0, device=leg.device)
    result = fastclip.clip_grads_(parameters([flat[:4], flat[2:]]), ClipByValue(-1.0, [1.5, 1.0], by="parameter"))
    assert result.clipped.item() is True
    assert flat.tolist() == [1.5, 1.5, 1.0, 1.0, 1.0, 1.0]


def test_clipping_is_seen_by_autograd(leg: Leg) -> None:
    """Autograd must notice when a gradient that a graph has saved is changed."""
    for clip in (
        lambda made: fastclip.clip_by_norm_(made, 1.0),
        lambda made: fastclip.clip_by_global_norm_(made, 1.0, 5.0),
        lambda made: fastclip.clip_by_value_(made, -1.0, 1.0),
    ):
        x = nn.Parameter(torch.tensor([2.0, 3.0], device=leg.device))
        (x.grad,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        penalty = (grad_of(x) ** 2).sum()
        result = clip([x])
        assert result is None or not result.requires_grad
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(penalty, x)


@pytest.mark.legs("numpy", "torch")
def test_measuring_is_not_seen_by_autograd(leg: Leg) -> None:
    x = nn.Parameter(torch.tensor([2.0, 3.0], device=leg.device))
    (x.grad,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    penalty = (grad_of(x) ** 2).sum()
    result = fastclip.measure_grads([x])
    assert not result.norm.requires_grad
    assert torch.autograd.grad(penalty, x)[0].isfinite().all()


CALLS: list[Callable[[Any], object]] = [
    lambda made: fastclip.clip_grads_(made, ClipByNorm(1.0)),
    lambda made: fastclip.clip_grads_(made, ClipByValue(-1.0, 1.0)),
    lambda made: fastclip.clip_by_norm_(made, 1.0),
    lambda made: fastclip.clip_by_global_norm_(made, 1.0),
    lambda made: fastclip.clip_by_global_norm_(made, 1.0, 5.0),
    lambda made: fastclip.clip_by_value_(made, -1.0, 1.0),
]


@pytest.mark.parametrize("call", CALLS, ids=range(len(CALLS)))
def test_gradients_that_cannot_be_written_are_refused_before_any_changes(call: Callable[[Any], object]) -> None:
    good = torch.tensor([30.0, 40.0])
    with torch.inference_mode():
        frozen = torch.tensor([30.0])
    bad = [(torch.ones(1).expand(3), "single memory location"), (frozen, "inference tensor")]
    for grad, message in bad:
        parameter = nn.Parameter(torch.empty(grad.shape))
        parameter.grad = grad
        with pytest.raises(RuntimeError, match=message):
            call([*parameters([good]), parameter])
        assert good.tolist() == [30.0, 40.0]
        assert good._version == 0
    with pytest.raises(TypeError, match=r"parameters\[1\] is a int"):
        call([*parameters([good]), 3])


def test_a_result_is_telling() -> None:
    result = fastclip.measure_grads(parameters([torch.tensor([3.0, 4.0])]))
    assert isinstance(result, ClipResult)
    assert "norm=tensor(5., dtype=torch.float64)" in repr(result)


def test_norms_of_scaled_gradients_are_those_without_the_scale(leg: Leg) -> None:
    """With a loss scale, norms and bounds are those of the unscaled gradients; the gradients themselves stay scaled."""
    for rule in (ClipByNorm(2.5), ClipByGlobalNorm(2.5)):
        made = parameters([torch.tensor([3.0, -4.0], device=leg.device) * 1024])
        grads = collect(made)
        scale = torch.tensor([1024.0], device=leg.device)
        for each in (True, False):
            result = apply_rule(grads, rule, group(grads.owners, rule.by), each=each, scale=scale)
            expected = 5.0 if each else 2.5
            assert result.norm.shape == ()
            assert result.norm.item() == expected
            assert result.group_norms.tolist() == [expected]
            assert result.clipped.item() is each
            assert grad_of(made[0]).tolist() == [1.5 * 1024, -2.0 * 1024]
