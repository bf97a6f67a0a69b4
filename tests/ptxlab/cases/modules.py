"""PTX modules and runs of hand-written instructions."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .. import Kernel  # noqa: TID252 - the package that these cases belong to
from . import effects
from .values import BITS, ValueCase, operands

ROWS = 160  # sets of operands for each instruction
THREADS = 32
_SOURCES = "abce"
_JUNK = 0xA5A5A500  # in the upper bits: an 8-bit operand is in a 32-bit register

_HEADER = """.version 8.8
.target sm_100a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry {name}(.param .u64 inputs, .param .u64 outputs)
.reqntid {threads}
{{
    .reg .b32 %index, %cta;
    .reg .b64 %in, %out;
    ld.param.u64 %in, [inputs];
    ld.param.u64 %out, [outputs];
    mov.u32 %index, %tid.x;
    mov.u32 %cta, %ctaid.x;
    mad.lo.s32 %index, %cta, {threads}, %index;
    mad.wide.u32 %in, %index, {input_bytes}, %in;
    mad.wide.u32 %out, %index, {output_bytes}, %out;
"""


def module(name: str, body: str, *, input_bytes: int, output_bytes: int, threads: int = THREADS) -> str:
    """A PTX module; its body finds the address of its thread's input in `%in`, and of its output in `%out`."""
    header = _HEADER.format(name=name, input_bytes=input_bytes, output_bytes=output_bytes, threads=threads)
    return f"{header}{body}    ret;\n}}\n"


def value_module(name: str, cases: Sequence[ValueCase]) -> str:
    """One kernel for all cases; inputs are [case][row][source], outputs [case][row], 8 bytes each."""
    body = ""
    for number, case in enumerate(cases):
        place, result_place = number * ROWS * 8 * len(_SOURCES), number * ROWS * 8
        lines = []
        for i, (source, type_) in enumerate(zip(_SOURCES, case.sources, strict=False)):
            address = f"[%in+{place + 8 * i}]"
            if type_ == "pred":
                lines += [f".reg .pred {source}", ".reg .b32 %" + source, f"ld.global.b32 %{source}, {address}"]
                lines.append(f"setp.ne.b32 {source}, %{source}, 0")
            else:
                lines += [f".reg .b{_register(type_)} {source}", f"ld.global.b{_register(type_)} {source}, {address}"]
        address = f"[%out+{result_place}]"
        if case.result == "pred":
            lines += [".reg .pred d", ".reg .b32 %d", case.ptx, "selp.b32 %d, 1, 0, d", f"st.global.b32 {address}, %d"]
        else:
            width = _register(case.result)
            lines += [f".reg .b{width} d", case.ptx, f"st.global.b{width} {address}, d"]
        body += "    {\n" + "".join(f"        {line};\n" for line in lines) + "    }\n"
    return module(name, body, input_bytes=8 * len(_SOURCES), output_bytes=8)


def _register(type_: str) -> int:
    """The width of the register for a type; there are no registers of 8 bits."""
    return 32 if BITS[type_] == 8 else BITS[type_]


def run_values(name: str, cases: Sequence[ValueCase]) -> list[list[int]]:
    """The results of each case, row by row."""
    inputs = np.zeros((len(cases), ROWS, len(_SOURCES)), np.uint64)
    for number, case in enumerate(cases):
        junk = [_JUNK if BITS[type_] == 8 else 0 for type_ in case.sources]
        for i, row in enumerate(operands(case, ROWS)):
            inputs[number, i, : len(row)] = [bits | above for bits, above in zip(row, junk, strict=True)]
    outputs = np.zeros((len(cases), ROWS), np.uint64)
    kernel = Kernel(value_module(name, cases), optimize="-O0")
    run(kernel, inputs, outputs, programs=ROWS // THREADS)
    masks = ((1 << BITS[case.result]) - 1 for case in cases)
    return [[int(bits) & mask for bits in row] for row, mask in zip(outputs, masks, strict=True)]


def run(kernel: Kernel, inputs: NDArray[np.uint64], outputs: NDArray[np.uint64], *, programs: int) -> None:
    """Launch a kernel of `module` on arrays; it may access nothing else."""
    arrays = (inputs, outputs)
    addresses = [array.ctypes.data for array in arrays]
    kernel.launch((programs,), addresses, [(a, array.nbytes) for a, array in zip(addresses, arrays, strict=True)])


EFFECT_WARPS = 4  # each with its own inputs


def effect_module(name: str, cases: Sequence[effects.EffectCase]) -> str:
    """One kernel for all cases; inputs and outputs are [case][warp][lane][word]."""
    body = effects.SCRATCH + ".reg .b64 %src, %dst;\n.reg .b32 %smem;\n"
    body += f"mov.u32 %smem, %tid.x;\nmul.lo.s32 %smem, %smem, {8 * effects.INPUTS};\n"
    lanes = EFFECT_WARPS * effects.LANES
    for number, case in enumerate(cases):
        body += f"add.s64 %src, %in, {number * lanes * 8 * effects.INPUTS};\n"
        body += f"add.s64 %dst, %out, {number * lanes * 8 * effects.OUTPUTS};\n"
        body += case.ptx.replace("$LABEL", f"$L{number}")
    return module(name, body, input_bytes=8 * effects.INPUTS, output_bytes=8 * effects.OUTPUTS)


def run_effects(name: str, cases: Sequence[effects.EffectCase]) -> list[list[list[list[int]]]]:
    """The outputs by case, warp, lane and word."""
    shape = (len(cases), EFFECT_WARPS, effects.LANES)
    inputs, outputs = _aligned((*shape, effects.INPUTS)), _aligned((*shape, effects.OUTPUTS))
    outputs[:] = effects.POISON
    for number, case in enumerate(cases):
        for warp in range(EFFECT_WARPS):
            inputs[number, warp, :, : len(case.sources)] = effects.inputs(case, warp)
    shared_bytes = THREADS * 8 * effects.INPUTS
    run(Kernel(effect_module(name, cases), shared_bytes, optimize="-O0"), inputs, outputs, programs=EFFECT_WARPS)
    results: list[list[list[list[int]]]] = outputs.tolist()
    return results


def _aligned(shape: tuple[int, ...]) -> NDArray[np.uint64]:
    """An array that starts at a multiple of 64 bytes, as the widest accesses need."""
    count = int(np.prod(shape))
    memory = np.zeros(count + 8, np.uint64)
    start = -memory.ctypes.data % 64 // 8
    return memory[start : start + count].reshape(shape)
