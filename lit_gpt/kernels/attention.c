/* Causal attention and its way back, fused; compiled on first use, see __init__.py.

   A row's scores are made for a few queries at a time, in float32, and never leave the nearest caches; on the way back they
   are made again. Scores lie with the queries across: softmax and products then have whole vectors whatever a row's length.

   Tokens lie end to end, q (tokens, heads, size), k and v (tokens, groups, size), in float32 or bfloat16 (`bf16` 0 or 1);
   rows of them begin at `begins` (rows + 1). A query sees the last `window` keys of its row, its own included. Where there
   are `branches` (tokens), of the others only those of its branch and of branch 0. */

#include <omp.h>

#include "numbers.h"
#include "words.h"

#define QUERIES 32 /* at a time */

static inline __attribute__((always_inline)) void product_of(int pairs, long m, long n, long k, const word *a, long down,
                                                             long along, const word *b, float *c, int more) {
    for (long i = 0; i < m; i += TALL)
        for (long j = 0; j < n; j += 2 * WIDE) tile_of(pairs, k, a + i * down, down, along, b + j, n, c + i * n + j, n, more);
}

typedef struct { /* of all items alike */
    long heads, groups, size, wide, window;
    float scale;
    const int64_t *begins, *branches;
    long bf16;
    int pairs;
    long line; /* words of `wide` numbers */
} Task;

static Task task(long heads, long groups, long size, long window, float scale, const int64_t *begins, const int64_t *branches,
                 long bf16, long in_pairs) {
    long wide = up_to(size, 2 * WIDE);
#ifdef __AVX512BF16__
    int pairs = bf16 && in_pairs;
#else
    int pairs = 0;
    (void)in_pairs;
#endif
    return (Task){heads, groups, size, wide, window, scale, begins, branches, bf16, pairs, wide / (1 + pairs)};
}

/* c (m, n) = a b, or c + a b, over k numbers: word (i, p) of a lies at i * down + p * along, b is (words of k, n). m is a
   multiple of TALL, n of two vectors. */
static void product(const Task *t, long m, long n, long k, const word *a, long down, long along, const word *b, float *c,
                    int more) {
    if (t->pairs)
        product_of(1, m, n, k / 2, a, down, along, b, c, more);
    else
        product_of(0, m, n, k, a, down, along, b, c, more);
}

/* Of the tokens `first` to `last` one head of `heads`, as (a multiple of QUERIES, line), 0 where there is nothing: a number
   stands beside the next one of its token. */
static void load_head(const Task *t, const void *from, long heads, long head, long first, long last, word *to) {
    for (long token = first; token < first + up_to(last - first, QUERIES); token++, to += t->line) {
        long at = (token * heads + head) * t->size;
        memset(to, 0, t->line * sizeof(word));
        if (token >= last) continue;
        if (t->pairs)
            memcpy(to, (const uint16_t *)from + at, t->size * sizeof(uint16_t));
        else
            load((float *)to, from, t->bf16, at, t->size);
    }
}

/* The same for sums over tokens: a number stands beside that of the next token. */
static void load_tokens(const Task *t, const void *from, long heads, long head, long first, long last, word *to) {
    if (!t->pairs) {
        load_head(t, from, heads, head, first, last, to);
        return;
    }
    for (long token = first; token < first + up_to(last - first, QUERIES); token += 2, to += t->wide) {
        memset(to, 0, t->wide * sizeof(word));
        if (token >= last) continue;
        const uint16_t *own = (const uint16_t *)from + (token * heads + head) * t->size;
        const uint16_t *next = token + 1 < last ? own + heads * t->size : own;
        word kept = token + 1 < last ? 0xffff0000 : 0;
        for (long i = 0; i < t->size; i++) to[i] = own[i] | (((word)next[i] << 16) & kept);
    }
}

static void store_head(const Task *t, void *to, long bf16, long heads, long head, long first, long last, const float *from) {
    for (long token = first; token < last; token++, from += t->wide)
        store(to, bf16, (token * heads + head) * t->size, from, t->size);
}

static void turned(const Task *t, const word *from, word *to) { /* (QUERIES, line) to (line, QUERIES) */
    for (long i = 0; i < t->line; i += WIDE)
        for (long r = 0; r < QUERIES; r += WIDE) turned_block(from + r * t->line + i, t->line, to + i * QUERIES + r, QUERIES);
}

