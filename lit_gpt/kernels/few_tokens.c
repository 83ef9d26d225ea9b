/* Few tokens times a weight in bfloat16 or 4 bits, for CPUs with AVX512-BF16; compiled on first use, see __init__.py.

   Reading the weight is what a product of few tokens costs, so each byte of it is read once, in the layout in which it is
   stored, and becomes numbers in registers only. */

#include <stdlib.h>

#include "block.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define MOST 16    /* tokens times 4-bit weights */
#define FOUR 4     /* tokens at a time, and rows */

/* One row of the weight times m tokens. `even` holds, for each 64 numbers of a token, those at even places and then those
   at odd ones: a byte of codes is two neighbours, and its high halves are looked up together, and its low halves. */
TARGET __attribute__((always_inline)) static inline void row(int m, long k, long block, const uint16_t *even, const uint8_t *codes, const float *scales,
                       __m512i table, float *out) {
    __m512 sums[MOST];
    for (int t = 0; t < m; t++) sums[t] = _mm512_setzero_ps();
    for (long begin = 0; begin < k; begin += block, scales++) {
        __m512 scale = _mm512_set1_ps(*scales);
        for (long at = begin; at < begin + block; at += 64) {
            if (!(at & 127)) _mm_prefetch((const char *)(codes + at / 2) + AHEAD, _MM_HINT_T0);
            __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + at / 2)));
            /* The table holds the 16 levels twice, so that the lookup's fifth bit may be anything. */
            __m512bh high = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), table);
            __m512bh low = (__m512bh)_mm512_permutexvar_epi16(pairs, table);
            for (int t = 0; t < m; t++) {
                const uint16_t *x = even + t * k + at;
                __m512 sum = _mm512_dpbf16_ps(_mm512_setzero_ps(), high, (__m512bh)_mm512_loadu_si512(x));
                sum = _mm512_dpbf16_ps(sum, low, (__m512bh)_mm512_loadu_si512(x + 32));
                sums[t] = _mm512_fmadd_ps(sum, scale, sums[t]);
            }
        }
    }
    for (int t = 0; t < m; t++) out[t] = _mm512_reduce_add_ps(sums[t]);
}

static void even_first(long m, long k, const uint16_t *x, uint16_t *even) {
    for (long at = 0; at < m * k; at += 64)
        for (int i = 0; i < 32; i++) {
            even[at + i] = x[at + 2 * i];
            even[at + 32 + i] = x[at + 2 * i + 1];
        }
}

/* y (m, n) = x (m, k) W^T in bfloat16; W is codes (n, k / 2) into 16 levels, times scales (n, k / block).
   block is a multiple of 64 that divides k, m at most 16. Returns 0, or 1 if m is too large or there is no memory. */
TARGET int few_tokens_4bit(long m, long n, long k, long block, const uint16_t *x, const uint8_t *codes,
                           const float *scales, const uint16_t *levels, uint16_t *y, long threads) {
    uint16_t *even = calloc(MOST * k, sizeof(uint16_t));
    if (m > MOST || !even) return free(even), 1;
    even_first(m, k, x, even);
    __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)levels));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < n; r++) {
        float out[MOST];
        const uint8_t *c = codes + r * (k / 2);
        const float *s = scales + r * (k / block);
        if (m == 1) row(1, k, block, even, c, s, table, out);  /* constants, so that the sums stay in registers */
        else for (long t = 0; t < m; t += FOUR) row(FOUR, k, block, even + t * k, c, s, table, out + t);
        for (long t = 0; t < m; t++) y[t * n + r] = to_bf16(out[t]);
    }
    free(even);
    return 0;
}

TARGET static inline float dot(long n, const uint16_t *a, const uint16_t *b) {  /* of bfloat16, reading a from memory */
    __m512 sum = _mm512_setzero_ps();
    for (; n >= 32; n -= 32, a += 32, b += 32) {
        _mm_prefetch((const char *)a + AHEAD, _MM_HINT_T0);
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
    }
    __mmask32 rest = (__mmask32)((1UL << n) - 1);
    __m512bh last = (__m512bh)_mm512_maskz_loadu_epi16(rest, a);
    return _mm512_reduce_add_ps(_mm512_dpbf16_ps(sum, last, (__m512bh)_mm512_maskz_loadu_epi16(rest, b)));
}

