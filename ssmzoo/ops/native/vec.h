// Portable vector code: written once with GCC/Clang vector extensions, compiled for every instruction set.
//
// vf is a vector of VL floats, vi of VL 32-bit integers; the usual operators work lane by lane and `vf op scalar`
// broadcasts. Everything keeps NaN and infinity (no -ffast-math).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define VL 16
#elif defined(__AVX2__)
#define VL 8
#else
#define VL 4
#endif

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef float vfu __attribute__((vector_size(VL * 4), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline, unused))

INLINE vf v_set(float x) { return x - (vf){0}; }
INLINE vf v_load(const float *p) { return *(const vfu *)p; }
INLINE void v_store(float *p, vf x) { *(vfu *)p = x; }
INLINE vf v_load_some(const float *p, int64_t count) {  // the first `count` lanes, zeros behind them
    if (count >= VL) return v_load(p);
    float lane[VL] = {0};
    memcpy(lane, p, sizeof(float) * (size_t)count);
    return v_load(lane);
}
INLINE void v_store_some(float *p, vf x, int64_t count) {
    float lane[VL];
    if (count >= VL) { v_store(p, x); return; }
    v_store(lane, x);
    memcpy(p, lane, sizeof(float) * (size_t)count);
}
INLINE vf v_select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
// The bound when x lies beyond it, otherwise x; NaN stays NaN.
INLINE vf v_at_least(vf x, float low) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)v_set(low), (__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_max_ps((__m256)v_set(low), (__m256)x);
#else
    return v_select(x < low, v_set(low), x);
#endif
}
INLINE vf v_at_most(vf x, float high) {
#if defined(__AVX512F__)
    return (vf)_mm512_min_ps((__m512)v_set(high), (__m512)x);
#elif defined(__AVX2__)
    return (vf)_mm256_min_ps((__m256)v_set(high), (__m256)x);
#else
    return v_select(x > high, v_set(high), x);
#endif
}
INLINE vf v_abs(vf x) { return (vf)((vi)x & 0x7fffffff); }
#if defined(__clang__) || __GNUC__ >= 12
#define V_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define V_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (vi){__VA_ARGS__})
#endif
INLINE float v_sum(vf x) {  // always in the same order: halves, quarters, ...
#if VL == 16
    x += V_SHUFFLE(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    x += V_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    x += V_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    x += V_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
#elif VL == 8
    x += V_SHUFFLE(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
    x += V_SHUFFLE(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
    x += V_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6);
#else
    x += V_SHUFFLE(x, x, 2, 3, 0, 1);
    x += V_SHUFFLE(x, x, 1, 0, 3, 2);
#endif
    return x[0];
}

// 2^t, relative error below 1.2e-7; exact at 0, gradual underflow, infinities and NaN as they should be.
INLINE vf v_exp2(vf t) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    __m512 n = _mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf r = (vf)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 for infinite t
#else
    t = v_at_most(v_at_least(t, -151.0f), 129.0f);
    vf n = (t + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: rounds to the nearest integer
    vf r = t - n;
#endif
    vf p = v_set(1.326472731e-3f);
    p = p * r + 9.671512991e-3f;
    p = p * r + 5.550733581e-2f;
    p = p * r + 2.402224243e-1f;
    p = p * r + 6.931470037e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    return (vf)_mm512_scalef_ps((__m512)p, n);
#else
    vi k = __builtin_convertvector(v_select(n == n, n, v_set(0)), vi);
    vi half = k >> 1;  // in two steps, since 2^k itself may not be a normal number
    return p * (vf)((half + 127) << 23) * (vf)((k - half + 127) << 23);
#endif
}
#define LOG2E 1.44269504088896340736f
INLINE vf v_exp(vf x) { return v_exp2(x * LOG2E); }
INLINE vf v_sigmoid(vf x) { return 1.0f / (1.0f + v_exp(-x)); }
// log(1 + exp(x)) of x and s = y / (2 + y), y = exp(-|x|) in [0, 1]: the logarithm is 2 atanh(s).
INLINE vf v_softplus_of(vf x, vf s) {
    vf q = s * s;
    vf p = v_set(1.408916712e-1f);
    p = p * q + 1.398030072e-1f;
    p = p * q + 2.001245469e-1f;
    p = p * q + 3.333315849e-1f;
    p = p * q + 1.0f;
    return v_at_least(x, 0.0f) + 2.0f * s * p;
}
INLINE vf v_softplus(vf x) {
    vf y = v_exp(-v_abs(x));
    return v_softplus_of(x, y / (2.0f + y));
}
INLINE vf v_softplus_slope(vf x, vf *slope) {  // and its derivative, by one division
    vf y = v_exp(-v_abs(x)), both = 1.0f / ((1.0f + y) * (2.0f + y));
    *slope = v_select(x < 0.0f, y, v_set(1.0f)) * (2.0f + y) * both;
    return v_softplus_of(x, y * (1.0f + y) * both);
}

// Interleave the lower / upper halves of two vectors: a0 b0 a1 b1 ...
#if VL == 16
#define V_LOW(a, b) V_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23)
#define V_HIGH(a, b) V_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31)
#elif VL == 8
#define V_LOW(a, b) V_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11)
#define V_HIGH(a, b) V_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15)
#else
#define V_LOW(a, b) V_SHUFFLE(a, b, 0, 4, 1, 5)
#define V_HIGH(a, b) V_SHUFFLE(a, b, 2, 6, 3, 7)
#endif
// Transpose VL vectors in registers: after log2(VL) perfect shuffles row i is column i.
INLINE void v_transpose(vf *x) {
    vf y[VL];
    for (int width = 1; width < VL; width *= 2) {
#pragma GCC unroll 16
        for (int i = 0; i < VL / 2; i++) {
            y[2 * i] = V_LOW(x[i], x[i + VL / 2]);
            y[2 * i + 1] = V_HIGH(x[i], x[i + VL / 2]);
        }
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) x[i] = y[i];
    }
}
