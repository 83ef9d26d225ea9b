/* Few tokens times a weight in bfloat16 or 4 bits, for CPUs with AVX2 or AVX512-BF16; compiled on first use, see __init__.py.

   Reading the weight is what a product of few tokens costs, so each byte of it is read once, in the layout in which it is
   stored, and becomes numbers in registers only. */

#include <immintrin.h>
#include <stdlib.h>

#include "numbers.h"

#define MOST 16    /* tokens times 4-bit weights */
#define FOUR 4     /* tokens at a time, and rows */
#define AHEAD 4096 /* bytes: the processor looks no further than a page; asked for in time, more arrives */

/* A vector of bfloat16 numbers, the sums of its pairs' products in float32, and 16 levels to look numbers up in. */
#ifdef __AVX512BF16__

#define WIDTH 32 /* numbers of a vector */
typedef __m512bh Numbers;
typedef __m512 Sums;
typedef __m512i Levels;

static inline Numbers numbers(const uint16_t *from) { return (Numbers)_mm512_loadu_si512(from); }
static inline Numbers some_numbers(const uint16_t *from, long n) { /* the others are 0 */
    return (Numbers)_mm512_maskz_loadu_epi16(n < WIDTH ? (__mmask32)((1UL << n) - 1) : ~(__mmask32)0, from);
}
static inline Sums nothing(void) { return _mm512_setzero_ps(); }
static inline Sums paired(Numbers a, Numbers b, Sums sums) { return _mm512_dpbf16_ps(sums, a, b); }
static inline Sums scaled(Sums part, float scale, Sums sums) { return _mm512_fmadd_ps(part, _mm512_set1_ps(scale), sums); }
static inline float summed(Sums sums) { return _mm512_reduce_add_ps(sums); }

/* Twice, so that the lookup's fifth bit may be anything. */
static inline Levels levels_in(const uint16_t *from) { return _mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i *)from)); }
/* The numbers of 32 bytes of codes: those of their high halves, which come first, and those of their low halves. */
static inline void looked_up(const uint8_t *codes, Levels levels, Numbers *high, Numbers *low) {
    __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)codes));
    *high = (Numbers)_mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), levels);
    *low = (Numbers)_mm512_permutexvar_epi16(pairs, levels);
}

#else

#define WIDTH 16
typedef __m256i Numbers;
typedef __m256 Sums;
typedef struct {
    __m256i first, second; /* bytes of the levels, all 16 twice */
} Levels;

static inline Numbers numbers(const uint16_t *from) { return _mm256_loadu_si256((const __m256i *)from); }
static inline Numbers some_numbers(const uint16_t *from, long n) {
    if (n >= WIDTH) return numbers(from);
    uint16_t some[WIDTH] = {0};
    memcpy(some, from, n * sizeof(uint16_t));
    return numbers(some);
}
static inline Sums nothing(void) { return _mm256_setzero_ps(); }
static inline __m256 evens(Numbers x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
static inline __m256 odds(Numbers x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32((int)0xffff0000))); }
static inline Sums paired(Numbers a, Numbers b, Sums sums) {
    return _mm256_fmadd_ps(odds(a), odds(b), _mm256_fmadd_ps(evens(a), evens(b), sums));
}
static inline Sums scaled(Sums part, float scale, Sums sums) { return _mm256_fmadd_ps(part, _mm256_set1_ps(scale), sums); }
static inline float summed(Sums sums) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

static inline Levels levels_in(const uint16_t *from) {
    __m128i a = _mm_loadu_si128((const __m128i *)from), b = _mm_loadu_si128((const __m128i *)(from + 8));
    __m128i byte = _mm_set1_epi16(255), first = _mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte));
    __m128i second = _mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8));
    return (Levels){_mm256_broadcastsi128_si256(first), _mm256_broadcastsi128_si256(second)};
}
static inline void looked_up(const uint8_t *codes, Levels levels, Numbers *high, Numbers *low) {
    /* The quarters are put so that interleaving bytes within halves brings the numbers in order. */
    __m256i pairs = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i *)codes), 0xd8);
    __m256i some = _mm256_set1_epi8(15), upper = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), some);
    __m256i lower = _mm256_and_si256(pairs, some);
    __m256i a = _mm256_shuffle_epi8(levels.first, upper), b = _mm256_shuffle_epi8(levels.second, upper);
    high[0] = _mm256_unpacklo_epi8(a, b), high[1] = _mm256_unpackhi_epi8(a, b);
    a = _mm256_shuffle_epi8(levels.first, lower), b = _mm256_shuffle_epi8(levels.second, lower);
    low[0] = _mm256_unpacklo_epi8(a, b), low[1] = _mm256_unpackhi_epi8(a, b);
}

