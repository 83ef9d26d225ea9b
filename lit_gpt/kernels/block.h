/* A block of Llama's kind, as the functions that take tokens through a whole one see it. */

#pragma once

#include <immintrin.h>

#include "numbers.h"

#define AHEAD 4096 /* bytes: the processor looks no further than a page; asked for in time, more arrives */

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
