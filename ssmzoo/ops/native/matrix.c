#include "matrix.h"
#if defined(__ARM_NEON)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <immintrin.h>
#endif

static inline int64_t groups(const matrix *m) { return (m->columns + m->group - 1) / m->group; }

enum { ROWS = 4 };  // that are multiplied at once, at most

// ---- floats ----

// The products of `rows` neighbouring rows with `count` vectors, before the sum over lanes. One vector and one row take `chains`
// sums side by side; several vectors take several rows, so that x is loaded less often.
INLINE void float_row(vf (*part)[VL], int at, const float *w, const float *x, int64_t ld, int64_t columns,
                      const int rows, const int count, const int chains) {
    vf sum[ROWS * VECTORS][4];
#pragma GCC unroll 16
    for (int c = 0; c < rows * count; c++)
#pragma GCC unroll 4
        for (int u = 0; u < chains; u++) sum[c][u] = (vf){0};
    int64_t i = 0;
    for (; i + chains * VL <= columns; i += chains * VL)
#pragma GCC unroll 4
        for (int u = 0; u < chains; u++) {
            vf v[ROWS];
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) v[r] = v_load(w + r * columns + i + u * VL);
#pragma GCC unroll 8
            for (int c = 0; c < count; c++) {
                const vf one = v_load(x + c * ld + i + u * VL);
#pragma GCC unroll 4
                for (int r = 0; r < rows; r++) sum[r * count + c][u] += v[r] * one;
            }
        }
    for (; i < columns; i += VL)
        for (int r = 0; r < rows; r++) {
            const vf v = v_load_some(w + r * columns + i, columns - i);
#pragma GCC unroll 8
            for (int c = 0; c < count; c++) sum[r * count + c][0] += v * v_load_some(x + c * ld + i, columns - i);
        }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
        for (int c = 0; c < count; c++) {
            vf *all = sum[r * count + c];
#pragma GCC unroll 4
            for (int u = 1; u < chains; u++) all[0] += all[u];
            part[c][at + r] = all[0];
        }
}

// ---- integers ----

#if defined(__AVX512F__)
typedef __m512i words;
INLINE words load_words(const int16_t *p) { return _mm512_loadu_si512(p); }
INLINE words extend_signed(const void *p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(p)); }
INLINE words extend(const void *p) { return _mm512_cvtepu8_epi16(_mm256_loadu_si256(p)); }
INLINE words low_nibble(words w) { return _mm512_and_si512(w, _mm512_set1_epi16(15)); }
INLINE words high_nibble(words w) { return _mm512_srli_epi16(w, 4); }
INLINE vi multiply_add(vi sum, words w, words x) { return sum + (vi)_mm512_madd_epi16(w, x); }
#elif defined(__AVX2__)
typedef __m256i words;
INLINE words load_words(const int16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE words extend_signed(const void *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(p)); }
INLINE words extend(const void *p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128(p)); }
INLINE words low_nibble(words w) { return _mm256_and_si256(w, _mm256_set1_epi16(15)); }
INLINE words high_nibble(words w) { return _mm256_srli_epi16(w, 4); }
INLINE vi multiply_add(vi sum, words w, words x) { return sum + (vi)_mm256_madd_epi16(w, x); }
#elif defined(__ARM_NEON)
typedef int16x8_t words;
INLINE words load_words(const int16_t *p) { return vld1q_s16(p); }
INLINE words extend_signed(const void *p) { return vmovl_s8(vld1_s8(p)); }
INLINE words extend(const void *p) { return vreinterpretq_s16_u16(vmovl_u8(vld1_u8(p))); }
INLINE words low_nibble(words w) { return vandq_s16(w, vdupq_n_s16(15)); }
INLINE words high_nibble(words w) { return vshrq_n_s16(w, 4); }
INLINE vi multiply_add(vi sum, words w, words x) {
    int32x4_t s = vmlal_s16((int32x4_t)sum, vget_low_s16(w), vget_low_s16(x));
    return (vi)vmlal_s16(s, vget_high_s16(w), vget_high_s16(x));
}
#else
typedef int16_t words __attribute__((vector_size(16)));
typedef int16_t words_anywhere __attribute__((vector_size(16), aligned(2), may_alias));
INLINE words load_words(const int16_t *p) { return *(const words_anywhere *)p; }
INLINE words extend_signed(const void *p) {
    const int8_t *b = p;
    return (words){b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]};
}
INLINE words extend(const void *p) {
    const uint8_t *b = p;
    return (words){b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]};
}
INLINE words low_nibble(words w) { return w & 15; }
INLINE words high_nibble(words w) { return w >> 4; }
INLINE vi multiply_add(vi sum, words w, words x) {
#if defined(__SSE2__)
    return sum + (vi)_mm_madd_epi16((__m128i)w, (__m128i)x);
#else
    for (int i = 0; i < 4; i++) sum[i] += w[2 * i] * x[2 * i] + w[2 * i + 1] * x[2 * i + 1];
    return sum;
#endif
}
#endif

