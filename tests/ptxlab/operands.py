"""PTX types and operands as C: conversion of a register's bits to a value, and of a value to bits."""

import functools
import re
from dataclasses import dataclass

from .parse import Instruction, Unsupported


@dataclass(frozen=True)
class Type:
    """A PTX type.

    A packed type (`f16x2`) has an `element`. All others have the C type in which values are computed, and the C
    functions that decode bits to a value and encode a value as bits (none if bits and value are the same integer).
    """

    name: str
    bits: int
    value: str = ""
    decode: str = ""
    encode: str = ""
    element: str = ""

    @property
    def is_float(self) -> bool:
        """Whether values are floating-point numbers."""
        return bool(self.decode)

    @property
    def is_signed(self) -> bool:
        """Whether values are signed integers."""
        return self.name.startswith("s")

    @property
    def storage(self) -> str:
        """The C type of the bits."""
        return f"uint{max(self.bits, 8)}_t"


TYPES = {
    **{f"{kind}{bits}": Type(f"{kind}{bits}", bits, f"uint{bits}_t") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": Type(f"s{bits}", bits, f"int{bits}_t") for bits in (8, 16, 32, 64)},
    "pred": Type("pred", 1, "bool"),
    "f16": Type("f16", 16, "float", "f16_from_bits", "f16_bits"),
    "bf16": Type("bf16", 16, "float", "bf16_from_bits", "bf16_bits"),
    "f32": Type("f32", 32, "float", "f32_from_bits", "f32_bits"),
    "f64": Type("f64", 64, "double", "f64_from_bits", "f64_bits"),
    "f16x2": Type("f16x2", 32, element="f16"),
    "bf16x2": Type("bf16x2", 32, element="bf16"),
    "f32x2": Type("f32x2", 64, element="f32"),
}

SPECIAL_REGISTERS = {
    "%tid.x": "(warp->index * 32 + lane)",
    "%tid.y": "0",
    "%tid.z": "0",
    "%ntid.x": "warp->grid->launch->threads",
    "%ntid.y": "1",
    "%ntid.z": "1",
    **{f"%ctaid.{axis}": f"warp->program[{i}]" for i, axis in enumerate("xyz")},
    **{f"%nctaid.{axis}": f"warp->grid->launch->grid[{i}]" for i, axis in enumerate("xyz")},
    "%laneid": "lane",
    "%warpid": "warp->index",
    "%cluster_ctarank": "0",
    "%clock64": "nanoseconds()",
    "%globaltimer": "nanoseconds()",
}

_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?")
_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})")
_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


@dataclass(frozen=True)
class Address:
    """`[base+offset]`."""

    base: str
    offset: int

    @classmethod
    def parse(cls, operand: str) -> "Address":
        """Parse an address operand."""
        match = _ADDRESS.fullmatch(operand)
        if not match:
            raise Unsupported(f"address {operand}")
        return cls(match[1], int(match[2] or "0", 0))


def vector(operand: str) -> list[str]:
    """The elements of `{a, b}`; a scalar is a vector of one."""
    if not operand.startswith("{"):
        return [operand]
    return [element.strip() for element in operand[1:-1].split(",")]


@functools.cache
def c_name(register: str) -> str:
    """The C array for a register, with an entry for each lane."""
    return "r_" + re.sub(r"\W", "_", register.lstrip("%"))


class Operands:
    """Reads and writes the operands of one kernel's instructions, as C expressions over `lane` and `warp`."""

    def __init__(self, registers: dict[str, str], parameters: dict[str, int]) -> None:
        """Take the type names of the registers and the byte offsets of the kernel's parameters."""
        self.registers = registers
        self.parameters = parameters

    def register(self, name: str) -> str:
        """The C variable of a register of the current lane."""
        if name not in self.registers:
            raise Unsupported(f"register {name}")
        return f"{c_name(name)}[lane]"

    def bits(self, operand: str, bits: int) -> str:
        """An operand's bits, as an unsigned C integer of the given width."""
        cast = f"(uint{bits}_t)"
        if operand in self.registers:
            return f"{cast}{self.register(operand)}"
        if match := _FLOAT.fullmatch(operand):
            return f"{cast}0x{match[1] or match[2]}ull"
        if _INTEGER.fullmatch(operand):
            # An unsigned C literal has a type that is wide enough; a minus sign then wraps, as in PTX.
            return f"{cast}{operand.rstrip('U')}ull"
        if operand in SPECIAL_REGISTERS:
            return f"{cast}({SPECIAL_REGISTERS[operand]})"
        if operand == "global_smem":  # shared memory has its own addresses, from 0
            return f"{cast}0"
        raise Unsupported(f"operand {operand}")

    def read(self, operand: str, type_: Type, *, flush: bool = False) -> str:
        """An operand's value. `flush`: a subnormal f32 reads as zero (`.ftz`)."""
        if type_.name == "pred":
            return self.predicate(operand)
        bits = self.bits(operand, type_.bits)
        if not type_.is_float:
            return f"({type_.value})({bits})" if type_.is_signed else bits
        value = f"{type_.decode}({bits})"
        return f"flush({value})" if flush and type_.name == "f32" else value

    def predicate(self, operand: str) -> str:
        """A predicate's value; it may be negated."""
        if operand.startswith("!"):
            return f"!{self.register(operand[1:])}"
        if _INTEGER.fullmatch(operand):
            return f"({operand} != 0)"
        return self.register(operand)

    def write(self, operand: str, value: str, type_: Type) -> str:
        """The assignment of a value to a register; `_` discards it."""
        if operand == "_":
            return f"(void)({value});"
        target = self.register(operand)
        if type_.name == "pred":
            return f"{target} = ({value}) != 0;"
        if type_.is_float:
            return f"{target} = {type_.encode}({value});"
        # A narrow signed value is sign-extended to a wider register.
        return f"{target} = ({type_.value})({value});"

    def address(self, operand: str) -> str:
        """The address that `[base+offset]` stands for."""
        address = Address.parse(operand)
        return f"({self.bits(address.base, 64)} + ({address.offset}))"

    def guard(self, instruction: Instruction) -> str:
        """The condition for a lane to execute the instruction, or an empty string."""
        return self.predicate(instruction.guard) if instruction.guard else ""
