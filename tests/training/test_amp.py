"""Unscaling and clipping in one call: the same as `unscale_` and `clip_grad_norm_`, for scaler and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gradients import embedded, parameters, random_values, twin
from legs import CPU, Leg
from small_model import OPTIMIZERS, Syncs, Training
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler, OptState
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.optim import Optimizer

import fastclip

SCALE = 2.0**12
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def scaler_for(leg: Leg | None = None, scale: float = SCALE) -> GradScaler:
    """A scaler that has scaled something, as `unscale_` requires."""
    device = leg.device if leg else CPU
    scaler = GradScaler(device.type, init_scale=scale)
    scaler.scale(torch.zeros((), device=device))
    return scaler


def optimizer_of(grads: Sequence[Tensor]) -> Optimizer:
    return torch.optim.SGD(parameters(grads), lr=0.1)


def grads_of(optimizer: Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def state_of(scaler: GradScaler, optimizer: Optimizer) -> tuple[OptState, dict[torch.device, float]]:
    """The scaler's state for an optimizer."""
    state = scaler._per_optimizer_states[id(optimizer)]
    assert state.keys() == {"stage", "found_inf_per_device"}
    found = state["found_inf_per_device"]
    for device, flag in found.items():
        assert (flag.device, flag.dtype, flag.dim()) == (device, torch.float32, 0)
    return state["stage"], {device: flag.item() for device, flag in found.items()}