// Rows are read some at a time, piece by piece, in which hardware sees no stream: their bytes are asked for one after the other.
enum { AHEAD = 2 };  // times the rows that are read at once

INLINE const char *look_ahead(const char *p, int64_t bytes) {
#pragma GCC unroll 8
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
    return p + bytes;
}

INLINE vi one_step(vi sum, const char *w, const int16_t *x, const int bits) {
    if (bits == 8) return multiply_add(sum, extend_signed(w), load_words(x));
    const words b = extend(w);
    return multiply_add(multiply_add(sum, low_nibble(b), load_words(x)), high_nibble(b), load_words(x + STEP));
}

// What a piece adds to its row's products: its integers' sum, scaled, and what a zero point takes away.
INLINE void add_piece(vf *total, float *shift, vi sum, const matrix *m, const vectors *v, int64_t line, int64_t at) {
    *total += __builtin_convertvector(sum, vf) * m->scale[line] * v_set(v->scale[at]);
    if (m->zero) *shift -= m->scale[line] * m->zero[line] * v->scale[at] * v->sum[at];
}

// The products of `rows` neighbouring rows with `count` vectors, before the sum over lanes. In a piece sums stay below 2^31: at
// most 256 products of 2^7 and 2^15 in one lane of 16, and nowhere fewer than 4 lanes.
INLINE void word_rows(vf (*part)[VL], int at, const matrix *m, const vectors *v, int64_t first, int64_t row, const int rows,
                      const int count, const int bits) {
    const int64_t stride = bits == 4 ? m->columns / 2 : m->columns, per_row = groups(m), pieces = v->pieces;
    vf total[ROWS * VECTORS];
    float shift[ROWS * VECTORS] = {0};
    const char *ahead = (const char *)m->data + (row + AHEAD * rows) * stride;
#pragma GCC unroll 16
    for (int i = 0; i < rows * count; i++) total[i] = (vf){0};
    for (int64_t p = 0; p < pieces; p++) {
        const piece *one = v->piece + p;
        const char *w = (const char *)m->data + row * stride + one->byte;
        const int16_t *x = v->q + first * v->words + one->words;
        ahead = look_ahead(ahead, rows * one->steps * STEP);
        vi sum[ROWS * VECTORS];
#pragma GCC unroll 16
        for (int i = 0; i < rows * count; i++) sum[i] = bits == 4 ? *(const vi *)(v->start + ((first + i % count) * pieces + p) * VL) : (vi){0};
        for (int64_t s = 0; s < one->steps; s++, w += STEP, x += bits == 4 ? 2 * STEP : STEP)
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 8
                for (int c = 0; c < count; c++) sum[r * count + c] = one_step(sum[r * count + c], w + r * stride, x + c * v->words, bits);
        for (int r = 0; one->rest && r < rows; r++) {
            char last[STEP] = {0};
            memcpy(last, w + r * stride, (size_t)one->rest);
            for (int c = 0; c < count; c++) sum[r * count + c] = one_step(sum[r * count + c], last, x + c * v->words, bits);
        }
#pragma GCC unroll 16
        for (int i = 0; i < rows * count; i++)
            add_piece(total + i, shift + i, sum[i], m, v, (row + i / count) * per_row + one->group, (first + i % count) * pieces + p);
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows * count; i++) part[i % count][at + i / count] = total[i] + (m->zero ? (vf){shift[i]} : (vf){0});
}

