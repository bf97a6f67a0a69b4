"""The PTX instructions that ptxlab knows, and what each becomes in C.

`TABLE` maps an opcode's first part (`add` of `add.rn.ftz.f32`) to a function that emits its C, and to the types and
modifiers that it knows. Any other raises, so no modifier is ever ignored by accident. Most instructions are emitted for
one lane (`lane` is its number); instructions that lanes do together are emitted for the warp (`mask` has the lanes).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

from .operands import TYPES, Operands, Type, vector
from .parse import Instruction, Unsupported


@dataclass(frozen=True)
class Decoded:
    """An instruction with its opcode split into parts."""

    instruction: Instruction
    index: int  # in the kernel; faults name it
    name: str
    modifiers: tuple[str, ...]
    types: tuple[Type, ...]

    @property
    def operands(self) -> tuple[str, ...]:
        """The operands, with the destination first."""
        return self.instruction.operands

    @property
    def type(self) -> Type:
        """The last type of the opcode; most opcodes have only one."""
        if not self.types:
            raise self.unsupported()
        return self.types[-1]

    @property
    def ftz(self) -> bool:
        """Whether subnormal f32 operands and results become zero."""
        return "ftz" in self.modifiers

    def one_of(self, *names: str) -> str:
        """The only modifier of the opcode that is in `names`."""
        found = [name for name in names if name in self.modifiers]
        if len(found) != 1:
            raise self.unsupported()
        return found[0]

    def unsupported(self) -> Unsupported:
        """The error for an unknown form."""
        return Unsupported(str(self.instruction))


Emitter = Callable[[Decoded, Operands], str]


@dataclass(frozen=True)
class Entry:
    """The table's entry for an opcode."""

    emit: Emitter
    types: frozenset[str]
    modifiers: frozenset[str]
    whole_warp: bool
    meets: bool  # whether lanes wait there for the other lanes of their warp


TABLE: dict[str, Entry] = {}

# Jumps end a basic block; translate.py emits them.
JUMPS = {"bra": frozenset({"uni"}), "ret": frozenset({"uni"}), "exit": frozenset[str]()}


def _known(
    names: str, *, types: str = "", modifiers: str = "", whole_warp: bool = False, meets: bool = False
) -> Callable[[Emitter], Emitter]:
    """Register the function that emits the opcodes `names`; where lanes meet, it emits code for the whole warp."""

    def register(emit: Emitter) -> Emitter:
        for name in names.split():
            TABLE[name] = Entry(
                emit, frozenset(types.split()), frozenset(modifiers.split()), whole_warp or meets, meets
            )
        return emit

    return register


def decode(instruction: Instruction, index: int) -> Decoded:
    """Split an opcode into parts; raise `Unsupported` unless the table has it with these types and modifiers."""
    name, *parts = instruction.opcode.split(".")
    types = tuple(TYPES[part] for part in parts if part in TYPES)
    modifiers = tuple(part for part in parts if part not in TYPES)
    entry = TABLE.get(name)
    if entry is None or not (entry.types.issuperset(t.name for t in types) and entry.modifiers.issuperset(modifiers)):
        raise Unsupported(str(instruction))
    return Decoded(instruction, index, name, modifiers, types)


INTEGERS = "u16 s16 u32 s32 u64 s64"
UNTYPED = "b16 b32 b64"
SMALL_FLOATS = "f16 bf16 f16x2 bf16x2"
FLOATS = f"f32 f64 f32x2 {SMALL_FLOATS}"

# ---- Floating-point and integer arithmetic ----


def _is_float(type_: Type) -> bool:
    return type_.is_float or bool(type_.element)


def _is_small(type_: Type) -> bool:
    return type_.is_float and type_.bits == TYPES["f16"].bits


def _elementwise(d: Decoded, o: Operands, compute: Callable[..., str]) -> str:
    """Apply `compute`, a function from C expressions to one, to a float or to each element of a packed type.

    A result in f16 or bf16 must be exact, or rounded to odd, when it is encoded.
    """
    element = TYPES[d.type.element] if d.type.element else d.type
    if (d.ftz or "sat" in d.modifiers) and element.name != "f32":
        raise d.unsupported()

    def result(shift: int) -> str:
        arguments = []
        for operand in d.operands[1:]:
            bits = f"({element.storage})({o.bits(operand, d.type.bits)} >> {shift})"
            value = f"{element.decode}({bits})"
            arguments.append(f"flush({value})" if d.ftz else value)
        value = compute(*arguments)
        if d.ftz:
            value = f"flush({value})"
        return f"saturate({value})" if "sat" in d.modifiers else value

    if not d.type.element:
        return o.write(d.operands[0], result(0), d.type)
    whole = TYPES[f"b{d.type.bits}"]
    halves = (
        f"({whole.value}){element.encode}({result(shift)}) << {shift}" for shift in range(0, whole.bits, element.bits)
    )
    return o.write(d.operands[0], " | ".join(f"({half})" for half in halves), whole)


