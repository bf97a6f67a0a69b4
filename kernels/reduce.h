/* reduce: the partial sum of one chunk of a gradient. level.h includes this file once for each element type.
 *
 * Within a BLOCK, powers are added in the element's own precision (fp32 for the 16-bit types), in LANES lanes. Blocks
 * are added in fp64. If a block's sum is outside the range in which it is accurate, it is computed again in fp64 from
 * elements divided by the block's peak, the |x| with the largest power. So finite gradients never have an infinite
 * norm, and tiny ones never have the norm 0.
 */

/* Defines the sum of TERM over all elements v. */
#define SUM(KIND, TERM)                                                                                               \
    TARGET static double NAME(KIND)(const ELEMENT *x, int64_t count, int64_t left) {                                  \
        WIDE lanes[LANES] = {0};                                                                                      \
        double sums[LANES], sum = 0;                                                                                  \
        if (count <= SCALAR_MAX) {                                                                                    \
            for (int64_t i = 0; i < count; i++) {                                                                     \
                WIDE v = NAME(widen)(x[i]);                                                                           \
                sum += (WIDE)(TERM);                                                                                  \
            }                                                                                                         \
            return sum;                                                                                               \
        }                                                                                                             \
        int64_t whole = count / LANES * LANES;                                                                        \
        for (int64_t i = 0; i < whole; i += LANES) {                                                                  \
            NAME(prefetch)(x + i, left - i);                                                                          \
            LOADED(x + i);                                                                                            \
            for (int j = 0; j < LANES; j++) {                                                                         \
                WIDE v = VALUE(j);                                                                                    \
                lanes[j] += TERM;                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
        for (int64_t j = 0; j < count - whole; j++) {                                                                 \
            WIDE v = NAME(widen)(x[whole + j]);                                                                       \
            lanes[j] += TERM;                                                                                         \
        }                                                                                                             \
        for (int j = 0; j < LANES; j++) sums[j] = lanes[j];                                                           \
        return sum_of_lanes(sums);                                                                                    \
    }

SUM(squares, v * v)
SUM(magnitudes, v < 0 ? -v : v)
SUM(cubes, (v < 0 ? -v : v) * v * v)
SUM(nonzeros, v != 0)
#undef SUM

/* The sum of the powers of |x| / peak, in fp64. */
TARGET static double NAME(scaled_powers)(const ELEMENT *x, int64_t count, double p, double peak) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += pow(fabs((double)NAME(widen)(x[i])) / peak, p);
    return sum;
}

/* The same, vectorised, which `pow` is not: for values that are not fp64, with a peak that is finite and not 0. */
TARGET static double NAME(powers)(const ELEMENT *x, int64_t count, double p, double peak) {
    double lanes[LANES] = {0};
    for (int64_t i = 0; i < count; i += LANES) {
        double quotient[LANES] = {0};
        for (int64_t j = 0; j < at_most(LANES, count - i); j++) quotient[j] = fabs(NAME(widen)(x[i + j])) / peak;
        for (int j = 0; j < LANES; j++) lanes[j] += power_of(quotient[j], p);
    }
    return sum_of_lanes(lanes);
}

/* Defines the largest or smallest |x|. It compares the bits as integers, which have the same order as the numbers. A
 * NaN is above all numbers. For the smallest it counts as -1, which is a NaN's bits, too. */
#define EXTREME(KIND, FIRST, KEY, IS_BETTER)                                                                          \
    TARGET static double NAME(KIND)(const ELEMENT *x, int64_t count, int64_t left) {                                  \
        BITS lanes[LANES];                                                                                            \
        int64_t whole = count / LANES * LANES;                                                                        \
        for (int j = 0; j < LANES; j++) lanes[j] = FIRST;                                                             \
        for (int64_t i = 0; i < whole; i += LANES) {                                                                  \
            NAME(prefetch)(x + i, left - i);                                                                          \
            LOADED(x + i);                                                                                            \
            for (int j = 0; j < LANES; j++) {                                                                         \
                BITS v = NAME(key)(VALUE(j));                                                                         \
                BITS key = KEY;                                                                                       \
                lanes[j] = key IS_BETTER lanes[j] ? key : lanes[j];                                                   \
            }                                                                                                         \
        }                                                                                                             \
        for (int64_t j = 0; j < count - whole; j++) {                                                                 \
            BITS v = NAME(key)(NAME(widen)(x[whole + j]));                                                            \
            BITS key = KEY;                                                                                           \
            lanes[j] = key IS_BETTER lanes[j] ? key : lanes[j];                                                       \
        }                                                                                                             \
        BITS best = FIRST;                                                                                            \
        for (int j = 0; j < LANES; j++) best = lanes[j] IS_BETTER best ? lanes[j] : best;                             \
        WIDE value;                                                                                                   \
        memcpy(&value, &best, sizeof value);                                                                          \
        return value;                                                                                                 \
    }

TARGET static inline BITS NAME(key)(WIDE wide) {
    BITS bits;
    memcpy(&bits, &wide, sizeof bits);
    return bits & (BITS)(~(uint64_t)0 >> (65 - 8 * sizeof bits)); /* clears the sign */
}

#define INFINITE (sizeof(BITS) == 4 ? (BITS)0x7f800000 : (BITS)0x7ff0000000000000)
EXTREME(largest, 0, v, >)
EXTREME(smallest, INFINITE, v > INFINITE ? -1 : v, <)
#undef INFINITE
#undef EXTREME

/* The sum of powers of `count` elements, at most BLOCK. `left` elements remain from x on. */
TARGET static Partial NAME(block)(const ELEMENT *x, int64_t count, int64_t left, Order order) {
    /* Above `tiny`, subnormal rounding of BLOCK powers costs less than 2^-40 of their sum. Below `huge`, sums of blocks
     * stay finite in fp64. */
    const double tiny = sizeof(WIDE) == 4 ? 0x1p-85 : 0x1p-900, huge = sizeof(WIDE) == 4 ? INFINITY : 0x1p900;
    Partial partial = {0, 1};
    switch (order.kind) {
    case LARGEST: partial.sum = NAME(largest)(x, count, left); return partial;
    case SMALLEST: partial.sum = NAME(smallest)(x, count, left); return partial;
    case NONZEROS: partial.sum = NAME(nonzeros)(x, count, left); return partial;
    case SQUARES: partial.sum = NAME(squares)(x, count, left); break;
    case MAGNITUDES: partial.sum = NAME(magnitudes)(x, count, left); break;
    case CUBES: partial.sum = NAME(cubes)(x, count, left); break;
    }
    if (partial.sum > tiny && partial.sum < huge) return partial; /* other powers are always scaled */
    /* The |x| with the largest power. */
    double peak = order.p < 0 ? NAME(smallest)(x, count, left) : NAME(largest)(x, count, left);
    if (peak > 0 && peak < INFINITY) partial.peak = peak;
    else if (order.kind != POWERS) return partial; /* all are 0, or one is not finite */
    int as_vectors = sizeof(WIDE) == 4 && order.kind == POWERS && peak > 0 && peak < INFINITY;
    partial.sum = (as_vectors ? NAME(powers) : NAME(scaled_powers))(x, count, order.p, partial.peak);
    return partial;
}

/* The sum of powers of a chunk. `following` elements of the same gradient come after it. */
static Partial NAME(fold)(const void *x, int64_t count, int64_t following, Order order) {
    const ELEMENT *element = x;
    Partial partial = identity(order);
    for (int64_t i = 0; i < count; i += BLOCK) {
        int64_t left = count - i;
        partial = merge(partial, NAME(block)(element + i, at_most(BLOCK, left), left + following, order), order);
    }
    return partial;
}
