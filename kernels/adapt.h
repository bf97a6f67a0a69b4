/* Adaptive thresholds: from the norms of groups, and the state of earlier steps, to coefficients. */
#ifndef FASTCLIP_ADAPT_H
#define FASTCLIP_ADAPT_H

#include <stdint.h>

enum { QUANTILE, Z_SCORE, EMA }; /* the kinds of `adapt`, in the order of KINDS in fastclip/backends/native.py */

/* Stores the coefficient of each group in results[0] to results[groups - 1], and its threshold after them. Updates the
 * state, [groups, width]. `total` is the norm of all gradients. */
void adapt(int kind, double *state, int64_t width, const double *norms, int64_t groups, double total,
           const double *numbers, double *results);

#endif
