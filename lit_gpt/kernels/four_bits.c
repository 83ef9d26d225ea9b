/* Weights to codes of 4 bits and back, in one pass over memory; compiled on first use, see __init__.py. */

#include "numbers.h"

#define BLOCK 64 /* numbers that share a scale */
#define LEVELS 16

/* Of each block the scale, its largest number, and its codes, two to a byte, the first in the high half. A code is `codes_of` the
   number of `bounds` (LEVELS - 1, rising) that lie below the number over the scale. */
void four_bits(long blocks, const void *weight, long bf16, const float *bounds, const uint8_t *codes_of, float *scales,
               uint8_t *codes, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long block = 0; block < blocks; block++) {
        float a[BLOCK], peak = 0;
        int32_t no_numbers = 0;
        uint8_t below[BLOCK];
        load(a, weight, bf16, block * BLOCK, BLOCK);
#pragma omp simd reduction(max : peak) reduction(+ : no_numbers)
        for (long i = 0; i < BLOCK; i++) {
            peak = fabsf(a[i]) > peak ? fabsf(a[i]) : peak;
            no_numbers += a[i] != a[i];
        }
        peak = scales[block] = no_numbers ? NAN : peak;
        float over = 1.0f / (peak < 1e-38f ? 1e-38f : peak);
        for (long i = 0; i < BLOCK; i++) {
            int32_t n = 0;
#pragma GCC unroll 15
            for (long j = 0; j < LEVELS - 1; j++) n += a[i] * over > bounds[j];
            below[i] = (uint8_t)n;
        }
        for (long i = 0; i < BLOCK; i += 2)
            codes[(block * BLOCK + i) / 2] = (uint8_t)(codes_of[below[i]] << 4 | codes_of[below[i + 1]]);
    }
}

/* The numbers of `count` codes: each code's level (LEVELS) times the scale of its `block` numbers. */
void dense(long count, long block, const uint8_t *codes, const float *levels, const float *scales, void *y, long bf16, long threads) {
    long blocks = (count + block - 1) / block;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long b = 0; b < blocks; b++)
        for (long at = b * block, end = at + block < count ? at + block : count; at < end; at += BLOCK) {
            float numbers[BLOCK];
            long n = end - at < BLOCK ? end - at : BLOCK, i = 0;
            const uint8_t *from = codes + at / 2; /* `block` is even */
#ifdef __AVX512F__
            const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
            __m512 table = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scales[b]));
            for (; i + 32 <= n; i += 32) {
                __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(from + i / 2)));
                __m512 first = _mm512_permutexvar_ps(_mm512_srli_epi32(pairs, 4), table);
                __m512 second = _mm512_permutexvar_ps(pairs, table); /* of a number's bits the lowest four tell */
                _mm512_storeu_ps(numbers + i, _mm512_permutex2var_ps(first, low, second));
                _mm512_storeu_ps(numbers + i + 16, _mm512_permutex2var_ps(first, high, second));
            }
#endif
            for (; i < n; i++) numbers[i] = levels[i % 2 ? from[i / 2] & 15 : from[i / 2] >> 4] * scales[b];
            store(y, bf16, at, numbers, n);
        }
}
