"""Instructions that use memory, other lanes or control flow: the memory that a warp must leave behind.

A case's PTX finds 32 bytes of input for its lane at `%src` and writes its results, 8 bytes each, from `%dst` on. It has
32 bytes of shared memory at `%smem`, the scratch registers below, and its own labels with `LABEL` in their names.
"""

import functools
import itertools
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .exact import FORMATS, add, wrap
from .values import BITS, operand

LANES = 32
_SCOPES = ("cta", "cluster", "gpu", "sys")
INPUTS, OUTPUTS = 4, 8  # 8-byte words for each lane
POISON = 0xA5A5_5A5A_DEAD_BEEF  # in the outputs before

SCRATCH = """.reg .b64 %l<9>;
.reg .b32 %w<9>;
.reg .b16 %h<9>;
.reg .pred %p<5>;
"""

Row = Sequence[int]
Words = list[int | None]
Expected = Callable[[list[Row]], list[Words]]


@dataclass(frozen=True)
class EffectCase:
    """Some PTX, and the outputs of each lane; a shorter row means that the rest does not change."""

    name: str
    under_test: tuple[str, ...]  # the instructions that the case is for
    ptx: str
    expected: Expected  # of all lanes' inputs; None where a word is open
    sources: tuple[str, ...] = ("u64",) * INPUTS


def inputs(case: EffectCase, seed: int) -> list[Row]:
    """A warp's inputs."""
    source = random.Random(f"{case.name}{seed}")  # noqa: S311 - reproducible, not secret
    return [[operand(type_, source) for type_ in case.sources] for _ in range(LANES)]


def _each_lane(function: Callable[[Row], Words]) -> Expected:
    return lambda rows: [function(row) for row in rows]


def _bytes(row: Row) -> bytes:
    return struct.pack(f"<{len(row)}Q", *row)


def _element(row: Row, offset: int, type_: str) -> int:
    size = BITS[type_] // 8
    value = int.from_bytes(_bytes(row)[offset : offset + size], "little")
    return wrap(wrap(value, 8 * size, signed=type_.startswith("s")), 64)  # as a 64-bit register holds it


