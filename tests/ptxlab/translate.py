"""Translate a parsed kernel to the C function that runs one of its warps."""

from dataclasses import dataclass
from pathlib import Path

from .instructions import JUMPS, TABLE, decode
from .operands import TYPES, Operands, c_name
from .parse import Instruction, Label, ParsedKernel, Unsupported

PARAMETER_BYTES = 8  # each parameter has a slot of its own
_HERE = Path(__file__).parent
_RUNTIME = "".join(f'#line 1 "{name}"\n{(_HERE / name).read_text()}' for name in ("alu.c", "simt.c"))
_LANES = 32

_RUN_WARP = """
static __attribute__((noinline)) void run_warp(Warp *warp)
{{
    static const bool MEETING[] = {{{meeting}}}; /* blocks that begin where lanes wait for each other */
    int threads = warp->grid->launch->threads - warp->index * 32;
    const uint32_t lanes = threads >= 32 ? UINT32_MAX : (1u << threads) - 1;
    uint32_t live = lanes; /* those that have not returned */
    int next[32] = {{0}}; /* the block that each lane runs next */
{registers}
    while (live) {{
        int block = INT32_MAX, meeting = INT32_MAX;
        uint32_t active = 0, ended = 0;
        LANES(live) {{
            int *lowest = MEETING[next[lane]] ? &meeting : &block;
            if (next[lane] < *lowest) *lowest = next[lane];
        }}
        if (block == INT32_MAX) block = meeting; /* all lanes wait; if not all at one place, the instruction objects */
        LANES(live) active |= (uint32_t)(next[lane] == block) << lane;
        switch (block) {{
{blocks}
        }}
        LANES(active) ended |= (uint32_t)(next[lane] == LANE_ENDED) << lane;
        live &= ~ended;
    }}
}}
"""


@dataclass
class _Block:
    """A basic block: control enters at its first instruction only, and leaves after its last."""

    instructions: list[tuple[int, Instruction]]  # with their index in the kernel
    meeting: bool = False  # whether lanes wait for each other at the first


def translate(kernel: ParsedKernel, shared_bytes: int) -> str:
    """The C source of a shared library with `run_grid` for this kernel."""
    operands = Operands(kernel.registers, {name: i * PARAMETER_BYTES for i, (name, _) in enumerate(kernel.parameters)})
    unknown = {type_ for type_ in kernel.registers.values() if type_ not in TYPES}
    if unknown:
        raise Unsupported(f"registers of type {', '.join(sorted(unknown))}")
    blocks, labels = _blocks(kernel.body)
    cases = [
        "\n".join((f"case {i}: {{", *_block(block, i, i + 1 < len(blocks), labels, operands), "break; }"))
        for i, block in enumerate(blocks)
    ]
    registers = [
        f"    {TYPES[type_].storage} {c_name(name)}[{_LANES}] = {{0}};" for name, type_ in kernel.registers.items()
    ]
    register_bytes = sum(_LANES * TYPES[type_].bits // 8 for type_ in kernel.registers.values())
    # Without optimisation the compiler keeps temporaries apart, beside the registers.
    stack_bytes = (4 << 20) + 4 * register_bytes
    defines = f"#define SHARED_BYTES {max(shared_bytes, 16)}\n#define STACK_BYTES {stack_bytes}\n"
    return (
        defines
        + _RUNTIME
        + _RUN_WARP.format(
            meeting=", ".join(str(int(block.meeting)) for block in blocks),
            registers="\n".join(registers),
            blocks="\n".join(cases),
        )
    )


def _blocks(body: list[Instruction | Label]) -> tuple[list[_Block], dict[str, int]]:
    """The basic blocks, and the number of the block that starts at each label."""
    targets = {item.operands[0] for item in body if isinstance(item, Instruction) and _name(item) == "bra"}
    blocks: list[_Block] = [_Block([])]
    labels: dict[str, int] = {}
    for index, item in enumerate(body):
        if isinstance(item, Label):
            if item.name in targets:
                if blocks[-1].instructions:
                    blocks.append(_Block([]))
                labels[item.name] = len(blocks) - 1
            continue
        entry = TABLE.get(_name(item))
        if entry is not None and entry.meets:
            if blocks[-1].instructions:
                blocks.append(_Block([]))
            blocks[-1].meeting = True
        blocks[-1].instructions.append((index, item))
        if _name(item) in JUMPS:
            blocks.append(_Block([]))
    return blocks, labels


def _name(instruction: Instruction) -> str:
    return instruction.opcode.split(".")[0]


def _block(block: _Block, number: int, has_successor: bool, labels: dict[str, int], operands: Operands) -> list[str]:
    """The C statements of a block."""
    lines: list[str] = []
    lane_lines: list[str] = []
    after = number + 1 if has_successor else "LANE_ENDED"

    def end_lanes() -> None:
        """Emit the instructions collected so far, lane by lane."""
        if lane_lines:
            lines.extend(("LANES(active) {", *lane_lines, "}"))
            lane_lines.clear()

    for index, instruction in block.instructions:
        guard = operands.guard(instruction)
        if _name(instruction) in JUMPS:
            end_lanes()
            lines.extend(_jump(instruction, number, after, labels, guard))
            return lines
        decoded = decode(instruction, index)
        entry = TABLE[decoded.name]
        try:
            code = entry.emit(decoded, operands)
        except ValueError as error:  # another number of operands
            raise decoded.unsupported() from error
        code = _source_line(instruction) + code
        if entry.whole_warp:
            end_lanes()
            mask = f"0; LANES(active) mask |= (uint32_t)({guard}) << lane;" if guard else "active;"
            lines.append(f"{{ uint32_t mask = {mask}{code}\n}}")
        else:
            lane_lines.append(f"if ({guard}) {{{code}\n}}" if guard else code)
    end_lanes()
    lines.append(f"LANES(active) next[lane] = {after};")
    return lines


def _source_line(instruction: Instruction) -> str:
    """Make the race detector name the line of the Triton source."""
    file, _, line = instruction.location.rpartition(":")[0].rpartition(":")
    return f'\n#line {line} "{file}"\n' if file and line != "0" else "\n"


def _jump(instruction: Instruction, number: int, after: int | str, labels: dict[str, int], guard: str) -> list[str]:
    name, *modifiers = instruction.opcode.split(".")
    if not JUMPS[name].issuperset(modifiers):
        raise Unsupported(str(instruction))
    target: int | str = "LANE_ENDED"
    lines = []
    if name == "bra":
        label = instruction.operands[0]
        if label not in labels:
            raise Unsupported(str(instruction))
        target = labels[label]
        if target <= number:
            lines.append("jump_backward(warp);")
    lines.append(f"LANES(active) next[lane] = {f'{guard} ? {target} : {after}' if guard else target};")
    return lines
