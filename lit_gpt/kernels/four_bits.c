/* Weights to codes of 4 bits, in one pass over memory; compiled on first use, see __init__.py. */

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
