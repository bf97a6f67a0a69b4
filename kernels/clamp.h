/* clamp: x <- min(max(x, low), high), in place. level.h includes this file once for each element type.
 *
 * A NaN keeps its bits. A group of LANES elements is written only if one of them is outside the bounds.
 */
TARGET static NOINLINE void NAME(clamp_group)(ELEMENT *x, int64_t count, WIDE low, WIDE high) {
    const ELEMENT lowest = NAME(narrow)(low), highest = NAME(narrow)(high);
    for (int64_t i = 0; i < count; i++) {
        ELEMENT raised = NAME(widen)(x[i]) < low ? lowest : x[i];
        x[i] = NAME(widen)(raised) > high ? highest : raised;
    }
}

TARGET static inline int NAME(lies_outside)(WIDE x, WIDE low, WIDE high) { return (x < low) + (x > high); }

TARGET static int NAME(clamp)(void *elements, int64_t count, double low, double high) {
    const WIDE lowest = NAME(widen)(NAME(narrow)((WIDE)low)), highest = NAME(widen)(NAME(narrow)((WIDE)high));
    ELEMENT *x = elements;
    int64_t whole = count / LANES * LANES;
    int was_outside = 0;
    if (isnan(lowest) || isnan(highest)) { /* as in torch, every element becomes NaN */
        for (int64_t i = 0; i < count; i++) x[i] = NAME(narrow)((WIDE)NAN);
        return 1;
    }
    for (int64_t i = 0; i < whole; i += LANES) {
        NAME(prefetch)(x + i, count - i);
        LOADED(x + i);
        int is_outside = 0;
        for (int j = 0; j < LANES; j++) is_outside |= NAME(lies_outside)(VALUE(j), lowest, highest);
        if (is_outside) NAME(clamp_group)(x + i, LANES, lowest, highest);
        was_outside |= is_outside;
    }
    int is_outside = 0;
    for (int64_t i = whole; i < count; i++) is_outside |= NAME(lies_outside)(NAME(widen)(x[i]), lowest, highest);
    if (is_outside) NAME(clamp_group)(x + whole, count - whole, lowest, highest);
    return was_outside | is_outside;
}