def drawn(rng: np.random.Generator, leg: Leg, sizes: Sequence[int] = (5000, 1, 300)) -> list[Tensor]:
    """Scaled gradients of every dtype that a scaler takes, at odd addresses, surrounded by NaN."""
    return [
        embedded(random_values(rng, (size,), dtype) * SCALE, offset, device=leg.device)
        for dtype in DTYPES
        for offset, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("max_norm", [0.5, 1e6], ids=["clips", "does not clip"])
@pytest.mark.parametrize("p", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("one_plan", [True, False], ids=["plain", "with a strided one"])
def test_same_as_unscale_and_clip(
    leg: Leg, rng: np.random.Generator, one_plan: bool, p: float, max_norm: float
) -> None:
    strided = embedded(random_values(rng, (50,), torch.float32) * SCALE, strides=(3,), device=leg.device)
    scaled = drawn(rng, leg) if one_plan else [*drawn(rng, leg), strided]
    ours, theirs = (optimizer_of([twin(grad) for grad in scaled]) for _ in range(2))
    scaler, stock = scaler_for(leg), scaler_for(leg)
    norm = fastclip.unscale_and_clip_grad_norm_(scaler, ours, max_norm, p)
    stock.unscale_(theirs)
    exact = oracle.norm(grads_of(theirs), p)  # unscaling by a power of two is exact
    oracle.assert_norm(norm, exact, DTYPES, leg)
    assert norm.dtype == torch.float64
    assert state_of(scaler, ours) == state_of(stock, theirs) == (OptState.UNSCALED, {grads_of(ours)[0].device: 0.0})
    coefficient = oracle.coefficient(exact, max_norm)
    for own, unscaled in zip(grads_of(ours), grads_of(theirs), strict=True):
        if coefficient == 1:
            oracle.assert_same_bits(own, unscaled)
        else:
            wide = 2 * 2.0**-24 if own.dtype != torch.float64 else 0.0  # the coefficient and the product in fp32
            tolerance = oracle.NORM_TOLERANCE[torch.float32] + wide + oracle.rounding(leg, own.dtype)
            oracle.assert_close(own, oracle.as_numpy(unscaled) * coefficient, tolerance, leg)


@pytest.mark.parametrize("culprit", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 4999, -1], ids=["head", "tail", "another tensor"])
def test_what_is_not_finite_is_found(leg: Leg, rng: np.random.Generator, culprit: float, where: int) -> None:
    scaled = drawn(rng, leg)
    scaled[0 if where >= 0 else -1][where] = culprit
    ours, theirs = (optimizer_of([grad.clone() for grad in scaled]) for _ in range(2))
    scaler, stock = scaler_for(leg), scaler_for(leg)
    norm = fastclip.unscale_and_clip_grad_norm_(scaler, ours, 0.5)
    stock.unscale_(theirs)
    expected = torch.nn.utils.clip_grad_norm_([p for g in theirs.param_groups for p in g["params"]], 0.5)
    assert state_of(scaler, ours) == state_of(stock, theirs) == (OptState.UNSCALED, {grads_of(ours)[0].device: 1.0})
    np.testing.assert_equal(norm.item(), expected.item())
    for own, other in zip(grads_of(ours), grads_of(theirs), strict=True):  # all of them 0 or NaN
        np.testing.assert_array_equal(oracle.as_numpy(own), oracle.as_numpy(other))


@pytest.mark.parametrize("culprit", [1.0, math.inf, math.nan])
def test_an_infinite_bound_unscales_only(leg: Leg, rng: np.random.Generator, culprit: float) -> None:
    """For any norm; torch's own clip would make all values NaN where the norm is not finite."""
    scaled = drawn(rng, leg)
    scaled[0][3] = culprit
    ours, theirs = (optimizer_of([twin(grad) for grad in scaled]) for _ in range(2))
    scaler, stock = scaler_for(leg), scaler_for(leg)
    norm = fastclip.unscale_and_clip_grad_norm_(scaler, ours, math.inf)
    stock.unscale_(theirs)
    assert state_of(scaler, ours) == state_of(stock, theirs)
    np.testing.assert_equal(math.isfinite(norm.item()), math.isfinite(culprit))
    for own, other in zip(grads_of(ours), grads_of(theirs), strict=True):
        np.testing.assert_array_equal(oracle.as_numpy(own), oracle.as_numpy(other))


def test_finite_gradients_whose_squares_overflow_are_finite(leg: Leg) -> None:
    scaled = [torch.full((3000,), 1e38, device=leg.device), torch.full((70,), -3e38, device=leg.device)]
    optimizer = optimizer_of(scaled)
    scaler = scaler_for(leg)
    norm = fastclip.unscale_and_clip_grad_norm_(scaler, optimizer, 1.0)
    assert state_of(scaler, optimizer)[1] == {scaled[0].device: 0.0}
    exact = math.sqrt(3000 * 1e38**2 + 70 * 3e38**2) / SCALE
    assert norm.item() == pytest.approx(exact, rel=1e-5)
    assert oracle.norm(scaled, 2) == pytest.approx(1.0, rel=1e-5)


def test_a_scale_that_is_no_power_of_two(leg: Leg, rng: np.random.Generator) -> None:
    scaled = [random_values(rng, (400,), torch.float32).to(leg.device) * 1000]
    exact = oracle.norm(scaled, 2) / 1000
    before = oracle.as_numpy(scaled[0])
    optimizer = optimizer_of(scaled)
    norm = fastclip.unscale_and_clip_grad_norm_(scaler_for(leg, 1000.0), optimizer, 0.5, norm_dtype=torch.float64)
    assert norm.item() == pytest.approx(exact, rel=oracle.NORM_TOLERANCE[torch.float32] + 2.0**-24)
    oracle.assert_close(scaled[0], before / 1000 * (0.5 / (exact + oracle.EPS)), 1e-6, leg)


@pytest.mark.legs("torch", "interpreter", "ptx", "gpu")
def test_nothing_waits(leg: Leg) -> None:
    optimizer, scaler = optimizer_of([torch.ones(5, device=leg.device)]), scaler_for(leg)
    with Syncs() as syncs:
        fastclip.unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
    assert syncs.count == 0


@pytest.mark.legs("ptx")
@pytest.mark.parametrize("count", [1, 40])
def test_two_launches(leg: Leg, rng: np.random.Generator, count: int) -> None:
    import ptxlab

    optimizer = optimizer_of([grad for _ in range(count) for grad in drawn(rng, leg, [7])])
    scaler = scaler_for(leg)
    for _ in range(2):
        with ptxlab.recording() as launched:
            fastclip.unscale_and_clip_grad_norm_(scaler, optimizer, 0.5)
        assert [name for name, _ in launched] == ["reduce_kernel", "apply_kernel"]
        scaler.update()
    # A plan without a scale has another launch: the cached one with a scale is not used for it.
    norm = fastclip.clip_grad_norm_(grads_and_owners(optimizer), 1e9, norm_dtype=torch.float64)
    assert norm.item() == pytest.approx(oracle.norm(grads_of(optimizer), 2), rel=1e-5)


def grads_and_owners(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


# ---- Training


Clip = Callable[[GradScaler, Optimizer], object]


def by_stock(scaler: GradScaler, optimizer: Optimizer) -> Tensor:
    scaler.unscale_(optimizer)
    return torch.nn.utils.clip_grad_norm_(grads_and_owners(optimizer), 0.02)


def in_one_go(scaler: GradScaler, optimizer: Optimizer) -> Tensor:
    return fastclip.unscale_and_clip_grad_norm_(scaler, optimizer, 0.02)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, "fused_adagrad"])
