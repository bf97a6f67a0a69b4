/* See cpu.h: dispatch by instruction set, tasks on threads, and norms from partial sums. */
#include "cpu.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { SQUARES, MAGNITUDES, CUBES, NONZEROS, LARGEST, SMALLEST, POWERS };

static Order order_of(double p) {
    Order order = {POWERS, p};
    if (p == 2) order.kind = SQUARES;
    if (p == 1) order.kind = MAGNITUDES;
    if (p == 3) order.kind = CUBES;
    if (p == 0) order.kind = NONZEROS;
    if (p == INFINITY) order.kind = LARGEST;
    if (p == -INFINITY) order.kind = SMALLEST;
    return order;
}

/* The partial sum of no elements: merging it changes nothing. */
static Partial identity(Order order) {
    Partial partial = {order.kind == SMALLEST ? INFINITY : 0, 1};
    return partial;
}

static Partial merge(Partial a, Partial b, Order order) {
    if (order.kind == LARGEST || order.kind == SMALLEST) {
        int b_is_better = order.kind == LARGEST ? b.sum > a.sum : b.sum < a.sum;
        return isnan(b.sum) || b_is_better ? b : a; /* a NaN in `a` stays */
    }
    if (b.sum == 0) return a;
    if (a.sum == 0) return b;
    if (a.peak == b.peak || !isfinite(a.sum) || !isfinite(b.sum)) {
        a.sum += b.sum;
        return a;
    }
    double factor = pow(b.peak / a.peak, order.p);
    if (factor <= 1) {
        a.sum += b.sum * factor;
        return a;
    }
    b.sum += a.sum / factor;
    return b;
}

static double norm_of(Partial partial, Order order) {
    switch (order.kind) {
    case SQUARES: return sqrt(partial.sum) * partial.peak;
    case CUBES: return cbrt(partial.sum) * partial.peak;
    case POWERS: return isnan(order.p) ? NAN : pow(partial.sum, 1 / order.p) * partial.peak; /* pow(1, NaN) is 1 */
    default: return partial.sum * partial.peak;
    }
}

#ifdef __GNUC__
#define NOINLINE __attribute__((noinline))
#define PREFETCH(address) __builtin_prefetch(address)
#else
#define NOINLINE
#define PREFETCH(address) (void)(address)
#endif

static int64_t at_most(int64_t limit, int64_t value) { return value < limit ? value : limit; }

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* v^p = 2^(p * log2(v)) by operations that vectorise, for v not subnormal and a result of at most 1. The error is below
 * 2^-44 for results above 2^-60. Smaller ones may be less accurate, since they do not change a sum that contains a 1.
 * For v = 0 (p > 0) and v = inf (p < 0) the result is 0. */
static inline double power_of(double v, double p) {
    uint64_t bits, biased;
    double mantissa, exponent, whole, result;
    memcpy(&bits, &v, sizeof bits);
    /* v = mantissa * 2^exponent, with the mantissa between sqrt(1/2) and sqrt(2) */
    biased = bits + (0x3ff0000000000000 - 0x3fe6a09e667f3bcd);
    bits = bits - (biased & 0xfff0000000000000) + 0x3ff0000000000000;
    memcpy(&mantissa, &bits, sizeof mantissa);
    bits = 0x4330000000000000 | biased >> 52; /* 2^52 + the exponent */
    memcpy(&exponent, &bits, sizeof exponent);
    exponent -= 0x1p52 + 1023;
    /* ln(mantissa) = 2 artanh(s), by its power series */
    double s = (mantissa - 1) / (mantissa + 1), t = s * s;
    double series = 1.0 / 21;
    series = series * t + 1.0 / 19, series = series * t + 1.0 / 17, series = series * t + 1.0 / 15;
    series = series * t + 1.0 / 13, series = series * t + 1.0 / 11, series = series * t + 1.0 / 9;
    series = series * t + 1.0 / 7, series = series * t + 1.0 / 5, series = series * t + 1.0 / 3;
    series = series * t + 1;
    double y = p * (exponent + 2 * 1.4426950408889634 * s * series); /* 1 / ln 2 */
    y = y < -1000 ? -1000 : y;
    /* 2^y = 2^whole * e^(rest * ln 2), by the power series of e^x */
    whole = y + 0x1.8p52;
    memcpy(&bits, &whole, sizeof bits);
    double rest = (y - (whole - 0x1.8p52)) * 0.6931471805599453;
    result = 1.0 / 6227020800;
    result = result * rest + 1.0 / 479001600, result = result * rest + 1.0 / 39916800;
    result = result * rest + 1.0 / 3628800, result = result * rest + 1.0 / 362880, result = result * rest + 1.0 / 40320;
    result = result * rest + 1.0 / 5040, result = result * rest + 1.0 / 720, result = result * rest + 1.0 / 120;
    result = result * rest + 1.0 / 24, result = result * rest + 1.0 / 6, result = result * rest + 0.5;
    result = result * rest + 1, result = result * rest + 1;
    bits <<= 52; /* whole, shifted to the exponent's bits */
    memcpy(&biased, &result, sizeof biased);
    bits += biased;
    memcpy(&result, &bits, sizeof result);
    return v == 0 || v > 0x1.fffffffffffffp1023 ? 0 : result;
}

