/* Drives the CPU's kernels (kernels/cpu.h and adapt.h) by random tables, without Python or torch, so that sanitizers see all code.
 *
 *     drive [seeds]        exit status 1, with the seed and the fault, at the first wrong result
 *
 * Threads are pthreads: ThreadSanitizer knows these, but not those of OpenMP. Compared with a reference in long double:
 * norms of every order, scaled values, clamped values, units and quantiles. Checked, too: any number of threads and any instruction set
 * give the same bits; memory around gradients does not change; and no write happens where none is needed, as the
 * gradients are in read-only pages then.
 */
#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "../../kernels/adapt.h"
#include "../../kernels/cpu.h"

enum { MOST_ROWS = 90, GUARD = 64 };
static const int64_t size_of[TYPES] = {4, 2, 2, 8};
static const double tolerance[TYPES] = {40 * 0x1p-24, 40 * 0x1p-24, 40 * 0x1p-24, 0x1p-37}; /* as support/oracle.py */
static const double orders[] = {2, 1, 3, 0, INFINITY, -INFINITY, 0.5, 4, 1.5, 20, -1, -2};
enum { ORDERS = sizeof orders / sizeof *orders };

static _Thread_local uint64_t state = 1;
static uint64_t next(void) { /* xorshift64* */
    state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
    return state * 0x2545f4914f6cdd1d;
}
static int64_t below(int64_t limit) { return (int64_t)(next() >> 11) % limit; }
static double uniform(void) { return (double)(next() >> 11) * 0x1p-53; }

