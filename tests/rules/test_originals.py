"""The rules against their originals: TensorFlow's functions, and the clipping of Keras' optimizers.

TensorFlow and Triton crash when one process loads both. So the first test here that needs the originals imports them,
and makes it impossible to import Triton from then on. If Triton is loaded already, the tests are skipped. Run this file
alone, with the extra `originals`.

Each result is compared twice. First with the original in fp64, which does not overflow and hardly rounds: this checks
the formula, within the error of our own norm and of storing the product. Then with the original in the gradients' own
dtype, within the error that the original may have there.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import oracle
import pytest
import torch
from gradients import parameters, random_values
from torch import Tensor, nn

import fastclip
from fastclip import ClipByGlobalNorm, ClipByNorm, ClipByValue

Array: TypeAlias = oracle.Array
Original: TypeAlias = Callable[[list[Any]], Sequence[Any]]  # TensorFlow's tensors -> TensorFlow's tensors

INF = math.inf
NAN = math.nan
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

SETTINGS = {"TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "KERAS_BACKEND": "tensorflow"}


@pytest.fixture(scope="module")
def tf() -> Any:
    """TensorFlow, where it and Keras are installed and Triton is not loaded."""
    if sys.modules.get("triton"):
        pytest.skip("Triton is loaded, and TensorFlow would crash beside it: run this file by itself")
    for name in ("tensorflow", "keras"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"could not import {name!r}: install the extra `originals`")
    sys.modules["triton"] = None  # type: ignore[assignment]  # it cannot be imported: torch's optimizers would
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings from their own imports
        importlib.import_module("keras")
        return importlib.import_module("tensorflow")


@pytest.fixture
def sgd(tf: Any) -> Callable[..., Any]:  # noqa: ARG001 - imports Keras
    """Keras' SGD; all its optimizers clip in the same way."""
    return importlib.import_module("keras").optimizers.SGD  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCLIP_BACKEND", "numpy")


def to_tf(tf: Any, tensor: Tensor, dtype: torch.dtype | None = None) -> Any:
    """The values as TensorFlow's tensor; exactly, as they are converted through fp64."""
    return tf.cast(tf.constant(oracle.as_numpy(tensor)), str(dtype or tensor.dtype).removeprefix("torch."))


def to_numpy(tf: Any, tensor: Any) -> Array:
    array: Array = tf.cast(tensor, "float64").numpy()
    return array


def draw(rng: np.random.Generator, dtype: torch.dtype) -> list[Tensor]:
    """Gradients of several shapes and scales; in 16 bits only few and small ones, so that no square overflows."""
    shapes: list[tuple[int, ...]] = [(3, 4), (5,), (), (1,), (2, 3, 2)]
    scales = [1.0, 4.0, 0.25, 2.0, 0.5]
    if dtype.itemsize > 2:
        shapes += [(40, 30), (700,)]
        scales += [1e-3, 30.0]
    return [random_values(rng, shape, dtype) * scale for shape, scale in zip(shapes, scales, strict=True)]


def own_tolerance(tensors: Sequence[Tensor]) -> float:
    """The error that the original may have in the gradients' own dtype.

    A sum of n squares has an error of at most n roundings, and its root half of that. To it come the roundings of the
    root, the bound, a quotient, two products and the result.
    """
    elements = sum(tensor.numel() for tensor in tensors)
    return (elements / 2 + 6) * oracle.half_ulp(tensors[0].dtype) + our_tolerance(tensors[0].dtype)


