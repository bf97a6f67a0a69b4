"""`ClipByWeightNorm` (AGC): by parameter and by unit, on every backend, beside fp64 and the originals' results."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gradients import assert_untouched_around, embedded, grad_of, random_values, twin
from legs import Leg
from torch import Tensor, nn

import fastclip
from fastclip import ClipByWeightNorm

CASES: list[dict[str, Any]] = json.loads(gzip.decompress((Path(__file__).parent / "vectors/agc.json.gz").read_bytes()))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INF = math.inf

# One unit as a whole; units of 1 element to 700, off the 16-byte boundary; dimension 0 of size 1; more than two.
SHAPES = [(), (7,), (1, 9), (5, 1), (4, 1, 1), (3, 5), (16, 64), (2, 700), (1, 3, 4), (6, 3, 3, 3), (33, 2), (4, 1, 2)]


def has_units(shape: Sequence[int]) -> bool:
    return sum(size > 1 for size in shape) > 1


def expected(weight: Tensor, grad: Tensor, clipping: float, eps: float, *, by_unit: bool) -> oracle.Array:
    """The clipped gradient in fp64."""
    w, g = oracle.as_numpy(weight), oracle.as_numpy(grad)
    axes = tuple(range(1 if by_unit and has_units(g.shape) else 0, g.ndim))
    x, norm = (np.sqrt((np.abs(a) ** 2).sum(axes, keepdims=True)) for a in (g, w))
    threshold = clipping * np.maximum(norm, eps)
    clipped: oracle.Array = g * np.where(x > threshold, threshold / np.maximum(x, 1e-6), 1.0)
    return clipped


def parameters(
    rng: np.random.Generator, leg: Leg, dtype: torch.dtype, shapes: Sequence[Sequence[int]] = SHAPES
) -> list[nn.Parameter]:
    """Parameters with gradients, both surrounded by NaN, at any address. Some units of weights are 0 or small."""
    made = []
    for i, shape in enumerate(shapes):
        values = random_values(rng, shape, dtype) * 10.0 ** rng.integers(-3, 1)
        if values.dim():
            values[0] *= float(rng.integers(2))
        parameter = nn.Parameter(embedded(values, i % 9, device=leg.device))
        grad = random_values(rng, shape, dtype) * 10.0 ** rng.integers(-3, 1)
        parameter.grad = embedded(grad.to(dtype), (3 * i) % 8, device=leg.device)
        made.append(parameter)
    return made


def tolerance(leg: Leg, dtype: torch.dtype) -> float:
    """Two norms, a quotient and a product."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return 2 * oracle.NORM_TOLERANCE[dtype] + 3 * oracle.half_ulp(wide) + oracle.rounding(leg, dtype)


