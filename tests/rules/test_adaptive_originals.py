"""The adaptive rules against their originals: the packages zclip, autoclip and pytorch_optimizer.

The same gradients, in fp64, go through the original and through ours, step by step. After each step the clipped
gradients are the same, and so are thresholds and statistics, as far as the original shows them. Install the extra
`originals`.

On purpose we differ in what is learned: an observation is a norm above 0 in a step whose gradients are all finite,
while the originals take in whatever comes. See `test_what_is_no_observation_leaves_no_trace`.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastclip
from fastclip import ClipByEMA, ClipByQuantile, ClipByZScore
from fastclip.rules.by_weight import ClipByWeightNorm

pytestmark = pytest.mark.legs("native", "numpy")

SHAPES: Sequence[tuple[int, ...]] = [(4, 3), (5,), (2, 3, 2), ()]
STEPS = 150
SEQUENCES = [("plain", 0), ("spikes", 1), ("spikes", 2), ("rise", 3)]  # and their seeds
TOLERANCE = 1e-12

each_sequence = pytest.mark.parametrize(
    ("sequence", "seed"), SEQUENCES, ids=[f"{name}{seed}" for name, seed in SEQUENCES]
)


for package in ("zclip", "autoclip", "pytorch_optimizer"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"could not import {package!r}: install the extra `originals`", allow_module_level=True)


def original(name: str) -> Any:
    """A module of a package."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings from its own imports
        return importlib.import_module(name)


def scales(sequence: str, rng: np.random.Generator) -> Iterator[float]:
    """The size of the gradients in each step: noise of 20 %; with spikes, some in a row; or with a lasting rise."""
    for step in range(STEPS):
        scale = math.exp(0.2 * rng.standard_normal())
        if sequence == "spikes" and (step % 13 == 11 or step % 41 in {38, 39, 40}):
            scale *= 10.0 ** rng.uniform(0.5, 3)
        if sequence == "rise" and step >= STEPS // 2:
            scale *= 3
        yield scale


def gradients(sequence: str, seed: int, size: float = 1.0) -> Iterator[list[Tensor]]:
    """The gradients of each step. Their global norm is about 5 times `size` where nothing happens."""
    rng = np.random.default_rng(seed)
    for scale in scales(sequence, rng):
        yield [torch.from_numpy(np.asarray(rng.standard_normal(shape))) * (scale * size) for shape in SHAPES]


def make_parameters(grads: Sequence[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones_like(grad)) for grad in grads]


def give(parameters: Sequence[nn.Parameter], grads: Sequence[Tensor]) -> None:
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad.clone()


def grads_of(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def assert_close(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float = TOLERANCE) -> None:
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=tolerance, atol=0)


def column(rule: ClipByZScore | ClipByEMA, position: int) -> Tensor:
    """One number of each group's state."""
    rows: Tensor = rule.state_dict()["rows"]
    return rows[:, position]


# ---- ZClip

MODES = {
    "reciprocal": {"mode": "zscore", "clip_option": "adaptive_scaling"},
    "mean": {"mode": "zscore", "clip_option": "mean"},
    "max": {"mode": "percentile"},
}


def zclip_pair(mode: str, cap: float | None = None, factor: float = 1.0, freeze: bool = False) -> tuple[Any, Any]:
    """The authors' object, and our rule with the same settings."""
    settings: dict[str, Any] = {**MODES[mode], "max_grad_norm": cap, "clip_factor": factor}
    theirs = original("zclip").ZClip(alpha=0.9, z_thresh=2.0, warmup_steps=20, skip_update_on_spike=freeze, **settings)
    own: dict[str, Any] = {"mode": mode, "cap": cap, "factor": factor, "freeze": freeze}
    return theirs, ClipByZScore(0.9, 2.0, warmup=20, **own)


