"""The behaviours of torch that a drop-in replacement must have, and those in which fastclip is better: a test each.

Where fastclip differs on purpose, the test asserts torch's behaviour as well, so that it fails when torch changes.
"""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import oracle
import pytest
import torch
from gradients import GradHolder, grad_of, parameters
from legs import Leg
from torch import Tensor, nn
from torch.nn.utils import clip_grad as torchs

import fastclip

INF = math.inf
NAN = math.nan
EPS = oracle.EPS

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "clip_grad_norm_": torchs.clip_grad_norm_,
    "clip_grad_value_": torchs.clip_grad_value_,
    "get_total_norm": torchs._get_total_norm,
    "clip_grads_with_norm_": torchs._clip_grads_with_norm_,
}


def one(values: list[Any] | float, leg: Leg, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A parameter with a gradient of these values."""
    return parameters([torch.tensor(values, dtype=dtype, device=leg.device)])[0]


def values_of(parameter: Tensor) -> list[Any]:
    values: list[Any] = oracle.as_numpy(grad_of(parameter)).tolist()
    return values


# ---- Signatures, arguments, results


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_is_torchs_with_keywords_added(name: str) -> None:
    ours = list(inspect.signature(getattr(fastclip, name)).parameters.values())
    theirs = list(inspect.signature(FUNCTIONS[name]).parameters.values())
    for our, their in zip(ours, theirs, strict=False):
        assert (our.name, our.kind, our.default) == (their.name, their.kind, their.default)
    added = {"clip_grad_norm_": ["norm_dtype"], "get_total_norm": ["dtype", "norm_dtype"]}
    assert [parameter.name for parameter in ours[len(theirs) :]] == added.get(name, [])
    assert all(parameter.default is None for parameter in ours[len(theirs) :])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_name_and_documentation(name: str) -> None:
    function = getattr(fastclip, name)
    assert function.__name__ == name
    assert "Args:" in (inspect.getdoc(function) or "")
    assert ".. math::" in (inspect.getdoc(function) or "")


def test_positional_and_keyword_arguments(leg: Leg) -> None:
    def results(call: Callable[[nn.Parameter], Tensor | None]) -> tuple[float | None, list[Any]]:
        parameter = one([3.0, 4.0], leg)
        result = call(parameter)
        return (None if result is None else result.item()), values_of(parameter)

    total = torch.tensor(5.0, device=leg.device)
    assert results(lambda p: fastclip.clip_grad_norm_([p], 1.0, 2.0, False, None)) == results(
        lambda p: fastclip.clip_grad_norm_(
            parameters=[p], max_norm=1.0, norm_type=2.0, error_if_nonfinite=False, foreach=None
        )
    )
    assert results(lambda p: fastclip.clip_grads_with_norm_([p], 1.0, total, None)) == results(
        lambda p: fastclip.clip_grads_with_norm_(parameters=[p], max_norm=1.0, total_norm=total, foreach=None)
    )
    assert results(lambda p: fastclip.clip_grad_value_([p], 3.5, None)) == results(
        lambda p: fastclip.clip_grad_value_(parameters=[p], clip_value=3.5, foreach=None)
    )
    assert results(lambda p: fastclip.get_total_norm([grad_of(p)], 2.0, False, None)) == results(
        lambda p: fastclip.get_total_norm(
            tensors=[grad_of(p)], norm_type=2.0, error_if_nonfinite=False, foreach=None, norm_dtype=None
        )
    )


CONTAINERS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "list": list,
    "tuple": tuple,
    "generator": lambda made: (parameter for parameter in made),
    "iterator": iter,
    "dict_values": lambda made: dict(enumerate(made)).values(),
    "module": nn.ParameterList,
    "named": lambda made: nn.ParameterList(made).named_parameters(),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_containers(leg: Leg, container: str) -> None:
    """In particular, a generator is not exhausted before the gradients are scaled."""
    made = [one([3.0], leg), nn.Parameter(torch.zeros(1, device=leg.device)), one([4.0], leg)]
    norm = fastclip.clip_grad_norm_(CONTAINERS[container](made), 2.5)
    assert norm.item() == 5
    assert values_of(made[0]) + values_of(made[2]) == pytest.approx([1.5, 2.0], rel=1e-6)
    fastclip.clip_grad_value_(CONTAINERS[container](made), 1.0)
    assert values_of(made[0]) + values_of(made[2]) == [1.0, 1.0]
    fastclip.clip_grads_with_norm_(CONTAINERS[container](made), 1.0, torch.tensor(4.0, device=leg.device))
    assert values_of(made[0]) == pytest.approx([0.25], rel=1e-6)


def test_single_tensor(leg: Leg) -> None:
    parameter = one([3.0, 4.0], leg)
    assert fastclip.clip_grad_norm_(parameter, 1.0).item() == 5
    assert values_of(parameter) == pytest.approx([0.6, 0.8], rel=1e-6)
    fastclip.clip_grad_value_(parameter, 0.7)
    assert values_of(parameter) == pytest.approx([0.6, 0.7], rel=1e-6)
    fastclip.clip_grads_with_norm_(parameter, 1.0, torch.tensor(2.0))
    assert values_of(parameter) == pytest.approx([0.3, 0.35], rel=1e-6)
    assert fastclip.get_total_norm(torch.tensor([3.0, 4.0], device=leg.device)).item() == 5


NOTHING: dict[str, Callable[[], Any]] = {
    "empty list": list,
    "grads of None": lambda: [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))],
    "empty tuple": tuple,
    "tensor without grad": lambda: nn.Parameter(torch.zeros(2)),
}


@pytest.mark.parametrize("nothing", NOTHING)
def test_no_gradients(nothing: str) -> None:
    norm = fastclip.clip_grad_norm_(NOTHING[nothing](), 1.0)
    expected = torch.nn.utils.clip_grad_norm_(NOTHING[nothing](), 1.0)
    assert (norm.item(), norm.dtype, norm.device, norm.shape) == (0.0, expected.dtype, expected.device, expected.shape)
    fastclip.clip_grads_with_norm_(NOTHING[nothing](), 1.0, torch.tensor(3.0))


def test_total_norm_of_nothing() -> None:
    assert fastclip.get_total_norm([]).item() == 0.0
    assert fastclip.get_total_norm([], norm_dtype=torch.float64).dtype == torch.float64
    assert fastclip.clip_grad_norm_([], 1.0, norm_dtype=torch.float64).dtype == torch.float64


def test_value_clip_of_nothing_does_nothing() -> None:
    for nothing in NOTHING.values():
        fastclip.clip_grad_value_(nothing(), 1.0)
        with pytest.raises(RuntimeError):
            torch.nn.utils.clip_grad_value_(nothing(), 1.0)


def test_empty_generator_warns_at_the_callers_line() -> None:
    none: list[nn.Parameter] = []
    caught = {}
    for name, function in (("ours", fastclip.clip_grad_norm_), ("torch's", torch.nn.utils.clip_grad_norm_)):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert function((parameter for parameter in none), 1.0).item() == 0
        caught[name] = [(warning.category, str(warning.message), warning.filename) for warning in seen]
    assert caught["ours"] == caught["torch's"]
    assert caught["ours"][0][2] == __file__


CALLING: dict[str, Callable[[Any], object]] = {
    "clip_grad_norm_": lambda made: fastclip.clip_grad_norm_(made, 1.0),
    "clip_grad_value_": lambda made: fastclip.clip_grad_value_(made, 1.0),
    "clip_grads_with_norm_": lambda made: fastclip.clip_grads_with_norm_(made, 1.0, torch.tensor(3.0)),
    "clip_grads_": lambda made: fastclip.clip_grads_(made, fastclip.ClipByNorm(1.0)),
    "clip_by_value_": lambda made: fastclip.clip_by_value_(made, -1.0, 1.0),
    "clip_by_norm_": lambda made: fastclip.clip_by_norm_(made, 1.0),
    "clip_by_global_norm_": lambda made: fastclip.clip_by_global_norm_(made, 1.0),
    "clip_by_global_norm_ with a norm": lambda made: fastclip.clip_by_global_norm_(made, 1.0, 3.0),
    "measure_grads": fastclip.measure_grads,
    "clip_scaled_grad_norm_": lambda made: fastclip.clip_scaled_grad_norm_(made, 1.0, 0.5, torch.zeros(1)),
}

USED_UP: dict[str, Callable[[list[nn.Parameter]], Iterator[nn.Parameter]]] = {
    "generator": lambda made: (parameter for parameter in made),
    "iterator": lambda made: filter(lambda parameter: parameter.requires_grad, made),
}


@pytest.mark.parametrize("kind", USED_UP)
@pytest.mark.parametrize("call", CALLING)
def test_whatever_is_called_with_what_is_used_up_says_so(call: str, kind: str) -> None:
    used_up = USED_UP[kind]([nn.Parameter(torch.zeros(2))])
    assert len(list(used_up)) == 1
    message = f"`parameters` is an empty {kind}, no gradient clipping will occur"
    with pytest.warns(UserWarning, match=message) as caught:
        CALLING[call](used_up)
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("kind", USED_UP)
def test_the_norm_of_what_is_used_up_says_so(kind: str) -> None:
    with pytest.warns(UserWarning, match=f"`tensors` is an empty {kind}, whose norm is 0"):
        assert fastclip.get_total_norm(USED_UP[kind]([])).item() == 0


@pytest.mark.parametrize("call", CALLING)
def test_a_parameter_group_that_is_used_up_says_so(leg: Leg, call: str) -> None:
    groups = [{"params": [one([3.0], leg)]}, {"params": iter(())}]
    with pytest.warns(UserWarning, match=r"`parameters\[1\]\['params'\]` is an empty iterator") as caught:
        CALLING[call](groups)
    assert [warning.filename for warning in caught] == [__file__]


def test_warming_up_for_what_is_used_up_says_so() -> None:
    with pytest.warns(UserWarning, match="`parameters` is an empty iterator, nothing will be compiled"):
        fastclip.warm_up(iter(()))


def test_the_deprecated_name_warns_at_the_callers_line_too() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with fastclip.patched():
            torch.nn.utils.clip_grad_norm(USED_UP["generator"]([]), 1.0)
    assert [warning.filename for warning in caught if "empty generator" in str(warning.message)] == [__file__]


NO_PARAMETERS: dict[str, Callable[[], Any]] = {
    "gradients": lambda: [torch.ones(2), torch.ones(3)],
    "a gradient": lambda: torch.ones(2),
    "frozen parameters": lambda: nn.Linear(2, 2).requires_grad_(False),
    "gradients to be differentiated": lambda: [torch.ones(2, requires_grad=True) * 2],
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("made", NO_PARAMETERS)
@pytest.mark.parametrize("call", CALLING)
def test_whatever_is_called_with_what_can_have_no_gradients_says_so(call: str, made: str) -> None:
    message = "tensors in `parameters` has a gradient or requires one"
    with pytest.warns(UserWarning, match=message) as caught:
        CALLING[call](NO_PARAMETERS[made]())
    assert [warning.filename for warning in caught if message in str(warning.message)] == [__file__]


@pytest.mark.parametrize("call", CALLING)
def test_some_that_are_frozen_and_some_without_gradients_are_nothing_to_warn_of(leg: Leg, call: str) -> None:
    CALLING[call]([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2), requires_grad=False)])
    frozen = one([3.0, 4.0], leg).requires_grad_(False)  # its gradient is assigned by hand
    CALLING[call]([frozen])


@pytest.mark.parametrize("call", CALLING)
def test_holders_of_gradients_need_not_be_tensors(leg: Leg, call: str) -> None:
    values = [[3.0, 4.0], [12.0]]
    grads = (torch.tensor(values[0], device=leg.device), None, torch.tensor(values[1]))
    holders = [GradHolder(grad) for grad in grads]
    assert holders[2].grad is not None
    holders[2].grad = holders[2].grad.to(leg.device)
    made = [one(values[0], leg), nn.Parameter(torch.zeros(5, device=leg.device)), one(values[1], leg)]
    CALLING[call](holders)
    CALLING[call](made)
    for holder, parameter in zip(holders, made, strict=True):
        if parameter.grad is not None:
            oracle.assert_same_bits(grad_of(holder), parameter.grad)  # type: ignore[arg-type]  # it is no tensor
    CALLING[call]([GradHolder(None)])


def test_a_nan_in_a_holder_that_is_no_tensor_is_named(leg: Leg) -> None:
    holders: Any = [GradHolder(None), GradHolder(torch.tensor([[1.0, NAN]], device=leg.device))]
    with pytest.raises(RuntimeError, match=r"parameters\[1\] of shape \(1, 2\) \(1 NaN, 0 inf\)"):
        fastclip.clip_grad_norm_(holders, 1.0, error_if_nonfinite=True)


def test_generator_of_parameters_without_gradients_does_not_warn() -> None:
    assert fastclip.clip_grad_norm_((nn.Parameter(torch.zeros(2)) for _ in range(2)), 1.0).item() == 0


DTYPE_LISTS = [
    [torch.bfloat16],
    [torch.float16],
    [torch.float32],
    [torch.float64],
    [torch.float16, torch.bfloat16],
    [torch.bfloat16, torch.float32],
    [torch.float16, torch.float32, torch.float64],
    [torch.complex64],
    [torch.complex128],
    [torch.float16, torch.complex64],
    [torch.float64, torch.complex64],
]


@pytest.mark.parametrize("dtypes", DTYPE_LISTS, ids=lambda dtypes: "+".join(str(dtype)[6:] for dtype in dtypes))
def test_result_is_a_scalar_of_torchs_dtype_on_the_gradients_device(leg: Leg, dtypes: list[torch.dtype]) -> None:
    made = [one([3.0, 4.0], leg, dtype) for dtype in dtypes]
    theirs = [one([3.0, 4.0], leg, dtype) for dtype in dtypes]
    norm, expected = fastclip.clip_grad_norm_(made, 1.0), torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    alone = fastclip.get_total_norm([grad_of(parameter) for parameter in theirs])
    assert (norm.dtype, norm.device, norm.shape) == (expected.dtype, expected.device, expected.shape)
    assert (alone.dtype, alone.device, alone.shape) == (expected.dtype, expected.device, expected.shape)
    assert norm.item() == pytest.approx(5 * math.sqrt(len(dtypes)), rel=2 * oracle.half_ulp(norm.dtype))
    assert not norm.requires_grad


@pytest.mark.parametrize("norm_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_dtype(leg: Leg, norm_dtype: torch.dtype) -> None:
    parameter = one([1000.0, 24.0], leg, torch.bfloat16)
    exact = oracle.norm([grad_of(parameter)], 2)
    total = fastclip.get_total_norm([grad_of(parameter)], norm_dtype=norm_dtype)
    norm = fastclip.clip_grad_norm_([parameter], 1.0, norm_dtype=norm_dtype)
    for result in (norm, total):
        assert result.dtype == norm_dtype
        oracle.assert_norm(result, exact, [torch.bfloat16], leg)


def test_norm_is_the_one_before_clipping_and_stays(leg: Leg) -> None:
    """The next call does not overwrite a result."""
    parameter = one([3.0, 4.0], leg)
    first = fastclip.clip_grad_norm_([parameter], 1.0)
    second = fastclip.clip_grad_norm_([parameter], 0.5)
    assert first.item() == 5
    assert second.item() == pytest.approx(1.0, rel=1e-6)


# ---- The coefficient, and the arguments that change it


@pytest.mark.parametrize("max_norm", [1.0, 5.0, 5 + 2e-6, 7, 0, -2.0, "1.0", True, INF, -INF, NAN])
def test_coefficient(leg: Leg, max_norm: Any) -> None:
    ours, theirs = one([3.0, -4.0, 0.0], leg), one([3.0, -4.0, 0.0], leg)
    norm = fastclip.clip_grad_norm_([ours], max_norm)
    torch.nn.utils.clip_grad_norm_([theirs], max_norm)
    assert norm.item() == 5
    assert values_of(ours) == pytest.approx(values_of(theirs), rel=2e-7, nan_ok=True)


def test_max_norm_may_be_a_tensor(leg: Leg) -> None:
    parameter = one([3.0, 4.0], leg)
    fastclip.clip_grad_norm_([parameter], torch.tensor(2.5))  # type: ignore[arg-type]
    assert values_of(parameter) == pytest.approx([1.5, 2.0], rel=1e-6)


def test_numbers_that_are_none() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    for bad, error in (("much", ValueError), (None, TypeError), ([1.0], TypeError)):
        with pytest.raises(error, match="max_norm"):
            fastclip.clip_grad_norm_([parameter], bad)  # type: ignore[arg-type]
        with pytest.raises(error, match="clip_value"):
            fastclip.clip_grad_value_([parameter], bad)  # type: ignore[arg-type]
        with pytest.raises(error):
            torch.nn.utils.clip_grad_norm_([parameter], bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fro", "nuc"])
def test_matrix_norms_are_refused(name: str) -> None:
    for clip in (fastclip.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        with pytest.raises(ValueError, match=name):
            clip([nn.Parameter(torch.zeros(1))], 1.0, name)  # type: ignore[arg-type]


UNDER_INF: dict[str, Callable[[list[nn.Parameter], Tensor], object]] = {
    "clip_grad_norm_": lambda made, _: fastclip.clip_grad_norm_(made, INF),
    "in one": lambda made, _: fastclip.clip_grad_norm_(made, INF, foreach=True),
    "max": lambda made, _: fastclip.clip_grad_norm_(made, INF, INF),
    "clip_grads_with_norm_": lambda made, norm: fastclip.clip_grads_with_norm_(made, INF, norm),
}


@pytest.mark.parametrize("values", [[3.0, -0.0, 4.0], [3.0, INF], [-INF, 0.0], [1.0, NAN]], ids=str)
@pytest.mark.parametrize("call", UNDER_INF)
def test_under_an_infinite_max_norm_nothing_is_written(leg: Leg, call: str, values: list[float]) -> None:
    """People pass it to log the norm. Where the norm is not finite, torch makes every value NaN: inf / inf."""
    made = [one(values, leg), one([1.0, 2.0], leg, torch.bfloat16), one([[0.0]], leg)]
    before = [(grad_of(parameter).clone(), grad_of(parameter)._version) for parameter in made]
    norm = torch.linalg.vector_norm(torch.tensor(values))
    UNDER_INF[call](made, norm)
    for parameter, (gradient, version) in zip(made, before, strict=True):
        oracle.assert_same_bits(grad_of(parameter), gradient)
        assert grad_of(parameter)._version == version
    torch.nn.utils.clip_grad_norm_(made[1:2], INF)
    if not math.isfinite(norm):
        torch.nn.utils.clip_grad_norm_(made, INF)
        assert all(math.isnan(value) for value in values_of(made[1]))


def test_under_an_infinite_max_norm_the_norm_is_returned(leg: Leg) -> None:
    assert fastclip.clip_grad_norm_([one([3.0, 4.0], leg)], INF).item() == 5
    assert fastclip.clip_grad_norm_([one([3.0, INF], leg)], INF).item() == INF
    assert fastclip.clip_grad_norm_([one([3.0, NAN], leg)], INF).isnan()
    with pytest.raises(RuntimeError, match="1 NaN"):
        fastclip.clip_grad_norm_([one([3.0, NAN], leg)], INF, error_if_nonfinite=True)
    expanded = parameters([torch.tensor([2.0], device=leg.device).expand(3, 3)])
    assert fastclip.clip_grad_norm_(expanded, INF).item() == 6  # reading it is possible


@pytest.mark.parametrize("special", [INF, -INF, NAN])
def test_nonfinite_gradients_act_as_in_torch(leg: Leg, special: float) -> None:
    """One infinity makes the coefficient 0: it becomes NaN itself, other values 0. One NaN makes all values NaN."""
    ours, theirs = ([one([1.0, special, 2.0], leg), one([3.0], leg)] for _ in range(2))
    norm, expected = fastclip.clip_grad_norm_(ours, 1.0), torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    assert norm.item() == pytest.approx(expected.item(), nan_ok=True)
    for our, their in zip(ours, theirs, strict=True):
        assert values_of(our) == pytest.approx(values_of(their), nan_ok=True)


# ---- error_if_nonfinite


CULPRITS: list[list[Any]] = [[NAN, 1.0, INF], [2.0, 3.0], [[INF, -INF], [NAN, NAN]]]


class Holder(nn.Module):
    """A module with these parameters."""

    def __init__(self, made: list[nn.Parameter]) -> None:
        super().__init__()
        for name, parameter in zip("abc", made, strict=True):
            self.register_parameter(name, parameter)


ADDRESSED: dict[str, tuple[Callable[[list[nn.Parameter]], Any], str]] = {
    "list": (list, "parameters[0] of shape (3,)"),
    "named": (lambda made: zip("abc", made, strict=True), "parameters[0] 'a' of shape (3,)"),
    "module": (lambda made: nn.ModuleList([Holder(made)]), "parameters[0] '0.a' of shape (3,)"),
}


@pytest.mark.parametrize("form", ADDRESSED)
def test_error_names_the_gradients_at_fault_and_changes_none(leg: Leg, form: str) -> None:
    made = [one(values, leg) for values in CULPRITS]
    before = [(grad_of(parameter).clone(), grad_of(parameter)._version) for parameter in made]
    container, name = ADDRESSED[form]
    with pytest.raises(
        RuntimeError, match=r"The total norm of order 2.0 for gradients from `parameters` is non-finite"
    ) as error:
        fastclip.clip_grad_norm_(container(made), 1.0, error_if_nonfinite=True)
    assert f"{name} (1 NaN, 1 inf)" in str(error.value)
    assert "of shape (2, 2) (2 NaN, 2 inf)" in str(error.value)
    assert "of shape (2,)" not in str(error.value)
    for parameter, (values, version) in zip(made, before, strict=True):
        oracle.assert_same_bits(grad_of(parameter), values)
        assert grad_of(parameter)._version == version
    with pytest.raises(
        RuntimeError, match=r"The total norm of order 2.0 for gradients from `parameters` is non-finite"
    ):
        torch.nn.utils.clip_grad_norm_(made, 1.0, error_if_nonfinite=True)


def test_error_counts_positions_among_all_parameters_and_lists_ten(leg: Leg) -> None:
    made = [nn.Parameter(torch.zeros(1, device=leg.device)), *(one([NAN], leg) for _ in range(13))]
    with pytest.raises(RuntimeError) as error:
        fastclip.clip_grad_norm_(made, 1.0, error_if_nonfinite=True)
    assert "parameters[1] of" in str(error.value)
    assert "parameters[10] of" in str(error.value)
    assert "parameters[11]" not in str(error.value)
    assert str(error.value).endswith("; and 3 more")


def test_error_of_the_total_norm_alone(leg: Leg) -> None:
    tensors = [torch.tensor([1.0], device=leg.device), torch.tensor([NAN], device=leg.device)]
    with pytest.raises(RuntimeError, match=r"tensors\[1\] of shape \(1,\) \(1 NaN, 0 inf\)"):
        fastclip.get_total_norm(tensors, error_if_nonfinite=True)
    assert fastclip.get_total_norm(tensors[:1], error_if_nonfinite=True).item() == 1


def test_error_where_all_are_finite_but_not_their_norm(leg: Leg) -> None:
    parameter = one([1e308, 1.7e308, 1.7e308], leg, torch.float64)
    with pytest.raises(RuntimeError, match="beyond fp64"):
        fastclip.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)


def test_error_is_not_raised_on_finite_gradients(leg: Leg) -> None:
    parameter = one([3.0, 4.0], leg)
    assert fastclip.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True).item() == 5
    assert values_of(parameter) == pytest.approx([0.6, 0.8], rel=1e-6)


# ---- Where torch is plainly worse


def test_finite_gradients_whose_squares_overflow_are_clipped(leg: Leg) -> None:
    ours, theirs = one([1e20, -2e20, 2e20], leg), one([1e20, -2e20, 2e20], leg)
    norm = fastclip.clip_grad_norm_([ours], 1.0)
    assert norm.item() == pytest.approx(3e20, rel=1e-6)
    assert values_of(ours) == pytest.approx([1 / 3, -2 / 3, 2 / 3], rel=1e-6)
    assert torch.nn.utils.clip_grad_norm_([theirs], 1.0).item() == INF
    assert values_of(theirs) == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_whose_norm_is_beyond_fp32_are_clipped(leg: Leg, dtype: torch.dtype) -> None:
    """The coefficient, about 2**-129, is below the normal numbers of fp32; the returned norm is infinite."""
    largest = torch.finfo(dtype).max
    parameter = one([largest] * 16, leg, dtype)
    norm = fastclip.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True, norm_dtype=torch.float64)
    assert norm.item() == pytest.approx(4 * largest, rel=1e-6)
    assert values_of(parameter) == pytest.approx([0.25] * 16, rel=2 * oracle.rounding(leg, dtype) + 1e-6)


def test_fp64_gradients_whose_squares_overflow_are_clipped(leg: Leg) -> None:
    parameter = one([3e300, -4e300], leg, torch.float64)
    assert fastclip.clip_grad_norm_([parameter], 1.0).item() == pytest.approx(5e300, rel=1e-12)
    assert values_of(parameter) == pytest.approx([0.6, -0.8], rel=1e-12)


def test_fp64_norm_keeps_its_precision(leg: Leg) -> None:
    parameter = one([1.0, 1e-5], leg, torch.float64)
    assert fastclip.clip_grad_norm_([parameter], 10.0).item() == pytest.approx(math.hypot(1.0, 1e-5), rel=1e-15)


def test_gradients_whose_squares_underflow_have_a_norm(leg: Leg) -> None:
    parameter = one([3e-30, 4e-30], leg)
    assert fastclip.clip_grad_norm_([parameter], 1.0).item() == pytest.approx(5e-30, rel=1e-6)


def test_coefficient_of_16_bit_gradients_is_not_rounded_to_16_bits(leg: Leg) -> None:
    """1/3 in bfloat16 is 0.2 % off; only the product is rounded, to within 2**-8 (half a unit in the last place)."""
    for dtype in (torch.bfloat16, torch.float16):
        ours = one([1.0] * 9, leg, dtype)
        coefficient = 0.7 / (3 + EPS)
        fastclip.clip_grad_norm_([ours], 0.7)
        exact = torch.tensor(coefficient, dtype=torch.float64).to(dtype)
        if not leg.truncates_bfloat16:
            assert values_of(ours) == [exact.item()] * 9
        assert values_of(ours) == pytest.approx([coefficient] * 9, rel=oracle.rounding(leg, dtype))


def test_fp16_norm_beyond_fp16(leg: Leg) -> None:
    """As in torch, the returned norm is infinite; but the true one decides about the error and the coefficient."""
    ours, theirs = one([60000.0, 60000.0], leg, torch.float16), one([60000.0, 60000.0], leg, torch.float16)
    norm = fastclip.clip_grad_norm_([ours], 1.0, error_if_nonfinite=True)
    assert (norm.item(), norm.dtype) == (INF, torch.float16)
    assert values_of(ours) == pytest.approx([math.sqrt(0.5)] * 2, rel=2 * 2.0**-11)
    with pytest.raises(RuntimeError, match="non-finite"):
        torch.nn.utils.clip_grad_norm_([theirs], 1.0, error_if_nonfinite=True)
    assert torch.nn.utils.clip_grad_norm_([theirs], 1.0).item() == INF
    assert values_of(theirs) == [0, 0]


@pytest.mark.parametrize("p", [2.0, INF, -INF, 1.0, 0.0])
def test_gradients_without_elements_count_nothing(leg: Leg, p: float) -> None:
    empty = parameters([torch.empty(0, 3, device=leg.device)])[0]
    with_values = one([3.0, -4.0], leg)
    both, without = (
        fastclip.clip_grad_norm_([empty, with_values], 100.0, p),
        fastclip.get_total_norm([grad_of(with_values)], p),
    )
    assert both.item() == without.item()
    assert fastclip.clip_grad_norm_([empty], 1.0, p).item() == 0
    fastclip.clip_grad_value_([empty, with_values], 1.0)
    assert values_of(with_values) == [1, -1]
    if math.isinf(p):
        with pytest.raises((RuntimeError, IndexError)):
            torch.nn.utils.clip_grad_norm_([empty], 1.0, p)


def test_order_zero_counts_tensors_that_hold_a_nonzero(leg: Leg) -> None:
    made = [one([0.0, 0.0], leg), one([1.0, 2.0, 0.0], leg), one([0.0, NAN], leg), one([-1.0], leg)]
    expected = torch.nn.utils.get_total_norm([grad_of(parameter) for parameter in made], 0.0)
    assert fastclip.clip_grad_norm_(made, 1.5, 0.0).item() == expected.item() == 3
    assert values_of(made[3]) == pytest.approx([-0.5], rel=1e-6)


# ---- Kinds of gradients


def test_the_same_parameter_twice_is_counted_and_scaled_twice(leg: Leg) -> None:
    ours, theirs = one([3.0, 4.0], leg), one([3.0, 4.0], leg)
    norm = fastclip.clip_grad_norm_([ours, ours], 1.0)
    expected = torch.nn.utils.clip_grad_norm_([theirs, theirs], 1.0)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    assert norm.item() == pytest.approx(math.sqrt(50), rel=1e-6)
    assert values_of(ours) == pytest.approx(values_of(theirs), rel=1e-6)
    assert values_of(ours) == pytest.approx([0.06, 0.08], rel=1e-5)


def test_overlapping_views(leg: Leg) -> None:
    """Views into one flat buffer, some of which overlap: the result is as if they were scaled one after another."""

    def views() -> tuple[Tensor, list[nn.Parameter]]:
        flat = torch.arange(1.0, 41.0, device=leg.device)
        return flat, parameters([flat[:10], flat[10:20], flat[15:30], flat[18:19], flat[30:40]])

    (ours, our_parameters), (theirs, their_parameters) = views(), views()
    norm = fastclip.clip_grad_norm_(our_parameters, 1.0)
    expected = torch.nn.utils.clip_grad_norm_(their_parameters, 1.0)
    assert norm.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_gradients_have_a_norm_but_no_value_clip(leg: Leg, dtype: torch.dtype) -> None:
    ours, theirs = one([3 + 4j, -12j], leg, dtype), one([3 + 4j, -12j], leg, dtype)
    norm = fastclip.clip_grad_norm_([ours], 1.0)
    assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_([theirs], 1.0).item(), rel=1e-6)
    assert norm.item() == pytest.approx(13, rel=1e-6)
    torch.testing.assert_close(grad_of(ours), grad_of(theirs))
    before = grad_of(ours).clone()
    for clip in (fastclip.clip_grad_value_, torch.nn.utils.clip_grad_value_):
        with pytest.raises(NotImplementedError):
            clip([ours], 0.1)
    oracle.assert_same_bits(torch.view_as_real(grad_of(ours)), torch.view_as_real(before))


def test_integer_gradients_are_refused(leg: Leg) -> None:
    """Torch raises, too: only floating-point tensors can be parameters that require grad."""
    tensors = [torch.tensor([1.0], device=leg.device), torch.tensor([3, 4], device=leg.device)]
    with pytest.raises(RuntimeError, match=r"tensors\[1\] of shape \(2,\) is of torch.int64"):
        fastclip.get_total_norm(tensors)
    with pytest.raises(RuntimeError):
        torch.nn.utils.get_total_norm(tensors)


def sparse(leg: Leg, *, coalesced: bool, hybrid: bool) -> Tensor:
    """Entries 1, 2 (in two parts unless coalesced) and -3; if `hybrid`, rows of an entry and its negative."""
    indices, values = ([[0, 3, 5]], [1.0, 2.0, -3.0]) if coalesced else ([[0, 3, 3, 5]], [1.0, 1.5, 0.5, -3.0])
    data = torch.tensor(values)
    if hybrid:
        data = torch.stack([data, -data], 1)
    shape = (7, 2) if hybrid else (7,)
    made = torch.sparse_coo_tensor(torch.tensor(indices), data, shape, device=leg.device, check_invariants=True)
    return made.coalesce() if coalesced else made


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("hybrid", [True, False])
def test_sparse_gradients_are_clipped_by_their_coalesced_values(leg: Leg, coalesced: bool, hybrid: bool) -> None:
    def make() -> list[nn.Parameter]:
        grad = sparse(leg, coalesced=coalesced, hybrid=hybrid)
        parameter = nn.Parameter(torch.zeros(grad.shape, device=leg.device))
        parameter.grad = grad
        return [parameter, one([4.0], leg)]

    with leg.unbounded():
        made = make()
        dense = grad_of(made[0]).to_dense()
        exact = oracle.norm([dense, grad_of(made[1])], 2)
        assert fastclip.get_total_norm([grad_of(parameter) for parameter in made]).item() == pytest.approx(
            exact, rel=1e-6
        )
        assert grad_of(made[0]).is_coalesced() == coalesced  # measuring changes nothing
        assert fastclip.clip_grad_norm_(made, 1.0).item() == pytest.approx(exact, rel=1e-6)
        assert grad_of(made[0]).layout == torch.sparse_coo
        torch.testing.assert_close(grad_of(made[0]).to_dense(), dense * (1 / exact), rtol=1e-5, atol=0)
        made = make()
        fastclip.clip_grad_value_(made, 1.25)
        torch.testing.assert_close(grad_of(made[0]).to_dense(), dense.clamp(-1.25, 1.25), rtol=0, atol=0)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.nn.utils.clip_grad_value_(make(), 1.0)


def test_sparse_gradient_of_an_embedding(leg: Leg) -> None:
    embedding = nn.Embedding(10, 3, sparse=True).to(leg.device)
    embedding(torch.tensor([1, 4, 1], device=leg.device)).sum().backward()
    with leg.unbounded():
        norm = fastclip.clip_grad_norm_(embedding.parameters(), 1.0)
        assert norm.item() == pytest.approx(math.sqrt(3 * 4 + 3), rel=1e-6)
        assert fastclip.get_total_norm([grad_of(embedding.weight)]).item() == pytest.approx(1.0, rel=1e-5)
    torch.optim.SGD(embedding.parameters(), lr=1.0).step()  # the optimizer can use the clipped gradient


def test_nonfinite_sparse_gradient_is_named(leg: Leg) -> None:
    parameter = nn.Parameter(torch.zeros(7, device=leg.device))
    parameter.grad = sparse(leg, coalesced=True, hybrid=False) * NAN
    message = r"parameters\[0\] of shape \(7,\) \(3 NaN, 0 inf\)"
    with leg.unbounded(), pytest.raises(RuntimeError, match=message):
        fastclip.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)


def test_expanded_gradient_is_refused_and_nothing_written(leg: Leg) -> None:
    first = one([3.0, 4.0], leg)
    expanded = parameters([torch.tensor([2.0], device=leg.device).expand(3, 4)])[0]
    before = [grad_of(parameter).clone() for parameter in (first, expanded)]
    calls: list[Callable[[], Any]] = [
        lambda: fastclip.clip_grad_norm_([first, expanded], 1.0),
        lambda: fastclip.clip_grad_value_([first, expanded], 1.0),
        lambda: fastclip.clip_grads_with_norm_([first, expanded], 1.0, torch.tensor(5.0)),
    ]
    for call in calls:
        with pytest.raises(
            RuntimeError, match="more than one element of the written-to tensor refers to a single memory"
        ):
            call()
        for parameter, values in zip((first, expanded), before, strict=True):
            oracle.assert_same_bits(grad_of(parameter), values)
    # Taking the norm writes nothing.
    assert fastclip.get_total_norm([grad_of(expanded)]).item() == pytest.approx(math.sqrt(12 * 4), rel=1e-6)
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor refers to a single memory"):
        torch.nn.utils.clip_grad_norm_([expanded], 1.0)


UNWRITABLE: dict[str, tuple[Callable[[], Tensor], str]] = {
    "without memory": (lambda: torch._efficientzerotensor((4,)), "ZeroTensors are immutable"),
    "sparse, of one value": (
        lambda: torch.sparse_coo_tensor(torch.tensor([[0, 1]]), torch.ones(1).expand(2), (3,), is_coalesced=True),
        "more than one element of the written-to tensor",
    ),
    "compressed rows": (lambda: torch.eye(4).to_sparse_csr(), "whose values torch cannot clamp"),
    "for mkldnn": (lambda: torch.ones(4).to_mkldnn(), "whose values torch cannot clamp"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")
@pytest.mark.parametrize("kind", UNWRITABLE)
@pytest.mark.parametrize("strides", [(4, 2), (2, 1)], ids=["with gaps", "without"])
def test_all_or_nothing_whatever_the_gradients_are(kind: str, strides: tuple[int, int]) -> None:
    """A gradient that cannot be written raises before another is written, also where torch's operations do the work."""
    make, message = UNWRITABLE[kind]
    calls: list[Callable[[list[Any]], Any]] = [lambda made: fastclip.clip_grad_value_(made, 0.5)]
    if kind in ("without memory", "sparse, of one value"):
        calls += [
            lambda made: fastclip.clip_grad_norm_(made, 0.5),
            lambda made: fastclip.clip_grads_with_norm_(made, 0.5, torch.tensor(5.0)),
            lambda made: fastclip.clip_by_norm_(made, 0.5),
        ]
    for call in calls:
        gradient = torch.arange(1.0, 17.0).as_strided((4, 2), strides)
        before = gradient.clone()
        with pytest.raises(RuntimeError, match=message) as error:
            call([GradHolder(gradient), GradHolder(make())])
        assert "parameters[1]" in str(error.value)
        oracle.assert_same_bits(gradient, before)


def test_meta_gradients(leg: Leg) -> None:
    parameter = nn.Parameter(torch.empty(3, 4, device="meta"))
    parameter.grad = torch.empty(3, 4, device="meta")
    norm = fastclip.clip_grad_norm_([parameter], 1.0)
    assert (norm.device.type, norm.shape, norm.dtype) == ("meta", (), torch.float32)
    fastclip.clip_grad_value_([parameter], 1.0)
    assert leg  # torch's operations take meta tensors, whatever backend is forced


@pytest.mark.parametrize("as_torch_does", [True, False])
def test_inference_tensors_are_refused_outside_of_inference_mode(leg: Leg, as_torch_does: bool) -> None:
    with torch.inference_mode():
        grad = torch.tensor([3.0, 4.0], device=leg.device)
        parameter = torch.zeros(2, device=leg.device)
        parameter.grad = grad
        assert fastclip.clip_grad_norm_([parameter], 2.5).item() == 5
    clip = torch.nn.utils.clip_grad_norm_ if as_torch_does else fastclip.clip_grad_norm_
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode is not allowed"):
        clip([parameter], 1.0)
    if not as_torch_does:  # torch writes first, and raises then
        assert values_of(parameter) == pytest.approx([1.5, 2.0], rel=1e-6)


class Named(Tensor):
    """A subclass that changes nothing."""


def test_tensor_subclasses(leg: Leg) -> None:
    parameter = nn.Parameter(torch.zeros(2, device=leg.device))
    parameter.grad = torch.tensor([3.0, 4.0], device=leg.device).as_subclass(Named)
    assert fastclip.clip_grad_norm_([parameter, one([12.0], leg)], 1.3).item() == pytest.approx(13.0)
    assert values_of(parameter) == pytest.approx([0.3, 0.4], rel=1e-6)


def test_gradients_that_require_grad(leg: Leg) -> None:
    parameter = nn.Parameter(torch.zeros(2, device=leg.device))
    parameter.grad = torch.tensor([3.0, 4.0], device=leg.device, requires_grad=True)
    assert fastclip.clip_grad_norm_([parameter], 2.5).item() == 5
    fastclip.clip_grad_value_([parameter], 1.75)
    assert grad_of(parameter).requires_grad
    assert values_of(parameter) == pytest.approx([1.5, 1.75], rel=1e-6)
    assert not fastclip.get_total_norm([grad_of(parameter)]).requires_grad


def test_a_list_of_all_kinds_clips_as_one_set(leg: Leg) -> None:
    def make() -> list[nn.Parameter]:
        device = leg.device
        embedded = nn.Parameter(torch.zeros(7, device=device))
        embedded.grad = sparse(leg, coalesced=False, hybrid=False)
        return [
            one([1.0, 2.0], leg, torch.bfloat16),
            embedded,
            one([3.0] * 5, leg),
            one([1 + 1j], leg, torch.complex64),
            *parameters(
                [torch.ones(4, 6, device=device)[:, ::2], torch.full((3,), 2.0, device=device).as_subclass(Named)]
            ),
            one([0.5], leg, torch.float64),
            *parameters([torch.empty(0, device=device), torch.arange(6.0, device=device).view(2, 3).t()]),
            one(-7.0, leg, torch.float16),
        ]

    made, before = make(), make()
    dense = [grad.to_dense() if grad.is_sparse else grad for grad in map(grad_of, before)]
    exact = oracle.norm(dense, 2)
    with leg.unbounded():
        norm = fastclip.clip_grad_norm_(made, 1.0)
        tensors_with_values = fastclip.clip_grad_norm_(make(), 1.0, 0)
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(exact, rel=1e-6)
    assert tensors_with_values.item() == 9  # all except the one without elements
    for parameter, original in zip(made, dense, strict=True):
        grad = grad_of(parameter).to_dense()
        tolerance = 1e-6 + (oracle.rounding(leg, grad.dtype) if not grad.is_complex() else 0)
        oracle.assert_close(grad, oracle.as_numpy(original) / exact, tolerance)


# ---- The value clip


@pytest.mark.parametrize("clip_value", [1.0, 0.0, -0.5, INF, "0.5", True])
def test_value_clip_is_torchs(leg: Leg, clip_value: Any) -> None:
    """NaN stays NaN, an infinity becomes the bound, and a negative bound replaces every value."""
    values = [0.5, -2.0, NAN, INF, -INF, 0.0]
    ours, theirs = one(values, leg), one(values, leg)
    fastclip.clip_grad_value_([ours], clip_value)
    torch.nn.utils.clip_grad_value_([theirs], clip_value)
    assert values_of(ours) == pytest.approx(values_of(theirs), rel=0, abs=0, nan_ok=True)


def test_bound_beyond_the_gradients_dtype(leg: Leg) -> None:
    first, second = one([3.0], leg), one([1.0], leg, torch.float16)
    with pytest.raises(RuntimeError, match=r"70000.0 cannot be converted to torch.float16 without overflow"):
        fastclip.clip_grad_value_([first, second], 70000.0)
    assert values_of(first) == [3.0]
    with pytest.raises(RuntimeError):
        torch.nn.utils.clip_grad_value_([second], 70000.0)
    fastclip.clip_grad_value_([first, second], 65504.0)


# ---- The two halves, called separately


def test_the_two_halves_called_apart(leg: Leg) -> None:
    whole, halves = one([3.0, 4.0, -12.0], leg), one([3.0, 4.0, -12.0], leg)
    norm = fastclip.clip_grad_norm_([whole], 1.0)
    total = fastclip.get_total_norm([grad_of(halves)])
    fastclip.clip_grads_with_norm_([halves], 1.0, total)
    oracle.assert_same_bits(total, norm)
    oracle.assert_same_bits(grad_of(halves), grad_of(whole))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_known_norm_may_be_of_any_dtype_and_shape_of_one_element(leg: Leg, dtype: torch.dtype) -> None:
    parameter = one([3.0, 4.0], leg)
    fastclip.clip_grads_with_norm_([parameter], 1.0, torch.tensor([[5.0]], dtype=dtype))
    assert values_of(parameter) == pytest.approx([0.6, 0.8], rel=1e-6)
    with pytest.raises(ValueError, match="one number"):
        fastclip.clip_grads_with_norm_([parameter], 1.0, torch.ones(2))


# ---- foreach


def test_foreach(leg: Leg) -> None:
    for foreach in (True, False, None):
        parameter = one([3.0, 4.0], leg)
        assert fastclip.clip_grad_norm_([parameter], 1.0, foreach=foreach).item() == 5
        fastclip.clip_grad_value_([parameter], 0.7, foreach=foreach)
        assert values_of(parameter) == pytest.approx([0.6, 0.7], rel=1e-6)


def test_foreach_raises_where_torch_has_none() -> None:
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    parameter.grad = torch.empty(3, device="meta")
    message = "foreach=True was passed, but can't use the foreach API on meta tensors"
    for clip in (fastclip.clip_grad_norm_, torch.nn.utils.clip_grad_norm_):
        with pytest.raises(RuntimeError, match=message):
            clip([parameter], 1.0, foreach=True)


# ---- What is not a tensor


@pytest.mark.parametrize(
    ("parameters_", "message"),
    [
        (3, "`parameters` must be a tensor, an iterable of tensors or a module, not int"),
        ([torch.zeros(1), {"params": []}], "a dict, not a tensor: pass parameter groups only, or their 'params'"),
        ({"weight": torch.zeros(1)}, "a str, not a tensor: pass the values of a dict"),
        ([torch.zeros(1), 2.0], r"parameters\[1\] is a float, not a tensor"),
    ],
    ids=["number", "parameter groups", "dict", "list"],
)
def test_not_tensors(parameters_: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        fastclip.clip_grad_norm_(parameters_, 1.0)
    with pytest.raises(TypeError, match=message):
        fastclip.clip_grad_value_(parameters_, 1.0)


def test_not_tensors_to_measure() -> None:
    with pytest.raises(TypeError, match=r"tensors\[0\] is a float"):
        fastclip.get_total_norm([1.0])  # type: ignore[arg-type]


# ---- Autograd


CALLS: dict[str, Callable[[list[nn.Parameter]], Any]] = {
    "norm, clipping": lambda made: fastclip.clip_grad_norm_(made, 0.1),
    "norm, not clipping": lambda made: fastclip.clip_grad_norm_(made, 1e9),
    "value, clipping": lambda made: fastclip.clip_grad_value_(made, 0.1),
    "value, not clipping": lambda made: fastclip.clip_grad_value_(made, 6e4),
    "known norm": lambda made: fastclip.clip_grads_with_norm_(made, 1e9, torch.tensor(1.0)),
}


@pytest.mark.parametrize("call", CALLS)
def test_backward_through_clipped_gradients_raises(leg: Leg, call: str) -> None:
    """If autograd did not know of the write, the second backward would be wrong without an error."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0], device=leg.device))
    (weight.grad,) = torch.autograd.grad((weight**3).sum(), weight, create_graph=True)
    loss = (grad_of(weight) ** 2).sum()  # keeps the gradient for its own backward
    CALLS[call]([weight])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, weight)


@pytest.mark.parametrize("call", CALLS)
def test_version_counters(leg: Leg, call: str) -> None:
    made = [
        one([3.0], leg),
        one([3.0], leg, torch.float16),
        one([1.0, 1.0], leg),
        *parameters([torch.empty(0, device=leg.device)]),
    ]
    before = [grad_of(parameter)._version for parameter in made]
    CALLS[call](made)
    assert all(grad_of(parameter)._version > version for parameter, version in zip(made, before, strict=True))


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        ({"dtype": torch.float64}, torch.float64),
        ({"norm_dtype": torch.float64}, torch.float64),
        ({"dtype": torch.float32, "norm_dtype": torch.float32}, torch.float32),
        ({}, torch.bfloat16),
    ],
    ids=str,
)
def test_the_norm_s_dtype_by_either_name(leg: Leg, ours: Any, expected: torch.dtype) -> None:
    """A future version of torch calls the argument `dtype`."""
    tensors = [torch.full((3,), 1.01, dtype=torch.bfloat16, device=leg.device)]
    norm = fastclip.get_total_norm(tensors, **ours)
    assert norm.dtype == expected
    torch.testing.assert_close(norm, torch.linalg.vector_norm(tensors[0].double()).to(expected))
    assert fastclip.get_total_norm([], **ours).dtype == (expected if ours else torch.float32)


def test_the_norm_s_dtype_by_two_names_that_differ() -> None:
    with pytest.raises(ValueError, match="one thing by two names"):
        fastclip.get_total_norm([torch.ones(1)], dtype=torch.float32, norm_dtype=torch.float64)
    with pytest.raises(TypeError, match="`dtype` must be a floating-point dtype"):
        fastclip.get_total_norm([torch.ones(1)], dtype=torch.int64)


def test_measuring_bumps_no_version(leg: Leg) -> None:
    tensors = [torch.tensor([3.0], device=leg.device), torch.tensor([[4.0, 0.0]], device=leg.device).expand(2, 2)]
    fastclip.get_total_norm(tensors)
    assert [tensor._version for tensor in tensors] == [0, 0]


def test_grad_mode_is_left_as_it_was(leg: Leg) -> None:
    fastclip.clip_grad_norm_([one([3.0], leg)], 1.0)
    assert torch.is_grad_enabled()


# ---- Devices, and distributed tensors


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A mesh of one process, this one."""
    distributed = pytest.importorskip("torch.distributed")
    store = distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh

    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.legs("numpy", "torch", "interpreter", "ptx")  # a mesh of the CPU
def test_distributed_tensors(leg: Leg, mesh: Any) -> None:
    """Callers check whether the norm is a DTensor, and call `full_tensor()`."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    def make() -> list[nn.Parameter]:
        made = []
        for values in ([[3.0, 0.0], [0.0, 4.0]], [[12.0]]):
            parameter = nn.Parameter(distribute_tensor(torch.zeros(len(values), len(values[0])), mesh, [Shard(0)]))
            parameter.grad = distribute_tensor(torch.tensor(values), mesh, [Shard(0)])
            made.append(parameter)
        return made

    made = make()
    grads = [grad_of(parameter) for parameter in made]
    total = fastclip.get_total_norm(grads)
    norm = fastclip.clip_grad_norm_(made, 1.3)
    for result in (total, norm):
        assert isinstance(result, DTensor)
        assert result.full_tensor().item() == pytest.approx(13.0)
    assert isinstance(grads[0], DTensor)
    torch.testing.assert_close(grads[0].full_tensor(), torch.tensor([[0.3, 0.0], [0.0, 0.4]]))
    made = make()
    fastclip.clip_grads_with_norm_(made, 6.5, total)
    fastclip.clip_grad_value_(made, 1.75)
    clipped = grad_of(made[0])
    assert isinstance(clipped, DTensor)
    torch.testing.assert_close(clipped.full_tensor(), torch.tensor([[1.5, 0.0], [0.0, 1.75]]))
    wide = fastclip.clip_grad_norm_(make(), 1.0, norm_dtype=torch.float64)
    assert isinstance(wide, DTensor)
    assert wide.dtype == torch.float64
    assert leg


@pytest.mark.legs("gpu")
def test_mixed_devices(leg: Leg, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTCLIP_BACKEND")  # each device has its own backend
    for first, second in ((leg.device, torch.device("cpu")), (torch.device("cpu"), leg.device)):
        made = parameters([torch.tensor([3.0], device=first), torch.tensor([4.0], device=second)])
        norm = fastclip.clip_grad_norm_(made, 1.0)
        assert norm.device == grad_of(made[0]).device
        assert norm.item() == 5
        assert values_of(made[0]) + values_of(made[1]) == pytest.approx([0.6, 0.8], rel=1e-6)


def test_importing_fastclip_imports_neither_triton_nor_torch() -> None:
    code = "import sys, fastclip; assert not {'torch', 'triton', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_clipping_on_the_cpu_does_not_import_triton() -> None:
    code = (
        "import sys, torch, fastclip; p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2);"
        "fastclip.clip_grad_norm_([p], 1.0); fastclip.clip_grad_value_([p], 1.0); assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
