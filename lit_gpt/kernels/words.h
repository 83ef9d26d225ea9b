/* What products are made of: a number in float32 or, in `pairs`, two in bfloat16 that are summed over one after the other.

   Some processors multiply pairs twice as fast as float32, others half as fast: the caller says (`in_pairs`). */

#pragma once

#include "numbers.h"

#ifdef __AVX512F__
#define WIDE 16 /* numbers of a vector */
#else
#define WIDE 8
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
