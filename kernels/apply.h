/* apply: x <- x * coefficient, in place. level.h includes this file once for each element type.
 *
 * The product is computed in fp32 (fp64 for fp64) and rounded once. If the coefficient is 1, no memory is touched.
 * NaN and inf keep their meaning: a NaN coefficient makes every element NaN, and inf * 0 = NaN.
 */
TARGET static void NAME(scale)(void *elements, int64_t count, double coefficient) {
    /* A smaller coefficient is split into two factors, neither of them subnormal: a norm may be far above 2^126. */
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
