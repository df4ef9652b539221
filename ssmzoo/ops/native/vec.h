// Portable vector code: written once with GCC/Clang vector extensions, compiled for every instruction set.
//
// vf is a vector of VL floats, vi of VL 32-bit integers; the usual operators work lane by lane and `vf op scalar`
// broadcasts. Everything keeps NaN and infinity (no -ffast-math).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__) || defined(__AVX512F__) || defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
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
#if defined(__AVX512F__)
INLINE vf v_at_least(vf x, float low) { return (vf)_mm512_max_ps((__m512)v_set(low), (__m512)x); }
INLINE vf v_at_most(vf x, float high) { return (vf)_mm512_min_ps((__m512)v_set(high), (__m512)x); }
#elif defined(__AVX2__)
INLINE vf v_at_least(vf x, float low) { return (vf)_mm256_max_ps((__m256)v_set(low), (__m256)x); }
INLINE vf v_at_most(vf x, float high) { return (vf)_mm256_min_ps((__m256)v_set(high), (__m256)x); }
#elif defined(__SSE2__)
INLINE vf v_at_least(vf x, float low) { return (vf)_mm_max_ps((__m128)v_set(low), (__m128)x); }
INLINE vf v_at_most(vf x, float high) { return (vf)_mm_min_ps((__m128)v_set(high), (__m128)x); }
#elif defined(__aarch64__)
INLINE vf v_at_least(vf x, float low) { return (vf)vmaxq_f32((float32x4_t)x, (float32x4_t)v_set(low)); }
INLINE vf v_at_most(vf x, float high) { return (vf)vminq_f32((float32x4_t)x, (float32x4_t)v_set(high)); }
#else
INLINE vf v_at_least(vf x, float low) { return v_select(x < low, v_set(low), x); }
INLINE vf v_at_most(vf x, float high) { return v_select(x > high, v_set(high), x); }
#endif
// x as an 8-bit integer times scale: halves to even.
INLINE vf v_round8(vf x, vf scale) {
    return (v_at_most(v_at_least(x / scale, -128.0f), 127.0f) + 12582912.0f - 12582912.0f) * scale;  // 1.5 * 2^23
}
INLINE int v_any(vi mask) {
    int any = 0;
    for (int i = 0; i < VL; i++) any |= mask[i];
    return any != 0;
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

// 2^t, relative error below 2e-7, exact at 0; infinities and NaN as they should be. Results below 2^-125 are right to 2^-125
// only (on AVX-512 they underflow gradually): that would take a second multiplication by a power of two.
// `range`, known when compiled, tells what is sure of t, so that it need not be held there.
enum { ANY, AT_MOST_BOUND, WITHIN_BOUND };  // nothing; t <= EXP2_BOUND; |t| <= EXP2_BOUND
enum { RANGE_HELPS = VL >= 8 };
#define EXP2_BOUND 120.0f
#if defined(__AVX512F__) && defined(__AVX512DQ__)
// 2^(i/32), in two registers; |t| <= EXP2_BOUND, or any that is finite
INLINE vf v_exp2_table(vf t) {
    static const float powers[32] __attribute__((aligned(64))) = {
        1.0f,         1.021897149f, 1.044273782f, 1.067140401f, 1.090507733f, 1.114386743f, 1.138788635f, 1.163724859f,
        1.189207115f, 1.215247360f, 1.241857812f, 1.269050957f, 1.296839555f, 1.325236643f, 1.354255547f, 1.383909882f,
        1.414213562f, 1.445180807f, 1.476826146f, 1.509164428f, 1.542210825f, 1.575980845f, 1.610490332f, 1.645755478f,
        1.681792831f, 1.718619298f, 1.756252160f, 1.794709075f, 1.834008086f, 1.874167632f, 1.915206561f, 1.957144124f};
    const vf m = t + 393216.0f, k = m - 393216.0f;  // 1.5 * 2^18: rounds to thirty-seconds, which are the lowest bits then
    const vf r = t - k;
    const __m512 power = _mm512_permutex2var_ps(_mm512_load_ps(powers), (__m512i)m, _mm512_load_ps(powers + 16));
    const vf whole = (vf)_mm512_scalef_ps(power, (__m512)k);  // 2^k: the scaling rounds k downwards
    return whole * r * (r * 0.2402264974f + 0.6931573298f) + whole;
}
#endif
INLINE vf v_exp2_of(vf t, const int range) {
#if defined(__AVX512F__) && defined(__AVX512DQ__)
    if (range == WITHIN_BOUND) return v_exp2_table(t);
    const __m512 n = _mm512_roundscale_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf r = (vf)_mm512_reduce_ps((__m512)t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 for infinite t
#else
    if (range < WITHIN_BOUND) t = v_at_least(t, -126.0f);
    if (range < AT_MOST_BOUND) t = v_at_most(t, 128.0f);
#endif
#if defined(__AVX2__) && !defined(__AVX512F__)
    // t = n + i/8 + r: 2^(n + i/8) from a table, less i/8 in the place that n + i/8 is added to; 2^r cubic. Where t may be
    // 128, half the power times twice the cubic.
    const int half = range < AT_MOST_BOUND ? 1 << 23 : 0;
    const __m256i table = _mm256_setr_epi32(0x3f800000 - half, 0x3f7b95c2 - half, 0x3f7837f0 - half, 0x3f75fed7 - half,
                                            0x3f7504f3 - half, 0x3f75672a - half, 0x3f7744fd - half, 0x3f7ac0c7 - half);
    const vf m = t + 1572864.0f;  // 1.5 * 2^20: rounds to eighths, which are the lowest bits then
    const vf r = t - (m - 1572864.0f);
    const vf whole = (vf)((vi)_mm256_permutevar8x32_epi32(table, (__m256i)m) + ((vi)m << 20));
    if (range < AT_MOST_BOUND) return whole * (((r * 0.1109924436f + 0.4805152596f) * r + 1.3862944286f) * r + 2.0f);
    return whole * r * ((r * 0.05549622182f + 0.2402576298f) * r + 0.6931472143f) + whole;
#else
#if !defined(__AVX512F__)
    const vf m = t + (12582912.0f + 126);  // 1.5 * 2^23: rounds to the nearest integer; 2^(n-1) has the exponent n + 126
    const vf r = t - (m - (12582912.0f + 126));
#endif
    vf p = v_set(1.326472731e-3f);
    p = p * r + 9.671512991e-3f;
    p = p * r + 5.550733581e-2f;
    p = p * r + 2.402224243e-1f;
    p = p * r + 6.931470037e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, n);
#else
    return (p + p) * (vf)((vi)m << 23);
#endif
#endif
}
INLINE vf v_exp2(vf t) { return v_exp2_of(t, ANY); }
// For exponents that are a product with one of n rows: the largest absolute value of each lane, infinite where one is NaN
// (largest |d| * that <= EXP2_BOUND: all of them are WITHIN_BOUND).
INLINE vf v_steepest(const float *rows, int64_t n) {
    vf most = {0};
    for (int64_t i = 0; i < n; i++) {
        vf rate = v_abs(v_load(rows + i * VL));
        most = v_select(rate <= most, most, rate);
        most = v_select(most == most, most, v_set(INFINITY));
    }
    return most;
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
    vf y = v_exp2_of(-v_abs(x) * LOG2E, AT_MOST_BOUND);
    return v_softplus_of(x, y / (2.0f + y));
}
INLINE vf v_softplus_slope(vf x, vf *slope) {  // and its derivative, by one division
    vf y = v_exp2_of(-v_abs(x) * LOG2E, AT_MOST_BOUND), both = 1.0f / ((1.0f + y) * (2.0f + y));
    *slope = v_select(x < 0.0f, y, v_set(1.0f)) * (2.0f + y) * both;
    return v_softplus_of(x, y * (1.0f + y) * both);
}

// Sine and cosine of radians, absolute errors below 1e-7; exact reduction up to 8192, where libm takes over.
#if VL == 16
#define V_NEIGHBOURS(x) V_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)
#elif VL == 8
#define V_NEIGHBOURS(x) V_SHUFFLE(x, x, 1, 0, 3, 2, 5, 4, 7, 6)
#else
#define V_NEIGHBOURS(x) V_SHUFFLE(x, x, 1, 0, 3, 2)
#endif
INLINE void v_sincos(vf x, vf *sine, vf *cosine) {
    const vf m = x * 0.63661977236f + 12582912.0f, n = m - 12582912.0f;  // x = n pi/2 + r
    const vf r = x - n * 1.5703125f - n * 4.837512969970703e-4f - n * 7.549789954891882e-8f, s = r * r;
    const vf of_r = r + r * s * (s * (s * -1.95169623e-4f + 8.332175739e-3f) - 1.6666654907e-1f);
    const vf beside = 1.0f - 0.5f * s + s * s * (s * (s * 2.443807781e-5f - 1.388736438e-3f) + 4.166664681e-2f);
    const vi quarter = (vi)m, odd = -(quarter & 1);
    *sine = (vf)((vi)v_select(odd, beside, of_r) ^ ((quarter & 2) << 30));
    *cosine = (vf)((vi)v_select(odd, of_r, beside) ^ (((quarter + 1) & 2) << 30));
    if (v_any(v_abs(x) > 8192.0f))
        for (int i = 0; i < VL; i++) (*sine)[i] = sinf(x[i]), (*cosine)[i] = cosf(x[i]);
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