def test_training(optimizer: str) -> None:
    """The same losses and scales, including a skipped step and a larger scale."""
    makers = {**OPTIMIZERS, "fused_adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.1, fused=True)}

    def train(clip: Clip) -> list[tuple[float, float, float]]:
        training = Training(makers[optimizer])
        scaler = GradScaler("cpu", init_scale=SCALE, growth_interval=2)
        seen = []
        for step in range(6):
            x, y = training.batches[step % 4]
            training.optimizer.zero_grad()
            loss = (training.model(x) - y).square().mean()
            scaler.scale(loss).backward()
            if step == 2:
                first = next(training.model.parameters()).grad
                assert first is not None
                first[0] = math.inf
            norm: Any = clip(scaler, training.optimizer)
            scaler.step(training.optimizer)
            scaler.update()
            seen.append((loss.item(), norm.item(), scaler.get_scale()))
        return seen

    ours, theirs = np.array(train(in_one_go)), np.array(train(by_stock))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert ours[:, 2].tolist() == [SCALE, 2 * SCALE, SCALE, SCALE, 2 * SCALE, 2 * SCALE]


@pytest.mark.parametrize("steps_between", [False, True], ids=["unscaled, then stepped", "one after the other"])
@pytest.mark.parametrize("infinite", [0, 1, None])
def test_several_optimizers_have_one_scaler(steps_between: bool, infinite: int | None) -> None:
    """Each has its own norm, and only the one with an infinity skips its step."""

    def train(clip: Clip) -> tuple[list[float], float]:
        trainings = [Training(), Training(OPTIMIZERS["fused_adamw"])]
        scaler = GradScaler("cpu", init_scale=SCALE)
        for number, training in enumerate(trainings):
            x, y = training.batches[number]
            scaler.scale((training.model(x) - y).square().mean()).backward()
            if number == infinite:
                first = next(training.model.parameters()).grad
                assert first is not None
                first[0] = math.inf
        orders: list[Callable[[Training], object]] = [
            lambda training: clip(scaler, training.optimizer),
            lambda training: scaler.step(training.optimizer),
        ]
        if steps_between:
            for training in trainings:
                for work in orders:
                    work(training)
        else:
            for work in orders:
                for training in trainings:
                    work(training)
        scaler.update()
        weights = [w for t in trainings for p in t.model.parameters() for w in p.detach().flatten().tolist()]
        return weights, scaler.get_scale()

    (ours, our_scale), (theirs, their_scale) = train(in_one_go), train(by_stock)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert our_scale == their_scale == (SCALE if infinite is None else SCALE / 2)


# ---- The order of calls, and what raises


def unscale(scaler: GradScaler, optimizer: Optimizer) -> None:
    scaler.unscale_(optimizer)


def step(scaler: GradScaler, optimizer: Optimizer) -> None:
    scaler.step(optimizer)


def update(scaler: GradScaler, _: Optimizer) -> None:
    scaler.update()


@pytest.mark.parametrize(
    ("before", "error"),
    [
        ([], None),
        ([unscale], RuntimeError),
        ([in_one_go], RuntimeError),
        ([step], RuntimeError),
        ([in_one_go, step], RuntimeError),
        ([in_one_go, step, update], None),
        ([step, update], None),
    ],
    ids=lambda value: "-".join(f.__name__ for f in value) if isinstance(value, list) else "",
)
def test_the_order_of_calls_is_that_of_unscale_(before: list[Clip], error: type[Exception] | None) -> None:
    def outcome(last: Clip) -> tuple[str | None, object, list[Tensor]]:
        optimizer, scaler = optimizer_of([torch.arange(5.0)]), scaler_for()
        for call in before:
            call(scaler, optimizer)
        old = [grad.clone() for grad in grads_of(optimizer)]
        message = None
        if error is None:
            last(scaler, optimizer)
        else:
            with pytest.raises(error) as caught:
                last(scaler, optimizer)
            message = str(caught.value)
            for grad, was in zip(grads_of(optimizer), old, strict=True):
                oracle.assert_same_bits(grad, was)
        assert "_unscale_grads_" not in vars(scaler)
        return message, state_of(scaler, optimizer), grads_of(optimizer)

    ours, theirs = outcome(in_one_go), outcome(by_stock)
    assert ours[:2] == theirs[:2]
    torch.testing.assert_close(ours[2], theirs[2])


def test_unscale_after_it_is_an_error_too() -> None:
    optimizer, scaler = optimizer_of([torch.arange(5.0)]), scaler_for()
    in_one_go(scaler, optimizer)
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)


