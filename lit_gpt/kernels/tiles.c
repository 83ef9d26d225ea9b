/* Some tokens times a weight in bfloat16, for CPUs with matrix tiles (Intel's AMX); compiled on first use, see __init__.py.

   A library for matrices lays each weight out for its tiles first, which takes longer than multiplying a few tokens. Here
   rows of the weight are loaded into tiles as they are stored, and the tokens, which are few, are laid out for them. */

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define WITH_TILES __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16")))
#define SIDE 16 /* rows of a tile, and its 32-bit numbers across */
#define DEEP 32 /* its bfloat16 numbers across */

static const struct {
    uint8_t palette, start, reserved[14];
    uint16_t bytes_across[16];
    uint8_t rows[16];
} SHAPES = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

/* The tokens x (m, k) in tiles of 16 and 32 numbers: pairs of neighbours (16), tokens (16), 2; two tiles of tokens at least. */
static long room_of_tiles(long m, long k) { return (m + 2 * SIDE - 1) / (2 * SIDE) * 2 * SIDE * k * sizeof(uint16_t); }

static void in_tiles(long m, long k, const uint16_t *x, uint32_t *tiles, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long at = 0; at < k; at += DEEP)
        for (long t = 0; t < m; t++)
            for (long i = 0; i < DEEP; i += 2)
                memcpy(tiles + (t / SIDE * (k / 2) + (at + i) / 2) * SIDE + t % SIDE, x + t * k + at + i, 4);
}

/* y (m, n) = x (m, k) W^T, of x in tiles, whose tokens beyond m may be anything; W (n, k). */
WITH_TILES static void times_tiles(long m, long n, long k, const uint32_t *tiles, const uint16_t *w, uint16_t *y, long threads) {
    __m512i line = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    __m512i down = _mm512_mullo_epi32(line, _mm512_set1_epi32(SIDE));
#pragma omp parallel num_threads(threads)
    {
        float sums[2][2][SIDE][SIDE];
        _tile_loadconfig(&SHAPES);
#pragma omp for schedule(static)
        for (long r = 0; r < n; r += 2 * SIDE) {
            const uint16_t *upper = w + r * k, *lower = r + SIDE < n ? upper + SIDE * k : upper;
            for (long t = 0; t < m; t += 2 * SIDE) {
                const uint32_t *left = tiles + t * (k / 2), *right = left + SIDE * (k / 2);
                int wide = m - t > SIDE;
                _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
                for (long at = 0; at < k; at += DEEP) {
                    _tile_loadd(4, upper + at, k * sizeof(uint16_t));
                    _tile_loadd(5, lower + at, k * sizeof(uint16_t));
                    _tile_loadd(6, left + at / 2 * SIDE, 64);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(2, 5, 6);
                    if (!wide) continue;
                    _tile_loadd(7, right + at / 2 * SIDE, 64);
                    _tile_dpbf16ps(1, 4, 7);
                    _tile_dpbf16ps(3, 5, 7);
                }
                _tile_stored(0, sums[0][0], 64); _tile_stored(1, sums[0][1], 64);
                _tile_stored(2, sums[1][0], 64); _tile_stored(3, sums[1][1], 64);
                for (long i = 0; i < 2 * SIDE && t + i < m; i++)
                    for (long half = 0; half < 2 && r + half * SIDE < n; half++) {
                        __m512 column = _mm512_i32gather_ps(down, &sums[half][i / SIDE][0][i % SIDE], 4);
                        uint16_t *to = y + (t + i) * n + r + half * SIDE;
                        _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(column));
                    }
            }
        }
        _tile_release();
    }
}

/* y (m, n) = x (m, k) W^T; W (n, k), n a multiple of 16 and k of 32. Returns 0, or 1 if there is no memory. */
int tiles_bf16(long m, long n, long k, const uint16_t *x, const uint16_t *w, uint16_t *y, long threads) {
    uint32_t *tiles = malloc(room_of_tiles(m, k));
    if (!tiles) return 1;
    in_tiles(m, k, x, tiles, threads);
    times_tiles(m, n, k, tiles, w, y, threads);
    free(tiles);
    return 0;
}
