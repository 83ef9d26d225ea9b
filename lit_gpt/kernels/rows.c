/* Element-wise work of a training step in one pass over memory each; compiled on first use, see __init__.py.

   Rows lie end to end. Numbers are float32 or bfloat16 (`bf16` 0 or 1), are computed with in float32 and rounded once.
   Every row is one thread's from beginning to end, so that results do not depend on the number of threads. Plain loops:
   the compiler makes vectors of them for whatever processor it is told. */

#include "numbers.h"

#define SMALL 16384 /* numbers that are not worth a second thread */

/* y = x / rms(x) * w; `scale` (rows) gets 1 / rms(x) unless it is null. */
void rms_norm(long rows, long n, const void *x, long x_bf16, const void *w, long w_bf16, float eps, void *y, long y_bf16,
              float *scale, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > SMALL)
    for (long row = 0; row < rows; row++) {
        float a[n], b[n], sum = 0;
        load(a, x, x_bf16, row * n, n);
        load(b, w, w_bf16, 0, n);
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < n; i++) sum += a[i] * a[i];
        float s = 1.0f / sqrtf(sum / n + eps);
        if (scale) scale[row] = s;
        for (long i = 0; i < n; i++) a[i] *= s * b[i];
        store(y, y_bf16, row * n, a, n);
    }
}

void rms_norm_backward(long rows, long n, const void *grad, long grad_bf16, const void *x, long x_bf16, const void *w,
                       long w_bf16, const float *scale, void *dx, long threads) { /* dx is of x's kind */
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > SMALL)
    for (long row = 0; row < rows; row++) {
        float a[n], b[n], g[n], sum = 0, s = scale[row];
        load(a, x, x_bf16, row * n, n);
        load(b, w, w_bf16, 0, n);
        load(g, grad, grad_bf16, row * n, n);
        for (long i = 0; i < n; i++) g[i] *= b[i];
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < n; i++) sum += g[i] * a[i];
        float share = sum * s * s * s / n;
        for (long i = 0; i < n; i++) g[i] = g[i] * s - a[i] * share;
        store(dx, x_bf16, row * n, g, n);
    }
}

/* y = x + scale * z, of x's kind */
void add_scaled(long count, const void *x, long x_bf16, const void *z, long z_bf16, float scale, void *y, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count > SMALL)
    for (long at = 0; at < count; at += PIECE) {
        long n = count - at < PIECE ? count - at : PIECE;
        float a[PIECE], b[PIECE];
        load(a, x, x_bf16, at, n);
        load(b, z, z_bf16, at, n);
        for (long i = 0; i < n; i++) a[i] += scale * b[i];
        store(y, x_bf16, at, a, n);
    }
}

/* y = silu(gate) * up */
void gated_silu(long count, const void *gate, const void *up, void *y, long bf16, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count > SMALL)
    for (long at = 0; at < count; at += PIECE) {
        long n = count - at < PIECE ? count - at : PIECE;
        float a[PIECE], b[PIECE];
        load(a, gate, bf16, at, n);
        load(b, up, bf16, at, n);
        for (long i = 0; i < n; i++) a[i] = a[i] / (1.0f + clamped_exp(-a[i])) * b[i];
        store(y, bf16, at, a, n);
    }
}

void gated_silu_backward(long count, const void *grad, const void *gate, const void *up, void *d_gate, void *d_up,
                         long bf16, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count > SMALL)
    for (long at = 0; at < count; at += PIECE) {
        long n = count - at < PIECE ? count - at : PIECE;
        float g[PIECE], a[PIECE], b[PIECE];
        load(g, grad, bf16, at, n);
        load(a, gate, bf16, at, n);
        load(b, up, bf16, at, n);
        for (long i = 0; i < n; i++) {
            float s = 1.0f / (1.0f + clamped_exp(-a[i]));
            b[i] *= g[i] * s * (1.0f + a[i] * (1.0f - s));
            a[i] *= g[i] * s;
        }
        store(d_gate, bf16, at, b, n);
        store(d_up, bf16, at, a, n);
    }
}

