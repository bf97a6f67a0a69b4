"""Compile the kernels for every target, and read from the machine code what they cost, without running them.

    python -m benchmarks.compiled [sm_90 gfx942 ...]

It needs no GPU. For each kernel and target, the table has the registers of a thread, spilled bytes, shared memory, and
the programs on one SM (or CU): the number that is launched for it, or fewer if fewer fit. For each dtype, it has
figures of the loop over tiles: the bytes of every global load and store, the loads in flight at once, and the
instructions for each 16 bytes loaded and for each element.

The exit status is 1 if such a loop has a load or store of less than 16 bytes, or if more than one in a hundred of its
instructions is a spill. A register that is spilled once a chunk, so that one more program fits on an SM, costs nothing.
Every version of ptxas does that in some kernel.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastclip.backends.triton import PROGRAMS_PER_SM
from fastclip.kernels import table
from fastclip.kernels.adapt import adapt_kernel
from fastclip.kernels.apply import apply_kernel
from fastclip.kernels.clamp import clamp_kernel
from fastclip.kernels.reduce import reduce_kernel, tensor_norms_kernel
from fastclip.kernels.units import clip_units_kernel

WARPS: int = table.LAUNCH_OPTIONS["num_warps"]
VECTOR_BYTES = 16


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        gpu: Triton's name of it.
        warps: The most warps in a quarter of an SM (on AMD: wavefronts in a SIMD of a CU), whatever their registers.
    """

    gpu: GPUTarget
    warps: int

    @property
    def is_nvidia(self) -> bool:
        """Whether the machine code is NVIDIA's SASS, and not AMD's."""
        return bool(self.gpu.backend == "cuda")

    def programs(self, registers: int) -> int:
        """The programs that fit on an SM or CU. It has four quarters, each with 512 registers a lane."""
        fitting = 512 // (-(-registers // 8) * 8)
        return 4 * min(self.warps, fitting) // WARPS


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 16),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 16),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 16),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 12),
    "gfx90a": Target(GPUTarget("hip", "gfx90a", 64), 8),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 8),
}


@dataclass(frozen=True)
class Variant:
    """A kernel with its compile-time arguments.

    Attributes:
        loops: The element type of each outermost loop, in the order of the source.
    """

    kernel: Any
    constants: dict[str, Any]
    loops: tuple[str, ...]


DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp64": 8, "partials": 8}
"""The bytes of an element. `partials` are the chunk norms, which are combined in fp64."""

GROUPS = "groups"  # a loop over groups, of small tensors or of a rule: it reads one by one, and is not checked
_GROUPS = (GROUPS,) * 4
_IN_ORDER = ("fp32", "bf16", "fp16", "fp64")
VARIANTS = {
    **{
        f"reduce, {kind}": Variant(
            reduce_kernel,
            {"KIND": kind, "NORM": tl.float32, "inv_scale": None, "found_inf": None},
            (*_IN_ORDER, *_GROUPS, "partials"),
        )
        for kind in ("two", "one", "zero", "max", "min", "power")
    },
    "reduce, two, unscaling": Variant(
        reduce_kernel, {"KIND": "two", "NORM": tl.float32}, (*_IN_ORDER, *_GROUPS, "partials")
    ),
    "tensor norms": Variant(tensor_norms_kernel, {}, ("partials",)),
    "apply": Variant(apply_kernel, {}, (*_GROUPS, *_IN_ORDER[::-1])),
    "clamp": Variant(clamp_kernel, {"bounds": None, "flags": None}, (*_IN_ORDER, *_GROUPS)),
    "clamp, watched": Variant(clamp_kernel, {"bounds": None}, (*_IN_ORDER, *_GROUPS)),
    "clamp, each its bounds": Variant(clamp_kernel, {"flags": None}, (*_IN_ORDER, *_GROUPS)),
    "same, watched": Variant(clamp_kernel, {}, (*_IN_ORDER, *_GROUPS)),
    "clip units": Variant(clip_units_kernel, {}, _IN_ORDER),
    **{
        f"adapt, {kind}": Variant(adapt_kernel, {"KIND": kind, "LANES": lanes}, (GROUPS,))
        for kind, lanes in (("quantile", 1024), ("z_score", 512), ("ema", 512))
    },
}


