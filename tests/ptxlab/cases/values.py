"""Instructions that compute one register from others: the result of each, lane by lane."""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from .exact import FORMATS, add, divide, fused, multiply, square_root, subtract, wrap

BITS = {
    **{f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)},
    **{name: form.bits for name, form in FORMATS.items()},
    "f16x2": 32,
    "bf16x2": 32,
    "f32x2": 64,
    "pred": 1,
}
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
UNTYPED = ("b16", "b32", "b64")
SMALL = ("f16", "bf16")
UNDEFINED = None  # an expected result that PTX leaves open

Expected = Callable[..., int | None]


@dataclass(frozen=True)
class ValueCase:
    """One instruction: `d` is its result; `a`, `b`, `c`, `e` are its sources.

    `expected` takes the bits of the sources and returns those of the result, or `UNDEFINED`.
    """

    ptx: str
    result: str
    sources: tuple[str, ...]
    expected: Expected
    ulps: int = 0  # the allowed distance of an approximation from the rounded true value
    exact_nan: bool = False  # whether the NaN's bits are defined too

    def agrees(self, actual: int, expected: int | None) -> bool:
        """Whether a result is acceptable."""
        if expected is UNDEFINED or actual == expected:
            return True
        form = FORMATS.get(self.result)
        if form is None or self.exact_nan:
            return False
        if form.is_nan(expected):
            return form.is_nan(actual)
        if form.is_nan(actual):
            return False
        return abs(form.ordered(actual) - form.ordered(expected)) <= self.ulps


# ---- Operands ----