static inline __attribute__((always_inline)) void rotate_head(long size, long n, const void *x, const float *c, const float *s,
                                                              void *y, long bf16, long at) {
    float a[size], b[size];
    long half = n / 2;
    load(a, x, bf16, at, size);
    for (long i = 0; i < half; i++) b[i] = a[i] * c[i] + a[half + i] * s[i];
    for (long i = 0; i < half; i++) b[half + i] = a[half + i] * c[half + i] + a[i] * s[half + i];
    for (long i = n; i < size; i++) b[i] = a[i];
    store(y, bf16, at, b, size);
}

/* Turns the first n of the `size` numbers of each head by the angles of its token; x, y (tokens, heads, size), cos, sin
   (angles, n) of x's kind, which repeat where there are more tokens. `sign` -1 turns back. */
void rotate(long tokens, long heads, long size, long n, long angles, const void *x, const void *cos, const void *sin,
            float sign, void *y, long bf16, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * heads * size > SMALL)
    for (long token = 0; token < tokens; token++) {
        float c[n], s[n];
        load(c, cos, bf16, token % angles * n, n);
        load(s, sin, bf16, token % angles * n, n);
        for (long i = 0; i < n; i++) s[i] *= sign;
        for (long at = token * heads * size; at < (token + 1) * heads * size; at += size)
            if (size == 64 && n == 64) /* the compiler lays out loops of known lengths */
                rotate_head(64, 64, x, c, s, y, bf16, at);
            else if (size == 128 && n == 128)
                rotate_head(128, 128, x, c, s, y, bf16, at);
            else
                rotate_head(size, n, x, c, s, y, bf16, at);
    }
}

/* A number is kept where its random bits are at least `threshold`. y may be x. */
void dropout(long count, const void *x, void *y, long bf16, const int64_t *seed, long threshold, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (count > SMALL)
    for (long at = 0; at < count; at += PIECE) {
        long n = count - at < PIECE ? count - at : PIECE;
        int16_t bits[PIECE];
        random_bits((uint64_t)*seed, at, PIECE, bits);
        if (bf16) {
            const uint16_t *from = (const uint16_t *)x + at;
            uint16_t *to = (uint16_t *)y + at;
            for (long i = 0; i < n; i++) to[i] = bits[i] >= threshold ? from[i] : 0;
        } else {
            const float *from = (const float *)x + at;
            float *to = (float *)y + at;
            for (long i = 0; i < n; i++) to[i] = bits[i] >= threshold ? from[i] : 0;
        }
    }
}

static inline void softmax(float *a, long n) { /* in place */
    float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
    for (long i = 0; i < n; i++) most = a[i] > most ? a[i] : most;
    for (long i = 0; i < n; i++) a[i] = clamped_exp(a[i] - most);
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += a[i];
    for (long i = 0; i < n; i++) a[i] *= 1.0f / sum;
}

/* In place: the softmax of scale * scores (rows, keys), where the row-th query, counted modulo `queries`, sees the keys up
   to place `start` + its own; 0 for the others. */
void causal_softmax(long rows, long keys, long queries, long start, float scale, void *scores, long bf16, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * keys > SMALL)
    for (long row = 0; row < rows; row++) {
        long seen = start + row % queries + 1;
        float a[keys];
        load(a, scores, bf16, row * keys, seen);
        for (long i = 0; i < seen; i++) a[i] *= scale;
        softmax(a, seen);
        for (long i = seen; i < keys; i++) a[i] = 0;
        store(scores, bf16, row * keys, a, keys);
    }
}