/* x (n, QUERIES) as words for sums over queries, and for sums over its n lines; in `room`, where they are others than x. */
static const word *over_queries(const Task *t, long n, const float *x, word *room) {
    if (!t->pairs) return (const word *)x;
    store(room, 1, 0, x, n * QUERIES);
    return room;
}

static const word *over_lines(const Task *t, long n, const float *x, word *room) {
    if (!t->pairs) return (const word *)x;
    for (long i = 0; i < n / 2; i++, x += 2 * QUERIES) weave(x, x + QUERIES, QUERIES, room + i * QUERIES);
    return room;
}

/* Of a block of queries from `at` on: the first key that any sees, a multiple of TALL from the row's beginning. */
static long first_seen(const Task *t, long at) { return at + 1 > t->window ? (at + 1 - t->window) / TALL * TALL : 0; }

/* Of queries from `at` on and the keys `low` to `high` of a row: products become exp(scores - their maximum), 0 where a key is
   hidden, in place; `sums` (QUERIES) of them. */
static void exponentials(const Task *t, long begin, long at, long last, long low, long high, float *scores, float *sums) {
    int branch[QUERIES] = {0};
    float most[QUERIES];
    for (long r = 0; r < QUERIES; r++) most[r] = -INFINITY, sums[r] = 0;
    for (long r = 0; t->branches && r < QUERIES && begin + at + r < last; r++) branch[r] = (int)t->branches[begin + at + r];
    for (long key = low; key < high; key++) {
        float *line = scores + (key - low) * QUERIES;
        int ahead = (int)(key - at), behind = (int)(key + t->window - at);
        int own = t->branches && begin + key < last ? (int)t->branches[begin + key] : 0;
        for (int r = 0; r < QUERIES; r++) line[r] *= t->scale;
        if (ahead > 0 || behind < QUERIES)
            for (int r = 0; r < QUERIES; r++) line[r] = r >= ahead && r < behind ? line[r] : -INFINITY;
        if (own)
            for (int r = 0; r < QUERIES; r++) line[r] = branch[r] == own ? line[r] : -INFINITY;
        for (int r = 0; r < QUERIES; r++) most[r] = line[r] > most[r] ? line[r] : most[r];
    }
    for (long i = 0; i < (high - low) * QUERIES; i += QUERIES)
        for (int r = 0; r < QUERIES; r++) {
            float x = clamped_exp(scores[i + r] - most[r]);
            scores[i + r] = scores[i + r] == -INFINITY ? 0.0f : x;
            sums[r] += scores[i + r];
        }
    for (int r = 0; r < QUERIES; r++) sums[r] = sums[r] ? sums[r] : 1; /* beyond a row's end, where no key is seen */
}