@dataclass(frozen=True)
class Loop:
    """The loop over tiles of one element type.

    Attributes:
        loads: The bytes of each global load of a lane.
        stores: The bytes of each global store of a lane.
        under_way: The number of loads that a lane issues before it uses the first of them.
        spills: The number of instructions that spill a register to memory or reload it.
        instructions: The number of all instructions, slow paths included.
    """

    dtype: str
    loads: list[int]
    stores: list[int]
    under_way: int
    spills: int
    instructions: int

    @property
    def faults(self) -> list[str]:
        """The errors of this loop."""
        spills = [f"{self.spills} spills in the loop for {self.dtype}"] if 100 * self.spills > self.instructions else []
        narrow = [] if self.is_wide else [f"narrow accesses for {self.dtype}"]
        return spills + narrow

    @property
    def is_wide(self) -> bool:
        """Whether every access is one of 16 bytes."""
        return {*self.loads, *self.stores} == {VECTOR_BYTES}


@dataclass(frozen=True)
class Compiled:
    """The figures of a kernel, from its machine code.

    Attributes:
        registers: The registers of a thread.
        spilled: The bytes of memory to which a thread spills registers.
        spilled_scalars: The scalar registers (AMD) that are spilled to lanes of a vector register, not to memory.
        shared: The bytes of shared memory of a program.
        programs: The programs on an SM or CU: the number that is launched for it, or fewer if fewer fit.
    """

    registers: int
    spilled: int
    spilled_scalars: int
    shared: int
    programs: int
    loops: list[Loop]

    @property
    def faults(self) -> list[str]:
        """The errors of all loops."""
        return [fault for loop in self.loops for fault in loop.faults]


# ---- Compiling


def compile_variant(variant: Variant, target: Target) -> Compiled:
    """Compile a variant ahead of time, with the same specialisation as a launch, and read the machine code."""
    kernel = variant.kernel
    constants = {p.name: variant.constants[p.name] for p in kernel.params if p.name in variant.constants}
    # A parameter without an annotation is an address.
    signature = {p.name: "constexpr" if p.name in constants else p.annotation_type or "i64" for p in kernel.params}
    source = ASTSource(kernel, signature, constants)
    built = triton.compile(source, target=target.gpu, options=table.LAUNCH_OPTIONS)
    if target.is_nvidia:
        usage, code = _disassemble(built.asm["cubin"])
        registers, spilled, scalars = _number("REG:", usage), _number("STACK:", usage), 0
    else:
        usage = code = built.asm["amdgcn"]
        registers, scalars = _number(r"\.vgpr_count:\s*", usage), _number(r"\.sgpr_spill_count:\s*", usage)
        spilled = _number(r"\.private_segment_fixed_size:\s*", usage)
    loops = tile_loops(instructions_of(code), variant.loops)
    fitting = target.programs(registers)
    programs = min(fitting, PROGRAMS_PER_SM.get(kernel.fn.__name__, fitting))
    return Compiled(registers, spilled, scalars, built.metadata.shared, programs, loops)


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """Return resource usage and machine code, by the tools that come with Triton."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = (
            subprocess.run([tools / tool, option, file], capture_output=True, text=True, check=True).stdout  # noqa: S603
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    return usage, code


def _number(key: str, text: str) -> int:
    found = re.search(rf"{key}(\d+)", text)
    if not found:
        raise RuntimeError(f"the compiler's output has no {key!r}")
    return int(found[1])


# ---- Reading machine code

_WIDTHS = {
    "128": 16,
    "64": 8,
    "U16": 2,
    "S16": 2,
    "U8": 1,
    "S8": 1,
    "dwordx4": 16,
    "dwordx3": 12,
    "dwordx2": 8,
    "ushort": 2,
    "sshort": 2,
    "short": 2,
    "ubyte": 1,
    "sbyte": 1,
    "byte": 1,
}
"""The bytes of an access, by a part of its opcode. An opcode without such a part accesses 4 bytes."""


@dataclass(frozen=True)
class Instruction:
    """One instruction of SASS or of AMD's machine code.

    Attributes:
        text: The instruction without its address.
        labels: The labels in front of it.
    """

    text: str
    labels: tuple[str, ...]

    @property
    def target(self) -> str | None:
        """The label that it may jump to. ptxas may exit a loop by a CALL to a label, which does not return."""
        found = re.search(r"\b(?:BRA|CALL|s_c?branch).*?(\.L\w+)", self.text)
        return found[1] if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow it."""
        return not re.match(r"((BRA|CALL)[.\w]* `\(\.L|EXIT|RET|s_branch|s_endpgm|s_setpc)", self.text)

    @property
    def is_spill(self) -> bool:
        """Whether it moves a value between a register and the thread's local memory."""
        return bool(re.search(r"\b(LDL|STL|scratch_(load|store))", self.text))

    @property
    def load(self) -> int:
        """The bytes that a lane loads from global memory; 0 if it is no load."""
        return self._bytes(r"LDG|(?:global|buffer|flat)_load")

    @property
    def store(self) -> int:
        """The bytes that a lane stores to global memory; 0 if it is no store."""
        return self._bytes(r"STG|(?:global|buffer|flat)_store")

    def _bytes(self, kind: str) -> int:
        found = re.search(rf"\b(?:{kind})\S*", self.text)
        if not found:
            return 0
        return next((_WIDTHS[part] for part in re.split(r"[._]", found[0]) if part in _WIDTHS), 4)

    @property
    def registers(self) -> list[int]:
        """The vector registers in its text, the written one first."""
        ranges = re.findall(r"\bR(\d+)\b|\bv(\d+)\b|\bv\[(\d+):(\d+)\]", self.text)
        return [n for r, v, first, last in ranges for n in range(int(r or v or first), int(r or v or last) + 1)]


