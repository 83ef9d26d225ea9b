/* What products are made of: a number in float32 or, in `pairs`, two in bfloat16 that are summed over one after the other.

   Some processors multiply pairs twice as fast as float32, others half as fast: the caller says (`in_pairs`). */

#pragma once

#include "numbers.h"

#ifdef __AVX512F__
#define WIDE 16 /* numbers of a vector */
#define TALL 8 /* lines of a product that are summed at a time, two vectors of each */
#else
#define WIDE 8
#define TALL 4
#endif

#ifdef __AVX512BF16__
const long with_pairs = 1;
#else
const long with_pairs = 0; /* the compiler does not know them, or was told to do without */
#endif

typedef float vector __attribute__((vector_size(WIDE * sizeof(float)), aligned(sizeof(float)), may_alias));
typedef uint32_t word __attribute__((may_alias));

static inline long up_to(long n, long whole) { return (n + whole - 1) / whole * whole; }

static inline __attribute__((always_inline)) vector multiplied(int pairs, word a, const word *b, vector sum) {
#ifdef __AVX512BF16__
    if (pairs) return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)_mm512_loadu_si512(b));
#endif
    return sum + as_float(a) * *(const vector *)b;
}

/* The same with as many words of a as of b. */
static inline __attribute__((always_inline)) vector multiplied_each(int pairs, const word *a, const word *b, vector sum) {
#ifdef __AVX512BF16__
    if (pairs) return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(a), (__m512bh)_mm512_loadu_si512(b));
#endif
    return sum + *(const vector *)a * *(const vector *)b;
}

/* c (TALL, two vectors) = a b, or c + a b where there is `more`, over `depth` words: word (i, p) of a lies at i * down + p * along,
   lines of b are `b_line`, of c `c_line` apart. */
static inline __attribute__((always_inline)) void tile_of(int pairs, long depth, const word *a, long down, long along,
                                                          const word *b, long b_line, float *c, long c_line, int more) {
    vector sums[TALL][2];
#pragma GCC unroll 8
    for (int r = 0; r < TALL; r++)
        for (int half = 0; half < 2; half++) sums[r][half] = more ? *(vector *)(c + r * c_line + half * WIDE) : (vector){0};
    for (long p = 0; p < depth; p++, b += b_line)
#pragma GCC unroll 8
        for (int r = 0; r < TALL; r++)
            for (int half = 0; half < 2; half++)
                sums[r][half] = multiplied(pairs, a[r * down + p * along], b + half * WIDE, sums[r][half]);
#pragma GCC unroll 8
    for (int r = 0; r < TALL; r++)
        for (int half = 0; half < 2; half++) *(vector *)(c + r * c_line + half * WIDE) = sums[r][half];
}

/* Two vectors to `at` and what follows, as float32 or, of pairs, rounded. */
static inline __attribute__((always_inline)) void store_two(int pairs, const vector x[2], void *to, long at) {
#ifdef __AVX512BF16__
    if (pairs) {
        _mm512_storeu_si512((uint16_t *)to + at, (__m512i)_mm512_cvtne2ps_pbh((__m512)x[1], (__m512)x[0]));
        return;
    }
#endif
    (void)pairs;
    for (int half = 0; half < 2; half++) *(vector *)((float *)to + at + half * WIDE) = x[half];
}

/* A block of WIDE lines, `line` words apart, of WIDE words each: they become columns of lines that are `down` apart. */
#ifdef __AVX512F__
static void turned_block(const word *from, long line, word *to, long down) {
    __m512i a[16], b[16]; /* 2, 4, 8, then 16 lines are woven into each other */
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(from + i * line);
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        int at = i / 4 * 4 + i / 2 % 2;
        a[i] = _mm512_unpacklo_epi64(b[at], b[at + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[at], b[at + 2]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512(to + i * down, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        _mm512_storeu_si512(to + (i + 8) * down, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
    }
}
#else
static void turned_block(const word *from, long line, word *to, long down) {
    for (long i = 0; i < WIDE; i++)
        for (long r = 0; r < WIDE; r++) to[r * down + i] = from[i * line + r];
}
#endif

/* Words of numbers, rounded, and those below them. */
static inline void weave(const float *upper, const float *lower, long n, word *to) {
    long i = 0;
#ifdef __AVX512BF16__
    for (; i + WIDE <= n; i += WIDE) {
        __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(upper + i)));
        __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(lower + i)));
        _mm512_storeu_si512(to + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
#endif
    for (; i < n; i++) to[i] = to_bf16(upper[i]) | (word)to_bf16(lower[i]) << 16;
}
