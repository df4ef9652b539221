// A linear map of few vectors, as decoding needs it: every weight is read once, whatever it is stored as.
//
//     y_c = W x_c + bias,   W (rows columns): floats, int8, or two 4-bit numbers per byte (ops/quantized_linear)
//
// Beside weights of few bits a vector is rounded to integers of 16 bits with a scale per piece of at most PIECE columns
// (relative to the largest of the piece an error of 2^-16), unless it is to be of 8 bits; products and sums are exact.
#pragma once
#include <stdint.h>
#include "parallel.h"
#include "vec.h"

enum { PIECE = 256, STEP = 2 * VL };  // columns; 16-bit numbers in a register
enum { VECTORS = 4 };  // that are multiplied at once

typedef struct {
    const void *data;  // NULL: there is none
    const float *scale, *zero, *bias;  // (rows groups), (rows groups) or NULL, (rows) or NULL
    int64_t rows, columns, bits, group;  // bits: 32, 8 or 4; group: columns that share a scale
    const float *rounded, *act_scale;    // (rows) or NULL: y becomes 8-bit integers times these, before the bias; of ACT_STATIC
    int64_t act;                         // what becomes of x in `ready`
} matrix;

typedef struct {
    int64_t byte, words, group, steps, rest;  // of W's row; of a prepared vector; whole registers, and bytes behind them
    uint64_t here, behind;                    // which of the first and the second 64 bytes are there
} piece;

typedef struct {
    const float *x;  // (count columns), `ld` floats from one to the next
    int64_t count, ld, pieces, words;
    piece *piece;
    int16_t *q;    // (count words)
    float *scale;  // (count pieces), and the sum of a piece's integers
    float *sum;
    int32_t *start;  // (count pieces VL): what sums of products begin with, whose weights come as they are + 8 or + 128
    int act;         // ACT_FLOAT: numbers of 16 bits, the others: of 8
    float act_scale;  // of ACT_STATIC
} vectors;

enum { ACT_FLOAT, ACT_STATIC, ACT_DYNAMIC };

// How much memory `prepare` needs for vectors beside a matrix.
size_t prepared_bytes(const matrix *m, int64_t count);
// The vectors `from` to `to` of x (count columns) are made ready for m; `begin_vectors` once before.
void begin_vectors(vectors *v, const matrix *m, const float *x, int64_t count, int64_t ld, int act, float act_scale, void *memory);
void prepare(vectors *v, const matrix *m, int64_t from, int64_t to);
// Both for all vectors, in the way that the matrix says.
INLINE void ready(vectors *v, const matrix *m, const float *x, int64_t count, int64_t ld, void *memory) {
    begin_vectors(v, m, x, count, ld, (int)m->act, m->act_scale ? *m->act_scale : 0, memory);
    prepare(v, m, 0, count);
}
// y[c * ldy + j] = row j of the product, plus bias, from <= j < to.
void multiply_rows(const matrix *m, const vectors *v, float *y, int64_t ldy, int64_t from, int64_t to);

// Rows per task: some tasks for every thread, which end at about the same time.
INLINE int64_t rows_per_task(int64_t rows, int64_t threads) {
    int64_t wanted = (rows / (threads * 6) + VL - 1) / VL * VL;
    return wanted < VL ? VL : wanted > 128 ? 128 : wanted;
}