def instructions_of(code: str) -> list[Instruction]:
    """Return the instructions of the first function in nvdisasm's or LLVM's text."""
    found: list[Instruction] = []
    labels: list[str] = []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L\w+):", line)
        sass = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.+?)\s*;", line)
        amd = re.match(r"\t([a-z]\w+(?:\s[^;]*)?)", line)
        if label:
            labels.append(label[1])
        elif sass or amd:
            text = (sass or amd)[1].strip()  # type: ignore[index]
            predicated = "@" in line.split(text)[0]
            found.append(Instruction(f"@ {text}" if predicated else text, tuple(labels)))
            labels = []
        elif line.startswith(".Lfunc_end"):
            break
    return found


def _natural_loops(code: Sequence[Instruction]) -> list[set[int]]:
    """Return the loops of a function as sets of positions. A jump back to a dominator closes a loop."""
    position = {label: i for i, instruction in enumerate(code) for label in instruction.labels}
    following: list[list[int]] = []
    for i, instruction in enumerate(code):
        successors = [i + 1] if instruction.falls_through and i + 1 < len(code) else []
        if instruction.target in position:
            successors.append(position[instruction.target])
        following.append(successors)
    before: list[list[int]] = [[] for _ in code]
    for i, successors in enumerate(following):
        for successor in successors:
            before[successor].append(i)
    dominators = _immediate_dominators(following, before)
    loops: dict[int, set[int]] = {}
    for end, successors in enumerate(following):
        for header in successors:
            if end in dominators and len(before[header]) > 1 and _dominates(header, end, dominators):
                body = loops.setdefault(header, {header})
                waiting = [end]
                while waiting:
                    inside = waiting.pop()
                    if inside not in body:
                        body.add(inside)
                        waiting += [i for i in before[inside] if i in dominators]
    return [loops[header] for header in sorted(loops)]


def _immediate_dominators(following: list[list[int]], before: list[list[int]]) -> dict[int, int]:
    """Return the immediate dominator of each reachable position.

    The algorithm is that of Cooper, Harvey and Kennedy, "A simple, fast dominance algorithm".
    """
    order = _postorder(following)
    number = {node: n for n, node in enumerate(order)}
    dominators = {0: 0}
    changed = True
    while changed:
        changed = False
        for node in reversed(order[:-1]):
            known = [i for i in before[node] if i in dominators]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    if number[new] < number[other]:
                        new = dominators[new]
                    else:
                        other = dominators[other]  # noqa: PLW2901 - both climb until they meet
            changed |= dominators.get(node) != new
            dominators[node] = new
    return dominators


def _postorder(following: list[list[int]]) -> list[int]:
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(following[0]))]
    while stack:
        node, successors = stack[-1]
        successor = next((s for s in successors if s not in seen), None)
        if successor is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(successor)
            stack.append((successor, iter(following[successor])))
    return order


def _dominates(header: int, node: int, dominators: dict[int, int]) -> bool:
    while node not in (header, 0):
        node = dominators[node]
    return node == header


