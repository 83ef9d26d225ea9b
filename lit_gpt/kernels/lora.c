/* LoRA's update of a layer and its way back, each in one pass over memory; compiled on first use, see __init__.py.

   y += b low, low = a x, of tokens that lie end to end, x (n, in) and y (n, out) in float32 or bfloat16 (`bf16` 0 or 1). The
   factors a (r, in) and b (out, r) are float32; they are scaled and rounded to y's kind when used, as `low` is. Sums are float32.
   On the way back x may be what is still to be normed, of a kind of its own (`x_bf16`).
   Of x is dropped what 16 random bits of its place tell, see numbers.h; a `threshold` that all bits reach drops nothing.

   Each thread has some of the tokens, in blocks that stay in the nearer caches. Where sums are over tokens, each has its own. */

#include <omp.h>

#include "numbers.h"
#include "words.h"

#define BLOCK 64 /* tokens */
#define COLUMNS (2 * WIDE)

typedef struct {
    long in, out, r, ranks; /* `ranks`: r, filled up to a multiple of 8 */
    float kept, scaling;
    const int64_t *seed;
    long threshold, bf16, pairs;
    long per; /* numbers of a word */
    long x_bf16;
    const float *weight, *scale; /* of each number and of each token, by which x is normed first; or none */
} Task;

/* Numbers to words, those of a pair being neighbours; rounded to y's kind. */
static inline void packed(const Task *t, const float *from, long n, word *to) {
    uint16_t half[t->bf16 && !t->pairs ? n : 1];
    if (t->bf16 && !t->pairs) {
        store(half, 1, 0, from, n);
        load((float *)to, half, 1, 0, n);
    } else
        store(to, t->pairs, 0, from, n);
}

/* Lines of n numbers, as words (lines, n / per), to (lines / per, n): those of a pair are above each other. */
static const word *woven(const Task *t, const word *from, long lines, long n, word *to) {
    if (!t->pairs) return from;
    for (long i = 0; i < lines; i += 2) {
        const uint16_t *upper = (const uint16_t *)from + i * n, *lower = i + 1 < lines ? upper + n : 0;
        if (lower)
            for (long j = 0; j < n; j++) to[i / 2 * n + j] = upper[j] | (word)lower[j] << 16;
        else
            for (long j = 0; j < n; j++) to[i / 2 * n + j] = upper[j];
    }
    return to;
}

/* A factor as it is used (ranks, n), by all threads together: out of a, or of b, whose ranks are its columns. */
static void used(const Task *t, const float *factor, int is_a, word *to) {
    long n = is_a ? t->in : t->out, r = t->r;
#pragma omp for
    for (long i = 0; i < n; i += COLUMNS)
        for (long rank = 0; rank < t->ranks; rank++) {
            float line[COLUMNS] = {0};
            if (rank < r && is_a)
                for (long j = 0; j < COLUMNS; j++) line[j] = factor[rank * n + i + j] / t->kept;
            else if (rank < r)
                for (long j = 0; j < COLUMNS; j++) line[j] = factor[(i + j) * r + rank] * t->scaling;
            packed(t, line, COLUMNS, to + (rank * n + i) / t->per);
        }
}

/* The same woven, in `room` (ranks, n); without pairs it is the factor itself. */
static const word *used_woven(const Task *t, const word *factor, long n, word *room) {
#pragma omp for
    for (long rank = 0; rank < t->ranks; rank += 2) woven(t, factor + rank * n / t->per, 2, n, room + rank / 2 * n);
    return t->pairs ? room : factor;
}

/* n numbers from `at` on. */
static void words_of(const Task *t, const void *from, long at, long n, word *to) {
    if (t->pairs)
        memcpy(to, (const uint16_t *)from + at, n * sizeof(uint16_t));
    else
        load((float *)to, from, t->bf16, at, n);
}

/* Of x's line n numbers from `column` on (multiples of 4), 0 where they are dropped. */
static inline void seen(const Task *t, const void *x, long line, long column, long n, word *to, int16_t *bits) {
    long at = line * t->in + column;
    if (t->scale) { /* rounded as rms_norm in rows.c does */
        float normed[n];
        load(normed, x, t->x_bf16, at, n);
        for (long i = 0; i < n; i++) normed[i] *= t->scale[line] * t->weight[column + i];
        packed(t, normed, n, to);
    } else
        words_of(t, x, at, n, to);
    if (t->threshold <= INT16_MIN) return;
    random_bits((uint64_t)*t->seed, at, n, bits);
    if (t->pairs)
        for (long i = 0; i < n; i++) ((uint16_t *)to)[i] = bits[i] >= t->threshold ? ((uint16_t *)to)[i] : 0;
    else
        for (long i = 0; i < n; i++) to[i] = bits[i] >= t->threshold ? to[i] : 0;
}

