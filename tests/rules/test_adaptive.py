"""The adaptive rules on every leg, against a second implementation in plain NumPy; their settings, state and copies."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import oracle
import pytest
import torch
from gradients import grad_of, random_values
from legs import AVAILABLE, Leg
from torch import Tensor, nn

import fastclip
from fastclip import ClipByEMA, ClipByQuantile, ClipByZScore
from fastclip.rules.formulas import Measured

INF = math.inf
NAN = math.nan

# Both compute in fp64, in another order. A z-score divides by deviations that may be 1e-3 of the mean.
TOLERANCE = 1e-12

Array: TypeAlias = npt.NDArray[np.float64]
AdaptiveRule: TypeAlias = ClipByQuantile | ClipByZScore | ClipByEMA

# ---- The second implementation: one group each, all observations in a list, no incremental sums, no sorted window


def is_observed(x: float, total: float) -> bool:
    return x > 0 and math.isfinite(total)


class Quantile:
    """One group of `ClipByQuantile`."""

    def __init__(self, rule: ClipByQuantile) -> None:
        self.rule = rule
        self.seen: list[float] = []
        self.threshold = INF

    def step(self, x: float, total: float) -> tuple[float, float]:
        """Return coefficient and threshold."""
        rule, before = self.rule, self.threshold
        if is_observed(x, total):
            self.seen.append(x)
            if len(self.seen) % rule.every == 0:
                is_warm = len(self.seen) >= rule.warmup
                self.threshold = rule.factor * np.quantile(self.seen[-rule.window :], rule.q) if is_warm else INF
        limit = min(self.threshold if rule.include_current else before, INF if rule.cap is None else rule.cap)
        if math.isnan(x) or limit == INF:
            return 1.0, limit
        return min(limit / (x + 1e-6), 1.0), limit


class ZScore:
    """One group of `ClipByZScore`."""

    def __init__(self, rule: ClipByZScore) -> None:
        self.rule = rule
        self.forget()

    def forget(self) -> None:
        self.first: list[float] = []
        self.mean = self.variance = 0.0
        self.hits = 0

    def step(self, x: float, total: float) -> tuple[float, float]:
        """Return coefficient and threshold."""
        rule = self.rule
        cap = INF if rule.cap is None else rule.cap
        if len(self.first) < rule.warmup:
            if is_observed(x, total):
                self.first.append(x)
                self.mean, self.variance = float(np.mean(self.first)), float(np.var(self.first))
            return (cap / (x + 1e-6) if x > cap else 1.0), cap
        deviation = math.sqrt(self.variance)
        largest = self.mean + rule.z * (deviation if rule.mode == "max" else deviation + 1e-6)
        hit = x > largest
        kept = x
        if hit:
            zeta = (x - self.mean) / (deviation + 1e-6)
            kept = {
                "reciprocal": rule.factor * (self.mean + rule.z**2 * deviation / zeta),
                "mean": self.mean,
                "max": largest,
            }[rule.mode]
        limit = min(kept, cap)
        if is_observed(x, total):
            if not (hit and rule.freeze):
                self.mean = rule.alpha * self.mean + (1 - rule.alpha) * kept
                self.variance = rule.alpha * self.variance + (1 - rule.alpha) * (kept - self.mean) ** 2
            self.hits = self.hits + 1 if hit else 0
            if rule.relearn is not None and self.hits == rule.relearn:
                self.forget()
        return (limit / (x + 1e-6) if x > limit else 1.0), min(largest, cap)


class EMA:
    """One group of `ClipByEMA`."""

    def __init__(self, rule: ClipByEMA) -> None:
        self.rule = rule
        self.count = 0
        self.average = INF

    def step(self, x: float, total: float) -> tuple[float, float]:
        """Return coefficient and threshold."""
        rule = self.rule
        if self.count < rule.warmup:
            shared = rule.max_norm / (total + 1e-6) if total > rule.max_norm else 1.0
            if is_observed(x, total):
                self.count += 1
                self.average = min(self.average, min(x, rule.max_norm) if rule.by == "global" else shared * x)
            return shared, rule.max_norm if rule.by == "global" else INF
        limit = rule.ratio * self.average
        if is_observed(x, total):
            self.count += 1
            self.average = rule.beta * self.average + (1 - rule.beta) * min(x, limit)
        return (limit / (x + 1e-6) if x > limit else 1.0), limit


class Reference:
    """All groups of a rule."""

    def __init__(self, rule: AdaptiveRule, groups: int) -> None:
        kind: Any = {ClipByQuantile: Quantile, ClipByZScore: ZScore, ClipByEMA: EMA}[type(rule)]
        self.groups = [kind(rule) for _ in range(groups)]

    def step(self, norms: Array) -> tuple[Array, Array]:
        """Return coefficients and thresholds."""
        answers = [group.step(float(x), total_of(norms)) for group, x in zip(self.groups, norms, strict=True)]
        coefficients, thresholds = np.array(answers).T
        return coefficients, thresholds


def total_of(norms: Array) -> float:
    return NAN if np.isnan(norms).any() else math.hypot(*norms)


# ---- Rules on norms


def draw_norms(rng: np.random.Generator, steps: int, groups: int) -> Array:
    """Norms around a level that drifts, with spikes, ties, and some that are 0, infinite or NaN."""
    level = np.exp(np.cumsum(rng.normal(0, 0.05, (steps, 1)), axis=0) + rng.normal(0, 1, (1, groups)))
    norms: Array = level * np.exp(rng.normal(0, 0.1, (steps, groups)))
    norms[rng.random(norms.shape) < 0.1] *= 5
    ties = rng.random(norms.shape) < 0.2
    norms[ties] = np.round(norms[ties], 1)
    for value in (0.0, INF, NAN):
        norms[rng.random(norms.shape) < 0.03] = value
    rare = rng.random(steps) < (0.6 if groups < 300 else 0.9)  # whole steps in which all are finite
    bad = ~np.isfinite(norms) & rare[:, None]
    norms[bad] = np.broadcast_to(level, norms.shape)[bad]
    return norms


def decide(rule: AdaptiveRule, norms: Array, labels: tuple[Any, ...], device: torch.device) -> tuple[Array, Array]:
    """Return coefficients and thresholds."""
    given = torch.tensor(norms, device=device)
    total = torch.tensor(total_of(norms), dtype=torch.float64, device=device)
    decision = rule.decide(Measured(labels, given, total, None))
    assert decision.thresholds is not None
    for tensor in decision:
        assert tensor is not None
        assert (tensor.dtype, tensor.shape, tensor.device.type) == (torch.float64, (len(norms),), device.type)
    return decision.coefficients.cpu().numpy(), decision.thresholds.cpu().numpy()


def compare(leg: Leg, rule: AdaptiveRule, norms: Array, monkeypatch: pytest.MonkeyPatch) -> Array:
    """Check a rule against the second implementation; return all coefficients.

    A slow leg takes over the state before the last few steps, and hands it on before the last one: torch's operations
    do the others.
    """
    steps, groups = norms.shape
    labels = tuple(range(groups))
    reference = Reference(rule, groups)
    mine = range(steps) if leg.environment is None else range(steps - (6 if groups < 300 else 2), steps - 1)
    coefficients = []
    for i, step in enumerate(norms):
        monkeypatch.setenv("FASTCLIP_BACKEND", leg.backend if i in mine else "torch")
        ours = decide(rule, step, labels, leg.device)
        theirs = reference.step(step)
        for name, own, other in zip(("coefficients", "thresholds"), ours, theirs, strict=True):
            np.testing.assert_allclose(own, other, rtol=TOLERANCE, err_msg=f"{name} in step {i}")
        coefficients.append(ours[0])
    return np.stack(coefficients)


QUANTILES = {
    "defaults": (ClipByQuantile(), 1, 1100),
    "window of 1": (ClipByQuantile(0.4, 1, factor=1.5), 3, 40),
    "window of 2": (ClipByQuantile(0.25, 2, include_current=True), 5, 40),
    "smallest of 3": (ClipByQuantile(0.0, 3, factor=2.0, cap=1.0), 7, 40),
    "largest of 3": (ClipByQuantile(1.0, 3, include_current=True, factor=0.5), 7, 40),
    "median of 100": (ClipByQuantile(0.5, 100, factor=2.0, include_current=True, warmup=100, every=100), 3, 250),
    "every 7th": (ClipByQuantile(0.9, 100, every=7, warmup=10, cap=3.0), 2, 150),
    "warm-up beyond the window": (ClipByQuantile(0.3, 3, warmup=20), 2, 60),
    "300 groups": (ClipByQuantile(0.8, 30), 300, 36),
    "long window, several groups": (ClipByQuantile(0.95, 1000, cap=2.0, every=10), 4, 1049),
}


@pytest.mark.parametrize("case", QUANTILES)
def test_quantiles(leg: Leg, case: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, groups, steps = QUANTILES[case]
    coefficients = compare(leg, copy.deepcopy(rule), draw_norms(rng, steps, groups), monkeypatch)
    assert 0.02 < (coefficients < 1).mean() < 0.98


Z_SCORES = {
    "defaults": ClipByZScore(),
    "reciprocal": ClipByZScore(0.9, 1.5, warmup=5, factor=0.8),
    "mean": ClipByZScore(0.8, 1.0, warmup=3, mode="mean", cap=4.0),
    "max": ClipByZScore(0.9, 2.0, warmup=10, mode="max"),
    "frozen": ClipByZScore(0.95, 1.0, warmup=8, freeze=True, cap=2.0),
    "max, frozen, relearning": ClipByZScore(0.9, 0.5, warmup=4, mode="max", freeze=True, relearn=2),
    "relearning": ClipByZScore(0.9, 0.7, warmup=6, relearn=3),
    "relearning at once": ClipByZScore(0.9, 0.7, warmup=2, relearn=1, mode="mean"),
    "warm-up of 1": ClipByZScore(0.0, 0.5, warmup=1),
}


@pytest.mark.parametrize("groups", [1, 3, 300])
@pytest.mark.parametrize("case", Z_SCORES)
def test_z_scores(leg: Leg, case: str, groups: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = draw_norms(rng, 100 if groups < 300 else 40, groups)
    coefficients = compare(leg, copy.deepcopy(Z_SCORES[case]), norms, monkeypatch)
    assert 0.005 < (coefficients < 1).mean() < 0.98


EMAS = {
    "defaults": ClipByEMA(),
    "short": ClipByEMA(1.2, 0.9, warmup=5, max_norm=3.0),
    "ratio of 1": ClipByEMA(1.0, 0.5, warmup=1, max_norm=100.0),
    "no memory": ClipByEMA(1.5, 0.0, warmup=3),
    "global": ClipByEMA(1.5, 0.8, warmup=5, max_norm=2.0, by="global"),
}


@pytest.mark.parametrize("groups", [1, 3, 300])
@pytest.mark.parametrize("case", EMAS)
def test_averages(leg: Leg, case: str, groups: int, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = copy.deepcopy(EMAS[case])
    groups = 1 if rule.by == "global" else groups
    norms = draw_norms(rng, 2 * rule.warmup + 60 if groups < 300 else 40, groups)
    coefficients = compare(leg, rule, norms, monkeypatch)
    assert (coefficients < 1).mean() > 0.02


@pytest.mark.legs("native", "torch", "gpu")
def test_random_settings(leg: Leg, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(25):
        window, count = (int(rng.integers(1, most)) for most in (40, 20))
        cap = None if rng.random() < 0.5 else float(rng.lognormal())
        factor = float(rng.uniform(0.5, 2.0))
        mode: Any = ("reciprocal", "mean", "max")[int(rng.integers(3))]
        rules: list[AdaptiveRule] = [
            ClipByQuantile(
                float(rng.random()),
                window,
                factor=factor,
                cap=cap,
                include_current=bool(rng.random() < 0.5),
                warmup=count,
                every=int(rng.integers(1, 6)),
            ),
            ClipByZScore(
                float(rng.uniform(0.5, 0.99)),
                float(rng.uniform(0.3, 3.0)),
                warmup=count,
                cap=cap,
                mode=mode,
                factor=factor if mode == "reciprocal" else 1.0,
                freeze=bool(rng.random() < 0.5),
                relearn=None if rng.random() < 0.5 else int(rng.integers(1, 6)),
            ),
            ClipByEMA(float(rng.uniform(1, 2)), float(rng.random()), warmup=count, max_norm=float(rng.lognormal())),
        ]
        for rule in rules:
            compare(leg, rule, draw_norms(rng, 60, 2), monkeypatch)


# ---- The observation rule

MAKERS: dict[str, Callable[..., AdaptiveRule]] = {
    "quantile": lambda **by: ClipByQuantile(0.5, 4, factor=0.9, **by),
    "current": lambda **by: ClipByQuantile(0.5, 4, factor=0.9, include_current=True, cap=3.0, **by),
    "reciprocal": lambda **by: ClipByZScore(0.8, 0.5, warmup=3, relearn=3, **by),
    "max": lambda **by: ClipByZScore(0.8, 0.2, warmup=2, mode="max", **by),
    "mean": lambda **by: ClipByZScore(0.8, 0.2, warmup=2, mode="mean", freeze=True, cap=5.0, **by),
    "average": lambda **by: ClipByEMA(1.1, 0.8, warmup=3, **by),
}
LABELS = ("a", "b")


def rows_of(rule: AdaptiveRule) -> Tensor:
    rows: Tensor = rule.state_dict()["rows"]
    return rows


@pytest.mark.parametrize("maker", MAKERS)
def test_what_is_no_observation_leaves_no_trace(leg: Leg, maker: str, rng: np.random.Generator) -> None:
    """To the bit: the state is that of the same steps without the norms that are 0, infinite or NaN."""
    ours, without = MAKERS[maker](by="parameter"), MAKERS[maker](by="parameter")
    for step in np.exp(rng.normal(0, 1, (7 if leg.environment else 20, 2))):
        for rule in (ours, without):
            decide(rule, step, LABELS, leg.device)
        before = rows_of(ours)
        for value in (0.0, INF, NAN):
            decide(ours, np.array([value, value]), LABELS, leg.device)
            oracle.assert_same_bits(rows_of(ours), before)
    oracle.assert_same_bits(rows_of(ours), rows_of(without))


@pytest.mark.parametrize("maker", MAKERS)
def test_a_group_that_is_not_finite_does_not_touch_the_others(leg: Leg, maker: str, rng: np.random.Generator) -> None:
    """They are clipped as before; but nothing is learned of the step, which a GradScaler would skip."""
    ours, healthy = MAKERS[maker](by="parameter"), MAKERS[maker](by="parameter")
    for i, step in enumerate(np.exp(rng.normal(0, 1, (12, 2)))):
        kept = healthy.state_dict()
        step[0] = (INF, NAN, 0.0)[i % 3] if i >= 4 else step[0]
        coefficients, thresholds = decide(ours, step, LABELS, leg.device)
        other = decide(healthy, np.array([1.0, step[1]]) if i >= 4 else step, LABELS, leg.device)
        if i < 4 or i % 3 == 2:  # a norm of 0 is finite
            assert (coefficients[1], thresholds[1]) == (other[0][1], other[1][1])
        else:
            healthy.load_state_dict(kept)
        if i >= 4:
            assert coefficients[0] == (0.0, 1.0, 1.0)[i % 3]
    oracle.assert_same_bits(rows_of(ours)[1], rows_of(healthy)[1])


def test_the_warm_up_of_averages_waits_for_a_finite_global_norm(leg: Leg) -> None:
    """An infinite norm makes the shared coefficient 0, of which no average must learn; nor does it count."""
    rule = ClipByEMA(warmup=2, max_norm=1.0)
    for other, shared in ((INF, 0.0), (NAN, 1.0)):
        coefficients, thresholds = decide(rule, np.array([3.0, other]), LABELS, leg.device)
        assert coefficients.tolist() == [shared, shared]
        assert thresholds.tolist() == [INF, INF]
        assert rows_of(rule).tolist() == [[0.0, INF], [0.0, INF]]
    coefficients, _ = decide(rule, np.array([3.0, 4.0]), LABELS, leg.device)
    assert coefficients.tolist() == pytest.approx([0.2, 0.2])
    assert rows_of(rule)[:, 1].tolist() == pytest.approx([0.6, 0.8], rel=1e-6)


@pytest.mark.parametrize(
    "rule",
    [ClipByQuantile(), ClipByZScore(), ClipByQuantile(cap=2.0), ClipByZScore(cap=2.0)],
    ids=["quantile", "z", "quantile, cap", "z, cap"],
)
def test_before_the_first_threshold_only_a_cap_clips(leg: Leg, rule: AdaptiveRule) -> None:
    has_cap = "cap=2.0" in repr(rule)
    fresh = copy.deepcopy(rule)
    for norm in (INF, NAN, 0.0, 8.0):
        coefficients, thresholds = decide(fresh, np.array([norm]), ("all",), leg.device)
        limited = {INF: 0.0, 8.0: 0.25}.get(norm, 1.0)
        assert coefficients[0] == pytest.approx(limited if has_cap else 1.0, rel=1e-6)
        assert thresholds[0] == (2.0 if has_cap else INF)


# ---- Rules on gradients


def draw_named(leg: Leg, rng: np.random.Generator) -> list[tuple[str, nn.Parameter]]:
    """Parameters of several layers and dtypes. The second has no gradient."""
    shapes = {
        "a.weight": (5, 3),
        "a.absent": (2,),
        "a.bias": (7,),
        "b.weight": (40,),
        "c.weight": (2, 2),
        "c.empty": (0,),
    }
    dtypes = itertools.cycle([torch.float32, torch.float64, torch.float32])
    made = []
    for (name, shape), dtype in zip(shapes.items(), dtypes, strict=False):
        parameter = nn.Parameter(torch.zeros(shape, dtype=dtype, device=leg.device))
        if name != "a.absent":
            parameter.grad = (random_values(rng, shape, dtype) * float(rng.lognormal(0, 1))).to(leg.device)
        made.append((name, parameter))
    return made


GROUPINGS: dict[str, tuple[Any, list[Any]]] = {
    "global": ("global", ["all"] * 6),
    "parameter": ("parameter", ["a.weight", "a.absent", "a.bias", "b.weight", "c.weight", "c.empty"]),
    "layer": ("layer", ["a", "a", "a", "b", "c", "c"]),
    "function": (lambda name: name[0] in "ac", [True, True, True, False, True, True]),
    "labels": ((1, 1, 2, "x", "x", 2), [1, 1, 2, "x", "x", 2]),
}


def _by_groups() -> Iterator[Any]:
    for leg, maker, by in itertools.product(AVAILABLE, MAKERS, GROUPINGS):
        # Groupings are the same for all rules, so a slow leg runs one rule by every grouping, the others by layer.
        if leg.environment is None or by == "layer" or maker == "quantile":
            yield pytest.param(leg, maker, by, id=f"{leg.name}-{maker}-{by}")


@pytest.mark.parametrize(("leg", "maker", "by"), list(_by_groups()), indirect=["leg"])
def test_gradients_are_scaled_by_groups(leg: Leg, maker: str, by: str, rng: np.random.Generator) -> None:
    grouping, label_of = GROUPINGS[by]
    rule = MAKERS[maker](by=grouping)
    labels = list(dict.fromkeys(label_of))
    reference = Reference(rule, len(labels))
    some = False
    for _ in range(8 if leg.environment is None else 5):
        named = draw_named(leg, rng)
        originals = {name: p.grad.clone() for name, p in named if p.grad is not None}
        result = fastclip.clip_grads_(named, rule)

        assert result.groups.labels == tuple(labels)
        assert result.coefficients is not None
        assert result.thresholds is not None
        members = [
            [originals[n] for (n, _), own in zip(named, label_of, strict=True) if own == label and n in originals]
            for label in labels
        ]
        exact = np.array([oracle.norm(tensors, 2) for tensors in members])
        loosest = oracle.NORM_TOLERANCE[torch.float32]
        # fp32 gradients have norms of that precision. A z-score magnifies its error by mean over deviation.
        for own, other in zip((result.coefficients, result.thresholds), reference.step(exact), strict=True):
            np.testing.assert_allclose(own.cpu().numpy(), other, rtol=100 * loosest)
        assert result.clipped.item() is bool((result.coefficients != 1).any())
        some |= bool(result.clipped)
        coefficients = dict(zip(labels, result.coefficients.tolist(), strict=True))
        for (name, parameter), label in zip(named, label_of, strict=True):
            if name not in originals:
                assert parameter.grad is None
            elif coefficients[label] == 1:
                oracle.assert_same_bits(grad_of(parameter), originals[name])
            else:
                scaled = oracle.as_numpy(originals[name]) * coefficients[label]
                oracle.assert_close(grad_of(parameter), scaled, 3 * oracle.half_ulp(parameter.dtype))
        after = oracle.norm([grad_of(p) for name, p in named if name in originals], 2)
        assert result.clipped_norm is not None
        assert result.clipped_norm.item() == pytest.approx(after, rel=4 * loosest)
    assert some


def test_parameter_groups(leg: Leg) -> None:
    """By parameter group, each has its own threshold."""
    parameters = [nn.Parameter(torch.zeros(1, device=leg.device)) for _ in "abc"]
    groups = [{"params": parameters[:2]}, {"params": parameters[2:]}]
    rule = ClipByQuantile(0.5, 3, by="group")
    for scale in (1.0, 2.0):
        for parameter, value in zip(parameters, (3.0, 4.0, 10.0), strict=True):
            parameter.grad = torch.tensor([value * scale], device=leg.device)
        result = fastclip.clip_grads_(groups, rule)
        assert result.groups.labels == (0, 1)
    assert result.thresholds is not None
    assert result.thresholds.tolist() == [5.0, 10.0]
    assert [grad_of(parameter).item() for parameter in parameters] == pytest.approx([3.0, 4.0, 10.0], rel=1e-6)


def test_a_call_without_gradients_is_no_step() -> None:
    rule = ClipByQuantile(by="parameter")
    result = fastclip.clip_grads_([("a", nn.Parameter(torch.ones(2)))], rule)
    assert result.coefficients is None
    assert result.thresholds is None
    assert not result.clipped
    assert rule.state_dict()["labels"] == []


def test_measuring_teaches_nothing() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    rule = ClipByZScore()
    fastclip.clip_grads_([parameter], rule)
    before = rows_of(rule)
    assert fastclip.measure_grads([parameter]).thresholds is None
    oracle.assert_same_bits(rows_of(rule), before)


# ---- Settings


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: ClipByQuantile(-0.1), ValueError, "q"),
        (lambda: ClipByQuantile(1.1), ValueError, "q"),
        (lambda: ClipByQuantile(NAN), ValueError, "q"),
        (lambda: ClipByQuantile("0.5"), TypeError, "q"),  # type: ignore[arg-type]
        (lambda: ClipByQuantile(0.5, 0), ValueError, "window"),
        (lambda: ClipByQuantile(0.5, 16385), ValueError, "window"),
        (lambda: ClipByQuantile(0.5, 10.0), TypeError, "window"),  # type: ignore[arg-type]
        (lambda: ClipByQuantile(0.5, True), TypeError, "window"),
        (lambda: ClipByQuantile(warmup=0), ValueError, "warmup"),
        (lambda: ClipByQuantile(every=0), ValueError, "every"),
        (lambda: ClipByQuantile(every=1.5), TypeError, "every"),  # type: ignore[arg-type]
        (lambda: ClipByQuantile(factor=0.0), ValueError, "factor"),
        (lambda: ClipByQuantile(factor=INF), ValueError, "factor"),
        (lambda: ClipByQuantile(cap=0.0), ValueError, "cap"),
        (lambda: ClipByQuantile(cap=INF), ValueError, "cap"),
        (lambda: ClipByQuantile(cap="1"), TypeError, "cap"),  # type: ignore[arg-type]
        (lambda: ClipByZScore(1.0), ValueError, "alpha"),
        (lambda: ClipByZScore(-0.1), ValueError, "alpha"),
        (lambda: ClipByZScore(None), TypeError, "alpha"),  # type: ignore[arg-type]
        (lambda: ClipByZScore(z=0.0), ValueError, "z"),
        (lambda: ClipByZScore(z=INF), ValueError, "z"),
        (lambda: ClipByZScore(warmup=0), ValueError, "warmup"),
        (lambda: ClipByZScore(cap=-1.0), ValueError, "cap"),
        (lambda: ClipByZScore(mode="median"), ValueError, "mode"),  # type: ignore[arg-type]
        (lambda: ClipByZScore(factor=-1.0), ValueError, "factor"),
        (lambda: ClipByZScore(mode="max", factor=0.5), ValueError, "factor"),
        (lambda: ClipByZScore(mode="mean", factor=0.5), ValueError, "factor"),
        (lambda: ClipByZScore(relearn=0), ValueError, "relearn"),
        (lambda: ClipByZScore(relearn=1.5), TypeError, "relearn"),  # type: ignore[arg-type]
        (lambda: ClipByEMA(0.99), ValueError, "ratio"),
        (lambda: ClipByEMA(INF), ValueError, "ratio"),
        (lambda: ClipByEMA(NAN), ValueError, "ratio"),
        (lambda: ClipByEMA(beta=1.0), ValueError, "beta"),
        (lambda: ClipByEMA(beta=-0.5), ValueError, "beta"),
        (lambda: ClipByEMA(warmup=0), ValueError, "warmup"),
        (lambda: ClipByEMA(max_norm=0.0), ValueError, "max_norm"),
        (lambda: ClipByEMA(max_norm=NAN), ValueError, "max_norm"),
    ],
)
def test_settings_out_of_range(make: Callable[[], object], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=rf"^`{name}` "):
        make()


def test_settings_at_the_edge_of_their_range() -> None:
    for rule in (
        ClipByQuantile(0, 1),
        ClipByQuantile(1, 1 << 14),
        ClipByZScore(0.0, 1e-9, warmup=1, relearn=1),
        ClipByEMA(1, 0, warmup=1),
    ):
        coefficients, _ = decide(rule, np.array([2.0]), ("all",), torch.device("cpu"))
        assert coefficients.tolist() == [1.0 if not isinstance(rule, ClipByEMA) else pytest.approx(0.5)]


def test_by_is_checked_with_the_gradients() -> None:
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    with pytest.raises(TypeError, match="`by` must be one of"):
        fastclip.clip_grads_([parameter], ClipByQuantile(by="module"))


# ---- The state: groups that come and go, copies


def taught(maker: str, by: str = "parameter", names: Sequence[str] = "ab", steps: int = 6) -> AdaptiveRule:
    """A rule that has seen a few steps of parameters with these names."""
    rule = MAKERS[maker](by=by)
    for i in range(steps):
        fastclip.clip_grads_(single({name: 1.0 + 0.1 * i + ord(name) % 7 for name in names}), rule)
    return rule


def single(values: dict[str, float]) -> list[tuple[str, nn.Parameter]]:
    """Parameters of one element with these gradients."""
    made = []
    for name, value in values.items():
        parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        parameter.grad = torch.tensor([value], dtype=torch.float64)
        made.append((name, parameter))
    return made


@pytest.mark.parametrize("maker", MAKERS)
def test_groups_that_are_new_start_cold(maker: str) -> None:
    """They may come anywhere in the order; the others go on to the bit."""
    ours, two, one = taught(maker), taught(maker), MAKERS[maker](by="parameter")
    for i in range(6):
        values = {"b": 2.0 + i % 3, "new": 5.0 - 0.7 * i, "a": 0.5 + 0.2 * i}
        grown = fastclip.clip_grads_(single(values), ours)
        old = fastclip.clip_grads_(single({name: values[name] for name in "ab"}), two)
        assert grown.coefficients is not None
        assert old.coefficients is not None
        assert grown.coefficients[[2, 0]].tolist() == old.coefficients.tolist()
        if maker != "average":  # its warm-up needs the norm of all
            young = fastclip.clip_grads_(single({"new": values["new"]}), one)
            assert young.coefficients is not None
            assert grown.coefficients[1] == young.coefficients[0]
    state = ours.state_dict()
    assert state["labels"] == ["b", "new", "a"]
    oracle.assert_same_bits(state["rows"][[2, 0]], rows_of(two))


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("names", ["a", "xy", "ax"])
def test_a_rule_of_other_parameters_changes_nothing(maker: str, names: str) -> None:
    rule = taught(maker)
    before = rule.state_dict()
    made = single(dict.fromkeys(names, 1e6))
    with pytest.raises(ValueError, match=r"learned the norms of other groups: '[ab]' is not among the \d of this call"):
        fastclip.clip_grads_(made, rule)
    assert [grad_of(parameter).item() for _, parameter in made] == [1e6] * len(names)
    after = rule.state_dict()
    assert after["labels"] == before["labels"]
    oracle.assert_same_bits(after["rows"], before["rows"])
    with pytest.raises(ValueError, match="learned the norms of other groups"):
        decide(rule, np.ones(len(names)), tuple(names), torch.device("cpu"))
    with pytest.raises(ValueError, match="learned the norms of other groups"):
        fastclip.attach(torch.optim.SGD([("x", nn.Parameter(torch.ones(1)))], lr=0.1), rule)


def pickled(rule: AdaptiveRule) -> Any:
    return pickle.loads(pickle.dumps(rule))  # noqa: S301 - our own bytes


def next_step(rule: AdaptiveRule) -> list[float]:
    result = fastclip.clip_grads_(single({"a": 7.0, "b": 0.1}), rule)
    assert result.coefficients is not None
    assert result.thresholds is not None
    return [*result.coefficients.tolist(), *result.thresholds.tolist()]


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("clone", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_go_on_by_themselves(maker: str, clone: Callable[[Any], Any]) -> None:
    rule = taught(maker)
    clones = [clone(rule) for _ in range(2)]
    before = rows_of(rule)
    answers = [next_step(other) for other in clones]
    assert clones[0] == rule
    oracle.assert_same_bits(rows_of(rule), before)
    assert answers == [next_step(rule)] * 2
    oracle.assert_same_bits(rows_of(clones[0]), rows_of(rule))
    assert not torch.equal(rows_of(rule), before)


@pytest.mark.parametrize("maker", MAKERS)
def test_shallow_copies_share_the_state_and_replace_starts_anew(maker: str) -> None:
    rule = taught(maker)
    shared, anew = copy.copy(rule), dataclasses.replace(rule)
    next_step(shared)
    oracle.assert_same_bits(rows_of(shared), rows_of(rule))
    assert rows_of(rule)[0, 0].item() == 7 or maker == "reciprocal"
    assert anew.state_dict()["labels"] == []
    assert next_step(anew) == next_step(MAKERS[maker](by="parameter"))


def test_equality_and_repr_are_those_of_the_settings() -> None:
    assert taught("quantile") == MAKERS["quantile"](by="parameter")
    assert hash(taught("quantile")) == hash(MAKERS["quantile"](by="parameter"))
    assert taught("quantile") != ClipByQuantile(0.5, 5, factor=0.9, by="parameter")
    assert repr(ClipByEMA(warmup=3)) == "ClipByEMA(ratio=1.04, beta=0.99, warmup=3, max_norm=1.0, by='parameter')"


@pytest.mark.parametrize("maker", MAKERS)
def test_a_state_goes_on_to_the_bit(maker: str) -> None:
    """Also one that is saved again before the first step, and by labels in another order."""
    rule, restored = taught(maker), MAKERS[maker](by="parameter")
    restored.load_state_dict(rule.state_dict())
    again = MAKERS[maker](by="parameter")
    again.load_state_dict(restored.state_dict())
    permuted = MAKERS[maker](by="parameter")
    state = rule.state_dict()
    permuted.load_state_dict({**state, "labels": state["labels"][::-1], "rows": state["rows"].flip(0)})
    assert next_step(rule) == next_step(again) == next_step(permuted)
    for other in (again, permuted):
        assert other.state_dict()["labels"] == ["a", "b"]
        oracle.assert_same_bits(rows_of(other), rows_of(rule))


@pytest.mark.parametrize("maker", MAKERS)
def test_a_norm_whose_square_overflows_is_no_observation(leg: Leg, maker: str) -> None:
    """One such norm of fp64 gradients would make a variance infinite for good."""
    rule = MAKERS[maker](by="global")
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64, device=leg.device))
    for norm in (1.0, 2.0, 1e200, 1.5):
        parameter.grad = torch.full_like(parameter, norm)
        fastclip.clip_grads_([parameter], rule)
    rows = rule.state_dict()["rows"]
    assert rows[0, 0].item() == 3
    assert not (rows[rows.isfinite()] > 10).any()


def test_a_state_is_a_copy() -> None:
    rule = taught("quantile")
    state = rule.state_dict()
    kept = state["rows"].clone()
    next_step(rule)
    oracle.assert_same_bits(state["rows"], kept)
    restored, changed = MAKERS["quantile"](by="parameter"), MAKERS["quantile"](by="parameter")
    restored.load_state_dict(state)
    expected = next_step(restored)
    oracle.assert_same_bits(state["rows"], kept)
    changed.load_state_dict(state)
    state["rows"].zero_()
    assert next_step(changed) == expected


def test_a_state_replaces_what_was_learned() -> None:
    rule, other = taught("max"), taught("max", steps=3)
    other.load_state_dict(rule.state_dict())
    assert next_step(other) == next_step(rule)
    oracle.assert_same_bits(rows_of(other), rows_of(rule))


def test_a_state_of_other_groups_replaces_what_was_learned() -> None:
    rule, other = taught("max"), taught("max", names="xy", steps=3)
    other.load_state_dict(rule.state_dict())
    assert next_step(other) == next_step(rule)
    with pytest.raises(ValueError, match="learned the norms of other groups: 'a'"):
        fastclip.clip_grads_(single({"x": 1.0, "y": 1.0}), other)


def test_groups_that_a_state_does_not_know_start_cold_with_a_warning() -> None:
    rule = MAKERS["quantile"](by="parameter")
    rule.load_state_dict(taught("quantile", names="a").state_dict())
    with pytest.warns(UserWarning, match="knows nothing of 2 of 3 groups, 'x' first: they start cold") as caught:
        fastclip.clip_grads_(single({"x": 1.0, "a": 2.0, "y": 3.0}), rule)
    assert caught[0].filename == __file__
    assert rows_of(rule)[:, 0].tolist() == [1.0, 7.0, 1.0]
    fastclip.clip_grads_(single({"x": 1.0, "a": 2.0, "y": 3.0}), rule)  # no second warning


def test_groups_of_a_state_that_are_not_there_are_dropped_with_a_warning() -> None:
    rule = MAKERS["quantile"](by="parameter")
    rule.load_state_dict(taught("quantile", names="abc").state_dict())
    with pytest.warns(UserWarning, match="has 2 groups that are not here, 'b' first: what was learned of them"):
        fastclip.clip_grads_(single({"a": 2.0}), rule)
    assert rule.state_dict()["labels"] == ["a"]


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"rule": "ClipByQuantile", "labels": ["a"], "rows": torch.zeros(2, 10)},
        {"rule": "ClipByQuantile", "labels": ["a"], "rows": torch.zeros(1, 12)},
        {"rule": "ClipByQuantile", "labels": None, "rows": torch.zeros(1, 10)},
        {"rule": "ClipByQuantile", "labels": ["a"], "rows": [[0.0] * 10]},
        ClipByQuantile(0.5, 5).state_dict(),
        ClipByEMA().state_dict(),
        {"rule": "ClipByZScore", "labels": ["a"], "rows": torch.zeros(1, 10)},
    ],
    ids=[
        "empty",
        "labels",
        "width",
        "no labels",
        "no tensor",
        "other window",
        "other rule",
        "other rule of that width",
    ],
)
def test_a_state_that_does_not_fit(state: dict[str, Any]) -> None:
    rule = taught("quantile")
    before = rows_of(rule)
    with pytest.raises(ValueError, match="adaptive rule with the same settings"):
        rule.load_state_dict(state)
    oracle.assert_same_bits(rows_of(rule), before)


def test_backends_may_change_between_steps(leg: Leg, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state means the same to each of them."""
    for make in MAKERS.values():
        ours, theirs = make(by="parameter"), make(by="parameter")
        for i, step in enumerate(np.exp(rng.normal(0, 1, (12, 2)))):
            monkeypatch.setenv("FASTCLIP_BACKEND", leg.backend if i % 2 else "torch")
            own = decide(ours, step, LABELS, leg.device)
            monkeypatch.setenv("FASTCLIP_BACKEND", "torch" if i % 2 else leg.backend)
            other = decide(theirs, step, LABELS, leg.device)
            np.testing.assert_allclose(own, other, rtol=TOLERANCE)
        torch.testing.assert_close(rows_of(ours), rows_of(theirs), rtol=TOLERANCE, atol=0.0)


