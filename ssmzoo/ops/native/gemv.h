// Matrix times vector and what else the steps of one token share, fp32 and contiguous.
#pragma once
#include "vec.h"

#define SHARED static __attribute__((unused))

// The sums of VL vectors as one vector.
INLINE vf v_sums(vf *x) {
    v_transpose(x);
    vf sum = x[0];
#pragma GCC unroll 16
    for (int i = 1; i < VL; i++) sum += x[i];
    return sum;
}

// VL rows of y = W x + bias at a time, so that additions do not wait for each other and sums over lanes are taken together.
INLINE void gemv_rows(float *y, const float *w, const float *x, const float *bias, int count, int64_t columns) {
    vf sum[VL];
    float rest[VL] = {0}, sums[VL];
#pragma GCC unroll 16
    for (int q = 0; q < VL; q++) sum[q] = (vf){0};
    int64_t i = 0;
    for (; i + VL <= columns; i += VL) {
        vf v = v_load(x + i);
#pragma GCC unroll 16
        for (int q = 0; q < VL; q++)
            if (q < count) sum[q] += v_load(w + q * columns + i) * v;
    }
    for (int q = 0; q < count; q++) {
        for (int64_t j = i; j < columns; j++) rest[q] += w[q * columns + j] * x[j];
        if (bias) rest[q] += bias[q];
    }
    v_store(sums, v_sums(sum) + v_load(rest));
    memcpy(y, sums, sizeof(float) * (size_t)count);
}

SHARED void gemv(float *y, const float *W, const float *x, const float *bias, int64_t rows, int64_t columns) {
    for (int64_t j = 0; j < rows; j += VL) {
        const float *w = W + j * columns, *b = bias ? bias + j : NULL;
        if (rows - j >= VL) gemv_rows(y + j, w, x, b, VL, columns);
        else gemv_rows(y + j, w, x, b, (int)(rows - j), columns);
    }
}

SHARED void silu(float *x, int64_t size) {
    int64_t i = 0;
    for (; i + VL <= size; i += VL) {
        vf v = v_load(x + i);
        v_store(x + i, v * v_sigmoid(v));
    }
    for (; i < size; i++) x[i] = x[i] / (1 + expf(-x[i]));
}

SHARED void softplus(float *x, int64_t size) {
    float tail[VL] = {0};
    for (int64_t i = 0; i < size; i += VL) {
        if (i + VL <= size) {
            v_store(x + i, v_softplus(v_load(x + i)));
        } else {
            memcpy(tail, x + i, (size - i) * sizeof(float));
            v_store(tail, v_softplus(v_load(tail)));
            memcpy(x + i, tail, (size - i) * sizeof(float));
        }
    }
}

enum { SHARE = 128 };  // rows of a matrix, or channels, per task

INLINE int64_t shares(int64_t size) { return (size + SHARE - 1) / SHARE; }
INLINE int64_t share_size(int64_t index, int64_t size) { return size - index * SHARE < SHARE ? size - index * SHARE : SHARE; }

INLINE void shift_by_one(float *y, float *window, const float *before, const float *x, const float *weight, const float *bias,
                         int64_t channels, const int64_t k) {
    for (int64_t c = 0; c < channels; c++) {
        const float *old = before + c * k, *w = weight + c * k;
        float *now = window + c * k, sum = bias ? bias[c] : 0;
        for (int64_t j = 0; j + 1 < k; j++) sum += (now[j] = old[j + 1]) * w[j];
        now[k - 1] = x[c];
        y[c] = sum + x[c] * w[k - 1];
    }
}

// The window of every channel moved by one input x, whose products with the taps are y; windows may lie over each other.
SHARED void shift_and_convolve(float *y, float *window, const float *before, const float *x, const float *weight,
                               const float *bias, int64_t channels, int64_t k) {
    if (k == 4) shift_by_one(y, window, before, x, weight, bias, channels, 4);
    else shift_by_one(y, window, before, x, weight, bias, channels, k);
}

// The convolution of a mixer: floats, or int8 with scales, and what is rounded to 8 bits behind SiLU.
typedef struct {
    const void *weight, *bias;                  // (c k), (c) or NULL
    const float *scale, *bias_scale, *rounded;  // (c) each, or NULL
} conv_weights;

enum { CONVOLVED = 64 };  // channels whose taps are written out as floats at once

SHARED void round_channels(float *x, const float *scale, int64_t size) {
    for (int64_t i = 0; i < size; i += VL)
        v_store_some(x + i, v_round8(v_load_some(x + i, size - i), v_load_some(scale + i, size - i)), size - i);
}

// Channels from..from+count of y = SiLU(convolution); window and before begin at the first of them, x and y too.
SHARED void convolve_and_activate(const conv_weights *w, float *y, float *window, const float *before, const float *x, int64_t from,
                                  int64_t count, int64_t k) {
    const float *bias = w->bias;
    if (!w->scale) shift_and_convolve(y, window, before, x, (const float *)w->weight + from * k, bias ? bias + from : NULL, count, k);
    for (int64_t c = 0; w->scale && c < count; c += CONVOLVED) {
        const int64_t some = count - c < CONVOLVED ? count - c : CONVOLVED, at = from + c;
        float taps[some * k], added[CONVOLVED];
        for (int64_t i = 0; i < some * k; i++) taps[i] = (float)((const int8_t *)w->weight)[at * k + i] * w->scale[at + i / k];
        for (int64_t i = 0; w->bias && i < some; i++) added[i] = (float)((const int8_t *)w->bias)[at + i] * w->bias_scale[at + i];
        shift_and_convolve(y + c, window + c * k, before + c * k, x + c, taps, w->bias ? added : NULL, some, k);
    }
    silu(y, count);
    if (w->rounded) round_channels(y, w->rounded + from, count);
}