def _element(d: Decoded) -> Type:
    return TYPES[d.type.element] if d.type.element else d.type


@_known("add sub", types=f"{INTEGERS} {FLOATS}", modifiers="rn ftz sat")
def _add(d: Decoded, o: Operands) -> str:
    sign = "+" if d.name == "add" else "-"
    if len(d.types) > 1:
        return _mixed_add(d, o, sign)
    if not _is_float(d.type):
        return _integer_binary(d, o, sign)
    if _is_small(_element(d)):
        return _elementwise(d, o, lambda a, b: f"odd_float(odd_fma({b}, {sign}1.0, {a}))")
    return _elementwise(d, o, lambda a, b: f"({a} {sign} {b})")


def _mixed_add(d: Decoded, o: Operands, sign: str) -> str:
    """`add.f32.bf16`: the first operand is of the small type."""
    wide, small = d.types
    target, a, b = d.operands
    if wide.name != "f32" or not _is_small(small) or d.ftz or "sat" in d.modifiers:
        raise d.unsupported()
    return o.write(target, f"{o.read(a, small)} {sign} {o.read(b, wide)}", wide)


def _integer_binary(d: Decoded, o: Operands, operator: str) -> str:
    if d.modifiers:
        raise d.unsupported()
    target, a, b = d.operands
    return o.write(target, f"{o.read(a, d.type)} {operator} {o.read(b, d.type)}", d.type)


@_known("mul", types=f"{INTEGERS} {FLOATS}", modifiers="lo hi wide rn ftz sat")
@_known("mad", types=INTEGERS, modifiers="lo hi wide")
def _mul(d: Decoded, o: Operands) -> str:
    if _is_float(d.type):
        if _is_small(_element(d)):
            return _elementwise(d, o, lambda a, b: f"odd_float((double){a} * {b})")
        return _elementwise(d, o, lambda a, b: f"({a} * {b})")
    part = d.one_of("lo", "hi", "wide")
    sign = d.type.name[0]
    if part == "wide":
        if d.type.bits > TYPES["u32"].bits:
            raise d.unsupported()
        result = TYPES[f"{sign}{2 * d.type.bits}"]
        product = f"({result.value}){o.read(d.operands[1], d.type)} * {o.read(d.operands[2], d.type)}"
    else:
        result = d.type
        double_width = f"{'' if d.type.is_signed else 'unsigned '}__int128"
        product = f"({double_width}){o.read(d.operands[1], d.type)} * {o.read(d.operands[2], d.type)}"
        if part == "hi":
            product = f"({product}) >> {d.type.bits}"
    addend = f" + {o.read(d.operands[3], result)}" if d.name == "mad" else ""
    return o.write(d.operands[0], f"({result.value})({product}){addend}", result)


@_known("fma", types=FLOATS, modifiers="rn ftz sat")
def _fma(d: Decoded, o: Operands) -> str:
    if len(d.types) > 1:
        wide, small = d.types
        if wide.name != "f32" or not _is_small(small) or d.ftz or "sat" in d.modifiers:
            raise d.unsupported()
        target, a, b, c = d.operands
        return o.write(target, f"fmaf({o.read(a, small)}, {o.read(b, small)}, {o.read(c, wide)})", wide)
    if _is_small(_element(d)):
        return _elementwise(d, o, lambda a, b, c: f"odd_float(odd_fma({a}, {b}, {c}))")
    function = "fma" if d.type.name == "f64" else "fmaf"
    return _elementwise(d, o, lambda a, b, c: f"{function}({a}, {b}, {c})")


@_known("div", types=f"{INTEGERS} f32 f64", modifiers="rn full approx ftz")
def _div(d: Decoded, o: Operands) -> str:
    """Division; the approximate forms are computed exactly."""
    if _is_float(d.type):
        return _elementwise(d, o, lambda a, b: f"({a} / {b})")
    return _divide_integers(d, o, "DIVIDE")


@_known("rem", types=INTEGERS)
def _rem(d: Decoded, o: Operands) -> str:
    return _divide_integers(d, o, "REMAINDER")


def _divide_integers(d: Decoded, o: Operands, macro: str) -> str:
    if d.modifiers:
        raise d.unsupported()
    target, a, b = d.operands
    return o.write(target, f"{macro}({d.type.value}, {o.read(a, d.type)}, {o.read(b, d.type)})", d.type)


@_known("min max", types=f"{INTEGERS} f32 f64 {SMALL_FLOATS}", modifiers="NaN ftz")
def _min_max(d: Decoded, o: Operands) -> str:
    if _is_float(d.type):
        function = f"float_{d.name}{'_nan' if 'NaN' in d.modifiers else ''}"
        return _elementwise(d, o, lambda *values: functools.reduce(lambda a, b: f"{function}({a}, {b})", values))
    if d.modifiers:
        raise d.unsupported()
    a, b = (o.read(operand, d.type) for operand in d.operands[1:])
    return o.write(d.operands[0], f"{a} {'<' if d.name == 'min' else '>'} {b} ? {a} : {b}", d.type)


