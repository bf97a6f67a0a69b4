/* One element type: `widen` converts it for computing, and `narrow` rounds a result to it. level.h includes this file
 * once for each type, with TYPE, LEVEL and TARGET defined. The 16-bit types are converted by integer arithmetic, which
 * compilers vectorise for any instruction set. For fp16 that is slow. So a level may define VECTOR, a register of fp32,
 * and LOAD_FP16, STORE_FP16 and STORE_FP32, by the processor's own instructions.
 *
 * LOADED(x) loads LANES elements, and VALUE(i) is the i-th of them, widened. `multiply` scales LANES elements. */

#undef ELEMENT
#undef WIDE
#undef BITS
#undef NAME
#define JOIN_(operation, type, level) operation##_##type##_##level
#define JOIN(operation, type, level) JOIN_(operation, type, level)

#if TYPE == 0
#define NAME(operation) JOIN(operation, fp32, LEVEL)
#define ELEMENT float
#define WIDE float
#define BITS int32_t
TARGET static inline float NAME(widen)(float x) { return x; }
TARGET static inline float NAME(narrow)(float x) { return x; }

#elif TYPE == 1
#define NAME(operation) JOIN(operation, bf16, LEVEL)
#define ELEMENT uint16_t
#define WIDE float
#define BITS int32_t
TARGET static inline float NAME(widen)(uint16_t x) { return float_of((uint32_t)x << 16); }
TARGET static inline uint16_t NAME(narrow)(float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16; /* to nearest, ties to even */
    return (uint16_t)(x != x ? 0x7fc0 : rounded);
}

#elif TYPE == 2
#define NAME(operation) JOIN(operation, fp16, LEVEL)
#define ELEMENT uint16_t
#define WIDE float
#define BITS int32_t
TARGET static inline float NAME(widen)(uint16_t x) {
    uint32_t magnitude = x & 0x7fff, exponent = magnitude & 0x7c00;
    uint32_t normal = (magnitude << 13) + ((127 - 15) << 23);
    uint32_t special = normal + ((127 - 15) << 23); /* inf and NaN get fp32's largest exponent */
    uint32_t subnormal = bits_of((float)(int32_t)magnitude * 0x1p-24f);
    uint32_t bits = exponent == 0x7c00 ? special : exponent ? normal : subnormal;
    return float_of(bits | (uint32_t)(x & 0x8000) << 16);
}
TARGET static inline uint16_t NAME(narrow)(float x) {
    uint32_t magnitude = bits_of(x) & 0x7fffffff, sign = bits_of(x) >> 16 & 0x8000;
    uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - ((127 - 15) << 23)) >> 13;
    uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f); /* the addition rounds to 2^-24 */
    uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    uint32_t finite = magnitude < 0x38800000 ? subnormal : normal; /* 2^-14, the smallest normal number */
    return (uint16_t)(sign | (magnitude >= 0x47800000 ? special : finite)); /* 65536 */
}

#else
#define NAME(operation) JOIN(operation, fp64, LEVEL)
#define ELEMENT double
#define WIDE double
#define BITS int64_t
TARGET static inline double NAME(widen)(double x) { return x; }
TARGET static inline double NAME(narrow)(double x) { return x; }
#endif

/* Prefetches the LANES elements that lie PREFETCH_BYTES ahead of x. `left` elements remain from x on. */
TARGET static inline void NAME(prefetch)(const ELEMENT *x, int64_t left) {
    if (left > PREFETCH_BYTES / (int64_t)sizeof *x)
        for (int i = 0; i < LANES * (int)sizeof *x; i += 64) PREFETCH((const char *)x + PREFETCH_BYTES + i);
}

#undef LOADED
#undef VALUE
#if TYPE == 2 && defined(VECTOR)
#define LOADED(x) WIDE wide[LANES]; NAME(load)(wide, x)
#define VALUE(i) wide[i]
TARGET static inline void NAME(load)(float *wide, const uint16_t *x) {
    for (int i = 0; i < LANES; i += sizeof(VECTOR) / 4) STORE_FP32(wide + i, LOAD_FP16(x + i));
}
TARGET static inline void NAME(multiply)(uint16_t *x, float factor) {
    for (int i = 0; i < LANES; i += sizeof(VECTOR) / 4) STORE_FP16(x + i, LOAD_FP16(x + i) * factor);
}
#else
#define LOADED(x) const ELEMENT *loaded = (x)
#define VALUE(i) NAME(widen)(loaded[i])
TARGET static inline void NAME(multiply)(ELEMENT *x, WIDE factor) {
    for (int i = 0; i < LANES; i++) x[i] = NAME(narrow)(NAME(widen)(x[i]) * factor);
}
#endif
