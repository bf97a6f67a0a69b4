"""Real training steps on several processes: the losses are the same as with torch's clipping, where torch can clip."""

from __future__ import annotations

import math
import subprocess
import sys

import paths
import pytest
import torch

pytest.importorskip("torch.distributed.tensor")
if not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

import sharded_trainings as trainings
from processes import Pool
from sharded_trainings import Run

# fp32 against fp32: torch's norms are a few 1e-7 from ours, and steps amplify the difference.
LIKE_TORCH = 1e-5
# fp32 against fp64.
LIKE_FP64 = 1e-4


def check(runs: list[Run], expected: Run, tolerance: float, *, norms: bool = True) -> None:
    """All ranks have the expected losses and norms, and the same norms to the bit."""
    for run in runs:
        assert run.losses == pytest.approx(expected.losses, rel=tolerance)
        assert run.norms == runs[0].norms
        if norms:
            assert run.norms == pytest.approx(expected.norms, rel=tolerance)
    assert min(expected.losses) < 0.9 * expected.losses[0]
    assert all(norm > trainings.BOUND for norm in expected.norms)


@pytest.mark.parametrize("clip", ["fastclip", "halves", "rule", "attached"])
@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "tensor", "fsdp + tensor", "offloaded"])
def test_losses(four: Pool, kind: str, clip: str) -> None:
    runs = four.run(trainings.train, kind, clip)
    check(runs, four.run(trainings.train, kind, "torch")[0], LIKE_TORCH, norms=clip != "attached")
    check(runs, trainings.single("torch"), LIKE_FP64, norms=clip != "attached")


@pytest.mark.parametrize("kind", ["half", "ddp", "ddp, views"])
def test_losses_of_other_kinds(four: Pool, kind: str) -> None:
    check(four.run(trainings.train, kind, "fastclip"), four.run(trainings.train, kind, "torch")[0], LIKE_TORCH)


def test_losses_on_three_dimensions(eight: Pool) -> None:
    runs = eight.run(trainings.train, "hsdp + tensor", "fastclip")
    check(runs, eight.run(trainings.train, "hsdp + tensor", "torch")[0], LIKE_TORCH)
    check(runs, trainings.single("torch"), LIKE_FP64)


@pytest.mark.parametrize("kind", ["fsdp", "hsdp", "fsdp + tensor"])
def test_losses_under_the_infinity_norm(four: Pool, kind: str) -> None:
    """The head's only bias is on one rank, and empty on the others: torch 2.13 hangs with this norm."""
    check(four.run(trainings.train, kind, "fastclip", math.inf), trainings.single("torch", math.inf), LIKE_FP64)


@pytest.mark.parametrize("kind", ["fsdp", "fsdp + tensor", "ddp"])
def test_losses_clipped_by_value(four: Pool, kind: str) -> None:
    runs = four.run(trainings.train, kind, "fastclip, by value")
    for run in runs:
        assert run.losses == pytest.approx(trainings.single("torch, by value").losses, rel=LIKE_FP64)
        assert run.losses == four.run(trainings.train, kind, "torch, by value")[0].losses


@pytest.mark.parametrize("kind", ["fsdp1", "fsdp1, originals"])
def test_fsdp1_clips_itself(four: Pool, kind: str) -> None:
    """`patch()` does not change its method, which works."""
    for replaced, plain in four.run(trainings.patched, kind):
        assert replaced == plain
        assert replaced.losses == pytest.approx(trainings.single("torch").losses, rel=LIKE_FP64)


@pytest.mark.parametrize("originals", [False, True])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_parts_of_fsdp1_are_refused_with_the_remedy(four: Pool, strategy: str, originals: bool) -> None:
    """Without the error, each process would clip by the norm of its own part."""
    for found in four.run(trainings.refused, strategy, originals):
        assert found.pop("changed") == "False"
        assert set(found) == set(trainings.PASSED)
        assert all(
            text.endswith("use the model's own method, model.clip_grad_norm_(max_norm)") for text in found.values()
        )


@pytest.mark.parametrize("originals", [False, True])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_parts_of_fsdp1_are_clipped_by_value(four: Pool, strategy: str, originals: bool) -> None:
    largest = four.run(trainings.by_value, strategy, originals)
    assert max(largest) == pytest.approx(5e-4, rel=1e-6)


@pytest.mark.parametrize("originals", [False, True])
def test_the_norm_of_fsdp1_s_parameters_is_right_where_they_are_not_sharded(four: Pool, originals: bool) -> None:
    for norm, true, clipped in four.run(trainings.not_sharded, originals):
        assert norm == pytest.approx(true, rel=1e-5)
        assert norm > trainings.BOUND
        assert clipped == pytest.approx(trainings.BOUND, rel=1e-5)


@pytest.mark.parametrize("name", ["pipeline", "experts"])
def test_example(four: Pool, name: str) -> None:
    """Stages of a pipeline, and experts on a mesh of their own, are clipped as one model."""
    for distributed, alone in four.run(trainings.example, name, 4):
        assert distributed.losses == pytest.approx(alone.losses, rel=LIKE_FP64)
        assert distributed.norms == pytest.approx(alone.norms, rel=LIKE_FP64)
        assert alone.losses[-1] < 0.9 * alone.losses[0]


def test_examples_start_their_processes() -> None:
    script = paths.EXAMPLES / "pipeline.py"
    done = subprocess.run([sys.executable, script, "--steps", "2"], check=True, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["step", "1", "2"]
    assert "The losses differ by at most" in lines[3]
