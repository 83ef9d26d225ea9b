/* AVX512 and, with WITH_BF16, its pairs of bfloat16 in plain C, as far as lit_gpt/kernels asks for them: what that computes
   there can then be tested on processors without (see `processor` in conftest.py). Sums too small to be normal stay. */

#pragma once

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef float floats16 __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint32_t words16 __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint16_t halves32 __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint64_t longs8 __attribute__((vector_size(64), aligned(1), may_alias));

static inline uint16_t bf16_of(float x) { /* to the nearest, ties to even; 0 for what is too small to be normal */
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    if (!(bits & 0x7f800000)) return (uint16_t)(bits >> 16 & 0x8000);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline float of_bf16(uint16_t x) {
    uint32_t bits = x & 0x7f80 ? (uint32_t)x << 16 : (uint32_t)(x & 0x8000) << 16;
    float number;
    memcpy(&number, &bits, 4);
    return number;
}

static inline __m512 paired_products(__m512 sums, __m512bh a, __m512bh b) { /* the upper of a pair first, as the processor does */
    floats16 out = (floats16)sums;
    halves32 x = (halves32)a, y = (halves32)b;
    for (int i = 0; i < 16; i++)
        out[i] = fmaf(of_bf16(x[2 * i]), of_bf16(y[2 * i]), fmaf(of_bf16(x[2 * i + 1]), of_bf16(y[2 * i + 1]), out[i]));
    return (__m512)out;
}
static inline __m256bh rounded(const __m512 *from) { /* its caller in tiles.c has registers that this has not */
    uint16_t out[16];
    for (int i = 0; i < 16; i++) out[i] = bf16_of(((floats16)*from)[i]);
    return (__m256bh)_mm256_loadu_si256((const __m256i *)out);
}
static inline __m512bh rounded_two(__m512 upper, __m512 lower) {
    halves32 out;
    for (int i = 0; i < 16; i++) out[i] = bf16_of(((floats16)lower)[i]), out[16 + i] = bf16_of(((floats16)upper)[i]);
    return (__m512bh)out;
}
static inline float sum_of(__m512 a) {
    floats16 x = (floats16)a;
    for (int n = 8; n; n /= 2)
        for (int i = 0; i < n; i++) x[i] += x[i + n];
    return x[0];
}
static inline __m512i widened_bytes(__m256i a) {
    halves32 out;
    for (int i = 0; i < 32; i++) out[i] = ((uint8_t *)&a)[i];
    return (__m512i)out;
}
static inline __m512i widened_few_bytes(__m128i a) {
    words16 out;
    for (int i = 0; i < 16; i++) out[i] = ((uint8_t *)&a)[i];
    return (__m512i)out;
}
static inline __m512i widened_halves(__m256i a) {
    words16 out;
    uint16_t halves[16];
    memcpy(halves, &a, sizeof a);
    for (int i = 0; i < 16; i++) out[i] = halves[i];
    return (__m512i)out;
}
static inline __m512i some_halves(uint32_t mask, const void *from) {
    halves32 out = {0};
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) out[i] = ((const uint16_t *)from)[i];
    return (__m512i)out;
}
static inline __m512i looked_up_halves(__m512i at, __m512i table) {
    halves32 out;
    for (int i = 0; i < 32; i++) out[i] = ((halves32)table)[((halves32)at)[i] & 31];
    return (__m512i)out;
}
static inline __m512 looked_up_floats(__m512i at, __m512 a, __m512 b, int mask) {
    floats16 out;
    for (int i = 0; i < 16; i++) {
        int j = ((words16)at)[i] & mask;
        out[i] = j < 16 ? ((floats16)a)[j] : ((floats16)b)[j - 16];
    }
    return (__m512)out;
}
static inline __m512i twice(__m256i a) {
    longs8 out;
    memcpy(&out, &a, 32), memcpy((char *)&out + 32, &a, 32);
    return (__m512i)out;
}
static inline __m512i unpacked(__m512i a, __m512i b, int size, int high) { /* within each 16 bytes */
    char out[64], *x = (char *)&a, *y = (char *)&b;
    for (int lane = 0; lane < 64; lane += 16)
        for (int i = 0; i < 8; i += size) {
            memcpy(out + lane + 2 * i, x + lane + 8 * high + i, size);
            memcpy(out + lane + 2 * i + size, y + lane + 8 * high + i, size);
        }
    __m512i result;
    memcpy(&result, out, 64);
    return result;
}
static inline __m512i shuffled(__m512i a, __m512i b, int how) {
    __m512i out;
    for (int i = 0; i < 4; i++) memcpy((char *)&out + 16 * i, (char *)(i < 2 ? &a : &b) + 16 * (how >> 2 * i & 3), 16);
    return out;
}
static inline __m512i loaded(const void *from) {
    __m512i out;
    memcpy(&out, from, 64);
    return out;
}
static inline void stored(void *to, __m512i a) { memcpy(to, &a, 64); }

#undef _mm512_setr_epi32
#define _mm512_dpbf16_ps paired_products
#define _mm512_cvtneps_pbh(a) rounded((__m512[]){a})
#define _mm512_cvtne2ps_pbh rounded_two
#define _mm512_reduce_add_ps sum_of
#define _mm512_cvtepu8_epi16 widened_bytes
#define _mm512_cvtepu8_epi32 widened_few_bytes
#define _mm512_cvtepu16_epi32 widened_halves
#define _mm512_maskz_loadu_epi16 some_halves
#define _mm512_permutexvar_epi16 looked_up_halves
#define _mm512_permutexvar_ps(at, a) looked_up_floats(at, a, a, 15)
#define _mm512_permutex2var_ps(a, at, b) looked_up_floats(at, a, b, 31)
#define _mm512_broadcast_i64x4 twice
#define _mm512_unpacklo_epi32(a, b) unpacked(a, b, 4, 0)
#define _mm512_unpackhi_epi32(a, b) unpacked(a, b, 4, 1)
#define _mm512_unpacklo_epi64(a, b) unpacked(a, b, 8, 0)
#define _mm512_unpackhi_epi64(a, b) unpacked(a, b, 8, 1)
#define _mm512_shuffle_i32x4 shuffled
#define _mm512_loadu_si512 loaded
#define _mm512_storeu_si512 stored
#define _mm512_loadu_ps(from) ((__m512)loaded(from))
#define _mm512_storeu_ps(to, a) stored(to, (__m512i)(a))
#define _mm512_set1_ps(x) ((__m512)((floats16){0} + (float)(x)))
#define _mm512_set1_epi32(x) ((__m512i)((words16){0} + (uint32_t)(x)))
#define _mm512_setr_epi32(...) ((__m512i)(words16){__VA_ARGS__})
#define _mm512_setzero_ps() ((__m512)(floats16){0})
#define _mm512_mul_ps(a, b) ((__m512)((floats16)(a) * (floats16)(b)))
#define _mm512_fmadd_ps(a, b, c) ((__m512)((floats16)(a) * (floats16)(b) + (floats16)(c)))
#define _mm512_add_epi32(a, b) ((__m512i)((words16)(a) + (words16)(b)))
#define _mm512_or_si512(a, b) ((__m512i)((longs8)(a) | (longs8)(b)))
#define _mm512_slli_epi32(a, n) ((__m512i)((words16)(a) << (n)))
#define _mm512_srli_epi32(a, n) ((__m512i)((words16)(a) >> (n)))
#define _mm512_srli_epi16(a, n) ((__m512i)((halves32)(a) >> (n)))

#define __AVX512F__ 1
#ifdef WITH_BF16
#define __AVX512BF16__ 1
#endif