def zclip_threshold(theirs: Any) -> float:
    """The largest norm that the authors' object will not clip in the next step."""
    cap = math.inf if theirs.max_grad_norm is None else theirs.max_grad_norm
    if not theirs.initialized:
        return float(cap)
    deviation = theirs.var**0.5 + (0 if theirs.mode == "percentile" else theirs.eps)
    return float(min(theirs.mean + theirs.z_thresh * deviation, cap))


@each_sequence
@pytest.mark.parametrize("freeze", [False, True], ids=["", "freeze"])
@pytest.mark.parametrize("cap", [None, 1.0, 6.0])
@pytest.mark.parametrize(("mode", "factor"), [("reciprocal", 1.0), ("reciprocal", 0.6), ("mean", 1.0), ("max", 1.0)])
@pytest.mark.usefixtures("leg")
def test_zclip(mode: str, factor: float, cap: float | None, freeze: bool, sequence: str, seed: int) -> None:
    theirs, rule = zclip_pair(mode, cap, factor, freeze)
    clipped = 0
    for step, grads in enumerate(gradients(sequence, seed)):
        their_parameters, our_parameters = make_parameters(grads), make_parameters(grads)
        give(their_parameters, grads)
        give(our_parameters, grads)
        threshold = zclip_threshold(theirs)
        norm = theirs.step(nn.ParameterList(their_parameters))
        result = fastclip.clip_grads_(our_parameters, rule)
        assert result.norm.item() == pytest.approx(norm, rel=TOLERANCE)
        assert result.thresholds is not None
        assert result.thresholds.item() == pytest.approx(threshold, rel=TOLERANCE)
        assert_close(grads_of(our_parameters), grads_of(their_parameters))
        if step >= 19:  # the warm-up's last step makes the statistics
            assert column(rule, 1).item() == pytest.approx(theirs.mean, rel=TOLERANCE)
            assert column(rule, 2).item() == pytest.approx(theirs.var, rel=TOLERANCE)
        clipped += bool(result.clipped)
    assert clipped > 0  # at 2 standard deviations also in the calm sequence


# ---- AutoClip


@each_sequence
@pytest.mark.parametrize("window", [1, 7, 1000])
@pytest.mark.parametrize("q", [0.1, 0.75, 1.0])
@pytest.mark.parametrize("by", ["global", "parameter"])
@pytest.mark.usefixtures("leg")
def test_autoclip(by: Any, q: float, window: int, sequence: str, seed: int) -> None:
    """The package `autoclip`, whose first step is free."""
    their_parameters = make_parameters([torch.ones(shape, dtype=torch.float64) for shape in SHAPES])
    our_parameters = make_parameters(their_parameters)
    theirs = original("autoclip.torch").QuantileClip(
        their_parameters, quantile=q, history_length=window, global_threshold=by == "global"
    )
    rule = ClipByQuantile(q, window, by=by)
    for step, grads in enumerate(gradients(sequence, seed)):
        give(their_parameters, grads)
        give(our_parameters, grads)
        thresholds = torch.full((1 if by == "global" else len(SHAPES),), math.inf, dtype=torch.float64)
        if step:
            of = theirs.state
            histories = [of["global_history"]] if by == "global" else [of[p]["history"] for p in their_parameters]
            thresholds = torch.stack([torch.quantile(history, q) for history in histories])
        theirs.step()
        result = fastclip.clip_grads_(our_parameters, rule)
        assert result.thresholds is not None
        assert_close([result.thresholds], [thresholds])
        assert_close(grads_of(our_parameters), grads_of(their_parameters))


# ---- AdaGC


