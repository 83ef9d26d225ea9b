/* Few tokens times a weight in bfloat16 or 4 bits, for CPUs with AVX512-BF16; compiled on first use, see __init__.py.

   Reading the weight is what a product of few tokens costs, so each byte of it is read once, in the layout in which it is
   stored, and becomes numbers in registers only. */

#include <immintrin.h>
#include <stdlib.h>

#include "numbers.h"

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define MOST 16    /* tokens times 4-bit weights */
#define FOUR 4     /* tokens at a time, and rows */
#define AHEAD 4096 /* bytes: the processor looks no further than a page; asked for in time, more arrives */

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