/* Four rows of W (4, k) times four tokens, x (4, k); out (4 tokens, n). */
TARGET static void four_by_four(long n, long k, const uint16_t *w, const uint16_t *x, uint16_t *out) {
    __m512 sums[FOUR][FOUR];
    for (int r = 0; r < FOUR; r++) for (int t = 0; t < FOUR; t++) sums[r][t] = _mm512_setzero_ps();
    for (long at = 0; at < k; at += 32) {
        __mmask32 there = k - at < 32 ? (__mmask32)((1UL << (k - at)) - 1) : ~(__mmask32)0;
        __m512bh tokens[FOUR];
#pragma GCC unroll 4
        for (int t = 0; t < FOUR; t++) tokens[t] = (__m512bh)_mm512_maskz_loadu_epi16(there, x + t * k + at);
#pragma GCC unroll 4
        for (int r = 0; r < FOUR; r++) {
            _mm_prefetch((const char *)(w + r * k + at) + AHEAD, _MM_HINT_T0);
            __m512bh part = (__m512bh)_mm512_maskz_loadu_epi16(there, w + r * k + at);
#pragma GCC unroll 4
            for (int t = 0; t < FOUR; t++) sums[r][t] = _mm512_dpbf16_ps(sums[r][t], part, tokens[t]);
        }
    }
    for (int r = 0; r < FOUR; r++)
        for (int t = 0; t < FOUR; t++) out[t * n + r] = to_bf16(_mm512_reduce_add_ps(sums[r][t]));
}

/* y (m, n) = x (m, k) W^T in bfloat16; W (n, k), m at most 4. Returns 0, or 1 if m is larger or there is no memory. */
TARGET int few_tokens_bf16(long m, long n, long k, const uint16_t *x, const uint16_t *w, uint16_t *y, long threads) {
    uint16_t *padded = calloc(FOUR * (k + n), sizeof(uint16_t)), *out = padded + FOUR * k;
    if (m > FOUR || !padded) return free(padded), 1;
    memcpy(padded, x, m * k * sizeof(uint16_t));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < n; r += FOUR)
        if (r + FOUR <= n) four_by_four(n, k, w + r * k, padded, out + r);
        else for (long t = 0; t < m; t++)
            for (long j = r; j < n; j++) out[t * n + j] = to_bf16(dot(k, w + j * k, padded + t * k));
    memcpy(y, out, m * n * sizeof(uint16_t));
    free(padded);
    return 0;
}

/* y (n) = W x (k) in bfloat16; W (n, k). */
TARGET void one_token_bf16(long n, long k, const uint16_t *x, const uint16_t *w, uint16_t *y, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < n; r++) y[r] = to_bf16(dot(k, w + r * k, x));
}

/* One token through a whole block, since starting two dozen operators costs as much as a small model's weights do. */

TARGET static inline float weight_dot(const Weight *w, long r, const uint16_t *x) {  /* x as `arranged` */
    if (!w->scales) return dot(w->k, (const uint16_t *)w->numbers + r * w->k, x);
    float out;
    __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)w->levels));
    row(1, w->k, w->block, x, (const uint8_t *)w->numbers + r * (w->k / 2), w->scales + r * (w->k / w->block), table, &out);
    return out;
}

/* Number r of W x, plus the update's from low = A x if there is one. */
TARGET static inline uint16_t result(const Weight *w, long r, const uint16_t *x, const uint16_t *low) {
    uint16_t y = to_bf16(weight_dot(w, r, x));
    return w->rank ? to_bf16(from_bf16(y) + dot(w->rank, w->b + r * w->rank, low)) : y;
}

/* low = A x of a weight's update, shared out to threads that do not wait for one another; x as it is. */
TARGET static void lowered(const Weight *w, const uint16_t *x, uint16_t *low) {
#pragma omp for schedule(static) nowait
    for (long r = 0; r < w->rank; r++) low[r] = to_bf16(dot(w->k, w->a + r * w->k, x));
}

static void arranged(const Weight *w, uint16_t *x) {  /* in place, as products with w take it */
    if (!w->scales) return;
    uint16_t copy[w->k];
    memcpy(copy, x, sizeof copy);
    even_first(1, w->k, copy, x);
}

static void normed(long n, const uint16_t *x, const uint16_t *weight, float eps, uint16_t *y) {
    float sum = 0;
    for (long i = 0; i < n; i++) sum += from_bf16(x[i]) * from_bf16(x[i]);
    float scale = 1 / sqrtf(sum / n + eps);
    for (long i = 0; i < n; i++) y[i] = to_bf16(from_bf16(x[i]) * scale * from_bf16(weight[i]));
}