def test_a_scaler_that_has_not_scaled_anything() -> None:
    optimizer = optimizer_of([torch.arange(5.0)])
    with pytest.raises(AssertionError, match="_scale is None"):
        in_one_go(GradScaler("cpu"), optimizer)
    assert grads_of(optimizer)[0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_without_gradients_the_step_is_torch_s_error() -> None:
    optimizer, scaler = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), scaler_for()
    assert in_one_go(scaler, optimizer).item() == 0.0
    assert state_of(scaler, optimizer) == (OptState.UNSCALED, {})
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.step(optimizer)


def test_gradients_without_elements_count_nothing(leg: Leg) -> None:
    optimizer, scaler = optimizer_of([torch.ones(0, device=leg.device)]), scaler_for(leg)
    assert fastclip.unscale_and_clip_grad_norm_(scaler, optimizer, 0.5).item() == 0.0
    assert list(state_of(scaler, optimizer)[1].values()) == [0.0]


@pytest.mark.parametrize("name", ["unscale_", "_unscale_grads_"])
def test_a_scaler_that_was_changed_by_hand_is_refused_and_left_so(name: str) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([parameter]), torch.amp.GradScaler("cpu")

    def own(*_: object) -> None:
        """The user's replacement."""

    setattr(scaler, name, own)
    with pytest.raises(TypeError, match="unscales as torch's does"):
        fastclip.unscale_and_clip_grad_norm_(scaler, optimizer, 1.0)
    assert vars(scaler)[name] is own


def test_a_scaler_that_is_not_enabled_clips_only() -> None:
    ours, theirs = optimizer_of([torch.arange(5.0)]), optimizer_of([torch.arange(5.0)])
    norm = fastclip.unscale_and_clip_grad_norm_(GradScaler("cpu", enabled=False), ours, 0.5)
    assert norm.item() == fastclip.clip_grad_norm_(grads_and_owners(theirs), 0.5).item()
    oracle.assert_same_bits(grads_of(ours)[0], grads_of(theirs)[0])


