"""The results of PTX arithmetic by its definition: exact rationals, rounded to a format."""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Format:
    """A binary floating-point format."""

    bits: int
    precision: int  # of the significand, including the leading bit
    largest_exponent: int

    @property
    def smallest_exponent(self) -> int:
        """The exponent of the smallest normal number, and of the subnormals."""
        return 1 - self.largest_exponent

    @property
    def infinity(self) -> int:
        """The bits of +inf."""
        return (2 * self.largest_exponent + 1) << (self.precision - 1)

    @property
    def sign(self) -> int:
        """The sign bit."""
        return 1 << (self.bits - 1)

    @property
    def canonical_nan(self) -> int:
        """The hardware's NaN: all bits except the sign are 1."""
        return self.sign - 1

    def value(self, bits: int) -> float:
        """The number that the bits represent. A double can hold the numbers of every format."""
        magnitude = bits & (self.sign - 1)
        exponent, mantissa = divmod(magnitude, 1 << (self.precision - 1))
        if magnitude >= self.infinity:
            number = math.inf if magnitude == self.infinity else math.nan
        else:
            significand = mantissa + (1 << (self.precision - 1) if exponent else 0)
            number = math.ldexp(significand, max(exponent, 1) - self.largest_exponent - self.precision + 1)
        return -number if bits & self.sign else number

    def round(self, exact: Fraction | float) -> int:
        """The bits of the nearest number, ties to even. A float is taken for -0, infinities and NaN."""
        if isinstance(exact, float):
            if math.isnan(exact):
                return self.canonical_nan
            if math.isinf(exact) or exact == 0:
                sign = self.sign if math.copysign(1, exact) < 0 else 0
                return sign | (self.infinity if exact else 0)
            exact = Fraction(exact)
        if exact == 0:
            return 0
        sign = self.sign if exact < 0 else 0
        exact = abs(exact)
        exponent = exact.numerator.bit_length() - exact.denominator.bit_length()
        if exact < Fraction(2) ** exponent:
            exponent -= 1
        exponent = max(exponent, self.smallest_exponent)
        quanta = round(exact / Fraction(2) ** (exponent - self.precision + 1))  # Python rounds a Fraction half to even
        # A carry out of the significand gives the next exponent; from the largest exponent it gives infinity.
        magnitude = ((exponent - self.smallest_exponent) << (self.precision - 1)) + quanta
        return sign | min(magnitude, self.infinity)

    def is_nan(self, bits: int) -> bool:
        """Whether the bits are a NaN."""
        return bits & (self.sign - 1) > self.infinity

    def flush(self, bits: int) -> int:
        """The bits, with a zero of the same sign for a subnormal number."""
        return bits & self.sign if bits & (self.sign - 1) < 1 << (self.precision - 1) else bits

    def ordered(self, bits: int) -> int:
        """An integer that grows by 1 from each number to the next larger one."""
        magnitude = bits & (self.sign - 1)
        return -magnitude if bits & self.sign else magnitude


FORMATS = {
    "f16": Format(16, 11, 15),
    "bf16": Format(16, 8, 127),
    "f32": Format(32, 24, 127),
    "f64": Format(64, 53, 1023),
}


def _finite(values: tuple[float, ...]) -> bool:
    return all(math.isfinite(value) for value in values)


def _exactly(special: Callable[..., float], exact: Callable[..., Fraction | float]) -> Callable[..., Fraction | float]:
    """`exact` on rationals where the operands are finite and the result is not 0, else `special` on floats."""

    def result(*values: float) -> Fraction | float:
        if _finite(values):
            number = exact(*map(Fraction, values))
            if number != 0:
                return number
        return special(*values)

    return result


def _special_fma(a: float, b: float, c: float) -> float:
    if math.isfinite(a) and math.isfinite(b):
        if not math.isfinite(c):
            return c
        if a != 0 and b != 0:
            return 0.0  # c cancels the product
    return a * b + c


def divide(a: float, b: float) -> Fraction | float:
    """IEEE division."""
    if math.isnan(a) or math.isnan(b) or (a == 0 and b == 0) or (math.isinf(a) and math.isinf(b)):
        return math.nan
    sign = math.copysign(1, a) * math.copysign(1, b)
    if b == 0 or math.isinf(a):
        return sign * math.inf
    if a == 0 or math.isinf(b):
        return sign * 0.0
    return Fraction(a) / Fraction(b)


def square_root(value: float) -> Fraction | float:
    """The square root to 200 bits: enough to round it right in any format, as no root is a tie."""
    if math.isnan(value) or value < 0:
        return math.nan
    if value == 0 or math.isinf(value):
        return value
    number = Fraction(value)
    scale = 2 ** (2 * (200 + number.denominator.bit_length()))
    return Fraction(math.isqrt(scale * number.numerator // number.denominator), math.isqrt(scale))


add = _exactly(operator.add, operator.add)
subtract = _exactly(operator.sub, operator.sub)
multiply = _exactly(operator.mul, operator.mul)
fused = _exactly(_special_fma, lambda a, b, c: a * b + c)


def wrap(value: int, bits: int, *, signed: bool = False) -> int:
    """The low bits of an integer, read as two's complement if signed."""
    value %= 1 << bits
    return value - (1 << bits) if signed and value >> (bits - 1) else value