static unsigned long seed;
#define CHECK(condition, ...)                                                                                         \
    do                                                                                                                \
        if (!(condition)) {                                                                                           \
            printf("seed %lu, line %d, %s: ", seed, __LINE__, #condition);                                            \
            printf(__VA_ARGS__);                                                                                      \
            printf("\n");                                                                                             \
            exit(1);                                                                                                  \
        }                                                                                                             \
    while (0)

/* ---- Threads */

typedef struct { void (*work)(void *); void *argument; } Job;
static void *run(void *job) { return ((Job *)job)->work(((Job *)job)->argument), NULL; }
static void parallel(void (*work)(void *), void *argument, unsigned threads, unsigned flags) {
    pthread_t others[8];
    Job job = {work, argument};
    (void)flags;
    for (unsigned i = 1; i < threads; i++)
        if (pthread_create(others + i, NULL, run, &job)) abort();
    work(argument);
    for (unsigned i = 1; i < threads; i++) pthread_join(others[i], NULL);
}

/* ---- Elements */

static double load(const char *x, int64_t type) {
    uint16_t half;
    uint32_t bits;
    float single;
    double wide;
    if (type == FP64) return memcpy(&wide, x, 8), wide;
    if (type == FP32) return memcpy(&single, x, 4), single;
    memcpy(&half, x, 2);
    if (type == BF16) return bits = (uint32_t)half << 16, memcpy(&single, &bits, 4), single;
    int exponent = half >> 10 & 31, mantissa = half & 1023;
    wide = exponent == 31 ? (mantissa ? NAN : INFINITY)
                          : exponent ? ldexp(1024 + mantissa, exponent - 25) : ldexp(mantissa, -24);
    return half >> 15 ? -wide : wide;
}

/* The spacing of a type's numbers around a value; rounding has an error of at most half of it. */
static double spacing(double value, int64_t type) {
    static const int digits[TYPES] = {24, 8, 11, 53}, lowest[TYPES] = {-149, -133, -24, -1074};
    int exponent;
    frexp(value, &exponent);
    return ldexp(1, exponent - digits[type] > lowest[type] ? exponent - digits[type] : lowest[type]);
}

static double random_value(int64_t type, int decades) {
    static const double most[TYPES] = {38, 38, 4.5, 300};
    double magnitude = pow(10, decades ? (2 * uniform() - 1) * most[type] : 2 * uniform() - 1);
    return (next() & 1 ? -1 : 1) * magnitude * (uniform() < 0.02 ? 0 : 1);
}

/* ---- Tables, as fastclip/backends/native.py makes them, in small tasks */

typedef struct {
    Table table;
    Row row[MOST_ROWS];
    Chunk *chunk;
    int64_t *task;
    char *memory, *address[MOST_ROWS];
    size_t bytes;
} Set;

static Set make(int64_t rows, int64_t longest) {
    Set set = {.table = {.rows = rows}};
    set.bytes = GUARD;
    int64_t chunks = 0;
    for (int64_t i = 0; i < rows; i++) {
        set.row[i].type = below(TYPES);
        set.row[i].count = 1 + below(below(4) ? 200 : longest);
        chunks += (set.row[i].count + CHUNK - 1) / CHUNK;
        set.bytes += (size_t)(set.row[i].count * size_of[set.row[i].type]) + 2 * GUARD;
    }
    set.memory = mmap(NULL, set.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    set.chunk = malloc((size_t)chunks * sizeof *set.chunk);
    set.task = malloc((size_t)(chunks + 1) * sizeof *set.task);
    memset(set.memory, 0xff, set.bytes); /* NaNs */
    char *place = set.memory + GUARD;
    for (int64_t i = 0; i < rows; i++) {
        Row row = set.row[i];
        int64_t size = size_of[row.type];
        set.address[i] = place + (size - (int64_t)((uintptr_t)place % (uintptr_t)size)) % size + size * below(4);
        place = set.address[i] + row.count * size + GUARD / 2;
        for (int64_t start = 0; start < row.count; start += CHUNK)
            set.chunk[set.table.chunks++] = (Chunk){.row = i, .start = start};
    }
    for (int64_t i = 0; i < chunks; i += 1 + below(3)) set.task[set.table.tasks++] = i;
    set.task[set.table.tasks] = chunks;
    return set;
}

static Table table_of(const Set *set) {
    Table table = set->table;
    table.row = set->row, table.chunk = set->chunk, table.task = set->task;
    return table;
}

static void fill(const Set *set, const Level *level, int kind) {
    for (int64_t i = 0; i < set->table.rows; i++)
        for (int64_t j = 0; j < set->row[i].count; j++) {
            int64_t type = set->row[i].type, size = size_of[type];
            double value = random_value(type, kind % 2);
            char *x = set->address[i] + j * size;
            memset(x, 0, (size_t)size);
            level->clamp[type](x, 1, value, value); /* `clamp` can write any value to any type */
        }
    if (kind == 3) { /* a NaN, or an infinity of either sign */
        int64_t i = below(set->table.rows), type = set->row[i].type, size = size_of[type];
        double special = below(2) ? NAN : below(2) ? INFINITY : -INFINITY;
        level->clamp[type](set->address[i] + below(set->row[i].count) * size, 1, special, special);
    }
}

static void drop(Set *set) {
    munmap(set->memory, set->bytes);
    free(set->chunk);
    free(set->task);
}

/* ---- References */

static double reference(const Set *set, int64_t first, int64_t end, double p) {
    long double leading = p < 0 ? INFINITY : 0, sum = 0;
    int64_t present = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int64_t i = first; i < end; i++) {
            int64_t nonzero = 0;
            for (int64_t j = 0; j < set->row[i].count; j++) {
                long double v = fabs(load(set->address[i] + j * size_of[set->row[i].type], set->row[i].type));
                if (isnan(v) && p != 0) return NAN;
                nonzero += v != 0;
                if (!pass) leading = p < 0 ? fminl(leading, v) : fmaxl(leading, v);
                else sum += powl(v / leading, (long double)p);
            }
            if (pass) present += first + 1 == end ? nonzero : nonzero > 0;
        }
    if (p == 0) return (double)present;
    if (leading == 0 || isinf(leading) || isinf(p)) return (double)leading;
    return (double)(powl(sum, 1 / (long double)p) * leading);
}

static int is_close(double value, double exact, double relative) {
    return isnan(exact) ? isnan(value) : value == exact || fabs(value - exact) <= relative * fabs(exact) + 0x1p-1074;
}

/* ---- What is checked */

static void check_norms(const Set *set, Team team) {
    Table table = table_of(set);
    for (int k = 0; k < ORDERS; k++) {
        double first = 0, norms[MOST_ROWS], total, worst = 0;
        for (int64_t i = 0; i < table.rows; i++) worst = fmax(worst, tolerance[set->row[i].type]);
        for (const Level *const *level = levels(); *level; level++)
            for (team.threads = 1; team.threads <= 3; team.threads++) {
                memset(norms, 0xff, sizeof norms);
                CHECK(!reduce(*level, &table, set->address, orders[k], team, &total, norms), "no memory");
                if (*level == *levels() && team.threads == 1) first = total;
                CHECK(!memcmp(&total, &first, 8), "p %g: %s with %u threads has %.17g, not %.17g", orders[k],
                      (*level)->name, team.threads, total, first);
            }
        double exact = reference(set, 0, table.rows, orders[k]);
        CHECK(is_close(total, exact, worst), "p %g: %.17g, not %.17g", orders[k], total, exact);
        for (int64_t i = 0; i < table.rows; i++) {
            exact = reference(set, i, i + 1, orders[k]);
            CHECK(is_close(norms[i], exact, tolerance[set->row[i].type]), "p %g, gradient %lld: %.17g, not %.17g",
                  orders[k], (long long)i, norms[i], exact);
        }
    }
}

static double scaled(double v, double coefficient, int64_t type) {
    return v * (type == FP64 || fabs(coefficient) < 0x1p-100 ? coefficient : (float)coefficient);
}

/* Applies coefficients, or clamps, on every level and by several threads, each time to the original values. */
static void check_writes(const Set *set, Team team) {
    Table table = table_of(set);
    double coefficient[MOST_ROWS], low[MOST_ROWS], high[MOST_ROWS];
    char *before = malloc(set->bytes), *after = malloc(set->bytes);
    memcpy(before, set->memory, set->bytes);
    for (int64_t i = 0; i < table.rows; i++) {
        coefficient[i] = below(3) ? uniform() : below(2) ? 1 : ldexp(uniform() + 0.5, -130);
        high[i] = random_value(FP16, 0), low[i] = below(9) ? high[i] - 2 * uniform() : high[i] + 1;
    }
    for (int clamps = 0; clamps < 2; clamps++) {
        int was_outside = 0, is_outside = 0;
        for (const Level *const *level = levels(); *level; level++)
            for (team.threads = 1; team.threads <= 3; team.threads += 2) {
                memcpy(set->memory, before, set->bytes);
                if (clamps) was_outside = clamp(*level, &table, set->address, low, high, 1, team);
                else apply(*level, &table, set->address, coefficient, 1, team);
                if (*level == *levels() && team.threads == 1) memcpy(after, set->memory, set->bytes);
                CHECK(!memcmp(after, set->memory, set->bytes), "%s with %u threads writes something else",
                      (*level)->name, team.threads);
            }
        const char *end = set->memory;
        for (int64_t i = 0; i < table.rows; i++) {
            int64_t type = set->row[i].type, size = size_of[type];
            ptrdiff_t around = set->address[i] - end;
            CHECK(!memcmp(end, before + (end - set->memory), (size_t)around), "memory before gradient %lld", (long long)i);
            end = set->address[i] + set->row[i].count * size;
            char bounds[2][8] = {{0}};
            (*levels())->clamp[type](bounds[0], 1, low[i], low[i]), (*levels())->clamp[type](bounds[1], 1, high[i], high[i]);
            double lowest = load(bounds[0], type), highest = load(bounds[1], type);
            for (int64_t j = 0; j < set->row[i].count; j++) {
                char *now = set->address[i] + j * size;
                double v = load(before + (now - set->memory), type), w = load(now, type), wanted;
                if (clamps) {
                    wanted = v < lowest ? lowest : v, wanted = wanted > highest ? highest : wanted;
                    is_outside |= v < lowest || v > highest;
                    CHECK(isnan(v) ? isnan(w) : w == wanted, "%.17g clamped to %.17g", v, w);
                } else {
                    wanted = scaled(v, coefficient[i], type);
                    double slack = spacing(wanted, type) * 0.5 + fabs(wanted) * (type == FP64 ? 0x1p-52 : 0x1p-22);
                    CHECK(isnan(wanted) ? isnan(w) : w == wanted || isinf(w) || fabs(w - wanted) <= slack,
                          "type %lld: %.17g times %.17g is %.17g", (long long)type, v, coefficient[i], w);
                    CHECK(coefficient[i] != 1 || !memcmp(now, before + (now - set->memory), (size_t)size), "%.17g changed", v);
                }
            }
        }
        CHECK(!memcmp(end, before + (end - set->memory), (size_t)(set->memory + set->bytes - end)), "memory at the end");
        CHECK(was_outside == (clamps && is_outside), "%d", was_outside);
    }
    memcpy(set->memory, before, set->bytes);
    free(before), free(after);
}

static double norm_of_elements(const char *x, int64_t type, int64_t count) {
    long double sum = 0;
    for (int64_t j = 0; j < count; j++) {
        long double v = load(x + j * size_of[type], type);
        sum += v * v;
    }
    return (double)sqrtl(sum);
}

/* Clips units, on every level and by several threads, beside weights that lie as the gradients do. */
static void check_units(const Set *set, Team team) {
    Table table = table_of(set);
    int64_t units[MOST_ROWS], columns[MOST_ROWS], count = 0;
    for (int64_t i = 0; i < table.rows; i++) {
        units[i] = 1 + below(set->row[i].count);
        while (set->row[i].count % units[i]) units[i]--;
        columns[i] = set->row[i].count / units[i], count += units[i];
    }
    Chunk *chunk = malloc((size_t)count * sizeof *chunk), *last = chunk;
    int64_t *task = malloc((size_t)(count + 1) * sizeof *task), tasks = 0;
    for (int64_t i = 0; i < table.rows; i++)
        for (int64_t j = 0; j < units[i]; j++) *last++ = (Chunk){.row = i, .start = j * columns[i]};
    for (int64_t i = 0; i < count; i += 1 + below(30)) task[tasks++] = i;
    task[tasks] = count;
    table.chunk = chunk, table.chunks = count, table.task = task, table.tasks = tasks;
    char *before = malloc(set->bytes), *after = malloc(set->bytes), *weights = malloc(set->bytes), *weight[MOST_ROWS];
    memcpy(before, set->memory, set->bytes);
    memcpy(weights, set->memory, set->bytes);
    double ratio[MOST_ROWS], eps = below(2) ? 1e-3 : 1;
    for (int64_t i = 0; i < table.rows; i++) {
        double half = 0.5;
        weight[i] = weights + (set->address[i] - set->memory);
        ratio[i] = below(3) ? 2 * uniform() : 1e-3;
        (*levels())->scale[set->row[i].type](weight[i], set->row[i].count * below(2), half);
    }
    int was_above = 0, is_above = 0;
    for (const Level *const *level = levels(); *level; level++)
        for (team.threads = 1; team.threads <= 3; team.threads += 2) {
            memcpy(set->memory, before, set->bytes);
            was_above = clip_units(*level, &table, set->address, weight, ratio, eps, team);
            if (*level == *levels() && team.threads == 1) memcpy(after, set->memory, set->bytes);
            CHECK(!memcmp(after, set->memory, set->bytes), "%s with %u threads writes something else", (*level)->name,
                  team.threads);
        }
    const char *end = set->memory;
    for (int64_t i = 0; i < table.rows; i++) {
        int64_t type = set->row[i].type, size = size_of[type];
        CHECK(!memcmp(end, before + (end - set->memory), (size_t)(set->address[i] - end)), "before %lld", (long long)i);
        end = set->address[i] + set->row[i].count * size;
        for (int64_t j = 0; j < set->row[i].count; j += columns[i]) {
            char *now = set->address[i] + j * size, *old = before + (now - set->memory);
            double norm = norm_of_elements(old, type, columns[i]);
            double own = norm_of_elements(weight[i] + j * size, type, columns[i]), limit = ratio[i] * (own < eps ? eps : own);
            double slack = 2 * tolerance[type];
            is_above |= norm > limit * (1 + slack);
            if (!(norm > limit * (1 - slack)))
                CHECK(!memcmp(now, old, (size_t)(columns[i] * size)), "a unit of norm %.17g, below %.17g", norm, limit);
            if (!(norm > limit * (1 + slack))) continue;
            for (int64_t k = 0; k < columns[i]; k++) {
                double v = load(old + k * size, type), w = load(now + k * size, type), wanted = v * (limit / fmax(norm, 1e-6));
                CHECK(isnan(wanted) ? isnan(w) : fabs(w - wanted) <= spacing(wanted, type) + fabs(wanted) * slack,
                      "type %lld: %.17g, not %.17g", (long long)type, w, wanted);
            }
        }
    }
    CHECK(!memcmp(end, before + (end - set->memory), (size_t)(set->memory + set->bytes - end)), "memory at the end");
    CHECK(was_above || !is_above, "a unit was clipped, and nobody is told");
    memcpy(set->memory, before, set->bytes);
    free(before), free(after), free(weights), free(chunk), free(task);
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Quantiles beside those of a sorted copy, with the state in memory of just its size; the other rules for memory only. */
static void check_adapt(void) {
    enum { GROUPS = 3, STEPS = 60 };
    int64_t window = 1 + below(20), width = 2 + 2 * window;
    double *state = malloc((size_t)(GROUPS * width) * sizeof *state), seen[GROUPS][STEPS], norms[GROUPS], q = uniform();
    double *results = malloc(2 * GROUPS * sizeof *results);
    int64_t held[GROUPS] = {0};
    for (int64_t i = 0; i < GROUPS * width; i++) state[i] = i % width ? INFINITY : 0;
    const double numbers[8] = {(double)window, q, 1, INFINITY, 1, 1, 1, 0};
    for (int step = 0; step < STEPS; step++) {
        for (int i = 0; i < GROUPS; i++) {
            norms[i] = below(8) ? (double)(1 + below(12)) : below(3) ? 0 : below(2) ? NAN : INFINITY;
            if (norms[i] > 0 && norms[i] < INFINITY) seen[i][held[i]++] = norms[i];
        }
        adapt(QUANTILE, state, width, norms, GROUPS, 1, numbers, results);
        for (int i = 0; i < GROUPS; i++) {
            int64_t count = held[i] < window ? held[i] : window;
            double sorted[STEPS], exact = INFINITY;
            memcpy(sorted, seen[i] + held[i] - count, (size_t)count * sizeof *sorted);
            qsort(sorted, (size_t)count, sizeof *sorted, ascending);
            double place = q * (double)(count - 1), below_it = floor(place), weight = place - below_it;
            if (count) exact = sorted[(int)below_it] * (1 - weight) + sorted[(int)ceil(place)] * weight;
            CHECK(is_close(results[GROUPS + i], exact, 1e-12), "step %d, q %g of %lld: %.17g, not %.17g", step, q,
                  (long long)count, results[GROUPS + i], exact);
        }
    }
    const double of_score[8] = {0.9, 2, 5, INFINITY, (double)below(3), 1, (double)below(2), 4}, of_ema[5] = {1.1, 0.9, 5, 1, 0};
    double rows[GROUPS * 4] = {0};
    for (int step = 0; step < STEPS; step++) adapt(Z_SCORE, rows, 4, norms, GROUPS, 1, of_score, results);
    for (int step = 0; step < STEPS; step++) adapt(EMA, rows, 2, norms, GROUPS, 1, of_ema, results);
    free(state), free(results);
}

/* In read-only pages. */
static void check_that_nothing_is_written(const Set *set, Team team) {
    Table table = table_of(set);
    double one = 1, low = -INFINITY, high = INFINITY, norm;
    team.threads = 2;
    CHECK(!mprotect(set->memory, set->bytes, PROT_READ), "mprotect");
    apply(*levels(), &table, set->address, &one, 0, team);
    CHECK(!clamp(*levels(), &table, set->address, &low, &high, 0, team), "nothing is outside");
    CHECK(!reduce(*levels(), &table, set->address, 2, team, &norm, NULL), "no memory");
    if (norm < INFINITY) {
        double clipped = 0;
        CHECK(!clip(*levels(), &table, set->address, 2, norm * 2 + 1, team, &clipped, FP64), "no memory");
        CHECK(!memcmp(&clipped, &norm, 8), "%.17g, not %.17g", clipped, norm);
    }
    CHECK(!mprotect(set->memory, set->bytes, PROT_READ | PROT_WRITE), "mprotect");
}

static void check_places(Set *set) {
    Table table = table_of(set);
    CHECK(are_apart(&table, set->address) == 1, "they are");
    int64_t i = below(table.rows), j = below(table.rows), size = size_of[set->row[i].type];
    char *own = set->address[i];
    set->address[i] = own + 1;
    CHECK(size == 1 || !are_apart(&table, set->address), "one is not aligned");
    set->address[i] = NULL;
    CHECK(!are_apart(&table, set->address), "one has no memory");
    if (i != j) { /* its last element is the first of another one */
        char *shared = set->address[j] + (set->row[j].count - 1) * size_of[set->row[j].type];
        set->address[i] = shared - (uintptr_t)shared % (uintptr_t)size;
        CHECK(!are_apart(&table, set->address), "two share memory");
    }
    set->address[i] = own;
}

static void *drive_one(void *set) {
    Team team = {parallel, 1};
    check_norms(set, team);
    check_writes(set, team);
    return NULL;
}

int main(int count, char **arguments) {
    unsigned long seeds = count > 1 ? strtoul(arguments[1], NULL, 10) : 60;
    for (seed = 1; seed <= seeds; seed++) {
        state = seed * 0x9e3779b97f4a7c15;
        Team team = {seed % 5 ? parallel : NULL, 1};
        Set set = make(2 + below(seed % 4 ? 12 : MOST_ROWS - 2), seed % 3 ? 5000 : 3 * CHUNK + 5);
        fill(&set, *levels(), (int)(seed % 4));
        check_norms(&set, team);
        check_places(&set);
        check_writes(&set, team);
        check_units(&set, team);
        check_that_nothing_is_written(&set, team);
        check_adapt();
        drop(&set);
    }
    /* Several callers at once, each with its own gradients. */
    Set sets[3];
    pthread_t callers[3];
    for (int i = 0; i < 3; i++) sets[i] = make(6, 2 * CHUNK), fill(sets + i, *levels(), 0);
    for (int i = 0; i < 3; i++) pthread_create(callers + i, NULL, drive_one, sets + i);
    for (int i = 0; i < 3; i++) pthread_join(callers[i], NULL), drop(sets + i);
    printf("%lu seeds, %s first: all right\n", seeds, (*levels())->name);
    return 0;
}