/* Adds pairwise, in one fixed order: the rounding error grows with log2(LANES). */
static double sum_of_lanes(double sums[LANES]) {
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) sums[i] += sums[i + half];
    return sums[0];
}

#define LEVEL baseline
#define TARGET
#include "level.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <cpuid.h>
#include <immintrin.h>

#define LEVEL avx2
#define TARGET __attribute__((target("avx2,f16c")))
#define VECTOR __m256
#define LOAD_FP16(x) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x)))
#define STORE_FP16(x, v) _mm_storeu_si128((__m128i *)(x), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT))
#define STORE_FP32 _mm256_storeu_ps
#include "level.h"

#define LEVEL avx512
#ifdef __clang__
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c"), min_vector_width(512)))
#else
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,f16c,prefer-vector-width=512")))
#endif
#define VECTOR __m512
#define LOAD_FP16(x) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(x)))
#define STORE_FP16(x, v) _mm256_storeu_si256((__m256i *)(x), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT))
#define STORE_FP32 _mm512_storeu_ps
#include "level.h"

const Level *const *levels(void) {
    static const Level *const all[] = {&avx512, &avx2, &baseline, NULL};
    unsigned eax, ebx, ecx = 0, edx;
    int has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && ecx & bit_F16C; /* clang's builtin does not support it */
    int has_avx2 = has_f16c && __builtin_cpu_supports("avx2");
    int has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return has_avx512 ? all : has_avx2 ? all + 1 : all + 2;
}
#else
const Level *const *levels(void) {
    static const Level *const all[] = {&baseline, NULL};
    return all;
}
#endif

/* The work of one call. Each thread takes the next task when it is free. */
typedef struct Work Work;
struct Work {
    const Level *level;
    const Table *table;
    char *const *address;
    void (*kernel)(Work *work, int64_t chunk, void *x, int64_t count);
    int64_t next; /* the next task to start */
    int backwards;
    /* reduce */
    Order order;
    Partial *partial; /* [chunks] */
    /* apply, clamp and clip_units */
    const double *coefficient, *low, *high;
    int64_t stride;
    int was_outside;
    /* clip_units */
    char *const *weight;
    double eps;
};

static const int64_t itemsize[TYPES] = {4, 2, 2, 8}; /* bytes an element */

/* The elements of a chunk: up to the next one of the same gradient, or to the gradient's end. */
static int64_t length_of(const Table *table, int64_t index) {
    Chunk chunk = table->chunk[index];
    int is_last = index + 1 == table->chunks || table->chunk[index + 1].row != chunk.row;
    return (is_last ? table->row[chunk.row].count : table->chunk[index + 1].start) - chunk.start;
}

static void run_tasks(void *argument) {
    Work *work = argument;
    const Table *table = work->table;
    for (;;) {
        int64_t task = __atomic_fetch_add(&work->next, 1, __ATOMIC_RELAXED);
        if (task >= table->tasks) return;
        if (work->backwards) task = table->tasks - 1 - task;
        int64_t begin = table->task[task], end = table->task[task + 1];
        for (int64_t i = 0; i < end - begin; i++) {
            int64_t index = work->backwards ? end - 1 - i : begin + i;
            Chunk chunk = table->chunk[index];
            char *x = work->address[chunk.row] + chunk.start * itemsize[table->row[chunk.row].type];
            work->kernel(work, index, x, length_of(table, index));
        }
    }
}

static void run_in_pool(Work *work, Team team) {
    if (team.parallel && team.threads > 1 && work->table->tasks > 1)
        team.parallel(run_tasks, work, (unsigned)at_most(team.threads, work->table->tasks), 0);
    else
        run_tasks(work);
}

static void fold_chunk(Work *work, int64_t chunk, void *x, int64_t count) {
    Chunk own = work->table->chunk[chunk];
    Row row = work->table->row[own.row];
    work->partial[chunk] = work->level->fold[row.type](x, count, row.count - own.start - count, work->order);
}

int reduce(const Level *level, const Table *table, char *const *address, double p, Team team, double *total,
           double *norms) {
    Order order = order_of(p);
    Partial on_stack[64], *partial = on_stack;
    if (table->chunks > 64 && !(partial = malloc((size_t)table->chunks * sizeof *partial))) return -1;
    Work work = {.level = level, .table = table, .address = address, .kernel = fold_chunk, .order = order,
                 .partial = partial};
    run_in_pool(&work, team);
    Partial all = identity(order);
    for (int64_t i = 0; i < table->chunks;) {
        int64_t row = table->chunk[i].row;
        Partial own = partial[i++];
        for (; i < table->chunks && table->chunk[i].row == row; i++) own = merge(own, partial[i], order);
        if (norms) norms[row] = norm_of(own, order);
        if (order.kind == NONZEROS) own.sum = own.sum > 0; /* counts the gradient if it has any */
        all = merge(all, own, order);
    }
    *total = norm_of(all, order);
    if (partial != on_stack) free(partial);
    return 0;
}