@pytest.mark.parametrize("maker", MAKERS)
def test_groups_of_one_name_are_refused(maker: str) -> None:
    """They could not be told apart in a checkpoint."""
    rule = MAKERS[maker](by="parameter")
    made = [("w", nn.Parameter(torch.zeros(2))), ("w", nn.Parameter(torch.zeros(2)))]
    for _, parameter in made:
        parameter.grad = torch.full((2,), 9.0)
    with pytest.raises(ValueError, match=r"two groups are called 'w'.*names=model"):
        fastclip.clip_grads_(made, rule)
    assert all(parameter.grad is not None and parameter.grad.tolist() == [9.0, 9.0] for _, parameter in made)


def test_a_state_is_loaded_in_place() -> None:
    """A CUDA graph goes on with it, although it makes no call of Python."""
    rule, other = taught("max"), taught("max", steps=3)
    rows = other.memory._rows
    other.load_state_dict(rule.state_dict())
    assert other.memory._rows is rows
    oracle.assert_same_bits(rows, rows_of(rule))


def test_a_state_of_before_the_first_step_is_cold(recwarn: pytest.WarningsRecorder) -> None:
    rule = taught("quantile")
    rule.load_state_dict(MAKERS["quantile"](by="parameter").state_dict())
    fastclip.clip_grads_(single({"x": 1.0}), rule)
    assert rows_of(rule)[:, 0].tolist() == [1.0]
    assert not recwarn.list


