/* A block of Llama's kind, as the functions that take tokens through a whole one see it. */

#include <stdint.h>

typedef struct {  /* a weight (n, k): bfloat16, or as for `few_tokens_4bit` where there are scales */
    long n, k, block;
    const void *numbers;
    const float *scales;
    const uint16_t *levels;
} Weight;

typedef struct {
    Weight q, k, v, proj, gate, up, down;
    const uint16_t *norm_1, *norm_2;  /* (q.k) */
    float eps, scale;
    long heads, groups, size;
} Block;