def _sign_bits(type_: Type) -> str:
    """The sign bit of a float, or of each element of a packed type."""
    width = TYPES[type_.element].bits if type_.element else type_.bits
    return hex(sum(1 << (shift + width - 1) for shift in range(0, type_.bits, width))) + "ull"


@_known("abs neg", types=f"s16 s32 s64 f32 f64 {SMALL_FLOATS}", modifiers="ftz")
def _abs_neg(d: Decoded, o: Operands) -> str:
    target, source = d.operands
    if _is_float(d.type):
        if d.ftz:
            return _elementwise(d, o, lambda a: f"fabsf({a})" if d.name == "abs" else f"-{a}")
        bits = o.bits(source, d.type.bits)
        value = f"{bits} & ~{_sign_bits(d.type)}" if d.name == "abs" else f"{bits} ^ {_sign_bits(d.type)}"
        return o.write(target, value, TYPES[f"b{d.type.bits}"])
    value = o.read(source, d.type)
    return o.write(target, f"-{value}" if d.name == "neg" else f"{value} < 0 ? -{value} : {value}", d.type)


@_known("copysign", types="f32 f64")
def _copysign(d: Decoded, o: Operands) -> str:
    target, sign, magnitude = d.operands
    bits, mask = TYPES[f"b{d.type.bits}"], _sign_bits(d.type)
    value = f"({o.bits(sign, bits.bits)} & {mask}) | ({o.bits(magnitude, bits.bits)} & ~{mask})"
    return o.write(target, value, bits)


@_known("sqrt rcp", types="f32 f64", modifiers="rn approx ftz")
@_known("rsqrt", types="f32 f64", modifiers="approx ftz")
def _roots(d: Decoded, o: Operands) -> str:
    """Square roots and reciprocals; the approximate f32 forms are computed exactly."""
    if d.type.name == "f64":
        if d.ftz:
            if d.name == "sqrt":
                raise d.unsupported()
            return o.write(d.operands[0], f"{d.name}_approx_ftz({o.read(d.operands[1], d.type)})", d.type)
        form = {"sqrt": "sqrt({})", "rsqrt": "1.0 / sqrt({})", "rcp": "1.0 / {}"}[d.name]
        return _elementwise(d, o, form.format)
    # The inverse square root in double first: 1.0f / sqrtf would round twice.
    form = {"sqrt": "sqrtf({})", "rsqrt": "(float)(1.0 / sqrt({}))", "rcp": "(1.0f / {})"}[d.name]
    return _elementwise(d, o, form.format)


@_known("ex2 lg2 sin cos", types="f32", modifiers="approx ftz")
@_known("tanh", types="f32", modifiers="approx")
def _transcendental(d: Decoded, o: Operands) -> str:
    function = {"ex2": "exp2f", "lg2": "log2f", "sin": "sinf", "cos": "cosf", "tanh": "tanhf"}[d.name]
    return _elementwise(d, o, f"{function}({{}})".format)


# ---- Bits ----


_LOGIC = {"and": "&", "or": "|", "xor": "^"}


@_known("and or xor", types=f"pred {UNTYPED}")
def _logic(d: Decoded, o: Operands) -> str:
    return _integer_binary(d, o, _LOGIC[d.name])


@_known("not", types=f"pred {UNTYPED}")
def _not(d: Decoded, o: Operands) -> str:
    operator = "!" if d.type.name == "pred" else "~"
    return o.write(d.operands[0], f"{operator}{o.read(d.operands[1], d.type)}", d.type)


@_known("shl", types=UNTYPED)
@_known("shr", types=f"{UNTYPED} {INTEGERS}")
def _shift(d: Decoded, o: Operands) -> str:
    """Shifts; from the type's width on, every bit is shifted out."""
    value, count, width = o.read(d.operands[1], d.type), o.bits(d.operands[2], 32), d.type.bits
    if d.name == "shl":
        shifted = f"{count} >= {width} ? 0 : {value} << {count}"
    elif d.type.is_signed:
        shifted = f"{value} >> ({count} >= {width} ? {width - 1} : {count})"
    else:
        shifted = f"{count} >= {width} ? 0 : {value} >> {count}"
    return o.write(d.operands[0], shifted, d.type)


@_known("shf", types="b32", modifiers="l r wrap clamp")
def _funnel_shift(d: Decoded, o: Operands) -> str:
    target, low, high, count = d.operands
    amount = o.bits(count, 32)
    amount = f"({amount} & 31)" if d.one_of("wrap", "clamp") == "wrap" else f"({amount} > 32 ? 32 : {amount})"
    function = "funnel_left" if d.one_of("l", "r") == "l" else "funnel_right"
    return o.write(target, f"{function}({o.bits(low, 32)}, {o.bits(high, 32)}, {amount})", d.type)


