// Strided tensors handed over from Python as (pointer, dtype, strides), and tiles of them as float32.
#pragma once
#include <stdint.h>
#include <string.h>
#include "vec.h"

enum { F32 = 0, BF16 = 1, F16 = 2, I32 = 3, I64 = 4 };

typedef struct {
    char *data;  // NULL for an argument that was not given
    int64_t dtype;
    int64_t stride[4];  // in elements
} tensor;

INLINE float bits_float(uint32_t b) { float f; memcpy(&f, &b, 4); return f; }
INLINE uint32_t float_bits(float f) { uint32_t b; memcpy(&b, &f, 4); return b; }
INLINE float from_bf16(uint16_t h) { return bits_float((uint32_t)h << 16); }
INLINE uint16_t to_bf16(float f) {  // to nearest even; NaN stays NaN
    uint32_t b = float_bits(f), rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    return (uint16_t)((b & 0x7fffffff) > 0x7f800000 ? (b >> 16) | 0x40 : rounded);
}
INLINE float from_f16(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13;
    float magnitude = bits_float(rest) * 0x1p112f;  // also right for subnormal numbers
    uint32_t b = rest >= 0x0f800000 ? rest | 0x7f800000 : float_bits(magnitude);  // infinity and NaN
    return bits_float(b | sign);
}
INLINE uint16_t to_f16(float f) {
    uint32_t b = float_bits(f), sign = (b >> 16) & 0x8000, m = b & 0x7fffffff, h;
    if (m > 0x7f800000) h = 0x7e00 | ((m >> 13) & 0x3ff);
    else if (m >= 0x477ff000) h = 0x7c00;  // 65520 and more
    else if (m < 0x38800000) h = float_bits(bits_float(m) + 0.5f) - 0x3f000000;  // subnormal: the addition rounds
    else h = (m - 0x38000000 + 0xfff + ((m >> 13) & 1)) >> 13;
    return (uint16_t)(h | sign);
}

INLINE float get(const char *p, int64_t dtype, int64_t i) {
    switch (dtype) {
    case F32: return ((const float *)p)[i];
    case BF16: return from_bf16(((const uint16_t *)p)[i]);
    default: return from_f16(((const uint16_t *)p)[i]);
    }
}
INLINE void put(char *p, int64_t dtype, int64_t i, float x) {
    switch (dtype) {
    case F32: ((float *)p)[i] = x; break;
    case BF16: ((uint16_t *)p)[i] = to_bf16(x); break;
    default: ((uint16_t *)p)[i] = to_f16(x);
    }
}
INLINE int64_t get_index(const tensor *t, int64_t i) {
    return t->dtype == I64 ? ((const int64_t *)t->data)[i] : ((const int32_t *)t->data)[i];
}
INLINE int64_t item_size(int64_t dtype) { return dtype == F32 || dtype == I32 ? 4 : dtype == I64 ? 8 : 2; }
INLINE char *at(const tensor *t, int64_t i, int64_t j, int64_t k) {
    return t->data + item_size(t->dtype) * (i * t->stride[0] + j * t->stride[1] + k * t->stride[2]);
}

// n contiguous elements.
void load_line(float *to, const char *from, int64_t dtype, int n);
void store_line(char *to, const float *from, int64_t dtype, int n);

// tile[s * ld + lane] = source[lane * lane_stride + s * step_stride]; lanes from `lanes` up to VL are set to 0.
void load_tile(float *tile, int64_t ld, const char *source, int64_t dtype, int64_t lane_stride, int64_t step_stride,
               int lanes, int64_t steps);
// The other way round; only the first `lanes` lanes are written.
void store_tile(const float *tile, int64_t ld, char *target, int64_t dtype, int64_t lane_stride, int64_t step_stride,
                int lanes, int64_t steps);
// Neighbouring tiles, `gap` floats apart, that hold `lanes` lanes together. When lanes are contiguous in memory, rows are
// passed over from end to end: one tile at a time would fetch single cache lines of many pages.
void load_tiles(float *tiles, int64_t gap, const char *source, int64_t dtype, int64_t lane_stride, int64_t step_stride,
                int64_t lanes, int64_t steps);
void store_tiles(const float *tiles, int64_t gap, char *target, int64_t dtype, int64_t lane_stride, int64_t step_stride,
                 int64_t lanes, int64_t steps);