/* low (2, ranks): two lines of n numbers times each of a factor's (ranks, n). */
static inline __attribute__((always_inline)) void down_of(int pairs, long ranks, long words, const word *lines, const word *factor,
                                                          float *low) {
    for (long first = 0; first < ranks; first += TALL) {
        vector sums[2][TALL] = {0};
        for (long i = 0; i < words; i += WIDE)
#pragma GCC unroll 8
            for (int rank = 0; rank < TALL; rank++)
                for (int token = 0; token < 2; token++)
                    sums[token][rank] =
                        multiplied_each(pairs, lines + token * words + i, factor + (first + rank) * words + i, sums[token][rank]);
        for (int token = 0; token < 2; token++)
            for (int rank = 0; rank < TALL; rank++) {
                float sum = 0, *lanes = (float *)&sums[token][rank];
#pragma omp simd reduction(+ : sum)
                for (int i = 0; i < WIDE; i++) sum += lanes[i];
                low[token * ranks + first + rank] = sum;
            }
    }
}

static void down(const Task *t, long n, const word *lines, const word *factor, word *low) {
    float sums[2 * t->ranks];
    if (t->pairs)
        down_of(1, t->ranks, n / 2, lines, factor, sums);
    else
        down_of(0, t->ranks, n, lines, factor, sums);
    packed(t, sums, 2 * t->ranks, low);
}

/* COLUMNS of y (tokens, `line` apart) += low (tokens, ranks) times those of a factor (ranks, n), which is woven. */
static void up(const Task *t, long tokens, const word *low, const word *factor, long n, float *y) {
    long depth = t->ranks / t->per;
    for (long i = 0; i < tokens; i += TALL)
        if (t->pairs)
            tile_of(1, depth, low + i * depth, depth, 1, factor, n, y + i * COLUMNS, COLUMNS, 1);
        else
            tile_of(0, depth, low + i * depth, depth, 1, factor, n, y + i * COLUMNS, COLUMNS, 1);
}

/* COLUMNS of sums (ranks, n) += low^T times x, both (tokens, ranks or COLUMNS) and woven. */
static void outer(const Task *t, long tokens, const word *low, const word *x, float *sums, long n) {
    long depth = (tokens + t->pairs) / t->per;
    for (long rank = 0; rank < t->ranks; rank += TALL)
        if (t->pairs)
            tile_of(1, depth, low + rank, 1, t->ranks, x, COLUMNS, sums + rank * n, n, 1);
        else
            tile_of(0, depth, low + rank, 1, t->ranks, x, COLUMNS, sums + rank * n, n, 1);
}

/* In place on y; `low` (n, ranks) is for the way back. */
void update(long n, long in, long out, long r, long ranks, const void *x, const float *a, const float *b, float kept, float scaling,
            const int64_t *seed, long threshold, void *y, word *low, word *room, long each, long bf16, long pairs,
            long threads) {
    Task t = {in, out, r, ranks, kept, scaling, seed, threshold, bf16, pairs, 1 + pairs, bf16, 0, 0};
    word *used_a = room, *natural_b = used_a + ranks * in, *woven_b = natural_b + ranks * out, *own = woven_b + ranks * out;
#pragma omp parallel num_threads(threads)
    {
        long thread = omp_get_thread_num(), many = omp_get_num_threads(), end = n * (thread + 1) / many;
        word *lines = own + thread * each, lows[BLOCK * ranks];
        float block[BLOCK * COLUMNS];
        used(&t, a, 1, used_a);
        used(&t, b, 0, natural_b);
        const word *used_b = used_woven(&t, natural_b, out, woven_b);
        for (long first = n * thread / many; first < end; first += BLOCK) {
            long tokens = first + BLOCK < end ? BLOCK : end - first;
            for (long i = 0; i < tokens; i += 2) {
                for (long half = 0; half < 2; half++)
                    seen(&t, x, first + i + (i + 1 < tokens) * half, 0, in, lines + half * in / t.per,
                         (int16_t *)(lines + 2 * in));
                down(&t, in, lines, used_a, lows + i * ranks / t.per);
            }
            memcpy(low + first * ranks / t.per, lows, tokens * ranks / t.per * sizeof(word));
            for (long j = 0; j < out; j += COLUMNS) {
                for (long i = 0; i < tokens; i++) load(block + i * COLUMNS, y, bf16, (first + i) * out + j, COLUMNS);
                up(&t, tokens, lows, used_b + j, out, block);
                for (long i = 0; i < tokens; i++) store(y, bf16, (first + i) * out + j, block + i * COLUMNS, COLUMNS);
            }
        }
    }
}

