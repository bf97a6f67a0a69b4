/* apply: x <- x * coefficient, in place. Included once for each type, by level.h.
 *
 * The product is taken in fp32 (fp64 for fp64) and rounded once. Where the coefficient is 1 nothing is read or written.
 * NaN and inf keep their meaning: a NaN coefficient poisons all, and inf * 0 = NaN.
 */
TARGET static void NAME(scale)(void *elements, int64_t count, double coefficient) {
    /* A coefficient below this is split in two factors, so that none is subnormal: norms reach beyond 2^126. */
    const double small = sizeof(WIDE) == 4 ? 0x1p-100 : 0x1p-900;
    const double power = fabs(coefficient) < small ? small : 1;
    const WIDE factor = (WIDE)(coefficient / power), second = (WIDE)power;
    const int64_t whole = power == 1 ? count / LANES * LANES : 0;
    ELEMENT *x = elements;
    if (factor * second == 1) return;
    for (int64_t i = 0; i < whole; i += LANES) {
        NAME(prefetch)(x + i, count - i);
        NAME(multiply)(x + i, factor);
    }
    for (int64_t i = whole; i < count; i++) x[i] = NAME(narrow)(NAME(widen)(x[i]) * factor * second);
}