@_known("bfe", types="u32 s32 u64 s64")
def _bit_field_extract(d: Decoded, o: Operands) -> str:
    target, value, position, length = d.operands
    function = "extract_signed" if d.type.is_signed else "extract_unsigned"
    field = f"{o.bits(position, 32)} & 255, {o.bits(length, 32)} & 255, {d.type.bits}"
    return o.write(target, f"{function}({o.bits(value, d.type.bits)}, {field})", d.type)


@_known("bfi", types="b32 b64")
def _bit_field_insert(d: Decoded, o: Operands) -> str:
    target, field, base, position, length = d.operands
    values = f"{o.bits(field, d.type.bits)}, {o.bits(base, d.type.bits)}"
    place = f"{o.bits(position, 32)} & 255, {o.bits(length, 32)} & 255, {d.type.bits}"
    return o.write(target, f"insert_bits({values}, {place})", d.type)


@_known("lop3", types="b32")
def _lop3(d: Decoded, o: Operands) -> str:
    target, *values, table = d.operands
    return o.write(target, f"lookup_logic({', '.join(o.bits(v, 32) for v in values)}, {table})", d.type)


@_known("prmt", types="b32")
def _prmt(d: Decoded, o: Operands) -> str:
    target, *values = d.operands
    return o.write(target, f"permute_bytes({', '.join(o.bits(v, 32) for v in values)})", d.type)


@_known("brev", types="b32")
def _brev(d: Decoded, o: Operands) -> str:
    return o.write(d.operands[0], f"reverse_bits({o.bits(d.operands[1], 32)})", d.type)


@_known("clz", types="b32 b64")
def _clz(d: Decoded, o: Operands) -> str:
    value = o.bits(d.operands[1], d.type.bits)
    zeros = f"{value} ? __builtin_clzll({value}) - {64 - d.type.bits} : {d.type.bits}"
    return o.write(d.operands[0], zeros, TYPES["u32"])


@_known("popc", types="b32 b64")
def _popc(d: Decoded, o: Operands) -> str:
    return o.write(d.operands[0], f"__builtin_popcountll({o.bits(d.operands[1], d.type.bits)})", TYPES["u32"])


# ---- Comparison and selection ----

_ORDERED = {"eq": "==", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}  # false with a NaN, as in C
_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
_UNORDERED = {"equ": "==", "ltu": "<", "leu": "<=", "gtu": ">", "geu": ">="}  # true with a NaN


def _comparison(d: Decoded, a: str, b: str) -> str:
    comparison = d.one_of(*_ORDERED, *_UNSIGNED, *_UNORDERED, "ne", "neu", "num", "nan")
    unordered = f"({a} != {a} || {b} != {b})"
    if comparison in _UNORDERED:
        return f"({unordered} || {a} {_UNORDERED[comparison]} {b})"
    forms = {
        "ne": f"(!{unordered} && {a} != {b})",
        "neu": f"({a} != {b})",
        "num": f"!{unordered}",
        "nan": unordered,
    }
    return forms.get(comparison) or f"({a} {(_ORDERED | _UNSIGNED)[comparison]} {b})"


@_known(
    "setp",
    types=f"{UNTYPED} {INTEGERS} {SMALL_FLOATS} f32 f64",
    modifiers=f"{' '.join([*_ORDERED, *_UNSIGNED, *_UNORDERED])} ne neu num nan and or xor ftz",
)
def _setp(d: Decoded, o: Operands) -> str:
    """`setp.lt.and.f32 p|q, a, b, c`: p = (a < b) & c, q = !(a < b) & c; q, and c with its operator, may be missing.

    Of packed operands p compares the lower halves, and q the upper ones.
    """
    if d.ftz and d.type.name != "f32":
        raise d.unsupported()
    if d.type.element:
        element = TYPES[d.type.element]
        halves = [
            [f"{element.decode}(({element.storage})({o.bits(operand, d.type.bits)} >> {shift}))" for shift in (0, 16)]
            for operand in d.operands[1:3]
        ]
        low, high = (_comparison(d, a, b) for a, b in zip(*halves, strict=True))
        lines = [f"bool holds = {low}; bool second = {high};"]
    else:
        holds = _comparison(d, *(o.read(operand, d.type, flush=d.ftz) for operand in d.operands[1:3]))
        lines = [f"bool holds = {holds}; bool second = !holds;"]
    combine = ""
    if len(d.operands) > len(("target", "a", "b")):
        lines.append(f"bool other = {o.predicate(d.operands[3])};")
        combine = f" {_LOGIC[d.one_of(*_LOGIC)]} other"
    for target, result in zip(d.operands[0].split("|"), ("holds", "second"), strict=False):
        lines.append(o.write(target.strip(), f"{result}{combine}", TYPES["pred"]))
    # Read all operands before either target is written: a target may be an operand, too.
    return f"{{ {' '.join(lines)} }}"


@_known("selp", types=f"{UNTYPED} {INTEGERS} f32 f64")
def _selp(d: Decoded, o: Operands) -> str:
    target, a, b, predicate = d.operands
    bits = d.type.bits
    return o.write(target, f"{o.predicate(predicate)} ? {o.bits(a, bits)} : {o.bits(b, bits)}", TYPES[f"b{bits}"])


