"""Rules and groups without gradients: their formulas, their bounds, and which parameters form a group."""

from __future__ import annotations

import collections
import dataclasses
import math
import types
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gradients import grads_of, parameters
from torch import Tensor, nn

import fastclip
from fastclip import ClipAtThreshold, ClipByGlobalNorm, ClipByNorm, ClipByValue, ClipGradNorm, Rule
from fastclip.core.collect import collect
from fastclip.rules.groups import Groups, group

INF = math.inf
NAN = math.nan
NORM_RULES = (ClipByNorm, ClipByGlobalNorm, ClipGradNorm, ClipAtThreshold)


@pytest.fixture(autouse=True)
def _numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_BACKEND", "numpy")


def threes(count: int) -> list[nn.Parameter]:
    """Parameters with gradients of norms 3, 6, 9, ..."""
    return parameters([torch.tensor([1.0, -2.0, 2.0]) * (i + 1) for i in range(count)])


class Unchanged:
    """Checks that neither gradients nor their version counters change inside the block."""

    def __init__(self, made: Sequence[Tensor]) -> None:
        self.grads = grads_of(made)
        self.copies = [grad.clone() for grad in self.grads]
        self.versions = [grad._version for grad in self.grads]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for grad, copy in zip(self.grads, self.copies, strict=True):
            oracle.assert_same_bits(grad, copy)
        assert [grad._version for grad in self.grads] == self.versions


# ---- Formulas


BOUNDS = (1.0, 0.1, 3.7, 5e-324, 1e-300, 1e300, 5.0)


@pytest.mark.parametrize("kind", NORM_RULES)
@pytest.mark.parametrize("bound", BOUNDS)
def test_coefficients(kind: type[Any], bound: float) -> None:
    around = [bound, np.nextafter(bound, 0), np.nextafter(bound, INF), 2 * bound, bound / 3]
    norms = [0.0, 5e-324, 1e-300, 1e-6, 0.5, 1.0, 7.0, 1e300, INF, NAN, *map(float, around)]
    coefficients = kind(bound)(torch.tensor(norms, dtype=torch.float64))
    assert coefficients.dtype == torch.float64
    for coefficient, norm in zip(coefficients.tolist(), norms, strict=True):
        expected = oracle.rule(kind.__name__, norm, bound)
        # A quotient of two fp64 numbers, and one sum: three roundings at most.
        assert coefficient == pytest.approx(expected, rel=2.0**-51, abs=5e-324, nan_ok=True), norm
        if expected == 1:
            assert coefficient == 1, norm  # to the bit; otherwise the gradient would be written needlessly


def test_what_tells_the_rules_apart() -> None:
    """A norm that is infinite, NaN, at the bound, or 1e-7 below it."""
    norms = torch.tensor([INF, NAN, 1.0, 1 - 1e-7], dtype=torch.float64)
    answers = {kind.__name__: kind(1.0)(norms).tolist() for kind in NORM_RULES}
    assert answers["ClipByNorm"] == pytest.approx([0.0, NAN, 1.0, 1.0], nan_ok=True, rel=0)
    assert answers["ClipByGlobalNorm"] == pytest.approx([NAN, NAN, 1.0, 1.0], nan_ok=True, rel=0)
    assert answers["ClipAtThreshold"] == pytest.approx([0.0, 1.0, 1.0, 1.0], rel=0)
    assert answers["ClipGradNorm"][0] == 0
    assert math.isnan(answers["ClipGradNorm"][1])
    assert 1 - 1e-6 < answers["ClipGradNorm"][2] < 1  # its epsilon already clips
    assert answers["ClipGradNorm"][3] < 1


@pytest.mark.parametrize("kind", NORM_RULES)
def test_each_group_has_its_own_bound(kind: type[Any]) -> None:
    norms = torch.tensor([3.0, 3.0, NAN, 3.0], dtype=torch.float64)
    labels = ("a", "b", "c", "d")
    bounds: dict[str, Any] = {"d": 30.0, "a": 1.0, "b": 2, "c": np.float32(1.5)}
    expected = [
        oracle.rule(kind.__name__, n, float(bounds[label])) for n, label in zip([3, 3, NAN, 3], labels, strict=True)
    ]
    for bound in (bounds, types.MappingProxyType(bounds), [1.0, 2.0, 1.5, 30.0], (1, 2, 1.5, 30)):
        rule = kind(bound, by=labels).for_groups(labels)
        assert rule(norms).tolist() == pytest.approx(expected, rel=2.0**-51, nan_ok=True)


