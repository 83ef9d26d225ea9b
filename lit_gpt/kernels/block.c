/* Cached tokens through a whole block of Llama's kind, since starting two dozen operators costs as much as reading a small
   model's weights does. For CPUs with AVX2 or AVX512-BF16; compiled on first use, see __init__.py. */

#include "few_tokens.c"
#include "rows.c"
#include "tiles.c"

typedef struct {  /* a weight (n, k): bfloat16, or as for `few_tokens_4bit` where there are scales */
    long n, k, block;
    const void *numbers;
    const float *scales;
    const uint16_t *levels;
    long rank;             /* of an update b a beside it, a multiple of 32, or 0 if there is none */
    const uint16_t *a, *b; /* (rank, k), (n, rank), the scaling within */
} Weight;

typedef struct {
    Weight q, k, v, proj, gate, up, down;
    const uint16_t *norm_1, *norm_2;  /* (q.k) */
    float eps, scale;
    long heads, groups, size;
} Block;

/* One token. */

static inline float weight_dot(const Weight *w, long r, const uint16_t *x) {  /* x as `arranged` */
    if (!w->scales) return dot(w->k, (const uint16_t *)w->numbers + r * w->k, x);
    float out;
    Levels table = levels_in(w->levels);
    row(1, w->k, w->block, x, (const uint8_t *)w->numbers + r * (w->k / 2), w->scales + r * (w->k / w->block), table, &out);
    return out;
}

/* Number r of W x, plus the update's from low = A x if there is one. */
static inline uint16_t result(const Weight *w, long r, const uint16_t *x, const uint16_t *low) {
    uint16_t y = to_bf16(weight_dot(w, r, x));
    return w->rank ? to_bf16(from_bf16(y) + dot(w->rank, w->b + r * w->rank, low)) : y;
}

/* low = A x of a weight's update, shared out to threads that do not wait for one another; x as it is. */
static void lowered(const Weight *w, const uint16_t *x, uint16_t *low) {
#pragma omp for schedule(static) nowait
    for (long r = 0; r < w->rank; r++) low[r] = to_bf16(dot(w->k, w->a + r * w->k, x));
}

static void arranged(const Weight *w, uint16_t *x) {  /* in place, as products with w take it */
    if (!w->scales) return;
    uint16_t copy[w->k];
    memcpy(copy, x, sizeof copy);
    even_first(1, w->k, copy, x);
}

static void normed(long n, const uint16_t *x, const uint16_t *weight, float eps, uint16_t *y) {
    float sum = 0;
    for (long i = 0; i < n; i++) sum += from_bf16(x[i]) * from_bf16(x[i]);
    float scale = 1 / sqrtf(sum / n + eps);
    for (long i = 0; i < n; i++) y[i] = to_bf16(from_bf16(x[i]) * scale * from_bf16(weight[i]));
}

/* Turn the first n numbers of a head, whose angles are the same in both halves. */
static void turned(long n, const uint16_t *cos, const uint16_t *sin, uint16_t *x) {
    for (long i = 0, half = n / 2; i < half; i++) {
        float a = from_bf16(x[i]), b = from_bf16(x[half + i]);
        x[i] = to_bf16(a * from_bf16(cos[i]) + b * from_bf16(sin[i]));
        x[half + i] = to_bf16(b * from_bf16(cos[half + i]) + a * from_bf16(sin[half + i]));
    }
}

/* y (size) = softmax(scale * keys q) values, of `seen` keys and values (seen, size). */
static void attended(long seen, long size, float scale, const uint16_t *q, const uint16_t *keys, const uint16_t *values,
                     uint16_t *y) {
    float weights[seen], sums[size], most = -INFINITY, total = 0;
    for (long s = 0; s < seen; s++) {
        weights[s] = dot(size, keys + s * size, q) * scale;
        most = weights[s] > most ? weights[s] : most;
    }
    for (long s = 0; s < seen; s++) total += weights[s] = expf(weights[s] - most);
    memset(sums, 0, sizeof sums);
    for (long s = 0; s < seen; s++)
        for (long i = 0; i < size; i++) sums[i] += weights[s] * from_bf16(values[s * size + i]);
    for (long i = 0; i < size; i++) y[i] = to_bf16(sums[i] / total);
}

/* y (q.k) is x (q.k) after the block; the token's key and value are stored at `position` of keys and values
   (groups, capacity, size). cos and sin (n) are its angles. */
