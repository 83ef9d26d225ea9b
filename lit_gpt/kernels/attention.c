/* Causal attention and its way back, fused; compiled on first use, see __init__.py.

   A row's scores are made for a few queries at a time, in float32, and never leave the nearest caches; on the way back they
   are made again. Scores lie with the queries across: softmax and products then have whole vectors whatever a row's length.

   Tokens lie end to end, q (tokens, heads, size), k and v (tokens, groups, size), in float32 or bfloat16 (`bf16` 0 or 1);
   rows of them begin at `begins` (rows + 1). A query sees the last `window` keys of its row, its own included. Where there
   are `branches` (tokens), of the others only those of its branch and of branch 0. */

#include <omp.h>

#include "numbers.h"

#ifdef __AVX512F__
#define WIDE 16 /* numbers of a vector */
#define TALL 8  /* rows of a product that are summed at a time, two vectors of each */
#else
#define WIDE 8
#define TALL 4
#endif
#define QUERIES 32 /* at a time */

typedef float vector __attribute__((vector_size(WIDE * sizeof(float)), aligned(sizeof(float)), may_alias));

static long up_to(long n, long whole) { return (n + whole - 1) / whole * whole; }

/* c (m, n) = a b, or c + a b; number (i, p) of a lies at i * down + p * along, b is (k, n). m is a multiple of TALL, n of
   two vectors. */
