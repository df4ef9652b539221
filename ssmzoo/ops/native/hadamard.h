// x <- x T of one vector, T = kron(H_s, H_2^k)^T / sqrt(d), or its inverse: ssmzoo/layers/hadamard.py.
#pragma once
#include <stdint.h>
#include "vec.h"

enum { MOST_SPECIAL = 40 };

// special: H_s (s s), s <= MOST_SPECIAL divides d into a power of two
static __attribute__((unused)) void hadamard(float *x, int64_t d, const float *special, int64_t s, int inverse) {
    const int64_t r = d / s;
    const float scale = (float)(1 / sqrt((double)d));
    for (int64_t width = 1; width < r; width *= 2)  // no pair of blocks of `width` reaches over one of r
        for (int64_t at = 0; at < d; at += 2 * width)
            for (int64_t i = at; i < at + width; i++) {
                const float a = x[i], b = x[i + width];
                x[i] = a + b, x[i + width] = a - b;
            }
    for (int64_t c = 0; c < r; c += VL) {
        const int64_t left = r - c;
        vf line[MOST_SPECIAL];
        for (int64_t j = 0; j < s; j++) line[j] = v_load_some(x + j * r + c, left) * scale;
        for (int64_t i = 0; i < s; i++) {
            vf sum = {0};
            for (int64_t j = 0; j < s; j++) sum += special[inverse ? j * s + i : i * s + j] * line[j];
            v_store_some(x + i * r + c, sum, left);
        }
    }
}