@_known("testp", types="f32 f64", modifiers="finite infinite number notanumber normal subnormal")
def _testp(d: Decoded, o: Operands) -> str:
    form = {
        "finite": "isfinite({})",
        "infinite": "isinf({})",
        "number": "!isnan({})",
        "notanumber": "isnan({})",
        "normal": "isnormal({})",
        "subnormal": "fpclassify({}) == FP_SUBNORMAL",
    }[d.modifiers[0]]
    return o.write(d.operands[0], form.format(o.read(d.operands[1], d.type)), TYPES["pred"])


# ---- Moves and conversions ----


@_known("mov", types=f"pred {UNTYPED} {INTEGERS} f32 f64")
def _mov(d: Decoded, o: Operands) -> str:
    """Moves; `{a, b}` splits a wider register or joins two, with the lowest bits first."""
    target, source = d.operands
    if d.type.name == "pred":
        return o.write(target, o.predicate(source), d.type)
    whole = TYPES[f"b{d.type.bits}"]
    if target.startswith("{"):
        parts = vector(target)
        part = TYPES[f"b{whole.bits // len(parts)}"]
        writes = (o.write(name, f"whole >> {i * part.bits}", part) for i, name in enumerate(parts))
        return f"{{ uint64_t whole = {o.bits(source, whole.bits)}; {' '.join(writes)} }}"
    parts = vector(source)
    width = whole.bits // len(parts)
    joined = (f"({whole.value}){o.bits(name, width)} << {i * width}" for i, name in enumerate(parts))
    return o.write(target, " | ".join(joined), whole)


@_known("cvta", types="u64", modifiers="to global")
def _cvta(d: Decoded, o: Operands) -> str:
    """Global addresses are generic addresses."""
    if "global" not in d.modifiers:
        raise d.unsupported()
    return o.write(d.operands[0], o.read(d.operands[1], d.type), d.type)


_INTEGRAL = {"rni": "nearbyint", "rmi": "floor", "rpi": "ceil", "rzi": "trunc"}


@_known(
    "cvt",
    types=f"u8 s8 {INTEGERS} f32 f64 {SMALL_FLOATS}",
    modifiers=f"rn ftz {' '.join(_INTEGRAL)}",
)
def _cvt(d: Decoded, o: Operands) -> str:
    to, source = d.types
    target, *operands = d.operands
    if to.element:  # cvt.rn.bf16x2.f32 d, a, b: a becomes the upper half
        if len(operands) != len(("upper", "lower")) or source.name != "f32":
            raise d.unsupported()
        upper, lower = (f"(uint32_t){TYPES[to.element].encode}({o.read(v, source, flush=d.ftz)})" for v in operands)
        return o.write(target, f"{upper} << 16 | {lower}", TYPES["b32"])
    value = o.read(operands[0], source, flush=d.ftz)
    if source.is_float:
        rounding = next((_INTEGRAL[modifier] for modifier in d.modifiers if modifier in _INTEGRAL), "")
        if rounding:
            value = f"{rounding}({value})"
        if not to.is_float:
            return _float_to_integer(d, o, value if rounding else "")
        if source.name == "f64" and _is_small(to):
            value = f"odd_float({value})"
    elif _is_small(to):
        value = f"odd_float((long double){value})"
    elif to.is_float:
        value = f"({to.value})({value})"
    if to.name == "f32":
        value = f"(float)({value})"
        value = f"flush({value})" if d.ftz else value
    return o.write(target, value, to)


def _float_to_integer(d: Decoded, o: Operands, integral: str) -> str:
    """Out of range clamps. NaN gives 0, or with f64 or a 64-bit integer only the topmost bit."""
    to, source = d.types
    if not integral:
        raise d.unsupported()
    wide = TYPES["b64"].bits in (to.bits, source.bits)
    of_nan = f"({to.value})(1ull << {to.bits - 1})" if wide else "0"
    function = "clamp_signed" if to.is_signed else "clamp_unsigned"
    return o.write(d.operands[0], f"{function}({integral}, {to.bits}, {of_nan})", to)


# ---- Memory ----

_SPACES = ("global", "shared", "shared::cta")
_SCOPES = "cta cluster gpu sys"
_HINTS = "cg cs L1::evict_first L1::evict_last L1::evict_normal L1::evict_unchanged L1::no_allocate L2::cache_hint"
_LOAD_HINTS = f"{_HINTS} nc ca cv lu L2::64B L2::128B L2::256B"
_STORE_HINTS = f"{_HINTS} wb wt"


def _checked_address(d: Decoded, o: Operands, operand: str, access: str, size: int) -> str:
    space = d.one_of(*_SPACES)
    function = "global_address" if space == "global" else "shared_address"
    return f"uint64_t address = {function}(warp, {o.address(operand)}, {size}, {access}, {d.index});"


