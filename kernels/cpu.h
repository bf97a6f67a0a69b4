/* The kernels for CPUs: reduce, apply and clamp over a table of gradients, in plain C.
 *
 * The same three steps as the Triton kernels beside them, and the same idea of a table. What depends on sizes and
 * element types only is laid out once (`Table`, made by fastclip/backends/native.py); addresses come with each call,
 * so gradients that moved cost nothing. Nothing here knows of Python or torch.
 *
 * Every chunk of a gradient leaves its contribution in a slot of its own, and one thread adds the slots up in their
 * order: the result has the same bits for any number of threads. It has them for any instruction set, too, since
 * lanes are counted in elements, whatever a register holds, and no multiplication is fused with an addition
 * (-ffp-contract=off).
 */
#ifndef FASTCLIP_CPU_H
#define FASTCLIP_CPU_H

#include <stdint.h>

enum { FP32, BF16, FP16, FP64, TYPES }; /* in the order of ELEMENT_SIZES in table.py */

enum {
    LANES = 64,           /* sums that run side by side: enough for the registers of any instruction set */
    BLOCK = 32 * LANES,   /* elements whose powers are added in their own precision: no lane passes 32 additions */
    CHUNK = 8 * BLOCK,    /* elements that are one thread's at a time */
    FEW = 16,             /* elements that take less time one by one */
    AHEAD = 8192          /* bytes: how far ahead memory is asked for, which reads 15 % faster than the processor by itself */
};

typedef struct { int64_t count, type; } Row; /* one gradient: its elements, and their type */

typedef struct { int64_t row, start; } Chunk; /* up to CHUNK elements of one gradient, from `start` on */

typedef struct {
    int64_t rows, chunks, tasks;
    const Row *row;       /* [rows] */
    const Chunk *chunk;   /* [chunks], in the order of the rows */
    const int64_t *task;  /* [tasks + 1]: the first chunk of each; what a thread takes at a time */
} Table;

/* How threads are had: `share(work, argument)` runs in up to `threads` of them at once, and has ended in all of them
 * on return. It is the entry point of the OpenMP that torch has loaded, so that there is one pool of threads. */
typedef void (*Parallel)(void (*work)(void *), void *argument, unsigned threads, unsigned flags);

typedef struct { Parallel parallel; unsigned threads; } Team; /* `parallel` may be NULL: then there is one thread */

/* A sum of powers, kept in range: the sum of |x|^p is sum * peak^p. For p = inf and -inf, `sum` is the largest or the
 * smallest |x|; for p = 0 the number of elements that are not 0. */
typedef struct { double sum, peak; } Partial;

typedef struct { int kind; double p; } Order; /* the order of a norm, and which code serves it; see `order_of` */

typedef struct {
    const char *name;
    Partial (*fold[TYPES])(const void *x, int64_t count, int64_t following, Order order);
    void (*scale[TYPES])(void *x, int64_t count, double coefficient);
    int (*clamp[TYPES])(void *x, int64_t count, double low, double high);
} Level; /* one instruction set */

/* The instruction sets that this processor has, the best one first; the last entry is NULL. */
const Level *const *levels(void);

/* Norm clipping in one go: reduce, the coefficient min(max_norm / (norm + 1e-6), 1), apply. The norm is left in `norm`,
 * rounded to a type. Returns as reduce does. */
int clip(const Level *level, const Table *table, char *const *address, double p, double max_norm, Team team,
         void *norm, int type);

/* Rounds a number to a type. */
void store(void *to, int type, double value);

/* The p-norm of all gradients, and in `norms`, unless that is NULL, that of each. For p = 0 it is the number of
 * gradients with an element that is not 0, and in `norms` the number of such elements. Returns -1 where there is no
 * memory for the chunks' partial sums, else 0. Reads each gradient once. */
int reduce(const Level *level, const Table *table, char *const *address, double p, Team team, double *total,
           double *norms);

/* Multiplies gradient i by coefficient[i * stride]. One whose coefficient is 1, in the precision of the product, is
 * neither read nor written. Begins where the reduction ended, with what the cache still holds. */
void apply(const Level *level, const Table *table, char *const *address, const double *coefficient, int64_t stride,
           Team team);

/* Clamps gradient i to [low[i * stride], high[i * stride]], rounded to its type; writes only around elements that are
 * outside. Returns whether any was. */
int clamp(const Level *level, const Table *table, char *const *address, const double *low, const double *high,
          int64_t stride, Team team);

/* Whether all gradients have memory, aligned to their elements, which no two share; -1 where there is no memory to find
 * out. Each has at least one element. */
int are_apart(const Table *table, char *const *address);

#endif
