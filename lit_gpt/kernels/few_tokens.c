/* Products of a few tokens with a 4-bit weight, for CPUs with AVX512-BF16; compiled on first use, see __init__.py.

   Reading the weight is what a product of few tokens costs, so each byte of it is read once, in the layout in which it is
   stored, and becomes numbers in registers only. */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#define MOST 16  /* tokens */

static inline uint16_t to_bf16(float value) {  /* to the nearest, ties to even */
    union { float f; uint32_t u; } bits = {value};
    return (uint16_t)((bits.u + 0x7fff + ((bits.u >> 16) & 1)) >> 16);
}

/* One row of the weight times m tokens. `even` holds, for each 64 numbers of a token, those at even places and then those
   at odd ones: a byte of codes is two neighbours, and its high halves are looked up together, and its low halves. */
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16"), always_inline))
static inline void row(int m, long k, long block, const uint16_t *even, const uint8_t *codes, const float *scales,
                       __m512i table, float *out) {
    __m512 sums[MOST];
    for (int t = 0; t < m; t++) sums[t] = _mm512_setzero_ps();
    for (long begin = 0; begin < k; begin += block, scales++) {
        __m512 scale = _mm512_set1_ps(*scales);
        for (long at = begin; at < begin + block; at += 64) {
            /* The processor looks no further than a page of 4 KB; asked for in time, twice as much arrives. */
            if (!(at & 127)) _mm_prefetch((const char *)(codes + at / 2) + 2048, _MM_HINT_T0);
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

/* y (m, n) = x (m, k) W^T in bfloat16; W is codes (n, k / 2) into 16 levels, times scales (n, k / block).
   block is a multiple of 64 that divides k, m at most 16. Returns 0, or 1 if m is too large or there is no memory. */
__attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
int few_tokens_4bit(long m, long n, long k, long block, const uint16_t *x, const uint8_t *codes, const float *scales,
                    const uint16_t *levels, uint16_t *y, long threads) {
    if (m > MOST) return 1;
    uint16_t *even = malloc(sizeof(uint16_t) * m * k);
    if (!even) return 1;
    for (long at = 0; at < m * k; at += 64)
        for (int i = 0; i < 32; i++) {
            even[at + i] = x[at + 2 * i];
            even[at + 32 + i] = x[at + 2 * i + 1];
        }
    __m512i table = _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)levels));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < n; r++) {
        float out[MOST];
        const uint8_t *c = codes + r * (k / 2);
        const float *s = scales + r * (k / block);
        if (m == 1) row(1, k, block, even, c, s, table, out);  /* the compiler unrolls this one */
        else row((int)m, k, block, even, c, s, table, out);
        for (long t = 0; t < m; t++) y[t * n + r] = to_bf16(out[t]);
    }
    free(even);
    return 0;
}