def tile_loops(code: Sequence[Instruction], dtypes: Sequence[str]) -> list[Loop]:
    """Return the innermost loop over tiles of each outermost loop that loads from global memory.

    Args:
        code: The kernel's instructions.
        dtypes: The element types of the outermost loops, in the order of the code.

    Raises:
        RuntimeError: The loops of the code do not match those of the source.
    """
    loops = [loop for loop in _natural_loops(code) if any(code[i].load for i in loop)]
    outermost = [loop for loop in loops if not any(loop < other for other in loops)]
    if len(outermost) != len(dtypes):
        raise RuntimeError(f"{len(outermost)} outermost loops in the machine code, {len(dtypes)} in the source")
    found = []
    for dtype, outer in zip(dtypes, outermost, strict=True):
        if dtype == GROUPS:
            continue
        # Only edges are read element by element, so the narrowest access has the size of an element. (The partials'
        # edge may be outside the loop.)
        size = min(width for i in outer for width in (code[i].load, code[i].store) if width)
        if size != DTYPES[dtype] and dtype != "partials":
            raise RuntimeError(f"the loop taken for {dtype}'s reads elements of {size} bytes")
        innermost = [loop for loop in loops if loop <= outer and not any(other < loop for other in loops)]
        # If the compiler unrolled the loop, take the unrolled one, and not the loop over the remainder.
        tiles = max(innermost, key=lambda loop: sum(bool(code[i].load) for i in loop))
        found.append(_loop(dtype, [code[i] for i in sorted(tiles)]))
    return found


def _loop(dtype: str, code: Sequence[Instruction]) -> Loop:
    loads = [instruction.load for instruction in code if instruction.load]
    stores = [instruction.store for instruction in code if instruction.store]
    spills = sum(instruction.is_spill for instruction in code)
    return Loop(dtype, loads, stores, _under_way(code), spills, len(code))


def _under_way(code: Sequence[Instruction]) -> int:
    """The largest number of loads in flight, of which none is used yet."""
    most = 0
    pending: list[set[int]] = []
    for instruction in code:
        if instruction.load:
            first = instruction.registers[0]
            pending.append(set(range(first, first + instruction.load // 4)))
            most = max(most, len(pending))
        elif any(registers.intersection(instruction.registers) for registers in pending):
            pending.clear()
    return most


# ---- The table

_HEADER = (
    f"{'kernel':22} {'target':7} {'reg':>4} {'spill':>5} {'shared':>6} {'programs':>8}  "
    f"{'dtype':8} {'loads':>7} {'stores':>7} {'KB ahead':>8} {'instr/16 B':>10} {'instr/element':>13}"
)


def rows(name: str, target: str, compiled: Compiled) -> Iterator[str]:
    """Yield the lines of the table for one kernel and target."""
    head = f"{name:22} {target:7} {compiled.registers:4} {compiled.spilled:5} {compiled.shared:6} {compiled.programs:8}"
    for loop in compiled.loops:
        lanes = WARPS * TARGETS[target].gpu.warp_size * compiled.programs
        ahead = loop.under_way * VECTOR_BYTES * lanes / 1024
        each = loop.instructions / len(loop.loads)
        yield (
            f"{head}  {loop.dtype:8} {_widths(loop.loads):>7} {_widths(loop.stores):>7} {ahead:8.0f} {each:10.1f} "
            f"{each * DTYPES[loop.dtype] / VECTOR_BYTES:13.1f}"
        )
    if not compiled.loops:
        yield head
    if compiled.spilled_scalars:
        yield (
            f"{'':22} note: {compiled.spilled_scalars} scalar registers are kept in lanes of a vector register. No "
            "memory is touched: a power's exp2 and log2 in fp64 have more constants than there are scalar registers"
        )


def _widths(widths: Sequence[int]) -> str:
    return " ".join(f"{widths.count(width)}x{width}" for width in sorted(set(widths))) or "-"


def main(names: Sequence[str]) -> int:
    """Print the table for the named targets, or for all.

    Returns:
        1 if a loop spills or has a narrow access, else 0.
    """
    unknown = set(names) - set(TARGETS)
    if unknown:
        sys.exit(f"no such target: {', '.join(sorted(unknown))}. There are: {', '.join(TARGETS)}")
    print(f"Triton {triton.__version__}, {WARPS} warps a program\n{_HEADER}")
    faults = []
    for name, variant in VARIANTS.items():
        for target in names or TARGETS:
            compiled = compile_variant(variant, TARGETS[target])
            print(*rows(name, target, compiled), sep="\n", flush=True)
            faults += [f"{name}, {target}: {fault}" for fault in compiled.faults]
    print(
        *(faults or ["The loops over tiles spill nothing that counts, and their every access is 16 bytes wide."]),
        sep="\n",
    )
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
