"""Clipping out of place: its values, its derivatives, and its arguments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import oracle
import pytest
import torch
from gradients import parameters
from torch import Tensor, nn

import fastclip

NAN, INF = math.nan, math.inf


def drawn(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 4), (5,), (), (2, 1, 2))]


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str
)
@pytest.mark.parametrize("clip_norm", [0.5, 1e3])
def test_values_are_those_of_the_clip_in_place(clip_norm: float, dtype: torch.dtype) -> None:
    grads = drawn(dtype=dtype)
    before = [grad.clone() for grad in grads]
    made = parameters([grad.clone() for grad in grads])
    expected = fastclip.clip_by_global_norm_(made, clip_norm)
    clipped, norm = fastclip.clip_by_global_norm(grads, clip_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    assert norm.dtype == torch.float64
    for own, parameter, grad, old in zip(clipped, made, grads, before, strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own, parameter.grad)
        oracle.assert_same_bits(
            torch.view_as_real(grad) if dtype.is_complex else grad, torch.view_as_real(old) if dtype.is_complex else old
        )


def test_it_keeps_the_form() -> None:
    first, second = torch.tensor([3.0]), torch.tensor([[4.0]])
    of_list, norm = fastclip.clip_by_global_norm([first, None, second], 2.5)
    assert isinstance(of_list, list)
    assert [None if grad is None else grad.tolist() for grad in of_list] == [[1.5], None, [[2.0]]]
    assert norm.item() == 5
    of_tuple, _ = fastclip.clip_by_global_norm((first, None, second), 2.5)
    assert isinstance(of_tuple, tuple)
    of_dict, _ = fastclip.clip_by_global_norm({"a": first, "b": None, "c": second}, 2.5)
    assert {name: None if grad is None else grad.tolist() for name, grad in of_dict.items()} == {
        "a": [1.5],
        "b": None,
        "c": [[2.0]],
    }
    of_one, _ = fastclip.clip_by_global_norm(first, 1.5)
    assert of_one.tolist() == [1.5]
    nothing, norm = fastclip.clip_by_global_norm([None], 1.0)
    assert (nothing, norm.item()) == ([None], 0.0)


@pytest.mark.parametrize("clip_norm", [0.5, 1e3])
def test_derivatives(clip_norm: float) -> None:
    grads = [grad.double().requires_grad_() for grad in drawn()]
    bound = torch.tensor(clip_norm, dtype=torch.float64, requires_grad=True)

    def clip(bound: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        clipped, norm = fastclip.clip_by_global_norm(grads, bound)
        return (*clipped, norm)

    assert torch.autograd.gradcheck(clip, (bound, *grads))
    assert torch.autograd.gradgradcheck(clip, (bound, *grads))


@pytest.mark.parametrize("all_zero", [False, True])
def test_gradients_of_zeros_have_derivatives(all_zero: bool) -> None:
    """Gradients of zeros are common: a loss may not use a parameter."""
    grads = [torch.zeros(3, requires_grad=True), torch.full((2,), 0.0 if all_zero else 5.0, requires_grad=True)]
    clipped, norm = fastclip.clip_by_global_norm(grads, 1.0)
    loss = sum((own * (i + 1)).sum() for i, own in enumerate(clipped)) + norm
    first = torch.autograd.grad(loss, grads, create_graph=True)
    squares = torch.stack([own.square().sum() for own in first]).sum()
    second = torch.autograd.grad(squares, grads, allow_unused=True)
    assert all(own.isfinite().all() for own in (*first, *[own for own in second if own is not None]))


@pytest.mark.parametrize("value", [NAN, INF])
def test_all_is_nan_where_the_norm_is_not_finite(value: float) -> None:
    clipped, norm = fastclip.clip_by_global_norm([torch.tensor([value]), torch.ones(2)], 1.0)
    assert not norm.isfinite()
    assert all(own.isnan().all() for own in clipped)


def test_a_norm_that_is_known() -> None:
    clipped, norm = fastclip.clip_by_global_norm([torch.tensor([4.0])], 1.0, use_norm=torch.tensor([2.0]))
    assert (clipped[0].item(), norm.item()) == (2.0, 2.0)


def test_an_inner_step_that_is_clipped_is_learned_through() -> None:
    """The derivative of the loss after an inner step: autograd against finite differences."""
    weight = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64, requires_grad=True)
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.3]], dtype=torch.float64)

    def outer(weight: Tensor) -> Tensor:
        loss = (x @ weight).pow(4).sum()
        grads, norm = fastclip.clip_by_global_norm(torch.autograd.grad(loss, [weight], create_graph=True), 1.0)
        assert norm > 1
        return (x @ (weight - 0.1 * grads[0])).square().sum()

    assert torch.autograd.gradcheck(outer, (weight,))


def test_inside_of_function_transforms() -> None:
    model = nn.Linear(3, 1)
    weights = dict(model.named_parameters())
    batches = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(1))

    def clipped(weights: Mapping[str, Tensor], x: Tensor) -> Any:
        grads = torch.func.grad(lambda weights: torch.func.functional_call(model, weights, (x,)).square().sum())(
            weights
        )
        return fastclip.clip_by_global_norm(grads, 0.1)[0]

    each = torch.func.vmap(clipped, in_dims=(None, 0))(weights, batches)
    for i, x in enumerate(batches):
        for name, own in clipped(weights, x).items():
            torch.testing.assert_close(each[name][i], own)
    squares = torch.stack([own.flatten(1).square().sum(1) for own in each.values()]).sum(0)
    torch.testing.assert_close(squares.sqrt(), torch.full((4,), 0.1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_whole() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    grads = drawn()
    compiled = torch.compile(lambda grads: fastclip.clip_by_global_norm(grads, 0.5), backend="eager", fullgraph=True)
    for own, expected in zip(compiled(grads)[0], fastclip.clip_by_global_norm(grads, 0.5)[0], strict=True):
        oracle.assert_same_bits(own, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_complex_gradients_compiled_whole() -> None:
    import torch._dynamo

    torch._dynamo.reset()
    compiled = torch.compile(fastclip.clip_by_global_norm, backend="eager", fullgraph=True)
    (own,), norm = compiled([torch.tensor([3.0 + 4.0j])], 2.5)
    assert (own.item(), norm.item()) == (1.5 + 2.0j, 5.0)


def test_what_is_used_up_says_so() -> None:
    none: list[Tensor] = []
    used_up: Any = (grad for grad in none)
    with pytest.warns(UserWarning, match="`grads` is an empty generator") as caught:
        fastclip.clip_by_global_norm(used_up, 1.0)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("grads", "clip_norm", "error", "message"),
    [
        ([torch.ones(1), 2.0], 1.0, TypeError, r"grads\[1\] is a float, not a gradient"),
        (nn.Linear(1, 1).parameters(), 1.0, TypeError, r"grads\[0\] is a Parameter, not a gradient"),
        ([torch.ones(1, dtype=torch.int64)], 1.0, TypeError, r"grads\[0\] is of torch.int64"),
        ([torch.eye(2).to_sparse()], 1.0, TypeError, r"grads\[0\] is laid out as torch.sparse_coo"),
        ([torch.ones(1)], 0.0, ValueError, "`clip_norm` must be above 0"),
        ([torch.ones(1)], "1", TypeError, "`clip_norm` must be a real number"),
        ([torch.ones(1)], torch.ones(2), ValueError, "`clip_norm` must be one number"),
    ],
)
def test_bad_input(grads: Any, clip_norm: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fastclip.clip_by_global_norm(grads, clip_norm)


def test_a_known_norm_that_is_no_number() -> None:
    with pytest.raises(TypeError, match="`use_norm` must be a real number"):
        fastclip.clip_by_global_norm([torch.ones(1)], 1.0, use_norm="1")  # type: ignore[arg-type]