def _memory_order(d: Decoded) -> str:
    """The C memory order of an atomic or a strong access.

    Scopes below .gpu order nothing between CTAs, and barriers order the memory that warps of one CTA share. So a narrow
    scope counts as relaxed.
    """
    if "global" in d.modifiers and ("cta" in d.modifiers or "cluster" in d.modifiers):
        return "__ATOMIC_RELAXED"
    orders = {"acq_rel": "__ATOMIC_ACQ_REL", "acquire": "__ATOMIC_ACQUIRE", "release": "__ATOMIC_RELEASE"}
    return next((order for name, order in orders.items() if name in d.modifiers), "__ATOMIC_RELAXED")


def _width(d: Decoded) -> int:
    return next((int(modifier[1:]) for modifier in d.modifiers if modifier in ("v2", "v4", "v8")), 1)


def _check_vector(d: Decoded, registers: list[str]) -> None:
    if len(registers) != _width(d):
        raise d.unsupported()


def _is_strong(d: Decoded) -> bool:
    return not {"volatile", "relaxed", "acquire", "release"}.isdisjoint(d.modifiers)


MEMORY_TYPES = f"b8 u8 s8 {UNTYPED} {INTEGERS} f32 f64"


@_known(
    "ld",
    types=MEMORY_TYPES,
    modifiers=f"param {' '.join(_SPACES)} {_SCOPES} {_LOAD_HINTS} v2 v4 v8 weak volatile relaxed acquire",
)
def _ld(d: Decoded, o: Operands) -> str:
    registers, bits = vector(d.operands[0]), d.type.bits
    _check_vector(d, registers)
    loaded = d.type if d.type.is_signed else TYPES[f"b{bits}"]
    if "param" in d.modifiers:
        return _ld_param(d, o, loaded)
    lines = [_checked_address(d, o, d.operands[1], "ACCESS_LOAD", len(registers) * bits // 8)]
    for i in range(len(registers)):
        place = f"({loaded.storage} *)address + {i}"
        value = f"__atomic_load_n({place}, {_memory_order(d)})" if _is_strong(d) else f"*({place})"
        lines.append(f"{loaded.storage} value{i} = {value};")
    # Load all elements before the first is written: the address may be in a target.
    lines += [o.write(register, f"value{i}", loaded) for i, register in enumerate(registers)]
    return f"{{ {' '.join(lines)} }}"


def _ld_param(d: Decoded, o: Operands, loaded: Type) -> str:
    name, _, offset = d.operands[1].strip("[] ").partition("+")
    if name.strip() not in o.parameters or _width(d) > 1:
        raise d.unsupported()
    place = o.parameters[name.strip()] + int(offset or "0", 0)
    return o.write(d.operands[0], f"*(const {loaded.storage} *)(warp->parameters + {place})", loaded)


@_known(
    "st",
    types=MEMORY_TYPES,
    modifiers=f"{' '.join(_SPACES)} {_SCOPES} {_STORE_HINTS} v2 v4 v8 weak volatile relaxed release",
)
def _st(d: Decoded, o: Operands) -> str:
    registers, bits = vector(d.operands[1]), d.type.bits
    _check_vector(d, registers)
    lines = [_checked_address(d, o, d.operands[0], "ACCESS_STORE", len(registers) * bits // 8)]
    # Triton lets several warps store the same value to one place in shared memory: that is no race.
    atomic = _is_strong(d) or d.one_of(*_SPACES) != "global"
    for i, register in enumerate(registers):
        place, value = f"(uint{bits}_t *)address + {i}", o.bits(register, bits)
        lines.append(f"__atomic_store_n({place}, {value}, {_memory_order(d)});" if atomic else f"*({place}) = {value};")
    return f"{{ {' '.join(lines)} }}"


_FETCH = {"add": "__atomic_fetch_add", "and": "__atomic_fetch_and", "or": "__atomic_fetch_or"}
_FETCH |= {"xor": "__atomic_fetch_xor", "exch": "__atomic_exchange_n"}


_ATOMIC_TYPES = "b32 b64 u32 s32 u64 s64 f32 f64"
_ATOMIC_MODIFIERS = f"{' '.join(_SPACES)} {_SCOPES} relaxed release min max add and or xor"


@_known("atom", types=_ATOMIC_TYPES, modifiers=f"{_ATOMIC_MODIFIERS} acquire acq_rel cas exch")
@_known("red", types=_ATOMIC_TYPES, modifiers=_ATOMIC_MODIFIERS)
def _atom(d: Decoded, o: Operands) -> str:
    """Atomics; `red` is an atomic without the old value as a result."""
    target, place, *values = d.operands if d.name == "atom" else ("_", *d.operands)
    operation = d.one_of("cas", "min", "max", *_FETCH)
    bits = TYPES[f"b{d.type.bits}"]
    pointer, order = f"({bits.value} *)address", _memory_order(d)
    if operation in _FETCH and not d.type.is_float:
        update = f"{bits.value} old = {_FETCH[operation]}({pointer}, {o.bits(values[0], bits.bits)}, {order});"
    elif operation == "exch":
        raise d.unsupported()
    else:
        update = _compare_and_swap(d, o, operation, values)
    address = _checked_address(d, o, place, "ACCESS_ATOMIC", bits.bits // 8)
    return f"{{ jitter(warp); {address} {update} {o.write(target, 'old', bits)} }}"


def _compare_and_swap(d: Decoded, o: Operands, operation: str, values: list[str]) -> str:
    bits = TYPES[f"b{d.type.bits}"]
    pointer, order = f"({bits.value} *)address", _memory_order(d)
    # Where nothing is stored, nothing is released.
    failure = {"__ATOMIC_ACQ_REL": "__ATOMIC_ACQUIRE", "__ATOMIC_RELEASE": "__ATOMIC_RELAXED"}.get(order, order)
    if operation == "cas":
        compare, new = (o.bits(value, bits.bits) for value in values)
        return (
            f"{bits.value} old = {compare}; __atomic_compare_exchange_n({pointer}, &old, {new}, 0, {order}, {failure});"
        )
    old = f"{d.type.decode}(old)" if d.type.is_float else f"({d.type.value})old"
    value = o.read(values[0], d.type)
    if d.type.is_float:
        if operation != "add":
            raise d.unsupported()
        # In global memory f32 is added without subnormal numbers, in shared memory with them.
        flush = "flush" if d.type.name == "f32" and "global" in d.modifiers else ""
        new = f"{d.type.encode}({flush}({flush}({old}) + {flush}({value})))"
    else:
        new = f"({old} {'<' if operation == 'min' else '>'} {value} ? {old} : {value})"
    return (
        f"{bits.value} old = __atomic_load_n({pointer}, __ATOMIC_RELAXED); "
        f"while (!__atomic_compare_exchange_n({pointer}, &old, {new}, 0, {order}, {failure})) {{}}"
    )


@_known(
    "createpolicy",
    types="b64",
    modifiers="fractional L2::evict_first L2::evict_last L2::evict_normal L2::evict_unchanged",
)
def _createpolicy(d: Decoded, o: Operands) -> str:
    """A cache policy is a hint without effect here."""
    return o.write(d.operands[0], "0", d.type)


# ---- Lanes, warps and CTAs together ----


def _members(d: Decoded, o: Operands, operand: str) -> str:
    return f"LANES(mask) require_members(warp, mask, {o.bits(operand, 32)}, live, {d.index});"


@_known("bar", modifiers="sync warp cta", meets=True)
@_known("barrier", modifiers="sync cta aligned", meets=True)
def _barrier(d: Decoded, o: Operands) -> str:
    """A barrier of the CTA's warps or, with `.warp`, of a warp's lanes, which run in step in any case."""
    if "sync" not in d.modifiers or len(d.operands) != 1:
        raise d.unsupported()
    if "warp" in d.modifiers:
        return _members(d, o, d.operands[0])
    # A lane that has returned misses the barrier too: all lanes of a warp must come to it.
    divergent = f'if (mask != lanes) fault(warp, "{d.name}.sync in divergent code", {d.index}, 0);'
    return f"if (mask) {{ {divergent} cta_barrier(warp); }}"


@_known("membar", modifiers="cta gl sys", whole_warp=True)
@_known("fence", modifiers=f"{_SCOPES} acq_rel sc", whole_warp=True)
def _fence(_d: Decoded, _o: Operands) -> str:
    return "if (mask) __atomic_thread_fence(__ATOMIC_SEQ_CST);"


@_known("nanosleep", types="u32", whole_warp=True)
def _nanosleep(_d: Decoded, _o: Operands) -> str:
    return "if (mask) sched_yield();"


@_known("griddepcontrol", modifiers="wait launch_dependents", whole_warp=True)
def _griddepcontrol(_d: Decoded, _o: Operands) -> str:
    """Launches never overlap here."""
    return ""


@_known("shfl", types="b32", modifiers="sync up down bfly idx", meets=True)
def _shfl(d: Decoded, o: Operands) -> str:
    mode = f"SHUFFLE_{d.one_of('up', 'down', 'bfly', 'idx').upper()}"
    target, source, distance, clamp, members = d.operands
    value_target, _, range_target = target.partition("|")
    writes = o.write(value_target.strip(), "result[lane]", d.type)
    if range_target:
        writes += " " + o.write(range_target.strip(), "in_range[lane]", TYPES["pred"])
    return f"""{_members(d, o, members)}
uint32_t value[32], result[32];
bool in_range[32];
LANES(mask) value[lane] = {o.bits(source, 32)};
LANES(mask) {{
    int from = shuffle_source({mode}, lane, {o.bits(distance, 32)}, {o.bits(clamp, 32)}, &in_range[lane]);
    if (!((mask >> from) & 1)) fault(warp, "shfl from an inactive lane", {d.index}, 0);
    result[lane] = value[from];
}}
LANES(mask) {{ {writes} }}"""


_NEUTRAL = {
    ("add", "u32"): "0",
    ("add", "s32"): "0",
    ("or", "b32"): "0",
    ("xor", "b32"): "0",
    ("and", "b32"): "UINT32_MAX",
    ("min", "u32"): "UINT32_MAX",
    ("max", "u32"): "0",
    ("min", "s32"): "INT32_MAX",
    ("max", "s32"): "INT32_MIN",
    ("min", "f32"): "CANONICAL_NAN",
    ("max", "f32"): "CANONICAL_NAN",
}


@_known("redux", types="b32 u32 s32 f32", modifiers="sync add min max and or xor abs NaN", meets=True)
def _redux(d: Decoded, o: Operands) -> str:
    operation = d.one_of("add", "min", "max", "and", "or", "xor")
    start = _NEUTRAL.get((operation, d.type.name))
    if start is None or (d.type.name != "f32" and not {"abs", "NaN"}.isdisjoint(d.modifiers)):
        raise d.unsupported()
    value = o.read(d.operands[1], d.type)
    if d.type.name == "f32":
        value = f"fabsf({value})" if "abs" in d.modifiers else value
        combined = f"float_{operation}(total, {value})"
        if "NaN" in d.modifiers:
            start = "INFINITY" if operation == "min" else "-INFINITY"
            combined = f"float_{operation}_nan(total, {value})"
    elif operation in ("min", "max"):
        combined = f"total {'<' if operation == 'min' else '>'} {value} ? total : {value}"
    else:
        combined = f"total {(_LOGIC | {'add': '+'})[operation]} {value}"
    return f"""{_members(d, o, d.operands[2])}
{d.type.value} total = {start};
LANES(mask) total = {combined};
LANES(mask) {o.write(d.operands[0], "total", d.type)}"""


@_known("vote", types="pred b32", modifiers="sync all any uni ballot", meets=True)
def _vote(d: Decoded, o: Operands) -> str:
    target, source, members = d.operands
    mode = d.one_of("all", "any", "uni", "ballot")
    all_, any_ = "votes == mask", "votes != 0"
    result = {"all": all_, "any": any_, "uni": f"{all_} || !({any_})", "ballot": "votes"}[mode]
    if (mode == "ballot") != (d.type.name == "b32"):
        raise d.unsupported()
    return f"""{_members(d, o, members)}
uint32_t votes = 0;
LANES(mask) votes |= (uint32_t){o.predicate(source)} << lane;
LANES(mask) {o.write(target, result, d.type)}"""


@_known("activemask", types="b32", whole_warp=True)
def _activemask(d: Decoded, o: Operands) -> str:
    return f"LANES(mask) {o.write(d.operands[0], 'mask', d.type)}"


# A matrix has 8 rows of 8 elements of 16 bits; a lane holds two neighbours of it or, with `.trans`, of its transpose.
_MATRIX_MODIFIERS = "sync aligned m8n8 x1 x2 x4 trans shared shared::cta"


def _matrix_elements(d: Decoded, matrix: int) -> list[str]:
    """The places of the two elements of a matrix that the current lane holds."""
    places = [("lane / 4", f"lane % 4 * 2 + {i}") for i in range(2)]
    if "trans" in d.modifiers:
        places = [(column, row) for row, column in places]
    return [f"((uint16_t *)rows[{8 * matrix} + {row}])[{column}]" for row, column in places]


def _matrix_rows(d: Decoded, o: Operands, place: str, access: str, registers: list[str]) -> str:
    """Lane i has the address of row i % 8 of matrix i / 8."""
    if len(registers) != int(d.one_of("x1", "x2", "x4")[1:]):
        raise d.unsupported()
    return f"""if (mask != UINT32_MAX) fault(warp, "{d.name} in divergent code", {d.index}, 0);
uint64_t rows[32];
LANES(mask) if (lane < {8 * len(registers)}) {{
    {_checked_address(d, o, place, access, 16)}
    rows[lane] = address;
}}
"""


@_known("ldmatrix", types="b16", modifiers=_MATRIX_MODIFIERS, meets=True)
def _ldmatrix(d: Decoded, o: Operands) -> str:
    registers = vector(d.operands[0])
    writes = []
    for i, register in enumerate(registers):
        low, high = _matrix_elements(d, i)
        writes.append(o.write(register, f"(uint32_t){high} << 16 | {low}", TYPES["b32"]))
    return f"{_matrix_rows(d, o, d.operands[1], 'ACCESS_LOAD', registers)}LANES(mask) {{ {' '.join(writes)} }}"


@_known("stmatrix", types="b16", modifiers=_MATRIX_MODIFIERS, meets=True)
def _stmatrix(d: Decoded, o: Operands) -> str:
    registers = vector(d.operands[1])
    writes = []
    for i, register in enumerate(registers):
        low, high = _matrix_elements(d, i)
        value = o.bits(register, 32)
        writes.append(f"{low} = {value} & 0xffff; {high} = {value} >> 16;")
    return f"{_matrix_rows(d, o, d.operands[0], 'ACCESS_STORE', registers)}LANES(mask) {{ {' '.join(writes)} }}"
