/* LoRA's update, each of its products in one pass over memory; compiled on first use, see __init__.py.

   Numbers x are float32 or bfloat16 (`bf16` 0 or 1); factors and what has passed one of them are float32, of a rank that is a
   multiple of RANKS. Where there is a `seed`, numbers drop as `dropped` says. No sum depends on the number of threads. */

#include "numbers.h"

#define RANKS 8            /* at a time */
#define TOKENS (WIDE / 4)  /* at a time: as many sums as there are registers */
#define PARTS 8            /* of the tokens, as many for any number of threads */
#define COLUMNS 256        /* at a time */

/* low (tokens, rank) = x (tokens, n) factor (rank, wide)^T, of which all beyond n is 0; wide is a multiple of WIDE. */
void to_low(long tokens, long n, long rank, long wide, const void *x, long bf16, const int64_t *seed, long threshold,
           const float *factor, float *low, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long token = 0; token < tokens; token += TOKENS) {
        long here = tokens - token < TOKENS ? tokens - token : TOKENS;
        float a[TOKENS * wide];
        memset(a, 0, sizeof a);
        for (long t = 0; t < here; t++) {
            load(a + t * wide, x, bf16, (token + t) * n, n);
            dropped(a + t * wide, (token + t) * n, n, seed, threshold);
        }
        for (long r = 0; r < rank; r += RANKS) {
            vector sums[TOKENS][RANKS] = {0};
            for (long i = 0; i < wide; i += WIDE)
#pragma GCC unroll 8
                for (int k = 0; k < RANKS; k++) {
                    vector right = *(const vector *)(factor + (r + k) * wide + i);
#pragma GCC unroll 4
                    for (int t = 0; t < TOKENS; t++) sums[t][k] += *(vector *)(a + t * wide + i) * right;
                }
            for (long t = 0; t < here; t++)
                for (int k = 0; k < RANKS; k++) low[(token + t) * rank + r + k] = sum_of(sums[t][k]);
        }
    }
}

/* y (tokens, n) += low (tokens, rank) factor (rank, wide), or y = that, with what drops (`onto` 0). */
void from_low(long tokens, long n, long rank, long wide, const float *low, const float *factor, const int64_t *seed,
           long threshold, long onto, void *y, long bf16, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long token = 0; token < tokens; token += TOKENS) {
        long here = tokens - token < TOKENS ? tokens - token : TOKENS;
        float a[TOKENS * wide];
        memset(a, 0, sizeof a);
        for (long t = 0; onto && t < here; t++) load(a + t * wide, y, bf16, (token + t) * n, n);
        for (long r = 0; r < rank; r += RANKS)
            for (long i = 0; i < wide; i += WIDE) {
                vector parts[RANKS];
#pragma GCC unroll 8
                for (int k = 0; k < RANKS; k++) parts[k] = *(const vector *)(factor + (r + k) * wide + i);
                for (long t = 0; t < here; t++) {
                    vector sum = *(vector *)(a + t * wide + i);
#pragma GCC unroll 8
                    for (int k = 0; k < RANKS; k++) sum += low[(token + t) * rank + r + k] * parts[k];
                    *(vector *)(a + t * wide + i) = sum;
                }
            }
        for (long t = 0; t < here; t++) {
            dropped(a + t * wide, (token + t) * n, n, seed, threshold);
            store(y, bf16, (token + t) * n, a + t * wide, n);
        }
    }
}

/* d (PARTS, rank, n) = low (tokens, rank)^T x (tokens, n), of each of some parts of the tokens: a factor's gradient. */
void over_tokens(long tokens, long n, long rank, const float *low, const void *x, long bf16, const int64_t *seed,
                 long threshold, float *d, long threads) {
    long each = (tokens + PARTS - 1) / PARTS;
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads)
    for (long part = 0; part < PARTS; part++)
        for (long column = 0; column < n; column += COLUMNS) {
            long last = (part + 1) * each < tokens ? (part + 1) * each : tokens, m = n - column < COLUMNS ? n - column : COLUMNS;
            float a[RANKS * COLUMNS] = {0}, sums[rank * COLUMNS];
            memset(sums, 0, sizeof sums);
            for (long token = part * each; token < last; token += RANKS) {
                long here = last - token < RANKS ? last - token : RANKS;
                for (long t = 0; t < here; t++) {
                    load(a + t * COLUMNS, x, bf16, (token + t) * n + column, m);
                    dropped(a + t * COLUMNS, (token + t) * n + column, m, seed, threshold);
                }
                for (long r = 0; r < rank; r += RANKS)
                    for (long i = 0; i < m; i += WIDE) {
                        vector sum[RANKS];
#pragma GCC unroll 8
                        for (int k = 0; k < RANKS; k++) sum[k] = *(vector *)(sums + (r + k) * COLUMNS + i);
                        for (long t = 0; t < here; t++) {
                            vector numbers = *(vector *)(a + t * COLUMNS + i);
#pragma GCC unroll 8
                            for (int k = 0; k < RANKS; k++) sum[k] += low[(token + t) * rank + r + k] * numbers;
                        }
#pragma GCC unroll 8
                        for (int k = 0; k < RANKS; k++) *(vector *)(sums + (r + k) * COLUMNS + i) = sum[k];
                    }
            }
            for (long r = 0; r < rank; r++) memcpy(d + (part * rank + r) * n + column, sums + r * COLUMNS, m * sizeof(float));
        }
}
