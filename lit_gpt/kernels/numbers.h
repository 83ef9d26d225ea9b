/* Numbers in float32 or bfloat16 (`bf16` 0 or 1), which are computed with in float32. */

#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#include <math.h>
#include <stdint.h>
#include <string.h>

#define PIECE 1024 /* numbers that are widened at a time: they stay in the nearest cache */

static inline float as_float(uint32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline uint32_t as_bits(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

static inline float from_bf16(uint16_t value) { return as_float((uint32_t)value << 16); }

static inline uint16_t to_bf16(float value) { /* to the nearest, ties to even */
    uint32_t bits = as_bits(value);
    return value == value ? (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) : 0x7fc0;
}

static inline void load(float *to, const void *from, long bf16, long at, long n) {
    if (bf16)
        for (long i = 0; i < n; i++) to[i] = from_bf16(((const uint16_t *)from)[at + i]);
    else
        memcpy(to, (const float *)from + at, n * sizeof(float));
}

static inline void store(void *to, long bf16, long at, const float *from, long n) {
    if (!bf16) {
        memcpy((float *)to + at, from, n * sizeof(float));
        return;
    }
    uint16_t *out = (uint16_t *)to + at;
    long i = 0;
#ifdef __AVX512BF16__ /* the same rounding in one instruction, but what is too small for normal numbers becomes 0 */
    for (; i + 16 <= n; i += 16) _mm256_storeu_si256((__m256i *)(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
#endif
    for (; i < n; i++) out[i] = to_bf16(from[i]);
}

static inline float clamped_exp(float x) { /* within 2 units in the last place for x in [-87, 88] */
    x = x < -87.0f ? -87.0f : x > 89.0f ? 89.0f : x; /* NaN stays NaN, and 89 becomes infinity */
    float k = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* the nearest whole number */
    float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;    /* x - k log 2, whose first part is exact */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * as_float((uint32_t)((int32_t)k + 127) << 23);
}

/* 16 bits for each of n numbers from `at` on, both multiples of 4: numbers 4 i to 4 i + 3 get those of the i-th state of
   splitmix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195). */
static inline void random_bits(uint64_t seed, long at, long n, int16_t *bits) {
    for (long i = 0; i < n / 4; i++) {
        uint64_t z = seed + (uint64_t)(at / 4 + i + 1) * 0x9e3779b97f4a7c15u;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        z ^= z >> 31;
        memcpy(bits + 4 * i, &z, sizeof z);
    }
}