static void product(long m, long n, long k, const float *a, long down, long along, const float *b, float *c, int more) {
    for (long i = 0; i < m; i += TALL)
        for (long j = 0; j < n; j += 2 * WIDE) {
            vector sums[TALL][2];
#pragma GCC unroll 8
            for (int r = 0; r < TALL; r++)
                for (int half = 0; half < 2; half++)
                    sums[r][half] = more ? *(vector *)(c + (i + r) * n + j + half * WIDE) : (vector){0};
            for (long p = 0; p < k; p++) {
                vector left = *(const vector *)(b + p * n + j), right = *(const vector *)(b + p * n + j + WIDE);
                const float *column = a + i * down + p * along;
#pragma GCC unroll 8
                for (int r = 0; r < TALL; r++) {
                    sums[r][0] += column[r * down] * left;
                    sums[r][1] += column[r * down] * right;
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < TALL; r++)
                for (int half = 0; half < 2; half++) *(vector *)(c + (i + r) * n + j + half * WIDE) = sums[r][half];
        }
}

typedef struct { /* of all items alike */
    long heads, groups, size, wide, window, bf16;
    const int64_t *begins, *branches;
} Task;

/* Of the tokens `first` to `last` one head of `heads`, as (a multiple of QUERIES, wide), times `scale`; 0 where there is
   nothing. */
static void load_head(const Task *t, const void *from, long heads, long head, long first, long last, float scale, float *to) {
    for (long token = first; token < first + up_to(last - first, QUERIES); token++, to += t->wide) {
        memset(to, 0, t->wide * sizeof(float));
        if (token >= last) continue;
        load(to, from, t->bf16, (token * heads + head) * t->size, t->size);
        for (long i = 0; i < t->size; i++) to[i] *= scale;
    }
}

static void store_head(const Task *t, void *to, long bf16, long heads, long head, long first, long last, const float *from) {
    for (long token = first; token < last; token++, from += t->wide)
        store(to, bf16, (token * heads + head) * t->size, from, t->size);
}

static void turned(const Task *t, const float *from, float *to) { /* (QUERIES, wide) to (wide, QUERIES) */
    for (long i = 0; i < t->wide; i++)
        for (long r = 0; r < QUERIES; r++) to[i * QUERIES + r] = from[r * t->wide + i];
}

/* Of a block of queries from `at` on: the first key that any sees, a multiple of TALL from the row's beginning. */
static long first_seen(const Task *t, long at) { return at + 1 > t->window ? (at + 1 - t->window) / TALL * TALL : 0; }

/* Of queries from `at` on and the keys `low` to `high` of a row: exp(scores - their maximum), 0 where a key is hidden, in
   place; `sums` (QUERIES) of them. */
static void exponentials(const Task *t, long begin, long at, long last, long low, long high, float *scores, float *sums) {
    int branch[QUERIES] = {0};
    float most[QUERIES];
    for (long r = 0; r < QUERIES; r++) most[r] = -INFINITY, sums[r] = 0;
    for (long r = 0; t->branches && r < QUERIES && begin + at + r < last; r++) branch[r] = (int)t->branches[begin + at + r];
    for (long key = low; key < high; key++) {
        float *line = scores + (key - low) * QUERIES;
        int ahead = (int)(key - at), behind = (int)(key + t->window - at);
        int own = t->branches && begin + key < last ? (int)t->branches[begin + key] : 0;
        for (int r = 0; r < QUERIES; r++) line[r] = r >= ahead && r < behind ? line[r] : -INFINITY;
        if (own)
            for (int r = 0; r < QUERIES; r++) line[r] = branch[r] == own ? line[r] : -INFINITY;
        for (int r = 0; r < QUERIES; r++) most[r] = line[r] > most[r] ? line[r] : most[r];
    }
    for (long key = low; key < high; key++) {
        float *line = scores + (key - low) * QUERIES;
        for (int r = 0; r < QUERIES; r++) {
            line[r] = line[r] == -INFINITY ? 0.0f : clamped_exp(line[r] - most[r]);
            sums[r] += line[r];
        }
    }
    for (int r = 0; r < QUERIES; r++) sums[r] = sums[r] ? sums[r] : 1; /* beyond a row's end, where no key is seen */
}

/* y (tokens, heads, size): attention of every query. `room` has `each` numbers for each thread; see `_room` in attention.py. */
void attention(long rows, long heads, long groups, long size, long window, float scale, const int64_t *begins,
               const int64_t *branches, const void *q, const void *k, const void *v, void *y, float *room, long each, long bf16,
               long threads) {
    Task t = {heads, groups, size, up_to(size, 2 * WIDE), window, bf16, begins, branches};
#pragma omp parallel num_threads(threads)
    {
        float *keys = room + omp_get_thread_num() * each;
#pragma omp for schedule(dynamic)
        for (long item = 0; item < rows * heads; item++) {
            long begin = begins[item / heads], end = begins[item / heads + 1], head = item % heads;
            long group = head / (heads / groups), all = up_to(end - begin, QUERIES);
            float *values = keys + all * t.wide, *scores = values + all * t.wide, *queries = scores + all * QUERIES;
            float *across = queries + QUERIES * t.wide, *out = across + QUERIES * t.wide, sums[QUERIES];
            load_head(&t, k, groups, group, begin, end, 1, keys);
            load_head(&t, v, groups, group, begin, end, 1, values);
            for (long at = 0; begin + at < end; at += QUERIES) {
                long last = begin + at + QUERIES < end ? begin + at + QUERIES : end;
                long low = first_seen(&t, at), high = up_to(last - begin, TALL);
                load_head(&t, q, heads, head, begin + at, last, scale, queries);
                turned(&t, queries, across);
                product(high - low, QUERIES, t.wide, keys + low * t.wide, t.wide, 1, across, scores, 0);
                exponentials(&t, begin, at, last, low, high, scores, sums);
                product(QUERIES, t.wide, high - low, scores, 1, QUERIES, values + low * t.wide, out, 0);
                for (long r = 0; r < QUERIES; r++)
                    for (long i = 0; i < t.wide; i++) out[r * t.wide + i] /= sums[r];
                store_head(&t, y, bf16, heads, head, begin + at, last, out);
            }
        }
    }
}

/* The gradients of q, k and v from `grad` (tokens, heads, size). The heads of a group are split into `parts`, each of which
   gives its own dk and dv (tokens, groups, parts, size), in float32 (`sum_bf16` 0) or bfloat16. */
void attention_backward(long rows, long heads, long groups, long parts, long size, long window, float scale,
                        const int64_t *begins, const void *q, const void *k, const void *v, const void *grad, void *dq, void *dk,
                        void *dv, long sum_bf16, float *room, long each, long bf16, long threads) {
    Task t = {heads, groups, size, up_to(size, 2 * WIDE), window, bf16, begins, 0};
    long n_heads = heads / groups / parts; /* of a part */
#pragma omp parallel num_threads(threads)
    {
        float *keys = room + omp_get_thread_num() * each;
#pragma omp for schedule(dynamic)
        for (long item = 0; item < rows * groups * parts; item++) {
            long row = item / (groups * parts), part = item % (groups * parts), begin = begins[row], end = begins[row + 1];
            long all = up_to(end - begin, QUERIES), plane = all * t.wide, block = QUERIES * t.wide;
            float *values = keys + plane, *d_keys = values + plane, *d_values = d_keys + plane, *weights = d_values + plane;
            float *d_weights = weights + all * QUERIES, *queries = d_weights + all * QUERIES, *grads = queries + block;
            float *across = grads + block, *out = across + block, sums[QUERIES], shares[QUERIES];
            load_head(&t, k, groups, part / parts, begin, end, 1, keys);
            load_head(&t, v, groups, part / parts, begin, end, 1, values);
            memset(d_keys, 0, 2 * plane * sizeof(float));
            for (long head = part * n_heads; head < (part + 1) * n_heads; head++)
                for (long at = 0; begin + at < end; at += QUERIES) {
                    long last = begin + at + QUERIES < end ? begin + at + QUERIES : end;
                    long low = first_seen(&t, at), high = up_to(last - begin, TALL), n = high - low, skip = low * t.wide;
                    load_head(&t, q, heads, head, begin + at, last, scale, queries);
                    load_head(&t, grad, heads, head, begin + at, last, 1, grads);
                    turned(&t, queries, across);
                    product(n, QUERIES, t.wide, keys + skip, t.wide, 1, across, weights, 0);
                    exponentials(&t, begin, at, last, low, high, weights, sums);
                    turned(&t, grads, across);
                    product(n, QUERIES, t.wide, values + skip, t.wide, 1, across, d_weights, 0);
                    for (int r = 0; r < QUERIES; r++) sums[r] = 1.0f / sums[r], shares[r] = 0;
                    for (long i = 0; i < n * QUERIES; i += QUERIES)
                        for (int r = 0; r < QUERIES; r++) {
                            weights[i + r] *= sums[r];
                            shares[r] += weights[i + r] * d_weights[i + r];
                        }
                    for (long i = 0; i < n * QUERIES; i += QUERIES)
                        for (int r = 0; r < QUERIES; r++)
                            d_weights[i + r] = (d_weights[i + r] - shares[r]) * weights[i + r];
                    product(n, t.wide, QUERIES, weights, QUERIES, 1, grads, d_values + skip, 1);
                    product(n, t.wide, QUERIES, d_weights, QUERIES, 1, queries, d_keys + skip, 1);
                    product(QUERIES, t.wide, n, d_weights, 1, QUERIES, keys + skip, out, 0);
                    for (long i = 0; i < block; i++) out[i] *= scale;
                    store_head(&t, dq, bf16, heads, head, begin + at, last, out);
                }
            store_head(&t, dk, sum_bf16, groups * parts, part, begin, end, d_keys);
            store_head(&t, dv, sum_bf16, groups * parts, part, begin, end, d_values);
        }
    }
}
