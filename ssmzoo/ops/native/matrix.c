#include "matrix.h"
#if defined(__ARM_NEON)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <immintrin.h>
#endif

static inline int64_t groups(const matrix *m) { return (m->columns + m->group - 1) / m->group; }

// ---- floats ----

// The products of `rows` (1 or 2) neighbouring rows with `count` vectors, before the sum over lanes. One vector and one row
// take `chains` sums side by side; several vectors take two rows, so that x is loaded half as often.
INLINE void float_row(vf (*part)[VL], int at, const float *w, const float *x, int64_t ld, int64_t columns,
                      const int rows, const int count, const int chains) {
    vf sum[2 * VECTORS][4];
#pragma GCC unroll 16
    for (int c = 0; c < rows * count; c++)
#pragma GCC unroll 4
        for (int u = 0; u < chains; u++) sum[c][u] = (vf){0};
    int64_t i = 0;
    for (; i + chains * VL <= columns; i += chains * VL)
#pragma GCC unroll 4
        for (int u = 0; u < chains; u++) {
            const vf v = v_load(w + i + u * VL), v2 = rows == 2 ? v_load(w + columns + i + u * VL) : v;
#pragma GCC unroll 8
            for (int c = 0; c < count; c++) {
                const vf one = v_load(x + c * ld + i + u * VL);
                sum[c][u] += v * one;
                if (rows == 2) sum[count + c][u] += v2 * one;
            }
        }
    for (; i < columns; i += VL)
        for (int r = 0; r < rows; r++) {
            const vf v = v_load_some(w + r * columns + i, columns - i);
#pragma GCC unroll 8
            for (int c = 0; c < count; c++) sum[r * count + c][0] += v * v_load_some(x + c * ld + i, columns - i);
        }
#pragma GCC unroll 2
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
INLINE vi multiply_add(vi sum, words w, words x, const int vnni) {
    if (vnni) {
        __asm__("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
        return sum;
    }
    return sum + (vi)_mm512_madd_epi16(w, x);
}
#elif defined(__AVX2__)
typedef __m256i words;
INLINE words load_words(const int16_t *p) { return _mm256_loadu_si256((const __m256i *)p); }
INLINE words extend_signed(const void *p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(p)); }
INLINE words extend(const void *p) { return _mm256_cvtepu8_epi16(_mm_loadu_si128(p)); }
INLINE words low_nibble(words w) { return _mm256_and_si256(w, _mm256_set1_epi16(15)); }
INLINE words high_nibble(words w) { return _mm256_srli_epi16(w, 4); }
INLINE vi multiply_add(vi sum, words w, words x, const int vnni) { return (void)vnni, sum + (vi)_mm256_madd_epi16(w, x); }
#elif defined(__ARM_NEON)
typedef int16x8_t words;
INLINE words load_words(const int16_t *p) { return vld1q_s16(p); }
INLINE words extend_signed(const void *p) { return vmovl_s8(vld1_s8(p)); }
INLINE words extend(const void *p) { return vreinterpretq_s16_u16(vmovl_u8(vld1_u8(p))); }
INLINE words low_nibble(words w) { return vandq_s16(w, vdupq_n_s16(15)); }
INLINE words high_nibble(words w) { return vshrq_n_s16(w, 4); }
INLINE vi multiply_add(vi sum, words w, words x, const int vnni) {
    (void)vnni;
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
INLINE vi multiply_add(vi sum, words w, words x, const int vnni) {
    (void)vnni;
#if defined(__SSE2__)
    return sum + (vi)_mm_madd_epi16((__m128i)w, (__m128i)x);
#else
    for (int i = 0; i < 4; i++) sum[i] += w[2 * i] * x[2 * i] + w[2 * i + 1] * x[2 * i + 1];
    return sum;
#endif
}
#endif

// The products of one row with `count` vectors, before the sum over lanes. In a piece sums stay below 2^31: at most 256
// products of 2^7 and 2^15 in one lane of 16, and nowhere fewer than 4 lanes.
INLINE void integer_row(vf (*part)[VL], int at, const matrix *m, const vectors *v, int64_t first, int64_t row,
                        const int count, const int bits, const int vnni) {
    const char *line = (const char *)m->data + row * (bits == 4 ? m->columns / 2 : m->columns);
    const float *scales = m->scale + row * groups(m), *zeros = m->zero ? m->zero + row * groups(m) : NULL;
    const int16_t *q = v->q + first * v->words;
    const int64_t from = first * v->pieces, pieces = v->pieces, width = v->words;
    vf total[VECTORS];
    float shift[VECTORS] = {0};
#pragma GCC unroll 8
    for (int c = 0; c < count; c++) total[c] = (vf){0};
    for (int64_t p = 0; p < pieces; p++) {
        const piece *one = v->piece + p;
        const char *w = line + one->byte;
        const int16_t *x = q + one->words;
        vi sum[VECTORS];
#pragma GCC unroll 8
        for (int c = 0; c < count; c++) sum[c] = bits == 4 ? (vi){v->start[from + c * pieces + p]} : (vi){0};
        const vf scale = v_set(scales[one->group]);
        char last[STEP] = {0};
        for (int64_t s = 0; s < one->steps + (one->rest > 0); s++, w += STEP, x += bits == 4 ? 2 * STEP : STEP) {
            if (s == one->steps) w = memcpy(last, w, (size_t)one->rest);
            if (bits == 8) {
                const words b = extend_signed(w);
#pragma GCC unroll 8
                for (int c = 0; c < count; c++) sum[c] = multiply_add(sum[c], b, load_words(x + c * width), vnni);
            } else {
                const words b = extend(w), low = low_nibble(b), high = high_nibble(b);
#pragma GCC unroll 8
                for (int c = 0; c < count; c++) {
                    sum[c] = multiply_add(sum[c], low, load_words(x + c * width), vnni);
                    sum[c] = multiply_add(sum[c], high, load_words(x + c * width + STEP), vnni);
                }
            }
        }
#pragma GCC unroll 8
        for (int c = 0; c < count; c++)
            total[c] += __builtin_convertvector(sum[c], vf) * scale * v_set(v->scale[from + c * pieces + p]);
        for (int c = 0; zeros && c < count; c++)
            shift[c] -= scale[0] * zeros[one->group] * v->scale[from + c * pieces + p] * v->sum[from + c * pieces + p];
    }
#pragma GCC unroll 8
    for (int c = 0; c < count; c++) part[c][at] = total[c] + (zeros ? (vf){shift[c]} : (vf){0});
}

enum { ROWS = 4 };

// The same for ROWS rows of 4-bit numbers and one vector: arithmetic bounds these, so that the vector is loaded once for all
// of the rows, and so is what a piece says of itself.
INLINE void four_nibble_rows(vf *part, const matrix *m, const vectors *v, int64_t first, int64_t row, const int vnni) {
    const int64_t bytes = m->columns / 2, per_row = groups(m), from = first * v->pieces;
    vf total[ROWS] = {{0}};
    float shift[ROWS] = {0};
    for (int64_t p = 0; p < v->pieces; p++) {
        const piece *one = v->piece + p;
        const char *w = (const char *)m->data + row * bytes + one->byte;
        const int16_t *x = v->q + first * v->words + one->words;
        vi sum[ROWS];
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) sum[r] = (vi){v->start[from + p]};
        for (int64_t s = 0; s < one->steps + (one->rest > 0); s++, w += STEP, x += 2 * STEP) {
            const words even = load_words(x), odd = load_words(x + STEP);
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; r++) {
                char last[STEP];
                const char *line = w + r * bytes;
                __builtin_prefetch(line + ROWS * bytes);  // the next rows: in pieces of these hardware sees no stream
                if (s == one->steps) line = memcpy(memset(last, 0, STEP), line, (size_t)one->rest);
                const words b = extend(line);
                sum[r] = multiply_add(sum[r], low_nibble(b), even, vnni);
                sum[r] = multiply_add(sum[r], high_nibble(b), odd, vnni);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
            const int64_t at = (row + r) * per_row + one->group;
            const float factor = m->scale[at] * v->scale[from + p];
            total[r] += __builtin_convertvector(sum[r], vf) * factor;
            if (m->zero) shift[r] -= factor * m->zero[at] * v->sum[from + p];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) part[r] = total[r] + (m->zero ? (vf){shift[r]} : (vf){0});
}

// ---- vectors ----

static int64_t count_pieces(const matrix *m) {
    if (m->bits == 32) return 0;
    const int64_t whole = m->columns / m->group, rest = m->columns % m->group;
    return whole * ((m->group + PIECE - 1) / PIECE) + (rest + PIECE - 1) / PIECE;
}

INLINE int64_t lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Room in a prepared vector: every piece is padded to whole registers.
static int64_t count_words(const matrix *m) { return m->columns + count_pieces(m) * 2 * STEP; }

size_t prepared_bytes(const matrix *m, int64_t count) {
    if (m->bits == 32) return 0;
    const int64_t pieces = count_pieces(m);
    return (size_t)(lines(pieces * (int64_t)sizeof(piece)) + count * lines(2 * count_words(m)) + 3 * lines(4 * count * pieces));
}

void begin_vectors(vectors *v, const matrix *m, const float *x, int64_t count, int64_t ld, void *memory) {
    *v = (vectors){.x = x, .count = count, .ld = ld};
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
        const int64_t size = end - column < PIECE ? end - column : PIECE, bytes = m->bits == 4 ? size / 2 : size;
        *p = (piece){m->bits == 4 ? column / 2 : column, word, column / m->group, bytes / STEP, bytes % STEP};
        word += (p->steps + (p->rest > 0)) * (m->bits == 4 ? 2 * STEP : STEP);
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

static void prepare_one(vectors *v, const matrix *m, int64_t c, int act, float act_scale) {
    const float *x = v->x + c * v->ld;
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
        float scale = act_scale;
        if (act == ACT_FLOAT) scale = as_float(most) / 32767;
        const int usable = most <= INFINITE && scale == scale && scale <= 3.4e38f && !(act == ACT_FLOAT && most == INFINITE);
        if (!usable || scale == 0) memset(line, 0, sizeof line);
        else if (act == ACT_FLOAT) round_line(line, from, size, scale, -32767.0f, 32767.0f);
        else round_line(line, from, size, scale, -128.0f, 127.0f);
        int64_t sum = 0;
        int16_t *q = v->q + c * v->words + one->words;
        for (int64_t i = 0; i < size; i++) sum += line[i];
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
        const int64_t at = c * v->pieces + p;
        v->scale[at] = usable ? scale : NAN;
        v->sum[at] = (float)sum;
        v->start[at] = (int32_t)(-8 * sum);
    }
}

void prepare(vectors *v, const matrix *m, int64_t from, int64_t to, int act, float act_scale) {
    if (m->bits == 32) return;
    for (int64_t c = from; c < to; c++) prepare_one(v, m, c, act, act_scale);
}

// ---- rows ----

INLINE void sums_of_rows(float *y, int64_t ldy, vf (*part)[VL], const float *bias, int64_t rows, const int count) {
    for (int c = 0; c < count; c++) {
        vf x[VL];
        for (int q = 0; q < VL; q++) x[q] = q < rows ? part[c][q] : (vf){0};
        v_transpose(x);
        vf sum = x[0];
        for (int q = 1; q < VL; q++) sum += x[q];
        if (bias) sum += v_load_some(bias, rows);
        v_store_some(y + c * ldy, sum, rows);
    }
}

// Some rows (at most VL) with `count` vectors beginning at `first`.
INLINE void tile(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t row, int64_t rows, int64_t first,
                 const int count, const int bits, const int vnni) {
    vf part[VECTORS][VL];
    const float *w = (const float *)m->data + row * m->columns, *x = v->x + first * v->ld;
    const int chains = count == 1 ? 4 : count == 2 ? 2 : 1;
    for (int q = 0; q < rows; q++) {
        if (bits == 4 && count == 1 && q + ROWS <= rows) four_nibble_rows(part[0] + q, m, v, first, row + q, vnni), q += ROWS - 1;
        else if (bits != 32) integer_row(part, q, m, v, first, row + q, count, bits, vnni);
        else if (count == 1 || q + 1 == rows) float_row(part, q, w + q * m->columns, x, v->ld, m->columns, 1, count, chains);
        else float_row(part, q, w + q * m->columns, x, v->ld, m->columns, 2, count, chains), q++;
    }
    sums_of_rows(y + first * ldy + row, ldy, part, m->bias ? m->bias + row : NULL, rows, count);
}

#define TILE_CASE(n) \
    case n: tile(m, v, y, ldy, row, rows, first, n, bits, vnni); break

INLINE void tiles(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t row, int64_t rows, int64_t first,
                  const int bits, const int vnni) {
    const int64_t left = v->count - first;
    switch (left < VECTORS ? left : VECTORS) {
        TILE_CASE(1);
        TILE_CASE(2);
        TILE_CASE(3);
        TILE_CASE(4);
#if VL == 16
        TILE_CASE(5);
        TILE_CASE(6);
        TILE_CASE(7);
        TILE_CASE(8);
#endif
    }
}

// All vectors meet some rows while these are in cache: VL of them for few vectors, all of a task's for many.
INLINE void all_rows(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t from, int64_t to, const int bits,
                     const int vnni) {
    const int64_t block = v->count <= 8 ? VL : to - from;
    for (int64_t start = from; start < to; start += block)
        for (int64_t first = 0; first < v->count; first += VECTORS)
            for (int64_t row = start; row < start + block && row < to; row += VL)
                tiles(m, v, y, ldy, row, to - row < VL ? to - row : VL, first, bits, vnni);
}

static void float_rows(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t from, int64_t to) {
    all_rows(m, v, y, ldy, from, to, 32, 0);
}
static void byte_rows(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t from, int64_t to) {
    all_rows(m, v, y, ldy, from, to, 8, 0);
}
static void nibble_rows(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t from, int64_t to) {
    all_rows(m, v, y, ldy, from, to, 4, 0);
}
#if defined(__AVX512F__)
static void byte_rows_vnni(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t from, int64_t to) {
    all_rows(m, v, y, ldy, from, to, 8, 1);
}
static void nibble_rows_vnni(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t from, int64_t to) {
    all_rows(m, v, y, ldy, from, to, 4, 1);
}
static int vnni_here;
__attribute__((constructor)) static void look_for_vnni(void) {
    __builtin_cpu_init();
    vnni_here = __builtin_cpu_supports("avx512vnni");
}
#endif

void multiply_rows(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t from, int64_t to) {
    if (m->bits == 32) { float_rows(m, v, y, ldy, from, to); return; }
#if defined(__AVX512F__)
    if (vnni_here) { (m->bits == 8 ? byte_rows_vnni : nibble_rows_vnni)(m, v, y, ldy, from, to); return; }
#endif
    (m->bits == 8 ? byte_rows : nibble_rows)(m, v, y, ldy, from, to);
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
    prepare(&s->v, &s->a->m, from, to < s->v.count ? to : s->v.count, (int)s->a->act, (float)s->a->act_scale);
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
    begin_vectors(&s.v, &a->m, a->x, a->count, a->m.columns, memory);
    prepare(&s.v, &a->m, 0, a->count, (int)a->act, (float)a->act_scale);
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
        begin_vectors(&s.v, &a->m, a->x + first * a->m.columns, count, a->m.columns, memory);
        if (a->m.bits != 32) parallel_for((count + SHARE_OF_VECTORS - 1) / SHARE_OF_VECTORS, a->threads, prepare_share, &s);
        parallel_for(tasks, a->threads, multiply_share, &s);
    }
    free(memory);
}