/* In place: `grad` with respect to the weights becomes that with respect to the scores. */
void causal_softmax_backward(long rows, long keys, long queries, long start, float scale, const void *weights, void *grad,
                             long bf16, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * keys > SMALL)
    for (long row = 0; row < rows; row++) {
        long seen = start + row % queries + 1;
        float w[keys], g[keys], sum = 0;
        load(w, weights, bf16, row * keys, seen);
        load(g, grad, bf16, row * keys, seen);
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < seen; i++) sum += w[i] * g[i];
        for (long i = 0; i < seen; i++) g[i] = (g[i] - sum) * w[i] * scale;
        for (long i = seen; i < keys; i++) g[i] = 0;
        store(grad, bf16, row * keys, g, keys);
    }
}

/* y (batch, heads, size): attention of one query for each of a batch, q (batch, heads, size), on keys and values
   (batch, groups, capacity, size), of which it sees those at the `window` places up to `place` (batch). */
void attend_one(long batch, long heads, long groups, long size, long capacity, long window, float scale, const void *q,
                const void *keys, const void *values, const int64_t *place, void *y, long bf16, long threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (batch * heads * size > SMALL / 16)
    for (long row = 0; row < batch * groups; row++) { /* the heads of a group, which share keys and values */
        long last = place[row / groups], first = last + 1 > window ? last + 1 - window : 0, seen = last + 1 - first;
        long n = heads / groups, begin = row * capacity + first;
        float a[n * size], b[size], weights[n * seen];
        load(a, q, bf16, row * n * size, n * size);
        for (long s = 0; s < seen; s++) {
            load(b, keys, bf16, (begin + s) * size, size);
            for (long head = 0; head < n; head++) {
                float dot = 0;
#pragma omp simd reduction(+ : dot)
                for (long i = 0; i < size; i++) dot += a[head * size + i] * b[i];
                weights[head * seen + s] = dot * scale;
            }
        }
        for (long head = 0; head < n; head++) softmax(weights + head * seen, seen);
        memset(a, 0, sizeof a);
        for (long s = 0; s < seen; s++) {
            load(b, values, bf16, (begin + s) * size, size);
            for (long head = 0; head < n; head++)
                for (long i = 0; i < size; i++) a[head * size + i] += weights[head * seen + s] * b[i];
        }
        store(y, bf16, row * n * size, a, n * size);
    }
}

/* losses (rows): of each row of logits (rows, n), the cross entropy with its label. Where `grad` is not null it gets the
   gradient; it may be the logits. */
void cross_entropy(long rows, long n, const void *logits, long bf16, const int64_t *labels, float *losses, void *grad,
                   long threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > SMALL)
    for (long row = 0; row < rows; row++) {
        float a[PIECE], most = -INFINITY, wanted, label_grad;
        double total = 0;
        for (long at = 0; at < n; at += PIECE) {
            long m = n - at < PIECE ? n - at : PIECE;
            load(a, logits, bf16, row * n + at, m);
#pragma omp simd reduction(max : most)
            for (long i = 0; i < m; i++) most = a[i] > most ? a[i] : most;
        }
        for (long at = 0; at < n; at += PIECE) {
            long m = n - at < PIECE ? n - at : PIECE;
            float sum = 0;
            load(a, logits, bf16, row * n + at, m);
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < m; i++) sum += clamped_exp(a[i] - most);
            total += sum;
        }
        if (labels[row] < 0 || labels[row] >= n) { /* a caller's mistake, that must not go unseen */
            losses[row] = NAN;
            for (long i = 0; grad && i < n; i++) store(grad, bf16, row * n + i, &losses[row], 1);
            continue;
        }
        load(&wanted, logits, bf16, row * n + labels[row], 1);
        losses[row] = (float)log(total) - (wanted - most);
        if (!grad) continue;
        float share = (float)(1.0 / total);
        for (long at = 0; at < n; at += PIECE) {
            long m = n - at < PIECE ? n - at : PIECE;
            load(a, logits, bf16, row * n + at, m);
            for (long i = 0; i < m; i++) a[i] = clamped_exp(a[i] - most) * share;
            store(grad, bf16, row * n + at, a, m);
        }
        label_grad = clamped_exp(wanted - most) * share - 1.0f;
        store(grad, bf16, row * n + labels[row], &label_grad, 1);
    }
}