@each_sequence
@pytest.mark.parametrize("foreach", [False, True], ids=["", "foreach"])
@pytest.mark.parametrize(("max_norm", "tolerance"), [(1e15, TOLERANCE), (4e9, 3e-7)], ids=["free", "clipped"])
@pytest.mark.usefixtures("leg")
def test_adagc(max_norm: float, tolerance: float, foreach: bool, sequence: str, seed: int) -> None:
    """pytorch_optimizer's, which is part of Adam: with a first beta of 0, Adam's first moment is the clipped gradient.

    Its warm-up is one step shorter than the authors', and its epsilons are others, which do not matter among gradients
    of this size. It takes the global norm of the warm-up in fp32: hence the tolerance if that clips.
    """
    their_parameters = make_parameters([torch.ones(shape, dtype=torch.float64) for shape in SHAPES])
    our_parameters = make_parameters(their_parameters)
    settings: dict[str, Any] = {"lambda_abs": max_norm, "lambda_rel": 1.1, "warmup_steps": 21, "weight_decay": 0.0}
    theirs = original("pytorch_optimizer").AdaGC(
        their_parameters, betas=(0.0, 0.999), beta=0.9, foreach=foreach, **settings
    )
    rule = ClipByEMA(1.1, 0.9, warmup=20, max_norm=max_norm)
    clipped = 0
    for grads in gradients(sequence, seed, 1e9):
        give(their_parameters, grads)
        give(our_parameters, grads)
        theirs.step()
        result = fastclip.clip_grads_(our_parameters, rule)
        of = theirs.state
        assert_close(grads_of(our_parameters), [of[each]["exp_avg"] for each in their_parameters], tolerance)
        assert_close([column(rule, 1)], [torch.stack([of[each]["gamma"] for each in their_parameters])], tolerance)
        clipped += bool(result.clipped)
    assert 20 < clipped < STEPS


# ---- AGC