@pytest.mark.parametrize("by", ["parameter", "unit"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape_at_any_address(leg: Leg, by: Any, dtype: torch.dtype, rng: np.random.Generator) -> None:
    made = parameters(rng, leg, dtype)
    originals = [twin(grad_of(parameter)) for parameter in made]
    weights = [parameter.detach().clone() for parameter in made]
    result = fastclip.clip_grads_(made, ClipByWeightNorm(0.3, eps=1e-2, by=by))
    count = 0
    for parameter, weight, before in zip(made, weights, originals, strict=True):
        grad = grad_of(parameter)
        want = expected(weight, before, 0.3, 1e-2, by_unit=by == "unit")
        oracle.assert_close(grad, want, tolerance(leg, dtype), leg)
        assert_untouched_around(grad, before)
        oracle.assert_same_bits(parameter.detach(), weight)
        count += not np.array_equal(want, oracle.as_numpy(before))
    assert 0 < count < len(made)
    assert result.clipped.item() is True
    assert result.norm.item() == pytest.approx(oracle.norm(originals, 2.0), rel=oracle.NORM_TOLERANCE[dtype])
    assert result.norms is not None
    each = [oracle.norm([original], 2.0) for original in originals]
    assert result.norms.tolist() == pytest.approx(each, rel=oracle.NORM_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_units_below_the_limit_are_not_written(leg: Leg, dtype: torch.dtype, rng: np.random.Generator) -> None:
    made = parameters(rng, leg, dtype)
    made[7].detach()[0] = made[7].detach()[1]
    before = [grad_of(parameter).clone() for parameter in made]
    result = fastclip.clip_grads_(made, ClipByWeightNorm(1e9, by="unit"))
    assert result.clipped.item() is False
    for parameter, grad in zip(made, before, strict=True):
        oracle.assert_same_bits(grad_of(parameter), grad)
    grad_of(made[7])[1, 699] = 2.0**15  # one unit, the last of its tensor
    weight = torch.linalg.vector_norm(made[7].detach()[1].double()).item()
    result = fastclip.clip_grads_(made, ClipByWeightNorm(2.0**14 / max(weight, 1e-3), by="unit"))
    assert result.clipped.item() is True
    oracle.assert_same_bits(grad_of(made[7])[0], before[7][0])
    assert torch.linalg.vector_norm(grad_of(made[7])[1].double()).item() == pytest.approx(2.0**14, rel=2.0**-7)


def test_nonfinite_units_stay_among_themselves(leg: Leg) -> None:
    """NaN leaves a unit as it is; an infinity zeroes its unit and becomes NaN; so the originals in JAX."""
    weight = nn.Parameter(torch.ones(6, 5, device=leg.device))
    weight.detach()[4, 0], weight.detach()[5, 0] = math.nan, INF
    weight.grad = torch.full((6, 5), 3.0, device=leg.device)
    weight.grad[0, 2], weight.grad[1, 1], weight.grad[2, 3] = math.nan, INF, -INF
    fastclip.clip_grads_([weight], ClipByWeightNorm(0.1, by="unit"))
    got = weight.grad.tolist()
    assert got[0] == pytest.approx([3.0, 3.0, math.nan, 3.0, 3.0], nan_ok=True)
    assert got[1] == pytest.approx([0.0, math.nan, 0.0, 0.0, 0.0], nan_ok=True)
    assert got[2] == pytest.approx([0.0, 0.0, 0.0, math.nan, 0.0], nan_ok=True)
    assert got[3] == pytest.approx([0.1] * 5)
    assert got[4] == got[5] == [3.0] * 5  # nothing is above NaN or infinity


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_overflow_nor_underflow(leg: Leg, scale: float, rng: np.random.Generator) -> None:
    weight = nn.Parameter(random_values(rng, (4, 300), torch.float32).to(leg.device) * scale)
    weight.grad = random_values(rng, (4, 300), torch.float32).to(leg.device) * scale
    want = expected(weight, weight.grad, 0.5, 1e-36, by_unit=True)
    if scale < 1:  # below 1e-6 the denominator of the factor is 1e-6
        assert np.abs(want).max() < 1e-50
        want = want.astype(np.float32).astype(np.float64)
    fastclip.clip_grads_([weight], ClipByWeightNorm(0.5, eps=1e-36, by="unit"))
    oracle.assert_close(weight.grad, want, tolerance(leg, torch.float32))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "dimension 0 inside": lambda t: t.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.mark.parametrize("alone", [False, True], ids=["beside another", "alone"])
@pytest.mark.parametrize("of_weight", LAYOUTS)
@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.legs("native", "torch", "interpreter", "gpu")
def test_layouts(leg: Leg, of_grad: str, of_weight: str, alone: bool, rng: np.random.Generator) -> None:
    """Kernels take what has whole units in memory, beside what torch's operations take."""
    first, second = (nn.Parameter(random_values(rng, (6, 4, 3, 2), torch.float32).to(leg.device)) for _ in range(2))
    first.data = LAYOUTS[of_weight](first.data)
    first.grad = LAYOUTS[of_grad](random_values(rng, (6, 4, 3, 2), torch.float32).to(leg.device))
    second.grad = random_values(rng, (6, 4, 3, 2), torch.float32).to(leg.device)
    made = [first] if alone else [first, second]
    wanted = [expected(p, grad_of(p), 0.2, 1e-3, by_unit=True) for p in made]
    strides = first.grad.stride()
    fastclip.clip_grads_(made, ClipByWeightNorm(0.2, by="unit"))
    assert first.grad.stride() == strides
    for parameter, want in zip(made, wanted, strict=True):
        oracle.assert_close(grad_of(parameter), want, tolerance(leg, torch.float32))


def test_dtypes_in_any_order(leg: Leg, rng: np.random.Generator) -> None:
    dtypes = [torch.float64, torch.bfloat16, torch.float32, torch.float16, torch.float32, torch.float64, torch.bfloat16]
    made = [parameters(rng, leg, dtype, [(2 + i, 5)])[0] for i, dtype in enumerate(dtypes)]
    wanted = [expected(parameter, grad_of(parameter), 0.05, 1e-3, by_unit=True) for parameter in made]
    fastclip.clip_grads_(made, ClipByWeightNorm(0.05, by="unit"))
    for parameter, want in zip(made, wanted, strict=True):
        grad = grad_of(parameter)
        oracle.assert_close(grad, want, tolerance(leg, grad.dtype), leg)


class Special(nn.Parameter):
    """A class of its own, which torch's operations serve."""


@pytest.mark.parametrize("what", ["dtype", "class"])
def test_a_weight_of_another_kind_than_its_gradient(leg: Leg, what: str, rng: np.random.Generator) -> None:
    (weight,) = parameters(rng, leg, torch.float32, [(6, 5)])
    grad = grad_of(weight)
    if what == "dtype":
        weight.data = weight.data.bfloat16()
    else:
        weight = Special(weight.data)
        weight.grad = grad
    want = expected(weight, grad, 0.05, 1e-3, by_unit=True)
    fastclip.clip_grads_([weight], ClipByWeightNorm(0.05, by="unit"))
    oracle.assert_close(grad, want, tolerance(leg, torch.float32), leg)


@pytest.mark.parametrize("by", ["parameter", "unit"])
def test_the_denominator_is_at_least_a_millionth(leg: Leg, by: Any) -> None:
    weight = nn.Parameter(torch.zeros(3, 4, device=leg.device))
    weight.grad = torch.full((3, 4), 1e-8, device=leg.device)
    fastclip.clip_grads_([weight], ClipByWeightNorm(1.0, eps=1e-9, by=by))
    torch.testing.assert_close(weight.grad, torch.full_like(weight.grad, 1e-11), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("by", ["parameter", "unit"])
def test_gradients_are_marked_as_changed(leg: Leg, by: Any) -> None:
    weight = nn.Parameter(torch.ones(3, 4, device=leg.device))
    weight.grad = torch.ones(3, 4, device=leg.device)
    version = weight.grad._version
    fastclip.clip_grads_([weight], ClipByWeightNorm(by=by))
    assert weight.grad._version > version


def test_complex_units(leg: Leg, rng: np.random.Generator) -> None:
    weight = nn.Parameter(random_values(rng, (3, 4), torch.complex64).to(leg.device))
    weight.grad = random_values(rng, (3, 4), torch.complex64).to(leg.device).conj()
    want = expected(weight, weight.grad, 0.2, 1e-3, by_unit=True)
    fastclip.clip_grads_([weight], ClipByWeightNorm(0.2, by="unit"))
    oracle.assert_close(weight.grad, want, tolerance(leg, torch.float32))


def test_bounds_of_their_own_and_parameters_without_gradient(leg: Leg, rng: np.random.Generator) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 5)).to(leg.device)
    bounds = {name: 0.1 * 2**i for i, (name, _) in enumerate(net.named_parameters())}
    for name, parameter in net.named_parameters():
        if name != "0.weight":
            parameter.grad = random_values(rng, parameter.shape, torch.float32).to(leg.device)
    rule = ClipByWeightNorm(bounds, by="unit")
    wanted = {
        name: expected(parameter, parameter.grad, bounds[name], 1e-3, by_unit=True)
        for name, parameter in net.named_parameters()
        if parameter.grad is not None
    }
    fastclip.clip_grads_(net, rule)
    for name, want in wanted.items():
        oracle.assert_close(grad_of(net.get_parameter(name)), want, tolerance(leg, torch.float32))
    assert net.get_parameter("0.weight").grad is None
    del bounds["2.bias"]
    with pytest.raises(ValueError, match=r"2\.bias"):
        fastclip.clip_grads_(net, ClipByWeightNorm(bounds, by="unit"))


def test_gradients_that_move_and_units_that_change(leg: Leg, rng: np.random.Generator) -> None:
    """What is kept from call to call belongs to one set of sizes, units and addresses."""
    for shape in ((6, 8), (6, 8), (8, 6), (3, 16), (6, 8), (48, 1), (2, 4, 6)):
        weight = nn.Parameter(random_values(rng, shape, torch.float32).to(leg.device))
        weight.grad = random_values(rng, shape, torch.float32).to(leg.device)
        want = expected(weight, weight.grad, 0.1, 1e-3, by_unit=True)
        fastclip.clip_grads_([weight], ClipByWeightNorm(0.1, by="unit"))
        oracle.assert_close(weight.grad, want, tolerance(leg, torch.float32))


def test_whether_a_unit_was_clipped_is_told_of_the_last_call(leg: Leg) -> None:
    """For the same sizes in other units, too."""
    rule = ClipByWeightNorm(0.5, by="unit")
    for shape, value in (((2, 12), 0.1), ((4, 6), 1.0), ((2, 12), 0.1), ((6, 4), 1.0), ((2, 12), 0.1)):
        weight = nn.Parameter(torch.ones(shape, device=leg.device))
        weight.grad = torch.full(shape, value, device=leg.device)
        assert fastclip.clip_grads_([weight], rule).clipped.item() is (value == 1.0)


def test_long_units(leg: Leg, rng: np.random.Generator) -> None:
    """A unit of several chunks, and a tensor of one row only, which is one unit."""
    elements = 40_000 if leg.environment is None else 33_000
    shapes = [(2, elements), (1, 50, 60)]
    made = [nn.Parameter(random_values(rng, shape, torch.float32).to(leg.device)) for shape in shapes]
    for weight in made:
        weight.grad = random_values(rng, weight.shape, torch.float32).to(leg.device)
    wanted = [expected(weight, grad_of(weight), 0.1, 1e-3, by_unit=True) for weight in made]
    fastclip.clip_grads_(made, ClipByWeightNorm(0.1, by="unit"))
    for weight, want in zip(made, wanted, strict=True):
        oracle.assert_close(grad_of(weight), want, tolerance(leg, torch.float32))


def test_the_temporaries_of_torch_are_bounded(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    from fastclip.backends import units

    seen = []
    inner = units._clip_rows_

    def counted(grad: Tensor, *others: Any) -> Tensor:
        seen.append(grad.numel())
        return inner(grad, *others)

    monkeypatch.setattr(units, "_clip_rows_", counted)
    monkeypatch.setattr(units, "PIECE", 100)
    monkeypatch.setenv("FASTCLIP_BACKEND", "torch")
    weight = nn.Parameter(random_values(rng, (50, 30), torch.float32))
    weight.grad = random_values(rng, (50, 30), torch.float32)
    want = expected(weight, weight.grad, 0.1, 1e-3, by_unit=True)
    fastclip.clip_grads_([weight], ClipByWeightNorm(0.1, by="unit"))
    np.testing.assert_allclose(oracle.as_numpy(weight.grad), want, rtol=2.0**-22)
    assert sum(seen) == 1500
    assert max(seen) <= 100


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["case"]))
@pytest.mark.legs("native", "numpy", "torch")
def test_the_originals_results(leg: Leg, case: dict[str, Any]) -> None:
    """DeepMind's by unit, DreamerV3's by parameter: in fp64, the coefficients to 1e-12."""
    weight = torch.tensor(case["weights"], dtype=torch.float64, device=leg.device)
    for i, values in enumerate(case["gradients"]):
        grad = torch.tensor([float(v) for v in np.ravel(values)], dtype=torch.float64).reshape(weight.shape)
        rules = {"deepmind": ClipByWeightNorm(case["clipping"], case["eps"], by="unit")}
        if not grad.isnan().any():  # DreamerV3 spreads it over the tensor
            rules["dreamerv3_per_tensor"] = ClipByWeightNorm(case["dreamerv3_clip"], case["eps"])
        for original, rule in rules.items():
            parameter = nn.Parameter(weight.clone())
            parameter.grad = grad.to(leg.device, copy=True)
            fastclip.clip_grads_([parameter], rule)
            of_rows = np.reshape([float(v) for v in case["coefficients"][original][i]], (-1, *[1] * (grad.dim() - 1)))
            with np.errstate(invalid="ignore"):  # inf * 0
                np.testing.assert_allclose(oracle.as_numpy(parameter.grad), grad.numpy() * of_rows, rtol=1e-12)


def test_thresholds_are_those_of_the_weights(leg: Leg) -> None:
    first, second = (nn.Parameter(torch.full((2, 2), value, device=leg.device)) for value in (1.0, 0.0))
    first.grad, second.grad = torch.full((2, 2), 2.0, device=leg.device), torch.full((2, 2), 0.01, device=leg.device)
    result = fastclip.clip_grads_([first, second], ClipByWeightNorm(0.5, eps=0.1))
    assert result.thresholds is not None
    assert result.coefficients is not None
    assert result.thresholds.tolist() == pytest.approx([1.0, 0.05])
    assert result.coefficients.tolist() == pytest.approx([0.25, 1.0])
    result = fastclip.clip_grads_([first, second], ClipByWeightNorm(0.25, by="global"))
    assert result.thresholds is not None
    assert result.thresholds.tolist() == pytest.approx([0.5])


def test_rules_that_do_not_go_by_unit_say_so(leg: Leg) -> None:
    weight = nn.Parameter(torch.ones(2, 2, device=leg.device))
    weight.grad = torch.ones(2, 2, device=leg.device)
    by: Any = "unit"
    for rule in (fastclip.ClipByNorm(0.1, by), fastclip.ClipByEMA(by=by), fastclip.ClipByValue(-0.1, 0.1, by)):
        with pytest.raises(TypeError, match="'unit'"):
            fastclip.clip_grads_([weight], rule)
    assert weight.grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"clipping": 0.0}, ValueError, "clipping"),
        ({"clipping": math.nan}, ValueError, "clipping"),
        ({"clipping": "a"}, TypeError, "clipping"),
        ({"eps": 0.0}, ValueError, "eps"),
        ({"eps": None}, TypeError, "eps"),
        ({"eps": "a"}, TypeError, "`eps` must be a real number, not 'a'"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        ClipByWeightNorm(**settings)


def test_what_has_no_units_is_named_before_anything_changes(leg: Leg) -> None:
    table = nn.Embedding(5, 3, sparse=True).to(leg.device)
    layer = nn.Linear(3, 3).to(leg.device)
    layer(table(torch.tensor([1, 2, 1], device=leg.device))).sum().backward()
    before = [grad_of(parameter).clone() for parameter in layer.parameters()]
    with pytest.raises(NotImplementedError, match=r"\[2\].*sparse_coo.*by='parameter'"):
        fastclip.clip_grads_([*layer.parameters(), table.weight], ClipByWeightNorm(1e-4, by="unit"))
    for parameter, grad in zip(layer.parameters(), before, strict=True):
        oracle.assert_same_bits(grad_of(parameter), grad)


def test_owners_that_are_no_tensors_have_no_weights(leg: Leg) -> None:
    class Holder:
        grad = torch.ones(2, device=leg.device)

    holders: Any = [Holder()]
    with pytest.raises(TypeError, match=r"parameters\[0\] is a Holder"):
        fastclip.clip_grads_(holders, ClipByWeightNorm())
    assert Holder.grad.tolist() == [1.0, 1.0]


def test_gradients_with_a_loss_scale(leg: Leg, rng: np.random.Generator) -> None:
    """A fused optimizer gets them scaled, and divides them itself; the bound is that of the gradients without scale."""
    seen = []
    values = [random_values(rng, shape, torch.float32).to(leg.device) for shape in ((4, 6), (4, 6), (5,), (5,))]
    for scale in (None, 1024.0):
        weights = [nn.Parameter(values[0].clone()), nn.Parameter(values[2].clone())]
        for weight, grad in zip(weights, (values[1], values[3]), strict=True):
            weight.grad = grad * (scale or 1.0)
        optimizer: Any = torch.optim.SGD(weights, lr=0.5, fused=True)
        fastclip.attach(optimizer, ClipByWeightNorm(0.3, by="unit"))
        if scale:
            optimizer.grad_scale = torch.tensor(scale, device=leg.device)
            optimizer.found_inf = torch.tensor(0.0, device=leg.device)
        optimizer.step()
        seen.append([weight.detach() for weight in weights])
    for scaled, plain, before in zip(seen[1], seen[0], (values[0], values[2]), strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)
        assert not torch.equal(plain, before)


def test_steps_inside_of_backward(leg: Leg) -> None:
    """The other gradients are not there yet, and need not be."""
    layer = nn.Linear(4, 3).to(leg.device)
    clippers = []
    for parameter in layer.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.0)
        clippers.append(fastclip.attach(optimizer, ClipByWeightNorm(1e-3, by="unit")))

        def step(_: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()

        parameter.register_post_accumulate_grad_hook(step)  # type: ignore[no-untyped-call]
    layer(torch.ones(2, 4, device=leg.device)).square().sum().backward()
    for parameter in layer.parameters():
        rows = grad_of(parameter).reshape(len(parameter) if parameter.dim() > 1 else 1, -1)
        weights = parameter.detach().reshape(rows.shape)
        ratios = torch.linalg.vector_norm(rows, dim=1) / torch.linalg.vector_norm(weights, dim=1)
        torch.testing.assert_close(ratios, torch.full_like(ratios, 1e-3), rtol=1e-4, atol=0.0)
    assert all(clipper.clipped is not None and clipper.clipped.item() for clipper in clippers)