#if defined(__AVX512F__)
INLINE vi products_of_bytes(vi sum, __m512i w, __m512i x) {  // sum += unsigned w times signed x, by fours
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
    return sum;
}

// The same by products of bytes, four to a lane: weights + 128 (or + 8), times the activations' high and low bytes.
INLINE void byte_pair_rows(vf (*part)[VL], int at, const matrix *m, const vectors *v, int64_t first, int64_t row, const int rows,
                           const int count, const int bits, const int high) {
    const int64_t stride = bits == 4 ? m->columns / 2 : m->columns, per_row = groups(m), pieces = v->pieces;
    vf total[ROWS * VECTORS];
    float shift[ROWS * VECTORS] = {0};
    const char *ahead = (const char *)m->data + (row + AHEAD * rows) * stride;
#pragma GCC unroll 16
    for (int i = 0; i < rows * count; i++) total[i] = (vf){0};
    for (int64_t p = 0; p < pieces; p++) {
        const piece *one = v->piece + p;
        const char *w = (const char *)m->data + row * stride + one->byte;
        const int8_t *x = (const int8_t *)v->q + 2 * (first * v->words + one->words);
        __m512i b[ROWS][2];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++, w += stride) {
            const __m512i bytes = _mm512_maskz_loadu_epi8(one->here, w);
            if (bits == 4) {
                b[r][0] = _mm512_and_si512(bytes, _mm512_set1_epi8(15));
                b[r][1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
            } else {
                b[r][0] = _mm512_xor_si512(bytes, _mm512_set1_epi8(-128));
                b[r][1] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(one->behind, w + 64), _mm512_set1_epi8(-128));
            }
        }
#pragma GCC unroll 8
        for (int c = 0; c < count; c++) {
            const __m512i *half = (const __m512i *)(x + c * 2 * v->words);
            const __m512i low = half[0], low2 = half[1], top = half[2], top2 = half[3];
            const vi start = *(const vi *)(v->start + ((first + c) * pieces + p) * VL);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                if (c == 0) ahead = look_ahead(ahead, bits == 4 ? 64 : 128);
                vi sum = {0};
                if (high) sum = products_of_bytes(products_of_bytes(sum, b[r][0], top), b[r][1], top2) << 8;
                sum = products_of_bytes(products_of_bytes(sum, b[r][0], low), b[r][1], low2) + start;
                add_piece(total + r * count + c, shift + r * count + c, sum, m, v, (row + r) * per_row + one->group, (first + c) * pieces + p);
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows * count; i++) part[i % count][at + i / count] = total[i] + (m->zero ? (vf){shift[i]} : (vf){0});
}
#endif

// ---- vectors ----

static int byte_pairs;  // whether vectors are prepared for byte_pair_rows, or for word_rows
#if defined(__AVX512F__)
__attribute__((constructor)) static void look_for_vnni(void) {
    __builtin_cpu_init();
    byte_pairs = __builtin_cpu_supports("avx512vnni");
}
#endif

INLINE int64_t longest(void) { return byte_pairs ? PIECE / 2 : PIECE; }  // columns of a piece

static int64_t count_pieces(const matrix *m) {
    if (m->bits == 32) return 0;
    const int64_t whole = m->columns / m->group, rest = m->columns % m->group, most = longest();
    return whole * ((m->group + most - 1) / most) + (rest + most - 1) / most;
}

INLINE int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Room in a prepared vector: every piece is padded to whole registers.
static int64_t count_words(const matrix *m) {
    return byte_pairs ? count_pieces(m) * (PIECE / 2) : m->columns + count_pieces(m) * 2 * STEP;
}

size_t prepared_bytes(const matrix *m, int64_t count) {
    if (m->bits == 32) return 0;
    const int64_t pieces = count_pieces(m);
    return (size_t)(lines(pieces * (int64_t)sizeof(piece)) + count * lines(2 * count_words(m)) + 2 * lines(4 * count * pieces)) +
           (size_t)(4 * VL * count * pieces);
}