def weights_and_gradients(
    shapes: Sequence[tuple[int, ...]], rng: np.random.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and gradients, each output with a scale of its own; some outputs are 0, some beside the epsilons."""
    tensors: tuple[list[Tensor], list[Tensor]] = [], []
    for shape in shapes:
        for values in tensors:
            scale = 10.0 ** rng.uniform(-5, 1, (*shape[:1], *[1] * (len(shape) - 1)))
            scale *= rng.random(scale.shape) > 0.1
            values.append(torch.from_numpy(np.asarray(rng.standard_normal(shape) * scale)))
    return tensors


def clipped_by_weight(weights: Sequence[Tensor], grads: Sequence[Tensor], rule: ClipByWeightNorm) -> list[Tensor]:
    made = [nn.Parameter(weight.clone()) for weight in weights]
    give(made, grads)
    fastclip.clip_grads_(made, rule)
    return grads_of(made)


# Those in which both find the same units. pytorch_optimizer does without those of three dimensions: it takes norms
# along dimension 1 alone there. And it divides a weight of n outputs of one element each, which is one unit to the
# authors and to us.
SHAPES_OF_LAYERS = [(7, 5), (1, 6), (16, 33), (5,), (1,), (), (4, 3, 2, 2), (6, 1, 3, 3), (3, 2, 2, 2, 2)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("clipping", [0.01, 0.3, 20.0])
@pytest.mark.usefixtures("leg")
def test_agc_by_unit(clipping: float, seed: int) -> None:
    """Each output of linear and convolutional layers, and each bias as a whole."""
    agc = original("pytorch_optimizer.optimizer.agc").agc
    weights, grads = weights_and_gradients(SHAPES_OF_LAYERS, np.random.default_rng(seed))
    ours = clipped_by_weight(weights, grads, ClipByWeightNorm(clipping, eps=1e-3, by="unit"))
    theirs = [agc(weight, grad, 1e-3, clipping, 1e-6) for weight, grad in zip(weights, grads, strict=True)]
    assert_close(ours, theirs)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("clipping", [0.01, 0.3, 20.0])
@pytest.mark.usefixtures("leg")
def test_agc_by_parameter(clipping: float, seed: int) -> None:
    """The original takes a vector as a whole: each parameter is given to it as a vector."""
    agc = original("pytorch_optimizer.optimizer.agc").agc
    weights, grads = weights_and_gradients([*SHAPES_OF_LAYERS, (6, 1), (2, 3, 4)], np.random.default_rng(seed))
    ours = clipped_by_weight(weights, grads, ClipByWeightNorm(clipping, eps=1e-3))
    pairs = zip(weights, grads, strict=True)
    theirs = [agc(weight.flatten(), grad.flatten(), 1e-3, clipping, 1e-6).view_as(grad) for weight, grad in pairs]
    assert_close(ours, theirs)


# ---- trainings


class Training:
    """A small network under SGD in fp64, on batches of which some are a hundred times as large."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self._generator = generator
        self._steps = 0

    def backward(self) -> None:
        x = torch.randn(16, 6, generator=self._generator, dtype=torch.float64)
        spike = 100 if self._steps % 17 == 16 else 1
        self._steps += 1
        self.optimizer.zero_grad()
        (self.model(x) - spike * x.sum(1, keepdim=True).sin()).square().mean().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("leg")
def test_training_with_zclip(mode: str, seed: int) -> None:
    zclip, rule = zclip_pair(mode)
    theirs, ours = Training(seed), Training(seed)
    fastclip.attach(ours.optimizer, rule)
    for _ in range(100):
        theirs.backward()
        zclip.step(theirs.model)
        theirs.optimizer.step()
        ours.backward()
        ours.optimizer.step()
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize("by", ["global", "parameter"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.usefixtures("leg")
def test_training_with_autoclip(by: Any, seed: int) -> None:
    theirs, ours = Training(seed), Training(seed)
    clipper = original("autoclip.torch").QuantileClip(
        list(theirs.model.parameters()), quantile=0.8, history_length=30, global_threshold=by == "global"
    )
    fastclip.attach(ours.optimizer, ClipByQuantile(0.8, 30, by=by))
    for _ in range(100):
        theirs.backward()
        clipper.step()
        theirs.optimizer.step()
        ours.backward()
        ours.optimizer.step()
    assert_same_weights(ours, theirs)


def assert_same_weights(ours: Training, theirs: Training) -> None:
    for mine, expected in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)  # a training amplifies roundings


# ---- what differs on purpose


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
@pytest.mark.usefixtures("leg")
def test_what_is_no_observation_leaves_no_trace(value: float) -> None:
    """Our rules, given steps with such norms, go on as the originals that did not get them."""
    their_parameters = make_parameters([torch.ones(shape, dtype=torch.float64) for shape in SHAPES])
    our_parameters = make_parameters(their_parameters)
    zclip, z_score = zclip_pair("reciprocal")
    autoclip = original("autoclip.torch").QuantileClip(their_parameters, 0.9, 30, global_threshold=True)
    quantile = ClipByQuantile(0.9, 30)
    pairs = [(lambda: zclip.step(nn.ParameterList(their_parameters)), z_score), (autoclip.step, quantile)]
    for step, grads in enumerate(gradients("spikes", 0)):
        for clip, rule in pairs:
            give(their_parameters, grads)
            give(our_parameters, grads)
            clip()
            fastclip.clip_grads_(our_parameters, rule)
            assert_close(grads_of(our_parameters), grads_of(their_parameters))
            if step % 5 == 2:
                give(our_parameters, [torch.full_like(grad, value) for grad in grads])
                fastclip.clip_grads_(our_parameters, rule)


@pytest.mark.usefixtures("leg")
def test_a_nan_ends_the_clipping_of_zclip() -> None:
    """The reason why: after a single NaN the original clips nothing any more."""
    zclip, rule = zclip_pair("reciprocal")
    for step, grads in enumerate(gradients("plain", 0)):
        ours, theirs = make_parameters(grads), make_parameters(grads)
        factor = math.nan if step == 50 else 1e3 if step == 140 else 1.0
        for parameters in (ours, theirs):
            give(parameters, [grad * factor for grad in grads])
        zclip.step(nn.ParameterList(theirs))
        result = fastclip.clip_grads_(ours, rule)
        if step == 140:
            assert bool(result.clipped)
            assert_close(grads_of(theirs), [grad * factor for grad in grads])
    assert math.isnan(zclip.mean)
