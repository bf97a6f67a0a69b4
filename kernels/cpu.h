/* The kernels for CPUs: reduce, apply and clamp over a table of gradients, in plain C, without Python or torch.
 *
 * They do the same three steps as the Triton kernels in this folder, over a similar table. The table depends only on
 * sizes and element types, and fastclip/backends/native.py builds it once. Addresses are arguments of each call, so
 * gradients that move cost nothing.
 *
 * Each chunk of a gradient has its own slot for its partial sum, and one thread adds the slots up in order. So the
 * result has the same bits for any number of threads. It has the same bits on any instruction set, too: the number of
 * lanes does not depend on the width of a register, and no multiplication is fused with an addition
 * (-ffp-contract=off).
 */
#ifndef FASTCLIP_CPU_H
#define FASTCLIP_CPU_H

#include <stdint.h>

enum { FP32, BF16, FP16, FP64, TYPES }; /* element types, in the order of ELEMENT_SIZES in table.py */

enum {
    LANES = 64,            /* sums in parallel: enough to fill the registers of any instruction set */
    BLOCK = 32 * LANES,    /* elements whose powers are added in their own precision: at most 32 additions a lane */
    CHUNK = 8 * BLOCK,     /* elements that one thread processes at a time */
    SCALAR_MAX = 16,       /* elements: up to here a scalar loop is faster than lanes */
    PREFETCH_BYTES = 8192  /* how far ahead: reads are 15 % faster than with the processor's own prefetching */
};

typedef struct { int64_t count, type; } Row; /* one gradient: the number of its elements, and their type */

/* Elements of one gradient, from `start` on: up to CHUNK of them, or, for `clip_units`, a unit of any length. */
typedef struct { int64_t row, start; } Chunk;

typedef struct {
    int64_t rows, chunks, tasks;
    const Row *row;       /* [rows] */
    const Chunk *chunk;   /* [chunks], in the order of the rows */
    const int64_t *task;  /* [tasks + 1]: the first chunk of each task; a thread takes one task at a time */
} Table;

/* Runs `work(argument)` on up to `threads` threads at once, and returns when all have finished. It is the entry point
 * of the OpenMP that torch has loaded, so torch and these kernels share one thread pool. */
typedef void (*Parallel)(void (*work)(void *), void *argument, unsigned threads, unsigned flags);

typedef struct { Parallel parallel; unsigned threads; } Team; /* one thread if `parallel` is NULL */

/* A sum of powers that cannot overflow: the sum of |x|^p is sum * peak^p. For p = inf and -inf, `sum` is the largest or
 * smallest |x|. For p = 0 it is the number of elements that are not 0. */
typedef struct { double sum, peak; } Partial;

typedef struct { int kind; double p; } Order; /* the order of a norm, and its code path; see `order_of` */

typedef struct {
    const char *name;
    Partial (*fold[TYPES])(const void *x, int64_t count, int64_t following, Order order);
    void (*scale[TYPES])(void *x, int64_t count, double coefficient);
    int (*clamp[TYPES])(void *x, int64_t count, double low, double high);
} Level; /* the kernels for one instruction set, by element type */

/* The instruction sets that this processor supports, best first. The last entry is NULL. */
const Level *const *levels(void);

/* Clips by the norm: reduce, the coefficient min(max_norm / (norm + 1e-6), 1), apply. Stores the norm in `norm`,
 * rounded to `type`. Returns what reduce returns. */
int clip(const Level *level, const Table *table, char *const *address, double p, double max_norm, Team team,
         void *norm, int type);

/* Stores a number at `to`, rounded to `type`. */
void store(void *to, int type, double value);

/* Stores the p-norm of all gradients in `total`, and the norm of each in `norms` unless that is NULL. For p = 0,
 * `total` is the number of gradients with a nonzero element, and `norms` holds the number of nonzero elements of each.
 * Reads each gradient once. Returns 0, or -1 if there is no memory for the chunks' partial sums. */
int reduce(const Level *level, const Table *table, char *const *address, double p, Team team, double *total,
           double *norms);

/* Multiplies gradient i by coefficient[i * stride]. If that is 1 in the precision of the product, the gradient is
 * neither read nor written. Walks the table backwards, since the cache still holds what the reduction read last. */
void apply(const Level *level, const Table *table, char *const *address, const double *coefficient, int64_t stride,
           Team team);

/* Clamps gradient i to [low[i * stride], high[i * stride]], rounded to its type. Writes only groups with an element
 * outside the bounds. Returns whether there was any. */
int clamp(const Level *level, const Table *table, char *const *address, const double *low, const double *high,
          int64_t stride, Team team);

/* Each chunk of the table is a unit: with x its norm and w the norm of the same elements of the weights, it is scaled by
 * T / max(x, 1e-6) if x > T = ratio[i] * max(w, eps), where i is its gradient. Returns whether any was. */
int clip_units(const Level *level, const Table *table, char *const *address, char *const *weight, const double *ratio,
               double eps, Team team);

/* Whether every gradient has memory, it is aligned to the element size, and no two overlap. Returns -1 if there is no
 * memory for the check. Each gradient has at least one element. */
int are_apart(const Table *table, char *const *address);

#endif