def _special_bits(type_: str) -> list[int]:
    """Bits at which mistakes are likely: zeros, subnormals, ties, extremes, infinities, NaN."""
    if type_ in FORMATS:
        form = FORMATS[type_]
        smallest_normal = 1 << (form.precision - 1)
        one = form.round(1.0)
        positive = [0, 1, smallest_normal - 1, smallest_normal, one - 1, one, one + 1, form.infinity - 1, form.infinity]
        positive += [form.canonical_nan, form.infinity + smallest_normal // 2]
        positive += [form.round(value) for value in (0.5, 1.5, 2.5, 3.0, 127.5, 65520.0, 2147483648.0, 1.8446744e19)]
        return [bits | sign for bits in positive for sign in (0, form.sign)]
    bits = BITS[type_]
    top = 1 << (bits - 1)
    return sorted({wrap(value, bits) for value in (0, 1, 2, 3, 7, 31, 32, 33, 63, 64, -1, -2, top, top - 1, top + 1)})


def _random_bits(type_: str, source: random.Random) -> int:
    if type_ in ("f16x2", "bf16x2", "f32x2"):
        element = type_[:-2]
        width = BITS[element]
        return operand(element, source) << width | operand(element, source)
    bits = source.getrandbits(BITS[type_])
    if type_ in FORMATS and source.random() < 0.5:  # so that a sum is not simply the larger number
        form = FORMATS[type_]
        return form.round(source.choice((-1, 1)) * source.uniform(0.5, 2) * 2.0 ** source.randint(-6, 6))
    # Small integers as often as large ones: counts, and quotients that are not 0 or 1.
    return bits >> source.choice((0, 0, BITS[type_] // 2, max(BITS[type_] - 6, 0)))


def operand(type_: str, source: random.Random) -> int:
    if type_ == "pred":
        return source.getrandbits(1)
    if not type_.endswith("x2") and source.random() < 0.3:
        return source.choice(_special_bits(type_))
    return _random_bits(type_, source)


def operands(case: ValueCase, count: int) -> list[tuple[int, ...]]:
    """`count` rows of source bits: combinations of special ones first, at most half, then mixed with random ones."""
    source = random.Random(case.ptx)  # noqa: S311 - reproducible, not secret
    rows: list[tuple[int, ...]] = []
    if not any(type_.endswith("x2") or type_ == "pred" for type_ in case.sources):
        specials = list(itertools.product(*(_special_bits(type_) for type_ in case.sources)))
        source.shuffle(specials)
        rows = specials[: count // 2]
    rows += [tuple(operand(type_, source) for type_ in case.sources) for _ in range(count - len(rows))]
    return rows


# ---- Floating-point arithmetic ----


def _floating(type_: str, function: Callable[..., Any], *, ftz: bool = False, sat: bool = False) -> Expected:
    """`function` of the operands' numbers, rounded once; for each element if the type is packed."""
    if type_.endswith("x2"):
        return _packed(type_[:-2], _floating(type_[:-2], function, ftz=ftz, sat=sat))
    form = FORMATS[type_]

    def expected(*sources: int) -> int:
        if ftz:
            sources = tuple(map(form.flush, sources))
        result = form.round(function(*map(form.value, sources)))
        if ftz:
            result = form.flush(result)
        if sat:
            result = 0 if form.is_nan(result) else form.round(min(max(form.value(result), 0.0), 1.0) + 0.0)
        return result

    return expected


def _packed(element: str, expected: Expected) -> Expected:
    width = BITS[element]
    count = 64 // width if element == "f32" else 32 // width

    def each(*sources: int) -> int | None:
        result = 0
        for i in range(count):
            part = expected(*(wrap(bits >> (i * width), width) for bits in sources))
            if part is None or FORMATS[element].is_nan(part):
                return UNDEFINED  # a NaN's bits are open, and with them the register's
            result |= part << (i * width)
        return result

    return each


def _arithmetic() -> Iterator[ValueCase]:
    binary = {"add": add, "sub": subtract, "mul": multiply}
    for (name, function), type_ in itertools.product(
        binary.items(), ("f32", "f64", "f32x2", "f16", "bf16", "f16x2", "bf16x2")
    ):
        modifiers = ["", ".rn"] if type_ != "f32x2" else [".rn", ".rn.ftz"]
        modifiers += [".ftz", ".sat", ".rn.ftz.sat"] if type_ == "f32" else []
        for modifier in modifiers:
            expected = _floating(type_, function, ftz="ftz" in modifier, sat="sat" in modifier)
            yield ValueCase(f"{name}{modifier}.{type_} d, a, b", type_, (type_, type_), expected)
    for type_ in ("f32", "f64", "f32x2", "f16", "bf16", "f16x2", "bf16x2"):
        for modifier in (
            ("", ".ftz", ".sat", ".ftz.sat") if type_ == "f32" else ("", ".ftz") if type_ == "f32x2" else ("",)
        ):
            expected = _floating(type_, fused, ftz="ftz" in modifier, sat="sat" in modifier)
            yield ValueCase(f"fma.rn{modifier}.{type_} d, a, b, c", type_, (type_,) * 3, expected)
    for small in SMALL:
        yield ValueCase(f"add.f32.{small} d, a, b", "f32", (small, "f32"), _mixed(add, small, 1))
        yield ValueCase(f"sub.rn.f32.{small} d, a, b", "f32", (small, "f32"), _mixed(subtract, small, 1))
        yield ValueCase(f"fma.rn.f32.{small} d, a, b, c", "f32", (small, small, "f32"), _mixed(fused, small, 2))


def _mixed(function: Callable[..., Any], small: str, count: int) -> Expected:
    """The first `count` operands are of the small type, the last one and the result f32."""
    wide = FORMATS["f32"]

    def expected(*sources: int) -> int:
        values = [FORMATS[small].value(bits) for bits in sources[:count]] + [wide.value(sources[count])]
        return wide.round(function(*values))

    return expected


def _division_and_roots() -> Iterator[ValueCase]:
    def reciprocal(value: float) -> Any:
        return divide(1.0, value)

    def inverse_root(value: float) -> Any:
        root = square_root(value)
        return 1 / root if isinstance(root, Fraction) else divide(1.0, root)

    for modifier in (".rn", ".full", ".approx", ".rn.ftz", ".full.ftz", ".approx.ftz"):
        expected = _floating("f32", divide, ftz="ftz" in modifier)
        yield ValueCase(f"div{modifier}.f32 d, a, b", "f32", ("f32", "f32"), expected)
    yield ValueCase("div.rn.f64 d, a, b", "f64", ("f64", "f64"), _floating("f64", divide))
    unary: list[tuple[str, Callable[[float], Any]]] = [("sqrt", square_root), ("rcp", reciprocal)]
    for name, function in unary:
        for modifier in (".rn", ".rn.ftz", ".approx", ".approx.ftz"):
            yield ValueCase(
                f"{name}{modifier}.f32 d, a", "f32", ("f32",), _floating("f32", function, ftz="ftz" in modifier)
            )
        yield ValueCase(f"{name}.rn.f64 d, a", "f64", ("f64",), _floating("f64", function))
    for modifier in (".approx", ".approx.ftz"):
        expected = _floating("f32", inverse_root, ftz="ftz" in modifier)
        yield ValueCase(f"rsqrt{modifier}.f32 d, a", "f32", ("f32",), expected, ulps=1)
    yield ValueCase("rsqrt.approx.f64 d, a", "f64", ("f64",), _floating("f64", inverse_root), ulps=1)
    for name, function in (("rcp", reciprocal), ("rsqrt", inverse_root)):
        # Only the upper 32 bits are computed: 2^33 units in the last place of the whole.
        expected = _floating("f64", function, ftz=True)
        yield ValueCase(f"{name}.approx.ftz.f64 d, a", "f64", ("f64",), expected, ulps=1 << 33)


def _transcendental() -> Iterator[ValueCase]:
    def exp2(value: float) -> float:
        if math.isnan(value):
            return math.nan
        return math.pow(2.0, min(max(value, -1000.0), 1000.0))

    def log2(value: float) -> float:
        if math.isnan(value) or value < 0:
            return math.nan
        return math.log2(value) if value else -math.inf

    def of_finite(function: Callable[[float], float]) -> Callable[[float], float]:
        return lambda value: function(value) if math.isfinite(value) else math.nan

    functions: dict[str, Callable[[float], float]] = {
        "ex2": exp2,
        "lg2": log2,
        "sin": of_finite(math.sin),
        "cos": of_finite(math.cos),
        "tanh": math.tanh,
    }
    for name, function in functions.items():
        for ftz in (False, True) if name != "tanh" else (False,):
            expected = _floating("f32", function, ftz=ftz)
            yield ValueCase(f"{name}.approx{'.ftz' if ftz else ''}.f32 d, a", "f32", ("f32",), expected, ulps=2)


def _extreme(type_: str, name: str, *, nan: bool = False, ftz: bool = False) -> Expected:
    form = FORMATS[type_]
    choose = min if name == "min" else max

    def expected(*sources: int) -> int:
        numbers = [form.flush(bits) if ftz else bits for bits in sources if not form.is_nan(bits)]
        if not numbers or (nan and len(numbers) < len(sources)):
            return form.canonical_nan
        # The key orders -0 below +0.
        return choose(numbers, key=lambda bits: (form.value(bits), not bits & form.sign))

    return expected


def _minimum_and_maximum() -> Iterator[ValueCase]:
    for name, type_ in itertools.product(("min", "max"), ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")):
        element = type_.removesuffix("x2")
        modifiers = ["", ".NaN"] if type_ != "f64" else [""]
        modifiers += [".ftz", ".ftz.NaN"] if type_ == "f32" else []
        for modifier in modifiers:
            expected = _extreme(element, name, nan="NaN" in modifier, ftz="ftz" in modifier)
            if element != type_:
                expected = _packed(element, expected)
            ptx = f"{name}{modifier}.{type_} d, a, b"
            yield ValueCase(ptx, type_, (type_, type_), expected, exact_nan=type_ != "f64")
        if type_ == "f32":
            for modifier in ("", ".NaN"):
                expected = _extreme(type_, name, nan="NaN" in modifier)
                yield ValueCase(f"{name}{modifier}.f32 d, a, b, c", type_, (type_,) * 3, expected, exact_nan=True)


def _signs() -> Iterator[ValueCase]:
    for name, type_ in itertools.product(("abs", "neg"), ("f32", "f64", "f16", "bf16", "f16x2", "bf16x2")):
        element = type_.removesuffix("x2")
        mask = FORMATS[element].sign * (1 if element == type_ else 1 << 16 | 1)

        def expected(a: int, name: str = name, mask: int = mask) -> int:
            return a & ~mask if name == "abs" else a ^ mask

        yield ValueCase(f"{name}.{type_} d, a", type_, (type_,), expected)
        if type_ == "f32":
            flush = FORMATS["f32"].flush
            yield ValueCase(f"{name}.ftz.f32 d, a", type_, (type_,), lambda a, e=expected, f=flush: e(f(a)))
    for type_ in ("f32", "f64"):
        mask = FORMATS[type_].sign
        yield ValueCase(
            f"copysign.{type_} d, a, b", type_, (type_, type_), lambda a, b, m=mask: (a & m) | (b & ~m), exact_nan=True
        )


def _classes() -> Iterator[ValueCase]:
    for type_ in ("f32", "f64"):
        form = FORMATS[type_]
        smallest = 2.0**form.smallest_exponent
        tests: dict[str, Callable[[float], bool]] = {
            "finite": math.isfinite,
            "infinite": math.isinf,
            "number": lambda value: not math.isnan(value),
            "notanumber": math.isnan,
            "normal": lambda value, s=smallest: math.isfinite(value) and abs(value) >= s,  # type: ignore[misc]
            "subnormal": lambda value, s=smallest: 0 < abs(value) < s,  # type: ignore[misc]
        }
        for name, test in tests.items():
            yield ValueCase(
                f"testp.{name}.{type_} d, a", "pred", (type_,), lambda a, t=test, f=form: int(t(f.value(a)))
            )


# ---- Integers ----


def _integer(type_: str, function: Callable[..., int | None], result: str = "") -> Expected:
    """`function` of the operands' integers, wrapped to the result's width."""
    bits, signed = BITS[type_], type_.startswith("s")
    result_bits = BITS[result or type_]

    def expected(*sources: int) -> int | None:
        value = function(*(wrap(source, bits, signed=signed) for source in sources))
        return UNDEFINED if value is None else wrap(value, result_bits)

    return expected


def _quotient(a: int, b: int) -> int | None:
    """PTX leaves division by zero open."""
    return UNDEFINED if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def _remainder(a: int, b: int) -> int | None:
    quotient = _quotient(a, b)
    return UNDEFINED if quotient is None else a - quotient * b


def _integer_arithmetic() -> Iterator[ValueCase]:
    functions: dict[str, Callable[[int, int], int | None]] = {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul.lo": lambda a, b: a * b,
        "div": _quotient,
        "rem": _remainder,
        "min": min,
        "max": max,
    }
    for (name, function), type_ in itertools.product(functions.items(), INTEGERS):
        yield ValueCase(f"{name}.{type_} d, a, b", type_, (type_, type_), _integer(type_, function))
    for type_ in INTEGERS:
        bits = BITS[type_]
        high = _integer(type_, lambda a, b, n=bits: (a * b) >> n)
        yield ValueCase(f"mul.hi.{type_} d, a, b", type_, (type_, type_), high)
        low = _integer(type_, lambda a, b, c: a * b + c)
        yield ValueCase(f"mad.lo.{type_} d, a, b, c", type_, (type_,) * 3, low)
        high = _integer(type_, lambda a, b, c, n=bits: ((a * b) >> n) + c)
        yield ValueCase(f"mad.hi.{type_} d, a, b, c", type_, (type_,) * 3, high)
        if bits < 64:
            wide = f"{type_[0]}{2 * bits}"
            product = _integer(type_, lambda a, b: a * b, wide)
            yield ValueCase(f"mul.wide.{type_} d, a, b", wide, (type_, type_), product)

            def accumulated(a: int, b: int, c: int, product: Expected = product) -> int:
                return (product(a, b) or 0) + c

            yield ValueCase(
                f"mad.wide.{type_} d, a, b, c",
                wide,
                (type_, type_, wide),
                lambda a, b, c, f=accumulated, n=2 * bits: wrap(f(a, b, c), n),
            )
    for type_ in ("s16", "s32", "s64"):
        yield ValueCase(f"abs.{type_} d, a", type_, (type_,), _integer(type_, abs))
        yield ValueCase(f"neg.{type_} d, a", type_, (type_,), _integer(type_, lambda a: -a))


def _bit_text(value: int, bits: int) -> str:
    """The bits as text, the lowest first."""
    return f"{value:0{bits}b}"[::-1]


def _from_bit_text(text: str) -> int:
    return int(text[::-1], 2)


def _extract(type_: str) -> Expected:
    """The definition in the PTX manual, bit by bit."""
    bits = BITS[type_]

    def expected(a: int, position: int, length: int) -> int:
        text, position, length = _bit_text(a, bits), position & 255, length & 255
        fill = "0"
        if type_.startswith("s") and length:
            fill = text[min(position + length - 1, bits - 1)]
        return _from_bit_text(
            "".join(text[position + i] if i < length and position + i < bits else fill for i in range(bits))
        )

    return expected


def _insert(type_: str) -> Expected:
    bits = BITS[type_]

    def expected(a: int, b: int, position: int, length: int) -> int:
        text, position, length = list(_bit_text(b, bits)), position & 255, length & 255
        for i in range(length):
            if position + i < bits:
                text[position + i] = _bit_text(a, bits)[i]
        return _from_bit_text("".join(text))

    return expected


def _permute(a: int, b: int, selectors: int) -> int:
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    result = []
    for i in range(4):
        selector = (selectors >> 4 * i) % 16
        byte = source[selector % 8]
        result.append((255 if byte >= 128 else 0) if selector >= 8 else byte)
    return int.from_bytes(bytes(result), "little")


def _table_lookup(table: int) -> Expected:
    def expected(a: int, b: int, c: int) -> int:
        texts = zip(*(_bit_text(value, 32) for value in (a, b, c)), strict=True)
        return _from_bit_text("".join(_bit_text(table, 8)[int("".join(bits), 2)] for bits in texts))

    return expected


def _bit_operations() -> Iterator[ValueCase]:
    logic: dict[str, Callable[[int, int], int]] = {
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
    }
    for type_ in ("pred", *UNTYPED):
        for name, function in logic.items():
            yield ValueCase(f"{name}.{type_} d, a, b", type_, (type_, type_), function)
        yield ValueCase(f"not.{type_} d, a", type_, (type_,), lambda a, n=BITS[type_]: a ^ ((1 << n) - 1))
    for type_ in (*UNTYPED, *INTEGERS):
        bits, signed = BITS[type_], type_.startswith("s")
        if type_ in UNTYPED:
            yield ValueCase(f"shl.{type_} d, a, b", type_, (type_, "u32"), lambda a, b, n=bits: wrap(a << min(b, n), n))
        yield ValueCase(
            f"shr.{type_} d, a, b",
            type_,
            (type_, "u32"),
            lambda a, b, n=bits, s=signed: wrap(wrap(a, n, signed=s) >> min(b, n), n),
        )
    for mode, limit in (("wrap", lambda c: c % 32), ("clamp", lambda c: min(c, 32))):
        yield ValueCase(
            f"shf.l.{mode}.b32 d, a, b, c",
            "b32",
            ("b32", "b32", "u32"),
            lambda a, b, c, f=limit: wrap((b << 32 | a) << f(c) >> 32, 32),
        )
        yield ValueCase(
            f"shf.r.{mode}.b32 d, a, b, c",
            "b32",
            ("b32", "b32", "u32"),
            lambda a, b, c, f=limit: wrap((b << 32 | a) >> f(c), 32),
        )
    for type_ in ("u32", "s32", "u64", "s64"):
        yield ValueCase(f"bfe.{type_} d, a, b, c", type_, (type_, "u8", "u8"), _extract(type_))
    for type_ in ("b32", "b64"):
        yield ValueCase(f"bfi.{type_} d, a, b, c, e", type_, (type_, type_, "u8", "u8"), _insert(type_))
        yield ValueCase(f"popc.{type_} d, a", "b32", (type_,), lambda a: a.bit_count())
        yield ValueCase(f"clz.{type_} d, a", "b32", (type_,), lambda a, n=BITS[type_]: n - a.bit_length())
    yield ValueCase("brev.b32 d, a", "b32", ("b32",), lambda a: int(_bit_text(a, 32), 2))
    yield ValueCase("prmt.b32 d, a, b, c", "b32", ("b32",) * 3, _permute)
    for table in (0x96, 0xE8, 0xCA, 0x01, 0xF8):
        yield ValueCase(f"lop3.b32 d, a, b, c, {table:#x}", "b32", ("b32",) * 3, _table_lookup(table))


# ---- Comparison and selection ----

_RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
_UNSIGNED_NAMES = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


def _compare(type_: str, comparison: str, *, ftz: bool = False) -> Expected:
    if type_ not in FORMATS:
        relation = _RELATIONS[_UNSIGNED_NAMES.get(comparison, comparison)]
        return _integer(type_, lambda a, b: int(relation(a, b)), "pred")
    form = FORMATS[type_]

    def expected(*sources: int) -> int:
        a, b = (form.value(form.flush(bits) if ftz else bits) for bits in sources)
        unordered = math.isnan(a) or math.isnan(b)
        if comparison in ("num", "nan"):
            return int(unordered == (comparison == "nan"))
        if unordered:
            return int(comparison.endswith("u"))
        return int(_RELATIONS[comparison.removesuffix("u")](a, b))

    return expected


def _comparisons() -> Iterator[ValueCase]:
    for type_ in ("f16", "bf16", "f32", "f64"):
        for comparison in (*_RELATIONS, *(f"{name}u" for name in _RELATIONS), "num", "nan"):
            expected = _compare(type_, comparison)
            yield ValueCase(f"setp.{comparison}.{type_} d, a, b", "pred", (type_, type_), expected)
            if type_ in ("f16", "bf16"):
                # The test's target for the half that is not checked is a source.
                for targets, shift in (("d|c", 0), ("c|d", 16)):
                    yield ValueCase(
                        f"setp.{comparison}.{type_}x2 {targets}, a, b",
                        "pred",
                        (f"{type_}x2", f"{type_}x2", "pred"),
                        lambda a, b, _, e=expected, s=shift: e(a >> s & 0xFFFF, b >> s & 0xFFFF),
                    )
    yield ValueCase("setp.eq.ftz.f32 d, a, b", "pred", ("f32", "f32"), _compare("f32", "eq", ftz=True))
    yield ValueCase("setp.gtu.ftz.f32 d, a, b", "pred", ("f32", "f32"), _compare("f32", "gtu", ftz=True))
    for type_ in (*INTEGERS, *UNTYPED):
        names = ["eq", "ne"] if type_ in UNTYPED else list(_RELATIONS)
        names += list(_UNSIGNED_NAMES) if type_.startswith("u") else []
        for comparison in names:
            expected = _compare(type_, comparison)
            yield ValueCase(f"setp.{comparison}.{type_} d, a, b", "pred", (type_, type_), expected)
    combine: dict[str, Callable[[int, int], int]] = {
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "xor": lambda a, b: a ^ b,
    }
    less, less_integer = _compare("f32", "lt"), _compare("s32", "lt")
    for (name, function), negated in itertools.product(combine.items(), (False, True)):
        yield ValueCase(
            f"setp.lt.{name}.f32 d, a, b, {'!' if negated else ''}c",
            "pred",
            ("f32", "f32", "pred"),
            lambda a, b, c, f=function, e=less, n=negated: f(e(a, b), c ^ n),
        )
        # The second of the two results is checked; the test's target for the first is a source.
        yield ValueCase(
            f"setp.lt.{name}.s32 c|d, a, b, {'!' if negated else ''}c",
            "pred",
            ("s32", "s32", "pred"),
            lambda a, b, c, f=function, e=less_integer, n=negated: f(1 - e(a, b), c ^ n),
        )
    for type_ in (*UNTYPED, *INTEGERS, "f32", "f64"):
        yield ValueCase(
            f"selp.{type_} d, a, b, c", type_, (type_, type_, "pred"), lambda a, b, c: a if c else b, exact_nan=True
        )


# ---- Moves and conversions ----


def _moves() -> Iterator[ValueCase]:
    for type_ in ("pred", *UNTYPED, *INTEGERS, "f32", "f64"):
        yield ValueCase(f"mov.{type_} d, a", type_, (type_,), lambda a: a, exact_nan=True)
    for literal, type_, bits in (
        ("-7", "b32", 2**32 - 7),
        ("0x8000000000000000", "b64", 2**63),
        ("-9223372036854775808", "s64", 2**63),
        ("4294967295U", "u32", 2**32 - 1),
        ("0f7F800000", "f32", 0x7F800000),
        ("0d3FF0000000000001", "f64", 0x3FF0000000000001),
        ("0f3f800000", "b32", 0x3F800000),
    ):
        yield ValueCase(f"mov.{type_} d, {literal}", type_, (), lambda bits=bits: bits, exact_nan=True)
    for wide, narrow, count in (("b32", "b16", 2), ("b64", "b32", 2), ("b64", "b16", 4)):
        names = ("a", "b", "c", "e")[:count]
        width = BITS[narrow]
        yield ValueCase(
            f"mov.{wide} d, {{{', '.join(names)}}}",
            wide,
            (narrow,) * count,
            lambda *parts, n=width: sum(part << (i * n) for i, part in enumerate(parts)),
        )
        for i in range(count):
            targets = ", ".join("d" if i == place else "_" for place in range(count))
            yield ValueCase(
                f"mov.{wide} {{{targets}}}, a", narrow, (wide,), lambda a, n=width, i=i: wrap(a >> (i * n), n)
            )
    yield ValueCase("cvta.to.global.u64 d, a", "u64", ("u64",), lambda a: a)
    yield ValueCase("cvta.global.u64 d, a", "u64", ("u64",), lambda a: a)
    for policy in ("evict_first", "evict_last", "evict_normal", "evict_unchanged"):
        yield ValueCase(f"createpolicy.fractional.L2::{policy}.b64 d, 1.0", "b64", (), lambda: UNDEFINED)


_ROUND_TO_INTEGRAL: dict[str, Callable[[Fraction], int]] = {
    "rni": round,  # half to even
    "rmi": math.floor,
    "rpi": math.ceil,
    "rzi": math.trunc,
}


def _to_integer(source: str, to: str, rounding: str) -> Expected:
    """Out of range clamps; the PTX manual's rule for NaN."""
    form, bits, signed = FORMATS[source], BITS[to], to.startswith("s")
    lowest, highest = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)

    def expected(a: int) -> int:
        value = form.value(a)
        if math.isnan(value):
            return 1 << (bits - 1) if source == "f64" or bits == 64 else 0
        if math.isinf(value):
            return wrap(highest if value > 0 else lowest, bits)
        return wrap(min(max(_ROUND_TO_INTEGRAL[rounding](Fraction(value)), lowest), highest), bits)

    return expected


def _to_integral(type_: str, rounding: str) -> Expected:
    def function(value: float) -> float:
        if not math.isfinite(value):
            return value
        return math.copysign(float(_ROUND_TO_INTEGRAL[rounding](Fraction(value))), value)

    return _floating(type_, function)


def _convert_float(source: str, to: str, *, ftz: bool = False) -> Expected:
    def expected(a: int) -> int:
        a = FORMATS[source].flush(a) if ftz and source == "f32" else a
        result = FORMATS[to].round(FORMATS[source].value(a))
        return FORMATS[to].flush(result) if ftz and to == "f32" else result

    return expected


def _conversions() -> Iterator[ValueCase]:
    integers = ("u8", "s8", *INTEGERS)
    for to, source in itertools.permutations(integers, 2):
        signed = source.startswith("s")
        yield ValueCase(
            f"cvt.{to}.{source} d, a",
            to,
            (source,),
            lambda a, n=BITS[source], m=BITS[to], s=signed: wrap(wrap(a, n, signed=s), m),
        )
    for to, source in itertools.product(FORMATS, integers):
        if (to, BITS[source]) == ("bf16", 8):
            continue  # PTX has neither this conversion nor its inverse

        def from_integer(a: int, to: str = to, source: str = source) -> int:
            return FORMATS[to].round(Fraction(wrap(a, BITS[source], signed=source.startswith("s"))))

        yield ValueCase(f"cvt.rn.{to}.{source} d, a", to, (source,), from_integer)
    for to, source in itertools.product(integers, FORMATS):
        if (source, BITS[to]) != ("bf16", 8):
            yield ValueCase(f"cvt.rzi.{to}.{source} d, a", to, (source,), _to_integer(source, to, "rzi"))
    for rounding, to, source in itertools.product(("rni", "rmi", "rpi"), ("s32", "u64"), ("f32", "f64", "f16")):
        yield ValueCase(f"cvt.{rounding}.{to}.{source} d, a", to, (source,), _to_integer(source, to, rounding))
    for rounding, type_ in itertools.product(_ROUND_TO_INTEGRAL, ("f16", "f32", "f64")):
        yield ValueCase(f"cvt.{rounding}.{type_}.{type_} d, a", type_, (type_,), _to_integral(type_, rounding))
    for to, source in itertools.permutations(FORMATS, 2):
        narrowing = FORMATS[to].precision < FORMATS[source].precision or (to, source) == ("f16", "bf16")
        ptx = f"cvt{'.rn' if narrowing or (to, source) == ('bf16', 'f16') else ''}.{to}.{source} d, a"
        # A conversion to a narrow format has only one NaN.
        yield ValueCase(ptx, to, (source,), _convert_float(source, to), exact_nan=narrowing and to in SMALL)
    for ptx, to, source in (
        ("cvt.rn.ftz.f32.f64 d, a", "f32", "f64"),
        ("cvt.ftz.f64.f32 d, a", "f64", "f32"),
        ("cvt.ftz.f32.f16 d, a", "f32", "f16"),
    ):
        yield ValueCase(ptx, to, (source,), _convert_float(source, to, ftz=True))
    for small in SMALL:
        form = FORMATS[small]
        yield ValueCase(
            f"cvt.rn.{small}x2.f32 d, a, b",
            "b32",
            ("f32", "f32"),
            lambda a, b, f=form: f.round(FORMATS["f32"].value(a)) << 16 | f.round(FORMATS["f32"].value(b)),
        )


BATCHES: dict[str, list[ValueCase]] = {
    function.__name__.strip("_"): list(function())
    for function in (
        _arithmetic,
        _division_and_roots,
        _transcendental,
        _minimum_and_maximum,
        _signs,
        _classes,
        _integer_arithmetic,
        _bit_operations,
        _comparisons,
        _moves,
        _conversions,
    )
}
