/* See adapt.h. The arithmetic, and the order of `numbers`, are those of fastclip/backends/thresholds.py. */
#include "adapt.h"

#include <math.h>
#include <string.h>

#define EPS 1e-6 /* torch's value */

typedef struct { double coefficient, threshold; } Verdict;

/* The square of an observation is finite, too, and so is every gradient of its step. */
static int is_observed(double x, double total) { return x > 0 && x < 1e150 && isfinite(total); }

/* The number of values of a sorted array that are below x, or, with `or_equal`, at most x. */
static int64_t rank_of(const double *ordered, int64_t count, double x, int or_equal) {
    int64_t low = 0;
    while (count > 0) {
        int64_t half = count / 2;
        int goes_right = or_equal ? ordered[low + half] <= x : ordered[low + half] < x;
        low = goes_right ? low + half + 1 : low;
        count = goes_right ? count - half - 1 : half;
    }
    return low;
}

/* The oldest of the window leaves and x enters: what lies between their places moves by one. */
static void enter(double *state, int64_t size, double x) {
    double *ring = state + 2, *ordered = ring + size, count = state[0];
    int is_full = count >= (double)size;
    int64_t place = (int64_t)fmod(count, (double)size), held = is_full ? size : (int64_t)count;
    int64_t left = is_full ? rank_of(ordered, held, ring[place], 0) : held;
    int64_t entered = rank_of(ordered, held, x, 1) - (is_full && ring[place] <= x);
    double *gap = ordered + left, *target = ordered + entered;
    if (target < gap) memmove(target + 1, target, (size_t)(gap - target) * sizeof *gap);
    if (target > gap) memmove(gap, gap + 1, (size_t)(target - gap) * sizeof *gap);
    *target = ring[place] = x;
    state[0] = count + 1;
}

/* The quantile of a sorted window of `count` values, at least one, with linear interpolation. */
static double quantile_of(const double *ordered, double q, double count) {
    double last = count - 1, position = q * last, below = floor(position), weight = position - below;
    double a = ordered[(int64_t)below], b = ordered[(int64_t)(below + 1 < last ? below + 1 : last)];
    return weight < 0.5 ? a + weight * (b - a) : b - (b - a) * (1 - weight);
}

static Verdict adapt_quantile(double *state, double x, double total, const double *numbers) {
    double window = numbers[0], q = numbers[1], factor = numbers[2], cap = numbers[3], warmup = numbers[4];
    double every = numbers[5], before = state[1];
    int includes_current = numbers[6] != 0;
    if (is_observed(x, total)) {
        enter(state, (int64_t)window, x);
        double count = state[0];
        if (fmod(count, every) == 0) {
            const double *ordered = state + 2 + (int64_t)window;
            state[1] = count >= warmup ? factor * quantile_of(ordered, q, count < window ? count : window) : INFINITY;
        }
    }
    double used = includes_current ? state[1] : before;
    used = used < cap ? used : cap;
    double ratio = used / (x + EPS);
    return (Verdict){ratio < 1 ? ratio : 1, used};
}

static Verdict adapt_z_score(double *state, double x, double total, const double *numbers) {
    double alpha = numbers[0], z = numbers[1], warmup = numbers[2], cap = numbers[3], factor = numbers[5];
    double count = state[0], mean = state[1], variance = state[2], relearn = numbers[7];
    int is_max = numbers[4] == 2, is_mean = numbers[4] == 1, freeze = numbers[6] != 0, is_warm = count >= warmup;
    double deviation = sqrt(variance), score = (x - mean) / (deviation + EPS);
    double limit = mean + z * (is_max ? deviation : deviation + EPS);
    int is_hit = is_warm && (is_max ? x > limit : score > z);
    double target = is_max ? limit : is_mean ? mean : factor * (mean + z * z * deviation / score);
    double kept = is_hit ? target : x, used = kept > cap ? cap : kept;
    Verdict verdict = {x > used ? used / (x + EPS) : 1, is_warm && limit < cap ? limit : cap};
    if (!is_observed(x, total)) return verdict;
    if (!is_warm) { /* averages of all observations; exponentially weighted ones after the warm-up */
        double distance = x - mean, early = mean + distance / (count + 1);
        state[1] = early;
        state[2] = variance + (distance * (x - early) - variance) / (count + 1);
    } else if (!(is_hit && freeze)) {
        double late = alpha * mean + (1 - alpha) * kept;
        state[1] = late;
        state[2] = alpha * variance + (1 - alpha) * ((kept - late) * (kept - late));
    }
    state[0] = count + 1;
    state[3] = is_hit ? state[3] + 1 : 0;
    if (state[3] >= relearn) memset(state, 0, 4 * sizeof *state);
    return verdict;
}

static Verdict adapt_ema(double *state, double x, double total, const double *numbers) {
    double ratio = numbers[0], beta = numbers[1], warmup = numbers[2], max_norm = numbers[3];
    double count = state[0], average = state[1], limit = ratio * average;
    int is_global = numbers[4] != 0, is_warm = count >= warmup, is_hit = x > limit;
    double shared = total > max_norm ? max_norm / (total + EPS) : 1;
    double early = !is_global ? x * shared : x < max_norm ? x : max_norm, late = is_hit ? limit : x;
    if (is_observed(x, total)) {
        state[0] = count + 1;
        state[1] = is_warm ? beta * average + (1 - beta) * late : average < early ? average : early;
    }
    if (!is_warm) return (Verdict){shared, is_global ? max_norm : INFINITY};
    return (Verdict){is_hit ? limit / (x + EPS) : 1, limit};
}

void adapt(int kind, double *state, int64_t width, const double *norms, int64_t groups, double total,
           const double *numbers, double *results) {
    static Verdict (*const kinds[])(double *, double, double, const double *) = {adapt_quantile, adapt_z_score,
                                                                                 adapt_ema};
    for (int64_t i = 0; i < groups; i++) {
        Verdict verdict = kinds[kind](state + i * width, norms[i], total, numbers);
        results[i] = verdict.coefficient;
        results[groups + i] = verdict.threshold;
    }
}