void begin_vectors(vectors *v, const matrix *m, const float *x, int64_t count, int64_t ld, int act, float act_scale, void *memory) {
    *v = (vectors){.x = x, .count = count, .ld = ld, .act = act, .act_scale = act_scale};
    if (m->bits == 32) return;
    char *free_memory = memory;
    v->pieces = count_pieces(m);
    v->words = lines(2 * count_words(m)) / 2;
    v->piece = (piece *)free_memory;
    free_memory += lines(v->pieces * (int64_t)sizeof(piece));
    v->q = (int16_t *)free_memory;
    free_memory += 2 * count * v->words;
    v->scale = (float *)free_memory;
    v->sum = (float *)(free_memory + lines(4 * count * v->pieces));
    v->start = (int32_t *)(free_memory + 2 * lines(4 * count * v->pieces));
    piece *p = v->piece;
    int64_t word = 0;
    for (int64_t column = 0; column < m->columns; p++) {
        const int64_t group_end = (column / m->group + 1) * m->group, end = group_end < m->columns ? group_end : m->columns;
        const int64_t size = end - column < longest() ? end - column : longest(), bytes = m->bits == 4 ? size / 2 : size;
        *p = (piece){m->bits == 4 ? column / 2 : column, word, column / m->group, bytes / STEP, bytes % STEP, 0, 0};
        p->here = bytes < 64 ? (1ull << bytes) - 1 : ~0ull;
        p->behind = bytes <= 64 ? 0 : bytes < 128 ? (1ull << (bytes - 64)) - 1 : ~0ull;
        word += byte_pairs ? PIECE / 2 : (p->steps + (p->rest > 0)) * (m->bits == 4 ? 2 * STEP : STEP);
        column += size;
    }
}

// The bits of the largest magnitude: NaN is larger than infinity.
static int32_t largest(const float *x, int64_t size) {
    vi most = {0};
    for (int64_t i = 0; i < size; i += VL) {
        const vi bits = (vi)v_abs(v_load_some(x + i, size - i));
        most = (vi)v_select(bits > most, (vf)bits, (vf)most);
    }
    int32_t all = 0;
    for (int i = 0; i < VL; i++) all = most[i] > all ? most[i] : all;
    return all;
}