def test_torchs_rule_is_torchs(rng: np.random.Generator) -> None:
    values = [torch.from_numpy(rng.standard_normal(size)) for size in (1, 7, 50)]
    for max_norm in (1e-3, 1.0, 100.0):
        ours, theirs = (parameters([value.clone() for value in values]) for _ in range(2))
        fastclip.clip_grads_(ours, ClipGradNorm(max_norm))
        torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        for mine, expected in zip(grads_of(ours), grads_of(theirs), strict=True):
            oracle.assert_close(mine, oracle.as_numpy(expected), oracle.NORM_TOLERANCE[torch.float64])


# ---- Bounds, and rules as objects


@pytest.mark.parametrize("kind", NORM_RULES)
@pytest.mark.parametrize("bad", [0, 0.0, -1.0, NAN, INF, -INF])
def test_bounds_out_of_range(kind: type[Any], bad: float) -> None:
    name = dataclasses.fields(kind)[0].name
    for bound in (bad, [1.0, bad], {"a": 1.0, "b": bad}, np.float64(bad), torch.tensor(bad)):
        with pytest.raises(ValueError, match=f"`{name}` must be above 0 and finite, not"):
            kind(bound)
    rest: Any = collections.defaultdict(lambda: bad, a=1.0)
    with pytest.raises(ValueError, match=f"`{name}` must be above 0 and finite, not"):
        kind(rest).for_groups(("a", "b"))
    with pytest.raises(ValueError, match=f"`{name}` must be within the range of floats"):
        kind(10**400)


@pytest.mark.parametrize("kind", [*NORM_RULES, lambda bound: ClipByValue(bound, 5.0), lambda b: ClipByValue(-9.0, b)])
@pytest.mark.parametrize("bad", ["1.0", "large", None, 1j, b"1", object(), True], ids=repr)
def test_bounds_that_are_no_numbers(kind: Callable[[Any], object], bad: object) -> None:
    for bound in (bad, [1.0, bad], {"a": 1.0, "b": bad}):
        with pytest.raises(TypeError, match=r"must be a real number, or one for each group, not"):
            kind(bound)


def test_value_bounds_out_of_order() -> None:
    ClipByValue(0.5, 0.5)
    ClipByValue(-INF, INF)
    ClipByValue([1.0, -1.0], [1.0, 0.0])
    known: list[Any] = [(1.0, 0.0), ([0.0, 1.0], 0.5), (0.5, (1.0, 0.0)), ([0.0, 1.0], [1.0, 0.0])]
    for low, high in known:
        with pytest.raises(ValueError, match=r"`clip_value_min`, .*, is above `clip_value_max`, "):
            ClipByValue(low, high)
    by_label: list[Any] = [({"a": 0.0, "b": 1.0}, 0.5), (0.5, {"a": 1.0, "b": 0.0}), ({"a": 2.0, "b": 0.0}, [1.0, 1.0])]
    for low, high in by_label:
        with pytest.raises(ValueError, match="is above"):
            ClipByValue(low, high).for_groups(("a", "b"))
    with pytest.raises(ValueError, match="not NaN"):
        ClipByValue(NAN, 1.0)
    with pytest.raises(ValueError, match="not NaN"):
        ClipByValue(0.0, [1.0, NAN])


def test_bounds_that_do_not_fit_the_groups() -> None:
    labels = ("a", "b")
    for bound in ([1.0], [1.0, 2.0, 3.0], ()):
        with pytest.raises(ValueError, match=rf"`clip_norm` has {len(bound)} bounds for 2 groups: 'a', 'b'"):
            ClipByNorm(bound).for_groups(labels)
    with pytest.raises(ValueError, match="`clip_norm` has no bound for the group 'b'"):
        ClipByNorm({"a": 1.0}).for_groups(labels)
    with pytest.raises(ValueError, match="`clip_norm` has a bound for 'c', which is no group: there are 'a', 'b'"):
        ClipByNorm({"a": 1.0, "b": 1.0, "c": 1.0}).for_groups(labels)
    with pytest.raises(ValueError, match="`clip_value_max` has 1 bounds for 2 groups"):
        ClipByValue([-1.0, -1.0], [1.0]).for_groups(labels)
    with pytest.raises(ValueError, match=r"0, 1, .*, 9 and 90 more$"):
        ClipByNorm({"c": 1.0}).for_groups(range(100))


