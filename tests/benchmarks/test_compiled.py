"""The machine code of the kernels for every target is good, and the command that reads it finds faults."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import importlib
from types import ModuleType
from typing import Any

import paths
import pytest

triton: Any = pytest.importorskip("triton")
tl: Any = pytest.importorskip("triton.language")

H100_KB = 25  # that must be in flight on an SM to use the whole bandwidth, by Little's law: 15 to 25 KB
INSTRUCTIONS = 70  # for each 16 bytes loaded; an H100 can issue only 141 in the time of that load (docs/performance.md)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(paths.ROOT)
    return importlib.import_module("benchmarks.compiled")


def test_no_kernel_spills_and_every_access_is_wide(compiled: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert compiled.main([]) == 0
    table = capsys.readouterr().out
    for name in compiled.VARIANTS:
        for target in compiled.TARGETS:
            assert f"{name:22} {target:7} " in table
    assert table.endswith("The loops over tiles spill nothing that counts, and their every access is 16 bytes wide.\n")


@pytest.mark.parametrize("name", ["reduce, two", "reduce, max", "tensor norms", "apply", "clamp"])
def test_memory_is_the_bottleneck(compiled: ModuleType, name: str) -> None:
    """On an H100, enough bytes are in flight, and the instructions take less time than the loads."""
    built = compiled.compile_variant(compiled.VARIANTS[name], compiled.TARGETS["sm_90"])
    for loop in built.loops:
        assert loop.instructions / len(loop.loads) < INSTRUCTIONS, loop
        assert loop.under_way * 16 * 32 * compiled.WARPS * built.programs >= H100_KB * 1024, loop


@triton.jit
def scale_with_a_mask_for_each_element(rows, fp32_end: tl.int64):
    """Wrong in one point: its mask is not constant along a vector, which makes every access scalar."""
    rows = rows.to(tl.pointer_type(tl.int64))
    lanes = tl.arange(0, 1024)
    for index in range(tl.program_id(0), fp32_end, tl.num_programs(0)):
        x = tl.multiple_of(tl.load(rows + 2 * index).to(tl.pointer_type(tl.float32)), 16)
        numel = tl.load(rows + 2 * index + 1)
        for start in range(0, numel, 1024):
            mask = start + lanes < numel
            tl.store(x + start + lanes, tl.load(x + start + lanes, mask=mask) * 2, mask=mask)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_narrow_accesses_are_found(
    compiled: ModuleType, target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    variant = compiled.Variant(scale_with_a_mask_for_each_element, {}, ("fp32",))
    monkeypatch.setattr(compiled, "VARIANTS", {"narrow": variant})
    assert compiled.main([target]) == 1
    assert capsys.readouterr().out.endswith(f"narrow, {target}: narrow accesses for fp32\n")


def test_spills_are_found(compiled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiled.table.LAUNCH_OPTIONS, "maxnreg", 24)
    built = compiled.compile_variant(compiled.VARIANTS["reduce, two"], compiled.TARGETS["sm_90"])
    assert any("spills in the loop for" in fault for fault in built.faults)


def test_code_of_another_form_is_an_error(compiled: ModuleType) -> None:
    """A loop that belongs to no known dtype is an error; it is not ignored."""
    variant = compiled.Variant(compiled.apply_kernel, {}, ("fp32", "bf16"))
    with pytest.raises(RuntimeError, match="8 outermost loops in the machine code, 2 in the source"):
        compiled.compile_variant(variant, compiled.TARGETS["sm_90"])
    variant = compiled.Variant(
        compiled.apply_kernel, {}, (*compiled.VARIANTS["apply"].loops[:4], "fp32", "bf16", "fp16", "fp64")
    )
    with pytest.raises(RuntimeError, match="the loop taken for fp32's reads elements of 8 bytes"):
        compiled.compile_variant(variant, compiled.TARGETS["sm_90"])


def test_unknown_target(compiled: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no such target: sm_1"):
        compiled.main(["sm_1"])