static void scale_chunk(Work *work, int64_t chunk, void *x, int64_t count) {
    int64_t row = work->table->chunk[chunk].row;
    work->level->scale[work->table->row[row].type](x, count, work->coefficient[row * work->stride]);
}

void apply(const Level *level, const Table *table, char *const *address, const double *coefficient, int64_t stride,
           Team team) {
    Work work = {.level = level, .table = table, .address = address, .kernel = scale_chunk, .backwards = 1,
                 .coefficient = coefficient, .stride = stride};
    run_in_pool(&work, team);
}

void store(void *to, int type, double value) {
    if (type == FP64) *(double *)to = value;
    if (type == FP32) *(float *)to = (float)value;
    if (type == BF16) *(uint16_t *)to = narrow_bf16_baseline((float)value);
    if (type == FP16) *(uint16_t *)to = narrow_fp16_baseline((float)value);
}

int clip(const Level *level, const Table *table, char *const *address, double p, double max_norm, Team team,
         void *norm, int type) {
    double total;
    if (reduce(level, table, address, p, team, &total, NULL)) return -1;
    /* torch's formula, which is finite if the norm is 0. But an infinite bound clips nothing, whatever the norm. */
    double coefficient = max_norm == INFINITY ? 1 : max_norm / (total + 1e-6);
    if (!(coefficient >= 1)) apply(level, table, address, &coefficient, 0, team); /* true for a NaN, too */
    store(norm, type, total);
    return 0;
}

static void clamp_chunk(Work *work, int64_t chunk, void *x, int64_t count) {
    int64_t row = work->table->chunk[chunk].row, i = row * work->stride;
    if (work->level->clamp[work->table->row[row].type](x, count, work->low[i], work->high[i]))
        __atomic_store_n(&work->was_outside, 1, __ATOMIC_RELAXED);
}

int clamp(const Level *level, const Table *table, char *const *address, const double *low, const double *high,
          int64_t stride, Team team) {
    Work work = {.level = level, .table = table, .address = address, .kernel = clamp_chunk, .low = low, .high = high,
                 .stride = stride};
    run_in_pool(&work, team);
    return work.was_outside;
}

static void clip_unit(Work *work, int64_t chunk, void *x, int64_t count) {
    const Order squares = {SQUARES, 2};
    Chunk own = work->table->chunk[chunk];
    int64_t type = work->table->row[own.row].type;
    double norm = norm_of(work->level->fold[type](x, count, 0, squares), squares);
    const char *w = work->weight[own.row] + own.start * itemsize[type];
    double weight = norm_of(work->level->fold[type](w, count, 0, squares), squares);
    double limit = work->coefficient[own.row] * (weight < work->eps ? work->eps : weight);
    if (!(norm > limit)) return; /* true for a NaN, too */
    work->level->scale[type](x, count, limit / (norm > 1e-6 ? norm : 1e-6));
    __atomic_store_n(&work->was_outside, 1, __ATOMIC_RELAXED);
}

int clip_units(const Level *level, const Table *table, char *const *address, char *const *weight, const double *ratio,
               double eps, Team team) {
    Work work = {.level = level, .table = table, .address = address, .kernel = clip_unit, .weight = weight,
                 .coefficient = ratio, .eps = eps};
    run_in_pool(&work, team);
    return work.was_outside;
}

typedef struct { uintptr_t begin, end; } Span;

/* Merge sort: it is fast for spans that are almost sorted, as those of gradients are. */
static void sort(Span *span, Span *scratch, int64_t count) {
    if (count < 2) return;
    int64_t half = count / 2;
    sort(span, scratch, half);
    sort(span + half, scratch, count - half);
    if (span[half - 1].begin <= span[half].begin) return;
    memcpy(scratch, span, (size_t)half * sizeof *span);
    for (int64_t i = 0, left = 0, right = half; left < half; i++)
        span[i] = right < count && span[right].begin < scratch[left].begin ? span[right++] : scratch[left++];
}

int are_apart(const Table *table, char *const *address) {
    Span on_stack[128], *span = on_stack;
    if (table->rows > 64 && !(span = malloc((size_t)table->rows * 2 * sizeof *span))) return -1;
    int apart = 1;
    for (int64_t i = 0; i < table->rows; i++) {
        int64_t size = itemsize[table->row[i].type];
        span[i].begin = (uintptr_t)address[i];
        span[i].end = span[i].begin + (uintptr_t)(table->row[i].count * size);
        apart &= span[i].begin != 0 && span[i].begin % size == 0;
    }
    sort(span, span + table->rows, table->rows);
    for (int64_t i = 1; i < table->rows; i++) apart &= span[i - 1].end <= span[i].begin;
    if (span != on_stack) free(span);
    return apart;
}
