/* Many tokens times a weight, forward and on the way back; compiled on first use, see __init__.py.

   Some columns of the result at a time: what they need of the weight is laid out for whole vectors, which takes little beside
   multiplying it by many tokens, and stays in the nearer caches while all tokens pass by, which are read as they are stored.
   Meanwhile the weight of the next columns is fetched from memory.

   Numbers are float32, or bfloat16 (`bf16` 0 or 1), which are multiplied in pairs: sums are float32, rounded once. */

#include <omp.h>

#include "numbers.h"
#include "words.h"

#ifdef __AVX512F__
#define TOKENS 12 /* at a time: their sums, two vectors of each, are in registers */
#else
#define TOKENS 6
#endif
#define COLUMNS (2 * WIDE)
#define AT_ONCE 128 /* products of a sum in float32, with more its errors grow; those of pairs are less than their last rounding */
#define LINE 64 /* bytes that come from memory together */

/* COLUMNS lines of `depth` words to (depth, COLUMNS). */
static void turned(const word *from, long depth, word *to) {
    for (long p = 0; p < depth; p += WIDE)
        for (long j = 0; j < COLUMNS; j += WIDE) turned_block(from + j * depth + p, depth, to + p * COLUMNS + j, COLUMNS);
}

/* COLUMNS of lines of n numbers to (depth, COLUMNS): in pairs a number stands beside the one below it. */
static void side_by_side(int pairs, const void *from, long n, long depth, word *to) {
    for (long p = 0; p < depth; p++, to += COLUMNS)
        if (pairs) {
            const uint16_t *line = (const uint16_t *)from + 2 * p * n;
            for (long j = 0; j < COLUMNS; j++) to[j] = line[j] | (word)line[n + j] << 16;
        } else
            memcpy(to, (const float *)from + p * n, COLUMNS * sizeof(word));
}

/* y (TOKENS, n), COLUMNS of it: x b + `more`, whose lines are `down` apart; x (TOKENS, `line` words apart), b (depth, COLUMNS). */
static inline __attribute__((always_inline)) void tile(int pairs, long n, long depth, const word *x, long line, const word *b,
                                                       const float *more, long down, void *y) {
    vector sums[TOKENS][2] = {0};
    for (long p = 0; p < depth; p++, b += COLUMNS)
#pragma GCC unroll 12
        for (int r = 0; r < TOKENS; r++)
            for (int half = 0; half < 2; half++)
                sums[r][half] = multiplied(pairs, x[r * line + p], b + half * WIDE, sums[r][half]);
#pragma GCC unroll 12
    for (int r = 0; r < TOKENS; r++) {
        for (int half = 0; half < 2; half++) sums[r][half] += *(const vector *)(more + r * down + half * WIDE);
        store_two(pairs, sums[r], y, r * n);
    }
}

/* y (m, n) = x W^T + bias, W (n, k), or `back`: x W, W (k, n). x (m, k) has lines `line` words apart; `bias` (n) is float32, or
   none. m is TOKENS at least, n a multiple of COLUMNS, k of WIDE words; `room` has k words of COLUMNS for each thread. */
void product(long m, long n, long k, long back, const word *x, long line, const void *w, const float *bias, void *y, word *room,
             long bf16, long threads) {
    static const float no_bias[COLUMNS];
    long size = bf16 ? sizeof(uint16_t) : sizeof(float), depth = k * size / sizeof(word);
    long column = back ? size : k * size, apart = back ? n * size : LINE; /* bytes from one to the next, of W */
    long n_pieces = back ? k : COLUMNS * k * size / LINE, piece = back ? COLUMNS * size : LINE; /* of COLUMNS */
#pragma omp parallel num_threads(threads)
    {
        word *b = room + omp_get_thread_num() * depth * COLUMNS;
#pragma omp for schedule(dynamic)
        for (long j = 0; j < n; j += COLUMNS) {
            const char *own = (const char *)w + j * column, *next = own + threads * COLUMNS * column;
            long fetched = j + threads * COLUMNS < n ? 0 : n_pieces;
            if (back)
                side_by_side(bf16, own, n, depth, b);
            else
                turned((const word *)own, depth, b);
            for (long i = 0; i < m; i += TOKENS) {
                long at = i + TOKENS < m ? i : m - TOKENS; /* the last ones are done again with those that are left */
                const float *first = bias ? bias + j : no_bias;
                void *to = (char *)y + (at * n + j) * size;
                if (bf16)
                    tile(1, n, depth, x + at * line, line, b, first, 0, to);
                for (long p = 0; !bf16 && p < depth; p += AT_ONCE)
                    tile(0, n, depth - p < AT_ONCE ? depth - p : AT_ONCE, x + at * line + p, line, b + p * COLUMNS,
                         p ? to : first, p ? n : 0, to);
                for (long until = n_pieces * (at + TOKENS) / m; fetched < until; fetched++)
                    for (long i = 0; i < piece; i += LINE) __builtin_prefetch(next + fetched * apart + i, 0, 2);
            }
        }
    }
}