/* The gradients of a and b from y's, and that of the layer's input added to `dx`, if that is not null; the input is x, or what
   that is normed to. */
void update_backward(long n, long in, long out, long r, long ranks, const void *grad, const void *x, long x_bf16,
                     const float *weight, const float *scale, const float *a, const float *b, const word *low, float kept,
                     float scaling, const int64_t *seed, long threshold, void *dx, float *da, float *db, word *room, long each,
                     long bf16, long pairs, long threads) {
    Task t = {in, out, r, ranks, kept, scaling, seed, threshold, bf16, pairs, 1 + pairs, x_bf16, weight, scale};
    word *used_b = room, *natural_a = used_b + ranks * out, *woven_a = natural_a + ranks * in, *own = woven_a + ranks * in;
    long many = 1;
#pragma omp parallel num_threads(threads)
    {
        long thread = omp_get_thread_num();
        float *sums_a = (float *)(own + thread * each), *sums_b = sums_a + ranks * in, block[BLOCK * COLUMNS];
        word *lines = (word *)(sums_b + ranks * out), lows[BLOCK * ranks], across[BLOCK * ranks];
        word part[BLOCK * COLUMNS], turned[BLOCK * COLUMNS];
        int16_t bits[BLOCK * COLUMNS];
#pragma omp single
        many = omp_get_num_threads();
        used(&t, b, 0, used_b);
        used(&t, a, 1, natural_a);
        const word *used_a = used_woven(&t, natural_a, in, woven_a);
        memset(sums_a, 0, ranks * (in + out) * sizeof(float));
        for (long first = n * thread / many, end = n * (thread + 1) / many; first < end; first += BLOCK) {
            long tokens = first + BLOCK < end ? BLOCK : end - first;
            const word *own_low = woven(&t, low + first * ranks / t.per, tokens, ranks, across);
            for (long j = 0; j < out; j += COLUMNS) {
                for (long i = 0; i < tokens; i++) words_of(&t, grad, (first + i) * out + j, COLUMNS, part + i * COLUMNS / t.per);
                outer(&t, tokens, own_low, woven(&t, part, tokens, COLUMNS, turned), sums_b + j, out);
            }
            for (long i = 0; i < tokens; i += 2) {
                for (long half = 0; half < 2; half++)
                    words_of(&t, grad, (first + i + (i + 1 < tokens) * half) * out, out, lines + half * out / t.per);
                down(&t, out, lines, used_b, lows + i * ranks / t.per);
            }
            own_low = woven(&t, lows, tokens, ranks, across);
            for (long j = 0; j < in; j += COLUMNS) {
                for (long i = 0; i < tokens; i++)
                    seen(&t, x, first + i, j, COLUMNS, part + i * COLUMNS / t.per, bits + i * COLUMNS);
                outer(&t, tokens, own_low, woven(&t, part, tokens, COLUMNS, turned), sums_a + j, in);
                if (!dx) continue;
                memset(block, 0, sizeof block);
                up(&t, tokens, lows, used_a + j, in, block);
                for (long i = 0; i < tokens; i++) {
                    float *line = block + i * COLUMNS;
                    for (long k = 0; threshold > INT16_MIN && k < COLUMNS; k++)
                        line[k] = bits[i * COLUMNS + k] >= threshold ? line[k] : 0;
                    float sum[COLUMNS];
                    load(sum, dx, bf16, (first + i) * in + j, COLUMNS);
                    for (long k = 0; k < COLUMNS; k++) sum[k] += line[k];
                    store(dx, bf16, (first + i) * in + j, sum, COLUMNS);
                }
            }
        }
#pragma omp barrier
        const float *sums = (const float *)own;
#pragma omp for nowait
        for (long i = 0; i < r * in; i += COLUMNS)
            for (long j = i; j < i + COLUMNS; j++) {
                float sum = 0;
                for (long k = 0; k < many; k++) sum += sums[k * each + j];
                da[j] = sum / kept;
            }
#pragma omp for
        for (long i = 0; i < out; i += COLUMNS)
            for (long rank = 0; rank < r; rank++)
                for (long j = i; j < i + COLUMNS; j++) {
                    float sum = 0;
                    for (long k = 0; k < many; k++) sum += sums[k * each + ranks * in + rank * out + j];
                    db[j * r + rank] = sum * scaling;
                }
    }
}