void one_token_block(const Block *b, const uint16_t *x, const uint16_t *cos, const uint16_t *sin, long n, uint16_t *keys,
                     uint16_t *values, long capacity, long position, uint16_t *y, long threads) {
    long width = b->q.k, size = b->size, inner = b->gate.n, per_group = b->heads / b->groups;
    uint16_t q[b->q.n], heads[b->q.n], middle[width], hidden[inner];
    /* One more than there are: an array has to have some. */
    uint16_t low_q[b->q.rank + 1], low_k[b->k.rank + 1], low_v[b->v.rank + 1], low_proj[b->proj.rank + 1];
    uint16_t low_gate[b->gate.rank + 1], low_up[b->up.rank + 1], low_down[b->down.rank + 1];
#pragma omp parallel num_threads(threads)
    {
        uint16_t in[width];
        normed(width, x, b->norm_1, b->eps, in);
        lowered(&b->q, in, low_q);
        lowered(&b->k, in, low_k);
        lowered(&b->v, in, low_v);
        arranged(&b->q, in);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long r = 0; r < b->q.n + 2 * b->k.n; r++) {
            long key = r - b->q.n, value = key - b->k.n;
            if (key < 0) q[r] = result(&b->q, r, in, low_q);
            else if (value < 0)
                keys[(key / size * capacity + position) * size + key % size] = result(&b->k, key, in, low_k);
            else values[(value / size * capacity + position) * size + value % size] = result(&b->v, value, in, low_v);
        }
#pragma omp for schedule(static)
        for (long group = 0; group < b->groups; group++) turned(n, cos, sin, keys + (group * capacity + position) * size);
#pragma omp for schedule(static)
        for (long head = 0; head < b->heads; head++) {
            long group = head / per_group * capacity * size;
            turned(n, cos, sin, q + head * size);
            attended(position + 1, size, b->scale, q + head * size, keys + group, values + group, heads + head * size);
        }
        lowered(&b->proj, heads, low_proj);
#pragma omp barrier
#pragma omp single
        arranged(&b->proj, heads);
#pragma omp for schedule(static)
        for (long r = 0; r < width; r++)
            middle[r] = to_bf16(from_bf16(x[r]) + from_bf16(result(&b->proj, r, heads, low_proj)));
        normed(width, middle, b->norm_2, b->eps, in);
        lowered(&b->gate, in, low_gate);
        lowered(&b->up, in, low_up);
        arranged(&b->gate, in);
#pragma omp barrier
#pragma omp for schedule(static)
        for (long r = 0; r < inner; r++) {
            float gate = from_bf16(result(&b->gate, r, in, low_gate));
            hidden[r] = to_bf16(gate / (1 + expf(-gate)) * from_bf16(result(&b->up, r, in, low_up)));
        }
        lowered(&b->down, hidden, low_down);
#pragma omp barrier
#pragma omp single
        arranged(&b->down, hidden);
#pragma omp for schedule(static)
        for (long r = 0; r < width; r++)
            y[r] = to_bf16(from_bf16(middle[r]) + from_bf16(result(&b->down, r, hidden, low_down)));
    }
}

/* A token for each of some sequences. */

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

typedef struct { /* what the layers that read one x share */
    const uint16_t *x;
    uint32_t *tiles, *low_tiles; /* x, and low, laid out for tiles, where there are any */
    uint16_t *low, *update;
    long m, threads;
    int tiled;
} Reading;

static void reads(Reading *reading, long k, const uint16_t *x) {
    reading->x = x;
    if (reading->tiled) in_tiles(reading->m, k, x, reading->tiles, reading->threads);
}

/* y (m, n) = x W^T; W (n, k). */
static int times(const Reading *reading, long n, long k, const uint16_t *x, const uint32_t *tiles, const uint16_t *w, uint16_t *y) {
    int failed = 0;
    if (reading->tiled) times_tiles(reading->m, n, k, tiles, w, y, reading->threads);
    else for (long t = 0, m; t < reading->m; t += m) {
        m = reading->m - t < FOUR ? reading->m - t : FOUR;
        failed |= few_tokens_bf16(m, n, k, x + t * k, w, y + t * n, reading->threads);
    }
    return failed;
}