def our_tolerance(dtype: torch.dtype) -> float:
    """The error of our norm, of the coefficient as it is rounded for the multiplication, and of the product."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return oracle.NORM_TOLERANCE[dtype] + 2 * oracle.half_ulp(wide) + oracle.half_ulp(dtype)


def clipped(grads: Sequence[Tensor | None], rule: fastclip.ClipByNorm | ClipByGlobalNorm | ClipByValue) -> list[Tensor]:
    """The gradients that are not None, clipped by a rule."""
    made = [nn.Parameter(torch.empty_like(grad)) if grad is not None else nn.Parameter(torch.ones(2)) for grad in grads]
    for parameter, grad in zip(made, grads, strict=True):
        parameter.grad = None if grad is None else grad.clone()
    fastclip.clip_grads_(made, rule)
    return [parameter.grad for parameter in made if parameter.grad is not None]


def assert_as_original(tf: Any, results: Sequence[Tensor], original: Original, grads: Sequence[Tensor | None]) -> None:
    """`results` are what the original returns for `grads`; those that are None stay None."""
    present = [grad for grad in grads if grad is not None]
    for wide in (True, False):
        given = [None if g is None else to_tf(tf, g, torch.float64 if wide else None) for g in grads]
        made = original(given)
        assert [t is None for t in made] == [g is None for g in grads]
        tolerance = our_tolerance(present[0].dtype) if wide else own_tolerance(present)
        for result, expected in zip(results, [t for t in made if t is not None], strict=True):
            oracle.assert_close(result, to_numpy(tf, expected), tolerance)


# ---- TensorFlow


BOUNDS = [(-0.5, 0.25), (0.1, 0.3), (-0.7, -0.1), (-INF, 0.3), (-0.3, INF), (-INF, INF), (0.0, 0.0), (-2.0, 50.0)]
SPECIAL = (0.0, -0.0, 0.3, -0.3, 1.5, -3.0, INF, -INF, NAN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("low", "high"), BOUNDS)
def test_tensorflows_clip_by_value(
    tf: Any, low: float, high: float, dtype: torch.dtype, rng: np.random.Generator
) -> None:
    """Every element is the same as the original's, to the bit except for the sign of a zero; NaN stays NaN."""
    grads = [*draw(rng, dtype), torch.tensor(SPECIAL, dtype=dtype), torch.full((3,), NAN, dtype=dtype)]
    # The bounds themselves, rounded to the dtype, and the values next to them.
    ends = torch.tensor([low, high], dtype=torch.float64).to(dtype)
    grads.append(torch.cat([ends, ends.nextafter(torch.tensor(9, dtype=dtype)), ends.nextafter(-ends.new_tensor(9))]))
    made = parameters([grad.clone() for grad in grads])
    fastclip.clip_by_value_(made, low, high)
    for parameter, by_rule, grad in zip(made, clipped(grads, ClipByValue(low, high)), grads, strict=True):
        expected = to_numpy(tf, tf.clip_by_value(to_tf(tf, grad), low, high))
        for result in (parameter.grad, by_rule):
            assert result is not None
            np.testing.assert_array_equal(oracle.as_numpy(result), expected)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip_norm", [0.05, 1.5, 100.0])
def test_tensorflows_clip_by_norm(tf: Any, clip_norm: float, dtype: torch.dtype, seed: int) -> None:
    grads = draw(np.random.default_rng(seed), dtype)
    made = parameters([grad.clone() for grad in grads])
    norms = fastclip.clip_by_norm_(made, clip_norm)
    for i, grad in enumerate(grads):
        result = made[i].grad
        assert result is not None
        assert_as_original(tf, [result], lambda given: [tf.clip_by_norm(given[0], clip_norm)], [grad])
        exact = to_numpy(tf, tf.norm(to_tf(tf, grad, torch.float64)))
        assert norms[i].item() == pytest.approx(float(exact), rel=oracle.NORM_TOLERANCE[dtype])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clip_norm", [0.05, 1.5, 1000.0])
def test_tensorflows_clip_by_global_norm(tf: Any, clip_norm: float, dtype: torch.dtype, seed: int) -> None:
    grads: list[Tensor | None] = [*draw(np.random.default_rng(seed), dtype)]
    grads[2:2] = [None]
    results = clipped(grads, ClipByGlobalNorm(clip_norm))
    assert_as_original(tf, results, lambda given: tf.clip_by_global_norm(given, clip_norm)[0], grads)
    present = [grad.clone() for grad in grads if grad is not None]
    norm = fastclip.clip_by_global_norm_(parameters(present), clip_norm)
    expected = tf.linalg.global_norm([to_tf(tf, g, torch.float64) for g in grads if g is not None])
    assert norm.item() == pytest.approx(float(to_numpy(tf, expected)), rel=oracle.NORM_TOLERANCE[dtype])
    for mine, by_rule in zip(present, results, strict=True):
        oracle.assert_close(mine, oracle.as_numpy(by_rule), our_tolerance(dtype))


