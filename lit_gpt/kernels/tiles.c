/* Some tokens times a weight in bfloat16, for CPUs with matrix tiles (Intel's AMX); compiled on first use, see __init__.py.

   A library for matrices lays each weight out for its tiles first, which takes longer than multiplying a few tokens. Here
   rows of the weight are loaded into tiles as they are stored, and the tokens, which are few, are laid out for them. */

#include <stdlib.h>

#include "block.h"
#include "rows.c"

#define TARGET __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512bf16")))
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
TARGET static void times_tiles(long m, long n, long k, const uint32_t *tiles, const uint16_t *w, uint16_t *y, long threads) {
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

static void add(long count, const uint16_t *x, const uint16_t *more, uint16_t *y) {
    for (long at = 0; at < count; at += PIECE) {
        long n = count - at < PIECE ? count - at : PIECE;
        float a[PIECE], b[PIECE];
        load(a, x, 1, at, n);
        load(b, more, 1, at, n);
        for (long i = 0; i < n; i++) a[i] += b[i];
        store(y, 1, at, a, n);
    }
}

typedef struct { /* room for one layer after the other */
    uint32_t *tiles, *low_tiles;
    uint16_t *low, *update;
} Room;

/* y (m, n) = x (m, k) W^T of x in tiles, and its update if there is one. */
static void layer(const Weight *w, long m, const Room *room, uint16_t *y, long threads) {
    times_tiles(m, w->n, w->k, room->tiles, w->numbers, y, threads);
    if (!w->rank) return;
    times_tiles(m, w->rank, w->k, room->tiles, w->a, room->low, threads);
    in_tiles(m, w->rank, room->low, room->low_tiles, threads);
    times_tiles(m, w->n, w->rank, room->low_tiles, w->b, room->update, threads);
    add(m * w->n, y, room->update, y);
}

static inline long most(long a, long b) { return a > b ? a : b; }

/* y (m, q.k) is x (m, q.k) after the block: a token for each of m sequences, whose key and value are stored at its `place`
   (m) of keys and values (m, groups, capacity, size). cos and sin (m, n) are their angles. Without updates the
   numbers are those of the operators one by one. Returns 0, or 1 if there is no memory. */
int tiles_block(const Block *b, long m, const uint16_t *x, const uint16_t *cos, const uint16_t *sin, long n,
                uint16_t *keys, uint16_t *values, long capacity, const int64_t *place, uint16_t *y, long threads) {
    long width = b->q.k, wide = b->q.n, narrow = b->k.n, inner = b->gate.n, size = b->size;
    long widest = most(most(width, wide), inner), rank = most(most(b->q.rank, b->k.rank), most(b->v.rank, b->proj.rank));
    rank = most(rank, most(b->down.rank, most(b->gate.rank, b->up.rank)));
    long in_all = 2 * width + wide + 2 * narrow + 2 * inner + rank + (rank ? widest : 0);
    Room room = {malloc(room_of_tiles(m, widest) + room_of_tiles(m, rank) + m * in_all * sizeof(uint16_t))};
    if (!room.tiles) return 1;
    room.low_tiles = room.tiles + room_of_tiles(m, widest) / sizeof(uint32_t);
    room.low = (uint16_t *)(room.low_tiles + room_of_tiles(m, rank) / sizeof(uint32_t));
    uint16_t *state = room.low + m * rank, *part = state + m * width, *q = part + m * width, *k = q + m * wide;
    uint16_t *v = k + m * narrow, *gate = v + m * narrow, *up = gate + m * inner;
    room.update = up + m * inner;

    rms_norm(m, width, x, 1, b->norm_1, 1, b->eps, part, 1, NULL, threads);
    in_tiles(m, width, part, room.tiles, threads);
    layer(&b->q, m, &room, q, threads);
    layer(&b->k, m, &room, k, threads);
    layer(&b->v, m, &room, v, threads);
    rotate(m, b->heads, size, n, m, q, cos, sin, 1, q, 1, threads);
    rotate(m, b->groups, size, n, m, k, cos, sin, 1, k, 1, threads);
    for (long row = 0; row < m * b->groups; row++) {
        long to = (row * capacity + place[row / b->groups]) * size;
        memcpy(keys + to, k + row * size, size * sizeof(uint16_t));
        memcpy(values + to, v + row * size, size * sizeof(uint16_t));
    }
    attend_one(m, b->heads, b->groups, size, capacity, capacity, b->scale, q, keys, values, place, q, 1, threads);
    in_tiles(m, wide, q, room.tiles, threads);
    layer(&b->proj, m, &room, part, threads);
    add(m * width, x, part, state);
    rms_norm(m, width, state, 1, b->norm_2, 1, b->eps, part, 1, NULL, threads);
    in_tiles(m, width, part, room.tiles, threads);
    layer(&b->gate, m, &room, gate, threads);
    layer(&b->up, m, &room, up, threads);
    gated_silu(m * inner, gate, up, gate, 1, threads);
    in_tiles(m, inner, gate, room.tiles, threads);
    layer(&b->down, m, &room, part, threads);
    add(m * width, state, part, y);
    free(room.tiles);
    return 0;
}