/* Turn the first n numbers of a head, whose angles are the same in both halves. */
static void turned(long n, const uint16_t *cos, const uint16_t *sin, uint16_t *x) {
    for (long i = 0, half = n / 2; i < half; i++) {
        float a = from_bf16(x[i]), b = from_bf16(x[half + i]);
        x[i] = to_bf16(a * from_bf16(cos[i]) + b * from_bf16(sin[i]));
        x[half + i] = to_bf16(b * from_bf16(cos[half + i]) + a * from_bf16(sin[half + i]));
    }
}

/* y (size) = softmax(scale * keys q) values, of `seen` keys and values (seen, size). */
TARGET static void attended(long seen, long size, float scale, const uint16_t *q, const uint16_t *keys,
                            const uint16_t *values, uint16_t *y) {
    float weights[seen], sums[size], most = -INFINITY, total = 0;
    for (long s = 0; s < seen; s++) {
        weights[s] = dot(size, keys + s * size, q) * scale;
        most = weights[s] > most ? weights[s] : most;
    }
    for (long s = 0; s < seen; s++) total += weights[s] = expf(weights[s] - most);
    memset(sums, 0, sizeof sums);
    for (long s = 0; s < seen; s++)
        for (long i = 0; i < size; i++) sums[i] += weights[s] * from_bf16(values[s * size + i]);
    for (long i = 0; i < size; i++) y[i] = to_bf16(sums[i] / total);
}

/* y (q.k) is x (q.k) after the block; the token's key and value are stored at `position` of keys and values
   (groups, capacity, size). cos and sin (n) are its angles. */
TARGET void one_token_block(const Block *b, const uint16_t *x, const uint16_t *cos, const uint16_t *sin, long n,
                            uint16_t *keys, uint16_t *values, long capacity, long position, uint16_t *y, long threads) {
    long width = b->q.k, size = b->size, inner = b->gate.n, per_group = b->heads / b->groups;
    uint16_t q[b->q.n], heads[b->q.n], middle[width], hidden[inner];
    /* One more than there are: an array has to have some. */
    uint16_t low_q[b->q.rank + 1], low_k[b->k.rank + 1], low_v[b->v.rank + 1], low_proj[b->proj.rank + 1];
    uint16_t low_gate[b->gate.rank + 1], low_up[b->up.rank + 1], low_down[b->down.rank + 1];
#pragma omp parallel num_threads(threads)
    {
        uint16_t in[width];
        normed(width, x, b->norm_1, b->eps, in);
        lowered(&b->q, in, low_q);
        lowered(&b->k, in, low_k);
        lowered(&b->v, in, low_v);
        arranged(&b->q, in);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long r = 0; r < b->q.n + 2 * b->k.n; r++) {
            long key = r - b->q.n, value = key - b->k.n;
            if (key < 0) q[r] = result(&b->q, r, in, low_q);
            else if (value < 0)
                keys[(key / size * capacity + position) * size + key % size] = result(&b->k, key, in, low_k);
            else values[(value / size * capacity + position) * size + value % size] = result(&b->v, value, in, low_v);
        }
#pragma omp for schedule(static)
        for (long group = 0; group < b->groups; group++) turned(n, cos, sin, keys + (group * capacity + position) * size);
#pragma omp for schedule(static)
        for (long head = 0; head < b->heads; head++) {
            long group = head / per_group * capacity * size;
            turned(n, cos, sin, q + head * size);
            attended(position + 1, size, b->scale, q + head * size, keys + group, values + group, heads + head * size);
        }
        lowered(&b->proj, heads, low_proj);
#pragma omp barrier
#pragma omp single
        arranged(&b->proj, heads);
#pragma omp for schedule(static)
        for (long r = 0; r < width; r++)
            middle[r] = to_bf16(from_bf16(x[r]) + from_bf16(result(&b->proj, r, heads, low_proj)));
        normed(width, middle, b->norm_2, b->eps, in);
        lowered(&b->gate, in, low_gate);
        lowered(&b->up, in, low_up);
        arranged(&b->gate, in);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long r = 0; r < inner; r++) {
            float gate = from_bf16(result(&b->gate, r, in, low_gate));
            hidden[r] = to_bf16(gate / (1 + expf(-gate)) * from_bf16(result(&b->up, r, in, low_up)));
        }
        lowered(&b->down, hidden, low_down);
#pragma omp barrier
#pragma omp single
        arranged(&b->down, hidden);
#pragma omp for schedule(static)
        for (long r = 0; r < width; r++)
            y[r] = to_bf16(from_bf16(middle[r]) + from_bf16(result(&b->down, r, hidden, low_down)));
    }
}