def test_a_defaultdict_gives_the_rest_its_default_and_is_left_as_it_is() -> None:
    """So one rule can be used for two models."""
    bounds = collections.defaultdict(lambda: 0.5, head=2.0)
    rule = ClipByNorm(bounds)
    assert rule.for_groups(("head", "encoder")).clip_norm == (2.0, 0.5)
    assert rule.for_groups(("decoder", "head")).clip_norm == (0.5, 2.0)
    assert dict(bounds) == {"head": 2.0}


def test_a_rule_with_one_bound_is_its_own_for_any_groups() -> None:
    for rule in (ClipByNorm(1), ClipByValue(-1, 1), Rule(torch.ones_like)):
        assert rule.for_groups(("a", "b")) is rule


RULES = [
    ClipByNorm(1.5),
    ClipByNorm({"encoder": 1.0, "head": 0.1}, by="layer"),
    ClipByGlobalNorm([1.0, 2.0], by="group"),
    ClipGradNorm(3),
    ClipAtThreshold(2.5, by=("a", "b", "a")),
    ClipByValue(-0.5, 1.0),
    ClipByValue((-0.5, -1.0), {0: 1.0, 1: 2.0}, by="parameter"),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_repr_equality_and_immutability(rule: Any) -> None:
    """A rule's repr is the call that makes it."""
    again = eval(repr(rule), {kind.__name__: kind for kind in (*NORM_RULES, ClipByValue)})  # noqa: S307 - our own repr
    assert again == rule
    assert again is not rule
    assert sum(other == rule for other in RULES) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.by = "global"


def test_repr_of_what_is_not_eval_ed() -> None:
    assert repr(ClipByNorm(1)) == "ClipByNorm(clip_norm=1.0, by='parameter')"
    assert repr(Rule(halve_the_largest)) == "Rule(halve_the_largest, by='parameter')"
    assert repr(Rule(len, by="layer")) == "Rule(len, by='layer')"  # type: ignore[arg-type]

    class Stateful:
        def __call__(self, norms: Tensor) -> Tensor:
            return norms

        def __repr__(self) -> str:
            return "Stateful()"

    assert repr(Rule(Stateful(), by="global")) == "Rule(Stateful(), by='global')"


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_settings_make_the_rule_again(rule: Any) -> None:
    labels = [label for name in rule.bounds if isinstance(bound := getattr(rule, name), dict) for label in bound]
    assert type(rule)(**rule.settings(labels)) == rule


def test_settings_hold_labels_but_no_function() -> None:
    assert ClipByNorm(1.0, by=["a", "b"]).settings("ab") == {"clip_norm": 1.0, "by": ["a", "b"]}
    assert ClipByNorm(1.0, by=str.lower).settings(()) == {"clip_norm": 1.0}


@pytest.mark.parametrize("no_rule", [None, 1.0, "ClipByNorm", ClipByNorm, [ClipByNorm(1.0)], Tensor], ids=repr)
def test_what_is_no_rule(no_rule: Any) -> None:
    made = threes(1)
    with Unchanged(made), pytest.raises(TypeError, match=r"`rule` must be a rule \(ClipByNorm, .*Rule\) or a function"):
        fastclip.clip_grads_(made, no_rule)


# ---- The user's own functions


def halve_the_largest(norms: Tensor) -> Tensor:
    return torch.where(norms == norms.max(), 0.5, 1.0)


ANSWERS: list[tuple[str, Callable[[Tensor], Any], list[float]]] = [
    ("vector", halve_the_largest, [1, 1, 0.5]),
    ("float32", lambda _: torch.tensor([0.5, 0.25, 2.0]), [0.5, 0.25, 2]),
    ("scalar", lambda _: torch.tensor(0.25), [0.25] * 3),
    ("one", lambda _: torch.tensor([0.25]), [0.25] * 3),
    ("float", lambda _: 0.125, [0.125] * 3),
    ("int", lambda _: -2, [-2] * 3),
    ("list", lambda _: [1.0, 0.5, 0.0], [1, 0.5, 0]),
    ("array", lambda _: np.array([1.0, 0.5, 0.0]), [1, 0.5, 0]),
    ("with a graph", lambda norms: norms.new_tensor(0.5, requires_grad=True) * torch.ones(3), [0.5] * 3),
    ("expanded", lambda norms: norms[0].expand(3), [3] * 3),
    ("strided", lambda _: torch.tensor([[1.0, 9.0], [0.5, 9.0], [2.0, 9.0]])[:, 0], [1, 0.5, 2]),
]


@pytest.mark.parametrize(("function", "coefficients"), [a[1:] for a in ANSWERS], ids=[a[0] for a in ANSWERS])
@pytest.mark.parametrize("wrapped", [False, True])
def test_functions(function: Callable[[Tensor], Tensor], coefficients: list[float], wrapped: bool) -> None:
    made = threes(3)
    originals = [grad.clone() for grad in grads_of(made)]
    seen = []

    def recording(norms: Tensor) -> Tensor:
        seen.append(norms.clone())
        return function(norms)

    result = fastclip.clip_grads_(made, Rule(recording) if wrapped else recording)
    assert [norms.tolist() for norms in seen] == [[3.0, 6.0, 9.0]]
    assert seen[0].dtype == torch.float64
    assert result.coefficients is not None
    assert result.coefficients.tolist() == coefficients
    assert not result.coefficients.requires_grad
    assert result.clipped.item() is True
    for grad, original, coefficient in zip(grads_of(made), originals, coefficients, strict=True):
        oracle.assert_same_bits(grad, original * coefficient)  # powers of two and small integers: exact


def test_function_of_groups() -> None:
    made = threes(4)
    result = fastclip.clip_grads_(made, Rule(halve_the_largest, by=["x", "y", "x", "y"]))
    assert result.groups.labels == ("x", "y")
    assert result.group_norms.tolist() == pytest.approx([math.hypot(3, 9), math.hypot(6, 12)])
    assert [grad.norm().item() for grad in grads_of(made)] == pytest.approx([3, 3, 9, 6])


def test_rule_of_a_rule() -> None:
    made = threes(2)
    fastclip.clip_grads_(made, Rule(ClipAtThreshold(1.5), by="global"))
    assert sum(grad.norm().item() ** 2 for grad in grads_of(made)) == pytest.approx(1.5**2)


BAD_ANSWERS: list[tuple[Any, str]] = [
    (torch.ones(2), r"returned coefficients of shape \(2,\) for norms of shape \(3,\)"),
    (torch.ones(4), r"of shape \(4,\)"),
    (torch.ones(0), r"of shape \(0,\)"),
    (torch.ones(3, 1), r"of shape \(3, 1\)"),
    (torch.ones(1, 3), r"of shape \(1, 3\)"),
    (None, "returned None"),
    ("0.5", "returned '0.5'"),
    (object(), "returned <object"),
    ([[1.0], [2.0, 3.0]], "returned"),
]


@pytest.mark.parametrize(("answer", "message"), BAD_ANSWERS, ids=repr)
def test_answers_that_do_not_fit_are_refused_before_any_gradient_changes(answer: Any, message: str) -> None:
    made = threes(3)
    with Unchanged(made), pytest.raises((ValueError, TypeError, RuntimeError), match=f"test_answers.*{message}"):
        fastclip.clip_grads_(made, lambda _: answer)


def test_a_function_that_raises_changes_nothing() -> None:
    def refuse(norms: Tensor) -> Tensor:
        raise KeyError(len(norms))

    made = threes(3)
    with Unchanged(made), pytest.raises(KeyError, match="3"):
        fastclip.clip_grads_(made, refuse)


# ---- Groups


class Model(nn.Module):
    """Modules two deep."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.head = nn.Linear(2, 1, bias=False)
        self.scale = nn.Parameter(torch.ones(1))


NAMES = ("scale", "encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias", "head.weight")


def test_names_of_the_model() -> None:
    assert tuple(name for name, _ in Model().named_parameters()) == NAMES


BY: list[tuple[Any, tuple[Hashable, ...], tuple[int, ...]]] = [
    ("global", ("all",), (0,) * 6),
    ("parameter", NAMES, tuple(range(6))),
    ("layer", ("scale", "encoder.0", "encoder.1", "head"), (0, 1, 1, 2, 2, 3)),
    (lambda name: name.split(".")[0], ("scale", "encoder", "head"), (0, 1, 1, 1, 1, 2)),
    (lambda name: name.endswith("bias"), (False, True), (0, 0, 1, 0, 1, 0)),
    (["b", "a", "b", "a", "b", "c"], ("b", "a", "c"), (0, 1, 0, 1, 0, 2)),
    ((7, None, None, (1, 2), 7, 7), (7, None, (1, 2)), (0, 1, 1, 2, 0, 0)),
]


@pytest.mark.parametrize(("by", "labels", "of"), BY, ids=lambda each: repr(each)[:40])
def test_groupings(by: Any, labels: tuple[Hashable, ...], of: tuple[int, ...]) -> None:
    for given in (Model(), list(Model().named_parameters()), Model().named_parameters()):
        groups = group(collect(given).owners, by)
        assert (groups.labels, groups.of) == (labels, of)
        assert groups.is_one == (len(labels) == 1)
        assert groups.is_each == (of == tuple(range(6)))


def test_positions_are_the_labels_of_parameters_without_names() -> None:
    assert group(collect(threes(3)).owners, "parameter").labels == (0, 1, 2)
    assert group(collect(threes(1)[0]).owners, "parameter").labels == (0,)


def grouped(*sizes: int) -> list[dict[str, Any]]:
    return [{"params": threes(size)} for size in sizes]


@pytest.mark.parametrize("sizes", [(2, 1), (1, 0, 2), (0, 3), (3, 0), (2, 0, 0), (0, 0), (0,)], ids=str)
def test_parameter_groups(sizes: tuple[int, ...]) -> None:
    """Each group has its own bound, also a group without parameters."""
    of = tuple(position for position, size in enumerate(sizes) for _ in range(size))
    given = grouped(*sizes)
    groups = group(collect(given).owners, "group")
    assert (groups.labels, groups.of) == (tuple(range(len(sizes))), of)
    bounds = [position + 1.0 for position in range(len(sizes))]
    result = fastclip.clip_grads_(given, ClipByNorm(bounds, by="group"))
    expected = [math.sqrt(sum((3 * (i + 1)) ** 2 for i in range(size))) for size in sizes]
    assert result.group_norms.tolist() == pytest.approx(expected)
    for members, bound in zip(given, bounds, strict=True):
        if members["params"]:
            clipped = math.sqrt(sum(grad.norm().item() ** 2 for grad in grads_of(members["params"])))
            assert clipped == pytest.approx(bound)


def test_parameter_groups_of_an_optimizer_keep_their_names() -> None:
    model = Model()
    plain = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    assert group(collect(plain.param_groups).owners, "parameter").labels == tuple(range(6))
    named = torch.optim.SGD(
        [{"params": [(n, p) for n, p in model.named_parameters() if n.endswith(end)]} for end in ("weight", "bias")],
        lr=0.1,
    )
    groups = group(collect(named.param_groups).owners, "layer")
    assert groups.labels == ("encoder.0", "encoder.1", "head")
    assert groups.of == (0, 1, 2, 0, 1)
    with pytest.raises(ValueError, match=r"pass a model or model.named_parameters\(\)"):
        group(collect(plain.param_groups).owners, "layer")


BAD_BY: list[tuple[Any, Any, type[Exception], str]] = [
    ("layers", Model, TypeError, "`by` must be one of 'global', 'parameter', 'layer', 'group', a function"),
    ("", Model, TypeError, "`by` must be one of"),
    (None, Model, TypeError, "`by` must be one of .*, not None"),
    (3, Model, TypeError, "`by` must be one of .*, not 3"),
    ({"head": 0}, Model, TypeError, "`by` must be one of"),
    (np.array([0, 1, 0, 1, 0, 1]), Model, TypeError, "`by` must be one of"),
    (torch.tensor([0, 1, 0, 1, 0, 1]), Model, TypeError, "`by` must be one of"),
    ("group", Model, ValueError, "by='group' needs parameter groups: pass optimizer.param_groups"),
    ("layer", lambda: threes(2), ValueError, r"`by` goes by names: pass a model or model.named_parameters\(\)"),
    (str.upper, lambda: threes(2), ValueError, "`by` goes by names"),
    (["a"], lambda: threes(2), ValueError, "`by` has 1 labels for 2 parameters"),
    (["a"] * 3, lambda: threes(2), ValueError, "`by` has 3 labels for 2 parameters"),
    ([["a"], ["b"]], lambda: threes(2), TypeError, "unhashable"),
]


@pytest.mark.parametrize(("by", "make", "error", "message"), BAD_BY, ids=lambda each: repr(each)[:30])
def test_bad_groupings_change_nothing(by: Any, make: Any, error: type[Exception], message: str) -> None:
    made = make()
    listed = list(made.parameters()) if isinstance(made, nn.Module) else made
    for parameter in listed:
        parameter.grad = torch.full_like(parameter, 100.0)
    with Unchanged(listed):
        for call in (
            lambda: fastclip.clip_grads_(made, ClipByNorm(1.0, by=by)),
            lambda: fastclip.clip_by_norm_(made, 1.0, by=by),
            lambda: fastclip.clip_by_value_(made, -1.0, 1.0, by=by),
            lambda: fastclip.measure_grads(made, by=by),
        ):
            with pytest.raises(error, match=message):
                call()


def sizes_of_groups() -> Iterator[list[int]]:
    yield [1]
    yield [2, 1]
    yield [1, 1, 2]
    yield [64]
    yield [65, 1]
    yield [63, 64, 65]
    yield [5000, 1, 64, 65, 1]
    yield [4096, 4097, 1, 1]
    yield [1] * 500 + [2]
    yield [10_000]
    yield [5000, 5000]
    yield [0, 3, 0, 70, 0]
    yield [0, 1]


def combined(norms: np.ndarray[Any, Any], of: np.ndarray[Any, Any], count: int) -> list[float]:
    """The norm of each group in 80 bits, scaled so that no square overflows or underflows."""
    answer = []
    for position in range(count):
        mine = norms[of == position].astype(np.longdouble)
        largest = mine.max(initial=0)
        scale = largest if np.isfinite(largest) and largest > 0 else np.longdouble(1)
        answer.append(float(np.sqrt(np.sum((mine / scale) ** 2)) * scale))
    return answer


@pytest.mark.parametrize("sizes", list(sizes_of_groups()), ids=lambda sizes: "-".join(map(str, sizes))[:30])
@pytest.mark.parametrize("exponents", [(0, 0), (-1, 1), (-300, 300), (-320, -300)], ids=str)
def test_norms_of_groups(sizes: list[int], exponents: tuple[int, int], rng: np.random.Generator) -> None:
    """Right to rounding over the whole range of fp64, and the same to the bit every time."""
    of = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    norms = rng.uniform(1, 9, len(of)) * 10.0 ** rng.uniform(*exponents, len(of))
    groups = Groups(tuple(range(len(sizes))), tuple(of.tolist()))
    result = groups.combine(torch.from_numpy(norms))
    assert result.shape == (len(sizes),)
    expected = combined(norms, of, len(sizes))
    # Up to three levels of 64 terms each: half of 64 roundings, and those of scaling and root. A single group is one
    # sum of up to 10,000 terms, in lanes of at most 4: pairwise, or with an error that grows as their square root.
    tolerance = (3 * (64 / 2 + 4)) * 2.0**-53
    assert result.tolist() == pytest.approx(expected, rel=tolerance, abs=5e-324)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = Groups(groups.labels, groups.of).combine(torch.from_numpy(norms.copy()))
            oracle.assert_same_bits(again, result)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("special", [NAN, INF])
@pytest.mark.parametrize("sizes", [[1, 1, 1], [2, 70, 2], [5000, 70, 5000], [3, 5000, 2]], ids=str)
def test_what_is_not_finite_poisons_its_own_group_only(
    sizes: list[int], special: float, rng: np.random.Generator
) -> None:
    of = rng.permutation(np.repeat(np.arange(3), sizes))
    groups = Groups((0, 1, 2), tuple(of.tolist()))
    clean = rng.uniform(1, 2, len(of))
    before = groups.combine(torch.from_numpy(clean)).tolist()
    for victim in np.flatnonzero(of == 1)[[0, -1]]:
        norms = clean.copy()
        norms[victim] = special
        after = groups.combine(torch.from_numpy(norms)).tolist()
        assert (after[0], after[2]) == (before[0], before[2])
        assert after[1] == pytest.approx(special, nan_ok=True)


@pytest.mark.parametrize("sizes", [[1], [3], [1, 2, 3], [64, 0, 65], [1, 1, 1]], ids=str)
def test_spreading_is_the_way_back(sizes: list[int], rng: np.random.Generator) -> None:
    of = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    groups = Groups(tuple(range(len(sizes))), tuple(of.tolist()))
    values = torch.arange(10.0, 10.0 + len(sizes), dtype=torch.float64)
    assert groups.spread(values).tolist() == [10.0 + position for position in of]
