"""Every PTX instruction that ptxlab knows, compared with results computed from its definition."""

import functools
import subprocess
from pathlib import Path

import pytest
from ptxlab.cases import effects, modules, values
from ptxlab.instructions import JUMPS, TABLE, Decoded, decode
from ptxlab.parse import Instruction


@functools.cache
def _results(batch: str) -> list[list[int]]:
    """The results of a batch's instructions, compiled together, as each compilation takes about a second."""
    return modules.run_values(batch, values.BATCHES[batch])


@pytest.mark.parametrize(
    ("batch", "number"),
    [
        pytest.param(batch, number, id=case.ptx)
        for batch, cases in values.BATCHES.items()
        for number, case in enumerate(cases)
    ],
)
def test_value(batch: str, number: int) -> None:
    case = values.BATCHES[batch][number]
    rows = values.operands(case, modules.ROWS)
    for sources, actual in zip(rows, _results(batch)[number], strict=True):
        expected = case.expected(*sources)
        assert case.agrees(actual, expected), (
            f"{case.ptx} of {[hex(bits) for bits in sources]} gave {actual:#x}, expected {expected or 0:#x}"
        )


@functools.cache
def _outputs(batch: str) -> list[list[list[list[int]]]]:
    return modules.run_effects(batch, effects.BATCHES[batch])


@pytest.mark.parametrize(
    ("batch", "number"),
    [
        pytest.param(batch, number, id=case.name)
        for batch, cases in effects.BATCHES.items()
        for number, case in enumerate(cases)
    ],
)
def test_effect(batch: str, number: int) -> None:
    case = effects.BATCHES[batch][number]
    for warp, actual in enumerate(_outputs(batch)[number]):
        expected = case.expected(effects.inputs(case, warp))
        for lane, words in enumerate(expected):
            wanted = words + [effects.POISON] * (effects.OUTPUTS - len(words))
            pairs = [(hex(got), hex(want)) for got, want in zip(actual[lane], wanted, strict=True) if want is not None]
            assert all(got == want for got, want in pairs), f"lane {lane}, (actual, expected): {pairs}\n{case.ptx}"


_MODULES = {
    **{name: modules.value_module(name, cases) for name, cases in values.BATCHES.items()},
    **{name: modules.effect_module(name, cases) for name, cases in effects.BATCHES.items()},
}


@pytest.mark.parametrize("name", _MODULES)
def test_nvidias_assembler_takes_the_cases(name: str, tmp_path: Path) -> None:
    """The cases are written in real PTX, not only in what ptxlab accepts."""
    tools = Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin"
    assembler = tools / "ptxas-blackwell"
    if not assembler.exists():
        pytest.skip("this Triton's ptxas is older than the target of the cases, sm_100")
    source = tmp_path / "module.ptx"
    source.write_text(_MODULES[name])
    command: list[str | Path] = [assembler, "-O0", "-arch=sm_100a", source, "-o", tmp_path / "module.cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]


def _tested() -> list[Decoded]:
    """The instructions that have a case, decoded."""
    value = (case.ptx for cases in values.BATCHES.values() for case in cases)
    effect = (ptx for cases in effects.BATCHES.values() for case in cases for ptx in case.under_test)
    opcodes = {ptx.split()[1 if ptx.startswith("@") else 0].rstrip(";") for ptx in (*value, *effect)}
    return [decode(Instruction(opcode, ()), 0) for opcode in opcodes if opcode.split(".")[0] not in JUMPS]


@pytest.mark.parametrize("name", TABLE)
def test_every_form_has_a_test(name: str) -> None:
    """Each opcode that the translator knows is tested with each of its types and modifiers."""
    tested = [decoded for decoded in _tested() if decoded.name == name]
    types = {type_.name for decoded in tested for type_ in decoded.types}
    modifiers = {modifier for decoded in tested for modifier in decoded.modifiers}
    assert tested
    assert sorted(TABLE[name].types - types) == []
    assert sorted(TABLE[name].modifiers - modifiers) == []


def test_every_jump_has_a_test() -> None:
    tested = {ptx.split()[0] for cases in effects.BATCHES.values() for case in cases for ptx in case.under_test}
    wanted = {".".join(filter(None, (name, modifier))) for name in JUMPS for modifier in ("", *JUMPS[name])}
    assert wanted <= tested