@pytest.mark.parametrize("place", [(0, 0, math.nan), (0, 0, -1.0), (0, 0, 1.5), (1, 3, 1e6), (1, 8, math.nan)])
def test_a_broken_state_is_refused(place: tuple[int, int, float]) -> None:
    """Kernels trust the counts and the windows: they are indices."""
    rule = taught("quantile")
    state, before = rule.state_dict(), rows_of(rule)
    state["rows"][place[0], place[1]] = place[2]
    with pytest.raises(ValueError, match="is broken"):
        rule.load_state_dict(state)
    oracle.assert_same_bits(rows_of(rule), before)


def test_settings_may_be_numpys() -> None:
    """A checkpoint holds them as Python's numbers, which torch loads as data."""
    settings: dict[str, Any] = {"window": np.int64(4), "factor": np.float32(0.5), "include_current": np.bool_(True)}
    rule = ClipByQuantile(np.float64(0.5), **settings)
    assert {type(value) for value in rule.settings(()).values()} == {float, int, bool, type(None), str}
    assert rule == ClipByQuantile(0.5, 4, factor=0.5, include_current=True)
    assert type(fastclip.ClipByWeightNorm(0.1, np.float64(1e-3)).eps) is float


@pytest.mark.parametrize(("kind", "name"), [(ClipByQuantile, "include_current"), (ClipByZScore, "freeze")])
def test_flags_are_flags(kind: Callable[..., AdaptiveRule], name: str) -> None:
    for value in ("no", 1, None, torch.ones(2)):
        with pytest.raises(TypeError, match=f"`{name}` must be True or False"):
            kind(**{name: value})
