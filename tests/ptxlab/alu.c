/* Arithmetic of PTX instructions that C has no operator for.
 *
 * Compiled in front of simt.c into one file for each kernel. Registers hold bits; a value is decoded from its bits,
 * computed with, and encoded again. Floating-point contraction is off and signed integers wrap (see kernel.py), so
 * that C's own operators on float, double and integers mean what PTX means by .rn and by its integer types. */
#define _GNU_SOURCE
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <time.h>

/* ---- Bits and values ---- */

static inline float f32_from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t f32_bits(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline double f64_from_bits(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint64_t f64_bits(double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float bf16_from_bits(uint16_t bits)
{
    return f32_from_bits((uint32_t)bits << 16);
}

static inline uint16_t bf16_bits(float value)
{
    uint32_t bits = f32_bits(value);
    if (value != value)
        return 0x7fff;
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; /* a carry out of the mantissa is the right exponent */
}

static inline float f16_from_bits(uint16_t bits)
{
    uint32_t sign = (uint32_t)(bits & 0x8000) << 16;
    uint32_t magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) /* infinity and NaN */
        return f32_from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x400)
        return f32_from_bits(sign | ((magnitude << 13) + ((127 - 15) << 23)));
    return f32_from_bits(sign | f32_bits((float)magnitude * 0x1p-24f));
}

static inline uint16_t f16_bits(float value)
{
    uint32_t bits = f32_bits(value);
    uint32_t magnitude = bits & 0x7fffffff;
    uint16_t sign = (bits >> 16) & 0x8000;
    if (magnitude > 0x7f800000)
        return 0x7fff;
    if (magnitude >= 0x477ff000) /* 65520: half way between the largest finite value and the next power of two */
        return sign | 0x7c00;
    if (magnitude < 0x38800000) /* below the smallest normal value, 2^-14: a multiple of 2^-24 */
        return sign | (uint16_t)nearbyintf(fabsf(value) * 0x1p24f);
    magnitude += 0xfff + ((magnitude >> 13) & 1);
    return sign | (uint16_t)((magnitude - ((127 - 15) << 23)) >> 13);
}

/* Rounds to float so that a further rounding to f16 or bf16 gives what a single rounding would: where inexact, of the
 * two neighbours it takes the one with an odd mantissa, which keeps "just above" and "just below" a tie apart. */
static inline float odd_float(long double exact)
{
    float value = (float)exact;
    uint32_t bits = f32_bits(value);
    if (exact == exact && (long double)value != exact && !(bits & 1))
        bits += fabsl(exact) > fabsf(value) ? 1 : -1;
    return f32_from_bits(bits);
}

/* a * b + c, rounded to odd; a and b have at most 11 bits of mantissa, so that their product is exact. */
static inline double odd_fma(double a, double b, double c)
{
    double product = a * b;
    double sum = product + c;
    if (!isfinite(sum))
        return sum;
    double back = sum - product;
    double error = (product - (sum - back)) + (c - back); /* Knuth's TwoSum: sum + error is exact */
    uint64_t bits = f64_bits(sum);
    if (error != 0 && !(bits & 1))
        bits += (error > 0) == (sum > 0) ? 1 : -1;
    return f64_from_bits(bits);
}

/* ---- Floating point ---- */

static inline float flush(float value) /* .ftz */
{
    return fabsf(value) < 0x1p-126f ? copysignf(0.0f, value) : value;
}

static inline float saturate(float value) /* .sat; NaN becomes +0 */
{
    return value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f;
}

#define CANONICAL_NAN f64_from_bits(0x7fffffffffffffff)

/* -0 is less than +0; of a number and a NaN, the number. */
static inline double float_min(double a, double b)
{
    if (a != a || b != b)
        return a == a ? a : b == b ? b : CANONICAL_NAN;
    if (a == b)
        return signbit(a) ? a : b;
    return a < b ? a : b;
}

static inline double float_max(double a, double b)
{
    if (a != a || b != b)
        return a == a ? a : b == b ? b : CANONICAL_NAN;
    if (a == b)
        return signbit(a) ? b : a;
    return a > b ? a : b;
}

/* The forms with .NaN: a NaN in either operand is the result. */
static inline double float_min_nan(double a, double b)
{
    return a != a || b != b ? CANONICAL_NAN : float_min(a, b);
}

static inline double float_max_nan(double a, double b)
{
    return a != a || b != b ? CANONICAL_NAN : float_max(a, b);
}

/* The .approx.ftz forms in f64 read and write the upper 32 bits only, and flush subnormals. */
static inline double upper_half(double value)
{
    value = f64_from_bits(f64_bits(value) & 0xffffffff00000000);
    return fabs(value) < 0x1p-1022 ? copysign(0.0, value) : value;
}

static inline double rcp_approx_ftz(double value)
{
    return upper_half(1.0 / upper_half(value));
}

static inline double rsqrt_approx_ftz(double value)
{
    return upper_half(1.0 / sqrt(upper_half(value)));
}

/* Float to integer, already rounded to an integral value: clamped to the range of `bits` bits; `of_nan` for NaN. */
static inline int64_t clamp_signed(double value, int bits, int64_t of_nan)
{
    double limit = ldexp(1.0, bits - 1);
    int64_t largest = (int64_t)(UINT64_MAX >> (65 - bits));
    if (value != value)
        return of_nan;
    return value >= limit ? largest : value < -limit ? -largest - 1 : (int64_t)value;
}

static inline uint64_t clamp_unsigned(double value, int bits, uint64_t of_nan)
{
    if (value != value)
        return of_nan;
    return value >= ldexp(1.0, bits) ? UINT64_MAX >> (64 - bits) : value <= 0 ? 0 : (uint64_t)value;
}

/* ---- Integers ---- */

/* Division by zero is undefined in PTX; the hardware gives all ones, and the dividend as the remainder. The most
 * negative number divided by -1 wraps, where the x86 instruction would trap. */
#define DIVIDE(type, a, b) ((b) == 0 ? (type)-1 : (type)-1 < 0 && (b) == (type)-1 ? (type)(-(a)) : (type)((a) / (b)))
#define REMAINDER(type, a, b) ((b) == 0 ? (a) : (type)-1 < 0 && (b) == (type)-1 ? (type)0 : (type)((a) % (b)))

static inline uint64_t low_bits(int count)
{
    return count >= 64 ? UINT64_MAX : (1ull << count) - 1;
}

static inline uint64_t extract_unsigned(uint64_t value, int position, int length, int width)
{
    return position >= width ? 0 : (value >> position) & low_bits(length);
}

/* Bits beyond the field or the register are copies of the field's topmost bit that exists. */
static inline int64_t extract_signed(uint64_t value, int position, int length, int width)
{
    int top = position + length - 1 < width - 1 ? position + length - 1 : width - 1;
    int available = position >= width ? 0 : length < width - position ? length : width - position;
    uint64_t field, copies;
    if (length == 0)
        return 0;
    field = available ? (value >> position) & low_bits(available) : 0;
    copies = (value >> top) & 1 ? ~low_bits(available) : 0;
    return (int64_t)(field | copies);
}

static inline uint64_t insert_bits(uint64_t field, uint64_t base, int position, int length, int width)
{
    uint64_t mask;
    if (length == 0 || position >= width)
        return base;
    mask = low_bits(length) << position;
    return (base & ~mask) | ((field << position) & mask);
}

static inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selectors)
{
    uint64_t bytes = (uint64_t)high << 32 | low;
    uint32_t result = 0;
    for (int i = 0; i < 4; i++) {
        int selector = (selectors >> (4 * i)) & 15;
        uint32_t byte = (bytes >> (8 * (selector & 7))) & 0xff;
        if (selector & 8) /* the byte's sign, replicated */
            byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}

static inline uint32_t lookup_logic(uint32_t a, uint32_t b, uint32_t c, int table) /* lop3 */
{
    uint32_t result = 0;
    for (int i = 0; i < 8; i++)
        if ((table >> i) & 1)
            result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
}

static inline uint32_t funnel_left(uint32_t low, uint32_t high, uint32_t count)
{
    return ((((uint64_t)high << 32 | low) << count) >> 32) & 0xffffffff;
}

static inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t count)
{
    return (((uint64_t)high << 32 | low) >> count) & 0xffffffff;
}

static inline uint32_t reverse_bits(uint32_t value)
{
    uint32_t result = 0;
    for (int i = 0; i < 32; i++)
        result |= ((value >> i) & 1) << (31 - i);
    return result;
}

static inline uint64_t nanoseconds(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000 + (uint64_t)time.tv_nsec;
}