@pytest.mark.parametrize("use_norm", [0.5, 2.0, 7.0, 1e-30, 0.0, -3.0, NAN, INF, -INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensorflows_use_norm(tf: Any, use_norm: float, dtype: torch.dtype, rng: np.random.Generator) -> None:
    """The original uses any given norm unchecked; one that is not finite makes every value NaN."""
    if dtype == torch.float16 and use_norm == 1e-30:
        use_norm = 1e-3  # 1e-30 underflows in fp16
    grads = draw(rng, dtype)
    for given_norm in (use_norm, torch.tensor(use_norm), torch.tensor([use_norm], dtype=torch.float64)):
        made = parameters([grad.clone() for grad in grads])
        returned = fastclip.clip_by_global_norm_(made, 2.0, given_norm)
        assert returned.shape == ()
        assert returned.item() == pytest.approx(use_norm, rel=2.0**-24, nan_ok=True)
        results = [parameter.grad for parameter in made if parameter.grad is not None]
        assert_as_original(
            tf,
            results,
            lambda given: tf.clip_by_global_norm(given, 2.0, tf.constant(use_norm, given[0].dtype))[0],
            grads,
        )
        if not math.isfinite(use_norm):
            assert all(result.isnan().all() for result in results)


EDGES = [
    [[0.0, -0.0, 0.0], [0.0]],  # only zeros: 0 / 0 is possible
    [[3.0, -4.0], [0.0]],  # a norm of exactly the bound
    [[NAN, 1.0, 0.0], [2.0, 30.0]],
    [[INF, 1.0, -2.0], [2.0, 30.0]],
    [[-INF, 1.0, 0.0], [2.0, 30.0]],
    [[INF, NAN], [2.0]],
    [[1.0, 1.0], [INF, -INF]],
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", EDGES, ids=str)
def test_special_values(tf: Any, sgd: Callable[..., Any], values: list[list[float]], dtype: torch.dtype) -> None:
    """NaN and 0 are in the same elements as in the original's result."""
    grads = [torch.tensor(each, dtype=dtype) for each in values]
    each, everything = clipped(grads, ClipByNorm(5.0)), clipped(grads, ClipByGlobalNorm(5.0))
    assert_as_original(tf, each, lambda given: [tf.clip_by_norm(grad, 5.0) for grad in given], grads)
    assert_as_original(tf, each, lambda given: sgd(clipnorm=5.0)._clip_gradients(given), grads)
    assert_as_original(tf, everything, lambda given: tf.clip_by_global_norm(given, 5.0)[0], grads)
    assert_as_original(tf, everything, lambda given: sgd(global_clipnorm=5.0)._clip_gradients(given), grads)
    if all(math.isfinite(value) for row in values for value in row):
        for result, grad in zip([*each, *everything], [*grads, *grads], strict=True):
            oracle.assert_same_bits(result, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_squares_that_overflow_are_clipped_where_the_original_zeroes(tf: Any, dtype: torch.dtype) -> None:
    """Finite gradients whose squares overflow in the original's dtype: fastclip is better on purpose.

    Clipped each alone, they become 0 in the original; clipped all together, NaN.
    """
    large = 2.0 ** (80 if dtype == torch.float32 else 10)
    grads = [torch.tensor([3 * large, -4 * large], dtype=dtype), torch.tensor([1.0], dtype=dtype)]
    own = [to_tf(tf, grad) for grad in grads]
    assert to_numpy(tf, tf.clip_by_norm(own[0], 2.0)).tolist() == [0.0, 0.0]
    assert np.isnan(to_numpy(tf, tf.clip_by_global_norm(own, 2.0)[0][0])).all()
    tolerance = our_tolerance(dtype)
    each, everything = clipped(grads, ClipByNorm(2.0)), clipped(grads, ClipByGlobalNorm(2.0))
    for result in (each[0], everything[0]):
        oracle.assert_close(result, np.array([1.2, -1.6]), tolerance)
    oracle.assert_same_bits(each[1], grads[1])
    oracle.assert_close(everything[1], np.array([2.0 / (5 * large)]), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_squares_that_underflow_are_clipped_where_the_original_sees_a_norm_of_0(tf: Any, dtype: torch.dtype) -> None:
    """Tiny gradients above an even smaller bound: on purpose, too.

    Clipped each alone, they become 0 in the original, as the product with the bound underflows; all together, they do
    not change.
    """
    tiny = 2.0 ** (-600 if dtype == torch.float64 else -90)
    grad = torch.tensor([3 * tiny, -4 * tiny], dtype=dtype)
    bound = 2.5 * tiny
    assert to_numpy(tf, tf.clip_by_norm(to_tf(tf, grad), bound)).tolist() == [0.0, 0.0]
    everything = to_numpy(tf, tf.clip_by_global_norm([to_tf(tf, grad)], bound)[0][0])
    np.testing.assert_allclose(everything, oracle.as_numpy(grad), rtol=6 * oracle.half_ulp(dtype))
    for rule in (ClipByNorm(bound), ClipByGlobalNorm(bound)):
        oracle.assert_close(clipped([grad], rule)[0], oracle.as_numpy(grad) / 2, our_tolerance(dtype))


# ---- Keras


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bound", [0.05, 1.5, 1000.0])
def test_keras_optimizers(tf: Any, sgd: Callable[..., Any], bound: float, dtype: torch.dtype, seed: int) -> None:
    grads: list[Tensor | None] = [*draw(np.random.default_rng(seed), dtype)]
    grads[1:1] = [None]
    everything = clipped(grads, ClipByGlobalNorm(bound))
    assert_as_original(tf, everything, lambda given: sgd(global_clipnorm=bound)._clip_gradients(given), grads)
    each = clipped(grads, ClipByNorm(bound))
    present = [grad for grad in grads if grad is not None]
    for result, grad in zip(each, present, strict=True):
        assert_as_original(tf, [result], lambda given: sgd(clipnorm=bound)._clip_gradients(given), [grad])
    by_value = sgd(clipvalue=bound)._clip_gradients([to_tf(tf, grad) for grad in present])
    for result, expected in zip(clipped(grads, ClipByValue(-bound, bound)), by_value, strict=True):
        np.testing.assert_array_equal(oracle.as_numpy(result), to_numpy(tf, expected))


KERAS_RULES: list[tuple[str, Callable[[float], ClipByNorm | ClipByGlobalNorm | ClipByValue]]] = [
    ("clipnorm", ClipByNorm),
    ("global_clipnorm", ClipByGlobalNorm),
    ("clipvalue", lambda bound: ClipByValue(-bound, bound)),
]


@pytest.mark.parametrize(("name", "rule"), KERAS_RULES, ids=[name for name, _ in KERAS_RULES])
def test_steps_of_sgd(
    tf: Any, sgd: Callable[..., Any], name: str, rule: Callable[[float], Any], rng: np.random.Generator
) -> None:
    """Three steps of Keras' optimizer and of torch's, with the same gradients, lead to the same weights."""
    keras = importlib.import_module("keras")
    start = [rng.standard_normal(shape).astype(np.float32) for shape in ((4, 3), (3,), (50,))]
    theirs = [keras.Variable(values) for values in start]
    ours = [nn.Parameter(torch.from_numpy(values.copy())) for values in start]
    keras_optimizer = sgd(learning_rate=0.5, momentum=0.9, **{name: 0.7})
    optimizer = torch.optim.SGD(ours, lr=0.5, momentum=0.9)
    for step in range(3):
        grads = [rng.standard_normal(values.shape).astype(np.float32) * 3.0**-step for values in start]
        keras_optimizer.apply([tf.constant(grad) for grad in grads], theirs)
        for parameter, grad in zip(ours, grads, strict=True):
            parameter.grad = torch.from_numpy(grad.copy())
        fastclip.clip_grads_(optimizer.param_groups, rule(0.7))
        optimizer.step()
    # Three steps of six roundings each, of values below 8, and the error of the norms of 65 elements.
    tolerance = 8 * (3 * 6 + 65 / 2) * 2.0**-24
    for parameter, variable in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(oracle.as_numpy(parameter), variable.numpy(), rtol=0, atol=tolerance)