/* y (tokens, heads, size): attention of every query. `room` has `each` numbers for each thread; see `_room` in attention.py. */
void attention(long rows, long heads, long groups, long size, long window, float scale, const int64_t *begins,
               const int64_t *branches, const void *q, const void *k, const void *v, void *y, float *room, long each, long bf16,
               long in_pairs, long threads) {
    Task t = task(heads, groups, size, window, scale, begins, branches, bf16, in_pairs);
#pragma omp parallel num_threads(threads)
    {
        word *keys = (word *)room + omp_get_thread_num() * each;
#pragma omp for schedule(dynamic)
        for (long item = 0; item < rows * heads; item++) {
            long begin = begins[item / heads], end = begins[item / heads + 1], head = item % heads;
            long group = head / (heads / groups), all = up_to(end - begin, QUERIES), block = QUERIES * t.wide;
            word *values = keys + all * t.wide, *scores = values + all * t.wide, *rounded = scores + all * QUERIES;
            word *queries = rounded + all * QUERIES, *across = queries + block;
            float *weights = (float *)scores, *out = (float *)(across + block), sums[QUERIES];
            load_head(&t, k, groups, group, begin, end, keys);
            load_tokens(&t, v, groups, group, begin, end, values);
            for (long at = 0; begin + at < end; at += QUERIES) {
                long last = begin + at + QUERIES < end ? begin + at + QUERIES : end;
                long low = first_seen(&t, at), high = up_to(last - begin, TALL), n = high - low, skip = low * t.line;
                load_head(&t, q, heads, head, begin + at, last, queries);
                turned(&t, queries, across);
                product(&t, n, QUERIES, t.wide, keys + skip, t.line, 1, across, weights, 0);
                exponentials(&t, begin, at, last, low, high, weights, sums);
                product(&t, QUERIES, t.wide, n, over_lines(&t, n, weights, rounded), 1, QUERIES, values + skip, out, 0);
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
                        void *dv, long sum_bf16, float *room, long each, long bf16, long in_pairs, long threads) {
    Task t = task(heads, groups, size, window, scale, begins, 0, bf16, in_pairs);
    long n_heads = heads / groups / parts; /* of a part */
#pragma omp parallel num_threads(threads)
    {
        float *d_keys = room + omp_get_thread_num() * each;
#pragma omp for schedule(dynamic)
        for (long item = 0; item < rows * groups * parts; item++) {
            long row = item / (groups * parts), part = item % (groups * parts), begin = begins[row], end = begins[row + 1];
            long all = up_to(end - begin, QUERIES), plane = all * t.wide, block = QUERIES * t.wide, lines = all * QUERIES;
            float *d_values = d_keys + plane, *weights = d_values + plane, *d_weights = weights + lines;
            float *out = d_weights + lines, sums[QUERIES], shares[QUERIES];
            word *keys = (word *)(out + block), *values = keys + plane, *key_tokens = t.pairs ? values + plane : keys;
            word *rounded = values + 2 * plane, *queries = rounded + lines, *grads = queries + block, *across = grads + block;
            load_head(&t, k, groups, part / parts, begin, end, keys);
            if (t.pairs) load_tokens(&t, k, groups, part / parts, begin, end, key_tokens);
            load_head(&t, v, groups, part / parts, begin, end, values);
            memset(d_keys, 0, 2 * plane * sizeof(float));
            for (long head = part * n_heads; head < (part + 1) * n_heads; head++)
                for (long at = 0; begin + at < end; at += QUERIES) {
                    long last = begin + at + QUERIES < end ? begin + at + QUERIES : end;
                    long low = first_seen(&t, at), high = up_to(last - begin, TALL), n = high - low;
                    long seen = low * t.wide, skip = low * t.line;
                    load_head(&t, q, heads, head, begin + at, last, queries);
                    turned(&t, queries, across);
                    product(&t, n, QUERIES, t.wide, keys + skip, t.line, 1, across, weights, 0);
                    exponentials(&t, begin, at, last, low, high, weights, sums);
                    load_head(&t, grad, heads, head, begin + at, last, grads);
                    turned(&t, grads, across);
                    product(&t, n, QUERIES, t.wide, values + skip, t.line, 1, across, d_weights, 0);
                    for (int r = 0; r < QUERIES; r++) sums[r] = 1.0f / sums[r], shares[r] = 0;
                    for (long i = 0; i < n * QUERIES; i += QUERIES)
                        for (int r = 0; r < QUERIES; r++) {
                            weights[i + r] *= sums[r];
                            shares[r] += weights[i + r] * d_weights[i + r];
                        }
                    for (long i = 0; i < n * QUERIES; i += QUERIES)
                        for (int r = 0; r < QUERIES; r++)
                            d_weights[i + r] = (d_weights[i + r] - shares[r]) * weights[i + r] * scale;
                    if (t.pairs) {
                        load_tokens(&t, q, heads, head, begin + at, last, queries);
                        load_tokens(&t, grad, heads, head, begin + at, last, grads);
                    }
                    long words = QUERIES / (1 + t.pairs);
                    product(&t, n, t.wide, QUERIES, over_queries(&t, n, weights, rounded), words, 1, grads, d_values + seen, 1);
                    product(&t, n, t.wide, QUERIES, over_queries(&t, n, d_weights, rounded), words, 1, queries, d_keys + seen, 1);
                    product(&t, QUERIES, t.wide, n, over_lines(&t, n, d_weights, rounded), 1, QUERIES, key_tokens + skip, out, 0);
                    store_head(&t, dq, bf16, heads, head, begin + at, last, out);
                }
            store_head(&t, dk, sum_bf16, groups * parts, part, begin, end, d_keys);
            store_head(&t, dv, sum_bf16, groups * parts, part, begin, end, d_values);
        }
    }
}