static float as_float(int32_t bits) {
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

enum { INFINITE = 0x7f800000 };

// q = round(clamp(x / scale)), halves to even, as integers; the rest up to whole registers is 0.
INLINE void round_line(int32_t *q, const float *x, int64_t size, float scale, float low, float high) {
    for (int64_t i = 0; i < size; i += VL) {
        const vf y = v_at_most(v_at_least(v_load_some(x + i, size - i) / scale, low), high) + 12582912.0f;  // 1.5 * 2^23
        *(vi *)(q + i) = (vi)y - 0x4b400000;
    }
}

// 16-bit numbers of a piece as the high and low bytes that byte_pair_rows wants, in the order of the weights' bytes, and what
// the sums of every lane begin with, since weights come as they are + offset. -> their sum
static int64_t as_byte_pairs(int8_t *to, int32_t *start, const int32_t *line, int pairs) {  // 128 of them, VL is 16
    int64_t sum = 0;
    if (pairs) {
        for (int i = 0; i < 64; i++) to[i] = (int8_t)line[2 * i], to[64 + i] = (int8_t)line[2 * i + 1];
        for (int i = 0; i < 64; i++) {
            to[128 + i] = (int8_t)((line[2 * i] + 128) >> 8);
            to[192 + i] = (int8_t)((line[2 * i + 1] + 128) >> 8);
        }
    } else {
        for (int i = 0; i < 128; i++) to[i] = (int8_t)line[i];
        for (int i = 0; i < 128; i++) to[128 + i] = (int8_t)((line[i] + 128) >> 8);
    }
    for (int l = 0; l < 16; l++) {
        const int32_t *a = line + (pairs ? 8 * l : 4 * l), *b = pairs ? a + 4 : a + 64;
        const int32_t all = a[0] + a[1] + a[2] + a[3] + b[0] + b[1] + b[2] + b[3];
        start[l] = all * (pairs ? -8 : -128);
        sum += all;
    }
    return sum;
}

static int64_t as_words(int16_t *q, int32_t *start, const int32_t *line, const piece *one, int64_t pairs) {
    const int64_t bytes = one->steps * STEP + one->rest;
    int64_t sum = 0;
    for (int64_t i = 0; i < bytes << pairs; i++) sum += line[i];
    for (int64_t s = 0; s < one->steps + (one->rest > 0); s++) {
        const int64_t filled = bytes - s * STEP < STEP ? bytes - s * STEP : STEP;
        const int32_t *in = line + ((s * STEP) << pairs);
        if (filled < STEP) memset(q, 0, sizeof(int16_t) * (STEP << pairs));
        if (pairs) {
            for (int64_t i = 0; i < filled; i++) q[i] = (int16_t)in[2 * i], q[STEP + i] = (int16_t)in[2 * i + 1];
        } else {
            for (int64_t i = 0; i < filled; i++) q[i] = (int16_t)in[i];
        }
        q += STEP << pairs;
    }
    memset(start, 0, sizeof(int32_t) * VL);
    start[0] = (int32_t)(-8 * sum);  // 4-bit weights come as they are + 8
    return sum;
}

static void prepare_one(vectors *v, const matrix *m, int64_t c) {
    const float *x = v->x + c * v->ld;
    const int act = v->act;
    float act_scale = v->act_scale;
    int32_t line[PIECE] __attribute__((aligned(64)));
    if (act == ACT_DYNAMIC) {
        const int32_t most = largest(x, m->columns);
        act_scale = as_float(most) / 127;
        if (!(act_scale > 1e-6f)) act_scale = most > INFINITE ? NAN : 1e-6f;
    }
    const int64_t pairs = m->bits == 4;
    for (int64_t p = 0; p < v->pieces; p++) {
        const piece *one = v->piece + p;
        const int64_t bytes = one->steps * STEP + one->rest, size = bytes << pairs;
        const float *from = x + (one->byte << pairs);
        const int32_t most = largest(from, size);
        const float limit = byte_pairs ? 127 * 256 + 127 : 32767;
        float scale = act_scale;
        if (act == ACT_FLOAT) scale = as_float(most) / limit;
        const int usable = most <= INFINITE && scale == scale && scale <= 3.4e38f && !(act == ACT_FLOAT && most == INFINITE);
        if (!usable || scale == 0) memset(line, 0, sizeof line);
        else if (act == ACT_FLOAT) round_line(line, from, size, scale, -limit, limit);
        else round_line(line, from, size, scale, -128.0f, 127.0f);
        if (byte_pairs && size < PIECE / 2) memset(line + size, 0, sizeof(int32_t) * (size_t)(PIECE / 2 - size));
        const int64_t at = c * v->pieces + p;
        int16_t *q = v->q + c * v->words + one->words;
        int32_t *start = v->start + at * VL;
        const int64_t sum = byte_pairs ? as_byte_pairs((int8_t *)q, start, line, (int)pairs) : as_words(q, start, line, one, pairs);
        v->scale[at] = usable ? scale : NAN;
        v->sum[at] = (float)sum;
    }
}

void prepare(vectors *v, const matrix *m, int64_t from, int64_t to) {
    if (m->bits == 32) return;
    for (int64_t c = from; c < to; c++) prepare_one(v, m, c);
}

// ---- rows ----

INLINE void sums_of_rows(float *y, int64_t ldy, vf (*part)[VL], const float *bias, const float *rounded, int64_t rows, const int count) {
    for (int c = 0; c < count; c++) {
        vf x[VL];
        for (int q = 0; q < VL; q++) x[q] = q < rows ? part[c][q] : (vf){0};
        v_transpose(x);
        vf sum = x[0];
        for (int q = 1; q < VL; q++) sum += x[q];
        if (rounded) sum = v_round8(sum, v_load_some(rounded, rows));
        if (bias) sum += v_load_some(bias, rows);
        v_store_some(y + c * ldy, sum, rows);
    }
}

enum { FLOATS = 32, BYTES = 8, NIBBLES = 4, PAIRS = 256, WITH_HIGH = 512 };  // kinds of products; the bits are their weights'

INLINE void some_rows(vf (*part)[VL], int at, const matrix *m, const vectors *v, int64_t first, int64_t row, const int rows,
                      const int count, const int kind) {
    const int bits = kind & 63;
    if (kind == FLOATS) {
        const float *w = (const float *)m->data + row * m->columns, *x = v->x + first * v->ld;
        float_row(part, at, w, x, v->ld, m->columns, rows, count, count == 1 ? 4 : count == 2 ? 2 : 1);
        return;
    }
#if defined(__AVX512F__)
    if (kind & PAIRS) { byte_pair_rows(part, at, m, v, first, row, rows, count, bits, kind & WITH_HIGH); return; }
#endif
    word_rows(part, at, m, v, first, row, rows, count, bits);
}

// Some rows (at most VL) with `count` vectors beginning at `first`.
INLINE void tile(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t row, int64_t rows, int64_t first,
                 const int count, const int kind) {
    vf part[VECTORS][VL];
    const int together = kind == FLOATS ? (count == 1 ? 1 : VL == 16 ? ROWS : 2) : count == 1 ? ROWS : 2;
    int q = 0;
    for (; q + together <= rows; q += together) some_rows(part, q, m, v, first, row + q, together, count, kind);
    for (; q < rows; q++) some_rows(part, q, m, v, first, row + q, 1, count, kind);
    const float *bias = m->bias ? m->bias + row : NULL, *rounded = m->rounded ? m->rounded + row : NULL;
    sums_of_rows(y + first * ldy + row, ldy, part, bias, rounded, rows, count);
}

#define TILE_CASE(n) \
    case n: tile(m, v, y, ldy, row, rows, first, n, kind); break

INLINE void tiles(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t row, int64_t rows, int64_t first,
                  const int kind) {
    const int64_t left = v->count - first;
    switch (left < VECTORS ? left : VECTORS) {
        TILE_CASE(1);
        TILE_CASE(2);
        TILE_CASE(3);
        TILE_CASE(4);
    }
}

// All vectors meet some rows while these are in cache: VL of them for few vectors, all of a task's for many.
INLINE void all_rows(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t from, int64_t to, const int kind) {
    const int64_t block = v->count <= 8 ? VL : to - from;
    for (int64_t start = from; start < to; start += block)
        for (int64_t first = 0; first < v->count; first += VECTORS)
            for (int64_t row = start; row < start + block && row < to; row += VL)
                tiles(m, v, y, ldy, row, to - row < VL ? to - row : VL, first, kind);
}

typedef void rows_of(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t from, int64_t to);
#define ROWS_OF(name, kind) \
    static void name(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t from, int64_t to) { \
        all_rows(m, v, y, ldy, from, to, kind); \
    }
ROWS_OF(float_rows, FLOATS)
ROWS_OF(byte_rows, BYTES)
ROWS_OF(nibble_rows, NIBBLES)
#if defined(__AVX512F__)
ROWS_OF(byte_rows_8, BYTES | PAIRS)
ROWS_OF(byte_rows_16, BYTES | PAIRS | WITH_HIGH)
ROWS_OF(nibble_rows_8, NIBBLES | PAIRS)
ROWS_OF(nibble_rows_16, NIBBLES | PAIRS | WITH_HIGH)
#endif

void multiply_rows(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t from, int64_t to) {
    rows_of *rows = m->bits == 32 ? float_rows : m->bits == 8 ? byte_rows : nibble_rows;
#if defined(__AVX512F__)
    const int high = v->act == ACT_FLOAT;
    if (byte_pairs && m->bits == 8) rows = high ? byte_rows_16 : byte_rows_8;
    if (byte_pairs && m->bits == 4) rows = high ? nibble_rows_16 : nibble_rows_8;
#endif
    rows(m, v, y, ldy, from, to);
}

// ---- integers as floats, for products that arithmetic bounds ----

typedef struct {
    matrix m;
    float *to;  // (rows columns)
    int64_t threads;
} dense_args;

enum { DENSE_ROWS = 32 };

static void dense_task(void *context, int64_t index) {
    const dense_args *a = context;
    const matrix *m = &a->m;
    const int64_t count = groups(m), end = (index + 1) * DENSE_ROWS < m->rows ? (index + 1) * DENSE_ROWS : m->rows;
    for (int64_t row = index * DENSE_ROWS; row < end; row++)
        for (int64_t g = 0; g < count; g++) {
            const int64_t from = g * m->group, to = from + m->group < m->columns ? from + m->group : m->columns;
            const float scale = m->scale[row * count + g], zero = m->zero ? m->zero[row * count + g] : 0;
            float *y = a->to + row * m->columns;
            if (m->bits == 8) {
                const int8_t *w = (const int8_t *)m->data + row * m->columns;
                for (int64_t i = from; i < to; i++) y[i] = ((float)w[i] - zero) * scale;
            } else {
                const uint8_t *w = (const uint8_t *)m->data + row * (m->columns / 2);
                for (int64_t i = from / 2; i < to / 2; i++) {
                    y[2 * i] = ((float)(w[i] & 15) - 8 - zero) * scale;
                    y[2 * i + 1] = ((float)(w[i] >> 4) - 8 - zero) * scale;
                }
            }
        }
}

void ssmzoo_dense(const dense_args *a) {
    parallel_for((a->m.rows + DENSE_ROWS - 1) / DENSE_ROWS, a->threads, dense_task, (void *)a);
}

// ---- a product by itself ----

typedef struct {
    const float *x;  // (count columns)
    matrix m;
    float *y;  // (count rows)
    int64_t count, act, threads;
    double act_scale;
} multiply_args;

typedef struct {
    const multiply_args *a;
    vectors v;
    float *y;
    int64_t rows;  // per task
} multiply_work;

enum { CHUNK = 1024, SHARE_OF_VECTORS = 16 };

static void prepare_share(void *context, int64_t index) {
    multiply_work *s = context;
    const int64_t from = index * SHARE_OF_VECTORS, to = from + SHARE_OF_VECTORS;
    prepare(&s->v, &s->a->m, from, to < s->v.count ? to : s->v.count);
}

static void multiply_share(void *context, int64_t index) {
    const multiply_work *s = context;
    const int64_t from = index * s->rows, to = from + s->rows, size = s->a->m.rows;
    multiply_rows(&s->a->m, &s->v, s->y, size, from, to < size ? to : size);
}

static void multiply_few(void *context, crew *t) {
    const multiply_args *a = context;
    multiply_work s = {.a = a, .y = a->y, .rows = rows_per_task(a->m.rows, crew_size(t))};
    void *memory = scratch(prepared_bytes(&a->m, a->count));
    begin_vectors(&s.v, &a->m, a->x, a->count, a->m.columns, (int)a->act, (float)a->act_scale, memory);
    prepare(&s.v, &a->m, 0, a->count);
    crew_for(t, (a->m.rows + s.rows - 1) / s.rows, multiply_share, &s);
    free(memory);
}

void ssmzoo_multiply(const multiply_args *a) {
    const int64_t small = a->m.rows * a->m.columns < 1 << 15;  // starting threads takes longer
    if (a->count <= 8) { parallel_crew(small ? 1 : a->threads, multiply_few, (void *)a); return; }
    const int64_t rows = rows_per_task(a->m.rows, a->threads), tasks = (a->m.rows + rows - 1) / rows;
    const int64_t at_once = a->count < CHUNK ? a->count : CHUNK;
    void *memory = scratch(prepared_bytes(&a->m, at_once));
    for (int64_t first = 0; first < a->count; first += CHUNK) {
        multiply_work s = {.a = a, .y = a->y + first * a->m.rows, .rows = rows};
        const int64_t count = a->count - first < CHUNK ? a->count - first : CHUNK;
        begin_vectors(&s.v, &a->m, a->x + first * a->m.columns, count, a->m.columns, (int)a->act, (float)a->act_scale, memory);
        if (a->m.bits != 32) parallel_for((count + SHARE_OF_VECTORS - 1) / SHARE_OF_VECTORS, a->threads, prepare_share, &s);
        parallel_for(tasks, a->threads, multiply_share, &s);
    }
    free(memory);
}