#endif

#define PARTS (32 / WIDTH) /* vectors of 32 numbers */

/* One row of the weight times m tokens. `even` holds, for each 64 numbers of a token, those at even places and then those
   at odd ones: a byte of codes is two neighbours, and its high halves are looked up together, and its low halves. */
__attribute__((always_inline)) static inline void row(int m, long k, long block, const uint16_t *even, const uint8_t *codes,
                                                      const float *scales, Levels levels, float *out) {
    Sums sums[MOST];
    for (int t = 0; t < m; t++) sums[t] = nothing();
    for (long begin = 0; begin < k; begin += block, scales++)
        for (long at = begin; at < begin + block; at += 64) {
            Numbers high[PARTS], low[PARTS];
            if (!(at & 127)) _mm_prefetch((const char *)(codes + at / 2) + AHEAD, _MM_HINT_T0);
            looked_up(codes + at / 2, levels, high, low);
            for (int t = 0; t < m; t++) {
                const uint16_t *x = even + t * k + at;
                Sums part = nothing(), more = nothing(); /* two, since a sum has to wait for the one before */
#pragma GCC unroll 2
                for (int i = 0; i < PARTS; i++) {
                    part = paired(high[i], numbers(x + i * WIDTH), part);
                    more = paired(low[i], numbers(x + 32 + i * WIDTH), more);
                }
                sums[t] = scaled(part + more, *scales, sums[t]);
            }
        }
    for (int t = 0; t < m; t++) out[t] = summed(sums[t]);
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
int few_tokens_4bit(long m, long n, long k, long block, const uint16_t *x, const uint8_t *codes,
                           const float *scales, const uint16_t *levels, uint16_t *y, long threads) {
    uint16_t *even = calloc(MOST * k, sizeof(uint16_t));
    if (m > MOST || !even) return free(even), 1;
    even_first(m, k, x, even);
    Levels table = levels_in(levels);
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

static inline float dot(long n, const uint16_t *a, const uint16_t *b) { /* of bfloat16, reading a from memory */
    Sums sums = nothing(), more = nothing();
    for (; n >= 2 * WIDTH; n -= 2 * WIDTH, a += 2 * WIDTH, b += 2 * WIDTH) {
        _mm_prefetch((const char *)a + AHEAD, _MM_HINT_T0);
        sums = paired(numbers(a), numbers(b), sums);
        more = paired(numbers(a + WIDTH), numbers(b + WIDTH), more);
    }
    for (; n > 0; n -= WIDTH, a += WIDTH, b += WIDTH) sums = paired(some_numbers(a, n), some_numbers(b, n), sums);
    return summed(scaled(more, 1, sums));
}

/* Four rows of W (4, k) times four tokens, x (4, k); out (4 tokens, n). */
static void four_by_four(long n, long k, const uint16_t *w, const uint16_t *x, uint16_t *out) {
    Sums sums[FOUR][FOUR];
    for (int r = 0; r < FOUR; r++)
        for (int t = 0; t < FOUR; t++) sums[r][t] = nothing();
    for (long at = 0; at < k; at += WIDTH) {
        Numbers tokens[FOUR];
#pragma GCC unroll 4
        for (int t = 0; t < FOUR; t++) tokens[t] = some_numbers(x + t * k + at, k - at);
#pragma GCC unroll 4
        for (int r = 0; r < FOUR; r++) {
            _mm_prefetch((const char *)(w + r * k + at) + AHEAD, _MM_HINT_T0);
            Numbers part = some_numbers(w + r * k + at, k - at);
#pragma GCC unroll 4
            for (int t = 0; t < FOUR; t++) sums[r][t] = paired(part, tokens[t], sums[r][t]);
        }
    }
    for (int r = 0; r < FOUR; r++)
        for (int t = 0; t < FOUR; t++) out[t * n + r] = to_bf16(summed(sums[r][t]));
}

/* y (m, n) = x (m, k) W^T in bfloat16; W (n, k), m at most 4. Returns 0, or 1 if m is larger or there is no memory. */
int few_tokens_bf16(long m, long n, long k, const uint16_t *x, const uint16_t *w, uint16_t *y, long threads) {
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
void one_token_bf16(long n, long k, const uint16_t *x, const uint16_t *w, uint16_t *y, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long r = 0; r < n; r++) y[r] = to_bf16(dot(k, w + r * k, x));
}