/* y (m, n): the layer of the x that is read, and its update if there is one. Returns 0, or 1 if there is no memory. */
static int layer(const Weight *w, const Reading *reading, uint16_t *y) {
    int failed = 0;
    if (!w->scales) failed = times(reading, w->n, w->k, reading->x, reading->tiles, w->numbers, y);
    else for (long t = 0, m; t < reading->m; t += m) {
        m = reading->m - t < MOST ? reading->m - t : MOST;
        failed |= few_tokens_4bit(m, w->n, w->k, w->block, reading->x + t * w->k, w->numbers, w->scales, w->levels,
                                  y + t * w->n, reading->threads);
    }
    if (!w->rank) return failed;
    failed |= times(reading, w->rank, w->k, reading->x, reading->tiles, w->a, reading->low);
    if (reading->tiled) in_tiles(reading->m, w->rank, reading->low, reading->low_tiles, reading->threads);
    failed |= times(reading, w->n, w->rank, reading->low, reading->low_tiles, w->b, reading->update);
    add(reading->m * w->n, y, reading->update, y);
    return failed;
}

static inline long larger(long a, long b) { return a > b ? a : b; }

/* y (m, q.k) is x (m, q.k) after the block: a token for each of m sequences, whose key and value are stored at its `place`
   (m) of keys and values (m, groups, capacity, size). cos and sin (m, n) are their angles. In tiles and without
   updates the numbers are those of the operators one by one. Returns 0, or 1 if there is no memory. */
int tokens_block(const Block *b, long m, const uint16_t *x, const uint16_t *cos, const uint16_t *sin, long n,
                 uint16_t *keys, uint16_t *values, long capacity, const int64_t *place, uint16_t *y, int tiled, long threads) {
    long width = b->q.k, wide = b->q.n, narrow = b->k.n, inner = b->gate.n, size = b->size;
    long widest = larger(larger(width, wide), inner), rank = larger(larger(b->q.rank, b->k.rank), larger(b->v.rank, b->proj.rank));
    rank = larger(rank, larger(b->down.rank, larger(b->gate.rank, b->up.rank)));
    long in_all = 2 * width + wide + 2 * narrow + 2 * inner + rank + (rank ? widest : 0);
    Reading in = {.m = m, .threads = threads, .tiled = tiled};
    in.tiles = malloc(room_of_tiles(m, widest) + room_of_tiles(m, rank) + m * in_all * sizeof(uint16_t));
    if (!in.tiles) return 1;
    in.low_tiles = in.tiles + room_of_tiles(m, widest) / sizeof(uint32_t);
    in.low = (uint16_t *)(in.low_tiles + room_of_tiles(m, rank) / sizeof(uint32_t));
    uint16_t *state = in.low + m * rank, *part = state + m * width, *q = part + m * width, *k = q + m * wide;
    uint16_t *v = k + m * narrow, *gate = v + m * narrow, *up = gate + m * inner;
    in.update = up + m * inner;

    rms_norm(m, width, x, 1, b->norm_1, 1, b->eps, part, 1, NULL, threads);
    reads(&in, width, part);
    int failed = layer(&b->q, &in, q) | layer(&b->k, &in, k) | layer(&b->v, &in, v);
    rotate(m, b->heads, size, n, m, q, cos, sin, 1, q, 1, threads);
    rotate(m, b->groups, size, n, m, k, cos, sin, 1, k, 1, threads);
    for (long row = 0; row < m * b->groups; row++) {
        long to = (row * capacity + place[row / b->groups]) * size;
        memcpy(keys + to, k + row * size, size * sizeof(uint16_t));
        memcpy(values + to, v + row * size, size * sizeof(uint16_t));
    }
    attend_one(m, b->heads, b->groups, size, capacity, capacity, b->scale, q, keys, values, place, q, 1, threads);
    reads(&in, wide, q);
    failed |= layer(&b->proj, &in, part);
    add(m * width, x, part, state);
    rms_norm(m, width, state, 1, b->norm_2, 1, b->eps, part, 1, NULL, threads);
    reads(&in, width, part);
    failed |= layer(&b->gate, &in, gate) | layer(&b->up, &in, up);
    gated_silu(m * inner, gate, up, gate, 1, threads);
    reads(&in, inner, gate);
    failed |= layer(&b->down, &in, part);
    add(m * width, state, part, y);
    free(in.tiles);
    return failed;
}