_MEMORY_TYPES = [f"{kind}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)] + ["f32", "f64"]
_PREFIX = {8: "l", 16: "h", 32: "w", 64: "l"}  # any register can hold 8-bit values


def _registers(type_: str, count: int) -> list[str]:
    """Registers of the type's own width: a vector's, and a float's, must fit."""
    prefix = "h" if type_.endswith("8") else _PREFIX[BITS[type_]]
    return [f"%{prefix}{i}" for i in range(count)]


def _braced(registers: list[str]) -> str:
    return registers[0] if len(registers) == 1 else f"{{{', '.join(registers)}}}"


_VECTORS = [("v2", "b8"), ("v4", "b8"), ("v2", "b16"), ("v4", "b16"), ("v2", "b32"), ("v4", "b32"), ("v8", "b32")]
_VECTORS += [("v2", "b64"), ("v4", "b64"), ("v4", "f32"), ("v2", "f64"), ("v2", "u32"), ("v2", "s64")]


def _store_all(registers: list[str], bits: int) -> str:
    return "".join(f"st.global.b{max(bits, 16)} [%dst+{8 * i}], {name};\n" for i, name in enumerate(registers))


def _loads() -> Iterator[EffectCase]:
    for type_ in _MEMORY_TYPES:
        ptx = f"ld.global.{type_} %l0, [%src+8]" if not type_.startswith("f") else ""
        if ptx:
            yield EffectCase(ptx, (ptx,), f"{ptx};\nst.global.b64 [%dst], %l0;\n", _each_lane(_loaded(type_, 1, 8, 64)))
        else:
            yield _vector_load("", type_, "")
    for width, type_ in _VECTORS:
        yield _vector_load(f".{width}", type_, "")
    strong = [".volatile", ".relaxed.gpu", ".relaxed.sys", ".relaxed.cta", ".relaxed.cluster"]
    strong += [".acquire.gpu", ".acquire.cta", ".acquire.cluster", ".acquire.sys", ".weak"]
    for modifier in strong:
        yield _vector_load("", "b32", "", before=modifier)
    yield _vector_load(".v2", "b32", "", before=".volatile")
    hints = [".nc", ".ca", ".cg", ".cs", ".cv", ".lu", ".L1::evict_first", ".L1::evict_last", ".L1::evict_normal"]
    hints += [".L1::evict_unchanged", ".L1::no_allocate", ".L2::64B", ".L2::128B", ".L2::256B", ".L2::cache_hint"]
    for hint in hints:
        yield _vector_load(".v4" if hint == ".nc" else "", "b32", hint)
    both = ("ld.param.b32 %w0, [inputs]", "ld.param.b32 %w1, [inputs+4]", "ld.param.b64 %l0, [inputs]")
    ptx = "mov.b64 %l1, {%w0, %w1};\nsub.s64 %l0, %l0, %l1;\nst.global.b64 [%dst], %l0;\n"
    yield EffectCase("ld.param", both, ";\n".join(both) + ";\n" + ptx, _each_lane(lambda _row: [0]))


def _loaded(type_: str, count: int, offset: int, register_bits: int) -> Callable[[Row], Words]:
    """Elements that are stored again from registers of a width, over the low bytes of the poison."""
    size = BITS[type_] // 8

    def row_of(row: Row) -> Words:
        elements = [_element(row, offset + i * size, type_) for i in range(count)]
        return [POISON >> register_bits << register_bits | wrap(element, register_bits) for element in elements]

    return row_of


def _vector_load(width: str, type_: str, hint: str, *, before: str = "") -> EffectCase:
    registers = _registers(type_, int(width[2:] or "1"))
    policy = ", %l8" if "cache_hint" in hint else ""
    offset = 0 if len(registers) * BITS[type_] > 128 else 16
    load = f"ld{before}.global{hint}{width}.{type_} {_braced(registers)}, [%src+{offset}]{policy}"
    prepare = "createpolicy.fractional.L2::evict_first.b64 %l8, 1.0;\n" if policy else ""
    bits = max(BITS[type_], 16)
    expected = _each_lane(_loaded(type_, len(registers), offset, bits))
    return EffectCase(load, (load,), f"{prepare}{load};\n{_store_all(registers, bits)}", expected)


def _stores() -> Iterator[EffectCase]:
    for type_ in _MEMORY_TYPES:
        yield _store("", type_, "")
    for width, type_ in _VECTORS:
        yield _store(f".{width}", type_, "")
    for modifier in (".volatile", ".relaxed.gpu", ".relaxed.sys", ".release.gpu", ".release.cta", ".weak"):
        yield _store("", "b32", "", before=modifier)
    for modifier in (".release.cluster", ".release.sys"):
        yield _store("", "b64", "", before=modifier)
    hints = [".wb", ".cg", ".cs", ".wt", ".L1::evict_first", ".L1::evict_last", ".L1::evict_normal"]
    for hint in [*hints, ".L1::evict_unchanged", ".L1::no_allocate", ".L2::cache_hint"]:
        yield _store("", "b32", hint)


def _store(width: str, type_: str, hint: str, *, before: str = "") -> EffectCase:
    """Elements are copied from the inputs through registers to the outputs, packed."""
    registers = _registers(type_, int(width[2:] or "1"))
    size = BITS[type_] // 8
    load = "".join(
        f"ld.global.{'u8' if size == 1 else f'b{8 * size}'} {name}, [%src+{i * size}];\n"
        for i, name in enumerate(registers)
    )
    policy = ", %l8" if "cache_hint" in hint else ""
    prepare = "createpolicy.fractional.L2::evict_first.b64 %l8, 1.0;\n" if policy else ""
    store = f"st{before}.global{hint}{width}.{type_} [%dst], {_braced(registers)}{policy}"

    def expected(row: Row) -> Words:
        written = _bytes(row)[: size * len(registers)]
        whole = written + _bytes([POISON] * OUTPUTS)[len(written) :]
        return list(struct.unpack(f"<{OUTPUTS}Q", whole))

    return EffectCase(store, (store,), f"{prepare}{load}{store};\n", _each_lane(expected))


def _shared() -> Iterator[EffectCase]:
    for space, (width, type_) in itertools.product(("shared", "shared::cta"), [("", "b8"), ("", "b64"), *_VECTORS]):
        registers = _registers(type_, int(width[1:] or "1"))
        bits, size = max(BITS[type_], 16), BITS[type_] // 8
        if size * len(registers) > 16:
            continue
        load = "".join(
            f"ld.global.{'u8' if size == 1 else f'b{8 * size}'} {name}, [%src+{i * size}];\n"
            for i, name in enumerate(registers)
        )
        suffix = f"{'.' + width if width else ''}.{type_}"
        there = f"st.{space}{suffix} [%smem+16], {_braced(registers)}"
        clear = "".join(f"mov.b{bits} {name}, 0;\n" for name in registers)
        back = f"ld.{space}{suffix} {_braced(registers)}, [%smem+16]"
        ptx = f"{load}{there};\n{clear}{back};\n{_store_all(registers, bits)}"
        yield EffectCase(f"{there} {back}", (there, back), ptx, _each_lane(_loaded(type_, len(registers), 0, bits)))


def _atomics() -> Iterator[EffectCase]:
    integer: dict[str, Callable[[int, int], int]] = {
        "add": lambda old, value: old + value,
        "min": min,
        "max": max,
        "and": lambda old, value: old & value,
        "or": lambda old, value: old | value,
        "xor": lambda old, value: old ^ value,
        "exch": lambda _old, value: value,
    }
    types = {"add": ("u32", "s32", "u64"), "min": ("u32", "s32", "u64", "s64"), "max": ("u32", "s32", "u64", "s64")}
    for name, function in integer.items():
        for type_, space in itertools.product(types.get(name, ("b32", "b64")), ("global", "shared")):
            yield from _atomic(name, type_, space, _integer_update(type_, function))
    for type_, space in itertools.product(("f32", "f64"), ("global", "shared")):
        yield from _atomic("add", type_, space, _float_update(type_, ftz=(type_, space) == ("f32", "global")))
    increment = _integer_update("u32", integer["add"])
    for order, scope in itertools.product(("relaxed", "acquire", "release", "acq_rel"), _SCOPES):
        names = ("atom", "red") if order in ("relaxed", "release") else ("atom",)
        yield from _atomic("add", "u32", f"global.{scope}.{order}", increment, names=names)
    yield from _atomic("add", "u32", "acq_rel.gpu.global", increment, names=("atom",))  # in another order of parts
    yield from _atomic("add", "u32", "shared::cta", increment)
    for type_, space in itertools.product(("b32", "b64"), ("global.gpu.acq_rel", "shared", "shared::cta")):
        yield _compare_and_swap(type_, space)
    yield _contended()


def _integer_update(type_: str, function: Callable[[int, int], int]) -> Callable[[int, int], int]:
    bits, signed = BITS[type_], type_.startswith("s")
    return lambda old, value: wrap(function(wrap(old, bits, signed=signed), wrap(value, bits, signed=signed)), bits)


def _float_update(type_: str, *, ftz: bool) -> Callable[[int, int], int]:
    form = FORMATS[type_]

    def update(old: int, value: int) -> int:
        if ftz:
            return form.flush(form.round(add(form.value(form.flush(old)), form.value(form.flush(value)))))
        return form.round(add(form.value(old), form.value(value)))

    return update


def _atomic(
    operation: str, type_: str, space: str, update: Callable[[int, int], int], *, names: Sequence[str] = ("atom", "red")
) -> Iterator[EffectCase]:
    """The first input is the old value in memory, the second the operand; results: the new value, and the old one."""
    bits = BITS[type_]
    prefix = _PREFIX[bits]
    shared = "shared" in space
    place = "%smem" if shared else "%dst"
    prepare = f"ld.global.b{bits} %{prefix}0, [%src];\nld.global.b{bits} %{prefix}1, [%src+8];\n"
    prepare += f"st.{'shared' if shared else 'global'}.b{bits} [{place}], %{prefix}0;\n"
    finish = f"ld.shared.b{bits} %{prefix}0, [%smem];\nst.global.b{bits} [%dst], %{prefix}0;\n" if shared else ""
    sources = (type_ if type_ in FORMATS else f"u{bits}",) * 2
    for name in names:
        if name == "red" and operation == "exch":
            continue
        target = f"%{prefix}2, " if name == "atom" else ""
        instruction = f"{name}.{space}.{operation}.{type_} {target}[{place}], %{prefix}1"
        keep = f"st.global.b{bits} [%dst+8], %{prefix}2;\n" if name == "atom" else ""

        def expected(row: Row, name: str = name) -> Words:
            old, value = row
            new = update(old, value)
            undefined = type_ in FORMATS and FORMATS[type_].is_nan(new)  # a NaN's bits are open
            words: Words = [None if undefined else POISON >> bits << bits | new]
            return words + ([POISON >> bits << bits | old] if name == "atom" else [])

        yield EffectCase(
            instruction, (instruction,), f"{prepare}{instruction};\n{finish}{keep}", _each_lane(expected), sources
        )


def _compare_and_swap(type_: str, space: str) -> EffectCase:
    """Even lanes expect the present value, odd lanes another."""
    bits = BITS[type_]
    prefix = _PREFIX[bits]
    shared = "shared" in space
    place, kind = ("%smem", "shared") if shared else ("%dst", "global")
    cas = f"atom.{space}.cas.{type_} %{prefix}2, [{place}], %{prefix}1, %{prefix}3"
    ptx = f"""ld.global.b{bits} %{prefix}0, [%src];
ld.global.b{bits} %{prefix}3, [%src+8];
st.{kind}.b{bits} [{place}], %{prefix}0;
mov.u32 %w8, %laneid;
and.b32 %w8, %w8, 1;
cvt.u64.u32 %l8, %w8;
xor.b{bits} %{prefix}1, %{prefix}0, %{prefix}8;
{cas};
ld.{kind}.b{bits} %{prefix}4, [{place}];
st.global.b{bits} [%dst], %{prefix}4;
st.global.b{bits} [%dst+8], %{prefix}2;
"""

    def expected(rows: list[Row]) -> list[Words]:
        above = POISON >> bits << bits
        return [[above | (row[0] if lane % 2 else row[1]), above | row[0]] for lane, row in enumerate(rows)]

    return EffectCase(cas, (cas,), ptx, expected, (f"u{bits}",) * 2)


def _contended() -> EffectCase:
    """All lanes add to the first lane's output."""
    instruction = "atom.global.gpu.acq_rel.add.u32 %w1, [%l0], %w0"
    ptx = f"""mov.u32 %w0, %laneid;
mul.wide.u32 %l0, %w0, {8 * OUTPUTS};
sub.s64 %l0, %dst, %l0;
setp.eq.u32 %p0, %w0, 0;
mov.b64 %l1, 0;
@%p0 st.global.b64 [%dst], %l1;
{instruction};
"""
    total = sum(range(LANES))

    def expected(rows: list[Row]) -> list[Words]:
        return [[POISON if lane else total] for lane in range(len(rows))]

    return EffectCase("contended atom", (instruction,), ptx, expected)


def _warp() -> Iterator[EffectCase]:
    for mode, clamp, range_result in itertools.product(
        ("up", "down", "bfly", "idx"), (0, 31, 0x1C03, 0x1800, 0x181F), (False, True)
    ):
        yield _shuffle(mode, clamp, range_result=range_result)
    integer: dict[str, Callable[[list[int]], int]] = {"add": sum, "min": min, "max": max}
    for (name, function), type_ in itertools.product(integer.items(), ("s32", "u32")):
        yield _reduction(name, type_, _reduce_integers(type_, function))
    for name in ("and", "or", "xor"):
        yield _reduction(name, "b32", functools.partial(_fold, name))
    for name, modifier in itertools.product(("min", "max"), ("", ".NaN", ".abs", ".abs.NaN")):
        yield _reduction(f"{name}{modifier}", "f32", _reduce_floats(name, modifier))
    for mode, negated in itertools.product(("all", "any", "uni", "ballot"), (False, True)):
        yield from (_vote(mode, limit, negated=negated) for limit in (0, 5, LANES))
    yield EffectCase(
        "activemask",
        ("activemask.b32 %w0",),
        "activemask.b32 %w0;\ncvt.u64.u32 %l0, %w0;\nst.global.b64 [%dst], %l0;\n",
        _each_lane(lambda _row: [0xFFFFFFFF]),
    )


def _shuffle(mode: str, clamp: int, *, range_result: bool) -> EffectCase:
    instruction = f"shfl.sync.{mode}.b32 %w2{'|%p0' if range_result else ''}, %w0, %w1, {clamp:#x}, -1"
    ptx = f"""ld.global.b32 %w0, [%src];
ld.global.b32 %w1, [%src+8];
mov.pred %p0, 0;
{instruction};
cvt.u64.u32 %l0, %w2;
selp.b64 %l1, 1, 0, %p0;
st.global.b64 [%dst], %l0;
st.global.b64 [%dst+8], %l1;
"""

    def expected(rows: list[Row]) -> list[Words]:
        result: list[Words] = []
        for lane, row in enumerate(rows):
            offset, segment = row[1] % 32, clamp >> 8
            last = (lane & segment) | (clamp % 32 & ~segment)
            source = {"up": lane - offset, "down": lane + offset, "bfly": lane ^ offset}.get(mode)
            if source is None:
                source = (lane & segment) | (offset & ~segment)
            within = source >= last if mode == "up" else source <= last
            result.append([rows[source if within else lane][0], int(within and range_result)])
        return result

    return EffectCase(instruction, (instruction,), ptx, expected, ("u32", "u32"))


def _reduction(operation: str, type_: str, function: Callable[[list[int]], int]) -> EffectCase:
    instruction = f"redux.sync.{operation}.{type_} %w1, %w0, -1"
    ptx = f"ld.global.b32 %w0, [%src];\n{instruction};\ncvt.u64.u32 %l0, %w1;\nst.global.b64 [%dst], %l0;\n"

    def expected(rows: list[Row]) -> list[Words]:
        return [[function([row[0] for row in rows])]] * len(rows)

    return EffectCase(instruction, (instruction,), ptx, expected, ("f32" if type_ == "f32" else "u32",))


def _reduce_integers(type_: str, function: Callable[[list[int]], int]) -> Callable[[list[int]], int]:
    signed = type_.startswith("s")
    return lambda values: wrap(function([wrap(value, 32, signed=signed) for value in values]), 32)


def _fold(operation: str, values: list[int]) -> int:
    """For each bit: whether all lanes have it, any lane, or an odd number of lanes."""
    decide: dict[str, Callable[[int], bool]] = {
        "and": lambda count: count == LANES,
        "or": lambda count: count > 0,
        "xor": lambda count: count % 2 == 1,
    }
    return sum(decide[operation](sum(value >> bit & 1 for value in values)) << bit for bit in range(32))


def _reduce_floats(name: str, modifier: str) -> Callable[[list[int]], int]:
    form = FORMATS["f32"]

    def reduce(values: list[int]) -> int:
        values = [value & ~form.sign if "abs" in modifier else value for value in values]
        numbers = [value for value in values if not form.is_nan(value)]
        if not numbers or ("NaN" in modifier and len(numbers) < len(values)):
            return form.canonical_nan
        choose = min if name == "min" else max
        return choose(numbers, key=lambda bits: (form.value(bits), not bits & form.sign))

    return reduce


def _vote(mode: str, limit: int, *, negated: bool) -> EffectCase:
    """The lanes below `limit` vote yes, or no if negated."""
    is_ballot = mode == "ballot"
    target, type_ = ("%w1", "b32") if is_ballot else ("%p1", "pred")
    instruction = f"vote.sync.{mode}.{type_} {target}, {'!' if negated else ''}%p0, -1"
    result = "cvt.u64.u32 %l0, %w1" if is_ballot else "selp.b64 %l0, 1, 0, %p1"
    ptx = f"""mov.u32 %w0, %laneid;
setp.lt.u32 %p0, %w0, {limit};
{instruction};
{result};
st.global.b64 [%dst], %l0;
"""
    votes = [(lane < limit) != negated for lane in range(LANES)]
    results = {
        "all": all(votes),
        "any": any(votes),
        "uni": len(set(votes)) == 1,
        "ballot": sum(vote << lane for lane, vote in enumerate(votes)),
    }
    return EffectCase(f"{instruction} {limit}", (instruction,), ptx, _each_lane(lambda _row: [int(results[mode])]))


def _matrices() -> Iterator[EffectCase]:
    """Row i % 8 of matrix i / 8 is the first 16 bytes of lane i's shared memory."""
    fill = """ld.global.v4.b32 {%w0, %w1, %w2, %w3}, [%src];
st.shared.v4.b32 [%smem], {%w0, %w1, %w2, %w3};
bar.warp.sync -1;
"""
    for count, transposed, space in itertools.product((1, 2, 4), (False, True), ("shared", "shared::cta")):
        registers = [f"%w{i}" for i in range(count)]
        form = f"sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.{space}.b16"
        load = f"ldmatrix.{form} {{{', '.join(registers)}}}, [%smem]"
        ptx = f"{fill}{load};\n{_store_all(registers, 32)}"
        yield EffectCase(load, (load,), ptx, functools.partial(_loaded_matrices, count, transposed=transposed))
        store = f"stmatrix.{form} [%smem], {{{', '.join(registers)}}}"
        ptx = f"{fill}{store};\nbar.warp.sync -1;\nld.shared.v2.b64 {{%l0, %l1}}, [%smem];\n"
        ptx += "st.global.v2.b64 [%dst], {%l0, %l1};\n"
        yield EffectCase(store, (store,), ptx, functools.partial(_stored_matrices, count, transposed=transposed))


def _matrix_place(lane: int, half: int, *, transposed: bool) -> tuple[int, int]:
    """The row and column of the element in the lower or upper half of a lane's register."""
    row, column = divmod(2 * lane + half, 8)
    return (column, row) if transposed else (row, column)


def _loaded_matrices(count: int, rows: list[Row], *, transposed: bool) -> list[Words]:
    memory = [_bytes(row)[:16] for row in rows]
    result: list[Words] = []
    for lane in range(LANES):
        words: Words = []
        for matrix in range(count):
            held = b""
            for half in range(2):
                row, column = _matrix_place(lane, half, transposed=transposed)
                held += memory[8 * matrix + row][2 * column : 2 * column + 2]
            words.append(POISON >> 32 << 32 | int.from_bytes(held, "little"))
        result.append(words)
    return result


def _stored_matrices(count: int, rows: list[Row], *, transposed: bool) -> list[Words]:
    memory = [bytearray(_bytes(row)[:16]) for row in rows]
    for lane, matrix, half in itertools.product(range(LANES), range(count), range(2)):
        row, column = _matrix_place(lane, half, transposed=transposed)
        held = _bytes(rows[lane])[4 * matrix + 2 * half : 4 * matrix + 2 * half + 2]
        memory[8 * matrix + row][2 * column : 2 * column + 2] = held
    return [list(struct.unpack("<2Q", chunk)) for chunk in memory]


def _order() -> Iterator[EffectCase]:
    """Instructions without a visible result: the kernel continues after them."""
    instructions = ["bar.sync 0", "bar.cta.sync 0", "barrier.sync 0", "barrier.cta.sync 0", "barrier.sync.aligned 0"]
    instructions += ["bar.warp.sync -1", "membar.cta", "membar.gl", "membar.sys", "nanosleep.u32 1"]
    instructions += [
        f"fence.{order}.{scope}" for order in ("acq_rel", "sc") for scope in ("cta", "cluster", "gpu", "sys")
    ]
    instructions += ["griddepcontrol.wait", "griddepcontrol.launch_dependents"]
    ptx = "ld.global.b64 %l0, [%src];\n{};\nst.global.b64 [%dst], %l0;\n"
    for instruction in instructions:
        yield EffectCase(instruction, (instruction,), ptx.format(instruction), _each_lane(lambda row: [row[0]]))


def _control() -> Iterator[EffectCase]:
    yield EffectCase(
        "predicated store with a default",
        ("@%p0 ld.global.b64 %l0, [%l1]", "@!%p0 st.global.b64 [%dst], %l0"),
        # A lane with a false predicate must not use the address, which is invalid.
        """ld.global.b32 %w0, [%src];
and.b32 %w0, %w0, 1;
setp.eq.u32 %p0, %w0, 1;
selp.b64 %l1, %src, 64, %p0;
mov.u64 %l0, 0x7;
@%p0 ld.global.b64 %l0, [%l1];
st.global.b64 [%dst], %l0;
@!%p0 st.global.b64 [%dst+8], %l0;
""",
        _each_lane(lambda row: [row[0] if row[0] % 2 else 7, POISON if row[0] % 2 else 7]),
    )
    yield EffectCase(
        "divergent branches that meet again",
        ("bra LABEL", "bra.uni LABEL"),
        """ld.global.b32 %w0, [%src];
and.b32 %w1, %w0, 3;
setp.lt.u32 %p0, %w1, 2;
@%p0 bra $LABEL_small;
setp.eq.u32 %p1, %w1, 2;
mov.b64 %l0, 30;
@!%p1 bra $LABEL_done;
mov.b64 %l0, 20;
bra.uni $LABEL_done;
$LABEL_small:
mov.b64 %l0, 10;
$LABEL_done:
activemask.b32 %w2;
cvt.u64.u32 %l1, %w2;
st.global.b64 [%dst], %l0;
st.global.b64 [%dst+8], %l1;
""",
        _each_lane(lambda row: [(10, 10, 20, 30)[row[0] % 4], 0xFFFFFFFF]),
    )
    yield EffectCase(
        "a loop of a different length in each lane",
        ("bra LABEL",),
        """ld.global.b32 %w0, [%src];
and.b32 %w0, %w0, 15;
mov.b64 %l0, 1;
$LABEL_again:
setp.eq.u32 %p0, %w0, 0;
@%p0 bra $LABEL_end;
sub.s32 %w0, %w0, 1;
mul.lo.s64 %l0, %l0, 3;
bra.uni $LABEL_again;
$LABEL_end:
st.global.b64 [%dst], %l0;
""",
        _each_lane(lambda row: [3 ** (row[0] % 16)]),
    )


def _endings() -> Iterator[EffectCase]:
    for instruction in ("ret", "ret.uni", "exit"):
        guarded = "" if instruction == "ret.uni" else "@%p0 "
        yield EffectCase(
            f"{instruction} ends a lane",
            (instruction,),
            f"""ld.global.b64 %l0, [%src];
st.global.b64 [%dst], %l0;
mov.u32 %w0, %laneid;
setp.gt.u32 %p0, %w0, 20;
{guarded}{instruction};
st.global.b64 [%dst+8], %l0;
""",
            _ending_all if instruction == "ret.uni" else _ending_above_20,
        )


def _ending_above_20(rows: list[Row]) -> list[Words]:
    return [[row[0], POISON if lane > 20 else row[0]] for lane, row in enumerate(rows)]


def _ending_all(rows: list[Row]) -> list[Words]:
    return [[row[0]] for row in rows]


# Each ending needs its own module: nothing runs after it.
BATCHES: dict[str, list[EffectCase]] = {
    **{
        function.__name__.strip("_"): list(function())
        for function in (_loads, _stores, _shared, _atomics, _warp, _matrices, _order, _control)
    },
    **{case.under_test[0].replace(".", "_"): [case] for case in _endings()},
}