def test_fp16_gradients_are_refused_as_torch_does() -> None:
    optimizer, scaler = optimizer_of([torch.ones(3), torch.ones(2, dtype=torch.float16)]), scaler_for()
    with pytest.raises(ValueError, match=r"Attempting to unscale FP16 gradients: parameters\[1\] of shape \(2,\)"):
        in_one_go(scaler, optimizer)
    assert state_of(scaler, optimizer) == (OptState.READY, {})
    assert [grad.tolist() for grad in grads_of(optimizer)] == [[1.0] * 3, [1.0] * 2]
    assert "_unscale_grads_" not in vars(scaler)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"norm_type": 0.5}, ValueError, "at least 1 here, not 0.5"),
        ({"norm_type": 0}, ValueError, "at least 1 here"),
        ({"norm_type": -math.inf}, ValueError, "at least 1 here"),
        ({"norm_type": math.nan}, ValueError, "at least 1 here"),
        ({"max_norm": None}, TypeError, "`max_norm` must be a real number"),
        ({"norm_dtype": torch.int32}, TypeError, "`norm_dtype` must be a floating-point dtype"),
        ({"optimizer": [torch.ones(2)]}, TypeError, r"`optimizer` must be a torch.optim.Optimizer, not list"),
        ({"scaler": 2.0}, TypeError, "`scaler` must be a torch.amp.GradScaler .* not float"),
        ({"scaler": ShardedGradScaler("cpu")}, TypeError, "not ShardedGradScaler: call its unscale_"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    scaler, optimizer = scaler_for(), optimizer_of([torch.ones(2)])
    with pytest.raises(error, match=message):
        fastclip.unscale_and_clip_grad_norm_(**{"scaler": scaler, "optimizer": optimizer, "max_norm": 1.0, **arguments})
    assert state_of(scaler, optimizer) == (OptState.READY, {})
    assert grads_of(optimizer)[0].tolist() == [1.0, 1.0]


def test_sparse_gradients(leg: Leg) -> None:
    def make() -> Optimizer:
        grad = torch.sparse_coo_tensor(
            torch.tensor([[0, 2, 2]]), torch.tensor([SCALE, 2 * SCALE, SCALE]), (4,), check_invariants=True
        ).to(leg.device)
        return optimizer_of([grad, torch.full((3,), 4 * SCALE, device=leg.device)])

    optimizer, scaler = make(), scaler_for(leg)
    with leg.unbounded():
        norm = fastclip.unscale_and_clip_grad_norm_(scaler, optimizer, 1.0)
    exact = math.sqrt(1 + 9 + 48)
    assert norm.item() == pytest.approx(exact, rel=1e-6)
    sparse, dense = grads_of(optimizer)
    np.testing.assert_allclose(oracle.as_numpy(sparse.to_dense()), np.array([1, 0, 3, 0]) / exact, rtol=1e-6)
    np.testing.assert_allclose(oracle.as_numpy(dense), np.full(3, 4 / exact), rtol=1e-6)


def test_the_gradients_versions_move() -> None:
    """Otherwise a later backward through them would be wrong without an error."""
    optimizer, scaler = optimizer_of([torch.ones(3)]), scaler_for()
    before = grads_of(optimizer)[0]._version
    in_one_go(scaler, optimizer)
    assert grads_of(optimizer)[0]._version > before


# ---- With the user's own inverse scale and found-inf tensor


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_scale_of_one_s_own(leg: Leg, rng: np.random.Generator, as_tensor: bool) -> None:
    scaled = [*drawn(rng, leg), random_values(rng, (40,), torch.float16).to(leg.device)]
    made = parameters([grad.clone() for grad in scaled])
    found = torch.zeros((1,), device=leg.device)
    inverse: Any = torch.full((1, 1), 1 / SCALE, device=leg.device) if as_tensor else 1 / SCALE
    norm = fastclip.clip_scaled_grad_norm_(made, 0.5, inverse, found)
    exact = oracle.norm(scaled, 2) / SCALE
    assert norm.item() == pytest.approx(exact, rel=1e-5)
    assert found.tolist() == [0.0]
    for parameter, grad in zip(made, scaled, strict=True):
        expected = oracle.as_numpy(grad) / SCALE * (0.5 / exact)
        assert parameter.grad is not None
        oracle.assert_close(parameter.grad, expected, 1e-5 + oracle.rounding(leg, grad.dtype), leg)
    next(iter(made)).grad[3] = math.nan  # type: ignore[index]
    fastclip.clip_scaled_grad_norm_(made, 0.5, inverse, found)
    assert found.tolist() == [1.0]
    fastclip.clip_scaled_grad_norm_(parameters([torch.ones(2, device=leg.device)]), 0.5, inverse, found)
    assert found.tolist() == [1.0]  # the flag stays


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"found_inf": 0.0}, TypeError, "`found_inf` must be a tensor of torch.float32"),
        ({"found_inf": torch.zeros((), dtype=torch.float64)}, TypeError, "`found_inf` must be a tensor"),
        ({"found_inf": torch.zeros(2)}, ValueError, r"`found_inf` must be one number, not a tensor of shape \(2,\)"),
        ({"inv_scale": torch.ones(3)}, ValueError, "`inv_scale` must be one number"),
        ({"inv_scale": "x"}, ValueError, "`inv_scale` must be a real number"),
        ({"inv_scale": -0.5}, ValueError, "`inv_scale` must be above 0 and finite in fp32, not -0.5"),
        ({"inv_scale": 0.0}, ValueError, "`inv_scale` must be above 0"),
        ({"inv_scale": math.nan}, ValueError, "`inv_scale` must be above 0"),
        ({"inv_scale": 1e-60}, ValueError, "`inv_scale` must be above 0 and finite in fp32, not 1e-60"),
        ({"inv_scale": 1e60}, ValueError, "`inv_scale` must be above 0"),
        ({"norm_type": 0.9}, ValueError, "at least 1"),
    ],
    ids=str,
)
def test_wrong_scales(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    made = parameters([torch.ones(2)])
    with pytest.raises(error, match=message):
        fastclip.clip_scaled_grad_norm_(
            **{"parameters": made, "max_norm": 1.0, "inv_scale": 0.5, "found_inf": torch.zeros(()), **arguments}
        )
    assert made[0].grad is not None
    assert made[0].grad.tolist() == [1.0, 1.0]


def test_nothing_to_clip_leaves_the_flag() -> None:
    found = torch.zeros(())
    assert fastclip.clip_scaled_grad_norm_([nn.Parameter(torch.ones(2))], 1.0, 0.5, found).item() == 0.0
    assert found.item() == 0.0
